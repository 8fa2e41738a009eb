"""What may be fetched: from which addresses, over which schemes, how many bytes, for how long.

Used for images that a list or a source names, which may have been written by strangers. Where a user's own command line
leads is not judged here.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import ipaddress
import os
import socket
import stat
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from clipfilter import storage
from clipfilter.errors import one_line

LARGEST = 256 << 20  # bytes of one image
#: Where images that a source names may lie, beside local paths and data: URLs. All but http(s) lead to one's own account.
SCHEMES = ("http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hf", "memory")
_INSIDE = "zip://"  # the one archive that a chained URL may look into, and not on a web server
#: Statuses that may be another the next time.
_PASSING = frozenset({408, 421, 425, 429, 500, 502, 503, 504, 507, 509, 520, 521, 522, 523, 524, 525, 527, 530})
_LOOKUPS = 64  # names looked up at once
_KEEP_SECONDS = 2.0  # an idle connection is kept open for so long
UNZIPPED_FREE = 1 << 30  # bytes that any archive may unzip to
UNZIPPED_RATIO = 100

# IANA's registries of special-purpose addresses, and of multicast and reserved space, as of 2025. Blocks that the registries
# call globally reachable are in it where they belong to a protocol that the nearest router or relay answers: no images lie there.
_SPECIAL = tuple(
    ipaddress.ip_network(block)
    for block in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
        "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
        # Within 2000::/3; all else is no public IPv6.
        "2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20",
    )
)  # fmt: skip
_GLOBAL = ipaddress.IPv6Network("2000::/3")
#: Blocks whose addresses stand for an IPv4 address, and how many bits lie behind that: mapped, NAT64, 6to4.
_EMBEDDING = tuple(
    (ipaddress.IPv6Network(block), bits)
    for block, bits in (("::ffff:0:0/96", 0), ("64:ff9b::/96", 0), ("2002::/16", 80))
)


@dataclass(frozen=True)
class Limits:
    """timeout: seconds of one wait for the server; deadline: seconds of a whole download, name, connection and headers included.

    private: also from addresses that are not public, and through the environment's proxies. largest: bytes.
    """

    timeout: float = 10.0
    deadline: float = 60.0
    private: bool = False
    largest: int = LARGEST


class FetchError(OSError):
    """Something cannot or may not be fetched; `passing`: another time it may."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


class RefusedAddressError(FetchError):
    """The address or the scheme is not one to fetch from."""


class TooLargeError(FetchError):
    """There are more bytes than allowed."""

    def __init__(self, what: str, largest: int) -> None:
        super().__init__(f"the {what} is larger than {largest >> 20} MiB")


# --- addresses and schemes ----------------------------------------------------------------------------------------------


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet; one that stands for an IPv4 address is judged as that."""
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        for block, behind in _EMBEDDING:
            if ip in block:
                ip = ipaddress.IPv4Address(int(ip) >> behind & 0xFFFFFFFF)
                break
        else:
            if ip not in _GLOBAL:
                return False
    return not any(ip in block for block in _SPECIAL)


def at_home(url: str) -> bool:
    """Whether a web server that the user named as a source has an address that is not public."""
    parts = urlsplit(url)
    return parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and _at_home(str(parts.hostname))


@functools.lru_cache
def _at_home(host: str) -> bool:
    with contextlib.suppress(OSError):
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        return not all(is_public(str(item[4][0])) for item in found)
    return False


def judge_name(name: str) -> None:
    """Raise RefusedAddressError for the URL of an image whose scheme is not fetched from; paths may have any form."""
    if storage.is_local(name):
        return
    scheme = name.partition(":")[0].lower()
    if scheme == "data" or ("::" not in name and scheme in SCHEMES):
        return
    archive = name.partition("::")[2]
    if not name.startswith(_INSIDE) or not archive:
        raise RefusedAddressError(f"images are not fetched over {scheme}, only from paths and {', '.join(SCHEMES)}")
    if "::" in archive or archive.lower().startswith(("http:", "https:", "data:")):
        raise RefusedAddressError("of archives only zip is looked into, on a disk or an object store; unpack it first")
    judge_name(archive)
    if storage.is_local(archive):
        _regular(storage.local_path(archive))


# --- bytes --------------------------------------------------------------------------------------------------------------


def read_file(path: Path, largest: int = LARGEST) -> bytes:
    """The bytes of a regular file; raises OSError, of which FetchError for devices, pipes and what is too large."""
    _regular(path)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb", buffering=0) as handle:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_size > largest:
            raise TooLargeError("file", largest)
        return read_stream(handle, largest)


def _regular(path: Path) -> None:
    """Before it is opened: that alone may wind a tape or wait for a writer."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise FetchError("it is a device or a pipe, no file")


def read_stream(handle: IO[bytes] | Any, largest: int = LARGEST) -> bytes:
    """All bytes of an open file, whatever is unpacked on the way; raises TooLargeError."""
    parts, size = [], 0
    while part := handle.read(min(1 << 20, largest + 1 - size)):
        parts.append(part)
        size += len(part)
        if size > largest:
            raise TooLargeError("file", largest)
    return b"".join(parts)


def judge_unzipped(read: int, written: int) -> None:
    """Raise FetchError when an archive unzips to far more than images do: a temporary folder is soon full."""
    if written > max(UNZIPPED_FREE, UNZIPPED_RATIO * read):
        raise FetchError(
            f"it unzips to more than {written >> 20:,} MiB, over {UNZIPPED_RATIO} times its size, as no archive of images "
            "does; if it is right, unzip it first"
        )


# --- the web ------------------------------------------------------------------------------------------------------------


def get(
    url: str,
    limits: Limits,
    headers: Mapping[str, str] | None = None,
    accept: Callable[[Mapping[str, str]], None] | None = None,
) -> bytes:
    """The body at an http(s) URL, whole. Every address that is connected to was judged, after redirects too.

    `accept` sees the headers of the answer, a multidict, and may raise. Raises FetchError. Safe to call from many threads.
    """
    if not url.lower().startswith(("http://", "https://")):
        raise RefusedAddressError("only http and https are fetched")
    web = _web()
    work = asyncio.run_coroutine_threadsafe(_get(web, url, limits, headers, accept), web.loop)
    try:
        return work.result()
    finally:
        work.cancel()


class _Web:
    """A thread that talks to web servers, and its sessions: one for public addresses, one for all."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_default_executor(ThreadPoolExecutor(_LOOKUPS, "clipfilter-lookup"))
        threading.Thread(target=self.loop.run_forever, name="clipfilter-web", daemon=True).start()
        self._process = os.getpid()
        self._sessions: dict[bool, Any] = {}
        atexit.register(self._close)

    def session(self, private: bool) -> Any:
        """Called in its thread."""
        import aiohttp

        if private not in self._sessions:
            connector = aiohttp.TCPConnector(
                limit=0, keepalive_timeout=_KEEP_SECONDS, socket_factory=None if private else _public_socket
            )
            self._sessions[private] = aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=private,
                headers={"Accept-Encoding": "identity"},
            )
        return self._sessions[private]

    def _close(self) -> None:
        for session in self._sessions.values() if os.getpid() == self._process else ():
            with contextlib.suppress(Exception):
                asyncio.run_coroutine_threadsafe(session.close(), self.loop).result(1)


_webs: dict[int, _Web] = {}
_webs_lock = threading.Lock()


def _web() -> _Web:
    """The one of this process: a forked child has no threads of its parent."""
    with _webs_lock:
        if os.getpid() not in _webs:
            _webs[os.getpid()] = _Web()
        return _webs[os.getpid()]


def _free_lock() -> None:
    """In a forked child: a thread of the parent may have held it."""
    global _webs_lock
    _webs_lock = threading.Lock()


os.register_at_fork(after_in_child=_free_lock)


def _public_socket(found: tuple[Any, ...]) -> socket.socket:
    """A socket for one address of those that a name has; it is connected to that address next."""
    family, kind, protocol, _, place = found
    if not is_public(str(place[0])):
        raise RefusedAddressError("not a public address")
    return socket.socket(family, kind, protocol)


async def _get(
    web: _Web,
    url: str,
    limits: Limits,
    headers: Mapping[str, str] | None,
    accept: Callable[[Mapping[str, str]], None] | None,
) -> bytes:
    import aiohttp
    from yarl import URL

    try:
        async with asyncio.timeout(limits.deadline) as whole:
            # What is a URL already is sent as it is: a signature may depend on every character.
            scheme, _, rest = url.partition(":")
            place = URL(f"{scheme.lower()}:{rest}", encoded=url.isascii() and url.isprintable() and " " not in url)
            wait = aiohttp.ClientTimeout(total=None, sock_connect=limits.timeout, sock_read=limits.timeout)
            async with web.session(limits.private).get(place, headers=headers, timeout=wait) as answer:
                if answer.status >= 400:
                    raise FetchError(f"HTTP {answer.status}: {answer.reason}"[:300], passing=answer.status in _PASSING)
                if accept is not None:
                    accept(answer.headers)
                return await _body(answer, limits.largest)
    except TimeoutError:
        waited = f"not whole after {limits.deadline:g} s" if whole.expired() else f"no answer for {limits.timeout:g} s"
        raise FetchError(waited, passing=True) from None
    except aiohttp.ClientConnectorError as error:
        cause = getattr(error, "os_error", error)  # of a bad certificate there is none
        if isinstance(cause, RefusedAddressError):
            raise RefusedAddressError(f"{error.host} is not a public address") from None
        raise FetchError(f"no connection to {error.host}: {one_line(cause)}", passing=True) from None
    except aiohttp.TooManyRedirects:
        raise FetchError("too many redirects") from None
    except (aiohttp.NonHttpUrlRedirectClientError, aiohttp.InvalidUrlRedirectClientError):
        raise FetchError("it leads to what is no http URL") from None
    except (aiohttp.InvalidURL, ValueError):  # not before bad certificates, which are a ValueError too
        raise RefusedAddressError("it is not a valid URL") from None
    except aiohttp.ClientError as error:
        said = getattr(error, "message", None) or one_line(error)
        broken = f"the answer breaks off, or is no HTTP ({type(error).__name__}: {said})"
        raise FetchError(broken[:300], passing=True) from None


async def _body(answer: Any, largest: int) -> bytes:
    import aiohttp

    parts, size = [], 0
    try:
        async for part in answer.content.iter_any():
            parts.append(part)
            size += len(part)
            if size > largest:
                raise TooLargeError("answer", largest)
    except aiohttp.ClientPayloadError:
        if answer.content_length is None:
            raise
        missing = answer.content_length - size
        raise FetchError(f"the answer breaks off, {missing} bytes are missing", passing=True) from None
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise FetchError(f"the answer is packed ({answer.headers['Content-Encoding'][:30]}), which was not asked for")
    return b"".join(parts)
