"""A web server on this machine that behaves as the web does, and counts who asks for what."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from tests.support.sources import jpeg

SLOW_SECONDS = 1.0  # a slow answer takes this long to begin


def _png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(jpeg(seed))).save(buffer, "PNG")
    return buffer.getvalue()


#: X-Robots-Tag values that forbid use in training, and ones that do not.
OPT_OUTS = ("noai", "noimageai", "noindex", "NoImageIndex, nofollow", "otherbot: noindex, noai")
HARMLESS = ("all", "nofollow", "otherbot: noai")


class Web:
    """What the server knows. asked: requests by path. healed: paths that answer well from now on."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        self.asked: Counter[str] = Counter()
        self.healed: set[str] = set()


@contextlib.contextmanager
def web() -> Iterator[Web]:
    """The server; its paths are /KIND/NUMBER.jpg (see `Handler.do_GET`)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path
            state.asked[path] += 1
            _, kind, name = path.split("/", 2)
            seed = int(name.split(".")[0])
            if path in state.healed:
                kind = "good"
            if kind == "good":
                self._answer(jpeg(seed))
            elif kind == "png":  # calls itself a JPEG
                self._answer(_png(seed))
            elif kind == "slow":
                time.sleep(SLOW_SECONDS)
                self._answer(jpeg(seed))
            elif kind == "stuck":  # one byte now and then, for ever
                self.send_response(200)
                self.send_header("Content-Length", "100000")
                self.end_headers()
                with contextlib.suppress(OSError):
                    for _ in range(200):
                        self.wfile.write(b"x")
                        self.wfile.flush()
                        time.sleep(0.1)
                self.close_connection = True
            elif kind in ("404", "500", "503", "410", "403"):
                self._answer(b"no", status=int(kind), kind="text/plain")
            elif kind == "redirect":
                self._redirect(f"/good/{10_000 + seed}.jpg")
            elif kind == "loop":
                self._redirect(path)
            elif kind == "file":
                self._redirect("file:///etc/hostname")
            elif kind == "html":
                self._answer(b"<html><body>not here any more</body></html>", kind="image/jpeg")
            elif kind == "empty":
                self._answer(b"")
            elif kind == "short":  # a JPEG that breaks off, honestly announced
                self._answer(jpeg(seed)[:200])
            elif kind == "cut":  # announces more than comes
                data = jpeg(seed)
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif kind == "optout":
                self._answer(jpeg(seed), robots=OPT_OUTS[seed % 4])
            elif kind == "harmless":
                self._answer(jpeg(seed), robots=HARMLESS[seed % len(HARMLESS)])
            else:
                self._answer(b"?", status=404)

        def _answer(self, data: bytes, status: int = 200, kind: str = "image/jpeg", robots: str | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            if robots:
                self.send_header("X-Robots-Tag", robots)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(data)

        def _redirect(self, to: str) -> None:
            self.send_response(302)
            self.send_header("Location", to)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

        def handle_error(self, *arguments: Any) -> None:
            pass  # clients that hang up are part of the test

    server = Server(("127.0.0.1", 0), Handler)
    state = Web(server.server_address[1])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
