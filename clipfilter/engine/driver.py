"""The driver of a job: settles the plan, hands shards to an executor, retries, fixes thresholds, writes the version."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from clipfilter import columns as cf
from clipfilter.engine.executors.interface import Executor, Outcome
from clipfilter.engine.worker import Inputs, Task
from clipfilter.errors import TRANSIENT, RefusedError
from clipfilter.policies import Policy, dataset_thresholds
from clipfilter.runs import Commit, FailedShard, Plan, Thresholds, ledger, read_table
from clipfilter.sources import Shard, Source
from clipfilter.storage import Directory

log = logging.getLogger("clipfilter.engine")

#: How often a shard may be tried before it is recorded as failed.
MAX_ATTEMPTS = 3
#: How often a shard may lose its machine without that being counted as an attempt.
MAX_LOST = 10
_RETRY_SECONDS = 2.0


@dataclass(frozen=True)
class Unit:
    """A shard and, for re-deciding, the commit that holds its rows."""

    shard: Shard
    inputs: Inputs | None = None


@dataclass
class Progress:
    """What a progress display shows; updated by the driver, read by the display.

    waiting, running: shards planned and not given out yet, and shards that workers hold. counts and failed_by_class are
    rows, seconds (by step) and encoder_waited wall time of workers; all four of shards that were done now, not before.
    waits_for: what takes unusually long, as sentences.
    """

    stage: str = ""
    shards_total: int = 0
    shards_known: bool = False
    shards_done: int = 0
    shards_reused: int = 0
    rows: int = 0
    rows_reused: int = 0
    keep: int = 0
    review: int = 0
    reject: int = 0
    failed: int = 0
    workers: int = 0
    waiting: int = 0
    running: int = 0
    shards_failed: int = 0
    attempts_failed: int = 0
    waits_for: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    failed_by_class: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    encoder_waited: float = 0.0
    started: float = field(default_factory=time.monotonic)


class Display(Protocol):
    def update(self, progress: Progress) -> None: ...


@dataclass
class StageResult:
    """Commits of one stage in shard order, and the shards that could not be processed."""

    commits: list[Commit]
    failed: list[FailedShard]


@dataclass
class _Pending:
    unit: Unit
    order: int
    generation: int
    attempts: int = 0
    lost: int = 0
    isolated: bool = False
    not_before: float = 0.0
    row_cap: int | None = None


@dataclass
class StageRun:
    """Runs one stage over all shards: skips what is committed, keeps the executor busy, retries what fails."""

    directory: Directory
    plan: Plan
    executor: Executor
    op: str
    stage: str
    thresholds: Thresholds | None = None
    retry_failed: bool = False
    limit: int | None = None
    display: Display | None = None
    _known: dict[str, Commit] = field(default_factory=dict)  # by shard, committed before
    _queue: list[_Pending] = field(default_factory=list)
    _running: dict[int, _Pending] = field(default_factory=dict)
    _results: dict[int, Commit] = field(default_factory=dict)
    _failed: dict[int, FailedShard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plan_sha256 = self.plan.sha256
        self.progress = Progress(stage=self.stage)

    def run(self, units: Iterator[Unit]) -> StageResult:
        """Process all units; returns when each has a commit or has failed for good."""
        existing = ledger.list_commits(self.directory)
        names = [name.path for (_, stage), name in sorted(existing.items()) if stage == self.stage]
        self._known = {commit.shard.id: commit for commit in ledger.commits(self.directory, names)}
        tickets = itertools.count()
        numbered = enumerate(units)
        exhausted = False
        while not exhausted or self._queue or self._running:
            exhausted = exhausted or self._fill(numbered)
            self._submit(tickets)
            if not self._queue and not self._running:
                continue
            for outcome in self.executor.poll(0.2):
                self._settle(outcome, self._running.pop(outcome.ticket))
            self.progress.waiting, self.progress.running = len(self._queue), len(self._running)
            self._show(exhausted)
        self._show(True)
        results, failed = self._results, self._failed
        return StageResult([results[i] for i in sorted(results)], [failed[i] for i in sorted(failed)])

    def _fill(self, units: Iterator[tuple[int, Unit]]) -> bool:
        """Plan a few shards ahead; whether there are no more. With a row limit they go one by one, each capped by the rest."""
        left = None
        ahead = 1 if self.limit is not None else 2 * self.executor.free() + 8
        while len(self._queue) < ahead:
            if self.limit is not None:
                if self._running:
                    return False
                left = self.limit - self._rows()
                if left <= 0:
                    return True
            try:
                order, unit = next(units)
            except StopIteration:
                return True
            self.progress.shards_total += 1
            generation = self._generation_needed(unit)
            if generation is None:
                self._results[order] = self._known[unit.shard.id]
                self._count(self._results[order], reused=True)
            else:
                self._queue.append(_Pending(unit, order, generation, row_cap=left))
        return False

    def _generation_needed(self, unit: Unit) -> int | None:
        """None when the shard's commit stands; else the generation to write."""
        commit, shard, inputs = self._known.get(unit.shard.id), unit.shard, unit.inputs
        if commit is None:
            return 1
        changed = (commit.shard.size, commit.shard.etag) != (shard.size, shard.etag)
        if changed:
            log.info("%s changed since it was processed", shard.path)
        base = commit.base_generation
        if (
            changed
            or (inputs is not None and base is not None and base != inputs.commit.generation)
            or (commit.thresholds is not None and commit.thresholds != self.thresholds)
            or (self.retry_failed and (commit.damaged or TRANSIENT & set(commit.failed_by_class)))
        ):
            return commit.generation + 1
        return None

    def _submit(self, tickets: Iterator[int]) -> None:
        now = time.monotonic()
        ready = [item for item in self._queue if item.not_before <= now]
        for item in ready[: self.executor.free()]:
            self._queue.remove(item)
            ticket = next(tickets)
            self._running[ticket] = item
            task = Task(
                op=self.op,
                shard=item.unit.shard,
                generation=item.generation,
                plan_sha256=self.plan_sha256,
                isolated=item.isolated,
                row_cap=item.row_cap,
                inputs=item.unit.inputs,
                thresholds=self.thresholds,
                attempt=item.attempts + 1,
            )
            self.executor.submit(ticket, task)
        if self._queue and not self._running:
            time.sleep(0.05)

    def _settle(self, outcome: Outcome, item: _Pending) -> None:
        path = item.unit.shard.path
        if outcome.kind == "refused":
            raise RefusedError(outcome.message)
        if outcome.kind == "done":
            assert outcome.result is not None
            self._results[item.order] = outcome.result.commit
            self._count(outcome.result.commit, reused=False)
            if not outcome.result.created:
                log.info("%s: another attempt committed first; its result stands", path)
            return
        if outcome.kind == "lost" and item.lost < MAX_LOST:
            item.lost += 1
            log.warning("%s: %s; it is given to another worker", path, outcome.message)
            self._queue[:0] = [item]
            return
        item.attempts += 1
        self.progress.attempts_failed += 1
        log.warning("%s: attempt %d failed: %s", path, item.attempts, outcome.message)
        if outcome.permanent or item.attempts >= MAX_ATTEMPTS:
            self.progress.shards_failed += 1
            self._failed[item.order] = FailedShard(item.unit.shard, outcome.message, item.attempts)
            return
        # A shard whose worker died may hold the image that killed it: decode apart from now on.
        item.isolated = item.isolated or outcome.kind == "died"
        item.not_before = time.monotonic() + (0 if outcome.kind == "died" else _RETRY_SECONDS * item.attempts)
        self._queue.insert(0, item)

    def _count(self, commit: Commit, *, reused: bool) -> None:
        counts, progress = commit.counts, self.progress
        progress.shards_done += 1
        progress.shards_reused += reused
        progress.rows_reused += counts.rows if reused else 0
        progress.keep += counts.keep
        progress.review += counts.review
        progress.reject += counts.reject
        progress.failed += counts.failed
        if not reused:
            progress.counts.update(counts)
            progress.failed_by_class.update(commit.failed_by_class)
            if commit.work.of_worker is not None:
                progress.seconds.update(commit.work.of_worker.seconds)
                progress.encoder_waited += commit.work.of_worker.encoder_waited

    def _rows(self) -> int:
        """Rows of the shards that are done."""
        return sum(commit.counts.rows for commit in self._results.values())

    def _show(self, exhausted: bool) -> None:
        progress = self.progress
        progress.shards_known = exhausted
        progress.workers = self.executor.workers_alive()
        progress.waits_for = self.executor.waits_for()
        progress.rows = max(progress.rows, self._rows() - progress.rows_reused, self.executor.rows_done())
        if self.display is not None:
            self.display.update(progress)


def source_units(source: Source) -> Iterator[Unit]:
    """The shards of a source, planned lazily."""
    for shard in source.iter_shards():
        yield Unit(shard)


def run_units(url: str, commits: Iterable[Commit]) -> Iterator[Unit]:
    """The shards of commits that hold rows and embeddings, to be decided (again). url: of their run."""
    for commit in commits:
        yield Unit(commit.shard, Inputs(url, commit))


def fix_thresholds(directory: Directory, policy: Policy, commits: Iterable[Commit], number: int = 1) -> Thresholds:
    """The numbers of the policy's dataset-level rules, computed once over all scored shards and then fixed (create-only).

    commits: gone through several times. number: of the file in `thresholds/`; above 1 after a refit. Returns the numbers
    by key; None where no row had a score.
    """
    fixed = f"thresholds/{number:06d}.json"
    if not directory.exists(fixed):
        numbers, evidence = dataset_thresholds(policy, lambda rule: _scores(directory, commits, rule))
        content = {"shards": sum(1 for _ in commits), "thresholds": numbers, "evidence": evidence}
        directory.create(fixed, (json.dumps(content, indent=1) + "\n").encode())
    return dict(directory.read_json(fixed)["thresholds"])


def _scores(directory: Directory, commits: Iterable[Commit], rule: str) -> Iterator[np.ndarray]:
    for commit in commits:
        if commit.files.scored is not None:
            column = read_table(directory, commit.files.scored, [cf.score(rule)]).column(0)
            yield np.asarray(column.to_numpy(), np.float32)
