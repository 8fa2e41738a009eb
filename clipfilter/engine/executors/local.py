"""The local executor: supervised worker processes on this machine, nothing to install or start."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from clipfilter.engine.executors.interface import MAX_FAILED_STARTS, TASKS_PER_WORKER, Outcome, Resources, Watch
from clipfilter.engine.hardware import MAX_THREADS, cpu_count, local_device
from clipfilter.engine.worker import Done, Heartbeat, JobSpec, Task
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
        self._failed_starts = 0
        self._started = 0

    def resources(self) -> Resources:
        return Resources(self._count, self._threads, self._device)

    def start(self, spec: JobSpec) -> dict[str, Any]:
        self._spec = spec
        for _ in range(self._count):
            self._start_worker()
        while True:
            self._end_stuck()
            try:
                description = self._settle(*self._events.get(timeout=1.0))
            except queue.Empty:
                continue
            if description is not None:
                return description

    def free(self) -> int:
        return sum(TASKS_PER_WORKER - len(w.tickets) for w in self._workers if w.watch.ready)

    def submit(self, ticket: int, task: Task) -> None:
        worker = min((w for w in self._workers if w.watch.ready), key=lambda w: len(w.tickets))
        worker.submit(ticket, task)

    def poll(self, timeout: float) -> list[Outcome]:
        self._end_stuck()
        outcomes: list[Outcome] = []
        try:
            worker, message = self._events.get(timeout=timeout)
            outcomes += self._handle(worker, message)
            while True:
                outcomes += self._handle(*self._events.get_nowait())
        except queue.Empty:
            return outcomes

    def rows_done(self) -> int:
        return self._rows_of_dead + sum(w.watch.heartbeat.rows for w in self._workers)

    def workers_alive(self) -> int:
        return sum(w.watch.ready for w in self._workers)

    def waits_for(self) -> list[str]:
        return [wait for worker in self._workers if (wait := worker.watch.wait)]

    def close(self) -> None:
        for worker in self._workers:
            worker.ask_to_stop()
        for worker in self._workers:
            worker.stop()

    def _start_worker(self) -> None:
        assert self._spec is not None
        self._started += 1
        self._workers.append(_WorkerProcess(self._spec, self._events, f"worker {self._started}"))

    def _end_stuck(self) -> None:
        """End workers that say nothing, or the same for too long; what they held is told as for all that die."""
        for worker in self._workers:
            worker.watch.look()
            problem = worker.watch.problem
            if problem and not worker.problem:
                log.warning("%s (process %d)", problem, worker.pid)
                worker.problem = problem
                worker.kill()

    def _settle(self, worker: _WorkerProcess, message: dict[str, Any] | None) -> dict[str, Any] | None:
        """Handle what a starting worker says; its description once it is ready."""
        if message is not None and "heartbeat" in message:
            worker.watch.hear()
            return None
        if message is not None and "ready" in message:
            worker.watch.ready = True
            worker.watch.hear()
            self._failed_starts = 0
            return dict(message["ready"])
        alone = not any(other.watch.ready for other in self._workers)
        self._workers.remove(worker)
        worker.kill()
        if message is None:
            problem = f"a worker process died while it started (exit code {worker.wait()}); see run.log."
        elif "refused" in message:
            problem = message["refused"]
        else:
            log.error("worker failed to start:\n%s", message["broken"])
            problem = f"a worker process could not start: {message['broken'].strip().splitlines()[-1]}"
        self._failed_starts += 1
        if alone and message is not None:
            raise RefusedError(problem) if "refused" in message else ClipfilterError(problem)
        if self._failed_starts < MAX_FAILED_STARTS:
            log.warning("%s Another is started.", problem)
            self._start_worker()
        elif alone and not self._workers:
            raise ClipfilterError(problem)
        else:
            log.error("%s The others go on without it.", problem)
        return None

    def _handle(self, worker: _WorkerProcess, message: dict[str, Any] | None) -> Iterable[Outcome]:
        if worker not in self._workers:
            return  # it failed to start, and was ended
        if not worker.watch.ready:
            self._settle(worker, message)
        elif message is None:
            code = worker.wait()
            log.warning("%s died (exit code %s) with %d tasks", worker.watch.name, code, len(worker.tickets))
            self._rows_of_dead += worker.watch.heartbeat.rows
            self._workers.remove(worker)
            self._start_worker()
            ended = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            for ticket in worker.tickets:
                yield Outcome(ticket, "died", message=worker.problem or f"its worker {ended}")
        elif "heartbeat" in message:
            worker.watch.hear(Heartbeat.from_json(message["heartbeat"]))
        else:
            worker.watch.hear()
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

    def __init__(
        self, spec: JobSpec, events: queue.Queue[tuple[_WorkerProcess, dict[str, Any] | None]], name: str
    ) -> None:
        self.tickets: set[int] = set()
        self.watch = Watch(name)
        self.problem: str | None = None
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
        # Not written by the driver itself, which would wait with a worker that has stopped reading.
        self._outbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, daemon=True).start()
        threading.Thread(target=self._listen, args=(read_end, events), daemon=True).start()
        threading.Thread(target=self._log_stderr, args=(self._process.stderr,), daemon=True).start()
        self._outbox.put(spec.to_json())

    def submit(self, ticket: int, task: Task) -> None:
        self.tickets.add(ticket)
        self._outbox.put({"ticket": ticket, "task": task.to_json()})

    def wait(self) -> int:
        return self._process.wait()

    def ask_to_stop(self) -> None:
        """Close stdin, which ends the child."""
        self._outbox.put(None)

    def stop(self) -> None:
        """Wait for its end; kill it when it does not go."""
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()

    def kill(self) -> None:
        self._process.kill()

    def _write(self) -> None:
        assert self._process.stdin is not None
        # When it dies, the listener reports that, with what was not written among its tickets.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as stdin:
            while (message := self._outbox.get()) is not None:
                stdin.write(json.dumps(message) + "\n")
                stdin.flush()

    def _listen(self, read_end: int, events: queue.Queue[tuple[_WorkerProcess, dict[str, Any] | None]]) -> None:
        with os.fdopen(read_end) as answers:
            for line in answers:
                if line.endswith("\n"):
                    events.put((self, json.loads(line)))
        events.put((self, None))

    def _log_stderr(self, stream: IO[str]) -> None:
        for line in stream:
            log.info("worker %d: %s", self.pid, line.rstrip())
