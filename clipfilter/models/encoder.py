"""The torch encoder: batches of pixels and texts in, unit vectors out, for any pair of towers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from clipfilter.errors import RefusedError
from clipfilter.images import PreprocessConfig

if TYPE_CHECKING:
    from torch import Tensor

    Tower = Callable[[Tensor], Tensor]
    Tokenizer = Callable[[Sequence[str]], list[list[int]]]


class TorchEncoder:
    """Two towers, a tokenizer and the facts about them; implements `clipfilter.models.Encoder`.

    image_tower: normalised pixels [n, 3, S, S] in `dtype` -> [n, dim].
    text_tower: token ids int64 [n, length], padded with `pad_id` -> [n, dim].
    tokenize: texts -> untruncated id lists, special tokens included; a truncated text ends with `end_id`.
    cut_to_longest: whether the text tower gives the same vectors when padding is cut off: causal towers, and
    towers that mask their padding. Otherwise every text is padded to the context.
    pad_left: whether padding goes before a text instead of after it (SigLIP 2 of transformers).
    image_chunk: images per forward pass; small chunks keep the activations in the CPU's cache.
    """

    def __init__(
        self,
        *,
        name: str,
        dim: int,
        preprocess: PreprocessConfig,
        logit_scale: float,
        logit_bias: float | None,
        fingerprint: dict[str, Any],
        image_tower: Tower,
        text_tower: Tower,
        tokenize: Tokenizer,
        context_length: int,
        pad_id: int,
        end_id: int,
        cut_to_longest: bool,
        device: torch.device,
        dtype: torch.dtype,
        pad_left: bool = False,
        image_chunk: int | None = None,
    ) -> None:
        self.name = name
        self.dim = dim
        self.preprocess = preprocess
        self.logit_scale = logit_scale
        self.logit_bias = logit_bias
        self.score_kind: Literal["softmax", "sigmoid"] = "softmax" if logit_bias is None else "sigmoid"
        self.fingerprint = fingerprint
        self.context_length = context_length
        self.device = device
        self.dtype = dtype
        self.image_tower = image_tower
        self.text_tower = text_tower
        self.tokenize = tokenize
        self.pad_id = pad_id
        self.end_id = end_id
        self.cut_to_longest = cut_to_longest
        self.pad_left = pad_left
        self.image_chunk = image_chunk if device.type == "cpu" else None
        self._text_chunk = 32 if device.type == "cpu" else 256
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(preprocess.mean, device=device).view(shape)
        self._std = torch.tensor(preprocess.std, device=device).view(shape)
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
            reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
            raise RefusedError(f"{self.name} cannot be compiled here ({reason}): load it without compile") from None
        self.fingerprint["compiled"] = True

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, special tokens included, not truncated."""
        # A batch is usually asked for twice, once to encode and once to count; tokenizing is plain Python.
        key = tuple(texts)
        if self._last_tokens[0] != key:
            self._last_tokens = (key, self.tokenize(key))
        return self._last_tokens[1]

    def pad(self, tokens: Sequence[list[int]]) -> Tensor:
        """What the text tower takes: int64 [n, length] on the CPU, every text truncated to the context and padded, to the
        longest of them or to the context."""
        cut = [self.truncate(ids) for ids in tokens]
        width = max(map(len, cut)) if self.cut_to_longest else self.context_length
        batch = torch.full((len(cut), width), self.pad_id, dtype=torch.long)
        for row, ids in zip(batch, cut, strict=True):
            start = width - len(ids) if self.pad_left else 0
            row[start : start + len(ids)] = torch.tensor(ids)
        return batch

    def truncate(self, ids: list[int]) -> list[int]:
        """At most a context of ids; a text that is cut ends with `end_id`."""
        if len(ids) <= self.context_length:
            return ids
        return [*ids[: self.context_length - 1], self.end_id]


def _unit(features: Tensor) -> np.ndarray:
    """Rows as float32 unit vectors in numpy; the norm is taken in float32 whatever the towers compute in."""
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
