"""Thumbnails as JPEG data URIs, read from the source; what may not be seen is blurred in the pixels themselves."""

from __future__ import annotations

import base64
import hashlib
import io
import logging
from collections import defaultdict
from typing import Any

import numpy as np

from clipfilter.errors import ClipfilterError, RowError
from clipfilter.report.examples import Example, Examples

log = logging.getLogger("clipfilter.report")

#: Longest side in pixels, largest JPEG in bytes, and how many cells remain of a blurred image's longer side.
SIDE = 224
MAX_BYTES = 12_000
CELLS = 8
#: How the sentence ends when no picture could be had at all.
NO_THUMBNAILS = "so there are no thumbnails."
_DECODE_SIDE = 224
_MAX_PIXELS = 64_000_000


def add_thumbnails(examples: Examples, source_plan: dict[str, Any], mode: str) -> str | None:
    """Fill in `image` of the examples; mode "blur" or "show". Only rows that were kept are shown clearly under "blur".
    Of escalated rows (`hidden`) the bytes are not even read.

    Returns a sentence about what could not be shown, None when everything could. Never raises for a source that
    cannot be read: a report outlives its source.
    """
    from clipfilter.sources import Shard, Source

    wanted: dict[str, dict[int, Example]] = defaultdict(dict)
    shown = [example for example in examples.all() if not example.hidden]
    for example in shown:
        wanted[example.commit][example.row] = example
    if not wanted:
        return None
    problem = ""
    # Any error here, of any library between us and the source, only costs the pictures.
    try:
        source = Source.from_plan(source_plan)
    except Exception as error:
        log.warning("no thumbnails: %s", error)
        return f"The source could not be opened ({_short(error)}), {NO_THUMBNAILS}"
    for commit, rows in wanted.items():
        try:
            shard = Shard.from_json(examples.shards[commit])
            for batch in source.read(shard, rows=sorted(rows)):
                numbers = batch.column("cf_row").to_pylist()
                for position, row in enumerate(numbers):
                    image = batch.column("cf_image")[position]
                    if row in rows and image.is_valid:
                        _fill(rows[row], image.as_py(), mode)
        except Exception as error:
            log.warning("no thumbnails from %s: %s", examples.shards[commit].get("path"), error)
            problem = problem or _short(error)
    missing = sum(example.image is None for example in shown)
    if not missing:
        return None
    if missing == len(shown):
        why = problem or "its images have changed"
        return f"The source could not be read again ({why}), {NO_THUMBNAILS}"
    return f"{missing} of {len(shown)} thumbnails could not be read again from the source."


def _fill(example: Example, data: bytes, mode: str) -> None:
    from clipfilter.images import decode

    if example.sha256 is not None and hashlib.sha256(data).hexdigest() != example.sha256:
        return  # not the image that was decided
    try:
        rgb = decode(data, mode="fast", min_side=_DECODE_SIDE, max_pixels=_MAX_PIXELS).rgb
    except RowError:
        return
    example.blurred = mode != "show" and example.decision != "keep"
    jpeg = thumbnail(rgb, blurred=example.blurred)
    example.image = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode("ascii")


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
