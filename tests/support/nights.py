"""A growing source of small photographs, and a server that takes webhooks."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from tests.support.engine import photos
from tests.support.sources import write_webdataset

POLICY = """
policy: nightly-test
version: 1
rules:
  - id: animals
    concept:
      any_of: ["a cat", "a dog", "a bird"]
      but_not: ["a building", "a landscape"]
    reject: {above: 0.60}
  - id: small
    metadata: min_side
    reject: {below: 20}
"""
FRACTION_POLICY = """
policy: nightly-fraction
version: 1
rules:
  - id: match
    alignment: {}
    review: {below: 0.0}
  - id: best
    fraction: {of: match}
    reject: {outside_top: 0.5}
"""


def photo_samples(count: int, seed: int) -> list[dict[str, Any]]:
    """Webdataset samples of real photographs, chosen by a seed, with their captions; no two alike in bytes."""
    some = photos(64)
    chosen = np.random.default_rng(seed).integers(0, len(some), count).tolist()
    made = []
    for number, place in enumerate(chosen):
        name, data, caption = some[place]
        data += f"{seed}-{number}".encode()  # after the end of a JPEG: another hash, the same picture
        made.append({"__key__": f"{seed:03d}{number:04d}", "jpg": data, "txt": caption, "json": {"name": name}})
    return made


def odd_samples(count: int, seed: int) -> list[dict[str, Any]]:
    """What a broken camera sends: tiny grey noise with captions about nothing."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        buffer = io.BytesIO()
        grey = rng.integers(90, 110, (16, 16, 1), dtype=np.uint8).repeat(3, axis=2)
        Image.fromarray(grey).save(buffer, "PNG")
        made.append({"__key__": f"{seed:03d}{number:04d}", "png": buffer.getvalue(), "txt": "x", "json": {"name": "?"}})
    return made


def arrive(folder: Path, name: str, samples: list[dict[str, Any]]) -> Path:
    """Put a tar into the source at once, as a finished upload appears."""
    whole = folder.parent / f"upload-{name}"
    write_webdataset(whole, samples)
    folder.mkdir(exist_ok=True)
    return whole.replace(folder / name)


def dataset(out: Path | str, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a run's newest version, failed ones too, in the order of (shard, row)."""
    root = Path(out)
    version = json.loads(max(root.glob("versions/*.json")).read_text())
    rows: list[dict[str, Any]] = []
    for name in version["commits"]:
        files = json.loads((root / name).read_text())["files"]
        for kind in ("annotated", "failed"):
            if kind in files:
                rows += pq.read_table(root / files[kind]["name"], columns=columns).to_pylist()
    return sorted(rows, key=lambda row: (row["cf_shard"], row["cf_row"]))


def digest(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True, default=repr).encode()).hexdigest()


@contextlib.contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """(address, what was posted) of a real server on this machine."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/json"
            received.append(json.loads(body))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/hook", received
    finally:
        server.shutdown()
        server.server_close()
