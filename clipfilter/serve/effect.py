"""What moved thresholds would do: which rows change their decision, in milliseconds from sorted scores.

A row's decision is the worst of what its rules say. When thresholds move, only rows between an old and a new one can
change, and those stand together in the sorted scores; their other rules' bands are known. Rows so close to a new
threshold that the engine would compute their score again in float64 are scored again here, by the engine's own code, so
that the result is what `policy diff` finds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from clipfilter.decisions import DECISIONS, LIMITS
from clipfilter.errors import RefusedError
from clipfilter.policies import wanted_rank
from clipfilter.report import RuleData
from clipfilter.serve.columns import RunColumns

#: rule -> band -> new value, as a policy writes it (a fraction for fraction rules, else a threshold).
Changes = Mapping[str, Mapping[str, float]]
#: (changes, rule, rows) -> scores of the rule float32, as the changed policy would store them.
Rescore = Callable[[Changes, str, np.ndarray], np.ndarray]

#: What a rule may say for its band to be a function of its own score alone; rows that `when` excludes have no score.
_PLAIN = {"id", "templates", "when", *LIMITS, "severity", "action", "on_missing"}
_REMEMBERED = 16


@dataclass(frozen=True)
class Effect:
    """rows: int32 [m] positions that change, ascending; after: int8 [m] their new decisions.

    rules: rows by band of each changed rule. thresholds: the new thresholds by rule and band. doubtful: rows too close to
    a threshold to tell from float32 scores that were not scored again.
    """

    rows: np.ndarray
    after: np.ndarray
    changes: dict[tuple[str, str], int]
    rules: dict[str, dict[str, int]]
    thresholds: dict[str, dict[str, float]]
    doubtful: int


@dataclass(frozen=True)
class _Limit:
    """One band of one rule: what it was and what it shall be. value: as written; threshold: of the score."""

    name: str
    direction: str
    old: float
    value: float
    threshold: float


@dataclass
class Effects:
    """Answers for one run and its rules. rescore: None where scores cannot be computed again (no model)."""

    columns: RunColumns
    rules: list[RuleData]
    rescore: Rescore | None

    def __post_init__(self) -> None:
        self._remembered = lru_cache(_REMEMBERED)(lambda changes, exact: self._compute(json.loads(changes), exact))

    def movable(self, rule: RuleData) -> str | None:
        """None where the rule's thresholds can be moved here, else a sentence why not."""
        own = set() if rule.measure.actions else {rule.kind}
        odd = sorted(set(rule.spec) - _PLAIN - own)
        odd += [f"{other.id} tightens it" for other in self.rules if rule.id in _tightened(other)]
        if odd:
            return (
                f"The bands of {rule.id} depend on more than its score ({', '.join(odd)}); change the file and use "
                "`policy diff`."
            )
        if not rule.bands:
            return f"{rule.id} has no band of its own."
        if any(band.threshold is None for band in rule.bands) or not len(self.columns.ascending(rule.id)[1]):
            return f"No row has a score of {rule.id}."
        return None

    def of(self, changes: Changes, *, exact: bool) -> Effect:
        """What the changed thresholds change. exact: score doubtful rows again, as `policy diff` does.

        Raises RefusedError for a rule or band that is not there or cannot be moved.
        """
        return self._remembered(json.dumps({rule: dict(bands) for rule, bands in changes.items()}), exact)

    def _compute(self, changes: Changes, exact: bool) -> Effect:
        limits = {rule: self._limits(self.rule(rule), bands) for rule, bands in changes.items() if bands}
        touched: list[np.ndarray] = []
        again: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        doubtful = 0
        for rule, own in limits.items():
            touched += [
                self._between(rule, limit.old, limit.threshold) for limit in own if limit.old != limit.threshold
            ]
            close = self._doubtful(self.rule(rule), own)
            if not len(close):
                continue
            if exact and self.rescore is not None:
                again[rule] = close, self.rescore(changes, rule, close)
                touched.append(close)
            else:
                doubtful += len(close)
        mask = np.zeros(self.columns.rows, bool)
        for part in touched:
            mask[part] = True
        rows = np.flatnonzero(mask & ~self.columns.fixed).astype(np.int32)
        worst = np.zeros(len(rows), np.int8)
        for number, rule in enumerate(self.columns.rules):
            outcome = self.columns.severity[number][self.columns.band[number, rows]]
            if rule in limits:
                scores = self.columns.scores[rule][rows]
                if rule in again:
                    close, values = again[rule]
                    order = np.argsort(close)
                    place = np.searchsorted(close[order], rows).clip(max=len(close) - 1)
                    scores = np.where(close[order][place] == rows, values[order][place], scores)
                outcome = np.where(np.isnan(scores), outcome, _outcome(scores, limits[rule]))
            worst = np.maximum(worst, outcome)
        before = self.columns.decision[rows]
        flip = worst != before
        rows, before, after = rows[flip], before[flip], worst[flip]
        counts = np.bincount(before.astype(np.int64) * 3 + after, minlength=9)
        return Effect(
            rows=rows,
            after=after,
            changes={
                (DECISIONS[pair // 3], DECISIONS[pair % 3]): count
                for pair, count in enumerate(counts.tolist())
                if count
            },
            rules={rule: self._counts(rule, own) for rule, own in limits.items()},
            thresholds={rule: {limit.name: limit.threshold for limit in own} for rule, own in limits.items()},
            doubtful=doubtful,
        )

    def rule(self, name: str) -> RuleData:
        """The rule of this id. Raises RefusedError where the policy has none."""
        found = next((rule for rule in self.rules if rule.id == name), None)
        if found is None:
            raise RefusedError(f"the run's policy has no rule {name[:80]!r}.")
        return found

    def _limits(self, rule: RuleData, values: Mapping[str, float]) -> list[_Limit]:
        """All bands of the rule, the severest first."""
        problem = self.movable(rule)
        if problem is not None:
            raise RefusedError(problem)
        unknown = sorted(set(values) - {band.name for band in rule.bands})
        if unknown:
            raise RefusedError(f"{rule.id} has no {unknown[0][:40]} band.")
        limits = []
        for band in sorted(rule.bands, key=lambda item: item.name != "reject"):
            assert band.threshold is not None
            written = float(next(iter(band.written.values()))) if band.source == "dataset" else band.threshold
            value = values.get(band.name, written)
            if not math.isfinite(value) or abs(value) > 3e38:
                raise RefusedError(f"{value} is not a threshold.")
            threshold = value
            if band.source == "dataset":
                threshold = self._ranked(rule, band.written, value) if band.name in values else band.threshold
            limits.append(_Limit(band.name, band.direction, band.threshold, value, threshold))
        return limits

    def _ranked(self, rule: RuleData, written: Mapping[str, Any], fraction: float) -> float:
        """The threshold of a fraction of the rows that have a score; see `curation.fraction`."""
        if not 0 < fraction <= 1:
            raise RefusedError(f"a fraction is above 0 and at most 1, not {fraction:g}.")
        scores = self.columns.ascending(rule.id)[1]
        tail = "top" if "outside_top" in written else "bottom"
        return float(scores[wanted_rank(len(scores), fraction, tail)])

    def _between(self, rule: str, one: float, other: float) -> np.ndarray:
        order, scores = self.columns.ascending(rule)
        low, high = np.float32(min(one, other)), np.float32(max(one, other))
        return order[np.searchsorted(scores, low, "left") : np.searchsorted(scores, high, "right")]

    def _doubtful(self, rule: RuleData, limits: list[_Limit]) -> np.ndarray:
        """Rows whose float32 score may lie on the other side of a new threshold than their exact one."""
        order, scores = self.columns.ascending(rule.id)
        found = [np.empty(0, np.int32)]
        for limit in limits:
            if limit.threshold == limit.old or rule.measure.ranks:
                continue
            if rule.measure.is_whole(rule.measured) and limit.value == float(np.float32(limit.value)):
                continue  # whole numbers and an exact threshold: float32 tells them apart
            # Generous, since it only costs time.
            reach = rule.measure.reach(limit.value) + 4 * float(np.spacing(np.float32(abs(limit.value))))
            ends = np.float32(limit.value - reach), np.float32(limit.value + reach)
            found.append(order[np.searchsorted(scores, ends[0], "left") : np.searchsorted(scores, ends[1], "right")])
        return np.unique(np.concatenate(found))

    def _counts(self, rule: str, limits: list[_Limit]) -> dict[str, int]:
        scores = self.columns.ascending(rule)[1]
        counts, taken = {}, 0
        for limit in limits:
            single = np.float32(limit.threshold)
            beyond = (
                len(scores) - int(np.searchsorted(scores, single, "right"))
                if limit.direction == "above"
                else int(np.searchsorted(scores, single, "left"))
            )
            counts[limit.name] = max(0, beyond - taken)
            taken = max(taken, beyond)
        return counts


def _outcome(scores: np.ndarray, limits: list[_Limit]) -> np.ndarray:
    """int8 [n]: how severe the rule is for these scores, compared as the engine does."""
    result = np.zeros(len(scores), np.int8)
    for limit in reversed(limits):
        single = np.float32(limit.threshold)
        beyond = scores > single if limit.direction == "above" else scores < single
        result[beyond] = DECISIONS.index(limit.name)
    return result


def _tightened(rule: RuleData) -> list[str]:
    """The rules whose thresholds this one moves, row by row."""
    return list(rule.spec.get("tighten", {}).get("rules", ()))
