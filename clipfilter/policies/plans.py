"""What is linear in a policy, as arrays: phrases, heads and safety checkers as columns of one matrix, and their scores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from clipfilter.models.heads import Layers

if TYPE_CHECKING:
    from clipfilter.models.heads import Head

RECHECK = 1e-5
_OPENED_NEAR = 0.02  # where an error could move a score further than this, too many rows would be computed twice
_VANISHING = 1e-30  # a sum of exponentials below this has lost digits
_PIECE = 64  # columns reduced at once: with BLOCK rows 256 KiB, which stay in a processor's cache from step to step


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

    weights: np.ndarray  # float32 [k + h, dim]: unit rows of the phrases, then those of the heads and safety checkers
    phrases: tuple[str, ...]  # of every column
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
    thresholds: np.ndarray  # float32 [T, R], NaN where a rule has fewer than T
    doubt: np.ndarray  # float32 [R], how near to its thresholds a float32 score is computed again
    always_explained: frozenset[str]
    logit_scale: float
    logit_bias: float
    sigmoid: bool
    positive_columns: np.ndarray  # intp [R, P] columns of the positives, the first repeated to fill a row up
    negative_columns: np.ndarray  # intp [R, N] columns of near misses and generics; -1 where a rule has none

    @cached_property
    def exact_weights(self) -> np.ndarray:
        """float64 [k, dim]: the phrases, for rows that are computed again."""
        return self.weights[: len(self.phrases)].astype(np.float64)

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
        counted: np.ndarray | None = None,
        curves: Mapping[str, tuple[float, float]] | None = None,
        backgrounds: Mapping[str, float] | None = None,
    ) -> ConceptPlan:
        """members: (rule, groups of positives, near misses and generics or -1, score) of every part, those of a rule
        one after the other; thresholds: of every rule; counted: float64 [k] in the order of `phrases`."""
        stops = [*starts[1:], len(phrases)] if starts else []
        given = list(zip(starts, stops, strict=True))
        by_size = sorted(range(len(given)), key=lambda group: given[group][1] - given[group][0])
        columns = [column for group in by_size for column in range(*given[group])]
        sizes = np.array([given[group][1] - given[group][0] for group in by_size] + [0], dtype=np.float64)
        order = None if counted is None else counted[columns]
        masses = (
            sizes if counted is None else np.array([counted[slice(*given[group])].sum() for group in by_size] + [0.0])
        )
        rules = list(dict.fromkeys(member[0] for member in members))
        first = [member[0] for member in members]
        bent = {rules.index(name): curve for name, curve in (curves or {}).items()}
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
            pieces=tuple(_pieces(bounds)),
            group_of=np.repeat(np.arange(len(bounds)), sizes[:-1].astype(np.intp)),
            counted=order,
            rules=tuple(rules),
            parts=np.array([first.index(name) for name in rules], dtype=np.intp),
            positives=positives,
            near=near,
            generic=generic,
            counts=np.stack([masses[positives], masses[near] + masses[generic]]),
            score_kinds=tuple(member[4] for member in members),
            backgrounds=tuple(
                (part, backgrounds[name]) for part, name in enumerate(first) if backgrounds and name in backgrounds
            ),
            curves=tuple((rule, *curve) for rule, curve in sorted(bent.items())),
            thresholds=np.array(list(itertools.zip_longest(*thresholds, fillvalue=np.nan)), dtype=np.float32),
            # A curve moves an error by at most its steepest slope, a / 4.
            doubt=np.array(
                [RECHECK * max(1.0, abs(bent.get(rule, (0.0, 0.0))[0]) / 4) for rule in range(len(thresholds))],
                dtype=np.float32,
            ),
            always_explained=frozenset(always_explained),
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            sigmoid=sigmoid,
            positive_columns=_rectangle(
                [tuple(g for g, name in zip(positives, first, strict=True) if name == rule) for rule in rules], bounds
            ),
            negative_columns=_rectangle(
                [(near[first.index(rule)], generic[first.index(rule)]) for rule in rules], bounds
            ),
        )


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


def _rectangle(groups: Sequence[tuple[int, ...]], bounds: Sequence[tuple[int, int]]) -> np.ndarray:
    """The columns of each rule's groups, intp [R, widest]; the first is repeated to fill a row up, -1 where none are."""
    lists = [[c for group in own if group < len(bounds) for c in range(*bounds[group])] for own in groups]
    width = max((len(own) for own in lists), default=0)
    filled = [own + [own[0] if own else -1] * (width - len(own)) for own in lists]
    return np.array(filled, dtype=np.intp).reshape(len(lists), width)


@dataclass(frozen=True)
class LinearHead:
    """A head that is one affine map. near: how near to its thresholds a float32 score is computed again; the rounding of
    a product grows with the length of its factors, and the weights of a head are no unit vector."""

    rule: str
    weight: np.ndarray  # float32 [dim]
    bias: float
    near: float


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

    linear: tuple[LinearHead, ...]  # in the order of the columns
    opened: tuple[OpenedHead, ...]
    curved: tuple[tuple[str, Head], ...]
    weights: np.ndarray  # float32 [h, dim]

    @classmethod
    def build(cls, members: Sequence[tuple[str, Head]], dim: int) -> HeadPlan:
        linear = tuple(
            LinearHead(rule, weight, bias, RECHECK * max(1.0, float(np.linalg.norm(weight)), abs(bias)))
            for rule, head in members
            if head.linear is not None
            for weight, bias in [head.linear]
        )
        rows = [head.weight[None] for head in linear]
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
        columns = [head.rule for head in self.linear] + [head.rule for head in self.opened]
        return tuple(columns + [rule for rule, _ in self.curved])


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
            result[row] = _sigmoid(result.dtype.type(a) * result[row] + result.dtype.type(b))
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
                result[row] = _sigmoid(scale * positive[row] + bias) - _sigmoid(scale * negative[row] + bias)
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


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-x)), dtype=x.dtype)
