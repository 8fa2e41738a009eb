"""The webhook: what is posted, what is tried again, and what an error may say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from clipfilter.errors import RefusedError
from clipfilter.nightly import alerts
from clipfilter.nightly.alerts import Alert, check_webhook, send
from tests.support.nights import webhook

ALERT = Alert("failure", "one file is damaged", {"shards": ["a.tar"]})


@pytest.fixture
def answering() -> Iterator[tuple[str, list[int]]]:
    """A server that gives the queued status codes, then 200; and how many requests came."""
    codes: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(codes.pop(0) if codes else 200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/secret-token", codes
    server.shutdown()
    server.server_close()


def test_people_and_programs_are_told() -> None:
    with webhook() as (address, posted):
        assert send(address, "s3://b/run", 6, [ALERT], {"version": "000004"}) is None
    assert posted == [
        {
            "text": "clipfilter nightly s3://b/run: one file is damaged",
            "run": "s3://b/run",
            "night": 6,
            "alerts": [{"kind": "failure", "message": "one file is damaged", "details": {"shards": ["a.tar"]}}],
            "version": "000004",
        }
    ]


def test_trouble_of_the_server_is_tried_again(
    answering: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "_WAIT_SECONDS", 0.01)
    address, codes = answering
    codes[:] = [500, 429]
    assert send(address, "run", 1, [ALERT], {}) is None
    codes[:] = [503, 503, 503]
    assert send(address, "run", 1, [ALERT], {}) == "HTTP 503"
    codes[:] = [404, 500]
    assert send(address, "run", 1, [ALERT], {}) == "HTTP 404"
    assert codes == [500], "a wrong address is not tried again"


def test_an_error_never_holds_the_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alerts, "_WAIT_SECONDS", 0.01)
    for address in (
        "http://127.0.0.1:1/secret-token",
        "http://[broken/secret-token",
        "http://127.0.0.1:9\n/secret-token",
    ):
        problem = send(address, "run", 1, [ALERT], {})
        assert problem
        assert "secret" not in problem


def test_other_schemes_are_refused() -> None:
    check_webhook(None)
    check_webhook("https://hooks.example/1")
    for address in ("file:///etc/passwd", "hooks.example/1"):
        with pytest.raises(RefusedError, match="http"):
            check_webhook(address)
