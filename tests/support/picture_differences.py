"""Why we show a picture otherwise than Chromium: the reasons, how each is recognised, and the table of the documentation."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import NamedTuple

from tests.support.picture_compare import Shown

#: What the table says.
REASONS = {
    "theirs": "Chromium does not read the format",
    "ours": "we do not read the kind, and say so (`unsupported_format`)",
    "damaged": "cut off or damaged: we refuse it, Chromium shows what it finds",
    "large": "the header names more pixels or a longer side than we decode",
    "gamma": "PNG with `gAMA` or `cHRM`: we apply ICC profiles only",
    "animation": "APNG whose still picture is not its first frame: we show the still one",
    "turned": "orientation in the EXIF of a WebP: Chromium does not turn it",
    "runs": "BMP in run lengths: what no run covers is black with us, clear with Chromium; 4-bit runs of odd length; damage",
    "alpha": "BMP whose channel for alpha is zero throughout: we take it for one that nobody filled in, Chromium shows nothing",
    "chroma": "small AVIF with colour at half the resolution, enlarged by another filter",
    "pointer": "ICO whose directory and picture give different heights",
    "broken": "broken on purpose; each shows another part",
}
# Files that are broken on purpose in ways of their own: both show something.
_BROKEN = {"mmap_error.bmp", "issue_2811.gif", "mantis-2446.bmp"}
_UNREAD = re.compile(r"\.(tiff?|tga|icb|vda|vst|jp2|j2k|jpx|jpc|j2c|p[pgbn]m|hei[cf])$", re.IGNORECASE)
_NAMED = 16


class Difference(NamedTuple):
    suite: str
    path: str
    outcome: str
    reason: str | None


def reason(path: str, data: bytes, outcome: str, mine: Shown, other: Shown) -> str | None:
    """A key of `REASONS`, or None for a difference that nobody has explained."""
    name, fuzzed = PurePosixPath(path).name, "afl" in path or "fuzz" in path
    if outcome == "shown by us alone":
        known = data[:2] in (b"II", b"MM") or data[4:8] in (b"ftyp", b"jP  ") or data[:4] == b"\xff\x4f\xff\x51"
        return "theirs" if known or data[:1] == b"P" or _UNREAD.search(name) else None
    if outcome == "unsupported_format":
        return "ours"
    if outcome == "image_too_large":
        return "large"
    if outcome == "decode_error":
        return "damaged"
    if data[8:12] == b"WEBP" and b"EXIF" in data:
        return "turned"
    if outcome == "size":
        return "pointer" if data[:4] == b"\0\0\1\0" else None
    if outcome != "colours":
        return None
    if data[:4] == b"\x89PNG":
        if b"acTL" in data:
            return "animation"
        return "gamma" if b"gAMA" in data or b"cHRM" in data else None
    if data[:2] == b"BM" and data[30:34] in (b"\1\0\0\0", b"\2\0\0\0"):
        return "runs"
    if data[:2] == b"BM" and data[28:30] == b"\x20\0" and other.cells is not None and min(other.cells) == 255:
        return "alpha"
    if data[4:8] == b"ftyp" and other.size is not None and max(other.size) <= 256:
        return "chroma"
    return "broken" if name in _BROKEN or fuzzed else None


def rows(suite: str, count: int, differences: Iterable[Difference]) -> list[str]:
    """The lines of the table that tell of one suite."""
    found: dict[str, list[str]] = defaultdict(list)
    for one in differences:
        found[one.reason or "?"].append(one.path)
    same = count - sum(map(len, found.values()))
    lines = [f"| {suite} | {count} | {same} | as Chromium shows it, or refused by both | |"]
    for key in [*REASONS, "?"]:
        if paths := found.get(key):
            lines.append(f"| {suite} | | {len(paths)} | {REASONS.get(key, 'not explained')} | {_which(paths)} |")
    return lines


def _which(paths: list[str]) -> str:
    """The names, or how many of each ending stand in each folder."""
    if len(paths) <= _NAMED:
        return ", ".join(f"`{PurePosixPath(path).name}`" for path in sorted(paths)).replace("|", "\\|")
    kinds = Counter(f"`{PurePosixPath(path).parent}/*{PurePosixPath(path).suffix}`" for path in paths)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
