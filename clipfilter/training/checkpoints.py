"""Checkpoints of a training run: written whole or not at all, found again, and pruned."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipfilter.storage import flush

KEEP = 2  # the newest ones, beside the best


@dataclass
class Position:
    """Where training stands after a checkpoint.

    step: optimiser steps done. epoch: epochs done. best: the best dev measure so far (higher is better), reached at
    best_step. bad_epochs: epochs since. finished: nothing is left to train.
    """

    step: int = 0
    epoch: int = 0
    best: float | None = None
    best_step: int = 0
    bad_epochs: int = 0
    finished: bool = False


class Checkpoints:
    """A folder of checkpoints, `step-00000120/`: weights.safetensors, optimizer.pt and position.json.

    A checkpoint is a folder renamed into place after all of its files have reached the disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def write(self, position: Position, weights: Mapping[str, Tensor], optimizer: Mapping[str, Any]) -> None:
        """Publish a checkpoint, then delete those no longer needed."""
        from safetensors.torch import save_file

        final = self.path(position.step)
        unfinished = self.folder / f".{final.name}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in weights.items()}
        save_file(tensors, unfinished / "weights.safetensors")
        torch.save(dict(optimizer), unfinished / "optimizer.pt")
        (unfinished / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
        for path in unfinished.iterdir():
            flush(path)
        flush(unfinished)
        os.rename(unfinished, final)
        flush(self.folder)
        for step in self.steps()[:-KEEP]:
            if step != position.best_step:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def position(self) -> Position | None:
        """Where the newest complete checkpoint stands; None without one."""
        steps = self.steps()
        if not steps:
            return None
        return Position(**json.loads((self.path(steps[-1]) / "position.json").read_text(encoding="utf-8")))

    def weights(self, step: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        state: dict[str, Tensor] = load_file(self.path(step) / "weights.safetensors")
        return state

    def optimizer(self, step: int) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(self.path(step) / "optimizer.pt", map_location="cpu", weights_only=True)
        return state
