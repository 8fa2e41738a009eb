"""How images are decoded, and decoding that gives a value for whatever happens."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from clipfilter import defaults
from clipfilter.errors import IMAGE_TOO_LARGE, UNEXPECTED_ERROR, RowError, unexpected
from clipfilter.images.decode import Mode
from clipfilter.images.load import LoadedImage, load_image
from clipfilter.images.preprocess import PreprocessConfig

log = logging.getLogger("clipfilter.images")

Image = LoadedImage | RowError


@dataclass(frozen=True)
class DecodeSettings:
    """How images are decoded: the model's preprocessing, "fast" or "exact", the pixel limit of the guard, what becomes of
    colour profiles."""

    preprocess: PreprocessConfig
    mode: Mode
    max_pixels: int
    color: defaults.Color = defaults.COLOR


def load_guarded(data: memoryview | bytes, settings: DecodeSettings) -> Image:
    """`load_image` with whatever it raises turned into a value, so that one bad image costs one row."""
    try:
        return load_image(data, settings.preprocess, settings.mode, settings.max_pixels, settings.color)
    except RowError as error:
        if isinstance(error.__cause__, MemoryError):
            return RowError(IMAGE_TOO_LARGE, "not enough memory")
        if error.error_class == UNEXPECTED_ERROR:
            log.warning("an image raised what nobody foresaw", exc_info=error.__cause__)
        return error
    except BaseException as error:  # not only Exception: a library may raise SystemExit, or a panic of its own
        log.warning("an image raised what nobody foresaw", exc_info=True)
        return unexpected(error)
