"""The unit judged is the unit copied: samples of several pictures through a job and what follows it."""

from __future__ import annotations

import hashlib
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.engine import JobRequest, run_job
from clipfilter.operations import export_run, forget_rows, verify_run
from clipfilter.runs import Run
from tests.support import sources as make
from tests.support.engine import photos, policy_file

POLICY = """
policy: bright
version: 1
rules:
  - id: bright
    pixels: dark
    reject: {below: 110}
"""
PICTURES = [data for _, data, _ in photos()[:12]]


def tar(folder: Path) -> None:
    """Names with dots, two formats of one key, a depth map before its picture, no extension."""
    make.write_members(folder / "a.tar", MEMBERS)


def packed(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        for name, data in MEMBERS:
            archive.writestr(name, data)


MEMBERS = [
    *((f"i.5x_{n}.{kind}", data) for n in range(4) for kind, data in (("jpg", PICTURES[n]), ("txt", b"words of %d" % n))),
    ("a.png", PICTURES[4]), ("a.jpg", PICTURES[5]), ("a.txt", b"words of a"),
    ("k.depth.png", PICTURES[6]), ("k.jpg", PICTURES[7]), ("k.json", b'{"caption": "words of k"}'), ("n", PICTURES[8]),
    ("n.txt", b"words of n"), *((f"{n}.jpg", PICTURES[n]) for n in range(9, 12)),
]  # fmt: skip


def table(folder: Path) -> None:
    lists = [PICTURES[:3], PICTURES[3:4], PICTURES[4:8], [], PICTURES[8:]]
    column = pa.array([[{"bytes": data, "path": None} for data in one] for one in lists])
    pq.write_table(pa.table({"images": column, "text": [f"words of {n}" for n in range(5)]}), folder / "a.parquet")


def saved(folder: Path) -> None:
    """What `datasets` saves: an Arrow stream, with the file that says so."""
    table(folder)
    read = pq.read_table(folder / "a.parquet")
    (folder / "a.parquet").unlink()
    with pa.OSFile(str(folder / "data-0.arrow"), "wb") as handle, pa.ipc.new_stream(handle, read.schema) as stream:
        stream.write_table(read, max_chunksize=2)
    (folder / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')


def pictures_below(folder: Path) -> Counter[bytes]:
    """Every picture in the copies below a folder."""
    found: Counter[bytes] = Counter()
    for path in folder.rglob("*.tar"):
        with tarfile.open(path) as opened:
            members = [opened.extractfile(member).read() for member in opened]  # type: ignore[union-attr]
        found.update(data for data in members if data in PICTURES)
    for path in folder.rglob("*.parquet"):
        if (column := pq.read_table(path).to_pydict().get("images")) is not None:
            found.update(item["bytes"] for one in column for item in one)
    return found


@pytest.mark.parametrize("kind", [tar, packed, table, saved])
def test_every_picture_is_judged_copied_exported_and_forgotten_by_itself(kind: object, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    kind(tmp_path / "in")  # type: ignore[operator]
    run, policy = tmp_path / "run", policy_file(tmp_path, POLICY)
    run_job(JobRequest("run", str(tmp_path / "in"), str(run), policy=policy, engine="local", max_failures=1))
    (commit,) = Run.open(str(run)).commits()
    rows = Run.open(str(run)).table(commit.files.annotated).to_pylist()
    by_sha = {row["cf_sha256"]: row for row in rows}
    assert len(by_sha) == len(rows) == len(PICTURES)
    assert len({row["cf_uid"] for row in rows}) == len(rows)
    kept = {row["cf_sha256"] for row in rows if row["cf_decision"] == "keep"}
    assert 2 < len(kept) < 11

    def wanted(shas: set[str]) -> Counter[bytes]:
        return Counter(data for data in PICTURES if hashlib.sha256(data).hexdigest() in shas)

    assert pictures_below(run / "kept") == wanted(kept)
    assert verify_run(str(run)).problems == []
    export_run(str(run), str(tmp_path / "export"))
    export_run(str(run), str(tmp_path / "repacked"), rows_per_shard=2)
    for folder in ("export", "repacked"):
        assert pictures_below(tmp_path / folder) == wanted(kept)
    again = tmp_path / "filtered"
    run_job(JobRequest("filter", str(run), str(again), policy=policy, engine="local", max_failures=1))
    export_run(str(again), str(tmp_path / "again"))
    assert pictures_below(tmp_path / "again") == wanted(kept)
    gone = sorted(kept)[0]
    (tmp_path / "uids.txt").write_text(by_sha[gone]["cf_uid"])
    assert forget_rows(str(run), str(tmp_path / "uids.txt")).rows == 1
    assert pictures_below(run / "kept") == wanted(kept - {gone})
    assert verify_run(str(run)).problems == []
