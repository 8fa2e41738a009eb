"""Embedded ICC profiles: pixels as the profile means them, in sRGB (littlecms through Pillow)."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from clipfilter.images.header import MAX_PROFILE

# A profile that moves no colour of a coarse cube by more than this is sRGB under another name; most profiles are.
_SAME = 2
_CUBE = np.stack(np.meshgrid(*[np.linspace(0, 255, 9).round().astype(np.uint8)] * 3), -1).reshape(1, -1, 3)
_MODES = {"RGB ": "RGB", "GRAY": "L"}


def to_srgb(planes: np.ndarray, profile: bytes) -> np.ndarray | None:
    """`planes` (uint8 [3, h, w]) in sRGB, or None by a profile that cannot be used: damaged, or of other colours.

    Relative colorimetric with black point compensation, as browsers do. Pixels of a profile that is sRGB come back as they
    are. Meant for resized pictures: converting before would change the result by 0.3 levels and cost many times as much.
    """
    found = _transform(profile)
    if found is None:
        return None
    mode, transform = found
    if mode == "L" and not (planes == planes[0]).all():
        return None
    if transform is None:
        return planes
    source = np.ascontiguousarray(planes[0] if mode == "L" else planes.transpose(1, 2, 0))
    image = ImageCms.applyTransform(Image.fromarray(source), transform)
    assert image is not None  # as it is not done in place
    return np.asarray(image).transpose(2, 0, 1)


@lru_cache(maxsize=64)  # found by the profile's hash; making one takes 3 to 27 ms
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None] | None:
    """(mode of the pixels, what turns them into sRGB or None where they are), or None for an unusable profile."""
    if len(profile) >= MAX_PROFILE:
        return None
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = _MODES.get(opened.profile.xcolor_space)
        if mode is None:
            return None
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        cube = _CUBE if mode == "RGB" else _CUBE[:, :, 0]
        shown = ImageCms.applyTransform(Image.fromarray(np.ascontiguousarray(cube)), transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    moved = np.abs(np.asarray(shown).astype(int) - (cube if mode == "RGB" else cube[:, :, None])).max()
    return mode, transform if moved > _SAME else None
