"""Training with several workers through Ray Train: one worker per GPU, or several on CPUs."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clipfilter.engine import cpu_count
from clipfilter.errors import ClipfilterError, RefusedError
from clipfilter.training.group import Group
from clipfilter.training.logs import read_rows
from clipfilter.training.loop import Shown
from clipfilter.training.settings import TrainSettings
from clipfilter.training.worker import open_data, work

#: How often a lost worker (or node) makes the group start again from the newest checkpoint.
_RESTARTS = 3
_POLL_SECONDS = 1.0


def check_ray_train() -> None:
    """Raise RefusedError unless Ray Train has what it needs beyond Ray."""
    # Not by importing it: Ray reads its settings when it is first imported, and RayExecutor has yet to make them.
    if importlib.util.find_spec("pandas") is None:
        raise RefusedError("--engine ray trains with Ray Train, which needs pandas: pip install 'clipfilter[train]'.")


def work_on_ray(settings: TrainSettings, everywhere: bool = False, show: Callable[[Shown], None] | None = None) -> None:
    """Run `worker.work` on `settings.workers` Ray workers.

    everywhere: OUT is a disk that all machines of the cluster have under this path.

    Raises RefusedError when the cluster does not answer or lacks the GPUs, ClipfilterError when training fails.
    """
    check_ray_train()
    from clipfilter.engine import RayExecutor

    executor = RayExecutor(settings.address, settings.workers, settings.threads, settings.device)
    try:
        if not everywhere:
            executor.refuse_unshared(settings.out, "--out")
        _fit(settings, executor.hosts, show)
    finally:
        executor.close()


def _fit(settings: TrainSettings, hosts: set[str], show: Callable[[Shown], None] | None) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = settings.device.startswith("cuda")
    out = Path(settings.out).absolute()
    threads = settings.threads or max(1, min(8, cpu_count() * len(hosts) // settings.workers))
    told = replace(settings, out=str(out), threads=threads)
    storage = out / ".ray"
    trainer = TorchTrainer(
        _worker,
        train_loop_config=told.to_json(),
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=gpu,
            resources_per_worker={"GPU": 1, "CPU": 1} if gpu else {"CPU": 1},
        ),
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=RunConfig(
            name="train", storage_path=str(storage), failure_config=FailureConfig(max_failures=_RESTARTS)
        ),
    )
    done = threading.Event()
    steps = settings.epochs * (len(open_data(settings).train) // settings.step_pairs)
    watcher = threading.Thread(target=_watch, args=(out / "log.csv", steps, done, show), daemon=True)
    watcher.start()
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps whatever a worker raised, in types that change between its versions
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ClipfilterError(
            f"training failed on Ray: {lines[-1].strip() if lines else type(error).__name__}"
        ) from error
    finally:
        done.set()
        watcher.join()
        shutil.rmtree(storage, ignore_errors=True)


def _worker(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch

    settings = TrainSettings.from_json(config)
    if settings.device.startswith("cuda"):  # the workers of a node see all of its GPUs
        settings = replace(settings, device=str(ray.train.torch.get_device()))
    context = ray.train.get_context()
    work(settings, Group(context.get_world_rank(), context.get_world_size()))


def _watch(log: Path, steps: int, done: threading.Event, show: Callable[[Shown], None] | None) -> None:
    """Show what the first worker logs."""
    while show is not None and not done.wait(_POLL_SECONDS):
        rows = read_rows(log)
        if rows:
            last = rows[-1]
            show(Shown(int(last["step"]), steps, int(last["epoch"]), float(last["loss"]), None))
