"""What the driver asks of an executor: start workers, take tasks, tell what became of them. It only schedules."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from clipfilter.engine.worker import Done, Heartbeat, JobSpec, Step, Task


@dataclass(frozen=True)
class Outcome:
    """What became of one submitted task.

    kind: "done" (`result`), "error" (it raised: `message`, and `permanent` when trying again cannot
    help), "died" (its worker was killed),
    "lost" (its machine was: no fault of the shard's), "refused" (the whole job cannot go on).
    """

    ticket: int
    kind: Literal["done", "error", "died", "lost", "refused"]
    result: Done | None = None
    message: str = ""
    permanent: bool = False


@dataclass(frozen=True)
class Resources:
    """How a job is spread: `workers` processes or actors, each with `threads` CPU threads and maybe one GPU."""

    workers: int
    threads: int
    device: str


class Executor(Protocol):
    name: str

    def resources(self) -> Resources:
        """What start() will use; settled before the plan is written."""

    def start(self, spec: JobSpec) -> dict[str, Any]:
        """Start the workers; `Worker.describe()` of the first that is ready. Raises RefusedError."""

    def free(self) -> int:
        """How many more tasks can be submitted now."""

    def submit(self, ticket: int, task: Task) -> None: ...

    def poll(self, timeout: float) -> list[Outcome]:
        """Outcomes since the last call; waits at most `timeout` seconds for the first."""

    def rows_done(self) -> int:
        """Rows processed so far in tasks that are under way or done (for progress only)."""

    def workers_alive(self) -> int: ...

    def waits_for(self) -> list[str]:
        """What takes unusually long at the moment, for people."""

    def close(self) -> None: ...


#: A worker that has said nothing for so many seconds is ended, and its tasks are given to another: it was stopped, or
#: something in it keeps Python's lock. It is named sooner.
SILENT_SECONDS = 40.0
#: A worker that is loading may hold the lock for longer: libraries from a slow disk, a large model.
LOADING_SECONDS = 600.0
#: A step that takes so many seconds without an end is taken for stuck, and its worker is ended.
STUCK_SECONDS = 3600.0
#: From so many seconds on, silence and long steps are told.
TOLD_SECONDS = 10.0
#: Starts of workers that may fail in a row before there are no more.
MAX_FAILED_STARTS = 3
_DOES = {"read": "reading", "decode": "decoding", "encode_images": "embedding", "encode_texts": "embedding captions",
         "decide_and_write": "writing", "decide": "deciding"}  # fmt: skip


class Watch:
    """When a worker was heard last, and what it said; silence while this process stood still itself does not count."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ready = False
        self.heartbeat = Heartbeat(0, [])
        self._silent = 0.0
        self._seen = time.monotonic()

    def hear(self, heartbeat: Heartbeat | None = None) -> None:
        self.heartbeat = heartbeat or self.heartbeat
        self._silent = 0.0

    def look(self) -> None:
        """To be called often: the clock of the silence."""
        now = time.monotonic()
        self._silent += min(now - self._seen, 1.0)
        self._seen = now

    @property
    def problem(self) -> str | None:
        """Why the worker has to be ended."""
        if self._silent >= (SILENT_SECONDS if self.ready else LOADING_SECONDS):
            return f"{self.name} was silent for {self._silent:.0f} s{self._where()} and was ended"
        for step in self.heartbeat.steps:
            if step.seconds >= STUCK_SECONDS:
                return f"{self.name} was {_said(step)} and was ended"
        return None

    @property
    def wait(self) -> str | None:
        """What there is to tell of it."""
        if self.ready and self._silent >= TOLD_SECONDS:
            return f"{self.name} silent for {self._silent:.0f} s{self._where()}; ending it at {SILENT_SECONDS:.0f} s"
        slow = [step for step in self.heartbeat.steps if step.seconds >= TOLD_SECONDS]
        return f"{self.name} {_said(max(slow, key=lambda step: step.seconds))}" if slow else None

    def _where(self) -> str:
        shards = list(dict.fromkeys(step.shard for step in self.heartbeat.steps))
        return f" in {' and '.join(shards)}" if shards else ""


def _said(step: Step) -> str:
    key = f", from {step.key} on," if step.key else ""
    return f"{_DOES.get(step.name, step.name)} {step.shard}{key} for {step.seconds:.0f} s"


#: Tasks a worker holds at once: one is embedded while the one before it is decided and written.
TASKS_PER_WORKER = 2


def error_outcome(ticket: int, error: BaseException) -> Outcome:
    """How an exception inside a task is reported."""
    from clipfilter.errors import RefusedError, ShardError

    message = str(error) or type(error).__name__
    if not isinstance(error, (RefusedError, ShardError)):
        message = f"{type(error).__name__}: {message}"
    kind: Literal["refused", "error"] = "refused" if isinstance(error, RefusedError) else "error"
    return Outcome(ticket, kind, message=message, permanent=isinstance(error, ShardError))
