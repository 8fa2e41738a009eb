"""Plans, commits and versions: create-only, first one wins, a different plan is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from clipfilter.errors import RefusedError
from clipfilter.runs import Commit, FailedShard, Totals, ledger
from clipfilter.runs.plan import Plan, read_plan, settle_plan
from clipfilter.sources import Shard
from clipfilter.storage import Directory, file_sha256
from tests.support.runs import commit_of, version_of

PLAN = Plan(
    job="run",
    source={"url": "/data", "kind": "webdataset"},
    policy={"policy": "p", "rules": []},
    policy_sha256="a" * 64,
    model={"model": "nano@1", "weights_sha256": "b" * 64},
    options={"batch_size": 64, "decode": "fast"},
    text_column=True,
)


def commit(shard: str, rows: int = 3, **more: object) -> Commit:
    counts = {"rows": rows, "failed": 1, "decided": rows - 1, "keep": rows - 1, "review": 0, "reject": 0, "embedded": 2}
    return commit_of(shard, "decided", counts=counts, failed_by_class={"decode_error": 1}, **more)


def test_an_equal_plan_is_accepted_and_a_different_one_refused_by_name(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path / "out"))
    assert settle_plan(directory, PLAN) == PLAN
    assert settle_plan(directory, PLAN) == PLAN
    other = replace(PLAN, options={"batch_size": 32, "decode": "fast"})
    with pytest.raises(RefusedError, match=r"options\.batch_size was 64, now 32.*another --out"):
        settle_plan(directory, other)
    assert read_plan(directory) == PLAN
    assert read_plan(directory).sha256 == PLAN.sha256 != other.sha256  # type: ignore[union-attr]


def test_a_plan_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"format": 99, "created_by": "clipfilter 9"}')
    with pytest.raises(RefusedError, match="clipfilter 9"):
        read_plan(Directory(str(tmp_path)))


def test_of_many_writers_exactly_one_creates_a_commit(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))

    def attempt(number: int) -> tuple[Commit, bool]:
        return ledger.write_commit(Directory(str(tmp_path)), commit_of("0" * 16, "decided", bytes_unread=number))

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(attempt, range(24)))
    assert sum(created for _, created in results) == 1
    assert len({result.bytes_unread for result, _ in results}) == 1
    assert directory.names("commits") == ["0" * 16 + ".decided.001.json"]


def test_the_newest_generation_of_each_stage_counts(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    for generation in (1, 2, 10):
        ledger.write_commit(directory, commit_of("a" * 16, "decided", generation=generation))
    ledger.write_commit(directory, commit_of("a" * 16, "scored"))
    (tmp_path / "commits" / "notes.txt").write_text("not a commit")
    found = ledger.list_commits(directory)
    assert {key: name.generation for key, name in found.items()} == {
        ("a" * 16, "decided"): 10,
        ("a" * 16, "scored"): 1,
    }


def test_versions_count_up_and_an_unchanged_dataset_makes_none(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    assert ledger.newest_version(directory) is None
    first = version_of([commit("a")])
    assert ledger.write_version(directory, first).name == "000001"
    assert ledger.write_version(directory, first).name == "000001"
    assert ledger.write_version(directory, version_of([commit("b")])).name == "000002"
    assert ledger.newest_version(directory).number == 2  # type: ignore[union-attr]


def test_totals_are_sums_and_name_failure_classes() -> None:
    totals = Totals.of(
        [commit("a"), commit("b", 5, damaged=True, bytes_unread=7)],
        [FailedShard(Shard("f" * 16, "f.tar", "tar"), "broken", 3)],
    )
    assert (totals["rows"], totals["decided"], totals["failed"]) == (8, 6, 2)
    assert totals["failed_by_class"] == {"decode_error": 2}
    assert (totals["failed_shards"], totals["damaged_shards"], totals["bytes_unread"]) == (1, 1, 7)


def test_nothing_unfinished_is_ever_visible(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path / "out"))
    part = directory.scratch() / "part"
    part.write_bytes(b"x" * 1000)
    assert directory.names("annotated") == []
    assert [p.name for p in (tmp_path / "out").iterdir()] == [directory.scratch().name]
    directory.publish(part, "annotated/a-1.parquet")
    assert directory.names("annotated") == ["a-1.parquet"]
    directory.clean_scratch(stale_only=False)
    assert directory.unfinished() == []


def test_a_folder_is_published_whole_and_hashed_by_names_and_contents(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path / "out"))
    for attempt in range(2):
        folder = directory.scratch() / f"kept{attempt}"
        (folder / "b").mkdir(parents=True)
        (folder / "b" / "1.jpg").write_bytes(b"one")
        (folder / "a.jpg").write_bytes(b"two")
        digest = file_sha256(folder)
        directory.publish(folder, f"kept/{digest[:16]}")
    assert directory.names("kept") == [digest[:16]]
    assert file_sha256(tmp_path / "out" / "kept" / digest[:16]) == digest
    (tmp_path / "out" / "kept" / digest[:16] / "a.jpg").write_bytes(b"2wo")
    assert file_sha256(tmp_path / "out" / "kept" / digest[:16]) != digest
