"""The torch encoder: batches of pixels and texts in, unit vectors out, for any pair of towers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from clipfilter.errors import RefusedError, reason
from clipfilter.images import PreprocessConfig
from clipfilter.models.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from torch import Tensor

    Tower = Callable[[Tensor], Tensor]


@dataclass(eq=False, repr=False)
class TorchEncoder:
    """Two towers, a tokenizer and the facts about them; implements `clipfilter.models.Encoder`.

    image_tower: normalised pixels [n, 3, S, S] in `dtype` -> [n, dim].
    text_tower: token ids int64 [n, length], padded by the tokenizer's rules -> [n, dim].
    cut_to_longest: whether the text tower gives the same vectors when padding is cut off: causal towers, and
    towers that mask their padding. Otherwise every text is padded to the context.
    image_chunk: images per forward pass on a CPU; small chunks keep the activations in its cache.
    """

    name: str
    dim: int
    preprocess: PreprocessConfig
    logit_scale: float
    logit_bias: float | None
    fingerprint: dict[str, Any]
    image_tower: Tower
    text_tower: Tower
    tokenizer: TextTokenizer
    cut_to_longest: bool
    device: torch.device
    dtype: torch.dtype
    image_chunk: int | None = None

    def __post_init__(self) -> None:
        self.score_kind: Literal["softmax", "sigmoid"] = "softmax" if self.logit_bias is None else "sigmoid"
        self.context_length = self.tokenizer.context_length
        on_cpu = self.device.type == "cpu"
        self.image_chunk = self.image_chunk if on_cpu else None
        self._text_chunk = 32 if on_cpu else 256
        self._mean, self._std = (
            torch.tensor(values, device=self.device).view(1, 3, 1, 1)
            for values in (self.preprocess.mean, self.preprocess.std)
        )
        self._last_tokens: tuple[tuple[str, ...], list[list[int]]] = ((), [])

    def normalise(self, pixels: np.ndarray) -> Tensor:
        """uint8 [n, 3, S, S] -> normalised [n, 3, S, S] on the device, in torchvision's order."""
        size = self.preprocess.size
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != (3, size, size):
            raise ValueError(f"expected uint8 [n, 3, {size}, {size}], got {pixels.dtype} {list(pixels.shape)}")
        batch = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device, non_blocking=True)
        return batch.float().div_(255).sub_(self._mean).div_(self._std).to(self.dtype)

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 [n, 3, S, S] -> float32 [n, dim], unit norm."""
        chunk = self.image_chunk or max(1, len(pixels))
        out = np.empty((len(pixels), self.dim), np.float32)
        with torch.inference_mode():
            for start in range(0, len(pixels), chunk):
                features = self.image_tower(self.normalise(pixels[start : start + chunk]))
                out[start : start + chunk] = _unit(features)
        return out

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """n texts -> float32 [n, dim], unit norm.

        Texts of similar length share a forward pass: one long text does not make the others pay for it.
        """
        tokens = self.tokens(texts)
        out = np.empty((len(tokens), self.dim), np.float32)
        by_length = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        with torch.inference_mode():
            for start in range(0, len(tokens), self._text_chunk):
                rows = by_length[start : start + self._text_chunk]
                ids = self.pad([tokens[row] for row in rows])
                out[rows] = _unit(self.text_tower(ids.to(self.device, non_blocking=True)))
        return out

    def count_truncated(self, texts: Sequence[str]) -> int:
        """How many of `texts` are longer than the context."""
        return sum(len(ids) > self.context_length for ids in self.tokens(texts))

    def compile(self) -> None:
        """Compile both towers with `torch.compile` now, and note it in the fingerprint; the numbers stay within bounds.

        The first batches of other sizes compile again. Raises RefusedError where nothing can be compiled.
        """
        if self.device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise RefusedError(
                f"{self.name} cannot be compiled here (there is no C++ compiler): install g++, or load it without compile"
            )
        before = self.image_tower, self.text_tower
        self.image_tower, self.text_tower = (torch.compile(tower, dynamic=True) for tower in before)
        size = self.preprocess.size
        try:
            self.encode_images(np.zeros((2, 3, size, size), np.uint8))
            self.encode_texts(["a photo", "a longer sentence about a photo"])
        except Exception as error:  # the compiler's own classes, or those of the compilers that it calls
            self.image_tower, self.text_tower = before
            raise RefusedError(
                f"{self.name} cannot be compiled here ({reason(error)}): load it without compile"
            ) from None
        self.fingerprint["compiled"] = True

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included, not truncated."""
        # A batch is usually asked for twice, once to encode and once to count; tokenizing is plain Python.
        key = tuple(texts)
        if self._last_tokens[0] != key:
            self._last_tokens = (key, self.tokenizer.encode(key))
        return self._last_tokens[1]

    def pad(self, tokens: Sequence[list[int]]) -> Tensor:
        """What the text tower takes: int64 [n, length] on the CPU, every text truncated to the context and padded, to the
        longest of them or to the context."""
        cut = [self.truncate(ids) for ids in tokens]
        width = max(map(len, cut)) if self.cut_to_longest else self.context_length
        batch = torch.full((len(cut), width), self.tokenizer.pad_id, dtype=torch.long)
        for row, ids in zip(batch, cut, strict=True):
            start = width - len(ids) if self.tokenizer.pad_left else 0
            row[start : start + len(ids)] = torch.tensor(ids)
        return batch

    def truncate(self, ids: list[int]) -> list[int]:
        """At most a context of ids; a text that is cut ends with the tokenizer's `end_id`."""
        if len(ids) <= self.context_length:
            return ids
        return [*ids[: self.context_length - 1], self.tokenizer.end_id]


def _unit(features: Tensor) -> np.ndarray:
    """Rows as float32 unit vectors in numpy; the norm is taken in float32 whatever the towers compute in."""
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
