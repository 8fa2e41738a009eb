"""Prometheus metrics of running jobs: an HTTP endpoint, a textfile, or both (extra `metrics`).

The numbers are those of the driver's progress and of the commits it has seen. Publishing them is never allowed to slow
a job down or to end it: updates copy a few counters, and what goes wrong afterwards is logged.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clipfilter import defaults
from clipfilter.decisions import DECISIONS
from clipfilter.engine.driver import Display, Progress
from clipfilter.errors import RefusedError

log = logging.getLogger("clipfilter.engine")

_FILE_SECONDS = 10.0
_RATE_SECONDS = 30.0


class Finished(Protocol):
    """What is exported of a result: that of a job, or of a night."""

    @property
    def exit_code(self) -> int: ...
    @property
    def version(self) -> str: ...
    @property
    def totals(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class MetricsOptions:
    """Where metrics go. port: 0 takes a free one, None opens no endpoint. file: for node_exporter's textfile collector."""

    port: int | None = None
    host: str = defaults.LOOPBACK
    file: str | None = None


class RunMetrics:
    """A `Display` whose state Prometheus can read; the stages and jobs of one process add up.

    Counters hold what this process did: shards that an earlier start committed are in `clipfilter_shards_total` with
    state "reused", and in nothing else.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._lock = threading.Lock()
        self._current: Progress | None = None  # the driver's own object, to notice when the next stage begins
        self._stages: list[Progress] = []
        self._rates: list[tuple[float, int]] = []
        self._result: Finished | None = None
        self._finished = 0.0
        self._started = time.time()

    def update(self, progress: Progress) -> None:
        """Take a copy of the driver's progress."""
        snapshot = copy.copy(progress)
        for name in ("counts", "failed_by_class", "seconds"):
            setattr(snapshot, name, Counter(getattr(progress, name)))
        now = time.monotonic()
        with self._lock:
            if progress is not self._current:
                self._current = progress
                self._stages.append(snapshot)
                self._rates = []
            self._stages[-1] = snapshot
            self._rates = [each for each in self._rates if now - each[0] <= _RATE_SECONDS] + [(now, snapshot.rows)]

    def finish(self, result: Finished) -> None:
        """A job has ended, well or with too many failures."""
        with self._lock:
            self._result, self._finished, self._rates = result, time.time(), []
            if self._stages:
                last = self._stages[-1]
                last.waiting = last.running = last.workers = 0

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks of a collector: all metrics, now."""
        with self._lock:
            stages, result, finished = list(self._stages), self._result, self._finished
            rate = _rate(self._rates)
        now = stages[-1] if stages else Progress()
        for name, text, label, values in _COUNTERS:
            yield self._counter(
                name, text, label, [(s.stage, value, n) for s in stages for value, n in values(s).items()]
            )
        yield self._gauge("clipfilter_images_per_second", f"Rows per second over the last {_RATE_SECONDS:.0f} s.", rate)
        yield self._gauge(
            "clipfilter_queue_depth", "Shards planned and waiting, and shards that workers hold.",
            {"waiting": now.waiting, "running": now.running}, "state",
        )  # fmt: skip
        yield self._gauge("clipfilter_workers", "Workers that are up.", now.workers)
        yield self._gauge(
            "clipfilter_started_timestamp_seconds", "When this process started its job (Unix time).", self._started
        )
        if result is not None:
            yield from self._ended(result, finished)

    def _ended(self, result: Finished, finished: float) -> Iterator[Any]:
        yield self._gauge(
            "clipfilter_exit_code", "Exit code of the last job: 0, or 3 with too many failures.", result.exit_code
        )
        yield self._gauge("clipfilter_finished_timestamp_seconds", "When the last job ended (Unix time).", finished)
        version = int(result.version or 0)
        yield self._gauge("clipfilter_dataset_version", "Version of the dataset that the last job wrote.", version)
        yield self._gauge(
            "clipfilter_dataset_rows", "Rows of the dataset's version, by outcome.",
            {name: result.totals.get(name, 0) for name in ("rows", "embedded", *DECISIONS, "failed")}, "outcome",
        )  # fmt: skip

    def _counter(self, name: str, text: str, label: str, values: Iterable[tuple[str, str, float]]) -> Any:
        from prometheus_client.core import CounterMetricFamily

        family = CounterMetricFamily(name, text, labels=["job_kind", "stage", label])
        totals: Counter[tuple[str, str]] = Counter()
        for stage, value, number in values:
            totals[stage, value] += number  # type: ignore[assignment]
        for (stage, value), number in totals.items():
            family.add_metric([self._job, stage, value], number)
        return family

    def _gauge(self, name: str, text: str, value: float | dict[str, float], label: str | None = None) -> Any:
        """One number, or one for each value of a label."""
        from prometheus_client.core import GaugeMetricFamily

        family = GaugeMetricFamily(name, text, labels=["job_kind", *([label] if label else [])])
        for found, number in value.items() if isinstance(value, dict) else [(None, value)]:
            family.add_metric([self._job, *([found] if found else [])], number)
        return family


#: (name, what it says, its label, a stage's numbers by value of the label).
_COUNTERS: tuple[tuple[str, str, str, Callable[[Progress], dict[str, float]]], ...] = (
    ("clipfilter_rows", "Rows of shards that were committed, by what became of them.", "outcome",
     lambda s: {name: s.counts[name] for name in ("embedded", "failed")}),
    ("clipfilter_decisions", "Rows decided, by decision.", "decision",
     lambda s: {name: s.counts[name] for name in DECISIONS}),
    ("clipfilter_failed_rows", "Rows that failed, by class of error.", "error_class", lambda s: dict(s.failed_by_class)),
    ("clipfilter_shards", "Shards, by state: done now, reused from an earlier start, or failed for good.", "state",
     lambda s: {"done": s.shards_done - s.shards_reused, "reused": s.shards_reused, "failed": s.shards_failed}),
    ("clipfilter_worker_seconds", "Wall time of workers, by step of a shard.", "step", lambda s: dict(s.seconds)),
    ("clipfilter_encoder_wait_seconds", "Time in which an encoder (a GPU) had its turn and no batch was ready.", "reason",
     lambda s: {"no_batch": s.encoder_waited}),
    ("clipfilter_failed_attempts", "Attempts at a shard that failed and were repeated or given up.", "reason",
     lambda s: {"any": s.attempts_failed}),
)  # fmt: skip


def _rate(points: list[tuple[float, int]]) -> float:
    if len(points) < 2 or points[-1][0] <= points[0][0]:
        return 0.0
    return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])


@contextlib.contextmanager
def published(options: MetricsOptions, job: str) -> Iterator[RunMetrics | None]:
    """Metrics for the duration of a `with` block: give them to `run_job` through `together`, then call `finish`.

    None where no port and no file is asked for. job: "run", "nightly", ...: the label `job_kind`. Raises RefusedError when
    the extra is missing, the port is taken or the file cannot be written.
    """
    if options.port is None and options.file is None:
        yield None
        return
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError as error:
        raise RefusedError(
            f"metrics need a package ({error}); install it with `pip install clipfilter[metrics]`."
        ) from error
    metrics = RunMetrics(job)
    registry = CollectorRegistry()
    registry.register(metrics)
    with contextlib.ExitStack() as stack:
        if options.port is not None:
            try:
                server, thread = start_http_server(options.port, addr=options.host, registry=registry)
            except (OSError, OverflowError) as error:
                raise RefusedError(
                    f"no metrics can be served at {options.host}:{options.port} ({error}); choose another --metrics-port."
                ) from error
            stack.callback(_stop, server, thread)
            print(f"metrics at http://{options.host}:{server.server_port}/metrics", file=sys.stderr, flush=True)
        if options.file is not None:
            stack.enter_context(_textfile(Path(options.file), registry))
        yield metrics


def _stop(server: Any, thread: threading.Thread) -> None:
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


@contextlib.contextmanager
def _textfile(path: Path, registry: Any) -> Iterator[None]:
    """Write the metrics to a file every ten seconds, and at the end; whole or not at all."""
    from prometheus_client import write_to_textfile

    try:
        write_to_textfile(str(path), registry)
    except OSError as error:
        raise RefusedError(f"--metrics-file {path} cannot be written ({error}); choose another place.") from error
    done = threading.Event()

    def write() -> None:
        try:
            write_to_textfile(str(path), registry)
        except OSError as error:
            log.warning("metrics were not written to %s: %s", path, error)

    def repeat() -> None:
        while not done.wait(_FILE_SECONDS):
            write()

    thread = threading.Thread(target=repeat, daemon=True, name="metrics-file")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5)
        write()


class _Together:
    def __init__(self, displays: list[Display]) -> None:
        self._displays = displays

    def update(self, progress: Progress) -> None:
        for display in self._displays:
            display.update(progress)


def together(*displays: Display | None) -> Display | None:
    """One display that updates all of these; None where there is none."""
    some = [display for display in displays if display is not None]
    return _Together(some) if len(some) > 1 else (some[0] if some else None)
