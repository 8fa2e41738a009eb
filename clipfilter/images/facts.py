"""Cheap facts about the whole picture that rules may use later, all from one small version of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

CANONICAL_SIDE = 128  # longer side, in pixels, of the version that is measured; smaller images are measured as they are


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """brightness, contrast: mean and standard deviation of luma (ITU-R 601), 0..255. blur: variance of the Laplacian
    (4-neighbour, Pech-Pacheco 2000) of luma; low means blurred. entropy: Shannon entropy of the luma histogram in bits,
    0..8. phash: 64-bit DCT perceptual hash, most significant bit first. colourfulness: of Hasler and Suesstrunk 2003,
    "Measuring colourfulness in natural images"; 0 without any colour, about 15 slightly, above 80 very colourful."""

    brightness: float
    contrast: float
    blur: float
    entropy: float
    phash: int
    colourfulness: float


def image_facts(rgb: np.ndarray, size: tuple[int, int] | None = None) -> ImageFacts:
    """Facts of an image, uint8 [h, w, 3], whole and not cropped.

    size: (width, height) that the picture really has, where `rgb` holds it at another aspect ratio.
    Everything but colourfulness is measured on luma, and all at a longer side of at most `CANONICAL_SIDE` pixels
    (antialiased bilinear), so the numbers compare across image sizes and hardly depend on the decode mode.
    `phash` is Krawetz's pHash as in `ImageHash.phash`: Lanczos to 32 x 32, DCT-II, the 8 x 8 lowest frequencies against
    their median; a few bits may differ, since it starts from the small version.
    """
    planes = _canonical(rgb, size or (rgb.shape[1], rgb.shape[0]))
    gray = _luma(planes)
    histogram = np.bincount(gray.ravel(), minlength=256) / gray.size
    mean = float(histogram @ _LEVELS)
    variance = float(histogram @ (_LEVELS - mean) ** 2)
    used = histogram[histogram > 0]
    return ImageFacts(
        brightness=mean,
        contrast=variance**0.5,
        blur=_laplacian_variance(gray),
        entropy=float(-(used * np.log2(used)).sum()) + 0.0,
        phash=_phash(gray),
        colourfulness=_colourfulness(planes),
    )


_LEVELS = np.arange(256, dtype=np.float64)


def _canonical(rgb: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [3, h, w]."""
    from clipfilter.images.resize import resize

    width, height = size
    longer = max(height, width)
    if longer > CANONICAL_SIDE:
        canonical = (max(1, round(width * CANONICAL_SIDE / longer)), max(1, round(height * CANONICAL_SIDE / longer)))
        return resize(rgb, canonical, "bilinear")
    return rgb.transpose(2, 0, 1)


def _luma(planes: np.ndarray) -> np.ndarray:
    red, green, blue = planes.astype(np.uint16)
    luma: np.ndarray = (red * 77 + green * 150 + blue * 29 + 128) >> 8
    return luma.astype(np.uint8)


def _colourfulness(planes: np.ndarray) -> float:
    red, green, blue = planes.reshape(3, -1).astype(np.float32)
    opponents = np.stack([red - green, (red + green) / 2 - blue])
    mean = opponents.mean(axis=1, dtype=np.float64)
    square = np.vecdot(opponents, opponents).astype(np.float64) / opponents.shape[1]
    spread = np.maximum(square - mean**2, 0.0).sum() ** 0.5
    return float(spread + 0.3 * np.hypot(mean[0], mean[1]))


def _laplacian_variance(gray: np.ndarray) -> float:
    if min(gray.shape) < 3:
        return 0.0
    values = gray.astype(np.int16)
    laplacian = 4 * values[1:-1, 1:-1]
    laplacian -= values[:-2, 1:-1]
    laplacian -= values[2:, 1:-1]
    laplacian -= values[1:-1, :-2]
    laplacian -= values[1:-1, 2:]
    flat = laplacian.ravel().astype(np.float32)
    mean = float(flat.mean())
    return max(0.0, float(np.einsum("i,i->", flat, flat)) / flat.size - mean * mean)


def _phash(gray: np.ndarray) -> int:
    rows, columns = _low_frequencies(gray.shape[0]), _low_frequencies(gray.shape[1])
    low = (rows @ gray.astype(np.float32)) @ columns.T
    middle = np.partition(low.ravel(), (31, 32))
    bits = low > (middle[31] + middle[32]) / 2  # the median of 64 values
    return int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big")


@lru_cache(maxsize=CANONICAL_SIDE + 1)
def _low_frequencies(length: int) -> np.ndarray:
    """float32 [8, length]: Lanczos resampling of an axis to 32 samples, then the first 8 terms of its DCT-II.

    Both steps are linear, so one small matrix per axis does what ImageHash does in three passes.
    """
    identity = Image.fromarray(np.eye(length, dtype=np.float32))
    resampling = np.asarray(identity.resize((32, length), Image.Resampling.LANCZOS)).T if length != 32 else np.eye(32)
    frequency, sample = np.arange(8)[:, None], np.arange(32)[None, :]
    transform = np.cos(np.pi * frequency * (2 * sample + 1) / 64)
    return (transform @ resampling).astype(np.float32)
