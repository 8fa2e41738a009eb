"""What the driver asks of an executor: start workers, take tasks, tell what became of them. It only schedules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from clipfilter.engine.worker import Done, JobSpec, Task


@dataclass(frozen=True)
class Outcome:
    """What became of one submitted task.

    kind: "done" (`result`), "error" (it raised: `message`, and `permanent` when trying again cannot
    help), "died" (its worker was killed), "refused" (the whole job cannot go on).
    """

    ticket: int
    kind: Literal["done", "error", "died", "refused"]
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

    def close(self) -> None: ...


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
