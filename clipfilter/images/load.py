"""The one door of the package: encoded bytes in, everything the engine stores and feeds to a model out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from clipfilter.images.decode import Mode, decode
from clipfilter.images.facts import ImageFacts, image_facts
from clipfilter.images.header import DEFAULT_MAX_PIXELS
from clipfilter.images.preprocess import PreprocessConfig, prepare, prepare_fast

# Scaled decoding keeps the shorter side at least this many times the model's, so that the last step down is always a
# proper antialiased resize. Chosen by benchmarks/decode.py, which prints the embedding cosines behind it.
OVERSAMPLING = 1.25


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
    mode: Mode = "fast",
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> LoadedImage:
    """Decode, prepare and measure one image; pure, thread-safe, and without the GIL in the heavy parts.

    mode "exact" gives the very bits of open_clip's transform on the fully decoded image; "fast" decodes large JPEGs
    scaled and resizes with SIMD code (embedding cosine to exact at least 0.9995).

    Raises RowError: decode_error or image_too_large.
    """
    min_side = int(cfg.size * OVERSAMPLING + 0.999)
    decoded = decode(data, mode=mode, min_side=min_side, max_pixels=max_pixels)
    pixels = (prepare if mode == "exact" else prepare_fast)(decoded.rgb, cfg)
    return LoadedImage(
        pixels=pixels,
        width=decoded.width,
        height=decoded.height,
        sha256=hashlib.sha256(data).hexdigest(),
        format=decoded.format,
        facts=image_facts(decoded.rgb),
    )
