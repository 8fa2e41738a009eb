"""Scores columns of rows: pure functions, fixed blocks, no Python object per row (but for texts).

What makes results reproducible: rows are scored in zero-padded blocks of 1024, always of the same shape, so a
score never depends on how many rows follow. A score within 1e-5 of one of its thresholds (for linear heads: times
the length of the weights) is computed again in float64 from the same float16 embedding and compared with the exact
threshold; the float32 that is stored is then moved, by at most one unit in the last place, to the side of the
float32 threshold where the float64 value lies (see arithmetic.py). `decide` (deciding.py) compares nothing but stored float32
scores with float32 thresholds, so record and decision cannot contradict each other.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.policies.arithmetic import BLOCK, paired, upcast, usable
from clipfilter.policies.kinds.base import Answer, Block, CompiledRule, Found, Plan, Rows
from clipfilter.policies.parts import conditions
from clipfilter.policies.parts.columns import metadata_values
from clipfilter.policies.parts.overrides import OverrideTable


@dataclass(frozen=True)
class Scores:
    """Scores of n rows. `values[rule]` is float32 [n], NaN where the rule cannot be evaluated.

    `nearest[rule]` and `contrast[rule]` are int32 [n] positions in the policy's labels, whose first are its phrases. Of
    concept rules: the positive with the highest cosine and the strongest negative, -1 for rows that no band of the rule
    can concern. Of safety and text rules `nearest` is the concept, language, pattern or entry found. `skipped[rule]`
    (rules with a condition) is bool [n]: rows to which the rule does not apply. `overrides`: int8 [n], what a person
    decided (0 keep, 1 review, 2 reject), -1 for nothing; None without overrides.
    """

    rows: int
    values: dict[str, np.ndarray]
    similarity: np.ndarray
    nearest: dict[str, np.ndarray]
    contrast: dict[str, np.ndarray]
    skipped: dict[str, np.ndarray] = field(default_factory=dict)
    overrides: np.ndarray | None = None


@dataclass(frozen=True)
class Scorer:
    """The rules of a policy as they score. matrix: float32 [columns, dim], those of all plans one after the other.

    plans and answers stand beside the position of their first name among the policy's labels.
    """

    rules: tuple[CompiledRule, ...]
    matrix: np.ndarray
    plans: tuple[tuple[Plan, int], ...]
    answers: dict[str, tuple[Answer, int]]
    overrides: OverrideTable | None

    def score(
        self, image_emb: np.ndarray, text_emb: np.ndarray | None, has_text: np.ndarray | None, columns: pa.Table
    ) -> Scores:
        """Scores of n rows, counted in blocks from the first row given (so call it with whole shards).

        image_emb, text_emb: float16 [n, d], unit norm (text_emb may be None); has_text: bool [n], which rows have
        a caption (None: all). columns: n rows with source columns, sizes and image facts; its `cf_similarity`
        serves where there are no text embeddings. A zero or non-finite embedding cannot be evaluated (NaN).
        Raises RefusedError for a rule whose column is absent or of the wrong type.
        """
        n = len(image_emb)
        if columns.num_rows != n:
            raise ValueError(f"{n} embeddings but {columns.num_rows} rows of columns")
        if n and image_emb.shape[1] != self.matrix.shape[1]:
            raise ValueError(f"embeddings have {image_emb.shape[1]} numbers, the policy's model {self.matrix.shape[1]}")
        cosine, found = self._blocks(image_emb, text_emb)
        if has_text is not None:
            cosine[~np.asarray(has_text, dtype=bool)] = np.nan
        if text_emb is None and cf.SIMILARITY in columns.column_names:
            cosine[:] = metadata_values(cf.SIMILARITY, columns)
        known = self.overrides is not None and cf.UID in columns.column_names
        overrides = self.overrides.find(columns.column(cf.UID)) if known else None  # type: ignore[union-attr]
        scores = Scores(n, {}, cosine, {}, {}, {}, overrides)
        for (plan, first), own in zip(self.plans, found, strict=True):
            scores.values.update(zip(plan.rules, own.values, strict=True))
            for labels, into in ((own.nearest, scores.nearest), (own.contrast, scores.contrast)):
                if labels is not None:
                    into.update(zip(plan.rules, _placed(labels, first), strict=True))
        rows = Rows(columns, cosine, image_emb, text_emb, scores.values, scores.skipped)
        for rule in self.rules:
            self._answer(rule, rows, scores)
        return replace(scores, values={rule.id: scores.values[rule.id] for rule in self.rules})

    def _answer(self, rule: CompiledRule, rows: Rows, scores: Scores) -> None:
        """One rule's score into `scores` where no plan gave it, and where its condition excludes rows."""
        if rule.id in self.answers:
            answer, first = self.answers[rule.id]
            scores.values[rule.id], labels = answer.score(rows)
            if labels is not None:
                scores.nearest[rule.id] = _placed(labels, first)
        of = rule.measure.of_rule
        if of is not None and of in scores.skipped:
            scores.skipped[rule.id] = scores.skipped[of]
        if rule.when is not None:
            applies = conditions.truth(rule.when, rows.columns)
            scores.skipped[rule.id] = applies == 0
            scores.values[rule.id] = np.where(applies == 1, scores.values[rule.id], np.float32(np.nan))

    def _blocks(self, image_emb: np.ndarray, text_emb: np.ndarray | None) -> tuple[np.ndarray, list[Found]]:
        """Cosines of images and captions, float32 [n], and what every plan finds: one product for each block."""
        n = len(image_emb)
        cosine = np.full(n, np.nan, dtype=np.float32)
        found = [Found.empty(len(plan.rules), n, plan.names) for plan, _ in self.plans]
        block, texts = np.empty((2, BLOCK, image_emb.shape[1]), dtype=np.float32)
        products = np.empty((len(self.matrix), BLOCK), dtype=np.float32)
        # Rows that hold no usable embedding become NaN.
        with _one_blas_thread(), np.errstate(invalid="ignore", over="ignore"):
            for start in range(0, n, BLOCK):
                rows = slice(start, min(start + BLOCK, n))
                half = image_emb[rows]
                upcast(half, block)
                if text_emb is None:
                    valid = usable(block)[: len(half)]
                else:
                    upcast(text_emb[rows], texts)
                    valid, cosine[rows] = (part[: len(half)] for part in paired(block, texts))
                if not self.plans:
                    continue
                np.matmul(self.matrix, block.T, out=products)
                stop = 0
                for (plan, _), out in zip(self.plans, found, strict=True):
                    begin, stop = stop, stop + len(plan.weights)
                    plan.score(Block(half, block, valid), products[begin:stop], out.part(rows))
        return cosine, found


def _placed(labels: np.ndarray, first: int) -> np.ndarray:
    """Positions among the policy's labels of positions among a rule's own, -1 for none."""
    return labels if not first else np.where(labels >= 0, labels + np.int32(first), np.int32(-1)).astype(np.int32)


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController()


def _one_blas_thread() -> Any:
    """One thread for the small products here: waking more costs more than they take, above all beside an encoder."""
    return _blas().limit(limits=1, user_api="blas")
