"""Images that are named, not held: read many paths or URLs at once, in order, with bounded memory."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from clipfilter import storage
from clipfilter.errors import IMAGE_TOO_LARGE, MISSING_IMAGE, READ_ERROR, RefusedError, RowError, one_line
from clipfilter.retry import retry

T = TypeVar("T")
R = TypeVar("R")

WORKERS = 32
ATTEMPTS = 3
AHEAD = 512  # images asked for beyond the one being waited for, so that one slow server does not hold up the rest
TIMEOUT_SECONDS = 10.0  # of one attempt at one image
LARGEST_IMAGE = 256 << 20  # bytes; more is not read into memory

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:(//|.*::|image/)|^data:")
_TRY_AGAIN = frozenset({408, 421, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 525, 527, 530})


class Fetched(NamedTuple):
    """The bytes of one image, or the error that this row gets."""

    data: bytes | None
    error_class: str | None = None
    error: str | None = None


class Fetcher:
    """Reads one named image; relative names are tried below each of `bases`, in turn. Safe to share among threads."""

    def __init__(self, bases: Sequence[str]) -> None:
        self._bases = list(dict.fromkeys(bases))
        self._lock = threading.Lock()

    def __call__(self, name: str | bytes | None) -> Fetched:
        """The image called `name`; bytes are an image already at hand."""
        if isinstance(name, bytes):
            return Fetched(name)
        if name is None or not name.strip():
            return Fetched(None, MISSING_IMAGE, "the path or URL is empty")
        return _caught(self._read, name.strip())

    def _read(self, name: str) -> bytes:
        if _SCHEME.match(name) or os.path.isabs(name):
            return read_url(name)
        with self._lock:
            bases = list(self._bases)
        missing: RowError | None = None
        for base in bases:
            try:
                data = read_url(storage.join(base, name))
            except RowError as error:
                if error.error_class != MISSING_IMAGE:
                    raise
                missing = missing or error
                continue
            if base != bases[0]:
                with self._lock:  # the others probably lie there too
                    self._bases.sort(key=lambda other: other != base)
            return data
        raise missing or RowError(MISSING_IMAGE, f"{name} has no folder to lie in")


def _caught(read: Callable[[str], bytes], name: str) -> Fetched:
    try:
        return Fetched(read(name))
    except RowError as error:
        return Fetched(None, error.error_class, error.message)


def fetch_url(url: str) -> Fetched:
    """One file by its full path or URL, taken literally."""
    return _caught(read_url, url)


def read_url(url: str) -> bytes:
    """All bytes of one file; tries again on passing trouble.

    Raises RowError: missing_image when it is not there, read_error, or image_too_large.
    """

    def may_pass(error: Exception, attempt: int) -> bool:
        # Without a cause (a file that may not be read) it is no use.
        return isinstance(error, RowError) and error.error_class == READ_ERROR and error.__cause__ is not None

    waits = (0.25 * 2**attempt * (1 + random.random()) for attempt in range(ATTEMPTS - 1))
    return retry(lambda: _read_once(url), waits, may_pass)


def _read_once(url: str) -> bytes:
    try:
        if storage.is_local(url) and not url.startswith("data:"):
            return _read_local(url)
        fs, path = storage.filesystem(url)
        if url.startswith(("http://", "https://")):
            return _read_http(fs, url)
        if getattr(fs, "async_impl", False) and fs.size(path) is not None and fs.size(path) > LARGEST_IMAGE:
            raise RowError(IMAGE_TOO_LARGE, f"the file is larger than {LARGEST_IMAGE >> 20} MiB")
        return bytes(fs.cat_file(path))
    except RowError:
        raise
    except RefusedError as error:  # a scheme nobody knows, or whose package is not installed
        raise RowError(MISSING_IMAGE, str(error)) from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise RowError(MISSING_IMAGE, f"there is no file {_short(url)}") from error
    except PermissionError:
        raise RowError(READ_ERROR, f"{_short(url)} may not be read") from None
    except Exception as error:  # every filesystem has exceptions of its own
        raise RowError(READ_ERROR, f"{_short(url)} cannot be read: {one_line(error)}") from error


def _read_local(url: str) -> bytes:
    path = storage.local_path(url)
    if "\0" in str(path):
        raise RowError(MISSING_IMAGE, "the path holds a null character")
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb", buffering=0) as handle:
        size = os.fstat(descriptor).st_size
        if size > LARGEST_IMAGE:
            raise RowError(IMAGE_TOO_LARGE, f"the file is larger than {LARGEST_IMAGE >> 20} MiB")
        return handle.readall()


def _read_http(fs: Any, url: str) -> bytes:
    from fsspec.asyn import sync

    data: bytes = sync(fs.loop, _download, fs, url, timeout=TIMEOUT_SECONDS + 5)
    return data


async def _download(fs: Any, url: str) -> bytes:
    """GET through fsspec's own session: it checks size and status, which `cat_file` does not."""
    session = await fs.set_session()

    async def get() -> bytes:
        async with session.get(fs.encode_url(url), **fs.kwargs) as answer:
            if answer.status in _TRY_AGAIN:
                raise OSError(f"HTTP {answer.status}")
            if answer.status >= 400:
                raise RowError(MISSING_IMAGE, f"{_short(url)}: HTTP {answer.status}")
            parts, size = [], 0
            async for part in answer.content.iter_chunked(1 << 16):
                size += len(part)
                if size > LARGEST_IMAGE:
                    raise RowError(IMAGE_TOO_LARGE, f"the answer is larger than {LARGEST_IMAGE >> 20} MiB")
                parts.append(part)
            return b"".join(parts)

    return await asyncio.wait_for(get(), TIMEOUT_SECONDS)


def _short(url: str) -> str:
    return url if len(url) <= 200 else url[:197] + "..."


def fetch_in_order(
    items: Iterable[T],
    fetch: Callable[[T], R],
    max_bytes: int,
    size: Callable[[R], int],
    workers: int = WORKERS,
) -> Iterator[R]:
    """`fetch(item)` for every item, in their order, `workers` at a time; `size` says how many bytes a result holds.

    While more than `max_bytes` lie fetched and not yet asked for, no further fetch begins (but for the one being
    waited for), so memory holds about that much and at most `workers` results beyond.
    """
    waiting: deque[Future[R]] = deque()
    free = threading.Condition()
    held = head = 0
    closed = False

    def run(number: int, item: T) -> R:
        nonlocal held
        with free:
            free.wait_for(lambda: held < max_bytes or number <= head or closed)
        result = fetch(item)
        with free:
            held += size(result)
        return result

    remaining = enumerate(items)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="clipfilter-fetch")
    try:
        while True:
            for number, item in itertools.islice(remaining, AHEAD - len(waiting)):
                waiting.append(pool.submit(run, number, item))
            if not waiting:
                return
            result = waiting.popleft().result()
            with free:
                held -= size(result)
                head += 1
                free.notify_all()
            yield result
    finally:
        with free:
            closed = True
            free.notify_all()
        pool.shutdown(wait=False, cancel_futures=True)


def fetch_images(names: Iterable[str | bytes | None], fetch: Fetcher, max_bytes: int) -> Iterator[Fetched]:
    """The images called `names`, in order (see `fetch_in_order`)."""
    return fetch_in_order(names, fetch, max_bytes, lambda found: len(found.data or b""))
