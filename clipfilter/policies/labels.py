"""Labels against image embeddings: one vector per label, scores, and the columns that a run stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.policies.arithmetic import sigmoid
from clipfilter.policies.parts.fields import same_phrase
from clipfilter.policies.prompts import DEFAULT_TEMPLATES, GENERIC_NEGATIVES, GENERIC_VERSION, TEMPLATES, fill
from clipfilter.policies.texts import class_vectors, cosine_blocks

if TYPE_CHECKING:
    from clipfilter.models import Encoder

MAX_LABELS = 100_000
MAX_LABEL_CHARS = 300
#: The columns of labels, best first in cf_labels.
LABEL_COLUMNS = pa.schema(
    [
        (cf.LABEL, pa.string()),
        (cf.LABEL_SCORE, pa.float32()),
        (cf.LABELS, pa.list_(pa.struct([("label", pa.string()), ("score", pa.float32())]))),
    ]
)


@dataclass(frozen=True)
class LabelSet:
    """What images are compared with; JSON in a run's plan, where it decides the result.

    templates: each with one `{}` for the label. independent: every label gets a score of its own instead of a share
    of 1. top: labels stored per image. generic: version of the generic negatives of independent softmax scores.

    Raises RefusedError for no label, an empty one, one that is there twice, or `top` below 1.
    """

    names: tuple[str, ...]
    templates: tuple[str, ...] = TEMPLATES[DEFAULT_TEMPLATES]
    independent: bool = False
    top: int = 5
    generic: int = GENERIC_VERSION

    def __post_init__(self) -> None:
        if not self.names:
            raise RefusedError("there are no labels; name some, for example --labels cat,dog.")
        if len(self.names) > MAX_LABELS:
            raise RefusedError(f"there are {len(self.names):,} labels, more than the {MAX_LABELS:,} allowed.")
        seen: set[str] = set()
        for name in self.names:
            if not name.strip():
                raise RefusedError("a label is empty; remove it, or a comma too many.")
            if len(name) > MAX_LABEL_CHARS:
                raise RefusedError(f"the label {name[:40]!r}... is longer than {MAX_LABEL_CHARS} characters.")
            if name in seen:
                raise RefusedError(f"the label {name!r} is there twice; name each label once.")
            seen.add(name)
        if self.top < 1:
            raise RefusedError(f"the number of labels per image is 1 or more, not {self.top}.")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "names": list(self.names), "templates": list(self.templates)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LabelSet:
        """The labels that `to_json` wrote."""
        return cls(**{**data, "names": tuple(data["names"]), "templates": tuple(data["templates"])})


class LabelScorer:
    """Labels bound to one model. Safe to use from several threads.

    Shares (the default): softmax over the labels of logit_scale * cosine, the zero-shot classification of Radford et
    al. 2021, for sigmoid models too. Independent: for sigmoid models sigmoid(logit_scale * cosine + logit_bias) (Zhai et
    al. 2023). For softmax models, whose logits mean nothing alone, the softmax of the label against the mean of the
    generic negatives, sigmoid(s * cosine - logmeanexp(s * generics)), as a policy's concept with this one phrase has it.

    Raises RefusedError where the model gives no usable vector.
    """

    def __init__(self, labels: LabelSet, encoder: Encoder) -> None:
        self.labels = labels
        self.vectors = class_vectors(encoder, labels.names, labels.templates)
        """float32 [labels, dim], unit norm: the very vectors of `clipfilter evaluate`."""
        self.truncated = encoder.count_truncated([fill(t, name) for name in labels.names for t in labels.templates])
        self._scale = float(encoder.logit_scale)
        self._bias = float(encoder.logit_bias or 0.0)
        self._sigmoid = encoder.score_kind == "sigmoid"
        self._generics: np.ndarray | None = None
        if labels.independent and not self._sigmoid:
            phrases = GENERIC_NEGATIVES[labels.generic]
            self._generics = class_vectors(encoder, phrases, labels.templates)
            # A label is no negative of itself.
            self._own = np.array(
                [[same_phrase(name) == same_phrase(phrase) for phrase in phrases] for name in labels.names]
            )

    def best(self, image_emb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The best labels of each image: positions int32 [n, k] and scores float32 [n, k], best first.

        image_emb: [n, dim], unit norm. k is `top`, or the number of labels where there are fewer. Of equal scores the
        earlier label comes first; without `independent` the order is that of the cosines, bit by bit as `evaluate`
        ranks them.
        """
        n, count = len(image_emb), len(self.labels.names)
        k = min(self.labels.top, count)
        index, score = np.empty((n, k), np.int32), np.empty((n, k), np.float32)
        cosines: np.ndarray | None = None
        for rows, columns, block in cosine_blocks(image_emb, self.vectors):
            if columns.start == 0:
                cosines = np.empty((len(block), count), np.float32)
            assert cosines is not None
            cosines[:, columns] = block
            if columns.stop == count:
                index[rows], score[rows] = self._best(cosines, image_emb[rows], k)
        return index, score

    def columns(self, image_emb: np.ndarray) -> pa.Table:
        """What a run stores of n images: `LABEL_COLUMNS`, n rows. image_emb: float16 [n, dim], unit norm."""
        index, score = self.best(image_emb)
        n, k = index.shape
        names = pa.array(list(self.labels.names), pa.string())
        flat = pa.DictionaryArray.from_arrays(pa.array(index.reshape(-1)), names).dictionary_decode()
        kind = LABEL_COLUMNS.field(cf.LABELS).type
        items = pa.StructArray.from_arrays([flat, pa.array(score.reshape(-1))], fields=list(kind.value_type))
        offsets = pa.array(np.arange(n + 1, dtype=np.int32) * k)
        return pa.table(
            {
                cf.LABEL: flat.take(pa.array(np.arange(n) * k)),
                cf.LABEL_SCORE: pa.array(score[:, 0]),
                cf.LABELS: pa.ListArray.from_arrays(offsets, items, type=kind),
            },
            schema=LABEL_COLUMNS,
        )

    def _best(self, cosines: np.ndarray, image_emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = self._scores(cosines, image_emb)
        ranked = cosines if self._generics is None else scores
        order = _largest(ranked, k)
        return order.astype(np.int32), np.take_along_axis(scores, order, axis=1).astype(np.float32)

    def _scores(self, cosines: np.ndarray, image_emb: np.ndarray) -> np.ndarray:
        """float64 [m, labels] from their cosines float32 [m, labels]."""
        logits = self._scale * cosines.astype(np.float64)
        if not self.labels.independent:
            logits -= logits.max(axis=1, keepdims=True)
            np.exp(logits, out=logits)
            return np.asarray(logits / logits.sum(axis=1, keepdims=True))
        if self._generics is None:
            return sigmoid(logits + self._bias)
        generic = self._scale * (image_emb.astype(np.float64) @ self._generics.astype(np.float64).T)
        top = generic.max(axis=1, keepdims=True)
        spread = np.exp(generic - top)
        against = spread @ ~self._own.T / (~self._own).sum(axis=1)
        return sigmoid(logits - top - np.log(against))


def _largest(values: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k largest values of each row, largest first; of equal ones the lower column. int [m, k]."""
    if k >= values.shape[1] or k > 64:
        return np.argsort(-values, axis=1, kind="stable")[:, :k]
    # A few passes beat sorting thousands of labels; argmax finds the first of equal values.
    left, rows = values.copy(), np.arange(len(values))
    order = np.empty((len(values), k), np.intp)
    for place in range(k):
        order[:, place] = left.argmax(axis=1)
        left[rows, order[:, place]] = -np.inf
    return order


def parse_labels(text: str) -> tuple[str, ...]:
    """The labels of `cat, dog`: names between commas, spaces around them dropped."""
    return tuple(name.strip() for name in text.split(","))


def label_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Labels as a caller may give them: a sequence of names, or one text with commas."""
    return parse_labels(given) if isinstance(given, str) else tuple(given)
