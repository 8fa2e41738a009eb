"""Decides scored rows: the worst of the rules' outcomes, human overrides above them, and a reason for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter.decisions import DECISIONS, ESCALATE, LIMITS, MISSING, TIGHTEN
from clipfilter.policies.fraction import DatasetThreshold
from clipfilter.policies.kinds.base import CompiledRule
from clipfilter.policies.parts.bands import moved
from clipfilter.policies.parts.overrides import OVERRIDE_RULE
from clipfilter.policies.scoring import Scores

#: What a rule may say of a row.
BANDS = (*LIMITS, MISSING)
_ALL_BANDS = (*BANDS, ESCALATE, TIGHTEN, "keep")
# In which order reasons are listed: a person's decision stands between escalation and the rules.
_RANK = {ESCALATE: 40, "reject": 20, "review": 10, TIGHTEN: 0}
_OVERRIDE_RANK = 30

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


def escalated(reasons: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Which rows of a `cf_reasons` column were escalated, bool [n]. Such rows are never shown and never copied."""
    result = np.zeros(len(reasons), dtype=bool)
    start = 0
    for chunk in reasons.chunks if isinstance(reasons, pa.ChunkedArray) else [reasons]:
        if len(chunk):
            parents = np.asarray(pc.list_parent_indices(chunk))
            bands = pc.fill_null(pc.equal(chunk.flatten().field("band"), ESCALATE), False)
            result[start + parents[np.asarray(bands)]] = True
        start += len(chunk)
    return result


@dataclass(frozen=True)
class Decisions:
    """Decisions of n rows: `codes` int8 [n] (0 keep, 1 review, 2 reject), `reasons` list<struct> [n].

    `counts[rule]` says how many rows the rule put into each band ("review", "reject", "missing"; "escalate" for lists of
    known pictures, "tighten" for modifiers). Where the policy has severities and actions, `severity` (int32 [n], the
    highest of the rules that fired, 0 for none) and `action` (that of the worst rule that names one) say so.
    """

    codes: np.ndarray
    reasons: pa.ListArray
    counts: dict[str, dict[str, int]]
    severity: np.ndarray | None = None
    action: pa.Array | None = None

    @property
    def decision(self) -> pa.Array:
        """cf_decision as strings [n]."""
        return _strings(self.codes.astype(np.int32), pa.array(DECISIONS))

    def totals(self) -> dict[str, int]:
        """How many rows of each decision."""
        return {name: int((self.codes == code).sum()) for code, name in enumerate(DECISIONS)}


@dataclass(frozen=True)
class _Outcome:
    """What one rule says of some rows. rule: its position, or that of the override after the last."""

    rule: int
    rank: int
    band: str
    rows: np.ndarray  # intp
    threshold: np.ndarray  # float32, of each of the rows

    @classmethod
    def of(
        cls, rule: int, rank: int, band: str, fired: np.ndarray, threshold: np.ndarray | np.float32 | float
    ) -> _Outcome:
        """fired: bool [n]; threshold: float32 [n], or one number for all, NaN where none was compared."""
        rows = np.flatnonzero(fired)
        return cls(rule, rank, band, rows, np.broadcast_to(np.asarray(threshold, dtype=np.float32), fired.shape)[rows])


@dataclass
class _Shift:
    """How far modifiers move the thresholds of one rule: amount float64 [n], and by which modifier intp [n] (-1: none)."""

    amount: np.ndarray
    modifier: np.ndarray
    felt: np.ndarray  # rows where a moved threshold was passed, bool [n]

    @classmethod
    def none(cls, rows: int) -> _Shift:
        return cls(np.zeros(rows), np.full(rows, -1, dtype=np.intp), np.zeros(rows, dtype=bool))


@dataclass(frozen=True)
class Decider:
    """The rules of a policy as they decide. labels: what reasons name, by the positions that scores hold."""

    rules: tuple[CompiledRule, ...]
    dataset_thresholds: tuple[DatasetThreshold, ...]
    labels: pa.StringArray

    @property
    def has_severities(self) -> bool:
        return any(rule.severity is not None for rule in self.rules)

    @property
    def has_actions(self) -> bool:
        """Whether a rule names what is to be done beyond its bands."""
        return any(rule.action is not None and rule.action not in LIMITS for rule in self.rules)

    @property
    def names(self) -> list[str]:
        """The ids of the rules, then the name of people's decisions."""
        return [*(rule.id for rule in self.rules), OVERRIDE_RULE]


def decide(policy: Decider, scores: Scores, thresholds: dict[str, float | None]) -> Decisions:
    """The worst of the rules' outcomes for every row, with a reason for every rule that fired.

    `thresholds` holds the fixed numbers of dataset-level rules by `DatasetThreshold.key` ("<rule>.reject");
    None means that no row had a score. A band fires strictly beyond its threshold, where modifiers have moved it;
    a rule that has bands and no score fires as its `on_missing` says, unless its condition excludes the row. An override
    decides instead of the rules, except where the row is escalated. Reasons: escalations, the override, then the rules
    by severity and in their order.
    """
    n = scores.rows
    codes = np.zeros(n, dtype=np.int8)
    shifts = _shifts(policy, scores)
    outcomes: list[_Outcome] = []
    for position, rule in enumerate(policy.rules):
        outcomes += _outcomes(policy, position, rule, scores, thresholds, shifts.get(rule.id))
    outcomes += _modifiers(policy, scores, shifts)
    for outcome in sorted(outcomes, key=lambda item: item.rank):  # the worst last, which stays
        codes[outcome.rows] = min(outcome.rank // 10, len(DECISIONS) - 1)
    if scores.overrides is not None:
        final = np.zeros(n, dtype=bool)
        for outcome in outcomes:
            if outcome.band == ESCALATE:
                final[outcome.rows] = True
        outcomes += _overrides(scores.overrides, len(policy.rules))
        decided = (scores.overrides >= 0) & ~final
        codes[decided] = scores.overrides[decided]
    return Decisions(
        codes,
        _reasons(policy, scores, outcomes),
        _counts(policy, outcomes),
        _severity(policy, outcomes, n),
        _action(policy, outcomes, n),
    )


def _outcomes(
    policy: Decider,
    position: int,
    rule: CompiledRule,
    scores: Scores,
    thresholds: dict[str, float | None],
    shift: _Shift | None,
) -> list[_Outcome]:
    """What one rule says, worst band first."""
    bands = _bands(rule, policy, thresholds)
    if not bands and rule.tighten is None:
        return []
    values = scores.values[rule.id]
    unknown = any(math.isnan(threshold) for _, threshold in bands.values())
    missing = np.ones(len(values), dtype=bool) if unknown else np.isnan(values)
    left = ~missing
    found = []
    for name in (ESCALATE, *reversed(LIMITS)):
        if name not in bands:
            continue
        limit = _limits(*bands[name], shift, len(values))
        fired = left & _beyond(values, bands[name][0], limit)
        left &= ~fired
        if shift is not None:
            shift.felt |= fired & ~_beyond(values, bands[name][0], np.float32(bands[name][1]))
        found.append(_Outcome.of(position, _RANK[name], name, fired, limit))
    if rule.id in scores.skipped:
        missing &= ~scores.skipped[rule.id]
    if rule.on_missing != "keep":
        found.append(_Outcome.of(position, _RANK[rule.on_missing], "missing", missing, np.nan))
    return found


def _bands(rule: CompiledRule, policy: Decider, thresholds: dict[str, float | None]) -> dict[str, tuple[str, float]]:
    """Band name -> (direction, threshold) with "above"/"below" for every band of the rule."""
    if rule.measure.actions:
        return {} if rule.action is None else {rule.action: ("above", 0.0)}
    if not rule.measure.ranks:
        pairs = (("review", rule.review), ("reject", rule.reject))
        return {name: (str(rule.direction), float(value)) for name, value in pairs if value is not None}
    bands = {}
    for entry in policy.dataset_thresholds:
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


def _limits(direction: str, threshold: float, shift: _Shift | None, rows: int) -> np.ndarray | np.float32:
    """The threshold as it holds for each row: float32, one for all or [n]."""
    if shift is None:
        return np.float32(threshold)
    limits = np.full(rows, threshold, dtype=np.float32)
    for amount in np.unique(shift.amount[shift.amount > 0]).tolist():
        limits[shift.amount == amount] = np.float32(moved(direction, threshold, amount))
    return limits


def _beyond(values: np.ndarray, direction: str, limit: np.ndarray | np.float32) -> np.ndarray:
    return np.asarray(values > limit if direction == "above" else values < limit)


def _shifts(policy: Decider, scores: Scores) -> dict[str, _Shift]:
    """By rule how far its thresholds move; of several modifiers that apply the largest amount counts."""
    shifts: dict[str, _Shift] = {}
    for position, rule in enumerate(policy.rules):
        if rule.tighten is None:
            continue
        applies = _beyond(scores.values[rule.id], str(rule.direction), np.float32(rule.tighten))
        for name in rule.tightens:
            shift = shifts.setdefault(name, _Shift.none(scores.rows))
            stronger = applies & (rule.tighten_by > shift.amount)
            shift.amount[stronger], shift.modifier[stronger] = rule.tighten_by, position
    return shifts


def _modifiers(policy: Decider, scores: Scores, shifts: dict[str, _Shift]) -> list[_Outcome]:
    """The modifiers as reasons of the rows that only a moved threshold caught."""
    found = []
    for position, rule in enumerate(policy.rules):
        if rule.tighten is None:
            continue
        felt = np.zeros(scores.rows, dtype=bool)
        for name in rule.tightens:
            felt |= shifts[name].felt & (shifts[name].modifier == position)
        found.append(_Outcome.of(position, _RANK[TIGHTEN], TIGHTEN, felt, rule.tighten))
    return found


def _overrides(codes: np.ndarray, position: int) -> list[_Outcome]:
    return [_Outcome.of(position, _OVERRIDE_RANK, name, codes == code, np.nan) for code, name in enumerate(DECISIONS)]


def _counts(policy: Decider, outcomes: Sequence[_Outcome]) -> dict[str, dict[str, int]]:
    counts = {rule.id: dict.fromkeys(BANDS, 0) for rule in policy.rules}
    names = policy.names
    for outcome in outcomes:
        own = counts.setdefault(names[outcome.rule], {})
        own[outcome.band] = own.get(outcome.band, 0) + len(outcome.rows)
    return counts


def _severity(policy: Decider, outcomes: Sequence[_Outcome], rows: int) -> np.ndarray | None:
    if not policy.has_severities:
        return None
    result = np.zeros(rows, dtype=np.int32)
    for outcome in outcomes:
        if outcome.rule < len(policy.rules) and outcome.band in (*LIMITS, ESCALATE):
            own = policy.rules[outcome.rule].severity or 0
            result[outcome.rows] = np.maximum(result[outcome.rows], own)
    return result


def _action(policy: Decider, outcomes: Sequence[_Outcome], rows: int) -> pa.Array | None:
    if not policy.has_actions:
        return None
    names = list(dict.fromkeys(rule.action for rule in policy.rules if rule.action))
    chosen = np.full(rows, -1, dtype=np.int32)
    for outcome in sorted(outcomes, key=lambda item: -item.rank):
        own = policy.rules[outcome.rule].action if outcome.rule < len(policy.rules) else None
        if own is not None and own not in LIMITS and outcome.band in (*LIMITS, ESCALATE):
            free = outcome.rows[chosen[outcome.rows] < 0]
            chosen[free] = names.index(own)
    return _strings(chosen, pa.array(names))


def _reasons(policy: Decider, scores: Scores, outcomes: Sequence[_Outcome]) -> pa.ListArray:
    """All reasons as one list<struct> array: outcome after outcome in flat arrays, then sorted by row."""
    fired = sorted((outcome for outcome in outcomes if len(outcome.rows)), key=lambda item: -item.rank)
    rows = _joined(np.intp, [outcome.rows for outcome in fired])
    order = np.argsort(rows, kind="stable")  # the reasons of one row stay in the order of their rank
    offsets = np.zeros(scores.rows + 1, dtype=np.int32)
    offsets[1:] = np.cumsum(np.bincount(rows, minlength=scores.rows))

    lengths = np.array([len(outcome.rows) for outcome in fired], dtype=np.intp)
    rule = np.repeat(np.array([outcome.rule for outcome in fired], dtype=np.int32), lengths)
    band = np.repeat(np.array([_ALL_BANDS.index(outcome.band) for outcome in fired], dtype=np.int32), lengths)
    threshold = _joined(np.float32, [outcome.threshold for outcome in fired])
    scored = [_scored(policy, outcome) for outcome in fired]
    score = _found(scores.values, [name for name, _ in scored], fired, np.float32(np.nan))
    nearest = _found(scores.nearest, [name for _, name in scored], fired, np.int32(-1))
    contrast = _found(scores.contrast, [name for _, name in scored], fired, np.int32(-1))

    items = pa.StructArray.from_arrays(
        [
            _strings(rule[order], pa.array(policy.names)),
            _strings(band[order], pa.array(_ALL_BANDS)),
            _floats(score[order]),
            _floats(threshold[order]),
            _strings(nearest[order], policy.labels),
            _strings(contrast[order], policy.labels),
        ],
        fields=list(REASON),
    )
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=REASONS)


def _scored(policy: Decider, outcome: _Outcome) -> tuple[str, str]:
    """The rules that hold the score and the phrases of an outcome; "" for a missing score and for a person's decision."""
    if outcome.band == "missing" or outcome.rule == len(policy.rules):
        return "", ""
    rule = policy.rules[outcome.rule]
    return rule.id, rule.measure.of_rule or rule.id


def _found(
    values: Mapping[str, np.ndarray], rules: Sequence[str], outcomes: Sequence[_Outcome], none: np.generic
) -> np.ndarray:
    """Each outcome's rows of its rule's values, one after the other; `none` where the rule has no values."""
    parts = [
        values[rule][outcome.rows] if rule in values else np.full(len(outcome.rows), none)
        for rule, outcome in zip(rules, outcomes, strict=True)
    ]
    return _joined(none.dtype, parts)


def _joined(dtype: npt.DTypeLike, parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=dtype), *parts])  # of no parts numpy would not know the type


def _strings(index: np.ndarray, names: pa.StringArray) -> pa.Array:
    """Names by position, null where the position is negative; string, not dictionary."""
    positions = pa.array(index, mask=index < 0)
    return pa.DictionaryArray.from_arrays(positions, names).dictionary_decode()


def _floats(values: np.ndarray) -> pa.Array:
    return pa.array(values, type=pa.float32(), mask=np.isnan(values))


def annotation(policy: Decider, scores: Scores, decisions: Decisions | None) -> pa.Table:
    """The columns beside a row: cf_similarity, cf_score.<rule> of every rule, cf_decision, cf_reasons, and where the
    policy has them cf_severity and cf_action.

    Null scores could not be evaluated. Without decisions (a run that only scores, or before dataset-level
    thresholds are fixed) the columns of the decision are null.
    """
    n = scores.rows
    columns: dict[str, pa.Array] = {cf.SIMILARITY: _floats(scores.similarity)}
    columns |= {cf.score(rule.id): _floats(scores.values[rule.id]) for rule in policy.rules}
    columns[cf.DECISION] = pa.nulls(n, pa.string()) if decisions is None else decisions.decision
    columns[cf.REASONS] = pa.nulls(n, REASONS) if decisions is None else decisions.reasons
    if policy.has_severities:
        known = decisions is not None and decisions.severity is not None
        columns[cf.SEVERITY] = pa.array(decisions.severity) if known else pa.nulls(n, pa.int32())  # type: ignore[union-attr]
    if policy.has_actions:
        columns[cf.ACTION] = pa.nulls(n, pa.string()) if decisions is None else decisions.action
    return pa.table(columns)
