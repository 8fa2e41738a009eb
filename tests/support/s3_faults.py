"""A bad line to an S3 server: a proxy on loopback that passes requests on, and spoils some of them as it was told."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import urlsplit

Spoil = Literal[
    "refused-500", "refused-503", "reset", "done-500", "done-503", "done-reset", "half", "slow", "hang"
]  # fmt: skip
#: Answered or cut off without reaching the server; done there, and the answer is lost; and what the answer suffers.
SPOILS: tuple[Spoil, ...] = (
    "refused-500", "refused-503", "reset", "done-500", "done-503", "done-reset", "half", "slow", "hang"
)  # fmt: skip
#: What to do with the request of this number (from 1), by its method and path; None passes it on.
Judge = Callable[[int, str, str], Spoil | None]
_SLOW_SECONDS = 0.5
_OF_THE_LINE = frozenset({"connection", "keep-alive", "transfer-encoding", "content-length"})


@dataclass
class Line:
    """The proxy: where it listens, what it does (`judge`, to be changed at any time), and what it has done."""

    url: str
    judge: Judge
    requests: list[tuple[str, str]] = field(default_factory=list)
    spoiled: Counter[str] = field(default_factory=Counter)

    def start(self, judge: Judge) -> None:
        """Count from 1 again, under another judge."""
        self.judge = judge
        self.requests, self.spoiled = [], Counter()


def honest(number: int, method: str, path: str) -> None:
    """Every request is passed on."""


def often(share: float, seed: object, spoils: tuple[Spoil, ...] = SPOILS) -> Judge:
    """A share of the requests is spoiled, each kind as often as the others."""
    draw = random.Random(str(seed))
    return lambda number, method, path: draw.choice(spoils) if draw.random() < share else None


def at(wanted: int, spoil: Spoil) -> Judge:
    """One request is spoiled."""
    return lambda number, method, path: spoil if number == wanted else None


@contextmanager
def bad_line(upstream: str) -> Iterator[Line]:
    """A proxy before the server at `upstream`, an http URL; honest at first."""
    server, over, lock = urlsplit(upstream), threading.Event(), threading.Lock()
    assert server.hostname is not None

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 600

        def log_message(self, *args: object) -> None:
            pass

        def _serve(self) -> None:
            body = self._body()
            with lock:
                line.requests.append((self.command, self.path))
                spoil = line.judge(len(line.requests), self.command, self.path)
                line.spoiled[spoil or "none"] += 1
            if spoil == "hang":
                over.wait()
                self.close_connection = True
            elif spoil == "reset":
                self._reset()
            elif spoil in ("refused-500", "refused-503"):
                self._refuse(int(spoil[-3:]))
            else:
                status, headers, content = self._pass_on(body)
                if spoil in ("done-500", "done-503"):
                    self._refuse(int(spoil[-3:]))
                elif spoil == "done-reset":
                    self._reset()
                else:
                    if spoil == "slow":
                        over.wait(_SLOW_SECONDS)
                    self._answer(status, headers, content, half=spoil == "half")

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)

        def _pass_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
            connection = http.client.HTTPConnection(server.hostname or "", server.port, timeout=60)
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _OF_THE_LINE | {"expect"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            content = answer.read()
            headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in _OF_THE_LINE]
            size = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            connection.close()
            return answer.status, [*headers, ("Content-Length", size or "0")], content

        def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, half: bool) -> None:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            if half:
                self.wfile.write(content[: len(content) // 2])
                self._reset()
            else:
                self.wfile.write(content)

        def _refuse(self, status: int) -> None:
            code = {500: "InternalError", 503: "SlowDown"}[status]
            text = f"<Error><Code>{code}</Code><Message>the line is bad</Message></Error>".encode()
            headers = [("Content-Type", "application/xml"), ("Content-Length", str(len(text)))]
            self._answer(status, headers, b"" if self.command == "HEAD" else text, half=False)

        def _reset(self) -> None:
            """End the connection with RST, as a machine does that has gone."""
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def shutdown_request(self, request: Any) -> None:
            self.close_request(request)  # without a polite end, which would come before a reset

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients leave when they have waited long enough

    with Server(("127.0.0.1", 0), Handler) as proxy:
        line = Line(f"http://127.0.0.1:{proxy.server_port}", honest)
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield line
        finally:
            over.set()
            proxy.shutdown()
