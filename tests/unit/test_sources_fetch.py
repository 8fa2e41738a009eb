"""Images by path or URL: a real HTTP server, failures row by row, order and bounds."""

from __future__ import annotations

import functools
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.errors import RefusedError, ShardError
from clipfilter.sources import SourceOptions, fetch, open_source
from clipfilter.sources.fetch import Fetched, Fetcher, fetch_images, fetch_in_order
from tests.support import sources as make
from tests.support.sources import read_rows, read_shard


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers /N.jpg with image N, /flaky/... at the second try, and trouble by name."""

    asked: ClassVar[dict[str, int]] = {}
    lock = threading.Lock()

    def do_GET(self) -> None:
        with self.lock:
            self.asked[self.path] = self.asked.get(self.path, 0) + 1
            times = self.asked[self.path]
        if self.path.startswith("/slow"):
            time.sleep(1.5)
        if self.path.startswith("/flaky") and times == 1:
            self.send_error(503)
        elif self.path.startswith("/down"):
            self.send_error(500)
        elif self.path.startswith("/gone"):
            self.send_error(404)
        elif self.path.startswith("/forbidden"):
            self.send_error(403)
        elif self.path.startswith("/huge"):
            self.send_response(200)
            self.end_headers()
            for _ in range(64):
                self.wfile.write(bytes(1 << 16))
        elif self.path.startswith("/cut"):
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"x" * 10)
        else:
            data = make.jpeg(int(self.path.rpartition("/")[2].partition(".")[0]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Handler.asked.clear()
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


def test_a_url_column_with_every_kind_of_trouble(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(fetch, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(fetch, "ATTEMPTS", 2)
    monkeypatch.setattr(fetch, "LARGEST_IMAGE", 1 << 20)
    names = [
        "1.jpg",
        "gone/2.jpg",
        "flaky/3.jpg",
        "down/4.jpg",
        "slow/5.jpg",
        "forbidden/6.jpg",
        "huge/7.jpg",
        "cut/8.jpg",
        "9.jpg",
    ]
    urls: list[str | None] = [f"{server}/{name}" for name in names]
    urls += ["http://127.0.0.1:9/refused.jpg", None, "", "nosuch://host/x.jpg"]
    pq.write_table(pa.table({"url": urls, "text": [f"caption {n}" for n in range(len(urls))]}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path), SourceOptions(private=True))
    rows = read_rows(source)
    assert [row["cf_error_class"] for row in rows] == [
        None, "missing_image", None, "read_error", "read_error", "missing_image", "image_too_large", "read_error", None,
        "read_error", "missing_image", "missing_image", "missing_image",
    ]  # fmt: skip
    assert [row["cf_image"] for row in rows if row["cf_image"] is not None] == [
        make.jpeg(1),
        make.jpeg(3),
        make.jpeg(9),
    ]
    assert [row["url"] for row in rows] == urls
    assert all(row["cf_error"] for row in rows if row["cf_error_class"])
    assert "HTTP 404" in rows[1]["cf_error"]
    assert Handler.asked["/flaky/3.jpg"] == 2
    assert Handler.asked["/gone/2.jpg"] == 1
    asked = sum(Handler.asked.values())
    bare, _ = read_shard(source, next(source.iter_shards()), images=False)
    assert {row["cf_error_class"] for row in bare} == {None}
    assert sum(Handler.asked.values()) == asked


def test_one_slow_server_does_not_hold_up_the_rest(server: str) -> None:
    pytest.importorskip("aiohttp")
    names = [f"{server}/slow/0.jpg", *[f"{server}/{number}.jpg" for number in range(60)]]
    started = time.monotonic()
    found = list(fetch_images(names, Fetcher([], private=True), 1 << 30))
    assert time.monotonic() - started < 1.5 * 2
    assert [item.data for item in found] == [make.jpeg(0), *[make.jpeg(number) for number in range(60)]]


def test_paths_relative_to_the_file_or_to_the_root_and_absolute_ones(tmp_path: Path) -> None:
    made = make.samples(4)
    root = tmp_path / "data"
    for place, sample in zip(("meta/near.jpg", "far.jpg", "../outside.jpg", "meta/sub/x.jpg"), made, strict=True):
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).resolve().write_bytes(sample["jpg"])
    names = [
        "near.jpg",
        "far.jpg",
        str(tmp_path / "outside.jpg"),
        "./sub/x.jpg",
        f"file://{root}/far.jpg",
        "sub",
        "near.jpg/x",
        "a\0b",
    ]
    pq.write_table(pa.table({"file_name": names}), root / "meta" / "a.parquet")
    rows = read_rows(open_source(str(root)))
    assert [row["cf_image"] for row in rows[:5]] == [made[n]["jpg"] for n in (0, 1, 2, 3, 1)]
    assert [row["cf_error_class"] for row in rows[5:]] == ["missing_image"] * 3


def test_a_struct_column_with_paths_for_missing_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_bytes(b"from the file")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [
        {"bytes": b"held", "path": None},
        {"bytes": None, "path": "x.jpg"},
        {"bytes": None, "path": "no.jpg"},
        None,
    ]
    pq.write_table(pa.table({"image": pa.array(values, kind)}), tmp_path / "a.parquet")
    rows = read_rows(open_source(str(tmp_path)))
    assert [row["cf_image"] for row in rows] == [b"held", b"from the file", None, None]
    assert [row["cf_error_class"] for row in rows] == [None, None, "missing_image", "missing_image"]
    assert [row["image.path"] for row in rows] == [None, "x.jpg", "no.jpg", None]


def test_fetched_batches_are_bounded(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.jpg").write_bytes(bytes([number]) * 1000)
    pq.write_table(pa.table({"path": [f"{number}.jpg" for number in range(20)]}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path), SourceOptions(max_batch_bytes=3500, max_batch_rows=8))
    batches = list(source.read(next(source.iter_shards())))
    assert [batch.num_rows for batch in batches] == [3, 3, 2, 3, 3, 2, 3, 1]
    assert [image[0] for batch in batches for image in batch["cf_image"].to_pylist()] == list(range(20))
    assert [row for batch in batches for row in batch["cf_row"].to_pylist()] == list(range(20))


def test_what_is_fetched_ahead_is_bounded() -> None:
    out = most = 0
    lock = threading.Lock()

    def get(number: int) -> Fetched:
        nonlocal out, most
        with lock:
            out += 1
            most = max(most, out)
        return Fetched(bytes(1000))

    for _ in fetch_in_order(range(500), get, 20_000, lambda found: len(found.data or b""), workers=4):
        with lock:
            out -= 1
        time.sleep(0.0005)
    assert 4 < most <= 20 + 4 + 1  # the bytes allow 20, and each worker may have begun one before


def test_errors_of_the_caller_stop_the_fetching() -> None:
    asked = []

    def get(number: int) -> Fetched:
        asked.append(number)
        time.sleep(0.001)
        return Fetched(bytes(1000))

    found = fetch_in_order(range(10_000), get, 10_000, lambda item: 1000, workers=2)
    next(found)
    found.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    count = len(asked)
    time.sleep(0.05)
    assert len(asked) == count < 1000


@pytest.fixture
def website(tmp_path: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()


def test_datasets_on_a_plain_web_server(tmp_path: Path, website: str) -> None:
    pytest.importorskip("aiohttp")
    made = make.samples(4)
    for number in range(2):
        make.write_webdataset(tmp_path / "tars" / f"{number:05d}.tar", made[2 * number : 2 * number + 2])
    make.write_parquet(tmp_path / "data.parquet", made, style="path")
    images = [sample["jpg"] for sample in made]
    for url, wanted in (
        (f"{website}/tars/00001.tar", images[2:]),
        (f"{website}/tars/{{00000..00001}}.tar", images),
        (f"{website}/tars", images),
        (f"{website}/data.parquet", images),
    ):
        source = open_source(url)
        assert [row["cf_image"] for row in read_rows(source)] == wanted, url
    source = open_source(f"{website}/tars/{{00000..00002}}.tar")
    with pytest.raises(ShardError, match="does not exist"):
        read_shard(source, list(source.iter_shards())[2])
    with pytest.raises(RefusedError, match="does not exist"):
        open_source(f"{website}/nothing.tar")
