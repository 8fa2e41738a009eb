"""What the frozen first blocks of the image tower give is the same in every epoch: computed once, kept on disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clipfilter.images import PreprocessConfig
from clipfilter.storage import replacing
from clipfilter.training.batches import pixel_batches, prepare_row
from clipfilter.training.freezing import frozen_blocks
from clipfilter.training.model import Trainable
from clipfilter.training.pairs import Pairs

#: A set whose activations would need more room is computed anew each time.
MAX_BYTES = 4 << 30
_REPLAY_BATCH = 64


class Prefix:
    """The frozen first blocks of the image tower.

    Call it after `freeze`. `blocks` is how many leading blocks, with everything before them, are frozen; 0: none to skip.
    """

    def __init__(self, model: Trainable) -> None:
        self._model = model
        modules = dict(model.module.named_modules())
        self._modules: list[nn.Module] = [modules[name] for name in frozen_blocks(model.module, "image")]
        self.blocks = len(self._modules)
        self.batch = model.encoder.image_chunk or _REPLAY_BATCH  # images per forward pass when recording

    @torch.inference_mode()
    def record(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [n, 3, S, S] -> float32, what the last frozen block gives; in some towers the batch is its second axis."""
        kept: list[Tensor] = []
        with self._modules[-1].register_forward_hook(lambda module, given, output: kept.append(output)):
            self._model.encoder.image_tower(self._model.encoder.normalise(pixels))
        return kept[0].float().cpu().numpy()

    def features(self, recorded: np.ndarray) -> Tensor:
        """What `record` gave for n images -> image features [n, dim], as the whole tower would give them."""
        model = self._model
        value = torch.from_numpy(recorded).to(model.device)
        if value.ndim == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        size = model.preprocess.size
        with self._replaced(value):  # one black image pays for what lies before the blocks
            found: Tensor = model.encoder.image_tower(model.encoder.normalise(np.zeros((1, 3, size, size), np.uint8)))
        return found

    @contextmanager
    def _replaced(self, value: Tensor) -> Iterator[None]:
        def same(x: Any, *more: Any, **named: Any) -> Any:
            return x

        def recorded(*given: Any, **named: Any) -> Tensor:
            return value

        stand_ins: list[Callable[..., Any]] = [same] * (len(self._modules) - 1) + [recorded]
        for module, stand_in in zip(self._modules, stand_ins, strict=True):
            module.forward = stand_in
        try:
            yield
        finally:
            for module in self._modules:
                del module.forward


class PrefixStore:
    """Recorded activations of whole pair files, beside them: float32 [rows, ...] in `NAME.prefix.npy`."""

    def __init__(self, prefix: Prefix, threads: int) -> None:
        self.prefix = prefix
        self._threads = threads

    def collect(self, pairs: Pairs, preprocess: PreprocessConfig) -> None:
        """Record all rows of the file of `pairs`, unless that was done, would need too much room, or helps nothing."""
        path = _path(pairs)
        whole = Pairs(pairs.path)
        if not self.prefix.blocks or path.exists():
            return
        one = self.prefix.record(prepare_row(whole.image(0), preprocess, None)[None])
        shape = (len(whole), *one.shape[1:])
        if len(one) != 1 or 4 * math.prod(shape) > MAX_BYTES:
            return
        with replacing(path) as unfinished:
            stored = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
            start = 0
            for pixels in pixel_batches(whole, preprocess, self.prefix.batch, self._threads):
                recorded = self.prefix.record(pixels)
                stored[start : start + len(recorded)] = recorded
                start += len(recorded)
            stored.flush()

    def recorded(self, pairs: Pairs) -> np.ndarray | None:
        """The activations of the whole file of `pairs`, on disk; index them with `pairs.rows`. None: not collected."""
        path = _path(pairs)
        return np.load(path, mmap_mode="r") if self.prefix.blocks and path.exists() else None

    def embed(self, pairs: Pairs) -> np.ndarray | None:
        """float32 [n, dim], unit rows, of the images of `pairs` by the model as it is; None: not collected."""
        recorded = self.recorded(pairs)
        if recorded is None:
            return None
        found = []
        with torch.inference_mode():
            for start in range(0, len(pairs), _REPLAY_BATCH):
                part = np.ascontiguousarray(recorded[pairs.rows[start : start + _REPLAY_BATCH]])
                found.append(torch.nn.functional.normalize(self.prefix.features(part).float(), dim=-1).cpu().numpy())
        return np.concatenate(found)


def _path(pairs: Pairs) -> Path:
    return pairs.path.with_suffix(".prefix.npy")
