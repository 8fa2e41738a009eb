"""What a change of policy would do: the stored rows of a run decided by two policies, side by side; nothing is written."""

from __future__ import annotations

import hashlib
import heapq
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.decisions import DECISIONS
from clipfilter.engine import compile_for, refuse_other_weights, stored_model
from clipfilter.policies import Policy, dataset_thresholds, escalated
from clipfilter.runs import Commit, Run, Thresholds, annotate, is_run
from clipfilter.sources import Shard, Source

if TYPE_CHECKING:
    from clipfilter.models import Encoder
    from clipfilter.policies import CompiledPolicy


@dataclass
class Side:
    """One of the two policies: what it decides. rules: rows per band of each rule."""

    name: str
    version: int
    sha256: str
    decisions: Counter[str] = field(default_factory=Counter)
    rules: dict[str, Counter[str]] = field(default_factory=dict)
    thresholds: Thresholds = field(default_factory=dict)
    uncalibrated: list[str] = field(default_factory=list)


@dataclass
class Flip:
    """A row that the two policies decide differently; reasons as in `cf_reasons`. hidden: escalated, never to be shown."""

    commit: str
    path: str
    row: int
    uid: str
    key: str
    caption: str | None
    sha256: str
    before: str
    after: str
    reasons_before: list[dict[str, Any]]
    reasons_after: list[dict[str, Any]]
    hidden: bool = False


@dataclass
class Comparison:
    """changes: how many rows go from one decision to another; flips: a uniform sample of them, per kind of change.

    shards: the shard of every commit that the sample touches.
    """

    run: str
    dataset_version: str
    source: dict[str, Any]
    model: str
    rows: int
    before: Side
    after: Side
    changes: dict[tuple[str, str], int]
    flips: list[Flip]
    shards: dict[str, Shard]

    @property
    def flipped(self) -> int:
        """How many rows change their decision."""
        return sum(self.changes.values())

    def to_json(self) -> dict[str, Any]:
        """Counts and the sampled rows; JSON-ready."""
        sides = {
            name: {
                "policy": side.name,
                "version": side.version,
                "sha256": side.sha256,
                "decisions": {decision: side.decisions[decision] for decision in DECISIONS},
                "rules": {rule: dict(sorted(bands.items())) for rule, bands in side.rules.items()},
                "thresholds": side.thresholds,
                "uncalibrated": side.uncalibrated,
            }
            for name, side in (("before", self.before), ("after", self.after))
        }
        return {
            "run": self.run,
            "version": self.dataset_version,
            "model": self.model,
            "rows": self.rows,
            "flipped": self.flipped,
            **sides,
            "changes": [{"from": a, "to": b, "rows": n} for (a, b), n in sorted(self.changes.items())],
            "sample": [
                {
                    "uid": flip.uid,
                    "key": flip.key,
                    "shard": flip.path,
                    "row": flip.row,
                    "from": flip.before,
                    "to": flip.after,
                    "reasons_before": flip.reasons_before,
                    "reasons_after": flip.reasons_after,
                }
                for flip in self.flips
            ],
        }


def compare_policies(
    before: Policy, after: Policy, run: str, *, model: str | None = None, examples: int = 12
) -> Comparison:
    """Decide the newest version of `run` with both policies.

    model: where the run's own model is, if it was a local one. examples: sampled rows per kind of change.
    Memory is that of one shard. Raises RefusedError when the run is unfinished, its model cannot be had, or a policy does
    not fit its columns.
    """
    from clipfilter.models import load_encoder

    origin = Run(run).origin()
    plan = origin.plan
    encoder = load_encoder(model or stored_model(plan))
    refuse_other_weights(plan, encoder.fingerprint)
    source = Source.from_plan(plan.source)
    compiled = [compile_for(source, policy, encoder, plan.options["decode"]) for policy in (before, after)]
    sides = [
        Side(p.name, p.version, p.sha256, uncalibrated=list(c.uncalibrated))
        for p, c in zip((before, after), compiled, strict=True)
    ]
    changes: Counter[tuple[str, str]] = Counter()
    sample = _Sample(examples)
    hidden = escalated_rows(run)
    rows = 0
    with origin.directory:
        for side, policy in zip(sides, compiled, strict=True):
            side.thresholds = _dataset_thresholds(origin, encoder, policy)
        for shard in origin.shards():
            decided = [
                annotate(shard.rows, shard.embeddings, encoder, policy, side.thresholds)
                for side, policy in zip(sides, compiled, strict=True)
            ]
            rows += shard.rows.num_rows
            for side, table in zip(sides, decided, strict=True):
                _count(side, table)
            _compare(shard.commit, decided[0], decided[1], changes, sample, hidden)
    return Comparison(
        run=origin.url,
        dataset_version=origin.version.name,
        source=plan.source,
        model=str(plan.model["model"]),
        rows=rows,
        before=sides[0],
        after=sides[1],
        changes=dict(changes),
        flips=sample.flips(),
        shards=sample.shards(),
    )


def _dataset_thresholds(origin: Run, encoder: Encoder, policy: CompiledPolicy) -> Thresholds:
    """The numbers of the policy's dataset-level rules for this dataset; the ranked scores wait in a temporary folder."""
    ranked = sorted({entry.of for entry in policy.dataset_thresholds})
    if not ranked:
        return {}
    with tempfile.TemporaryDirectory(prefix="clipfilter-") as folder:
        count = 0
        for shard in origin.shards():
            table = annotate(shard.rows, shard.embeddings, encoder, policy, None)
            for number, rule in enumerate(ranked):
                np.save(Path(folder, f"{number}-{count}.npy"), np.asarray(table[cf.score(rule)].to_numpy(), np.float32))
            count += 1

        def chunks(rule: str) -> Iterator[np.ndarray]:
            number = ranked.index(rule)
            return (np.load(Path(folder, f"{number}-{part}.npy"), allow_pickle=False) for part in range(count))

        return dataset_thresholds(policy, chunks)[0]


def escalated_rows(run: str) -> set[tuple[str, int]]:
    """(shard, row) of all rows that the run itself escalated; whatever is compared, they are never shown."""
    if not is_run(run):
        return set()
    opened = Run(run)
    policy = opened.plan.policy
    if not opened.finished or policy is None or not Policy.from_canonical(policy).escalates:
        return set()
    found: set[tuple[str, int]] = set()
    for commit, batch in opened.batches("annotated", [cf.ROW, cf.REASONS]):
        rows = np.asarray(batch[cf.ROW])[escalated(batch[cf.REASONS])]
        found.update((commit.shard.id, row) for row in rows.tolist())
    return found


def _count(side: Side, table: pa.Table) -> None:
    side.decisions.update(table[cf.DECISION].to_pylist())
    flat = table[cf.REASONS].combine_chunks().flatten()
    for rule, band in zip(flat.field("rule").to_pylist(), flat.field("band").to_pylist(), strict=True):
        side.rules.setdefault(rule, Counter())[band] += 1


def _compare(
    commit: Commit,
    before: pa.Table,
    after: pa.Table,
    changes: Counter[tuple[str, str]],
    sample: _Sample,
    hidden: set[tuple[str, int]],
) -> None:
    first = np.asarray(before[cf.DECISION].to_pylist(), dtype=object)
    second = np.asarray(after[cf.DECISION].to_pylist(), dtype=object)
    places = np.flatnonzero(first != second)
    never_shown = escalated(before[cf.REASONS]) | escalated(after[cf.REASONS])
    changes.update(zip(first[places].tolist(), second[places].tolist(), strict=True))
    uids = after[cf.UID].take(pa.array(places)).to_pylist()
    for place, uid in zip(places.tolist(), uids, strict=True):
        change = (first[place], second[place])
        if sample.wants(change, uid):
            row = {column: after[column][place].as_py() for column in (cf.ROW, cf.KEY, cf.CAPTION, cf.SHA256)}
            sample.add(
                change,
                Flip(
                    commit=commit.name,
                    path=commit.shard.path,
                    row=row[cf.ROW],
                    uid=uid,
                    key=row[cf.KEY] or "",
                    caption=row[cf.CAPTION],
                    sha256=row[cf.SHA256],
                    before=change[0],
                    after=change[1],
                    reasons_before=before[cf.REASONS][place].as_py(),
                    reasons_after=after[cf.REASONS][place].as_py(),
                    hidden=bool(never_shown[place]) or (commit.shard.id, row[cf.ROW]) in hidden,
                ),
                commit.shard,
            )


class _Sample:
    """The `size` rows of each kind of change whose hashed uid is smallest: uniform, and the same every time."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._heaps: dict[tuple[str, str], list[tuple[int, str, Flip, Shard]]] = {}

    def wants(self, change: tuple[str, str], uid: str) -> bool:
        heap = self._heaps.get(change, [])
        return self._size > 0 and (len(heap) < self._size or -_rank(uid) > heap[0][0])

    def add(self, change: tuple[str, str], flip: Flip, shard: Shard) -> None:
        heap = self._heaps.setdefault(change, [])
        item = (-_rank(flip.uid), f"{flip.path}:{flip.row}", flip, shard)
        if len(heap) < self._size:
            heapq.heappush(heap, item)
        else:
            heapq.heappushpop(heap, item)

    def flips(self) -> list[Flip]:
        """Severest changes first, in the order of the hash."""
        order = {decision: place for place, decision in enumerate(DECISIONS)}
        kinds = sorted(self._heaps, key=lambda change: (-abs(order[change[1]] - order[change[0]]), change))
        return [item[2] for kind in kinds for item in sorted(self._heaps[kind], key=lambda item: (-item[0], item[1]))]

    def shards(self) -> dict[str, Shard]:
        return {item[2].commit: item[3] for heap in self._heaps.values() for item in heap}


def _rank(uid: str) -> int:
    return int.from_bytes(hashlib.sha256(b"diff\0" + uid.encode()).digest()[:8], "big")
