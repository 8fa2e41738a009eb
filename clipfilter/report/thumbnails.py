"""Thumbnails as JPEG data URIs, read from the source; what may not be seen is blurred in the pixels themselves."""

from __future__ import annotations

import base64
import io
import logging
from typing import Any

import numpy as np

from clipfilter.errors import ClipfilterError, RowError
from clipfilter.report.examples import Example, Examples
from clipfilter.runs import Pictures

log = logging.getLogger("clipfilter.report")

#: Longest side in pixels, largest JPEG in bytes, and how many cells remain of a blurred image's longer side.
SIDE = 224
MAX_BYTES = 12_000
CELLS = 8
#: How the sentence ends when no picture could be had at all.
NO_THUMBNAILS = "so there are no thumbnails."
_MAX_PIXELS = 64_000_000


def add_thumbnails(examples: Examples, dataset: dict[str, Any], mode: str) -> str | None:
    """Fill in `image` of the examples; mode "blur" or "show". Only rows that were kept are shown clearly under "blur".
    Of escalated rows (`hidden`) the bytes are not even read.

    dataset: `Plan.dataset`. Returns a sentence about what could not be shown, None when everything could. Never raises for
    a dataset that cannot be read: a report outlives its source.
    """
    shown = [example for example in examples.all() if not example.hidden]
    if not shown:
        return None
    wanted: dict[str, dict[int, Example]] = {}
    for example in shown:
        wanted.setdefault(example.commit, {})[example.row] = example
    problem = ""
    # Any error here, of any library between us and the source, only costs the pictures.
    try:
        pictures = Pictures(dataset)
    except Exception as error:
        log.warning("no thumbnails: %s", error)
        return f"The source could not be opened ({_short(error)}), {NO_THUMBNAILS}"
    for commit, rows in wanted.items():
        try:
            for row, data in pictures.read(examples.shards[commit], {n: item.sha256 for n, item in rows.items()}):
                _fill(rows[row], data, mode)
        except Exception as error:
            log.warning("no thumbnails from %s: %s", examples.shards[commit].path, error)
            problem = problem or _short(error)
    missing = sum(example.image is None for example in shown)
    if not missing:
        return None
    if missing == len(shown):
        why = problem or "its images have changed"
        return f"The source could not be read again ({why}), {NO_THUMBNAILS}"
    return f"{missing} of {len(shown)} thumbnails could not be read again from the source."


def _fill(example: Example, data: bytes, mode: str) -> None:
    blurred = mode != "show" and example.decision != "keep"
    jpeg = jpeg_of(data, blurred=blurred)
    if jpeg is not None:
        example.blurred = blurred
        example.image = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


def jpeg_of(data: bytes, *, blurred: bool, side: int = SIDE, max_bytes: int = MAX_BYTES) -> bytes | None:
    """`thumbnail` of an encoded picture from anywhere, decoded under guard; None where it cannot be decoded."""
    from clipfilter.images import decode

    try:
        rgb = decode(data, mode="fast", min_side=side, max_pixels=_MAX_PIXELS).rgb
    except RowError:
        return None
    return thumbnail(rgb, blurred=blurred, side=side, max_bytes=max_bytes)


def thumbnail(rgb: np.ndarray, *, blurred: bool, side: int = SIDE, max_bytes: int = MAX_BYTES) -> bytes:
    """A JPEG of at most `side` x `side` pixels and (as far as quality 15 reaches) `max_bytes` bytes from uint8 [h, w, 3].

    Blurred, it holds only `CELLS` averages along its longer side, so there is nothing in the file to recover.
    """
    from PIL import Image

    image = Image.fromarray(rgb)
    # Very long images would shrink to a line: the middle of them is shown.
    width, height = image.size
    longest = 3 * min(width, height)
    if max(width, height) > longest:
        left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        image = image.crop((left, top, left + min(width, longest), top + min(height, longest)))
    size = _within(image.size, side)
    if blurred:
        image = image.resize(_within(image.size, CELLS), Image.Resampling.BOX)
        image = image.resize(size, Image.Resampling.BICUBIC)
    else:
        image = image.resize(size, Image.Resampling.LANCZOS) if size != image.size else image
    for quality in (82, 74, 66, 56, 44, 30, 15):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= max_bytes:
            break
    return buffer.getvalue()


def _within(size: tuple[int, int], side: int) -> tuple[int, int]:
    """`size` scaled down so that its longer side is at most `side`."""
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    if not isinstance(error, ClipfilterError | OSError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text if len(text) <= 160 else text[:157] + "..."
