"""The driver of a job: settles the plan, hands shards to an executor, retries, fixes thresholds, writes the version."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter.engine.executors.interface import Executor, Outcome
from clipfilter.engine.worker import Task
from clipfilter.errors import TRANSIENT, RefusedError
from clipfilter.policies import Policy, dataset_thresholds
from clipfilter.runs import Plan, ledger
from clipfilter.sources import Shard, Source
from clipfilter.storage import Directory

log = logging.getLogger("clipfilter.engine")

#: How often a shard may be tried before it is recorded as failed.
MAX_ATTEMPTS = 3
_RETRY_SECONDS = 2.0


@dataclass(frozen=True)
class Unit:
    """A shard and, for re-deciding, the commit that holds its rows."""

    shard: Shard
    inputs: dict[str, Any] | None = None


@dataclass
class Progress:
    """What a progress display shows; updated by the driver, read by the display.

    waiting, running: shards planned and not given out yet, and shards that workers hold. counts and failed_by_class are
    rows, seconds (by step) and encoder_waited wall time of workers; all four of shards that were done now, not before.
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

    names: list[str]
    commits: list[dict[str, Any]]
    failed: list[dict[str, Any]]


@dataclass
class _Pending:
    unit: Unit
    order: int
    generation: int
    attempts: int = 0
    isolated: bool = False
    not_before: float = 0.0
    row_cap: int | None = None


class StageRun:
    """Runs one stage over all shards: skips what is committed, keeps the executor busy, retries what fails."""

    def __init__(
        self,
        directory: Directory,
        plan: Plan,
        executor: Executor,
        *,
        op: str,
        stage: str,
        thresholds: dict[str, float | None] | None = None,
        retry_failed: bool = False,
        limit: int | None = None,
        display: Display | None = None,
    ) -> None:
        self.directory = directory
        self.plan_sha256 = plan.sha256
        self.executor = executor
        self.op = op
        self.stage = stage
        self.thresholds = thresholds
        self.retry_failed = retry_failed
        self.limit = limit
        self.display = display
        self.progress = Progress(stage=stage)

    def run(self, units: Iterator[Unit]) -> StageResult:
        """Process all units; returns when each has a commit or has failed for good."""
        existing = ledger.list_commits(self.directory)
        known = self._read_existing(existing)
        results: dict[int, tuple[str, dict[str, Any]]] = {}
        failed: dict[int, dict[str, Any]] = {}
        queue: list[_Pending] = []
        running: dict[int, _Pending] = {}
        tickets = itertools.count()
        numbered = enumerate(units)
        exhausted = False
        while not exhausted or queue or running:
            exhausted = self._fill(queue, numbered, exhausted, known, results, running)
            self._submit(queue, running, tickets)
            if not queue and not running:
                continue
            for outcome in self.executor.poll(0.2):
                item = running.pop(outcome.ticket)
                self._settle(outcome, item, queue, results, failed)
            self.progress.waiting, self.progress.running = len(queue), len(running)
            self._show(results, exhausted)
        self._show(results, True)
        order = sorted(results)
        return StageResult(
            [results[i][0] for i in order], [results[i][1] for i in order], [failed[i] for i in sorted(failed)]
        )

    def _read_existing(
        self, existing: dict[tuple[str, str], ledger.CommitName]
    ) -> dict[str, tuple[str, dict[str, Any]]]:
        names = [name for (_, stage), name in sorted(existing.items()) if stage == self.stage]
        commits = ledger.read_commits(self.directory, [name.path for name in names])
        return {name.shard: (name.path, commit) for name, commit in zip(names, commits, strict=True)}

    def _fill(
        self,
        queue: list[_Pending],
        units: Iterator[tuple[int, Unit]],
        exhausted: bool,
        known: dict[str, tuple[str, dict[str, Any]]],
        results: dict[int, tuple[str, dict[str, Any]]],
        running: dict[int, _Pending],
    ) -> bool:
        """Plan a few shards ahead. With a row limit shards go one by one, each capped by what is left."""
        ahead = 1 if self.limit is not None else 2 * self.executor.free() + 8
        while not exhausted and len(queue) < ahead:
            if self.limit is not None:
                if running:
                    return False
                left = self.limit - sum(commit["counts"]["rows"] for _, commit in results.values())
                if left <= 0:
                    return True
            try:
                order, unit = next(units)
            except StopIteration:
                return True
            self.progress.shards_total += 1
            generation = self._generation_needed(unit, known)
            if generation is None:
                results[order] = known[unit.shard.id]
                self._count(results[order][1], reused=True)
            else:
                cap = left if self.limit is not None else None
                queue.append(_Pending(unit, order, generation, row_cap=cap))
        return exhausted

    def _generation_needed(self, unit: Unit, known: dict[str, tuple[str, dict[str, Any]]]) -> int | None:
        """None when the shard's commit stands; else the generation to write."""
        if unit.shard.id not in known:
            return 1
        commit = known[unit.shard.id][1]
        before = commit["shard"]
        if (before["size"], before["etag"]) != (unit.shard.size, unit.shard.etag):
            log.info("%s changed since it was processed", unit.shard.path)
            return int(commit["generation"]) + 1
        if (
            unit.inputs is not None
            and commit.get("base_generation", unit.inputs["generation"]) != unit.inputs["generation"]
        ):
            return int(commit["generation"]) + 1
        if commit.get("thresholds", self.thresholds) != self.thresholds:
            return int(commit["generation"]) + 1
        if self.retry_failed and (commit.get("damaged") or TRANSIENT & set(commit["failed_by_class"])):
            return int(commit["generation"]) + 1
        return None

    def _submit(self, queue: list[_Pending], running: dict[int, _Pending], tickets: Iterator[int]) -> None:
        now = time.monotonic()
        ready = [item for item in queue if item.not_before <= now]
        for item in ready[: self.executor.free()]:
            queue.remove(item)
            ticket = next(tickets)
            running[ticket] = item
            task = Task(
                op=self.op,
                shard=item.unit.shard.to_json(),
                generation=item.generation,
                plan_sha256=self.plan_sha256,
                isolated=item.isolated,
                row_cap=item.row_cap,
                inputs=item.unit.inputs,
                thresholds=self.thresholds,
                attempt=item.attempts + 1,
            )
            self.executor.submit(ticket, task)
        if queue and not running:
            time.sleep(0.05)

    def _settle(
        self,
        outcome: Outcome,
        item: _Pending,
        queue: list[_Pending],
        results: dict[int, tuple[str, dict[str, Any]]],
        failed: dict[int, dict[str, Any]],
    ) -> None:
        path = item.unit.shard.path
        if outcome.kind == "refused":
            raise RefusedError(outcome.message)
        if outcome.kind == "done":
            assert outcome.result is not None
            commit = outcome.result["commit"]
            name = ledger.CommitName(item.unit.shard.id, self.stage, item.generation).path
            results[item.order] = (name, commit)
            self._count(commit, reused=False)
            if not outcome.result["created"]:
                log.info("%s: another attempt committed first; its result stands", path)
            return
        item.attempts += 1
        self.progress.attempts_failed += 1
        log.warning("%s: attempt %d failed: %s", path, item.attempts, outcome.message)
        if outcome.permanent or item.attempts >= MAX_ATTEMPTS:
            self.progress.shards_failed += 1
            failed[item.order] = {
                "shard": item.unit.shard.to_json(),
                "error": outcome.message,
                "attempts": item.attempts,
            }
            return
        # A shard whose worker died may hold the image that killed it: decode apart from now on.
        item.isolated = item.isolated or outcome.kind == "died"
        item.not_before = time.monotonic() + (0 if outcome.kind == "died" else _RETRY_SECONDS * item.attempts)
        queue.insert(0, item)

    def _count(self, commit: dict[str, Any], *, reused: bool) -> None:
        counts, progress = commit["counts"], self.progress
        progress.shards_done += 1
        progress.shards_reused += reused
        progress.rows_reused += counts["rows"] if reused else 0
        progress.keep += counts.get("keep", 0)
        progress.review += counts.get("review", 0)
        progress.reject += counts.get("reject", 0)
        progress.failed += counts["failed"]
        if not reused:
            progress.counts.update(counts)
            progress.failed_by_class.update(commit["failed_by_class"])
            work = commit.get("work", {})
            progress.seconds.update(work.get("seconds", {}))
            progress.encoder_waited += work.get("encoder_waited", 0.0)

    def _show(self, results: dict[int, tuple[str, dict[str, Any]]], exhausted: bool) -> None:
        progress = self.progress
        progress.shards_known = exhausted
        progress.workers = self.executor.workers_alive()
        committed = sum(commit["counts"]["rows"] for _, commit in results.values()) - progress.rows_reused
        progress.rows = max(progress.rows, committed, self.executor.rows_done())
        if self.display is not None:
            self.display.update(progress)


def source_units(source: Source) -> Iterator[Unit]:
    """The shards of a source, planned lazily."""
    for shard in source.iter_shards():
        yield Unit(shard)


def run_units(run: Directory, names: list[str], commits: list[dict[str, Any]]) -> Iterator[Unit]:
    """The shards of commits that hold rows and embeddings, to be decided (again)."""
    for name, commit in zip(names, commits, strict=True):
        inputs = {"run": run.url, "name": name, "generation": commit["generation"], "commit": commit}
        yield Unit(Shard.from_json(commit["shard"]), inputs)


def fix_thresholds(
    directory: Directory, policy: Policy, commits: Iterable[dict[str, Any]], number: int = 1
) -> dict[str, float | None]:
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


def _scores(directory: Directory, commits: Iterable[dict[str, Any]], rule: str) -> Iterator[np.ndarray]:
    for commit in commits:
        if "scored" in commit["files"]:
            with directory.open(commit["files"]["scored"]["name"]) as handle:
                column = pq.read_table(handle, columns=[cf.score(rule)]).column(0)
            yield np.asarray(column.to_numpy(), np.float32)
