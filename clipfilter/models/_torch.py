"""Import torch so that torchvision works beside it, and fix its threads and number formats."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from clipfilter.errors import RefusedError

if TYPE_CHECKING:
    import torch

DTYPES = ("fp32", "bf16", "fp16")


@cache
def torch_with_torchvision() -> None:
    """Make `import torchvision` work beside a CPU-only torch; call it before open_clip or timm is imported.

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
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        fragment.define(schema)  # type: ignore[no-untyped-call]
    _declared.append(fragment)  # the operators live as long as this object


_declared: list[object] = []


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
