"""The inline executor: one worker inside this process, for notebooks and tests; nothing is started or waited for."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any

from clipfilter.engine.executors.interface import Outcome, Resources, error_outcome
from clipfilter.engine.hardware import MAX_THREADS, cpu_count, local_device
from clipfilter.engine.worker import JobSpec, Task, Worker

log = logging.getLogger("clipfilter.engine")


class InlineExecutor:
    """Runs a `Worker` in this process, one shard after another: `run_job(request, executor=InlineExecutor())`.

    The files are those of one worker process with as many threads. What kills a worker, such as an image that crashes a
    decoder, kills this process with it; run the job again and it resumes. The numbers of threads of torch and Arrow are
    set for the whole process and stay as the job has set them.

    threads: CPU threads; None is as many as a worker process would get. device: "auto", "cpu" or "cuda". Raises RefusedError
    where there is no GPU and one was asked for.
    """

    name = "inline"

    def __init__(self, threads: int | None = None, device: str = "auto") -> None:
        self._device = local_device(device)
        self._threads = threads or min(MAX_THREADS, cpu_count())
        self._worker: Worker | None = None
        self._waiting: deque[tuple[int, Task]] = deque()

    def resources(self) -> Resources:
        return Resources(1, self._threads, self._device)

    def start(self, spec: JobSpec) -> dict[str, Any]:
        self._worker = Worker(spec)
        return self._worker.describe()

    def free(self) -> int:
        return 1 - len(self._waiting)

    def submit(self, ticket: int, task: Task) -> None:
        self._waiting.append((ticket, task))

    def poll(self, timeout: float) -> list[Outcome]:
        """Do the task that waits; `timeout` has no meaning here."""
        if self._worker is None or not self._waiting:
            return []
        ticket, task = self._waiting.popleft()
        try:
            return [Outcome(ticket, "done", result=self._worker.process(task))]
        except Exception as error:
            log.exception("task %d failed", ticket)
            return [error_outcome(ticket, error)]

    def rows_done(self) -> int:
        return 0 if self._worker is None else self._worker.rows_done

    def workers_alive(self) -> int:
        return 0 if self._worker is None else 1

    def waits_for(self) -> list[str]:
        return []

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
            self._worker = None
