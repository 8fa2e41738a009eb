"""The one door of the package: encoded bytes in, everything the engine stores and feeds to a model out."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from clipfilter import defaults
from clipfilter.errors import UNEXPECTED_ERROR, RowError, one_line
from clipfilter.images.color import to_srgb
from clipfilter.images.decode import Mode, decode
from clipfilter.images.facts import CANONICAL_SIDE, ImageFacts, image_facts
from clipfilter.images.preprocess import PreprocessConfig, crop, resized

# Scaled decoding keeps the shorter side at least this many times the model's. A JPEG decoded at half its size is the
# full one through a 2 x 2 box filter, and with less room that blur shows: on 31 photographs at up to ten sizes each the
# worst cosine to the exact embedding is 0.9998 from 6 on, 0.9995 at 5, 0.998 at 4 and 0.987 at 2 (with the bundled
# `nano`, by `benchmarks/decode.py --cosines`). Little is lost: most of the time is entropy decoding either way.
OVERSAMPLING = 6.0


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """pixels: uint8 [3, S, S], ready for the encoder. width, height: displayed size of the whole image. sha256: of the
    encoded bytes, hex. format: what the bytes are, whatever the name said."""

    pixels: np.ndarray
    width: int
    height: int
    sha256: str
    format: str
    facts: ImageFacts
    profile_ignored: bool = False


def load_image(
    data: bytes | memoryview,
    cfg: PreprocessConfig,
    mode: Mode = defaults.DECODE,
    max_pixels: int = defaults.MAX_PIXELS,
    color: defaults.Color = defaults.COLOR,
) -> LoadedImage:
    """Decode, prepare and measure one image; pure, thread-safe, and without the GIL in the heavy parts.

    mode "exact" gives the very bits of open_clip's transform on the fully decoded image; "fast" decodes large JPEGs
    scaled and resizes with SIMD code (embedding cosine to exact at least 0.9995). color "managed" turns the resized pixels
    into sRGB by the picture's own ICC profile; "ignore" takes the numbers as they are (but CMYK, which has no others).

    Raises RowError and nothing else, whatever the bytes: the classes of `decode`, or unexpected_error.
    """
    try:
        return _load(data, cfg, mode, max_pixels, color)
    except RowError:
        raise
    except Exception as error:
        raise RowError(UNEXPECTED_ERROR, f"{type(error).__name__}: {one_line(error)}") from error


def _load(
    data: bytes | memoryview, cfg: PreprocessConfig, mode: Mode, max_pixels: int, color: defaults.Color
) -> LoadedImage:
    decoded = decode(data, mode=mode, min_side=math.ceil(cfg.size * OVERSAMPLING), max_pixels=max_pixels)
    rgb, profile, ignored = decoded.rgb, decoded.profile if color == "managed" else b"", False
    size = (rgb.shape[1], rgb.shape[0])
    if profile and min(size) <= cfg.size:  # it will be enlarged: now it is smaller
        managed = to_srgb(rgb.transpose(2, 0, 1), profile)
        profile, ignored = b"", managed is None
        rgb = rgb if managed is None else np.ascontiguousarray(managed.transpose(1, 2, 0))
    planes = resized(rgb, cfg, exact=mode == "exact")
    # What the facts are measured on: the resized picture where that will do.
    measured = planes if _will_do(rgb, planes, cfg) else rgb.transpose(2, 0, 1)
    if profile:
        managed = to_srgb(planes, profile)
        also = managed if measured is planes else to_srgb(measured, profile)
        ignored = managed is None or also is None
        if managed is not None and also is not None:
            planes, measured = managed, also
    return LoadedImage(
        pixels=crop(planes, cfg),
        width=decoded.width,
        height=decoded.height,
        sha256=hashlib.sha256(data).hexdigest(),
        format=decoded.format,
        facts=image_facts(measured.transpose(1, 2, 0), size),
        profile_ignored=ignored,
    )


def _will_do(rgb: np.ndarray, planes: np.ndarray, cfg: PreprocessConfig) -> bool:
    """Whether facts can be measured on the resized picture: it is whole, smaller than `rgb` and still large enough.

    A squashed one will do: the facts' own resizing restores its aspect ratio.
    """
    if planes.size >= rgb.size or min(planes.shape[1:]) < CANONICAL_SIDE:
        return False
    # Not the centre square of an extreme strip.
    return cfg.resize_mode == "squash" or abs(planes.shape[2] * rgb.shape[0] - planes.shape[1] * rgb.shape[1]) <= max(
        rgb.shape[:2]
    )
