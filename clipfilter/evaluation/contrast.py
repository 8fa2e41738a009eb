"""How each concept of a policy sees its contrast: from the text vectors alone, before any image is looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfilter.policies import class_vectors

if TYPE_CHECKING:
    from clipfilter.models import Encoder
    from clipfilter.policies import Policy

_NEAREST = 3


@dataclass(frozen=True)
class Neighbour:
    """A negative and its cosine to a positive; generic: not named by the rule itself."""

    phrase: str
    cosine: float
    generic: bool


@dataclass(frozen=True)
class Positive:
    """A positive phrase: its most alike other positive (None where it is alone), and its nearest negatives."""

    phrase: str
    alike: str | None
    alike_cosine: float | None
    nearest: list[Neighbour]

    @property
    def crowded(self) -> list[Neighbour]:
        """Negatives that are more like this positive than any other positive is: the model may not tell them apart."""
        return [near for near in self.nearest if self.alike_cosine is not None and near.cosine > self.alike_cosine]


@dataclass(frozen=True)
class Contrast:
    """One concept rule, seen by one model."""

    rule: str
    positives: list[Positive]

    @property
    def warnings(self) -> list[str]:
        """A sentence for each negative that stands nearer to a positive than the other positives do."""
        return [
            f"{self.rule}: “{near.phrase}” ({near.cosine:.2f}) is nearer to “{positive.phrase}” than any other positive "
            f"(“{positive.alike}”, {positive.alike_cosine:.2f}); the model may not tell them apart"
            for positive in self.positives
            for near in positive.crowded
        ]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, with the warnings."""
        return {**asdict(self), "warnings": self.warnings}


def contrasts(policy: Policy, encoder: Encoder) -> list[Contrast]:
    """One for each concept rule that names phrases, in the order of the policy.

    Vectors as the policy is compiled: the mean of the unit-norm template embeddings, renormalised.
    """
    found = []
    for rule in policy.rules:
        if rule.measure.compared is None:
            continue
        positives, near, generic = map(list, rule.measure.compared)
        negatives = [*near, *generic]
        vectors = class_vectors(encoder, [*positives, *negatives], rule.templates or policy.templates)
        cosines = vectors @ vectors.T
        found.append(
            Contrast(
                rule.id,
                [_positive(place, positives, negatives, len(near), cosines) for place in range(len(positives))],
            )
        )
    return found


def _positive(place: int, positives: list[str], negatives: list[str], named: int, cosines: np.ndarray) -> Positive:
    others = cosines[place, : len(positives)].copy()
    others[place] = -np.inf
    best = int(np.argmax(others))
    alone = len(positives) == 1
    to_negatives = cosines[place, len(positives) :]
    nearest = np.argsort(-to_negatives, kind="stable")[:_NEAREST].tolist()
    return Positive(
        positives[place],
        None if alone else positives[best],
        None if alone else float(others[best]),
        [Neighbour(negatives[index], float(to_negatives[index]), index >= named) for index in nearest],
    )
