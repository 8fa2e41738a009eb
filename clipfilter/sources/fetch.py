"""Images that are named, not held: read many paths or URLs at once, in order, with bounded memory."""

from __future__ import annotations

import itertools
import os
import random
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from clipfilter import egress, storage
from clipfilter.errors import IMAGE_TOO_LARGE, MISSING_IMAGE, READ_ERROR, RefusedError, RowError, hide, one_line
from clipfilter.retry import retry

T = TypeVar("T")
R = TypeVar("R")

WORKERS = 32
ATTEMPTS = 3
AHEAD = 512  # images asked for beyond the one being waited for, so that one slow server does not hold up the rest
TIMEOUT_SECONDS = 10.0  # of one attempt at one image
LARGEST_IMAGE = egress.LARGEST  # bytes; more is not read into memory

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*:(//|.*::|image/)|^data:")


class Fetched(NamedTuple):
    """The bytes of one image, or the error that this row gets."""

    data: bytes | None
    error_class: str | None = None
    error: str | None = None


class Fetcher:
    """Reads one named image; relative names are tried below each of `bases`, in turn. Safe to share among threads.

    private: URLs may lead to addresses that are not public. own: the user named the images, so that URLs may lead anywhere.
    """

    def __init__(self, bases: Sequence[str], *, private: bool = False, own: bool = False) -> None:
        self._bases = list(dict.fromkeys(bases))
        self._private, self._own = private, own
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
            return read_url(name) if self._own else _read(name, self._private, own=False)
        with self._lock:
            bases = list(self._bases)
        missing: RowError | None = None
        for base in bases:
            try:
                # A relative name leads where the user's own base does, unless it holds a URL.
                data = _read(storage.join(base, name), self._private or egress.at_home(base), own="::" not in name)
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
    """One file of the source itself by its full path or URL, taken literally."""
    return _caught(read_url, url)


def read_url(url: str) -> bytes:
    """All bytes of one file that the user named, or that lies in a source; tries again on passing trouble.

    Raises RowError: missing_image when it is not there, read_error, or image_too_large.
    """
    return _read(url, egress.at_home(url), own=True)


def _read(url: str, private: bool, *, own: bool) -> bytes:
    """As `read_url`; own: not from data, so that its scheme is not judged. missing_image, too, when it may not be fetched."""

    def may_pass(error: Exception, attempt: int) -> bool:
        # Without a cause (a file that may not be read) it is no use.
        return isinstance(error, RowError) and error.error_class == READ_ERROR and error.__cause__ is not None

    waits = (0.25 * 2**attempt * (1 + random.random()) for attempt in range(ATTEMPTS - 1))
    return retry(lambda: _read_once(url, private, own), waits, may_pass)


def _read_once(url: str, private: bool, own: bool) -> bytes:
    try:
        if not own:
            egress.judge_name(url)
        if storage.is_local(url) and not url.startswith("data:"):
            return egress.read_file(storage.local_path(url), LARGEST_IMAGE)
        if url.lower().startswith(("http://", "https://")):
            return egress.get(url, egress.Limits(TIMEOUT_SECONDS, TIMEOUT_SECONDS, private, LARGEST_IMAGE))
        fs, path = storage.filesystem(url)
        if not getattr(fs, "async_impl", False):  # an archive, whose members may be larger than they say
            with fs.open(path, "rb") as handle:
                return egress.read_stream(handle, LARGEST_IMAGE)
        if (fs.size(path) or 0) > LARGEST_IMAGE:
            raise egress.TooLargeError("file", LARGEST_IMAGE)
        return bytes(fs.cat_file(path))
    except RefusedError as error:  # a scheme whose package is not installed
        raise RowError(MISSING_IMAGE, str(error)) from None
    except egress.TooLargeError as error:
        raise RowError(IMAGE_TOO_LARGE, str(error)) from None
    except egress.FetchError as error:
        if error.passing:
            raise RowError(READ_ERROR, f"{_short(url)} cannot be read: {error}") from error
        raise RowError(MISSING_IMAGE, f"{_short(url)}: {error}") from None
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise RowError(MISSING_IMAGE, f"there is no file {_short(url)}") from error
    except PermissionError:
        raise RowError(READ_ERROR, f"{_short(url)} may not be read") from None
    except Exception as error:  # every filesystem has exceptions of its own
        if isinstance(error, ValueError) and "\0" in url:
            raise RowError(MISSING_IMAGE, "the path holds a null character") from None
        raise RowError(READ_ERROR, f"{_short(url)} cannot be read: {one_line(error)}") from error


def _short(url: str) -> str:
    url = hide(url)
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
