"""Phrases become columns: each one the mean of its prompts' vectors, grouped as the concept rules read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfilter.errors import RefusedError
from clipfilter.policies.kinds import Concept
from clipfilter.policies.language.attachments import Attachments
from clipfilter.policies.plans import ConceptPlan
from clipfilter.policies.prompts import fill
from clipfilter.policies.text_cache import cached_texts

if TYPE_CHECKING:
    from clipfilter.policies.compile import CompiledRule, TextEncoder
    from clipfilter.policies.language.schema import Policy, Rule

_TEXT_BATCH = 1024

Phrase = tuple[str, tuple[str, ...]]  # a phrase and its templates


class PhraseColumns:
    """Collects the columns of all concept rules; `plan` embeds them."""

    def __init__(self) -> None:
        self.labels: list[str] = []
        self.prompts: list[str] = []
        self._phrases: list[Phrase | np.ndarray] = []  # what each column is made of: a phrase, or a learned vector
        self._counted: list[float] = []
        self._starts: list[int] = []
        self._shared: dict[Any, int] = {}  # generic groups are the same for most rules
        self._members: list[tuple[str, int, int, int, str]] = []
        self._backgrounds: dict[str, float] = {}

    def add(self, rule: Rule, concept: Concept, policy: Policy, encoder: TextEncoder, files: Attachments) -> None:
        """One concept rule. Raises RefusedError where its learned vectors do not fit the model."""
        templates = rule.templates or policy.templates
        positive = negative = np.zeros((0, encoder.dim), dtype=np.float32)
        if concept.vectors is not None:
            learned = concept.learned(files)
            learned.check_model(files.path(concept.vectors), encoder.fingerprint, encoder.dim)
            positive, negative = learned.positives, learned.negatives
        first = self._group(concept.any_of, templates, concept, positive, "learned vector")
        near = self._group(concept.but_not, templates, concept, negative, "learned contrast")
        generic = concept.generic_phrases
        if (generic, templates) not in self._shared:
            self._shared[generic, templates] = self._group(generic, templates)
        score = "probability" if concept.score == "calibrated" else concept.score
        if concept.background is not None and encoder.score_kind == "softmax":
            self._backgrounds[rule.id] = concept.background
        for group in [first, *(self._group((phrase,), templates) for phrase in concept.all_of)]:
            if group >= 0:
                self._members.append((rule.id, group, near, self._shared[generic, templates], score))

    def _group(
        self,
        phrases: Sequence[str],
        templates: tuple[str, ...],
        concept: Concept | None = None,
        learned: np.ndarray | None = None,
        name: str = "",
    ) -> int:
        """The number of a new group of columns, -1 where it would be empty."""
        rows = [] if learned is None else list(learned)
        if not phrases and not rows:
            return -1
        self._starts.append(len(self._phrases))
        self._phrases += [(phrase, templates) for phrase in phrases]
        self._phrases += rows
        self.labels += [*phrases, *(f"{name} {number + 1}" for number in range(len(rows)))]
        weights = concept.weights if concept is not None else {}
        self._counted += [weights.get(phrase, 1.0) for phrase in phrases] + [1.0] * len(rows)
        return len(self._starts) - 1

    def plan(self, encoder: TextEncoder, rules: Mapping[str, CompiledRule], further: np.ndarray) -> ConceptPlan:
        """All columns embedded; further: float32 [h, dim], columns that follow those of the phrases."""
        told = [item for item in self._phrases if isinstance(item, tuple)]
        vectors, self.prompts = unit_vectors(told, encoder)
        weights = np.empty((len(self._phrases), encoder.dim), dtype=np.float32)
        words = iter(vectors)
        for index, item in enumerate(self._phrases):
            weights[index] = next(words) if isinstance(item, tuple) else item
        names = list(dict.fromkeys(member[0] for member in self._members))
        ranked = {rule.of for rule in rules.values() if rule.of is not None}
        return ConceptPlan.build(
            weights=np.concatenate([weights, further]),
            phrases=tuple(self.labels),
            starts=self._starts,
            members=self._members,
            thresholds=[rules[name].thresholds for name in names],
            always_explained=ranked,
            logit_scale=float(encoder.logit_scale),
            logit_bias=float(encoder.logit_bias or 0.0),
            sigmoid=encoder.score_kind == "sigmoid",
            counted=np.array(self._counted) if any(weight != 1.0 for weight in self._counted) else None,
            backgrounds=self._backgrounds,
            curves={name: curve for name in names if (curve := rules[name].curve) is not None},
        )


def unit_vectors(phrases: Sequence[Phrase], encoder: TextEncoder) -> tuple[np.ndarray, list[str]]:
    """float32 [n, dim] unit vectors of phrases, and the prompts that were embedded, each once.

    Raises RefusedError where the model gives a phrase no usable vector.
    """
    prompts = {fill(template, phrase): None for phrase, templates in phrases for template in templates}
    position = {prompt: index for index, prompt in enumerate(prompts)}
    vectors = _embed(list(prompts), encoder)
    weights = np.empty((len(phrases), encoder.dim), dtype=np.float32)
    for index, (phrase, templates) in enumerate(phrases):
        mean = vectors[[position[fill(template, phrase)] for template in templates]].mean(axis=0)
        norm = float(np.linalg.norm(mean))
        if not norm > 1e-6:
            raise RefusedError(f"the model {encoder.name} gives no usable vector for the phrase {phrase!r}")
        weights[index] = mean / norm
    return weights, list(prompts)


def _embed(prompts: list[str], encoder: TextEncoder) -> np.ndarray:
    """Unit-norm float64 [n, dim]."""
    parts = [
        np.asarray(cached_texts(prompts[start : start + _TEXT_BATCH], encoder), dtype=np.float64)
        for start in range(0, len(prompts), _TEXT_BATCH)
    ]
    vectors = np.concatenate(parts) if parts else np.zeros((0, encoder.dim))
    if vectors.shape != (len(prompts), encoder.dim) or not np.isfinite(vectors).all():
        raise RefusedError(f"the model {encoder.name} did not give finite text vectors of {encoder.dim} numbers")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12))
