"""Scores columns of rows: pure functions, fixed blocks, no Python object per row (but for texts).

What makes results reproducible: rows are scored in zero-padded blocks of 1024, always of the same shape, so a
score never depends on how many rows follow. A score within 1e-5 of one of its thresholds (for linear heads: times
the length of the weights) is computed again in float64 from the same float16 embedding and compared with the exact
threshold; the float32 that is stored is then moved, by at most one unit in the last place, to the side of the
float32 threshold where the float64 value lies. Of heads of several layers the first is part of the product, the others are
float64, and how close is close follows from the layers' norms; where that says too little, all is float64 from the start.
`decide` (deciding.py) compares nothing but stored float32 scores with float32 thresholds, so record and decision cannot
contradict each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.policies import blocks
from clipfilter.policies.blocks import BLOCK, similarity
from clipfilter.policies.columns import metadata_values
from clipfilter.policies.deciding import REASONS, Decisions, annotation, decide
from clipfilter.policies.language import conditions
from clipfilter.policies.plans import RECHECK, ConceptPlan, HeadPlan, LinearHead, OpenedHead, concept_scores

if TYPE_CHECKING:
    from clipfilter.models.heads import Head
    from clipfilter.policies.compile import CompiledPolicy, CompiledRule
    from clipfilter.policies.safety import SafetyMember, SafetyPlan

__all__ = [
    "BLOCK", "REASONS", "RECHECK", "ConceptPlan", "Decisions", "HeadPlan", "Scores", "annotation", "concept_scores",
    "decide", "score", "settle", "similarity",
]  # fmt: skip


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


# ---------------------------------------------------------------- scoring


def score(
    compiled: CompiledPolicy,
    image_emb: np.ndarray,
    text_emb: np.ndarray | None,
    has_text: np.ndarray | None,
    columns: pa.Table,
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
    if n and image_emb.shape[1] != compiled.concepts.weights.shape[1]:
        raise ValueError(
            f"embeddings have {image_emb.shape[1]} numbers, the policy's model {compiled.concepts.weights.shape[1]}"
        )
    plan = compiled.concepts
    rules = {rule.id: rule for rule in compiled.rules}
    concept_rules = [rules[name] for name in plan.rules]
    explained = _explained(plan, concept_rules)
    values: dict[str, np.ndarray] = {}
    concept = np.full((len(plan.rules), n), np.nan, dtype=np.float32)
    nearest = np.full((len(plan.rules), n), -1, dtype=np.int32)
    contrast = np.full((len(plan.rules), n), -1, dtype=np.int32)
    cosine = np.full(n, np.nan, dtype=np.float32)
    heads = {name: np.full(n, np.nan, dtype=np.float32) for name in compiled.heads.rules}
    safety = compiled.safety
    for member in safety.members:
        heads[member.rule] = np.full(n, np.nan, dtype=np.float32)
    decides = {member.rule: np.full(n, -1, dtype=np.int32) for member in safety.members}
    block, texts = np.empty((2, BLOCK, image_emb.shape[1]), dtype=np.float32)
    products = np.empty((len(plan.weights), BLOCK), dtype=np.float32)
    # Rows that hold no usable embedding become NaN.
    with _one_blas_thread(), np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, n, BLOCK):
            rows = slice(start, min(start + BLOCK, n))
            half = image_emb[rows]
            blocks.upcast(half, block)
            if text_emb is None:
                valid = blocks.usable(block)[: len(half)]
            else:
                blocks.upcast(text_emb[rows], texts)
                valid, cosine[rows] = (part[: len(half)] for part in blocks.paired(block, texts))
            if not plan.rules and not heads:
                continue
            np.matmul(plan.weights, block.T, out=products)
            if plan.rules:
                cosines = products[: len(plan.phrases)]
                target = (concept[:, rows], nearest[:, rows], contrast[:, rows])
                _score_concepts(plan, concept_rules, explained, cosines, half, valid, *target)
            of_heads = products[len(plan.phrases) :]
            for linear, product in zip(compiled.heads.linear, of_heads, strict=False):
                heads[linear.rule][rows] = _linear_scores(linear, product, half, valid, rules[linear.rule].thresholds)
            for opened in compiled.heads.opened:
                hidden = of_heads[opened.columns]
                heads[opened.rule][rows] = _opened_scores(opened, hidden, half, valid, rules[opened.rule].thresholds)
            for name, head in compiled.heads.curved:
                heads[name][rows] = _curved_scores(head, block, valid, rules[name].thresholds)
            for member in safety.members:
                of_safety = products[len(products) - len(safety.weights) :]
                heads[member.rule][rows], decides[member.rule][rows] = _safety_scores(
                    member, safety, of_safety, half, valid, rules[member.rule].thresholds
                )
    if has_text is not None:
        cosine[~np.asarray(has_text, dtype=bool)] = np.nan
    if text_emb is None and cf.SIMILARITY in columns.column_names:
        cosine[:] = metadata_values(cf.SIMILARITY, columns)

    for position, name in enumerate(plan.rules):
        values[name] = concept[position]
    labels = dict(zip(plan.rules, nearest, strict=True)) | decides
    skipped: dict[str, np.ndarray] = {}
    for rule in compiled.rules:
        if rule.kind == "alignment":
            values[rule.id] = _alignment(rule, cosine, image_emb, text_emb)
        elif rule.id in heads:
            values[rule.id] = heads[rule.id]
        elif rule.id in compiled.columns:
            exact, found = compiled.columns[rule.id].scores(columns)
            values[rule.id] = settle(exact, rule.thresholds)
            if found is not None:
                labels[rule.id] = found
        elif rule.combine:
            values[rule.id] = settle(_combined(rule, values, skipped), rule.thresholds)
        elif rule.of is not None:
            values[rule.id] = values[rule.of]
            if rule.of in skipped:
                skipped[rule.id] = skipped[rule.of]
        if rule.when is not None:
            applies = conditions.truth(rule.when, columns)
            skipped[rule.id] = applies == 0
            values[rule.id] = np.where(applies == 1, values[rule.id], np.float32(np.nan))
    return Scores(
        rows=n,
        values={rule.id: values[rule.id] for rule in compiled.rules},
        similarity=cosine,
        nearest=labels,
        contrast=dict(zip(plan.rules, contrast, strict=True)),
        skipped=skipped,
        overrides=_overrides(compiled, columns),
    )


def _overrides(compiled: CompiledPolicy, columns: pa.Table) -> np.ndarray | None:
    if compiled.overrides is None or cf.UID not in columns.column_names:
        return None
    return compiled.overrides.find(columns.column(cf.UID))


def _combined(rule: CompiledRule, values: dict[str, np.ndarray], skipped: dict[str, np.ndarray]) -> np.ndarray:
    """Weighted sum of other rules' scores, float64 [n]; a part that does not apply to a row adds nothing."""
    total: np.ndarray | float = 0.0
    for name, weight in rule.combine:
        part = values[name].astype(np.float64)
        if name in skipped:
            part[skipped[name]] = 0.0
        total = total + weight * part
    return np.asarray(total)


def settle(exact: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """float64 scores as float32 that lie on the same side of every float32 threshold as they did in float64.

    A score equal to the threshold stays equal to it; otherwise rounding may move it onto or across the
    threshold, and it is put back on its own side, to the next float32.
    """
    stored = exact.astype(np.float32)
    for threshold in thresholds:
        single = np.float32(threshold)
        stored[exact == threshold] = single
        stored[(exact > threshold) & (stored <= single)] = np.nextafter(single, np.float32(np.inf))
        stored[(exact < threshold) & (stored >= single)] = np.nextafter(single, np.float32(-np.inf))
    return stored


def _score_concepts(
    plan: ConceptPlan,
    rules: Sequence[CompiledRule],
    explained: tuple[np.ndarray, np.ndarray],
    cosines: np.ndarray,
    half: np.ndarray,
    valid: np.ndarray,
    out: np.ndarray,
    nearest: np.ndarray,
    contrast: np.ndarray,
) -> None:
    """One block of concept scores into `out` [R, m] from its cosines [k, BLOCK], and phrases of the rows that a band can
    concern."""
    out[:] = concept_scores(plan, cosines)[:, : len(half)]
    out[:, ~valid] = np.nan

    doubtful = np.zeros(out.shape, dtype=bool)
    for thresholds in plan.thresholds:
        doubtful |= np.abs(out - thresholds[:, None]) <= plan.doubt[:, None]
    picked = np.flatnonzero(doubtful.any(axis=0))
    if len(picked):
        # Row by row: the shape of the product, and so its rounding, does not depend on how many rows are close.
        exact_cosines = np.stack([plan.exact_weights @ half[row].astype(np.float64) for row in picked], axis=1)
        exact = concept_scores(plan, exact_cosines)
        for position in np.flatnonzero(doubtful.any(axis=1)).tolist():
            chosen = doubtful[position, picked]
            out[position, picked[chosen]] = settle(exact[position, chosen], rules[position].thresholds)

    asked = (out > explained[0][:, None]) | (out < explained[1][:, None])
    of_rule, at = np.divmod(np.flatnonzero(asked), len(half))  # faster than np.nonzero in 2-D
    nearest[of_rule, at] = _strongest(plan.positive_columns, cosines, of_rule, at)
    contrast[of_rule, at] = _strongest(plan.negative_columns, cosines, of_rule, at)


def _linear_scores(
    head: LinearHead, product: np.ndarray, half: np.ndarray, valid: np.ndarray, thresholds: Sequence[float]
) -> np.ndarray:
    """One block of a linear head from its column of the product, float32 [m]; close ones settled in float64."""
    values = np.where(valid, product[: len(half)] + np.float32(head.bias), np.float32(np.nan))
    close = np.abs(values - np.array(thresholds, dtype=np.float32)[:, None]) <= head.near
    picked = np.flatnonzero(close.any(axis=0))
    if len(picked):
        wide = head.weight.astype(np.float64)
        exact = np.array([half[row].astype(np.float64) @ wide + head.bias for row in picked])
        values[picked] = settle(exact, thresholds)
    return values


def _opened_scores(
    opened: OpenedHead, product: np.ndarray, half: np.ndarray, valid: np.ndarray, thresholds: Sequence[float]
) -> np.ndarray:
    """One block of a head of several layers from the product [hidden, BLOCK] of its first, float32 [m]; close ones
    settled in float64 from the embedding."""
    network = opened.network
    hidden = product[:, : len(half)].T.astype(np.float64)
    hidden += network.first[1]
    hidden += network.words(half)
    values = network.rest(hidden).astype(np.float32)
    values[~valid] = np.nan
    close = np.abs(values - np.array(thresholds, dtype=np.float32)[:, None]) <= opened.near
    picked = np.flatnonzero(close.any(axis=0))
    if len(picked):
        # Row by row: the shape of the product, and so its rounding, does not depend on how many rows are close.
        exact = np.concatenate([network.exact(half[row : row + 1]) for row in picked])
        values[picked] = settle(exact, thresholds)
    return values


def _curved_scores(head: Head, block: np.ndarray, valid: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """One block of any other head, float32 [m]: computed in float64 from the start, since an error in float32 would
    grow through its layers by a factor that nobody knows."""
    if not valid.all():
        block = block.copy()
        block[: len(valid)][~valid] = 0.0
    values = settle(head.exact(block)[: len(valid)], thresholds)
    values[~valid] = np.nan
    return values


def _safety_scores(
    member: SafetyMember,
    plan: SafetyPlan,
    products: np.ndarray,
    half: np.ndarray,
    valid: np.ndarray,
    thresholds: Sequence[float],
) -> tuple[np.ndarray, np.ndarray]:
    """One block of a safety checker: scores float32 [m] and labels int32 [m] of the concepts that decide. What is close
    to a threshold, or to the limit of special care, is settled in float64."""
    values, concept, care = member.scores(products[member.columns, : len(half)])
    close = (np.abs(values - np.array(thresholds, dtype=np.float32)[:, None]) <= RECHECK).any(axis=0)
    picked = np.flatnonzero(valid & (close | (care <= RECHECK)))
    if len(picked):
        weights = plan.weights[member.columns].astype(np.float64)
        # Row by row: the shape of the product, and so its rounding, does not depend on how many rows are close.
        exact = np.stack([weights @ half[row].astype(np.float64) for row in picked], axis=1)
        values[picked] = settle(member.scores(exact)[0], thresholds)
    values[~valid] = np.nan
    return values, np.where(valid, concept + member.label, -1).astype(np.int32)


def _explained(plan: ConceptPlan, rules: Sequence[CompiledRule]) -> tuple[np.ndarray, np.ndarray]:
    """Of which scores the nearest phrases may be asked, float32 [R] each: those above the first and those below the second,
    which are in a band; all where the dataset ranks the rule."""
    above = np.full(len(rules), np.inf, dtype=np.float32)
    below = np.full(len(rules), -np.inf, dtype=np.float32)
    for position, rule in enumerate(rules):
        if rule.id in plan.always_explained:
            above[position] = -np.inf
        elif rule.direction == "below":
            below[position] = max(rule.thresholds)
        elif rule.direction == "above":
            above[position] = min(rule.thresholds)
    return above, below


def _strongest(columns: np.ndarray, cosines: np.ndarray, of_rule: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of each pair (rule, row) the rule's column with the highest cosine, int32 [pairs]; -1 where it has no columns.

    columns: intp [R, c]; cosines: [k, m]; of_rule, at: intp [pairs].
    """
    if not len(at) or not columns.shape[1]:
        return np.full(len(at), -1, dtype=np.int32)
    own = columns[of_rule]
    best = cosines[own, at[:, None]].argmax(axis=1)
    return np.asarray(own[np.arange(len(at)), best], dtype=np.int32)


def _alignment(rule: CompiledRule, cosines: np.ndarray, images: np.ndarray, texts: np.ndarray | None) -> np.ndarray:
    """Cosines of one alignment rule, those close to its thresholds settled in float64."""
    values = cosines.copy()
    close = np.abs(values - np.array(rule.thresholds, dtype=np.float32)[:, None]) <= RECHECK
    picked = np.flatnonzero(close.any(axis=0))
    if len(picked):
        exact = (
            values[picked].astype(np.float64)
            if texts is None
            else np.array([images[row].astype(np.float64) @ texts[row].astype(np.float64) for row in picked])
        )
        values[picked] = settle(exact, rule.thresholds)
    return values


@cache
def _blas() -> Any:
    from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

    return ThreadpoolController()


def _one_blas_thread() -> Any:
    """One thread for the small products here: waking more costs more than they take, above all beside an encoder."""
    return _blas().limit(limits=1, user_api="blas")
