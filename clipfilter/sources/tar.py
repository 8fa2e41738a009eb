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
import tarfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np

BLOCK = 512
_ZERO = bytes(BLOCK)
_PIECE = 4 << 20
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
    headers = _Headers(read_at, total)
    rows = _Rows(image_extension)
    for raw in headers:
        rows.add(raw)
    return rows.finish(headers, total)


class _Rows:
    """The rows of a tar while its members come by: every instance of a key, of which some become rows."""

    def __init__(self, image_extension: str | None) -> None:
        self._image_extension = image_extension
        self._index = TarIndex()
        self._latest: dict[str, int] = {}  # key -> its newest instance
        self._keys: list[str] = []  # of instances, a superset of the rows
        self._occurrences = array("q")
        self._seen: set[int] = set()  # instance << 32 | extension number
        self._images = array("q")  # per instance the number of its image member
        self._useful = bytearray()  # per instance: has a caption, json or cls member
        self._owner = array("q")  # per member its instance
        self._flat = array("q")  # per member: extension number, start, offset, size
        self._numbers: dict[str, int] = {}  # of extensions
        self._interleaved = False  # members of one key come apart

    def add(self, raw: _Raw) -> None:
        index = self._index
        named = split_name(raw.name)
        if not raw.regular or named is None:
            index.ignored += 1
            return
        key, extension = named
        if extension.rpartition(".")[2] in PICKLE_EXTENSIONS:
            index.ignored += 1
        number = self._numbers.setdefault(extension, len(index.extensions))
        if number == len(index.extensions):
            index.extensions.append(extension)
        picture = is_image(extension, self._image_extension)
        instance = self._latest.get(key, -1)
        if instance >= 0 and instance << 32 | number in self._seen:
            if self._images[instance] < 0 and not picture:
                index.clashes += 1  # a second sidecar before any image: the first is taken
                return
            instance = -1
        if instance < 0:
            instance = self._begin(key)
        elif self._owner[-1] != instance:
            self._interleaved = True
        self._seen.add(instance << 32 | number)
        if picture:
            if self._images[instance] < 0:
                self._images[instance] = len(self._owner)
            else:
                index.clashes += 1
        elif role(extension):
            self._useful[instance] = 1
        self._owner.append(instance)
        self._flat.extend((number, raw.start, raw.offset, raw.size))

    def _begin(self, key: str) -> int:
        """A new instance of a key."""
        earlier = self._latest.get(key)
        instance = self._latest[key] = len(self._keys)
        self._occurrences.append(1 if earlier is None else self._occurrences[earlier] + 1)
        self._keys.append(key)
        self._images.append(-1)
        self._useful.append(0)
        return instance

    def finish(self, headers: _Headers, total: int) -> TarIndex:
        """The index, less the rows that a damaged tar cut short."""
        index, occurrences = self._index, self._occurrences
        rows = np.array(
            [image >= 0 or (self._useful[i] and occurrences[i] == 1) for i, image in enumerate(self._images)],
            dtype=bool,
        )
        index.clashes += sum(1 for i in np.flatnonzero(~rows).tolist() if occurrences[i] > 1)
        if headers.damage is not None:
            index.damaged = True
            unread_from = headers.damage
            for instance in self._incomplete(rows) | self._cut(headers.cut_name):
                rows[instance] = False
                if self._owner[-1] == instance and not self._interleaved:
                    unread_from = min(unread_from, self._flat[4 * self._owner.index(instance) + 1])
            index.bytes_unread = max(0, total - unread_from)
        self._number(rows)
        return index

    def _cut(self, name: bytes | None) -> set[int]:
        """The instance that the member whose data break off belongs to, unless it has that member already."""
        named = split_name(name) if name is not None else None
        if named is None or named[0] not in self._latest:
            return set()
        instance, number = self._latest[named[0]], self._numbers.get(named[1], -1)
        return set() if number >= 0 and instance << 32 | number in self._seen else {instance}

    def _incomplete(self, rows: np.ndarray) -> set[int]:
        """The rows of a damaged tar that the damage cut short, as far as the others tell.

        The last row is incomplete when it lacks a kind of member that every other row has. Where members of one key come
        apart, the same is asked of every row, measured against the first.
        """
        present = np.flatnonzero(rows).tolist()
        if not present:
            return set()
        kind_of = [
            "image" if is_image(name, self._image_extension) else name.rpartition(".")[2]
            for name in self._index.extensions
        ]
        kinds: dict[int, set[str]] = {}
        for member, instance in enumerate(self._owner):
            kinds.setdefault(instance, set()).add(kind_of[self._flat[4 * member]])
        if self._interleaved:
            expected = kinds[present[0]]
            return {instance for instance in present if expected - kinds[instance]}
        last = self._owner[-1]
        if not rows[last]:
            return set()
        others = [kinds[instance] for instance in present if instance != last]
        expected = set.intersection(*others) if others else set()
        return {last} if expected - kinds[last] or "image" not in kinds[last] else set()

    def _number(self, rows: np.ndarray) -> None:
        """Renumber instances as rows and sort the members by row, keeping tar order inside a row."""
        index, owner = self._index, np.asarray(self._owner, np.int64)
        count = int(rows.sum())
        row_of = np.full(len(rows), -1, np.int64)
        row_of[rows] = np.arange(count)
        member_rows = row_of[owner]
        order = np.argsort(member_rows, kind="stable")
        order = order[member_rows[order] >= 0]
        place = np.full(len(owner) + 1, -1, np.int64)  # the last one for instances without an image
        place[order] = np.arange(len(order))
        index.keys = [key for key, wanted in zip(self._keys, rows.tolist(), strict=True) if wanted]
        index.occurrences = array("q", np.asarray(self._occurrences, np.int64)[rows].tolist())
        index.images = array("q", place[np.asarray(self._images, np.int64)[rows]].tolist())
        index.duplicate_keys = sum(1 for number in index.occurrences if number > 1)
        index._members = np.asarray(self._flat, np.int64).reshape(-1, 4)[order]
        index._first = np.searchsorted(member_rows[order], np.arange(count + 1))


def member_name(read_at: ReadAt, member: Member) -> bytes:
    """The full name of a member, from its headers."""
    for raw in _Headers(read_at, member.offset + member.size, member.start):
        return raw.name
    raise OSError(f"the tar header at byte {member.start} is gone")


class _DamageError(Exception):
    """The archive breaks off, or what stands here is no header."""


class _Headers:
    """Every file header from `pos` on whose data are all there.

    At the end `damage` is the first byte that could not be used, None when all was well, and `cut_name` the member whose
    data break off. Archives put end to end (`cat a.tar b.tar`) are read through. A file without the closing zero block
    is taken as damaged: nothing says that it is whole.
    """

    def __init__(self, read_at: ReadAt, total: int, pos: int = 0) -> None:
        self.damage: int | None = None
        self.cut_name: bytes | None = None
        self._read_at = read_at
        self._total = total
        self._pos = self._start = pos  # start: of the first header that speaks of the member
        self._long_name: bytes | None = None
        self._extended: dict[str, bytes] = {}
        self._everywhere: dict[str, bytes] = {}

    def __iter__(self) -> Iterator[_Raw]:
        try:
            while (header := self._next()) is not None:
                size = _number(header[124:136])
                if size is None or size < 0 or not _checksum_holds(header):
                    raise _DamageError
                if header[156:157] in b"LKxgX":
                    self._announce(header[156:157], size)
                elif (raw := self._file(header, size)) is not None:
                    yield raw
        except _DamageError:
            self.damage = min(self._start, self._total)

    def _next(self) -> bytes | None:
        """The next header, None at the end of the archive."""
        ended = False
        while (header := self._read_at(BLOCK, self._pos)) == _ZERO:
            if self._start != self._pos:  # a long name or PAX record that announces nothing
                raise _DamageError
            ended = True
            self._pos += BLOCK
            self._start = self._pos
        if len(header) == BLOCK:
            return header
        if not ended or self._start != self._pos or header.strip(b"\0"):
            raise _DamageError
        return None

    def _announce(self, kind: bytes, size: int) -> None:
        """A header that tells of the next file, or of all: its long name, its PAX records."""
        offset = self._pos + BLOCK
        if size > _SMALL or offset + size > self._total:
            raise _DamageError
        payload = self._read_at(size, offset)
        if kind == b"L":
            self._long_name = payload.split(b"\0", 1)[0]
        elif kind in b"xX":
            self._extended = _pax(payload)
        elif kind == b"g":
            self._everywhere.update(_pax(payload))
        self._pos = offset + _padded(size)
        if kind == b"g" and self._long_name is None and not self._extended:
            self._start = self._pos

    def _file(self, header: bytes, size: int) -> _Raw | None:
        """The file of a header; None for folders."""
        kind, offset = header[156:157], self._pos + BLOCK
        records = {**self._everywhere, **self._extended}
        name = records.get("path") or self._long_name or _plain_name(header)
        regular = kind in b"0\x007" and not any(record.startswith("GNU.sparse") for record in records)
        if kind in b"123456":  # links, devices, folders: whatever their size says, no data follow
            size = 0
        elif "size" in records:
            digits = records["size"]
            if not digits.isdigit() or len(digits) > 18:
                raise _DamageError
            size = int(digits)
        if kind == b"S":
            offset = self._behind_holes(header, offset)
        if offset + size > self._total:
            self.cut_name = name if regular else None
            raise _DamageError
        raw = _Raw(name, self._start, offset, size, regular)
        self._pos = self._start = offset + _padded(size)
        self._long_name, self._extended = None, {}
        return None if kind == b"5" or name.endswith(b"/") else raw

    def _behind_holes(self, header: bytes, offset: int) -> int:
        """Where the data of an old GNU sparse file begin: further maps of its holes precede them."""
        more = header[482]
        while more:
            extra = self._read_at(BLOCK, offset)
            if len(extra) < BLOCK:
                raise _DamageError
            more = extra[504]
            offset += BLOCK
        return offset


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


def write_member(output: BinaryIO, name: str, size: int, pieces: Iterable[bytes]) -> None:
    """Append a file of `size` bytes. Owner and time are zero, so that the same content gives the same bytes."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    output.write(info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape"))
    output.writelines(pieces)
    output.write(bytes(-size % BLOCK))


def write_end(output: BinaryIO) -> None:
    """Close an archive: two empty blocks, filled up to a whole record."""
    output.write(bytes(2 * BLOCK))
    output.write(bytes(-output.tell() % tarfile.RECORDSIZE))


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

    def pieces(self, member: Member) -> Iterator[bytes]:
        """The bytes of a member, some megabytes at a time."""
        for offset in range(member.offset, member.offset + member.size, _PIECE):
            size = min(_PIECE, member.offset + member.size - offset)
            piece = self.read_at(size, offset)
            if len(piece) != size:
                raise OSError(f"the tar ends inside a member at byte {offset}")
            yield piece

    def __del__(self) -> None:
        descriptor, self._descriptor = getattr(self, "_descriptor", -1), -1
        if descriptor >= 0:
            os.close(descriptor)
