"""A local, seekable view of a tar wherever it is: opened in place, or copied (and unzipped) once."""

from __future__ import annotations

import io
import os
import tempfile
import threading
import zlib
from collections import OrderedDict
from typing import Any

from clipfilter import egress, storage
from clipfilter.errors import ShardError, one_line
from clipfilter.retry import retry
from clipfilter.sources.tar import TarFile, Wanted

_PIECE = 8 << 20
_WAITS = (0.5, 1.0)  # seconds before a copy is tried again
_GZIP_MAGIC = b"\x1f\x8b"
_KEPT_OPEN = 4


class TarCache:
    """The tars opened last, so that copying rows does not fetch and index a tar again that was just read.

    Copies are unnamed temporary files: they vanish with the process, however it ends.
    """

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._lock = threading.Lock()
        self._open: OrderedDict[tuple[str, str], TarFile] = OrderedDict()

    def open(self, url: str, etag: str) -> TarFile:
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

    def _fetch(self, url: str, etag: str) -> TarFile:
        fs, path = storage.filesystem(url)
        if etag:
            check_unchanged(fs, path, url, etag)
        if storage.is_local(url):
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            if os.pread(descriptor, 2, 0) != _GZIP_MAGIC:
                return TarFile(descriptor, os.fstat(descriptor).st_size, self._wanted)
            os.close(descriptor)
        hopeless = (FileNotFoundError, egress.FetchError)
        return retry(lambda: self._copy(fs, path), _WAITS, lambda error, _: not isinstance(error, hopeless))

    def _copy(self, fs: Any, path: str) -> TarFile:
        with tempfile.TemporaryFile(prefix="clipfilter-") as copy, fs.open(path, "rb", block_size=_PIECE) as source:
            piece = source.read(_PIECE)
            if piece[:2] == _GZIP_MAGIC:
                gunzip(piece, source, copy)
            else:
                while piece:
                    copy.write(piece)
                    piece = source.read(_PIECE)
            copy.flush()
            total = copy.tell()
            return TarFile(os.dup(copy.fileno()), total, self._wanted)


def gunzip(piece: bytes, source: Any, target: Any, limit: int | None = None) -> None:
    """Unzip `piece` and the rest of `source` into `target`, at most about `limit` bytes.

    Stops quietly where the file breaks: the tar index then says where the archive breaks off. Raises FetchError for what
    unzips to far too much.
    """
    inflate = zlib.decompressobj(wbits=31)
    written, read = 0, len(piece)
    while piece:
        try:
            data = inflate.decompress(piece, _PIECE)
        except zlib.error:
            return
        target.write(data)
        written += len(data)
        egress.judge_unzipped(read, written)
        if limit is not None and written >= limit:
            return
        if inflate.eof:
            piece = inflate.unused_data.lstrip(b"\0")
            inflate = zlib.decompressobj(wbits=31)  # gzip files may be put end to end
        else:
            piece = inflate.unconsumed_tail
        if not piece:
            piece = source.read(_PIECE)
            read += len(piece)


def read_prefix(url: str, size: int) -> bytes:
    """About the first `size` bytes of a tar, unzipped where it is zipped."""
    fs, path = storage.filesystem(url)
    with fs.open(path, "rb", block_size=min(size, _PIECE)) as source:
        data: bytes = source.read(size)
        if data[:2] == _GZIP_MAGIC:
            target = io.BytesIO()
            gunzip(data, source, target, size)
            return target.getvalue()
        return data


def check_unchanged(fs: Any, path: str, url: str, etag: str) -> None:
    """Raise ShardError when the file is not the one that was listed."""
    if storage.etag(fs.info(path)) != etag:
        raise ShardError(f"{url} has changed since it was listed; run again to process the new content.")
