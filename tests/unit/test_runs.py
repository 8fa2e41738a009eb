"""A run as a noun: what it records reads strictly and goes back to the same bytes; a directory opens as what it is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipfilter.errors import RefusedError
from clipfilter.runs import Base, Commit, FailedShard, Run, RunVectors, Totals, Version, Work, WorkerDetails, ledger
from clipfilter.runs.plan import Plan
from clipfilter.sources import Seen, Shard
from clipfilter.storage import Directory
from tests.support.runs import MACHINE, commit_of, version_of
from tests.support.search import unit, write_run

SHARD = Shard("a" * 16, "folder", "folder", 0, 2, members=("a.jpg", "ü.jpg"), size=5, etag="e")
FILE = {"name": "annotated/a.parquet", "rows": 2, "bytes": 10, "sha256": "f" * 64}
WORKED = Work(1.5, 2.25, MACHINE, WorkerDetails({"decode": 0.1}, 1, False, 0, 0.0, None))
COUNTS = {"rows": 3, "failed": 1, "embedded": 2}
DECIDED = {**COUNTS, "keep": 1, "review": 0, "reject": 1, "decided": 2, "escalated": 1}
SOURCE = {"not_downloaded": 1, "duplicate_keys": 0, "clashes": 0, "misfits": 0}

SEEN = Seen(
    3, 2, 0, Counter(hidden=2), {"hidden": ["ü/"]}, {"metadata.csv": 2}, {"notes.csv": "no column names a picture"}
)

COMMITS = {
    "run": commit_of(SHARD, "decided", counts=DECIDED | SOURCE, files={"annotated": FILE}, work=WORKED),
    "embed": commit_of(SHARD, counts=COUNTS | SOURCE, files={"embeddings": FILE, "annotated": FILE}, work=WORKED),
    "scored": commit_of(SHARD, "scored", counts=COUNTS | SOURCE, files={"scored": FILE}, work=WORKED),
    "fraction": commit_of(
        SHARD, "decided", counts=DECIDED | SOURCE, base_generation=1, thresholds={"r.reject": 0.5}, work=WORKED
    ),
    "filter": commit_of(
        SHARD, "decided", counts=DECIDED | SOURCE, base_generation=2, base=Base("/run", "commits/x"), work=WORKED
    ),
    "import": commit_of(SHARD, counts=COUNTS, files={"annotated": FILE}),
    "seen": commit_of(SHARD, counts=COUNTS, seen=SEEN),
    "damaged": commit_of(SHARD, counts=COUNTS, damaged=True, bytes_unread=7, failed_by_class={"read_error": 1}),
}


@pytest.mark.parametrize("kind", COMMITS)
def test_a_commit_goes_back_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    commit, created = ledger.write_commit(directory, COMMITS[kind])
    assert created
    text = directory.read_bytes(commit.name)
    read = ledger.read_commit(directory, commit.name)
    assert read == COMMITS[kind]
    assert (json.dumps(read.to_json(), indent=1, ensure_ascii=False) + "\n").encode() == text
    assert list(json.loads(text))[-1] == "work"


VERSIONS = {
    "job": version_of([COMMITS["run"]], thresholds={"r.reject": None}),
    "failed shards": version_of([COMMITS["run"]], failed_shards=[FailedShard(SHARD, "broken", 3)]),
    "listed": version_of([COMMITS["seen"]], listing=Seen(0, 1, 1, Counter(empty=1))),
    "rolled back": version_of([COMMITS["embed"]], rolled_back_to=1, set_aside=[]),
    "set aside": version_of([COMMITS["embed"]], set_aside=["commits/x"]),
}


@pytest.mark.parametrize("kind", VERSIONS)
def test_a_version_goes_back_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    written = ledger.write_version(directory, VERSIONS[kind])
    assert (written.number, written.name) == (1, "000001")
    read = ledger.newest_version(directory)
    assert read == written
    assert read is not None
    assert (json.dumps(read.to_json(), indent=1) + "\n").encode() == directory.read_bytes("versions/000001.json")
    assert ledger.write_version(directory, VERSIONS[kind]) == written, "the same again is no new version"
    # The keys keep the order of the file, whoever wrote it.
    backwards = dict(reversed(read.to_json().items()))
    assert list(Version.from_json(backwards, "x").to_json()) == list(backwards)


def _changed(value: dict[str, Any], path: tuple[str, ...], change: str) -> dict[str, Any]:
    copy = json.loads(json.dumps(value))
    inner = copy
    for name in path:
        inner = inner[name]
    if change == "add":
        inner["surprise"] = 1
    else:
        del inner[next(iter(inner))]
    return copy


@pytest.mark.parametrize("path", [(), ("shard",), ("files",), ("files", "annotated"), ("counts",), ("work",)])
def test_a_commit_with_an_unknown_key_is_refused_by_file_and_key(path: tuple[str, ...]) -> None:
    changed = _changed(COMMITS["run"].to_json(), path, "add")
    with pytest.raises(RefusedError, match=r"^/run/commits/a\.json.* has the key 'surprise'.*restore"):
        Commit.from_json(changed, "/run/commits/a.json")


@pytest.mark.parametrize(
    ("path", "key"), [((), "shard"), (("shard",), "id"), (("files", "annotated"), "name"), (("work",), "seconds")]
)
def test_a_commit_that_lacks_a_key_is_refused_by_file_and_key(path: tuple[str, ...], key: str) -> None:
    changed = _changed(COMMITS["run"].to_json(), path, "remove")
    named = r"has the key 'attempt'" if path == ("work",) else f"lacks the key '{key}'"
    with pytest.raises(RefusedError, match=rf"^/run/commits/a\.json.* {named}"):
        Commit.from_json(changed, "/run/commits/a.json")


def test_versions_and_plans_are_read_as_strictly(tmp_path: Path) -> None:
    version = VERSIONS["failed shards"].to_json()
    for path, change, key in [
        ((), "add", "surprise"),
        (("totals",), "remove", "rows"),
        (("totals",), "add", "surprise"),
    ]:
        with pytest.raises(RefusedError, match=rf"^v\.json.* key '{key}'"):
            Version.from_json(_changed(version, path, change), "v.json")
    with pytest.raises(RefusedError, match=r"v\.json does not hold a JSON object"):
        Version.from_json([], "v.json")
    run = write_run(tmp_path / "run", {0: unit(3)})
    plan = json.loads((run / "plan.json").read_text())
    (run / "plan.json").write_text(json.dumps(plan | {"surprise": 1}))
    with pytest.raises(RefusedError, match=r"plan\.json has the key 'surprise'"):
        Run(str(run))


def test_totals_add_up_and_absent_counts_are_none() -> None:
    totals = Totals.of([COMMITS["run"], COMMITS["import"], COMMITS["damaged"]], [FailedShard(SHARD, "broken", 3)] * 2)
    assert (totals.rows, totals.decided, totals.failed, totals.escalated) == (9, 2, 3, 1)
    assert (totals.failed_by_class, totals.damaged_shards, totals.bytes_unread) == ({"read_error": 1}, 1, 7)
    assert (totals.shards, totals.failed_shards) == (3, 2)
    assert "escalated" not in Totals.of([COMMITS["import"]], [])
    assert COMMITS["import"].counts.decided == 0


def test_a_run_knows_its_versions_shards_and_embeddings(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", {0: unit(3), 1: unit(4)})
    write_run(path, {1: unit(2, seed=9)}, generation=2)
    run = Run.open(str(path))
    assert (run.finished, run.version.number, run.dim) == (True, 2, 32)
    assert [commit.generation for commit in run.commits()] == [1, 2]
    assert [shard.rows.num_rows for shard in run.shards()] == [3, 2]
    assert [run.failed(commit).num_rows for commit in run.commits()] == [0, 0]
    assert "cf_decision" not in next(run.shards()).rows.column_names
    columns = [(commit.shard.path, batch.num_rows) for commit, batch in run.batches(columns=["cf_uid"], size=2)]
    assert columns == [("0.tar", 2), ("0.tar", 1), ("1.tar", 2)]
    with RunVectors(run) as vectors:
        assert vectors.rows == 5
        rows, embeddings = vectors.stored(1)
        assert rows["cf_uid"].to_pylist() == embeddings["cf_uid"].to_pylist() == ["uid-1-0", "uid-1-1"]
    assert Run.open(str(path), 1).version.name == "000001"
    assert run.directory.unfinished() == [], "reading writes nothing"
    with pytest.raises(RefusedError, match="has no version 7; it has 1, 2"):
        Run(str(path), 7)


def test_a_filtered_run_leads_to_the_run_it_decided(tmp_path: Path) -> None:
    base = write_run(tmp_path / "base", {0: unit(3)})
    origin = Run.open(str(base))
    out = Directory(str(tmp_path / "filtered"))
    source = {"run": origin.url, "version": "000001", "plan_sha256": "p", "source": origin.plan.source}
    out.create("plan.json", replace(origin.plan, job="filter", source=source).to_bytes())
    (commit,) = origin.commits()
    annotated = commit.files.annotated
    assert annotated is not None
    out.create(annotated.name, Path(base, annotated.name).read_bytes())
    decided = commit_of(
        commit.shard, "decided", files={"annotated": annotated}, base_generation=1, base=Base(origin.url, commit.name)
    )
    ledger.write_commit(out, decided)
    assert not Run(out.url).finished
    with pytest.raises(RefusedError, match="has not finished; repeat its command"):
        Run.open(out.url)
    assert Run(out.url).origin().url == origin.url, "its embeddings are there before it has finished"
    ledger.write_version(out, version_of([decided]))
    run = Run.open(out.url)
    assert (run.origin().url, run.dataset) == (origin.url, origin.plan.source)
    shard = run.read(decided)
    assert shard is not None
    assert shard.embeddings.num_rows == 3
    np.testing.assert_array_equal(RunVectors(run).vectors_at([1]), RunVectors(origin).vectors_at([1]))
    base.rename(tmp_path / "gone")
    with pytest.raises(RefusedError, match=r"decided the rows of .*base"):
        RunVectors(run)
    with pytest.raises(RefusedError, match="base, and that is gone"):
        run.read(decided)


def test_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"is not a run directory \(it has no plan.json\)"):
        Run(str(tmp_path))
    Directory(str(tmp_path)).create("plan.json", Plan("run", {}, None, None, {}, {}, False).to_bytes())
    assert not Run(str(tmp_path)).finished
    with pytest.raises(RefusedError, match="has not finished"):
        _ = Run(str(tmp_path)).version


def test_columns_batches_versions_and_first_stages_of_a_run(tmp_path: Path) -> None:
    url = write_run(tmp_path / "run", {0: unit(10), 1: unit(7, seed=1)})
    write_run(url, {1: unit(4, seed=2)}, generation=2)
    run = Run.open(str(url))
    assert [version.number for version in run.versions()] == [1, 2]
    old = Run.open(str(url), 1)
    found = list(old.batches("annotated", lambda name: name in ("cf_key", "absent"), size=4))
    assert [batch.schema.names for _, batch in found] == [["cf_key"]] * len(found)
    assert [(commit.shard.id, batch.num_rows) for commit, batch in found] == [
        (commit.shard.id, rows)
        for commit, sizes in zip(old.commits(), ((4, 4, 2), (4, 3)), strict=True)
        for rows in sizes
    ]
    assert list(old.batches("failed")) == []
    first = next(old.commits())
    assert old.table(first.files["annotated"], ["cf_uid"]).column_names == ["cf_uid"]
    assert [commit.name for commit in old.commits([first.name])] == [first.name]
    assert list(old.scored()) == []
    scored = commit_of(first.shard, "scored")
    for commit in (scored, replace(scored, generation=2), commit_of("f" * 16, "scored")):
        ledger.write_commit(old.directory, commit)
    assert [commit.name for commit in old.scored()] == [f"commits/{first.shard.id}.scored.002.json"]
