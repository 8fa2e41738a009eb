"""The workers of a training run: who this process is among them, and what they tell each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """`rank` of `size` workers. With one worker nothing is sent; else torch.distributed has been initialised."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the workers; one message per dtype."""
        if self.size == 1:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            by_dtype.setdefault(tensor.dtype, []).append(tensor)
        for same in by_dtype.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            torch.distributed.all_reduce(flat)
            flat /= self.size
            for tensor, part in zip(same, torch.split(flat, [tensor.numel() for tensor in same]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def tell(self, message: Any) -> Any:
        """What the first worker says (plain data), on every worker."""
        if self.size == 1:
            return message
        box = [message]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]
