"""Our own tar reading: one pass over the headers builds a compact index from row to members; nothing is extracted.

It reads what real datasets hold: ustar, GNU and PAX names, members of one key that come apart, keys that occur twice,
and files that break off anywhere. Row rules (webdataset's, made total):

* the key is the path up to the first dot of the basename, the extension the lower-cased rest;
* rows are numbered by the first appearance of their key;
* a key whose image (or whole sample) is already complete and occurs again is a new row of the same key;
* a second image of another extension under one key is a clash: the first is taken;
* a key with a caption, json or cls member but no image is a row whose image is missing;
* links, devices, sparse files and hidden files are ignored and counted; pickles are never opened.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

BLOCK = 512
_ZERO = bytes(BLOCK)
_SMALL = 1 << 20  # a name or PAX record larger than this is taken as damage, not allocated

IMAGE_EXTENSIONS = frozenset(
    {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "heic", "heif", "jp2"}
)
CAPTION_EXTENSIONS = ("txt", "caption", "cap", "text")
PICKLE_EXTENSIONS = frozenset(["pkl", "pyd", "pickle", "pck", "pth", "pt", "dill", "joblib"])

ReadAt = Callable[[int, int], bytes]  # (size, offset) -> at most size bytes


class Member(NamedTuple):
    """One file in a tar: its extension, where its headers start, where its data start, and its size in bytes."""

    extension: str
    start: int
    offset: int
    size: int


class _Raw(NamedTuple):
    name: bytes
    start: int
    offset: int
    size: int
    regular: bool


@dataclass
class _Walk:
    """How a pass over the headers ended: `damage` is the first byte that could not be used, None when all was well."""

    total: int
    damage: int | None = None
    cut_name: bytes | None = None  # the member whose data break off


@dataclass
class TarIndex:
    """Rows of one tar in order of first appearance; a few dozen bytes per member, no image data.

    Row r has key `keys[r]`, is that key's `occurrences[r]`-th row, and has the members `members(r)`, in tar order.
    """

    keys: list[str] = field(default_factory=list)
    occurrences: array[int] = field(default_factory=lambda: array("q"))
    images: array[int] = field(default_factory=lambda: array("q"))  # member number of the image, -1 when there is none
    extensions: list[str] = field(default_factory=list)
    damaged: bool = False
    bytes_unread: int = 0
    duplicate_keys: int = 0
    clashes: int = 0
    ignored: int = 0
    _first: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # row -> its first member number
    _members: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int64))  # extension, start, offset, size

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, row: int) -> list[Member]:
        part = self._members[self._first[row] : self._first[row + 1]].tolist()
        return [Member(self.extensions[number], start, offset, size) for number, start, offset, size in part]

    def image(self, row: int) -> Member | None:
        number = self.images[row]
        if number < 0:
            return None
        extension, start, offset, size = self._members[number].tolist()
        return Member(self.extensions[extension], start, offset, size)


def split_name(name: bytes) -> tuple[str, str] | None:
    """(key, lower-cased extension) of a member name; None for names webdataset passes over and for hidden files.

    The key keeps the folder, less a leading "./". Bytes that are not UTF-8 are shown as \\xNN.
    """
    folder, _, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    if not stem or not dot or b"__MACOSX" in folder.split(b"/"):
        return None
    key = (folder + b"/" + stem if folder else stem).removeprefix(b"./")
    return key.decode("utf-8", "backslashreplace"), extension.decode("utf-8", "backslashreplace").lower()


def is_image(extension: str, image_extension: str | None = None) -> bool:
    """Whether a member of this extension is the image; `image_extension` names the one and only."""
    if image_extension is not None:
        return extension == image_extension
    return extension.rpartition(".")[2] in IMAGE_EXTENSIONS


def role(extension: str) -> str:
    """ "caption", "json", "cls" or "" for a member that is not an image."""
    last = extension.rpartition(".")[2]
    if last in CAPTION_EXTENSIONS:
        return "caption"
    return last if last in ("json", "cls") else ""


def index_tar(read_at: ReadAt, total: int, image_extension: str | None = None) -> TarIndex:
    """Index a tar of `total` bytes read through `read_at(size, offset)`; damage ends the index, never raises.

    Errors of `read_at` itself (OSError) pass through.
    """
    walk = _Walk(total)
    index = TarIndex()
    latest: dict[str, int] = {}  # key -> its newest instance
    keys: list[str] = []  # of instances, a superset of the rows
    occurrences = array("q")
    seen: set[int] = set()  # instance << 32 | extension number
    image_of = array("q")  # per instance the number of its image member
    useful = bytearray()  # per instance: has a caption, json or cls member
    owner = array("q")  # per member its instance
    flat = array("q")  # per member: extension number, start, offset, size
    numbers: dict[str, int] = {}
    interleaved = False

    for raw in _members(read_at, walk):
        named = split_name(raw.name)
        if not raw.regular or named is None:
            index.ignored += 1
            continue
        key, extension = named
        if extension.rpartition(".")[2] in PICKLE_EXTENSIONS:
            index.ignored += 1
        number = numbers.get(extension)
        if number is None:
            number = numbers[extension] = len(index.extensions)
            index.extensions.append(extension)
        picture = is_image(extension, image_extension)
        instance = latest.get(key, -1)
        if instance >= 0 and instance << 32 | number in seen:
            if image_of[instance] < 0 and not picture:
                index.clashes += 1  # a second sidecar before any image: the first is taken
                continue
            instance = -1
        if instance < 0:
            instance = len(keys)
            occurrences.append(occurrences[latest[key]] + 1 if key in latest else 1)
            latest[key] = instance
            keys.append(key)
            image_of.append(-1)
            useful.append(0)
        elif owner[-1] != instance:
            interleaved = True
        seen.add(instance << 32 | number)
        if picture:
            if image_of[instance] < 0:
                image_of[instance] = len(owner)
            else:
                index.clashes += 1
        elif role(extension):
            useful[instance] = 1
        owner.append(instance)
        flat.extend((number, raw.start, raw.offset, raw.size))

    rows = np.array([image_of[i] >= 0 or (useful[i] and occurrences[i] == 1) for i in range(len(keys))], dtype=bool)
    index.clashes += sum(1 for i in range(len(keys)) if not rows[i] and occurrences[i] > 1)
    if walk.damage is not None:
        index.damaged = True
        cut = _incomplete(index.extensions, image_extension, rows, owner, flat, interleaved)
        if walk.cut_name is not None and (named := split_name(walk.cut_name)) is not None:
            instance = latest.get(named[0], -1)
            number = numbers.get(named[1], -1)
            if instance >= 0 and not (number >= 0 and instance << 32 | number in seen):
                cut.add(instance)
        unread_from = walk.damage
        for instance in cut:
            rows[instance] = False
            if owner[-1] == instance and not interleaved:
                unread_from = min(unread_from, flat[4 * owner.index(instance) + 1])
        index.bytes_unread = max(0, total - unread_from)
    _finish(index, keys, occurrences, image_of, rows, owner, flat)
    return index


def _incomplete(
    extensions: list[str],
    image_extension: str | None,
    rows: np.ndarray,
    owner: array[int],
    flat: array[int],
    interleaved: bool,
) -> set[int]:
    """The rows of a damaged tar that the damage cut short, as far as the others tell.

    The last row is incomplete when it lacks a kind of member that every other row has. Where members of one key come
    apart, the same is asked of every row, measured against the first.
    """
    present = np.flatnonzero(rows).tolist()
    if not present:
        return set()
    kind_of = ["image" if is_image(name, image_extension) else name.rpartition(".")[2] for name in extensions]
    kinds: dict[int, set[str]] = {}
    for member, instance in enumerate(owner):
        kinds.setdefault(instance, set()).add(kind_of[flat[4 * member]])
    if interleaved:
        expected = kinds[present[0]]
        return {instance for instance in present if expected - kinds[instance]}
    last = owner[-1]
    if not rows[last]:
        return set()
    others = [kinds[instance] for instance in present if instance != last]
    expected = set.intersection(*others) if others else set()
    return {last} if expected - kinds[last] or "image" not in kinds[last] else set()


def _finish(
    index: TarIndex,
    keys: list[str],
    occurrences: array[int],
    image_of: array[int],
    rows: np.ndarray,
    owner: array[int],
    flat: array[int],
) -> None:
    """Renumber instances as rows and sort the members by row, keeping tar order inside a row."""
    count = int(rows.sum())
    row_of = np.full(len(keys) + 1, -1, np.int64)
    row_of[: len(keys)][rows] = np.arange(count)
    member_rows = row_of[np.asarray(owner, np.int64)] if len(owner) else np.zeros(0, np.int64)
    order = np.argsort(member_rows, kind="stable")
    order = order[member_rows[order] >= 0]
    place = np.full(len(owner) + 1, -1, np.int64)
    place[order] = np.arange(len(order))
    index.keys = [key for key, wanted in zip(keys, rows.tolist(), strict=True) if wanted]
    index.occurrences = array("q", np.asarray(occurrences, np.int64)[rows].tolist() if len(keys) else [])
    index.images = array("q", place[np.asarray(image_of, np.int64)[rows]].tolist() if len(keys) else [])
    index.duplicate_keys = sum(1 for number in index.occurrences if number > 1)
    index._members = np.asarray(flat, np.int64).reshape(-1, 4)[order]
    index._first = np.searchsorted(member_rows[order], np.arange(count + 1))


def member_name(read_at: ReadAt, member: Member) -> bytes:
    """The full name of a member, from its headers."""
    walk = _Walk(member.offset + member.size)
    for raw in _members(read_at, walk, member.start):
        return raw.name
    raise OSError(f"the tar header at byte {member.start} is gone")


def _members(read_at: ReadAt, walk: _Walk, pos: int = 0) -> Iterator[_Raw]:
    """Every file header from `pos` on whose data are all there; sets `walk.damage` where the archive breaks off.

    Archives put end to end (`cat a.tar b.tar`) are read through. A file without the closing zero block is taken as
    damaged: nothing says that it is whole.
    """
    start = pos
    ended = False
    long_name: bytes | None = None
    extended: dict[str, bytes] = {}
    everywhere: dict[str, bytes] = {}

    while True:
        header = read_at(BLOCK, pos)
        if len(header) < BLOCK:
            if not ended or start != pos or header.strip(b"\0"):
                walk.damage = min(start, walk.total)
            return
        if header == _ZERO:
            if start != pos:  # a long name or PAX record that announces nothing
                walk.damage = start
                return
            ended = True
            pos += BLOCK
            start = pos
            continue
        size = _number(header[124:136])
        if size is None or size < 0 or not _checksum_holds(header):
            walk.damage = start
            return
        ended = False
        kind = header[156:157]
        offset = pos + BLOCK
        if kind in b"LKxgX":
            if size > _SMALL or offset + size > walk.total:
                walk.damage = start
                return
            payload = read_at(size, offset)
            if kind == b"L":
                long_name = payload.split(b"\0", 1)[0]
            elif kind in b"xX":
                extended = _pax(payload)
            elif kind == b"g":
                everywhere.update(_pax(payload))
            pos = offset + _padded(size)
            if kind == b"g" and long_name is None and not extended:
                start = pos
            continue

        records = {**everywhere, **extended}
        name = records.get("path") or long_name or _plain_name(header)
        regular = kind in b"0\x007"
        if any(record.startswith("GNU.sparse") for record in records):
            regular = False
        if kind in b"123456":  # links, devices, folders: whatever their size says, no data follow
            size = 0
        elif "size" in records:
            digits = records["size"]
            if not digits.isdigit() or len(digits) > 18:
                walk.damage = start
                return
            size = int(digits)
        if kind == b"S":  # old GNU sparse: further maps of the holes precede the data
            more = header[482]
            while more:
                extra = read_at(BLOCK, offset)
                if len(extra) < BLOCK:
                    walk.damage = start
                    return
                more = extra[504]
                offset += BLOCK
        if offset + size > walk.total:
            walk.damage = start
            walk.cut_name = name if regular else None
            return
        if kind != b"5" and not name.endswith(b"/"):
            yield _Raw(name, start, offset, size, regular)
        pos = offset + _padded(size)
        start = pos
        long_name = None
        extended = {}


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _plain_name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _number(text: bytes) -> int | None:
    """A numeric header field: octal digits, or GNU's base-256 for large values; None when it is neither."""
    if text[0] in (0x80, 0xFF):
        value = int.from_bytes(text[1:], "big")
        return value if text[0] == 0x80 else value - 256 ** (len(text) - 1)
    digits = text.split(b"\0", 1)[0].strip()
    try:
        return int(digits or b"0", 8)
    except ValueError:
        return None


def _checksum_holds(header: bytes) -> bool:
    stored = _number(header[148:156])
    total = sum(header) - sum(header[148:156]) + 256
    if stored == total:
        return True
    # Some old writers summed signed bytes.
    return stored == total - 256 * sum(1 for byte in header[:148] + header[156:] if byte > 127)


def _pax(payload: bytes) -> dict[str, bytes]:
    """The records of a PAX header ("LENGTH KEY=VALUE\\n" each); whatever cannot be read is left out."""
    records: dict[str, bytes] = {}
    pos = 0
    while pos < len(payload):
        space = payload.find(b" ", pos, pos + 12)
        if space < 0 or not payload[pos:space].isdigit():
            break
        length = int(payload[pos:space])
        if length <= space - pos + 1:
            break
        name, equals, value = payload[space + 1 : pos + length - 1].partition(b"=")
        if equals:
            records[name.decode("utf-8", "replace")] = value
        pos += length
    return records


class TarFile:
    """An open tar on local disk with its index; closed when nobody holds it any more. Safe to share among threads."""

    def __init__(self, descriptor: int, total: int, image_extension: str | None = None) -> None:
        self._descriptor = descriptor
        self.total = total
        self.index = index_tar(self.read_at, total, image_extension)

    def read_at(self, size: int, offset: int) -> bytes:
        """At most `size` bytes from `offset`; fewer only at the end of the file."""
        data = os.pread(self._descriptor, size, offset)
        if len(data) == size or not data:
            return data
        parts = [data]
        got = len(data)
        while got < size and (data := os.pread(self._descriptor, size - got, offset + got)):
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def read(self, member: Member) -> bytes:
        data = self.read_at(member.size, member.offset)
        if len(data) != member.size:
            raise OSError(f"the tar ends inside a member at byte {member.offset}")
        return data

    def __del__(self) -> None:
        descriptor, self._descriptor = getattr(self, "_descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)
