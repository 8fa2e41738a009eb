"""Concept rules as arrays: phrases as columns of the policy's matrix, and their scores from the cosines."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import numpy as np

from clipfilter.policies.arithmetic import RECHECK, Recheck, exact_products, sigmoid
from clipfilter.policies.kinds.base import Block, CompiledRule, Found

_VANISHING = 1e-30  # a sum of exponentials below this has lost digits
_PIECE = 64  # columns reduced at once: with 1024 rows 256 KiB, which stay in a processor's cache from step to step


class Part(NamedTuple):
    """What one rule looks for: groups of columns, -1 where there is none, and what is made of their cosines."""

    rule: str
    positives: int
    near: int
    generic: int
    score: str  # probability | margin | cosine


@dataclass(frozen=True)
class Piece:
    """Some groups of one size that are reduced at once."""

    groups: slice
    columns: slice
    shape: tuple[int, int]  # how many groups, and their size


@dataclass(frozen=True)
class ConceptPlan:
    """The concept rules of a policy as arrays: k phrase columns in G groups of neighbours, P parts that read groups, R
    rules whose score is the lowest of their parts.

    A rule has one part for `any_of` and one for each phrase of `all_of`. Groups lie in order of their size, so that many
    of one size are reduced at once. A group index of G means "no such group".
    """

    names: ClassVar[int] = 2  # the positive with the highest cosine and the strongest negative

    weights: np.ndarray  # float32 [k, dim], unit rows
    labels: tuple[str, ...]  # of every column
    prompts: tuple[str, ...]
    bounds: tuple[tuple[int, int], ...]  # columns of every group
    pieces: tuple[Piece, ...]  # all groups, in the order of their size
    group_of: np.ndarray  # intp [k]
    counted: np.ndarray | None  # float64 [k] how much each phrase counts, None where all count alike
    rules: tuple[str, ...]
    parts: np.ndarray  # intp [R] first part of each rule
    positives: np.ndarray  # intp [P] group
    near: np.ndarray  # intp [P] group of near misses
    generic: np.ndarray  # intp [P] group of generic negatives
    counts: np.ndarray  # float64 [2, P]: how much all positives, how much all negatives count
    score_kinds: tuple[str, ...]  # [P] probability | margin | cosine
    backgrounds: tuple[tuple[int, float], ...]  # part, the cosine that stands for "none of these"
    curves: tuple[tuple[int, float, float], ...]  # rule, a, b of calibrated scores 1 / (1 + exp(-(a score + b)))
    recheck: Recheck
    explained: tuple[np.ndarray, np.ndarray]  # float32 [R] each: phrases are named above the first or below the second
    logit_scale: float
    logit_bias: float
    sigmoid: bool
    positive_columns: np.ndarray  # intp [R, P] columns of the positives, the first repeated to fill a row up
    negative_columns: np.ndarray  # intp [R, N] columns of near misses and generics; -1 where a rule has none

    @cached_property
    def exact_weights(self) -> np.ndarray:
        """float64 [k, dim], for rows that are computed again."""
        return self.weights.astype(np.float64)

    @classmethod
    def build(
        cls,
        *,
        weights: np.ndarray,
        labels: tuple[str, ...],
        starts: Sequence[int],
        parts: Sequence[Part],
        rules: Sequence[CompiledRule],
        logit_scale: float,
        logit_bias: float,
        sigmoid: bool,
        counted: np.ndarray | None = None,
        backgrounds: Mapping[str, float] = MappingProxyType({}),
        prompts: tuple[str, ...] = (),
    ) -> ConceptPlan:
        """weights, labels, counted: of the columns; starts: the first column of every group; parts: those of a rule one
        after the other, rules in the order of `rules`; backgrounds: cosines by rule."""
        order = _Order.by_size(starts, len(labels), counted)
        owners = [part.rule for part in parts]
        first = [owners.index(rule.id) for rule in rules]
        positives, near, generic = order.numbers[np.array([part[1:4] for part in parts], dtype=np.intp)].T.copy()
        # A curve moves an error by at most its steepest slope, a / 4.
        near_limit = [RECHECK * max(1.0, abs(rule.curve[0]) / 4 if rule.curve else 0.0) for rule in rules]
        own = [[part for part, owner in enumerate(owners) if owner == rule.id] for rule in rules]
        return cls(
            weights=np.ascontiguousarray(weights[order.columns], dtype=np.float32),
            labels=tuple(labels[column] for column in order.columns),
            prompts=prompts,
            bounds=order.bounds,
            pieces=tuple(_pieces(order.bounds)),
            group_of=np.repeat(np.arange(len(order.bounds)), [stop - start for start, stop in order.bounds]),
            counted=order.counted,
            rules=tuple(rule.id for rule in rules),
            parts=np.array(first, dtype=np.intp),
            positives=positives,
            near=near,
            generic=generic,
            counts=np.stack([order.masses[positives], order.masses[near] + order.masses[generic]]),
            score_kinds=tuple(part.score for part in parts),
            backgrounds=tuple((part, backgrounds[name]) for part, name in enumerate(owners) if name in backgrounds),
            curves=tuple((place, *rule.curve) for place, rule in enumerate(rules) if rule.curve is not None),
            recheck=Recheck.of([rule.thresholds for rule in rules], near_limit),
            explained=_explained(rules),
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            sigmoid=sigmoid,
            positive_columns=_rectangle([positives[places] for places in own], order.bounds),
            negative_columns=_rectangle([(near[place], generic[place]) for place in first], order.bounds),
        )

    def score(self, block: Block, products: np.ndarray, out: Found) -> None:
        """Scores of one block, those near a threshold computed again, and phrases of the rows that a band can concern."""
        assert out.nearest is not None
        assert out.contrast is not None
        values, half = out.values, block.half
        values[:] = concept_scores(self, products)[:, : len(half)]
        values[:, ~block.valid] = np.nan
        self.recheck.settle(values, lambda rows: concept_scores(self, exact_products(self.exact_weights, half, rows)))
        asked = (values > self.explained[0][:, None]) | (values < self.explained[1][:, None])
        of_rule, at = np.divmod(np.flatnonzero(asked), len(half))  # faster than np.nonzero in 2-D
        out.nearest[of_rule, at] = _strongest(self.positive_columns, products, of_rule, at)
        out.contrast[of_rule, at] = _strongest(self.negative_columns, products, of_rule, at)


@dataclass(frozen=True)
class _Order:
    """The columns, sorted by the size of their groups."""

    columns: list[int]  # where each stood before
    bounds: tuple[tuple[int, int], ...]
    numbers: np.ndarray  # intp [G + 1], the new number of each group; the last stands for "no such group"
    counted: np.ndarray | None  # float64 [k], as given
    masses: np.ndarray  # float64 [G + 1] how much the phrases of each group count

    @classmethod
    def by_size(cls, starts: Sequence[int], k: int, counted: np.ndarray | None) -> _Order:
        given = list(itertools.pairwise([*starts, k]))
        by_size = sorted(range(len(given)), key=lambda group: given[group][1] - given[group][0])
        columns = [column for group in by_size for column in range(*given[group])]
        sizes = [given[group][1] - given[group][0] for group in by_size]
        numbers = np.full(len(given) + 1, len(given), dtype=np.intp)
        numbers[by_size] = np.arange(len(given))
        masses = sizes if counted is None else [counted[slice(*given[group])].sum() for group in by_size]
        return cls(
            columns,
            tuple(itertools.pairwise([0, *itertools.accumulate(sizes)])),
            numbers,
            None if counted is None else counted[columns],
            np.array([*masses, 0.0], dtype=np.float64),
        )


def _explained(rules: Sequence[CompiledRule]) -> tuple[np.ndarray, np.ndarray]:
    """Of which scores the nearest phrases may be asked, float32 [R] each: those above the first and those below the second,
    which are in a band; all where the dataset ranks the rule."""
    above = np.full(len(rules), np.inf, dtype=np.float32)
    below = np.full(len(rules), -np.inf, dtype=np.float32)
    for position, rule in enumerate(rules):
        if rule.ranked:
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


def _pieces(bounds: Sequence[tuple[int, int]]) -> Iterator[Piece]:
    """Neighbouring groups of one size, so many that they have about `_PIECE` columns."""
    first = 0
    for size, alike in itertools.groupby(stop - start for start, stop in bounds):
        end = first + sum(1 for _ in alike)
        step = max(1, _PIECE // size)
        for group in range(first, end, step):
            last = min(group + step, end)
            yield Piece(slice(group, last), slice(bounds[group][0], bounds[last - 1][1]), (last - group, size))
        first = end


def _rectangle(groups: Sequence[Sequence[int]], bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """The columns of each rule's groups, intp [R, widest]; the first is repeated to fill a row up, -1 where none are."""
    lists = [[c for group in own if group < len(bounds) for c in range(*bounds[group])] for own in groups]
    width = max((len(own) for own in lists), default=0)
    filled = [own + [own[0] if own else -1] * (width - len(own)) for own in lists]
    return np.array(filled, dtype=np.intp).reshape(len(lists), width)


def concept_scores(plan: ConceptPlan, cosines: np.ndarray) -> np.ndarray:
    """Scores [R, m] of all concept rules from cosines [k, m] (float32 or float64; the result has the same
    type). The score of a rule is the lowest of its parts.

    probability, softmax models: sigmoid(logmeanexp(s * positives) - logmeanexp(s * (near misses and
    generics))), with s the model's logit scale: the softmax of the two, in which synonyms add no weight. A background
    adds exp(s * background) to what the positives stand against.
    Sigmoid models: max over positives minus max over negatives of sigmoid(s * cosine + bias). margin: the
    same difference in cosines. cosine: the highest positive alone. Weights multiply exponentials, and so odds. A
    calibrated score is Platt's curve of the probability.
    """
    result = _part_scores(plan, cosines)
    if len(plan.parts) < len(plan.positives):
        result = np.minimum.reduceat(result, plan.parts, axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        for row, a, b in plan.curves:
            result[row] = sigmoid(result.dtype.type(a) * result[row] + result.dtype.type(b))
    return result


def _part_scores(plan: ConceptPlan, cosines: np.ndarray) -> np.ndarray:
    """Scores [P, m] of the parts."""
    soft = [kind == "probability" and not plan.sigmoid for kind in plan.score_kinds]
    if all(soft):
        return _probabilities(plan, cosines)
    result = _probabilities(plan, cosines) if any(soft) else np.empty((len(soft), cosines.shape[1]), cosines.dtype)
    scale, bias = cosines.dtype.type(plan.logit_scale), cosines.dtype.type(plan.logit_bias)
    if plan.counted is not None:
        cosines = cosines + (np.log(plan.counted) / plan.logit_scale).astype(cosines.dtype)[:, None]
    top = _highest(plan, cosines)
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
                result[row] = sigmoid(scale * positive[row] + bias) - sigmoid(scale * negative[row] + bias)
    return result


def _probabilities(plan: ConceptPlan, cosines: np.ndarray) -> np.ndarray:
    """The softmax of every part [P, m]: mean exponential of the positives against that of all it is contrasted with."""
    count = plan.counts.astype(cosines.dtype)[:, :, None]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore", under="ignore"):
        total = _exponentials(plan, cosines, np.maximum.reduce(cosines, axis=0))
        positive = total[plan.positives]
        positive /= count[0]
        both = total[plan.near]
        both += total[plan.generic]
        both /= count[1]
        both += positive
        result = np.divide(positive, both, out=positive)
        # Where a rule's phrases all lie far below the row's highest, their exponentials vanish beside it.
        vanished = both < cosines.dtype.type(_VANISHING)
        if vanished.any():
            lost = np.flatnonzero(vanished.any(axis=0))
            result[:, lost] = _distant_probabilities(plan, cosines[:, lost])
        for part, background in plan.backgrounds:
            result[part] = 1 / (1 / result[part] + _background_odds(plan, cosines, part, background))
    return np.asarray(result)


def _background_odds(plan: ConceptPlan, cosines: np.ndarray, part: int, background: float) -> np.ndarray:
    """How many times the positives of one part the background weighs, [m]."""
    group = plan.positives[part]
    columns = slice(*plan.bounds[group])
    positives = cosines[columns]
    scale = cosines.dtype.type(plan.logit_scale)
    top = positives.max(axis=0)
    exponentials = np.exp(scale * (positives - top))
    if plan.counted is not None:
        exponentials *= plan.counted[columns].astype(cosines.dtype)[:, None]
    mean = exponentials.sum(axis=0) / cosines.dtype.type(plan.counts[0, part])
    return np.asarray(np.exp(scale * (cosines.dtype.type(background) - top)) / mean)


def _distant_probabilities(plan: ConceptPlan, cosines: np.ndarray) -> np.ndarray:
    """`_probabilities` with exponentials relative to the highest of each group, in which nothing vanishes."""
    dtype = cosines.dtype
    scale = dtype.type(plan.logit_scale)
    top = _highest(plan, cosines)
    positive, near, generic = top[plan.positives], top[plan.near], top[plan.generic]
    negative = np.maximum(near, generic)
    total = _exponentials(plan, cosines, top[plan.group_of])
    against = total[plan.near] * np.exp(scale * (near - negative))
    against += total[plan.generic] * np.exp(scale * (generic - negative))
    ratio = (plan.counts[0] / plan.counts[1]).astype(dtype)[:, None]
    odds = against / total[plan.positives] * ratio * np.exp(scale * (negative - positive))
    return np.asarray(dtype.type(1) / (odds + dtype.type(1)))


def _exponentials(plan: ConceptPlan, cosines: np.ndarray, subtracted: np.ndarray) -> np.ndarray:
    """Sums of exp(s * (cosine - subtracted)) over each group, [G + 1, m]; 0 for the group that is none.

    cosines: [k, m]; subtracted: the same, or [m] for all columns. Weights multiply the exponentials.
    """
    scale = cosines.dtype.type(plan.logit_scale)
    subtracted = np.broadcast_to(subtracted, cosines.shape)
    total = np.zeros((len(plan.bounds) + 1, cosines.shape[1]), dtype=cosines.dtype)
    for piece in plan.pieces:
        powers = cosines[piece.columns] - subtracted[piece.columns]
        powers *= scale
        np.exp(powers, out=powers)
        if plan.counted is not None:
            powers *= plan.counted[piece.columns].astype(cosines.dtype)[:, None]
        np.add.reduce(powers.reshape(*piece.shape, -1), axis=1, out=total[piece.groups])
    return total


def _highest(plan: ConceptPlan, cosines: np.ndarray) -> np.ndarray:
    """The highest cosine of each group, [G + 1, m]; -inf for the group that is none."""
    top = np.full((len(plan.bounds) + 1, cosines.shape[1]), -np.inf, dtype=cosines.dtype)
    for piece in plan.pieces:
        columns = cosines[piece.columns]
        np.maximum.reduce(columns.reshape(*piece.shape, -1), axis=1, out=top[piece.groups])
    return top
