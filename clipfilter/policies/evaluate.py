"""Scores and decides columns of rows: pure functions, fixed blocks, no Python object per row.

What makes results reproducible: rows are scored in zero-padded blocks of 1024, always of the same shape, so a
score never depends on how many rows follow. A score within 1e-5 of one of its thresholds (for linear heads: times
the length of the weights) is computed again in float64 from the same float16 embedding and compared with the exact
threshold; the float32 that is stored is then moved, by at most one unit in the last place, to the side of the
float32 threshold where the float64 value lies. Of heads of several layers the first is part of the product, the others are
float64, and how close is close follows from the layers' norms; where that says too little, all is float64 from the start.
`decide` compares nothing but stored float32 scores with float32 thresholds, so record and
decision cannot contradict each other.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clipfilter.models.heads.network import Layers
from clipfilter.policies.columns import metadata_values

if TYPE_CHECKING:
    from clipfilter.models.heads import Head
    from clipfilter.policies.compile import CompiledPolicy, CompiledRule

BLOCK = 1024
RECHECK = 1e-5
_OPENED_NEAR = 0.02  # where an error could move a score further than this, too many rows would be computed twice
_VANISHING = 1e-30  # a sum of exponentials below this has lost digits
KEEP, REVIEW, REJECT = 0, 1, 2
DECISIONS = ("keep", "review", "reject")
BANDS = ("review", "reject", "missing")

REASON = pa.struct(
    [
        ("rule", pa.string()),
        ("band", pa.string()),
        ("score", pa.float32()),
        ("threshold", pa.float32()),
        ("nearest", pa.string()),
        ("contrast", pa.string()),
    ]
)
REASONS = pa.list_(REASON)


@dataclass(frozen=True)
class ConceptPlan:
    """The concept rules of a policy as arrays: k phrase columns in G groups of neighbours, R rules that read
    groups.

    Groups lie in order of their size, so that all of one size are reduced at once. A group index of G means "no such
    group".
    """

    weights: np.ndarray  # float32 [k + h, dim]: unit rows of the phrases, then those of the heads
    phrases: tuple[str, ...]  # of every column
    bounds: tuple[tuple[int, int], ...]  # columns of every group
    sizes: tuple[tuple[int, int, int], ...]  # first and last + 1 of the groups of one size, and that size
    group_of: np.ndarray  # intp [k]
    rules: tuple[str, ...]
    positives: np.ndarray  # intp [R] group
    near: np.ndarray  # intp [R] group of near misses
    generic: np.ndarray  # intp [R] group of generic negatives
    counts: np.ndarray  # float64 [2, R]: how many positives, how many negatives
    score_kinds: tuple[str, ...]  # [R] probability | margin | cosine
    thresholds: np.ndarray  # float32 [T], of all concept rules
    threshold_rule: np.ndarray  # intp [T], which rule each belongs to
    always_explained: frozenset[str]
    logit_scale: float
    logit_bias: float
    sigmoid: bool
    positive_columns: np.ndarray  # intp [R, P] columns of the positives, the first repeated to fill a row up
    negative_columns: np.ndarray  # intp [R, N] columns of near misses and generics; -1 where a rule has none

    @classmethod
    def build(
        cls,
        *,
        weights: np.ndarray,
        phrases: tuple[str, ...],
        starts: Sequence[int],
        members: Sequence[tuple[str, int, int, int, str]],
        thresholds: Sequence[Sequence[float]],
        always_explained: set[str],
        logit_scale: float,
        logit_bias: float,
        sigmoid: bool,
    ) -> ConceptPlan:
        stops = [*starts[1:], len(phrases)] if starts else []
        given = list(zip(starts, stops, strict=True))
        by_size = sorted(range(len(given)), key=lambda group: given[group][1] - given[group][0])
        columns = [column for group in by_size for column in range(*given[group])]
        sizes = np.array([given[group][1] - given[group][0] for group in by_size] + [0], dtype=np.float64)
        ends = np.cumsum(sizes[:-1]).astype(int).tolist()
        bounds = tuple(zip([0, *ends[:-1]], ends, strict=True)) if ends else ()
        renumbered = np.full(len(given) + 1, len(given), dtype=np.intp)
        renumbered[by_size] = np.arange(len(given))
        groups = renumbered[np.array([member[1:4] for member in members], dtype=np.intp).reshape(-1, 3)]
        positives, near, generic = groups.T.copy()
        return cls(
            weights=np.ascontiguousarray(np.concatenate([weights[columns], weights[len(phrases) :]]), dtype=np.float32),
            phrases=tuple(phrases[column] for column in columns),
            bounds=bounds,
            sizes=tuple(
                (int(first), int(first + count), int(size))
                for size, first, count in zip(
                    *np.unique(sizes[:-1], return_index=True, return_counts=True), strict=True
                )
            ),
            group_of=np.repeat(np.arange(len(bounds)), sizes[:-1].astype(np.intp)),
            rules=tuple(member[0] for member in members),
            positives=positives,
            near=near,
            generic=generic,
            counts=np.stack([sizes[positives], sizes[near] + sizes[generic]]),
            score_kinds=tuple(member[4] for member in members),
            thresholds=np.array([value for own in thresholds for value in own], dtype=np.float32),
            threshold_rule=np.repeat(np.arange(len(thresholds)), [len(own) for own in thresholds]).astype(np.intp),
            always_explained=frozenset(always_explained),
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            sigmoid=sigmoid,
            positive_columns=_rectangle([(group,) for group in positives], bounds),
            negative_columns=_rectangle(list(zip(near, generic, strict=True)), bounds),
        )


def _rectangle(groups: Sequence[tuple[int, ...]], bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """The columns of each rule's groups, intp [R, widest]; the first is repeated to fill a row up, -1 where none are."""
    lists = [[c for group in own if group < len(bounds) for c in range(*bounds[group])] for own in groups]
    width = max((len(own) for own in lists), default=0)
    filled = [own + [own[0] if own else -1] * (width - len(own)) for own in lists]
    return np.array(filled, dtype=np.intp).reshape(len(lists), width)


@dataclass(frozen=True)
class OpenedHead:
    """A head of several layers whose first one is part of the concepts' matrix.

    columns: of its hidden units among the heads' columns. near: how far an error in that product can move its score.
    """

    rule: str
    network: Layers
    columns: slice
    near: float


@dataclass(frozen=True)
class HeadPlan:
    """The head rules of a policy: linear heads and first layers as further columns of the concepts' matrix, the others
    as they are."""

    linear: tuple[tuple[str, Head], ...]  # rule and head, in the order of the columns
    opened: tuple[OpenedHead, ...]
    curved: tuple[tuple[str, Head], ...]
    weights: np.ndarray  # float32 [h, dim]

    @classmethod
    def build(cls, members: Sequence[tuple[str, Head]], dim: int) -> HeadPlan:
        linear = tuple(member for member in members if member[1].linear is not None)
        rows = [head.linear[0][None] for _, head in linear if head.linear is not None]
        opened: list[OpenedHead] = []
        curved: list[tuple[str, Head]] = []
        start = len(linear)
        for rule, head in members:
            if head.linear is not None:
                continue
            if isinstance(head.network, Layers):
                weight = head.network.first[0]
                lengths = np.maximum(1.0, np.linalg.norm(weight, axis=1))
                near = RECHECK * float(np.linalg.norm(lengths)) * head.network.steepest
                if near <= _OPENED_NEAR:
                    opened.append(OpenedHead(rule, head.network, slice(start, start + len(weight)), near))
                    rows.append(weight.astype(np.float32))
                    start += len(weight)
                    continue
            curved.append((rule, head))
        weights = np.concatenate(rows) if rows else np.zeros((0, dim), dtype=np.float32)
        return cls(linear, tuple(opened), tuple(curved), weights)

    @property
    def rules(self) -> tuple[str, ...]:
        """Ids of the rules that are heads."""
        return tuple(
            [rule for rule, _ in self.linear] + [head.rule for head in self.opened] + [rule for rule, _ in self.curved]
        )


@dataclass(frozen=True)
class Scores:
    """Scores of n rows. `values[rule]` is float32 [n], NaN where the rule cannot be evaluated.

    `nearest[rule]` and `contrast[rule]` (concept rules) are int32 [n] positions in the policy's phrases: the
    positive with the highest cosine and the strongest negative; -1 for rows that no band of the rule can
    concern.
    """

    rows: int
    values: dict[str, np.ndarray]
    similarity: np.ndarray
    nearest: dict[str, np.ndarray]
    contrast: dict[str, np.ndarray]


@dataclass(frozen=True)
class Decisions:
    """Decisions of n rows: `codes` int8 [n] (0 keep, 1 review, 2 reject), `reasons` list<struct> [n].

    `counts[rule]` says how many rows the rule put into each band ("review", "reject", "missing").
    """

    codes: np.ndarray
    reasons: pa.ListArray
    counts: dict[str, dict[str, int]]

    @property
    def decision(self) -> pa.Array:
        """cf_decision as strings [n]."""
        return _strings(self.codes.astype(np.int32), DECISIONS)

    def totals(self) -> dict[str, int]:
        """How many rows of each decision."""
        return {name: int((self.codes == code).sum()) for code, name in enumerate(DECISIONS)}


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
    Raises RefusedError for a metadata rule whose column is absent or not numeric.
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
    values: dict[str, np.ndarray] = {}
    concept = np.full((len(plan.rules), n), np.nan, dtype=np.float32)
    nearest = np.full((len(plan.rules), n), -1, dtype=np.int32)
    contrast = np.full((len(plan.rules), n), -1, dtype=np.int32)
    cosine = np.full(n, np.nan, dtype=np.float32)
    heads = {name: np.full(n, np.nan, dtype=np.float32) for name in compiled.heads.rules}
    block = np.zeros((BLOCK, image_emb.shape[1]), dtype=np.float32)
    texts = np.zeros_like(block)
    products = np.empty((len(plan.weights), BLOCK), dtype=np.float32)
    with _one_blas_thread():
        for start in range(0, n, BLOCK):
            rows = slice(start, min(start + BLOCK, n))
            half = image_emb[rows]
            _upcast(half, block)
            usable = _usable(block)
            if text_emb is not None:
                _upcast(text_emb[rows], texts)
                cosine[rows] = _cosines(block, texts, usable)[: len(half)]
            if not plan.rules and not heads:
                continue
            valid = usable[: len(half)]
            with np.errstate(invalid="ignore", over="ignore"):  # rows that hold no usable embedding become NaN
                np.matmul(plan.weights, block.T, out=products)
            if plan.rules:
                cosines = products[: len(plan.phrases)]
                target = (concept[:, rows], nearest[:, rows], contrast[:, rows])
                _score_concepts(plan, concept_rules, cosines, half, valid, *target)
            of_heads = products[len(plan.phrases) :]
            for (name, head), product in zip(compiled.heads.linear, of_heads, strict=False):
                heads[name][rows] = _linear_scores(head, product, half, valid, rules[name].thresholds)
            for opened in compiled.heads.opened:
                hidden = of_heads[opened.columns]
                heads[opened.rule][rows] = _opened_scores(opened, hidden, half, valid, rules[opened.rule].thresholds)
            for name, head in compiled.heads.curved:
                heads[name][rows] = _curved_scores(head, block, valid, rules[name].thresholds)
    if has_text is not None:
        cosine[~np.asarray(has_text, dtype=bool)] = np.nan
    if text_emb is None and "cf_similarity" in columns.column_names:
        cosine[:] = metadata_values("cf_similarity", columns)

    for position, name in enumerate(plan.rules):
        values[name] = concept[position]
    for rule in compiled.rules:
        if rule.kind == "alignment":
            values[rule.id] = _alignment(rule, cosine, image_emb, text_emb)
        elif rule.id in heads:
            values[rule.id] = heads[rule.id]
        elif rule.metadata is not None:
            values[rule.id] = settle(metadata_values(rule.metadata, columns), rule.thresholds)
        elif rule.of is not None:
            values[rule.id] = values[rule.of]
    return Scores(
        rows=n,
        values={rule.id: values[rule.id] for rule in compiled.rules},
        similarity=cosine,
        nearest=dict(zip(plan.rules, nearest, strict=True)),
        contrast=dict(zip(plan.rules, contrast, strict=True)),
    )


def similarity(image_emb: np.ndarray, text_emb: np.ndarray | None, has_text: np.ndarray | None) -> np.ndarray:
    """Cosine of image and caption, float32 [n], exactly as `score` computes it; NaN without a caption.

    image_emb, text_emb: float16 [n, d], unit norm; has_text: bool [n], or None for all.
    """
    n = len(image_emb)
    result = np.full(n, np.nan, dtype=np.float32)
    if text_emb is None or n == 0:
        return result
    images = np.zeros((BLOCK, image_emb.shape[1]), dtype=np.float32)
    texts = np.zeros_like(images)
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        _upcast(image_emb[start:stop], images)
        _upcast(text_emb[start:stop], texts)
        result[start:stop] = _cosines(images, texts, _usable(images))[: stop - start]
    if has_text is not None:
        result[~np.asarray(has_text, dtype=bool)] = np.nan
    return result


def _cosines(images: np.ndarray, texts: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Row-wise product of two blocks, NaN where either row is no embedding (usable says it of the images)."""
    return np.where(usable & _usable(texts), np.vecdot(images, texts), np.float32(np.nan))


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


def _upcast(half: np.ndarray, out: np.ndarray) -> None:
    """float16 [m, d] into the first rows of a float32 block, the rest zero. Exact, whoever does it."""
    size = len(half)
    torch = sys.modules.get("torch")
    if torch is not None and half.dtype == np.float16:
        own = np.require(half, requirements=["C", "W"])  # torch takes no read-only memory map; a copy is cheap
        torch.from_numpy(out)[:size].copy_(torch.from_numpy(own))  # many times as fast as numpy's cast
    else:
        out[:size] = half
    out[size:] = 0.0


def _usable(block: np.ndarray) -> np.ndarray:
    squares = np.vecdot(block, block)
    return np.asarray(np.isfinite(squares) & (squares > 0))


def _score_concepts(
    plan: ConceptPlan,
    rules: Sequence[CompiledRule],
    cosines: np.ndarray,
    half: np.ndarray,
    valid: np.ndarray,
    out: np.ndarray,
    nearest: np.ndarray,
    contrast: np.ndarray,
) -> None:
    """One block of concept scores into `out` [R, m] from its cosines [k, BLOCK], and phrases of the rows that a band can
    concern."""
    with np.errstate(invalid="ignore", over="ignore"):  # rows that hold no usable embedding become NaN below
        out[:] = concept_scores(plan, cosines)[:, : len(half)]
    out[:, ~valid] = np.nan

    doubtful = np.abs(out[plan.threshold_rule] - plan.thresholds[:, None]) <= RECHECK
    picked = np.flatnonzero(doubtful.any(axis=0))
    if len(picked):
        weights = plan.weights[: len(plan.phrases)].astype(np.float64)
        # Row by row: the shape of the product, and so its rounding, does not depend on how many rows are
        # close.
        exact_cosines = np.stack([weights @ half[row].astype(np.float64) for row in picked], axis=1)
        exact = concept_scores(plan, exact_cosines)
        for position, rule in enumerate(rules):
            chosen = doubtful[plan.threshold_rule == position].any(axis=0)[picked]
            out[position, picked[chosen]] = settle(exact[position, chosen], rule.thresholds)

    of_rule, at = np.nonzero(_concerned(plan, rules, out, valid))
    nearest[of_rule, at] = _strongest(plan.positive_columns, cosines, of_rule, at)
    contrast[of_rule, at] = _strongest(plan.negative_columns, cosines, of_rule, at)


def _linear_scores(
    head: Head, product: np.ndarray, half: np.ndarray, valid: np.ndarray, thresholds: Sequence[float]
) -> np.ndarray:
    """One block of a linear head from its column of the product, float32 [m]; close ones settled in float64."""
    assert head.linear is not None
    weight, bias = head.linear
    values = np.where(valid, product[: len(half)] + np.float32(bias), np.float32(np.nan))
    # The rounding of a product grows with the length of its factors, and the weights of a head are no unit vector.
    near = RECHECK * max(1.0, float(np.linalg.norm(weight)), abs(bias))
    close = np.abs(values - np.array(thresholds, dtype=np.float32)[:, None]) <= near
    picked = np.flatnonzero(close.any(axis=0))
    if len(picked):
        wide = weight.astype(np.float64)
        values[picked] = settle(np.array([half[row].astype(np.float64) @ wide + bias for row in picked]), thresholds)
    return values


def _opened_scores(
    opened: OpenedHead, product: np.ndarray, half: np.ndarray, valid: np.ndarray, thresholds: Sequence[float]
) -> np.ndarray:
    """One block of a head of several layers from the product [hidden, BLOCK] of its first, float32 [m]; close ones
    settled in float64 from the embedding."""
    network = opened.network
    with np.errstate(invalid="ignore", over="ignore"):
        hidden = product[:, : len(half)].T.astype(np.float64) + network.first[1]
        values = network.rest(hidden + network.words(half)).astype(np.float32)
    values[~valid] = np.nan
    close = np.abs(values - np.array(thresholds, dtype=np.float32)[:, None]) <= opened.near
    picked = np.flatnonzero(close.any(axis=0))
    if len(picked):
        # Row by row: the shape of the product, and so its rounding, does not depend on how many rows are close.
        exact = np.concatenate([network.exact(half[row][None].astype(np.float64)) for row in picked])
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


def _concerned(plan: ConceptPlan, rules: Sequence[CompiledRule], values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Which nearest phrases may be asked for, bool [R, m]: rows in a band, or all where the dataset ranks the rule."""
    above = np.full(len(rules), np.inf, dtype=np.float32)
    below = np.full(len(rules), -np.inf, dtype=np.float32)
    ranked = np.zeros(len(rules), dtype=bool)
    for position, rule in enumerate(rules):
        if rule.id in plan.always_explained:
            ranked[position] = True
        elif rule.direction == "below":
            below[position] = max(rule.thresholds)
        elif rule.direction == "above":
            above[position] = min(rule.thresholds)
    concerned = values > above[:, None]
    if np.isfinite(below).any():
        concerned |= values < below[:, None]
    concerned[ranked] = valid
    return np.asarray(concerned)


def _strongest(columns: np.ndarray, cosines: np.ndarray, of_rule: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Of each pair (rule, row) the rule's column with the highest cosine, int32 [pairs]; -1 where it has no columns.

    columns: intp [R, c]; cosines: [k, m]; of_rule, at: intp [pairs].
    """
    if not len(at) or not columns.shape[1]:
        return np.full(len(at), -1, dtype=np.int32)
    own = columns[of_rule]
    best = cosines[own, at[:, None]].argmax(axis=1)
    return np.asarray(own[np.arange(len(at)), best], dtype=np.int32)


def concept_scores(plan: ConceptPlan, cosines: np.ndarray) -> np.ndarray:
    """Scores [R, m] of all concept rules from cosines [k, m] (float32 or float64; the result has the same
    type).

    probability, softmax models: sigmoid(logmeanexp(s * positives) - logmeanexp(s * (near misses and
    generics))), with s the model's logit scale: the softmax of the two, in which synonyms add no weight.
    Sigmoid models: max over positives minus max over negatives of sigmoid(s * cosine + bias). margin: the
    same difference in cosines. cosine: the highest positive alone.
    """
    kinds = np.array(plan.score_kinds)
    soft = (kinds == "probability") & (not plan.sigmoid)
    result = np.empty((len(plan.rules), cosines.shape[1]), dtype=cosines.dtype)
    if soft.any():
        result[:] = _probabilities(plan, cosines)
    if soft.all():
        return result
    scale, bias = cosines.dtype.type(plan.logit_scale), cosines.dtype.type(plan.logit_bias)
    top = _by_group(plan, np.maximum, cosines, -np.inf)
    positive, negative = top[plan.positives], np.maximum(top[plan.near], top[plan.generic])
    with np.errstate(invalid="ignore", over="ignore"):
        for row, kind in enumerate(plan.score_kinds):
            if soft[row]:
                continue
            if kind == "cosine":
                result[row] = positive[row]
            elif kind == "margin":
                result[row] = positive[row] - negative[row]
            else:
                result[row] = _sigmoid(scale * positive[row] + bias) - _sigmoid(scale * negative[row] + bias)
    return result


def _probabilities(plan: ConceptPlan, cosines: np.ndarray) -> np.ndarray:
    """The softmax of every rule [R, m]: mean exponential of the positives against that of all it is contrasted with."""
    dtype = cosines.dtype
    scale = dtype.type(plan.logit_scale)
    count = plan.counts.astype(dtype)[:, :, None]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        powers = cosines - np.maximum.reduce(cosines, axis=0)
        powers *= scale
        np.exp(powers, out=powers)
        total = _by_group(plan, np.add, powers, 0.0)
        positive = total[plan.positives] / count[0]
        both = (total[plan.near] + total[plan.generic]) / count[1]
        both += positive
        result = np.divide(positive, both, out=positive)
        # Where a rule's phrases all lie far below the row's highest, their exponentials vanish beside it.
        lost = np.flatnonzero((both < dtype.type(_VANISHING)).any(axis=0))
        if len(lost):
            result[:, lost] = _distant_probabilities(plan, cosines[:, lost])
    return np.asarray(result)


def _distant_probabilities(plan: ConceptPlan, cosines: np.ndarray) -> np.ndarray:
    """`_probabilities` with exponentials relative to the highest of each group, in which nothing vanishes."""
    dtype = cosines.dtype
    scale = dtype.type(plan.logit_scale)
    top = _by_group(plan, np.maximum, cosines, -np.inf)
    positive, near, generic = top[plan.positives], top[plan.near], top[plan.generic]
    negative = np.maximum(near, generic)
    total = _by_group(plan, np.add, np.exp((cosines - top[plan.group_of]) * scale), 0.0)
    against = total[plan.near] * np.exp(scale * (near - negative))
    against += total[plan.generic] * np.exp(scale * (generic - negative))
    ratio = (plan.counts[0] / plan.counts[1]).astype(dtype)[:, None]
    odds = against / total[plan.positives] * ratio * np.exp(scale * (negative - positive))
    return np.asarray(dtype.type(1) / (odds + dtype.type(1)))


def _by_group(plan: ConceptPlan, reduce: np.ufunc, columns: np.ndarray, none: float) -> np.ndarray:
    """`columns` [k, m] reduced over each group, [G + 1, m]; the last row, of the group that is none, holds `none`."""
    width = columns.shape[1]
    result = np.full((len(plan.bounds) + 1, width), none, dtype=columns.dtype)
    for first, last, size in plan.sizes:
        members = columns[plan.bounds[first][0] : plan.bounds[last - 1][1]]
        reduce.reduce(members.reshape(last - first, size, width), axis=1, out=result[first:last])
    return result


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)), dtype=x.dtype)


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


# ---------------------------------------------------------------- deciding


def decide(compiled: CompiledPolicy, scores: Scores, thresholds: dict[str, float | None]) -> Decisions:
    """The worst of the rules' outcomes for every row, with a reason for every rule that fired.

    `thresholds` holds the fixed numbers of dataset-level rules by `DatasetThreshold.key` ("<rule>.reject");
    None means that no row had a score. A band fires strictly beyond its threshold; a rule that has bands and
    no score fires as its `on_missing` says. Reasons are sorted by severity, then by the order of the rules.
    """
    n = scores.rows
    outcomes: list[tuple[int, str, np.ndarray, float]] = []  # severity, band, rows, threshold; in rule order
    order: list[CompiledRule] = []
    codes = np.zeros(n, dtype=np.int8)
    counts = {rule.id: dict.fromkeys(BANDS, 0) for rule in compiled.rules}
    for rule in compiled.rules:
        bands = _bands(rule, compiled, thresholds)
        if not bands:
            continue
        values = scores.values[rule.id]
        missing = np.isnan(values)
        if any(np.isnan(threshold) for _, threshold in bands.values()):
            missing = np.ones(n, dtype=bool)
        left = ~missing
        for severity, name in ((REJECT, "reject"), (REVIEW, "review")):
            if name in bands:
                fired = left & _beyond(values, *bands[name])
                left &= ~fired
                outcomes.append((severity, name, np.flatnonzero(fired), bands[name][1]))
                order.append(rule)
        if rule.on_missing != "keep":
            outcomes.append(
                (REJECT if rule.on_missing == "reject" else REVIEW, "missing", np.flatnonzero(missing), np.nan)
            )
            order.append(rule)
    for (severity, name, rows, _), rule in zip(outcomes, order, strict=True):
        codes[rows] = np.maximum(codes[rows], severity)
        counts[rule.id][name] += len(rows)
    return Decisions(codes, _reasons(compiled, scores, outcomes, order), counts)


def _bands(
    rule: CompiledRule, compiled: CompiledPolicy, thresholds: dict[str, float | None]
) -> dict[str, tuple[str, float]]:
    """Band name -> (direction, threshold) with "above"/"below" for every band of the rule."""
    if rule.kind != "fraction":
        pairs = (("review", rule.review), ("reject", rule.reject))
        return {name: (str(rule.direction), float(value)) for name, value in pairs if value is not None}
    bands = {}
    for entry in compiled.dataset_thresholds:
        if entry.rule == rule.id:
            if entry.key not in thresholds:
                raise ValueError(f"the dataset-level threshold {entry.key!r} is not fixed yet")
            value = thresholds[entry.key]
            # Rows equal to the threshold are inside the fraction, so they are kept.
            bands[entry.key.removeprefix(f"{rule.id}.")] = (
                "below" if entry.tail == "top" else "above",
                float("nan") if value is None else float(value),
            )
    return bands


def _beyond(values: np.ndarray, direction: str, threshold: float) -> np.ndarray:
    single = np.float32(threshold)
    return values > single if direction == "above" else values < single


def _reasons(
    compiled: CompiledPolicy,
    scores: Scores,
    outcomes: Sequence[tuple[int, str, np.ndarray, float]],
    order: Sequence[CompiledRule],
) -> pa.ListArray:
    """All reasons as one list<struct> array, put together from flat arrays."""
    n = scores.rows
    per_row = np.zeros(n, dtype=np.int32)
    for _, _, rows, _ in outcomes:
        per_row[rows] += 1
    offsets = np.zeros(n + 1, dtype=np.int32)
    np.cumsum(per_row, out=offsets[1:])
    total = int(offsets[-1])
    cursor = offsets[:-1].copy()
    rule_index, band_index = np.zeros(total, dtype=np.int32), np.zeros(total, dtype=np.int32)
    score, threshold = np.full(total, np.nan, dtype=np.float32), np.full(total, np.nan, dtype=np.float32)
    nearest, contrast = np.full(total, -1, dtype=np.int32), np.full(total, -1, dtype=np.int32)
    position = {rule.id: index for index, rule in enumerate(compiled.rules)}

    by_severity = sorted(range(len(outcomes)), key=lambda index: (-outcomes[index][0], index))
    for index in by_severity:
        _, band, rows, limit = outcomes[index]
        rule = order[index]
        at = cursor[rows]
        cursor[rows] += 1
        rule_index[at] = position[rule.id]
        band_index[at] = BANDS.index(band)
        if band == "missing":
            continue
        score[at] = scores.values[rule.id][rows]
        threshold[at] = np.float32(limit)
        source = rule.of or rule.id
        if source in scores.nearest:
            nearest[at] = scores.nearest[source][rows]
            contrast[at] = scores.contrast[source][rows]

    phrases = compiled.concepts.phrases
    items = pa.StructArray.from_arrays(
        [
            _strings(rule_index, [rule.id for rule in compiled.rules]),
            _strings(band_index, BANDS),
            _floats(score),
            _floats(threshold),
            _strings(nearest, phrases),
            _strings(contrast, phrases),
        ],
        fields=list(REASON),
    )
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=REASONS)


def _strings(index: np.ndarray, names: Sequence[str]) -> pa.Array:
    """Names by position, null where the position is negative; string, not dictionary."""
    positions = pa.array(index, mask=index < 0)
    return pa.DictionaryArray.from_arrays(positions, pa.array(list(names), pa.string())).dictionary_decode()


def _floats(values: np.ndarray) -> pa.Array:
    return pa.array(values, type=pa.float32(), mask=np.isnan(values))


def annotation(compiled: CompiledPolicy, scores: Scores, decisions: Decisions | None) -> pa.Table:
    """The columns beside a row: cf_similarity, cf_score.<rule> of every rule, cf_decision, cf_reasons.

    Null scores could not be evaluated. Without decisions (a run that only scores, or before dataset-level
    thresholds are fixed) cf_decision and cf_reasons are null. The schema's metadata (key `clipfilter`) is
    `compiled.record()`.
    """
    n = scores.rows
    names = ["cf_similarity", *(f"cf_score.{rule.id}" for rule in compiled.rules), "cf_decision", "cf_reasons"]
    arrays: list[pa.Array] = [_floats(scores.similarity)]
    arrays += [_floats(scores.values[rule.id]) for rule in compiled.rules]
    if decisions is None:
        arrays += [pa.nulls(n, pa.string()), pa.nulls(n, REASONS)]
    else:
        arrays += [decisions.decision, decisions.reasons]
    return pa.table(dict(zip(names, arrays, strict=True)))
