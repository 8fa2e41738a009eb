"""A local, seekable view of a tar wherever it is: opened in place, or copied (and unzipped) once."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import tempfile
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from clipfilter import egress, storage
from clipfilter.errors import ShardError, one_line
from clipfilter.retry import retry
from clipfilter.sources.tar import TarFile, Wanted
from clipfilter.sources.zip import ZIP_MAGIC, ZipArchive

_PIECE = 8 << 20
_WAITS = (0.5, 1.0)  # seconds before a copy is tried again
_UNZIPPED = 1 << 16  # bytes of a piece of a zipped file; as many may be lost where it breaks
_ZIPPED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda stream: gzip.GzipFile(fileobj=stream),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda stream: pa.CompressedInputStream(pa.PythonFile(stream, mode="r"), "zstd"),
}
_MAGIC_BYTES = 6
_KEPT_OPEN = 4


Archive = TarFile | ZipArchive


class TarCache:
    """The tars and zips opened last, so that copying rows does not fetch and index a tar again that was just read.

    Copies are unnamed temporary files: they vanish with the process, however it ends.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, str], Archive] = OrderedDict()

    def open(self, url: str, etag: str) -> Archive:
        """The tar at `url` as it was listed (`etag`, "" for whatever is there); raises ShardError."""
        with self._lock:
            tar = self._open.get((url, etag))
            if tar is not None:
                self._open.move_to_end((url, etag))
                return tar
        try:
            tar = self._fetch(url, etag)
        except FileNotFoundError as error:
            raise ShardError(f"{url} does not exist any more.") from error
        except egress.FetchError as error:
            raise ShardError(f"{url} is not read: {error}.") from error
        except ShardError:
            raise
        except Exception as error:  # every filesystem has exceptions of its own
            raise ShardError(f"{url} cannot be read: {one_line(error)}") from error
        with self._lock:
            self._open[(url, etag)] = tar
            while len(self._open) > _KEPT_OPEN:
                self._open.popitem(last=False)
        return tar

    def _fetch(self, url: str, etag: str) -> Archive:
        fs, path = storage.filesystem(url)
        if etag:
            check_unchanged(fs, path, url, etag)
        if storage.is_local(url):
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            head = os.pread(descriptor, _MAGIC_BYTES, 0)
            if head.startswith(ZIP_MAGIC):
                os.close(descriptor)
                return ZipArchive(path, self._wanted)
            if not head.startswith(tuple(_ZIPPED)):
                return TarFile(descriptor, os.fstat(descriptor).st_size, self._wanted)
            os.close(descriptor)
        hopeless = (FileNotFoundError, egress.FetchError)
        return retry(lambda: self._copy(fs, path), _WAITS, lambda error, _: not isinstance(error, hopeless))

    def _copy(self, fs: Any, path: str) -> Archive:
        with tempfile.TemporaryFile(prefix="clipfilter-") as copy, fs.open(path, "rb", block_size=_PIECE) as source:
            for piece in unzipped(source):
                copy.write(piece)
            copy.flush()
            total = copy.tell()
            if os.pread(copy.fileno(), _MAGIC_BYTES, 0).startswith(ZIP_MAGIC):
                return ZipArchive(os.fdopen(os.dup(copy.fileno()), "rb"), self._wanted)
            return TarFile(os.dup(copy.fileno()), total, self._wanted)


class _Remembering:
    """A stream whose first bytes were read already; `broken` is what it raised itself, `taken` how many bytes it gave."""

    def __init__(self, source: Any) -> None:
        self.head: bytes = source.read(_MAGIC_BYTES)
        self.broken: Exception | None = None
        self.taken = len(self.head)
        self._source, self._rest = source, self.head

    def read(self, size: int = -1) -> bytes:
        try:
            if not self._rest:
                data: bytes = self._source.read(size)
                self.taken += len(data)
                return data
        except Exception as error:  # every filesystem has exceptions of its own
            self.broken = error
            raise
        size = len(self._rest) if size < 0 else size
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    closed = False  # asked for by pyarrow, as the following

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        pass


def unzipped(source: Any) -> Iterator[bytes]:
    """The bytes of a stream in pieces of at most some megabytes, unzipped where it begins as gzip, bzip2, xz or Zstandard.

    Ends quietly where a zipped one breaks: the tar index then says where the archive breaks off. Raises what `source` does,
    and FetchError for what unzips to far too much.
    """
    stream: Any = _Remembering(source)
    magic = next((magic for magic in _ZIPPED if stream.head.startswith(magic)), None)
    if magic is None:
        while piece := stream.read(_PIECE):
            yield piece
        return
    written = 0
    try:
        opened = _ZIPPED[magic](stream)
        while piece := opened.read1(_UNZIPPED):
            written += len(piece)
            egress.judge_unzipped(stream.taken, written)
            yield piece
    except egress.FetchError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException):
        if stream.broken is not None:
            raise stream.broken from None


def read_prefix(url: str, size: int) -> bytes:
    """About the first `size` bytes of a tar, unzipped where it is zipped."""
    fs, path = storage.filesystem(url)
    with fs.open(path, "rb", block_size=min(size, _PIECE)) as source:
        found = bytearray()
        for piece in unzipped(source):
            found += piece
            if len(found) >= size:
                break
        return bytes(found[:size])


def check_unchanged(fs: Any, path: str, url: str, etag: str) -> None:
    """Raise ShardError when the file is not the one that was listed."""
    if storage.etag(fs.info(path)) != etag:
        raise ShardError(f"{url} has changed since it was listed; run again to process the new content.")
