"""What this machine has, without importing torch."""

from __future__ import annotations

import os
from pathlib import Path

from clipfilter.errors import RefusedError

#: More threads than this per worker gain little on any tower; larger machines get more workers instead.
MAX_THREADS = 8


def cpu_count() -> int:
    """Cores this process may use (affinity, and the cgroup's quota where there is one)."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return cores


def gpu_count() -> int:
    """NVIDIA GPUs this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([item for item in visible.split(",") if item.strip() not in ("", "-1")])
    try:
        return len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        return len(list(Path("/dev").glob("nvidia[0-9]*")))


def local_device(device: str) -> str:
    """ "cuda" or "cpu": what `--device` means on this machine. Raises RefusedError where a GPU was asked for in vain."""
    if device == "cpu":
        return "cpu"
    if gpu_count():
        return "cuda"
    if device.startswith("cuda"):
        raise RefusedError("no GPU is visible on this machine; use --device cpu, or --address for a Ray cluster.")
    return "cpu"
