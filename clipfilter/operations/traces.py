"""What a row is recognised by in any bytes: its uid, its key, its texts and its pictures; and the search for them."""

from __future__ import annotations

import base64
import bz2
import contextlib
import gzip
import hashlib
import html
import json
import lzma
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any, Literal
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter.storage import read_chunks

Kind = Literal["uid", "key", "caption", "picture"]

_CHARACTERS = 64  # of a text that is longer: its beginning tells it from others, also where a page has cut it
#: Bytes of a text, and digits of a number, below which it is found everywhere by chance.
LEAST = 5
LEAST_DIGITS = 8
_DEEPEST = 4  # files within files
_MOST_UNPACKED = 64 << 30  # bytes of one compressed file
_PAGE = 256 << 20  # bytes of a text file in which data URIs are looked for
_DATA_URI = re.compile(rb"base64,([A-Za-z0-9+/]{40,}={0,2})")
_WORD = frozenset(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass
class Traces:
    """What rows are recognised by. words: texts of each kind, as they are; pictures: sha256 of encoded pictures, hex."""

    words: dict[Kind, set[str]] = field(default_factory=lambda: {"uid": set(), "key": set(), "caption": set()})
    pictures: set[str] = field(default_factory=set)

    def add(self, rows: pa.Table) -> None:
        """Take up annotated, scored or failed rows: their uids, keys, captions, further sentences and pictures."""
        self.words["uid"] |= _texts(rows, cf.UID)
        for key in _texts(rows, cf.KEY):
            base = key.rpartition("/")[2]
            # A table may call a picture by less than its path.
            self.words["key"] |= {key, base, *(name.rpartition(".")[0] for name in (key, base) if "." in name)}
        self.words["caption"] |= _texts(rows, cf.CAPTION)
        for name in rows.column_names:
            if not name.startswith(cf.PREFIX):
                self.words["caption"] |= {text for text in _strings(rows[name]) if _is_sentence(text)}
        self.pictures |= _texts(rows, cf.SHA256)

    def update(self, other: Traces) -> None:
        for kind, texts in other.words.items():
            self.words[kind] |= texts
        self.pictures |= other.pictures

    def needles(self) -> dict[bytes, Kind]:
        """What to look for in bytes: each text as UTF-8, and as JSON, HTML, CSV and URLs write it."""
        found: dict[bytes, Kind] = {}
        for kind, texts in self.words.items():
            for text in texts:
                found |= dict.fromkeys(_spellings(text), kind)
        found |= {digest.encode(): "picture" for digest in self.pictures}
        for uid in self.words["uid"]:
            if re.fullmatch("[0-9a-f]{32}", uid):  # as DataComp's subsets hold it
                found[struct.pack("<QQ", int(uid[:16], 16), int(uid[16:], 16))] = "uid"
        return found

    def too_short(self) -> int:
        """How many texts are too short to be looked for in bytes."""
        return sum(not _spellings(text) for texts in self.words.values() for text in texts)

    def to_json(self) -> dict[str, list[str]]:
        return {**{str(kind): sorted(texts) for kind, texts in self.words.items()}, "pictures": sorted(self.pictures)}

    @staticmethod
    def from_json(value: Mapping[str, Iterable[str]]) -> Traces:
        words: dict[Kind, set[str]] = {
            "uid": set(value["uid"]),
            "key": set(value["key"]),
            "caption": set(value["caption"]),
        }
        return Traces(words, set(value["pictures"]))


def _texts(rows: pa.Table, column: str) -> set[str]:
    return {str(text) for text in rows[column].to_pylist() if text} if column in rows.column_names else set()


def _strings(column: pa.ChunkedArray) -> Iterator[str]:
    for chunk in column.chunks:
        for leaf in _leaves(chunk):
            if _is_text(leaf.type):
                yield from (text for text in leaf.to_pylist() if text)


def _is_sentence(text: str) -> bool:
    """Words for people, rather than a type, an address or a name that many rows may have."""
    return len(text) >= LEAST_DIGITS and (any(letter.isspace() for letter in text) or not text.isascii())


def _spellings(text: str) -> set[bytes]:
    text = text.strip()[:_CHARACTERS].strip()
    if len(text.encode("utf-8", "surrogatepass")) < (LEAST_DIGITS if text.isdecimal() else LEAST):
        return set()
    forms = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], text.replace('"', '""')}
    forms |= {html.escape(text), html.escape(text).replace("&quot;", "&#34;").replace("&#x27;", "&#39;")}
    return {form.encode("utf-8", "surrogatepass") for form in forms} | {quote(text, errors="replace").encode()}


class Matcher:
    """Finds many byte strings (of 5 bytes or more) in one pass, wherever they are not part of a longer word."""

    def __init__(self, needles: Mapping[bytes, Kind]) -> None:
        self.needles = needles
        self.longest = max(map(len, needles), default=0)
        self._pairs = np.zeros(1 << 16, bool)
        self._by_head: dict[bytes, list[int]] = {}
        for needle in needles:
            self._pairs[needle[0] << 8 | needle[1]] = True
            lengths = self._by_head.setdefault(needle[:4], [])
            if len(needle) not in lengths:
                lengths.append(len(needle))
        self._heads = np.sort(np.frombuffer(b"".join(self._by_head), ">u4").astype(np.uint32))

    def find(self, data: bytes, *, first: bool = True, last: bool = True) -> set[bytes]:
        """The needles in `data`. first, last: whether something may stand before or behind it that is searched too."""
        found: set[bytes] = set()
        if len(data) < LEAST or not self.needles:
            return found
        for at in self._candidates(data):
            if at == 0 and not first:
                continue
            for length in self._by_head.get(data[at : at + 4], ()):
                end = at + length
                needle = data[at:end]
                if needle in self.needles and (end < len(data) or last) and _is_whole(data, at, end):
                    found.add(needle)
        return found

    def _candidates(self, data: bytes) -> Iterator[int]:
        """Where the first four bytes may be those of a needle."""
        for start in (0, 1):
            pairs = np.frombuffer(data, ">u2", (len(data) - start) // 2, start)
            places = np.flatnonzero(self._pairs.take(pairs[:-1]))
            heads = pairs[places].astype(np.uint32) << 16 | pairs[places + 1]
            known = self._heads[np.searchsorted(self._heads[:-1], heads)] == heads
            yield from (places[known] * 2 + start).tolist()


def _is_whole(data: bytes, start: int, end: int) -> bool:
    before = start and data[start] in _WORD and data[start - 1] in _WORD
    return not before and not (end < len(data) and data[end] in _WORD and data[end - 1] in _WORD)


@dataclass
class Searched:
    """One file: sha256 and bytes of it as it is; what of which kind was found in it; whether all of it could be read."""

    sha256: str
    size: int
    found: set[Kind]
    problem: str | None = None


class Search:
    """Looks for traces in files: in the bytes as they are, and in what archives, compressed files, tables and pages hold."""

    def __init__(self, traces: Traces, shared: Iterable[bytes] = (), thumbnails: Iterable[str] = ()) -> None:
        """shared: needles (`shared_with`) that rows have which stay. thumbnails: sha256 of pictures made of the rows' own."""
        leave = set(shared)
        self._matcher = Matcher({needle: kind for needle, kind in traces.needles().items() if needle not in leave})
        self._pictures = {digest for digest in traces.pictures if digest.encode() not in leave} | set(thumbnails)

    def name(self, name: str) -> set[Kind]:
        """What the name of a file gives away."""
        return self._kinds(self._matcher.find(name.encode("utf-8", "surrogateescape")))

    def file(self, handle: IO[bytes]) -> Searched:
        """Search a file, opened to be read and sought in."""
        found: set[Kind] = set()
        digest, size = self._bytes(handle, found)
        problem = None
        try:
            self._within(handle, found, 1)
        except (
            OSError,
            EOFError,
            ValueError,
            tarfile.TarError,
            zipfile.BadZipFile,
            pa.ArrowException,
            lzma.LZMAError,
        ) as error:
            problem = f"{type(error).__name__}: {error}"
        return Searched(digest, size, found, problem)

    def _kinds(self, needles: Iterable[bytes]) -> set[Kind]:
        return {self._matcher.needles[needle] for needle in needles}

    def _bytes(self, handle: IO[bytes], found: set[Kind]) -> tuple[str, int]:
        """sha256 and size of the rest of a file, its bytes searched on the way."""
        digest, size, tail, overlap = hashlib.sha256(), 0, b"", self._matcher.longest + 1
        chunks = read_chunks(handle)
        chunk = next(chunks, b"")
        while chunk:
            after = next(chunks, b"")
            digest.update(chunk)
            data = tail + chunk
            found |= self._kinds(self._matcher.find(data, first=size == 0, last=not after))
            size += len(chunk)
            tail, chunk = data[-overlap:], after
        if digest.hexdigest() in self._pictures:
            found.add("picture")
        return digest.hexdigest(), size

    def _within(self, handle: IO[bytes], found: set[Kind], depth: int) -> None:
        """Search what the file holds in another form than its own bytes."""
        handle.seek(0)
        head = handle.read(512)
        handle.seek(0)
        if depth > _DEEPEST:
            raise ValueError("files are packed into each other too deeply to be searched")
        if head[:4] == b"PAR1":
            self._table(_parquet_columns(handle), found)
        elif head[:6] == b"ARROW1":
            reader = pa.ipc.open_file(handle)
            self._table((reader.get_batch(n) for n in range(reader.num_record_batches)), found)
        elif head[257:262] == b"ustar":
            with tarfile.open(fileobj=handle, mode="r:") as tar:
                for member in tar:
                    inner = tar.extractfile(member)
                    if inner is not None:
                        self._inner(inner, found, depth)
        elif head[:4] == b"PK\3\4":
            with zipfile.ZipFile(handle) as archive:
                for name in archive.namelist():
                    found |= self.name(name)
                    with archive.open(name) as inner:
                        self._unpacked(inner, found, depth)
        elif (unpack := _decompressor(head)) is not None:
            self._unpacked(unpack(handle), found, depth)
        elif b"\0" not in head:
            for match in _DATA_URI.finditer(handle.read(_PAGE)):
                with contextlib.suppress(ValueError):
                    if hashlib.sha256(base64.b64decode(match[1])).hexdigest() in self._pictures:
                        found.add("picture")

    def _inner(self, handle: IO[bytes], found: set[Kind], depth: int) -> None:
        self._bytes(handle, found)
        self._within(handle, found, depth + 1)

    def _unpacked(self, stream: Any, found: set[Kind], depth: int) -> None:
        with tempfile.TemporaryFile() as copy:
            shutil.copyfileobj(_Limited(stream), copy, 1 << 20)
            copy.seek(0)
            self._inner(copy, found, depth)

    def _table(self, batches: Iterable[pa.RecordBatch], found: set[Kind]) -> None:
        for batch in batches:
            for leaf in (leaf for column in batch.columns for leaf in _leaves(column)):
                if _is_text(leaf.type):
                    values = [text.encode("utf-8", "surrogatepass") for text in leaf.to_pylist() if text]
                else:
                    values = [data for data in leaf.to_pylist() if data]
                    if not self._pictures.isdisjoint(hashlib.sha256(data).hexdigest() for data in values):
                        found.add("picture")
                found |= self._kinds(self._matcher.find(b"\n".join(values)))


class _Limited:
    """The beginning of a stream; reading beyond what one file may hold unpacked is an error."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._left = stream, _MOST_UNPACKED

    def read(self, size: int = -1, /) -> bytes:
        data: bytes = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {_MOST_UNPACKED:,} bytes")
        return data


def _decompressor(head: bytes) -> Any:
    if head[:2] == b"\x1f\x8b":
        return lambda handle: gzip.GzipFile(fileobj=handle)
    if head[:3] == b"BZh":
        return bz2.BZ2File
    if head[:6] == b"\xfd7zXZ\0":
        return lzma.LZMAFile
    if head[:4] == b"\x28\xb5\x2f\xfd":
        return lambda handle: pa.CompressedInputStream(pa.PythonFile(handle, "r"), "zstd")
    return None


def _parquet_columns(handle: IO[bytes]) -> Iterator[pa.RecordBatch]:
    """The batches of a Parquet file; text columns as dictionaries, so that words that no row uses are seen, too."""
    schema = pq.ParquetFile(handle).schema_arrow
    encoded = [field.name for field in schema if _is_text(field.type) or pa.types.is_dictionary(field.type)]
    handle.seek(0)
    yield from pq.ParquetFile(handle, read_dictionary=encoded).iter_batches(1024)


def _leaves(array: pa.Array) -> Iterator[pa.Array]:
    """The arrays of text and bytes in an array, however nested; of a dictionary all its words."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield from _leaves(array.dictionary)
    elif pa.types.is_struct(kind):
        for inner in array.flatten():
            yield from _leaves(inner)
    elif pa.types.is_map(kind):
        yield from _leaves(array.keys)
        yield from _leaves(array.items)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        yield from _leaves(array.flatten())
    elif _is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        yield array


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def shared_with(traces: Traces, tables: Iterable[pa.Table]) -> set[bytes]:
    """The needles that rows have as well which stay: their keys, texts and pictures. A uid belongs to one row alone."""
    matcher = Matcher({needle: kind for needle, kind in traces.needles().items() if kind != "uid"})
    found: set[bytes] = set()
    for rows in tables:
        for name in rows.column_names:
            found |= matcher.find("\n".join(_strings(rows[name])).encode("utf-8", "surrogatepass"))
    return found
