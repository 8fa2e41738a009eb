"""One download: only from public addresses, only if its owner allows it, with a limit on bytes and on time.

Runs inside img2dataset's download threads in place of its own `download_image`, which reads local files for `file:` URLs,
follows redirects into private networks, and waits and reads without limit.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import socket
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from typing import Any

LARGEST = 256 << 20  # bytes of one image
#: X-Robots-Tag directives that forbid it, as img2dataset has them.
OPT_OUTS = ("noai", "noimageai", "noindex", "noimageindex")
REFUSED, OPTED_OUT = "refused: ", "opted out: "
_PIECE = 1 << 16
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@dataclass(frozen=True)
class Limits:
    """timeout: seconds of one wait for the server; deadline: seconds of the whole download."""

    timeout: float = 10.0
    deadline: float = 60.0
    private: bool = False


class RefusedAddressError(OSError):
    """The host is not on the public internet."""


def is_public(address: str) -> bool:
    """Whether an IP address is on the public internet, whatever it is wrapped in (mapped, 6to4, NAT64)."""
    ip: Any = ipaddress.ip_address(address.split("%", 1)[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        ip = inner or ip
    return bool(ip.is_global and not ip.is_multicast)


def _public_connection(
    address: tuple[str, int], timeout: Any = None, source_address: tuple[str, int] | None = None
) -> socket.socket:
    """Like `socket.create_connection`, to public addresses only; what was checked is what is connected to."""
    found = socket.getaddrinfo(address[0], address[1], 0, socket.SOCK_STREAM)
    public = [item for item in found if is_public(str(item[4][0]))]
    if not public:
        raise RefusedAddressError(f"{address[0]} is not a public address")
    problem: OSError = OSError("no address")
    for family, kind, protocol, _, place in public:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            connection.connect(place)
            return connection
        except OSError as error:
            problem = error
            connection.close()
    raise problem


def _guarded(kind: type[http.client.HTTPConnection], *given: Any, **named: Any) -> http.client.HTTPConnection:
    """A connection of this kind that goes to public addresses only."""
    connection = kind(*given, **named)
    connection._create_connection = _public_connection  # type: ignore[attr-defined]
    return connection


class _HttpHandler(urllib.request.HTTPHandler):
    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(_guarded, http.client.HTTPConnection), req)


class _HttpsHandler(urllib.request.HTTPSHandler):
    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        connect = partial(_guarded, http.client.HTTPSConnection)
        return self.do_open(connect, req, context=self._context)  # type: ignore[attr-defined]


def _opener(limits: Limits) -> urllib.request.OpenerDirector:
    """HTTP(S) only. With private addresses allowed, the proxies of the environment are used too."""
    handlers: list[urllib.request.BaseHandler] = [
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ]
    if limits.private:
        handlers += [urllib.request.ProxyHandler(), urllib.request.HTTPHandler(), urllib.request.HTTPSHandler()]
    else:
        handlers += [_HttpHandler(), _HttpsHandler()]
    opener = urllib.request.OpenerDirector()
    for handler in handlers:
        opener.add_handler(handler)
    return opener


class Fetch:
    """Stands in for `img2dataset.downloader.download_image`: (key, stream or None, error or None)."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._opener = _opener(limits)

    def __call__(
        self, row: tuple[Any, str], timeout: float, user_agent_token: str | None, disallowed_header_directives: Any
    ) -> tuple[Any, io.BytesIO | None, str | None]:
        key, url = row
        if not url.lower().startswith(("http://", "https://")):
            return key, None, f"{REFUSED}only http and https are fetched"
        agent = "Mozilla/5.0 (compatible; img2dataset; +https://github.com/rom1504/img2dataset)"
        if user_agent_token:
            agent = f"Mozilla/5.0 (compatible; {user_agent_token}; +https://github.com/rom1504/img2dataset)"
        try:
            request = urllib.request.Request(url, headers={"User-Agent": agent})  # noqa: S310 (see _opener)
            with self._opener.open(request, timeout=self._limits.timeout) as answer:
                return key, self._body(answer, user_agent_token, disallowed_header_directives), None
        except _OptedOut as error:
            return key, None, OPTED_OUT + str(error)
        except Exception as error:
            reason = getattr(error, "reason", None)
            if isinstance(error, RefusedAddressError) or isinstance(reason, RefusedAddressError):
                return key, None, f"{REFUSED}{reason or error}"
            return key, None, _sentence(error)

    def _body(self, answer: Any, token: str | None, directives: Any) -> io.BytesIO:
        from img2dataset.downloader import is_disallowed

        if is_disallowed(answer.headers, token, directives or OPT_OUTS):
            raise _OptedOut("; ".join(answer.headers.get_all("X-Robots-Tag", [])))
        stop = time.monotonic() + self._limits.deadline
        body = io.BytesIO()
        expected = answer.length
        while piece := answer.read1(_PIECE):
            body.write(piece)
            if body.tell() > LARGEST:
                raise ValueError(f"the answer is larger than {LARGEST >> 20} MiB")
            if time.monotonic() > stop:
                raise TimeoutError(f"not whole after {self._limits.deadline:g} s")
        if expected is not None and body.tell() != expected:
            raise http.client.IncompleteRead(body.getvalue()[:0], expected - body.tell())
        body.seek(0)
        return body


class _OptedOut(Exception):
    pass


def _sentence(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        with contextlib.suppress(Exception):
            error.close()
        return f"HTTP {error.code}: {error.reason}"[:300]
    if isinstance(error, http.client.IncompleteRead):
        return f"the answer breaks off, {error.expected} bytes are missing"
    reason = getattr(error, "reason", None)
    return f"{type(error).__name__}: {reason or error}".rstrip(": ")[:300]
