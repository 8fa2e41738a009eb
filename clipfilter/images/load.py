"""The one door of the package: encoded bytes in, everything the engine stores and feeds to a model out."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np

from clipfilter import defaults
from clipfilter.errors import UNEXPECTED_ERROR, RowError, one_line
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


def load_image(
    data: bytes | memoryview,
    cfg: PreprocessConfig,
    mode: Mode = defaults.DECODE,
    max_pixels: int = defaults.MAX_PIXELS,
) -> LoadedImage:
    """Decode, prepare and measure one image; pure, thread-safe, and without the GIL in the heavy parts.

    mode "exact" gives the very bits of open_clip's transform on the fully decoded image; "fast" decodes large JPEGs
    scaled and resizes with SIMD code (embedding cosine to exact at least 0.9995).

    Raises RowError and nothing else, whatever the bytes: the classes of `decode`, or unexpected_error.
    """
    try:
        return _load(data, cfg, mode, max_pixels)
    except RowError:
        raise
    except Exception as error:
        raise RowError(UNEXPECTED_ERROR, f"{type(error).__name__}: {one_line(error)}") from error


def _load(data: bytes | memoryview, cfg: PreprocessConfig, mode: Mode, max_pixels: int) -> LoadedImage:
    decoded = decode(data, mode=mode, min_side=math.ceil(cfg.size * OVERSAMPLING), max_pixels=max_pixels)
    planes = resized(decoded.rgb, cfg, exact=mode == "exact")
    return LoadedImage(
        pixels=crop(planes, cfg),
        width=decoded.width,
        height=decoded.height,
        sha256=hashlib.sha256(data).hexdigest(),
        format=decoded.format,
        facts=image_facts(_cheapest_view(decoded.rgb, planes, cfg), (decoded.rgb.shape[1], decoded.rgb.shape[0])),
    )


def _cheapest_view(rgb: np.ndarray, planes: np.ndarray, cfg: PreprocessConfig) -> np.ndarray:
    """What the facts are measured on, [h, w, 3]: the resized picture where that is whole, smaller and still large enough.

    A squashed one will do: the facts' own resizing restores its aspect ratio.
    """
    if planes.size >= rgb.size or min(planes.shape[1:]) < CANONICAL_SIDE:
        return rgb
    if cfg.resize_mode != "squash" and abs(planes.shape[2] * rgb.shape[0] - planes.shape[1] * rgb.shape[1]) > max(
        rgb.shape[:2]
    ):
        return rgb  # the centre square of an extreme strip
    return planes.transpose(1, 2, 0)
