"""Who may ask: a token, the right Host, the right Origin; and the headers that keep the page to itself.

Other pages in the same browser can send requests to a local server, and a name can be made to point to it (DNS
rebinding). They know neither the token nor can they send our Host or Origin.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


class Guard:
    """Checks every request. host: the address the server listens on."""

    def __init__(self, host: str) -> None:
        self.token = secrets.token_urlsafe(32)
        self.host = host
        self.port = 0
        self.loopback = is_loopback(host)

    @property
    def cookie(self) -> str:
        """Browsers do not tell ports apart in cookies, so each server has a name of its own."""
        return f"clipfilter-{self.port}"

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        problem = self._problem(request)
        if problem is not None:
            response: web.StreamResponse = web.Response(status=403, text=problem + "\n")
        else:
            try:
                response = await handler(request)
            except web.HTTPException as error:
                response = web.Response(status=error.status, text=f"{error.reason}.\n")
        for name, value in HEADERS.items():
            response.headers.setdefault(name, value)
        return response

    def admit(self, response: web.Response) -> None:
        """Give the browser the cookie that stands for the token from now on."""
        response.set_cookie(self.cookie, self.token, httponly=True, samesite="Strict", path="/")

    def _problem(self, request: web.Request) -> str | None:
        host = request.headers.get("Host", "")
        if not self._own_host(host):
            return "This server does not answer under that name; open the address that clipfilter serve printed."
        given = request.query.get("token") or request.cookies.get(self.cookie) or ""
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return "This page needs its token; open the whole address that clipfilter serve printed."
        origin = request.headers.get("Origin")
        # Browsers send an Origin with every POST; a page of another origin cannot pretend to be ours.
        if (request.method not in ("GET", "HEAD") or origin is not None) and origin != f"http://{host}":
            return "Another page asked for this; only the page of clipfilter serve may."
        return None

    def _own_host(self, given: str) -> bool:
        try:
            parts = urlsplit(f"//{given}")
            name, port = parts.hostname or "", parts.port or 80
        except ValueError:
            return False
        if port != self.port or parts.username is not None or parts.path:
            return False
        if name in _LOCAL_NAMES:
            return True
        # Rebinding needs a name; where other machines may ask, they use an address or this machine's own name.
        return not self.loopback and (_is_address(name) or name in (self.host.lower(), socket.gethostname().lower()))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server on this address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
