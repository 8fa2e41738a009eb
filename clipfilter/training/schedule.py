"""The optimiser and its learning rate: AdamW, linear warm-up, cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

#: open_clip's values for vision transformers.
BETAS, EPSILON = (0.9, 0.98), 1e-6


def make_optimizer(parameters: Sequence[tuple[str, nn.Parameter]], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); gains, biases and the temperature are not decayed."""
    plain = [p for name, p in parameters if p.ndim < 2 or name.endswith("bias") or name.startswith("logit_")]
    kept = {id(p) for p in plain}
    decayed = [p for _, p in parameters if id(p) not in kept]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=BETAS, eps=EPSILON)


def learning_rate(step: int, total: int, warmup: int, peak: float) -> float:
    """The rate of step 0 <= step < total: rising linearly to `peak` in `warmup` steps, then half a cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2
