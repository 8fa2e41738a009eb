"""Example rows for every rule: near its thresholds on both sides and far from them, from a few shards only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.policies import escalated
from clipfilter.report.data import Band, RuleData, RunData, floats, past
from clipfilter.sources import Shard

#: Examples on the whole page, and of one rule's bucket.
TOTAL = 48
PER_BUCKET = 3
_CANDIDATES = 8
_BATCH = 16_384
_OTHERS_LAST = 1e12
_COLUMNS = (cf.ROW, cf.KEY, cf.CAPTION, cf.SHA256, cf.DECISION, cf.REASONS)

#: Bucket -> heading, in the order of the page (from worst to best), and the order in which examples are dealt out.
HEADINGS = {
    "reject_far": "Rejected, farthest out",
    "reject_near": "Rejected, nearest the threshold",
    "review_far": "Review band, farthest out",
    "review_near": "Review band, nearest the threshold",
    "keep_near": "Kept, nearest the threshold",
    "keep_far": "Kept, farthest from it",
    "missing": "Not scored",
    "low": "Lowest similarity",
    "high": "Highest similarity",
}
_DEALING = ("reject_near", "keep_near", "review_near", "reject_far", "keep_far", "review_far", "missing", "low", "high")


@dataclass
class Example:
    """One row to show. score: of the rule it illustrates. `image` is filled by thumbnails.py (a JPEG data URI).

    hidden: it was escalated, so no picture of it is ever made.
    """

    commit: str
    path: str
    row: int
    key: str
    caption: str | None
    sha256: str | None
    decision: str | None
    score: float | None
    reasons: list[dict[str, Any]]
    image: str | None = None
    blurred: bool = False
    hidden: bool = False


@dataclass
class Examples:
    """Examples by (rule id, bucket); the rule id is "" for a run without policy. shards: by commit name."""

    by_bucket: dict[tuple[str, str], list[Example]] = field(default_factory=dict)
    shards: dict[str, Shard] = field(default_factory=dict)

    def all(self) -> list[Example]:
        return [example for found in self.by_bucket.values() for example in found]


def choose_examples(data: RunData) -> Examples:
    """Read the annotated rows of the chosen shards and pick at most `TOTAL` rows, no row twice."""
    heaps: dict[tuple[str, str], list[tuple[float, Example]]] = {}
    chosen = Examples()
    wanted = {*_COLUMNS, *([cf.score(rule.id) for rule in data.rules] or [cf.SIMILARITY])}
    for commit in data.run.commits(data.chosen):
        chosen.shards[commit.name] = commit.shard
        for batch in data.run.batches_of(commit.files.annotated, wanted.__contains__, _BATCH):
            _collect(heaps, data.rules, batch, commit.name, commit.shard.path)
    chosen.by_bucket = _deal(heaps, [rule.id for rule in data.rules] or [""])
    return chosen


def _collect(
    heaps: dict[tuple[str, str], list[tuple[float, Example]]],
    rules: list[RuleData],
    batch: pa.RecordBatch,
    commit: str,
    path: str,
) -> None:
    decision = np.asarray(batch.column(cf.DECISION).to_pylist(), dtype=object)
    # Escalated rows are no examples: nobody who reads the page is to look for them.
    hidden = escalated(batch.column(cf.REASONS)) if cf.REASONS in batch.schema.names else np.zeros(len(decision), bool)

    def offer(rule: str, bucket: str, mask: np.ndarray, distance: np.ndarray, values: np.ndarray) -> None:
        rows = np.flatnonzero(mask & ~hidden)
        rows = rows[np.argsort(distance[rows], kind="stable")][:_CANDIDATES]
        heap = heaps.setdefault((rule, bucket), [])
        for row in rows.tolist():
            if len(heap) >= _CANDIDATES and heap[-1][0] <= distance[row]:
                break
            heap.append((float(distance[row]), _example(batch, row, commit, path, float(values[row]))))
            heap.sort(key=lambda item: item[0])
            del heap[_CANDIDATES:]

    if not rules:
        if cf.SIMILARITY in batch.schema.names:
            values = floats(batch.column(cf.SIMILARITY))
            offer("", "low", ~np.isnan(values), values, values)
            offer("", "high", ~np.isnan(values), -values, values)
        return
    for rule in rules:
        if cf.score(rule.id) not in batch.schema.names or not rule.bands:
            continue
        values = floats(batch.column(cf.score(rule.id)))
        for bucket, mask, distance in _buckets(rule, values, decision):
            offer(rule.id, bucket, mask, distance, values)


def _buckets(rule: RuleData, values: np.ndarray, decision: np.ndarray) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(bucket, rows that belong there, what to sort by)."""
    found: list[tuple[str, np.ndarray, np.ndarray]] = []
    missing = np.isnan(values)
    review, reject = rule.band("review"), rule.band("reject")
    rejected = past(values, reject) if reject else np.zeros(len(values), bool)
    if reject is not None and reject.threshold is not None:
        distance = _distance(values, reject)
        mask = rejected & (decision == "reject")
        found += [("reject_near", mask, distance), ("reject_far", mask, -distance)]
    if review is not None and review.threshold is not None:
        distance = _distance(values, review)
        mask = past(values, review) & ~rejected
        other = np.where(decision == "review", 0.0, _OTHERS_LAST)  # what another rule decided more severely
        found += [("review_near", mask, distance + other), ("review_far", mask, -distance + other)]
    mildest = review or reject
    if mildest is not None and mildest.threshold is not None:
        distance = _distance(values, mildest)
        mask = (decision == "keep") & ~missing
        found.append(("keep_near", mask, distance))
        if rule.histogram.minimum < rule.histogram.maximum:
            found.append(("keep_far", mask, -distance))
    if rule.spec.get("on_missing") != "keep":
        found.append(("missing", missing & (decision != "keep"), np.arange(len(values), dtype=np.float64)))
    return found


def _distance(values: np.ndarray, band: Band) -> np.ndarray:
    assert band.threshold is not None
    return np.abs(values.astype(np.float64) - band.threshold)


def _example(batch: pa.RecordBatch, row: int, commit: str, path: str, score: float) -> Example:
    value = {name: batch.column(name)[row].as_py() for name in _COLUMNS if name in batch.schema.names}
    return Example(
        commit=commit,
        path=path,
        row=value[cf.ROW],
        key=value[cf.KEY] or "",
        caption=value.get(cf.CAPTION),
        sha256=value.get(cf.SHA256),
        decision=value.get(cf.DECISION),
        score=None if np.isnan(score) else score,
        reasons=value.get(cf.REASONS) or [],
    )


def _deal(
    heaps: dict[tuple[str, str], list[tuple[float, Example]]], rules: list[str]
) -> dict[tuple[str, str], list[Example]]:
    """Round after round one example to every rule and bucket that still has a row nobody has, up to `TOTAL`."""
    dealt: dict[tuple[str, str], list[Example]] = {}
    used: set[tuple[str, int]] = set()
    count = 0
    for _ in range(PER_BUCKET):
        for bucket in _DEALING:
            for rule in rules:
                for _, example in heaps.get((rule, bucket), []):
                    if (example.commit, example.row) not in used and count < TOTAL:
                        used.add((example.commit, example.row))
                        dealt.setdefault((rule, bucket), []).append(example)
                        count += 1
                        break
    return dealt
