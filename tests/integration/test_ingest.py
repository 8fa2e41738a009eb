"""500 URLs of a real server: each ends in one state, the shards are readable, and nothing is fetched twice for nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.errors import RefusedError
from clipfilter.ingest import IngestRequest, ingest, plan_ingest
from clipfilter.sources import open_source
from tests.support.engine import REPO, cli
from tests.support.sources import jpeg
from tests.support.web import Web, web

# Found, not imported: it imports Ray, which reads its authentication mode then, for all tests of this process.
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(importlib.util.find_spec("img2dataset") is None, reason="needs the extra `ingest`"),
]

#: How many URLs of each kind, and the state they must end in.
KINDS = {
    "good": (250, "success"),
    "png": (20, "success"),
    "slow": (20, "success"),
    "redirect": (30, "success"),
    "harmless": (10, "success"),
    "404": (40, "failed_to_download"),
    "410": (5, "failed_to_download"),
    "500": (20, "failed_to_download"),
    "503": (10, "failed_to_download"),
    "cut": (15, "failed_to_download"),
    "stuck": (5, "failed_to_download"),
    "loop": (5, "failed_to_download"),
    "file": (5, "failed_to_download"),
    "html": (20, "failed_to_resize"),
    "empty": (5, "failed_to_resize"),
    "short": (10, "failed_to_resize"),
    "optout": (30, "opted_out"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Web]:
    with web() as running:
        yield running


def urls(server: Web) -> list[tuple[str, str]]:
    """(URL, its kind) of 500 URLs, kinds mixed."""
    made = [(f"{server.base}/{kind}/{n}.jpg", kind) for kind, (count, _) in KINDS.items() for n in range(count)]
    assert len(made) == 500
    return sorted(made, key=lambda item: hash_of(item[0].rpartition(":")[2]))


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.partition("/")[2].encode()).hexdigest()


def status(out: Path) -> dict[str, dict[str, Any]]:
    rows = pq.read_table(out / "_ingest" / "status.parquet").to_pylist()
    assert len({row["uid"] for row in rows}) == len(rows), "one state per row"
    return {row["url"]: row for row in rows}


def write_list(path: Path, listed: list[tuple[str, str]]) -> str:
    captions = [f"picture of {url.rpartition('/')[2]}, {kind}" for url, kind in listed]
    table = pa.table({"URL": [url for url, _ in listed], "TEXT": captions, "width": list(range(len(listed)))})
    pq.write_table(table, path)
    return str(path)


def test_every_url_ends_in_one_state_and_only_failures_are_fetched_again(server: Web, tmp_path: Path) -> None:
    listed = urls(server)
    out = tmp_path / "shards"
    request = IngestRequest(
        write_list(tmp_path / "urls.parquet", listed),
        str(out),
        rows_per_shard=200,
        threads=32,
        deadline=4.0,
        private=True,
    )
    assert plan_ingest(request)["to fetch"] == 500
    assert not out.exists()
    first = ingest(request)
    assert first.exit_code == 0
    states = status(out)
    assert set(states) == {url for url, _ in listed}
    wrong = {url: states[url] for url, kind in listed if states[url]["state"] != KINDS[kind][1]}
    assert wrong == {}
    wanted: Counter[str] = Counter()
    for count, state in KINDS.values():
        wanted[state] += count
    assert first.states == first.fetched == dict(wanted)
    assert all(row["error"] for row in states.values() if row["state"] != "success")
    assert "HTTP 503" in states[f"{server.base}/503/1.jpg"]["error"]
    assert "not whole after" in states[f"{server.base}/stuck/1.jpg"]["error"]
    assert "bytes are missing" in states[f"{server.base}/cut/1.jpg"]["error"]
    for url, kind in listed:
        if kind not in ("loop", "redirect"):
            assert server.asked[url.removeprefix(server.base)] == 1, f"{url} was asked for more than once"

    # The shards hold the very bytes, and are a source like any other.
    source = open_source(str(out))
    assert source.kind == "img2dataset-webdataset"
    rows = [row for shard in source.iter_shards() for batch in source.read(shard) for row in batch.to_pylist()]
    assert len(rows) == wanted["success"]
    for row in rows:
        assert row["uid"] == row["cf_uid"] == states[row["url"]]["uid"]
        assert row["caption"].startswith("picture of ")
        assert isinstance(row["source_width"], int), "a column of the list keeps its value under another name"
        if "/good/" in row["url"]:
            assert row["cf_image"] == jpeg(int(row["url"].rpartition("/")[2].split(".")[0]))
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            keys = {member.name.split(".")[0] for member in tar}
        assert keys == {row["key"] for row in states.values() if row["shard"] == path.stem}

    # The second run: some servers have recovered. Only what failed is asked for.
    server.healed = {f"/500/{n}.jpg" for n in range(15)} | {f"/html/{n}.jpg" for n in range(4)}
    server.asked.clear()
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    second = ingest(request)
    asked = {path for path in server.asked if "/good/" not in path}
    failed = {url.removeprefix(server.base) for url, kind in listed if KINDS[kind][1].startswith("failed")}
    assert asked == failed
    assert not any("/good/" in path for path in server.asked)
    assert second.fetched["success"] == 19
    assert second.states["success"] == wanted["success"] + 19
    assert sum(second.states.values()) == 500
    again = status(out)
    assert {again[url]["attempt"] for url, kind in listed if KINDS[kind][1] == "success"} == {1}
    assert {again[url]["attempt"] for url, kind in listed if KINDS[kind][1].startswith("failed")} == {2}
    assert {path.name: path.read_bytes() for path in out.glob("*.tar") if path.name in before} == before
    source = open_source(str(out))
    total = sum(batch.num_rows for shard in source.iter_shards() for batch in source.read(shard, images=False))
    assert total == second.states["success"]

    # Only failures that may pass; then a longer list: only what is new.
    server.asked.clear()
    transient = IngestRequest(**{**request.__dict__, "retry": "transient"})
    assert 0 < plan_ingest(transient)["to fetch"] < plan_ingest(request)["to fetch"]
    longer = [*listed, (f"{server.base}/good/900.jpg", "good"), (f"{server.base}/good/900.jpg", "good")]
    write_list(tmp_path / "urls.parquet", longer[:-1])
    third = ingest(IngestRequest(**{**request.__dict__, "retry": "none"}))
    assert (dict(server.asked), third.fetched) == ({"/good/900.jpg": 1}, {"success": 1})
    assert ingest(IngestRequest(**{**request.__dict__, "retry": "none"})).fetched == {}
    assert len(server.asked) == 1


def test_private_addresses_and_local_files_are_refused_without_a_request(server: Web, tmp_path: Path) -> None:
    port = server.base.rpartition(":")[2]
    bad = [
        f"{server.base}/good/1.jpg", f"http://localhost:{port}/good/2.jpg", f"http://[::1]:{port}/good/3.jpg",
        f"http://[::ffff:127.0.0.1]:{port}/good/4.jpg", f"http://2130706433:{port}/good/5.jpg",
        "http://169.254.169.254/latest/meta-data/6.jpg", "http://10.0.0.1/7.jpg",
    ]  # fmt: skip
    other = ["file:///etc/hostname", "ftp://127.0.0.1/8.jpg", "data:image/png;base64,AAAA", "no url at all"]
    (tmp_path / "urls.txt").write_text("\n".join([*bad, *other, bad[0]]) + "\n")
    server.asked.clear()
    result = ingest(IngestRequest(str(tmp_path / "urls.txt"), str(tmp_path / "out"), timeout=3))
    assert result.duplicates == 1
    assert sum(server.asked.values()) == 0
    found = status(tmp_path / "out")
    assert {url: found[url]["state"] for url in bad} == dict.fromkeys(bad, "refused")
    assert {url: found[url]["state"] for url in other} == dict.fromkeys(other, "refused")
    assert not list((tmp_path / "out").glob("*.tar")), "no empty shard"
    again = ingest(IngestRequest(str(tmp_path / "urls.txt"), str(tmp_path / "out"), timeout=3))
    assert again.fetched == {}, "what was refused is not tried again"


def test_a_killed_ingest_is_finished_by_the_same_command(server: Web, tmp_path: Path) -> None:
    listed = [f"{server.base}/{'slow' if n % 40 == 0 else 'good'}/{n}.jpg" for n in range(200)]
    (tmp_path / "urls.csv").write_text("url,caption\n" + "".join(f'{url},"one, two"\n' for url in listed))
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "clipfilter", "ingest", str(tmp_path / "urls.csv"), "--out", str(out), "--private",
        "--rows-per-shard", "40", "--threads", "4",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, cwd=REPO, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not list(out.glob("*.tar")):
        time.sleep(0.005)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    assert 0 < len(done) < 5
    # What a kill between outcomes and tar leaves behind: the outcomes claim rows that are in no shard.
    orphan = out / "_ingest" / "outcomes" / "00000004.parquet"
    if not orphan.exists():
        rows = pq.read_table(out / "_ingest" / "outcomes" / "00000000.parquet")
        pq.write_table(rows.set_column(4, "shard", pa.array(["00000004"] * 40)), orphan)
    server.asked.clear()
    summary = json.loads(cli(*command[3:], "--json").stdout)
    assert summary["states"] == {"success": 200}
    assert sum(server.asked.values()) == 200 - 40 * len(done)
    assert {path.name: path.read_bytes() for path in out.glob("*.tar") if path.name in done} == done
    names = Counter()
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            names.update(json.load(tar.extractfile(m))["url"] for m in tar if m.name.endswith(".json"))  # type: ignore[arg-type]
    assert names == Counter(listed)


def test_scaled_images_and_refusals(server: Web, tmp_path: Path) -> None:
    (tmp_path / "urls.txt").write_text(
        f"{server.base}/good/1.jpg\n{server.base}/png/2.jpg\n{server.base}/html/19.jpg\n"
    )
    request = IngestRequest(str(tmp_path / "urls.txt"), str(tmp_path / "out"), image_size=32, private=True)
    assert ingest(request).states == {"success": 2, "failed_to_resize": 1}
    source = open_source(str(tmp_path / "out"))
    rows = [row for shard in source.iter_shards() for batch in source.read(shard) for row in batch.to_pylist()]
    assert [(row["height"], row["original_height"]) for row in rows] == [(32, 72), (32, 72)]
    with pytest.raises(RefusedError, match="choose another --out"):
        ingest(IngestRequest(str(tmp_path / "urls.txt"), str(tmp_path / "out"), private=True))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(RefusedError, match="holds other files"):
        ingest(IngestRequest(str(tmp_path / "urls.txt"), str(tmp_path / "full")))
