"""Our own tar reading: one pass over the headers builds a compact index from row to members; nothing is extracted.

It reads what real datasets hold: ustar, GNU and PAX names, members of one key that come apart, keys that occur twice,
and files that break off anywhere. Row rules (webdataset's, made total):

* the key is the path up to the first dot of the basename, the extension the lower-cased rest; members of one key are a
  sample, and samples are numbered by the first appearance of their key;
* a picture is what has the extension of one, or begins as one does;
* a sample's picture is a row; of several pictures each is a row (or the first, or the one that was asked for), with the
  members that belong to it: those of its own name, else of the shorter one, else all that no other picture claims;
* a key whose image (or whole sample) is already complete and occurs again is another sample of the same key;
* a sample with a caption, json or cls member but no picture is a row whose image is missing;
* every member is a row's picture, a part of a row, or passed over and counted; pickles are never opened.
"""

from __future__ import annotations

import os
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

import numpy as np

from clipfilter import defaults
from clipfilter.sources.contents import HEAD_BYTES, told_by_content
from clipfilter.sources.seen import Reason, Seen

BLOCK = 512
_ZERO = bytes(BLOCK)
_PIECE = 4 << 20
_SMALL = 1 << 20  # a name or PAX record larger than this is taken as damage, not allocated

# fmt: off
IMAGE_EXTENSIONS = frozenset({
    "jpg", "jpeg", "jpe", "jfif", "mpo", "png", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif", "heic",
    "heif", "ico", "pbm", "pgm", "ppm", "pnm", "tga", "jp2", "j2k", "j2c", "jpc", "jpf", "jpx",
})
# fmt: on
CAPTION_EXTENSIONS = ("txt", "caption", "cap", "text")
_IMAGE = "image"  # the kind of member that every sample should have
PICKLE_EXTENSIONS = frozenset(["pkl", "pyd", "pickle", "pck", "pth", "pt", "dill", "joblib"])

ReadAt = Callable[[int, int], bytes]  # (size, offset) -> at most size bytes


class Member(NamedTuple):
    """One file in a tar: its extension, where its headers start, where its data start, and its size in bytes."""

    extension: str
    start: int
    offset: int
    size: int


class RawMember(NamedTuple):
    """One file as an archive lists it; `regular`: it is a file with bytes, no link or device."""

    name: bytes
    start: int
    offset: int
    size: int
    regular: bool


class Wanted(NamedTuple):
    """Which pictures of a sample become rows: those of one extension, or of whatever it has all or the first."""

    extension: str | None = None
    pictures: defaults.Pictures = defaults.PICTURES


_ALL = Wanted()


@dataclass
class TarIndex:
    """Rows of one tar in order of first appearance; a few dozen bytes per member, no image data.

    Row r has key `keys[r]`, is of that key's `occurrences[r]`-th sample, and has the members `members(r)`, in tar order.
    `several[r]`: of a row that is one of several of its sample, the sample's key and what tells the row from the others.
    """

    keys: list[str] = field(default_factory=list)
    occurrences: array[int] = field(default_factory=lambda: array("q"))
    images: array[int] = field(default_factory=lambda: array("q"))  # member number of the image, -1 when there is none
    extensions: list[str] = field(default_factory=list)
    several: dict[int, tuple[str, str]] = field(default_factory=dict)
    damaged: bool = False
    bytes_unread: int = 0
    duplicate_keys: int = 0
    clashes: int = 0
    seen: Seen = field(default_factory=Seen)
    by_content: bool = False  # a picture was told by its content
    _first: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # row -> its first member number
    _own: dict[int, list[int]] = field(default_factory=dict)  # row of several of a sample -> its member numbers
    _members: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.int64))  # extension, start, offset, size

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, row: int) -> list[Member]:
        """The members of a row; what several pictures of one key have in their extensions to tell them apart is left out."""
        own = self._own.get(row)
        part = self._members[slice(self._first[row], self._first[row + 1]) if own is None else own].tolist()
        found = [Member(self.extensions[number], start, offset, size) for number, start, offset, size in part]
        if row not in self.several:
            return found
        picture = self.extensions[int(self._members[self.images[row], 0])]
        return [member._replace(extension=_beside(member.extension, picture)) for member in found]

    def image(self, row: int) -> Member | None:
        number = self.images[row]
        if number < 0:
            return None
        extension, start, offset, size = self._members[number].tolist()
        return Member(self.extensions[extension], start, offset, size)


def split_name(name: bytes) -> tuple[str, str] | None:
    """(key, lower-cased extension, "" for none) of a member name; None for hidden files and what Macs add.

    The key keeps the folder, less a leading "./". Bytes that are not UTF-8 are shown as \\xNN.
    """
    folder, _, base = name.rpartition(b"/")
    stem, _, extension = base.partition(b".")
    if not stem or b"__MACOSX" in folder.split(b"/"):
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


def index_tar(read_at: ReadAt, total: int, wanted: Wanted = _ALL) -> TarIndex:
    """Index a tar of `total` bytes read through `read_at(size, offset)`; damage ends the index, never raises.

    Errors of `read_at` itself (OSError) pass through.
    """
    headers = _Headers(read_at, total)
    samples = _Samples(wanted, read_at)
    for raw in headers:
        samples.add(raw)
    return samples.finish(headers.damage, headers.cut_name, total)


def index_members(members: Iterable[RawMember], read_at: ReadAt, wanted: Wanted = _ALL) -> TarIndex:
    """The index of an archive of another kind, by its list of members; read_at: (size, offset of a member)."""
    samples = _Samples(wanted, read_at)
    for raw in members:
        samples.add(raw)
    return samples.finish(None, None, 0)


# What a member is to its sample.
_PICTURE, _USEFUL, _PART, _PICKLE, _OTHER_PICTURE, _UNSUPPORTED = range(6)
_WHY: dict[int, Reason] = {
    _PICTURE: "other_picture", _USEFUL: "unclaimed", _PART: "unknown_type", _PICKLE: "pickle",
    _OTHER_PICTURE: "other_picture", _UNSUPPORTED: "unsupported",
}  # fmt: skip


class _Samples:
    """The samples of a tar while its members come by, of which some become rows."""

    def __init__(self, wanted: Wanted, read_at: ReadAt) -> None:
        self._wanted = wanted
        self._read_at = read_at
        self._index = TarIndex()
        self._latest: dict[str, int] = {}  # key -> its newest sample
        self._keys: list[str] = []  # of samples
        self._occurrences = array("q")
        self._seen: set[int] = set()  # sample << 32 | extension number
        self._pictures = array("q")  # per sample how many pictures it has that may be rows
        self._kinds = bytearray()  # per member
        self._owner = array("q")  # per member its sample
        self._flat = array("q")  # per member: extension number, start, offset, size
        self._numbers: dict[str, int] = {}  # of extensions
        self._interleaved = False  # members of one key come apart

    def add(self, raw: RawMember) -> None:
        index = self._index
        named = split_name(raw.name)
        if not raw.regular or named is None:
            index.seen.pass_over("hidden" if raw.regular else "not_a_file", raw.name.decode("utf-8", "replace"))
            return
        key, extension = named
        kind = self._kind(extension, raw)
        number = self._numbers.setdefault(extension, len(index.extensions))
        if number == len(index.extensions):
            index.extensions.append(extension)
        sample = self._latest.get(key, -1)
        if sample >= 0 and sample << 32 | number in self._seen:
            if not self._pictures[sample] and kind != _PICTURE:
                index.clashes += 1  # a second sidecar before any image: the first is taken
                index.seen.pass_over(_WHY[kind], member_key(key, extension))
                return
            sample = -1
        if sample < 0:
            sample = self._begin(key)
        elif self._owner[-1] != sample:
            self._interleaved = True
        self._seen.add(sample << 32 | number)
        self._pictures[sample] += kind == _PICTURE
        self._kinds.append(kind)
        self._owner.append(sample)
        self._flat.extend((number, raw.start, raw.offset, raw.size))

    def _kind(self, extension: str, raw: RawMember) -> int:
        last = extension.rpartition(".")[2]
        if self._wanted.extension is not None and extension == self._wanted.extension:
            return _PICTURE
        picture = _PICTURE if self._wanted.extension is None else _OTHER_PICTURE
        if last in IMAGE_EXTENSIONS:
            return picture
        useful = bool(role(extension))
        content = told_by_content(self._read_at(min(raw.size, HEAD_BYTES), raw.offset), text=useful)
        if content == "picture":
            self._index.by_content = True
            return picture
        if content == "unsupported":
            return _UNSUPPORTED
        return _USEFUL if useful else _PICKLE if last in PICKLE_EXTENSIONS else _PART

    def _begin(self, key: str) -> int:
        """A new sample of a key."""
        earlier = self._latest.get(key)
        sample = self._latest[key] = len(self._keys)
        self._occurrences.append(1 if earlier is None else self._occurrences[earlier] + 1)
        self._keys.append(key)
        self._pictures.append(0)
        return sample

    def finish(self, damage: int | None, cut_name: bytes | None, total: int) -> TarIndex:
        """The index, less the rows that a damaged tar cut short. damage, cut_name: as in `_Headers`."""
        index, count = self._index, len(self._keys)
        owner, kinds = np.asarray(self._owner, np.int64), np.frombuffer(self._kinds, np.uint8)
        pictures, first = np.asarray(self._pictures, np.int64), np.asarray(self._occurrences, np.int64) == 1
        rows = (pictures > 0) | (first & (np.bincount(owner[kinds == _USEFUL], minlength=count) > 0))
        index.clashes += int((~rows & ~first).sum())
        others = np.bincount(owner[kinds == _OTHER_PICTURE], minlength=count)
        order = np.argsort(owner, kind="stable")
        bounds = np.searchsorted(owner[order], np.arange(count + 1))
        several = {
            sample: self._split(order[bounds[sample] : bounds[sample + 1]].tolist())
            for sample in np.flatnonzero((pictures > 1) | ((pictures > 0) & (others > 0))).tolist()
        }
        if damage is not None:
            index.damaged = True
            unread_from = damage
            for sample in self._incomplete(rows) | self._cut(cut_name):
                if sample in several:
                    unread_from = min(unread_from, self._drop_short(several[sample], cut_name))
                    continue
                rows[sample] = False
                if self._owner[-1] == sample and not self._interleaved:
                    unread_from = min(unread_from, self._flat[4 * self._owner.index(sample) + 1])
            index.bytes_unread = max(0, total - unread_from)
        used = rows[owner] & (kinds != _OTHER_PICTURE) & (kinds != _UNSUPPORTED)
        for sample, parts in several.items():
            used[order[bounds[sample] : bounds[sample + 1]]] = False
            used[[number for part in parts for number in part.members]] = True
        self._number(rows, several, order[used[order]])
        self._account(rows, used, cut_name)
        return index

    def _split(self, members: list[int]) -> list[_Part]:
        """The rows of a sample with several pictures, or with others than the one that was asked for."""
        extensions = {number: self._index.extensions[self._flat[4 * number]] for number in members}
        pictures = [number for number in members if self._kinds[number] == _PICTURE]
        plain = [number for number in pictures if "." not in extensions[number]]
        if self._wanted.pictures == "first":
            self._index.clashes += len(pictures) - 1
            pictures = plain = (plain or pictures)[:1]
        sidecars = [number for number in members if self._kinds[number] in (_USEFUL, _PART, _PICKLE)]
        shared = _shared(pictures, sidecars, extensions)
        alone = pictures if len(pictures) == 1 else plain if len(plain) == 1 else []
        return [
            _Part(number, "" if number in alone else extensions[number], sorted([number, *belonging]))
            for number, belonging in zip(pictures, shared, strict=True)
        ]

    def _cut(self, name: bytes | None) -> set[int]:
        """The sample that the member whose data break off belongs to, unless it has that member already."""
        named = split_name(name) if name is not None else None
        if named is None or named[0] not in self._latest:
            return set()
        sample, number = self._latest[named[0]], self._numbers.get(named[1], -1)
        return set() if number >= 0 and sample << 32 | number in self._seen else {sample}

    def _incomplete(self, rows: np.ndarray) -> set[int]:
        """The samples of a damaged tar that the damage cut short, as far as the others tell.

        The last one is incomplete when it lacks a kind of member that every other has. Where members of one key come
        apart, the same is asked of every sample, measured against the first.
        """
        present = np.flatnonzero(rows).tolist()
        if not present:
            return set()
        kinds: dict[int, set[str]] = {}
        for member, sample in enumerate(self._owner):
            kinds.setdefault(sample, set()).add(self._kind_of(member))
        if self._interleaved:
            expected = kinds[present[0]]
            return {sample for sample in present if expected - kinds[sample]}
        last = self._owner[-1]
        if not rows[last]:
            return set()
        if self._pictures[last] > 1:
            return {last}  # which of its rows are is told by the rows
        others = [kinds[sample] for sample in present if sample != last]
        expected = set.intersection(*others) if others else set()
        return {last} if expected - kinds[last] or _IMAGE not in kinds[last] else set()

    def _kind_of(self, member: int) -> str:
        if self._kinds[member] == _PICTURE:
            return _IMAGE
        return self._index.extensions[self._flat[4 * member]].rpartition(".")[2]

    def _drop_short(self, parts: list[_Part], cut: bytes | None) -> int:
        """Take out the row whose member breaks off or, of the last picture's, what lacks a kind that the others have.

        Returns the byte from which on nothing was read then (a large number where nothing was taken out).
        """
        named = split_name(cut) if cut is not None else None
        kinds = [{self._kind_of(number) for number in part.members} for part in parts]
        expected = set.intersection(*kinds[:-1]) if len(kinds) > 1 else set()
        short = [len(parts) - 1] if expected - kinds[-1] else []
        if named is not None and not is_image(named[1], self._wanted.extension):
            stem = named[1].rpartition(".")[0]
            of = [self._index.extensions[self._flat[4 * part.picture]] for part in parts]
            short = [number for number, extension in enumerate(of) if stem in _stems(extension)] or short
        gone = [parts.pop(number) for number in reversed(short)]
        return min((self._flat[4 * part.picture + 1] for part in gone), default=2**62)

    def _number(self, rows: np.ndarray, several: dict[int, list[_Part]], used: np.ndarray) -> None:
        """Number the rows, and sort the members by sample, keeping tar order inside a sample. used: member numbers."""
        index = self._index
        place = np.full(len(self._owner) + 1, -1, np.int64)  # the last one for rows without an image
        place[used] = np.arange(len(used))
        counts = rows.astype(np.int64)
        counts[list(several)] = [len(parts) for parts in several.values()]
        samples = np.repeat(np.arange(len(rows)), counts)
        kinds, owner = np.frombuffer(self._kinds, np.uint8), np.asarray(self._owner, np.int64)
        image = np.full(len(rows), -1, np.int64)
        pictures = np.flatnonzero(kinds == _PICTURE)
        image[owner[pictures]] = pictures
        images = place[image[samples]]
        index.keys = [self._keys[sample] for sample in samples.tolist()]
        for sample, parts in several.items():
            row = int(np.searchsorted(samples, sample))
            for at, part in enumerate(parts, row):
                images[at] = place[part.picture]
                index._own[at] = place[part.members].tolist()
                if part.suffix:
                    index.several[at] = (self._keys[sample], part.suffix)
                    index.keys[at] = member_key(self._keys[sample], part.suffix)
        index.images = array("q", images.tolist())
        index.occurrences = array("q", np.asarray(self._occurrences, np.int64)[samples].tolist())
        index.duplicate_keys = sum(1 for number in index.occurrences if number > 1)
        index._members = np.asarray(self._flat, np.int64).reshape(-1, 4)[used]
        index._first = np.append(np.searchsorted(owner[used], samples), len(used))

    def _account(self, rows: np.ndarray, used: np.ndarray, cut_name: bytes | None) -> None:
        """What became of the members: of a row without a picture one of them stands for it."""
        index, seen = self._index, self._index.seen
        seen.rows = len(index)
        pickles = 0
        for number in np.flatnonzero(~used | (np.frombuffer(self._kinds, np.uint8) == _PICKLE)).tolist():
            kind, sample = self._kinds[number], self._owner[number]
            extension, _, _, size = self._flat[4 * number : 4 * number + 4]
            why = _WHY[kind]
            if kind == _PART:
                why = "unclaimed" if rows[sample] else "unknown_type" if size else "empty"
            elif (
                index.damaged
                and kind in (_PICTURE, _USEFUL)
                and not (rows[sample] and self._wanted.pictures == "first")
            ):
                why = "unread"
            pickles += bool(used[number])
            seen.pass_over(why, member_key(self._keys[sample], index.extensions[extension]))
        seen.parts = int(used.sum()) - pickles - seen.rows
        if cut_name is not None:
            seen.pass_over("unread", cut_name.decode("utf-8", "replace"))


class _Part(NamedTuple):
    """A row of a sample with several pictures: its picture, what tells it from the others, and its member numbers."""

    picture: int
    suffix: str
    members: list[int]


def member_key(key: str, extension: str) -> str:
    return f"{key}.{extension}" if extension else key


def _stems(extension: str) -> list[str]:
    """The names under which sidecars of a picture may go, nearest first: `x.y.jpg`, `x.y`, `x`, ""."""
    stems = [extension]
    while stems[-1]:
        stems.append(stems[-1].rpartition(".")[0])
    return stems


def _beside(extension: str, picture: str) -> str:
    """`txt` of `5x_0.txt` beside `5x_0.jpg`."""
    stem = next((f"{stem}." for stem in _stems(picture) if stem != extension and extension.startswith(f"{stem}.")), "")
    return extension.removeprefix(stem)


def _shared(pictures: Sequence[int], sidecars: Sequence[int], extensions: dict[int, str]) -> list[list[int]]:
    """Which sidecars of a sample belong to each of its pictures (all are member numbers).

    Of each kind (the last part of the extension) the one of the nearest name: `5x_0.txt` to `5x_0.jpg`, `txt` to all
    that have none nearer. One that has another name than all pictures belongs to all when it is the only one of its kind.
    """
    by_stem: dict[str, dict[str, int]] = {}
    named = {stem for number in pictures for stem in _stems(extensions[number])}
    kinds = Counter(extensions[number].rpartition(".")[2] for number in sidecars)
    for number in sidecars:
        stem, _, last = extensions[number].rpartition(".")
        if stem in named:
            by_stem.setdefault(stem, {})[last] = number
        elif kinds[last] == 1:
            by_stem.setdefault("", {})[last] = number
    found = []
    for picture in pictures:
        nearest: dict[str, int] = {}
        for stem in _stems(extensions[picture]):
            nearest = {**by_stem.get(stem, {}), **nearest}
        found.append(list(nearest.values()))
    return found


def written_extension(name: bytes, member: Member) -> str:
    """A member's extension as it is written in its name."""
    extension = name.rpartition(b"/")[2].partition(b".")[2].decode("utf-8", "surrogateescape")
    written = extension[max(0, len(extension) - len(member.extension)) :]
    return written if written.lower() == member.extension else extension


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

    def __iter__(self) -> Iterator[RawMember]:
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

    def _file(self, header: bytes, size: int) -> RawMember | None:
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
        raw = RawMember(name, self._start, offset, size, regular)
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

    def __init__(self, descriptor: int, total: int, wanted: Wanted = _ALL) -> None:
        self._descriptor = descriptor
        self.total = total
        self.index = index_tar(self.read_at, total, wanted)

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

    def name(self, member: Member) -> bytes:
        """The full name of a member, from its headers."""
        for raw in _Headers(self.read_at, member.offset + member.size, member.start):
            return raw.name
        raise OSError(f"the tar header at byte {member.start} is gone")

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
