"""A tiny open_clip architecture, its weights, and small pair sets for the training tests."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.support.engine import samples
from tests.support.sources import write_webdataset

TINY = "clipfilter-tiny"
TINY_SIGMOID = "clipfilter-tiny-sigmoid"
_CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 3},
}
#: The command line in a process that knows the tiny architectures.
MAIN = "from tests.support.training import register; register(); from clipfilter.cli.main import main; main()"


def register() -> None:
    """Make open_clip know the tiny architectures in this process."""
    from clipfilter.models._torch import torch_with_torchvision

    torch_with_torchvision()
    import open_clip

    folder = Path(tempfile.mkdtemp(prefix="clipfilter-tiny-"))
    configs = {TINY: _CONFIG, TINY_SIGMOID: {**_CONFIG, "init_logit_scale": 2.3, "init_logit_bias": -10}}
    for name, config in configs.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(config))
        open_clip.add_model_config(path)
        path.unlink()
    folder.rmdir()


def tiny_weights(path: Path, architecture: str = TINY, seed: int = 0) -> str:
    """Write random weights; returns the model's name."""
    from clipfilter.training.model import write_random

    register()
    write_random(architecture, path, seed)
    return f"{architecture}={path}"


def write_pairs(path: Path, count: int, start: int = 0) -> Path:
    """A tar of `count` real photographs with two captions each; `number` tells them apart."""
    made = samples(count, start)
    for number, sample in enumerate(made):
        text = sample.pop("txt")
        sample["json"] |= {
            "captions": [text, f"picture number {number}: {text}"],
            "part": "dev" if number % 4 == 3 else "train",
        }
    return write_webdataset(path, made)


def arguments(model: str, source: Path, out: Path, *more: str) -> list[str]:
    """A quick training's command line."""
    return [
        "train", str(source), "--model", model, "--out", str(out), "--epochs", "2", "--batch-size", "8", "--threads", "1",
        "--device", "cpu", *more,
    ]  # fmt: skip


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", MAIN, *arguments]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}
