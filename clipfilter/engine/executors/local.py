"""The local executor: supervised worker processes on this machine, nothing to install or start."""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from clipfilter.engine.executors.interface import TASKS_PER_WORKER, Outcome, Resources
from clipfilter.engine.hardware import MAX_THREADS, cpu_count, local_device
from clipfilter.engine.worker import Done, JobSpec, Task
from clipfilter.errors import ClipfilterError, RefusedError

log = logging.getLogger("clipfilter.engine")


class LocalExecutor:
    """Runs each worker in a process of its own, so that what kills a worker never kills the job."""

    name = "local"

    def __init__(self, workers: int | None = None, threads: int | None = None, device: str = "auto") -> None:
        self._device = local_device(device)
        self._threads = threads or min(MAX_THREADS, cpu_count())
        self._count = workers or (1 if self._device == "cuda" else max(1, cpu_count() // self._threads))
        self._workers: list[_WorkerProcess] = []
        self._events: queue.Queue[tuple[_WorkerProcess, dict[str, Any] | None]] = queue.Queue()
        self._spec: JobSpec | None = None
        self._rows_of_dead = 0

    def resources(self) -> Resources:
        return Resources(self._count, self._threads, self._device)

    def start(self, spec: JobSpec) -> dict[str, Any]:
        self._spec = spec
        self._workers = [_WorkerProcess(spec, self._events) for _ in range(self._count)]
        while True:
            worker, message = self._events.get()
            description = self._settle(worker, message)
            if description is not None:
                return description

    def free(self) -> int:
        return sum(TASKS_PER_WORKER - len(w.tickets) for w in self._workers if w.ready)

    def submit(self, ticket: int, task: Task) -> None:
        worker = min((w for w in self._workers if w.ready), key=lambda w: len(w.tickets))
        worker.submit(ticket, task)

    def poll(self, timeout: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        try:
            worker, message = self._events.get(timeout=timeout)
            outcomes += self._handle(worker, message)
            while True:
                outcomes += self._handle(*self._events.get_nowait())
        except queue.Empty:
            return outcomes

    def rows_done(self) -> int:
        return self._rows_of_dead + sum(w.rows for w in self._workers)

    def workers_alive(self) -> int:
        return sum(w.ready for w in self._workers)

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()

    def _settle(self, worker: _WorkerProcess, message: dict[str, Any] | None) -> dict[str, Any] | None:
        """Handle what a starting worker says; its description once it is ready."""
        if message is None:
            raise ClipfilterError(f"a worker process died while it started (exit code {worker.wait()}); see run.log.")
        if "refused" in message:
            raise RefusedError(message["refused"])
        if "broken" in message:
            log.error("worker failed to start:\n%s", message["broken"])
            last = message["broken"].strip().splitlines()[-1]
            raise ClipfilterError(f"a worker process could not start: {last}")
        worker.ready = True
        return message.get("ready")

    def _handle(self, worker: _WorkerProcess, message: dict[str, Any] | None) -> Iterable[Outcome]:
        if not worker.ready:
            self._settle(worker, message)
            return
        if message is None:
            code = worker.wait()
            log.warning("worker %d died (exit code %s) with %d tasks", worker.pid, code, len(worker.tickets))
            self._rows_of_dead += worker.rows
            assert self._spec is not None
            self._workers[self._workers.index(worker)] = _WorkerProcess(self._spec, self._events)
            reason = (
                f"its worker was killed by signal {-code}" if code < 0 else f"its worker ended with exit code {code}"
            )
            for ticket in worker.tickets:
                yield Outcome(ticket, "died", message=reason)
        elif "rows" in message:
            worker.rows = message["rows"]
        else:
            ticket = message["ticket"]
            worker.tickets.discard(ticket)
            if "done" in message:
                yield Outcome(ticket, "done", result=Done.from_json(message["done"]))
            elif "refused" in message:
                yield Outcome(ticket, "refused", message=message["refused"])
            else:
                yield Outcome(ticket, "error", message=message["error"], permanent=message["permanent"])


class _WorkerProcess:
    """One child process and the tasks it holds."""

    def __init__(self, spec: JobSpec, events: queue.Queue[tuple[_WorkerProcess, dict[str, Any] | None]]) -> None:
        self.tickets: set[int] = set()
        self.ready = False
        self.rows = 0
        read_end, write_end = os.pipe()
        package_root = str(Path(__file__).parents[3])
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([package_root, *filter(None, [os.environ.get("PYTHONPATH")])])
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "clipfilter.engine.executors.worker_process", str(write_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=[write_end],
            env=environment,
            text=True,
        )
        os.close(write_end)
        self.pid = self._process.pid
        threading.Thread(target=self._listen, args=(read_end, events), daemon=True).start()
        threading.Thread(target=self._log_stderr, args=(self._process.stderr,), daemon=True).start()
        self._send(spec.to_json())

    def submit(self, ticket: int, task: Task) -> None:
        self.tickets.add(ticket)
        self._send({"ticket": ticket, "task": task.to_json()})

    def wait(self) -> int:
        return self._process.wait()

    def stop(self) -> None:
        """Close stdin, which ends the child; kill it when it does not go."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            time.sleep(0)  # it died; the listener reports that, with this task among its tickets

    def _listen(self, read_end: int, events: queue.Queue[tuple[_WorkerProcess, dict[str, Any] | None]]) -> None:
        with os.fdopen(read_end) as answers:
            for line in answers:
                if line.endswith("\n"):
                    events.put((self, json.loads(line)))
        events.put((self, None))

    def _log_stderr(self, stream: IO[str]) -> None:
        for line in stream:
            log.info("worker %d: %s", self.pid, line.rstrip())
