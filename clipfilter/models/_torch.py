"""Import torch so that torchvision works beside it, and fix its threads and number formats."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from clipfilter.errors import RefusedError

if TYPE_CHECKING:
    import torch

DTYPES = ("fp32", "bf16", "fp16")


@cache
def torch_with_torchvision() -> None:
    """Make torchvision and timm work beside this torch; call it before open_clip or timm is imported."""
    _declare_operators()
    _import_timm()


def _declare_operators() -> None:
    """Make `import torchvision` work beside a CPU-only torch.

    The published torchvision is built against the CUDA torch: with a CPU-only torch its operator library cannot
    be loaded, and its import fails on the missing operators `nms` and `qnms`. Declaring them is enough for
    transforms and models, which never call them. Where the library does load, nothing is declared.
    """
    import torch

    if torch.version.cuda is not None:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for library in sorted(Path(spec.origin).parent.glob("_C*.so")):
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        except OSError:
            continue
        return
    fragment = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        fragment.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    _declared.append(fragment)  # the operators live as long as this object


_declared: list[object] = []


def _import_timm() -> None:
    """Import timm without wandb: where that is installed, timm imports it (most of a second) for logs nobody writes."""
    held = sys.modules.get("wandb")
    if held is None:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # Python's way to say that an import fails
    try:
        import timm  # noqa: F401
    finally:
        if held is None:
            del sys.modules["wandb"]


def set_up_torch(device: str, dtype: str, threads: int | None) -> tuple[torch.device, torch.dtype]:
    """torch ready for a model: torchvision beside it, so many threads, and what the names of device and dtype mean.

    Raises RefusedError for names that are unknown, and for a device that is not there.
    """
    torch_with_torchvision()
    found = resolve_device(device), resolve_dtype(dtype)
    use_threads(threads)
    return found


def resolve_device(device: str) -> torch.device:
    """`device` ("cpu", "cuda", "cuda:1") as a torch device; RefusedError when it is not there."""
    import torch

    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise RefusedError(f"unknown device {device!r}: use cpu, cuda or cuda:0") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise RefusedError(f"device {device!r} was asked for but torch sees no GPU here: use --device cpu")
    return resolved


def resolve_dtype(dtype: str) -> torch.dtype:
    """ "fp32", "bf16" or "fp16" as a torch dtype; RefusedError for anything else."""
    import torch

    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in kinds:
        raise RefusedError(f"unknown dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    return kinds[dtype]


def use_threads(threads: int | None) -> None:
    """Give this process's torch operators exactly `threads` CPU threads (None leaves torch's own choice)."""
    import torch

    if threads is not None:
        if threads < 1:
            raise RefusedError(f"threads must be at least 1, not {threads}")
        torch.set_num_threads(threads)
