"""Which picture a name in a table means: its path in any spelling, exact first, loosely only where nothing else fits."""

from __future__ import annotations

import posixpath
import re
import unicodedata
from array import array
from collections.abc import Iterable
from urllib.parse import unquote

import numpy as np

from clipfilter.sources.discover import is_image_name

_URL = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_DRIVE = re.compile(r"^[A-Za-z]:(?=/)")
_NUMBERED = re.compile(r"(\.[A-Za-z0-9]{1,5})#\d+$")  # Flickr's `name.jpg#0`
_MOST = 100  # paths that are looked at for one name


def spelled(name: str) -> str:
    """A name as a plain path: "/" between folders, without `./`, drive, scheme, query and the number of a caption."""
    name = name.strip().replace("\\", "/")
    if _URL.match(name):
        name = unquote(re.split("[?#]", name, maxsplit=1)[0].partition("://")[2])
    name = _NUMBERED.sub(r"\1", _DRIVE.sub("", name))
    if "./" in name or "//" in name or name[:1] in "./":
        return posixpath.normpath("/" + name).strip("/")  # a leading `..` leads nowhere, what follows is the path
    return name


def looks_like_picture(value: object) -> bool:
    """Whether a value could be the path or URL of a picture, by its ending or its scheme."""
    if not isinstance(value, str) or len(value) > 4096:
        return False
    return bool(_URL.match(value)) or is_image_name(spelled(value).rpartition("/")[2])


def fit(name: str, picture: str) -> tuple[int, int, int] | None:
    """How well a (spelled) name fits a picture's path, smaller is better; None where it does not.

    One must be the end of the other, folder by folder: 0 the same, 1 as an end (a name without folders, or behind a
    prefix of another machine), 2 but for case, accents' spelling and spaces, 3 with a name that lacks the ending. Then
    whole paths before ends, and longer ends before shorter ones.
    """
    if name == picture:
        return 0, 0, 0
    ours, theirs = name.split("/"), picture.split("/")
    shared = min(len(ours), len(theirs))
    apart = int(len(ours) != len(theirs))
    ours, theirs = ours[-shared:], theirs[-shared:]
    if ours == theirs:
        return 1, apart, -shared
    ours, theirs = [_folded(part) for part in ours], [_folded(part) for part in theirs]
    if ours == theirs:
        return 2, apart, -shared
    if not is_image_name(ours[-1]) and ours[:-1] == theirs[:-1] and _stem(ours[-1]) == _stem(theirs[-1]):
        return 3, apart, -shared
    return None


class PathIndex:
    """Paths by what may be meant by them: about 30 bytes each beside the text.

    Built once (`add`), then asked: `alike` finds, in a time that does not grow with their number, the paths of which one
    is the end of the other.
    """

    def __init__(self, paths: Iterable[str] = ()) -> None:
        self._text = bytearray()
        self._ends = array("Q")
        self._by_length: dict[
            int, tuple[np.ndarray, np.ndarray]
        ] = {}  # parts (0: all) -> sorted hashes, their positions
        for path in paths:
            self.add(path)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, position: int) -> str:
        start = self._ends[position - 1] if position else 0
        return self._text[start : self._ends[position]].decode("utf-8", "surrogatepass")

    def add(self, path: str) -> None:
        self._text += path.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._text))

    def alike(self, path: str) -> list[int]:
        """The positions of paths that could mean the same file as `path` (at most 100 per ending), in the order added."""
        parts = _key(path)
        found: set[int] = set()
        for length in range(1, len(parts) + 1):
            found.update(self._lookup(0, parts[-length:]))
        found.update(self._lookup(len(parts), parts))
        return sorted(found)

    def _lookup(self, length: int, parts: list[str]) -> list[int]:
        hashes, positions = self._sorted(length)
        wanted = hash("/".join(parts))
        low = int(np.searchsorted(hashes, wanted, side="left"))
        high = min(int(np.searchsorted(hashes, wanted, side="right")), low + _MOST)
        return positions[low:high].tolist() if low < high else []

    def _sorted(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The hashes of the whole paths (0), or of the ends of `length` parts of those that are longer."""
        made = self._by_length.get(length)
        if made is None:
            hashes, positions = array("q"), array("q")
            for position in range(len(self)):
                parts = _key(self[position])
                if not length or len(parts) > length:
                    hashes.append(hash("/".join(parts[-length:])))
                    positions.append(position)
            values = np.frombuffer(hashes, np.int64) if hashes else np.zeros(0, np.int64)
            order = np.argsort(values, kind="stable")
            made = values[order], np.asarray(positions, np.int64)[order]
            self._by_length[length] = made
        return made


def meant(name: str, pictures: PathIndex) -> list[str]:
    """The pictures that a name fits best: one, several (it could mean each of them), or none."""
    best: tuple[int, int, int] | None = None
    found: list[str] = []
    for position in pictures.alike(name):
        picture = pictures[position]
        how = fit(name, picture)
        if how is not None and (best is None or how <= best):
            found = [*found, picture] if how == best else [picture]
            best = how
    return found


def folded(path: str) -> str:
    """What spellings of a path have in common that differ in case, accents or the ending of a picture."""
    return "/".join(_key(path))


def _key(path: str) -> list[str]:
    parts = [_folded(part) for part in path.split("/")]
    parts[-1] = _stem(parts[-1])
    return parts


def _folded(part: str) -> str:
    part = part.strip()
    return part.lower() if part.isascii() else unicodedata.normalize("NFC", part).casefold()


def _stem(part: str) -> str:
    """Without the ending of a picture; of a number, without leading zeros, which spreadsheets drop."""
    stem = part.rpartition(".")[0] if is_image_name(part) else part
    return stem.lstrip("0") or "0" if stem.isascii() and stem.isdigit() else stem
