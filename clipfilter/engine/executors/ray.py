"""The Ray executor: long-lived encoder actors, one per GPU (or per group of CPU cores), on any number of nodes."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

from clipfilter.engine.executors.interface import TASKS_PER_WORKER, Outcome, Resources, Watch, error_outcome
from clipfilter.engine.hardware import MAX_THREADS, cpu_count
from clipfilter.engine.worker import Done, Heartbeat, JobSpec, Task
from clipfilter.errors import ClipfilterError, RefusedError

log = logging.getLogger("clipfilter.engine")

#: With no actor ready for this long, the cluster is taken for lost.
LOST_CLUSTER_SECONDS = 600.0
_PROGRESS_SECONDS = 1.0
_KNOCK_SECONDS = 10.0


@cache
def _token() -> str:
    """The secret of the clusters this process starts: one for all, since Ray reads it only once in a process."""
    return secrets.token_hex(32)


def _ask_for_tokens() -> None:
    """Have the clusters that this process starts obey only those who know their token, where nobody chose otherwise.

    Ray reads its mode while it is imported. Set later, its servers would want a token that its client does not send.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    if "ray" in sys.modules:
        log.warning(
            "Ray was imported before clipfilter could ask for tokens, so any process on this machine can use its cluster; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN before the first import of ray."
        )
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_AUTH_TOKEN", _token())


class EncoderActor:
    """Runs in a Ray actor process: holds one `Worker`. Restarted by Ray when it dies; then `load` is called again."""

    def __init__(self) -> None:
        self._worker: Any = None

    def load(self, spec: dict[str, Any]) -> dict[str, Any]:
        import ray

        from clipfilter.engine.worker import Worker

        try:
            self._worker = Worker(JobSpec(**spec))
        except RefusedError as error:
            return {"refused": str(error)}
        place = {"node": ray.get_runtime_context().get_node_id(), "host": socket.gethostname(), "pid": os.getpid()}
        return {"ready": self._worker.describe(), **place}

    def process(self, ticket: int, task: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"done": self._worker.process(Task.from_json(task)).to_json()}
        except Exception as error:
            log.exception("task %d failed", ticket)
            outcome = error_outcome(ticket, error)
            return {outcome.kind: outcome.message, "permanent": outcome.permanent}

    def heartbeat(self) -> dict[str, Any] | None:
        return self._worker.heartbeat().to_json() if self._worker else None

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()


class RayExecutor:
    """Schedules tasks on encoder actors.

    Without an address a cluster is started on this machine and stopped with the job. A node or an actor may be lost
    at any time: its tasks are reported as died, and Ray brings the actor back where there is room.
    """

    name = "ray"

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        threads: int | None = None,
        device: str = "auto",
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray renames every worker's visible devices when an actor has no GPU; CPU jobs on GPU machines stay untouched.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray's workers are nice by default; on a machine that does anything else the encoder would starve.
        os.environ.setdefault("RAY_worker_niceness", "0")
        if address is None:
            _ask_for_tokens()
        import ray

        self._ray = ray
        with _own_signals():
            _connect(ray, address)
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self.hosts = {node["NodeManagerHostname"] for node in nodes}
        total = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(total.get("GPU", 0))
        if device.startswith("cuda") and not gpus:
            self.close()
            raise RefusedError("the Ray cluster has no GPU; use --device cpu, or start its nodes with --num-gpus.")
        per_node = [int(node["Resources"].get("CPU", 0)) for node in nodes]
        self._gpus_per_worker = 1.0 if gpus else 0.0
        if gpus:
            count = gpus
            share = min(MAX_THREADS, max(1, sum(per_node) // count))
        else:
            share = max(1, min([MAX_THREADS, *(cpus for cpus in per_node if cpus)]))
            count = sum(cpus // (threads or share) for cpus in per_node)
        self._resources = Resources(workers or max(1, count), threads or share, "cuda" if gpus else "cpu")
        self._actors: list[_Actor] = []
        self._spec: dict[str, Any] = {}

    def resources(self) -> Resources:
        return self._resources

    def refuse_unshared(self, url: str, what: str) -> None:
        """A plain path cannot be seen from the other hosts of a cluster: refuse before work begins.

        Whoever writes file:// says that it is mounted everywhere.
        """
        if "://" not in url and len(self.hosts) > 1:
            self.close()
            raise RefusedError(
                f"{what} {url} is a path of one machine, but the Ray cluster has {len(self.hosts)}; put it on storage all "
                "of them reach (s3://, gs://, ...), or pass file:///shared/path for a mounted network disk."
            )

    def start(self, spec: JobSpec) -> dict[str, Any]:
        self._spec = spec.to_json()
        self._remote = self._ray.remote(EncoderActor).options(
            num_cpus=self._resources.threads,
            num_gpus=self._gpus_per_worker,
            max_restarts=-1,
            max_task_retries=0,
            # Two tasks, a load or progress call beside them.
            max_concurrency=TASKS_PER_WORKER + 1,
            # Actors inherit no OpenMP thread count: Ray sets it from num_cpus, which is what the encoder asks for too.
        )
        self._actors = [_Actor(f"worker {number}") for number in range(1, self._resources.workers + 1)]
        for actor in self._actors:
            self._create(actor)
        began = time.monotonic()
        while True:
            for actor in self._actors:
                description = self._finish_loading(actor)
                if description is not None:
                    return description
            if time.monotonic() - began > LOST_CLUSTER_SECONDS:
                raise ClipfilterError(
                    "no encoder actor came up in ten minutes; the cluster lacks the CPUs or GPUs asked for."
                )
            self._ray.wait([a.loading for a in self._actors if a.loading], timeout=0.5)

    def free(self) -> int:
        return sum(TASKS_PER_WORKER - len(a.tasks) for a in self._actors if a.watch.ready)

    def submit(self, ticket: int, task: Task) -> None:
        actor = min((a for a in self._actors if a.watch.ready), key=lambda a: len(a.tasks))
        actor.tasks[actor.handle.process.remote(ticket, task.to_json())] = ticket

    def poll(self, timeout: float) -> list[Outcome]:
        outcomes: list[Outcome] = []
        waiting = [ref for actor in self._actors for ref in actor.tasks]
        waiting += [actor.loading for actor in self._actors if actor.loading is not None]
        if waiting:
            done, _ = self._ray.wait(waiting, num_returns=1, timeout=timeout)
            if done:
                done, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        else:
            done = []
            time.sleep(timeout)
        finished = set(done)
        for actor in self._actors:
            if actor.loading in finished:
                self._finish_loading(actor)
            for ref in [ref for ref in actor.tasks if ref in finished]:
                if ref in actor.tasks:
                    outcomes += self._finish_task(actor, ref)
            self._listen(actor)
            outcomes += self._end_if_stuck(actor)
        self._check_lost()
        return outcomes

    def rows_done(self) -> int:
        return sum(actor.rows_before + actor.watch.heartbeat.rows for actor in self._actors)

    def workers_alive(self) -> int:
        return sum(actor.watch.ready for actor in self._actors)

    def waits_for(self) -> list[str]:
        return [wait for actor in self._actors if (wait := actor.watch.wait)]

    def close(self) -> None:
        """Stop what this driver started. A cluster at an address goes on; only our actors leave it."""
        actors = getattr(self, "_actors", [])
        try:
            closing = [actor.handle.close.remote() for actor in actors if actor.watch.ready]
            if closing:
                self._ray.wait(closing, num_returns=len(closing), timeout=5)
            for actor in actors:
                self._kill(actor)
        except Exception as error:
            log.debug("closing actors: %s", error)
        self._ray.shutdown()

    def _finish_loading(self, actor: _Actor) -> dict[str, Any] | None:
        if actor.loading is None or not self._ray.wait([actor.loading], timeout=0)[0]:
            return None
        reference, actor.loading = actor.loading, None
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayActorError:
            self._reload(actor)
            return None
        except self._ray.exceptions.RayTaskError as error:
            raise ClipfilterError(f"an encoder actor could not start: {_first_line(error.cause)}") from error
        if "refused" in answer:
            raise RefusedError(answer["refused"])
        actor.rows_before += actor.watch.heartbeat.rows
        actor.watch = Watch(actor.watch.name)
        actor.watch.ready = True
        actor.place = {name: answer[name] for name in ("node", "host", "pid")}
        return dict(answer["ready"])

    def _finish_task(self, actor: _Actor, reference: Any) -> list[Outcome]:
        ticket = actor.tasks.pop(reference)
        try:
            answer = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as error:
            lost = [ticket, *actor.tasks.values()]
            actor.tasks.clear()
            log.warning("an encoder actor died with %d tasks: %s", len(lost), _first_line(error))
            kind: Literal["died", "lost"] = "died" if self._node_lives(actor) else "lost"
            self._reload(actor)
            return [Outcome(item, kind, message="its actor or node was lost") for item in lost]
        except self._ray.exceptions.RayError as error:
            return [Outcome(ticket, "error", message=_first_line(error))]
        if "done" in answer:
            return [Outcome(ticket, "done", result=Done.from_json(answer["done"]))]
        if "refused" in answer:
            return [Outcome(ticket, "refused", message=answer["refused"])]
        return [Outcome(ticket, "error", message=answer["error"], permanent=answer["permanent"])]

    def _node_lives(self, actor: _Actor) -> bool:
        return any(node["Alive"] and node["NodeID"] == actor.place["node"] for node in self._ray.nodes())

    def _create(self, actor: _Actor) -> None:
        actor.handle = self._remote.remote()
        self._reload(actor)

    def _reload(self, actor: _Actor) -> None:
        actor.watch.ready = False
        actor.heartbeat = None
        actor.loading = actor.handle.load.remote(self._spec)

    def _listen(self, actor: _Actor) -> None:
        """Ask an actor for its heartbeat once a second."""
        if not actor.watch.ready:
            return
        if actor.heartbeat is not None and self._ray.wait([actor.heartbeat], timeout=0)[0]:
            try:
                said = self._ray.get(actor.heartbeat)
                actor.watch.hear(said and Heartbeat.from_json(said))
            except self._ray.exceptions.RayError:
                log.debug("no heartbeat from an actor")
            actor.heartbeat = None
        if actor.heartbeat is None and time.monotonic() - actor.asked > _PROGRESS_SECONDS:
            actor.heartbeat, actor.asked = actor.handle.heartbeat.remote(), time.monotonic()

    def _end_if_stuck(self, actor: _Actor) -> list[Outcome]:
        """End an actor that says nothing, or the same for too long, and begin another in its place."""
        actor.watch.look()
        problem = actor.watch.problem if actor.watch.ready else None
        if problem is None:
            return []
        log.warning("%s (process %s of %s)", problem, actor.place["pid"], actor.place["host"])
        lost = list(actor.tasks.values())
        actor.tasks.clear()
        self._kill(actor)
        self._create(actor)
        return [Outcome(ticket, "died", message=problem) for ticket in lost]

    def _kill(self, actor: _Actor) -> None:
        """Through Ray, and on this machine by its process too: a process that is stopped obeys nobody else."""
        self._ray.kill(actor.handle)
        if actor.place.get("host") == socket.gethostname():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(actor.place["pid"], signal.SIGKILL)

    def _check_lost(self) -> None:
        if any(actor.watch.ready for actor in self._actors):
            self._ready_at = time.monotonic()
        elif time.monotonic() - getattr(self, "_ready_at", time.monotonic()) > LOST_CLUSTER_SECONDS:
            raise ClipfilterError(
                "no encoder actor has been alive for ten minutes; run the same command again to resume."
            )


class _Actor:
    """An actor handle and what is under way on it."""

    def __init__(self, name: str) -> None:
        self.handle: Any = None
        self.watch = Watch(name)
        self.place: dict[str, Any] = {"node": None}
        self.loading: Any = None
        self.tasks: dict[Any, int] = {}
        self.rows_before = 0
        self.heartbeat: Any = None
        self.asked = 0.0


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handlers, which know how to stop a job: Ray puts one of its own for SIGTERM in their place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _connect(ray: Any, address: str | None) -> None:
    """Join the cluster at `address`, or start one of this machine; RefusedError where none answers."""
    try:
        if address is not None:
            _knock(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                address="local",
                num_cpus=cpu_count(),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=100 << 20,
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise RefusedError(
            f"no Ray cluster answers at {address or 'this machine'} ({_first_line(error)}); check --address, "
            "RAY_AUTH_MODE and RAY_AUTH_TOKEN, or leave --address out to start one here."
        ) from error


def _knock(address: str) -> None:
    """Raise OSError at once when nobody listens at host:port; Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _first_line(error: object) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
