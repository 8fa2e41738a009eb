"""Resize, crop and pad exactly as open_clip's inference transform does, up to (not including) normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
_RESIZE_MODES = ("shortest", "longest", "squash")

# A 65535 x 1 strip resized to shortest side 224 would need ten gigabytes before the crop. Above this many pixels
# only the part that survives the crop is computed.
_MAX_RESIZED_PIXELS = 64_000_000


@dataclass(frozen=True)
class PreprocessConfig:
    """How a model wants its images; the fields are open_clip's `PreprocessCfg`, for square inputs.

    size: side of the square input in pixels. mean, std: per channel, on the 0..1 scale.
    interpolation: "bicubic" or "bilinear". resize_mode: "shortest" (then centre crop), "longest" (then centre
    crop or pad with fill_color) or "squash" (aspect ratio ignored).
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0

    def __post_init__(self) -> None:
        # open_clip writes "random" for checkpoints trained with mixed interpolation and infers with bicubic.
        if self.interpolation == "random":
            object.__setattr__(self, "interpolation", "bicubic")
        if self.interpolation not in _RESAMPLE:
            raise ValueError(f"interpolation must be bicubic or bilinear, not {self.interpolation!r}")
        if self.resize_mode not in _RESIZE_MODES:
            raise ValueError(f"resize_mode must be one of {', '.join(_RESIZE_MODES)}, not {self.resize_mode!r}")
        if self.size < 1 or len(self.mean) != 3 or len(self.std) != 3:
            raise ValueError("size must be positive, and mean and std must have three numbers each")
        object.__setattr__(self, "mean", tuple(float(v) for v in self.mean))
        object.__setattr__(self, "std", tuple(float(v) for v in self.std))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; `from_json` reads it back."""
        return {**asdict(self), "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> PreprocessConfig:
        """The config that `to_json` wrote."""
        return cls(**{**data, "mean": tuple(data["mean"]), "std": tuple(data["std"])})


def prepare(rgb: np.ndarray, cfg: PreprocessConfig) -> np.ndarray:
    """Resize and crop `rgb` (uint8 [h, w, 3]) to uint8 [3, size, size], bit-identical to open_clip's transform.

    Identical means: `prepare(rgb, cfg) / 255, minus mean, over std` in float32 and in torchvision's order gives the
    very bits of `open_clip.transform.image_transform(...)(Image.fromarray(rgb))`.
    """
    return crop(resized(rgb, cfg, exact=True), cfg)


def prepare_fast(rgb: np.ndarray, cfg: PreprocessConfig) -> np.ndarray:
    """`prepare` with SIMD resizing: the same geometry, pixel values within 2 levels."""
    return crop(resized(rgb, cfg, exact=False), cfg)


def resized(rgb: np.ndarray, cfg: PreprocessConfig, *, exact: bool) -> np.ndarray:
    """The first half of `prepare`: uint8 [3, h', w'], the whole picture before crop and padding.

    Only of an extreme strip (above `_MAX_RESIZED_PIXELS` when resized) it is the centre square.
    """
    height, width = rgb.shape[:2]
    target = _resized_size(width, height, cfg)
    if target == (width, height):
        return rgb.transpose(2, 0, 1)
    if target[0] * target[1] > _MAX_RESIZED_PIXELS:
        image = _resize_cropped(Image.fromarray(rgb), target, cfg.size, _RESAMPLE[cfg.interpolation])
    elif exact:
        image = Image.fromarray(rgb).resize(target, _RESAMPLE[cfg.interpolation])
    else:
        from clipfilter.images.resize import resize

        return resize(rgb, target, cfg.interpolation)
    return np.asarray(image).transpose(2, 0, 1)


def crop(planes: np.ndarray, cfg: PreprocessConfig) -> np.ndarray:
    """The second half of `prepare`: `planes` (uint8 [3, h, w]) cropped or padded about the centre, contiguous."""
    size = cfg.size
    height, width = planes.shape[1:]
    if width < size or height < size:
        padded = np.full((3, max(size, height), max(size, width)), cfg.fill_color, dtype=np.uint8)
        top, left = max(0, size - height) // 2, max(0, size - width) // 2
        padded[:, top : top + height, left : left + width] = planes
        planes, height, width = padded, padded.shape[1], padded.shape[2]
    top, left = crop_offset(height, size), crop_offset(width, size)
    return np.ascontiguousarray(planes[:, top : top + size, left : left + size])


def _resized_size(width: int, height: int, cfg: PreprocessConfig) -> tuple[int, int]:
    """(width, height) between resize and crop, rounded as torchvision (shortest) and open_clip (longest) do."""
    size = cfg.size
    if cfg.resize_mode == "squash":
        return size, size
    if cfg.resize_mode == "longest":
        ratio = max(height, width) / size
        return max(1, round(width / ratio)), max(1, round(height / ratio))
    if width <= height:
        return size, int(size * height / width)
    return int(size * width / height), size


def crop_offset(length: int, size: int) -> int:
    """Where torchvision's CenterCrop starts on an axis of `length` (Python's round: halves go to the even side)."""
    return round((length - size) / 2.0)


def _resize_cropped(image: Image.Image, target: tuple[int, int], size: int, resample: Image.Resampling) -> Image.Image:
    """The centre `size` x `size` pixels of `image` at `target` size, without computing the rest."""
    left, top = crop_offset(target[0], size), crop_offset(target[1], size)
    scale_x, scale_y = image.width / target[0], image.height / target[1]
    box = (left * scale_x, top * scale_y, (left + size) * scale_x, (top + size) * scale_y)
    return image.resize((size, size), resample, box=box)
