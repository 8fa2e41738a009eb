"""The account of everything in a source: each file is a row, a part, a container or passed over for a reason."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from clipfilter.engine import JobRequest, run_job
from clipfilter.engine.overview import plan_overview
from clipfilter.errors import RefusedError
from clipfilter.nightly import NightRequest, run_night
from clipfilter.operations import verify_run
from clipfilter.runs import Run
from clipfilter.sources import Location, Seen, Source, open_source
from clipfilter.sources.discover import _walk_remote, below
from tests.support.engine import photos

PICTURES = [data for _, data, _ in photos()]
#: name -> content, of a folder as people have them.
FOLDER = {
    "a.jpg": PICTURES[0],
    "a.txt": b"a caption of a",
    "lonely.txt": b"of nothing",
    "sub/b.jpg": PICTURES[1],
    "sub/no_ending": PICTURES[2],
    "sub/no_ending.txt": b"a caption of what has no ending",
    "sub/wrong.backup": PICTURES[3],
    "sub/film.mp4": b"\0\0\0\x18ftypmp42",
    "sub/layers": b"8BPS\0\1" + bytes(30),
    "weights.pt": b"PK\3\4",
    "empty": b"",
    "README": b"plain words",
    ".DS_Store": b"\0",
    ".git/objects/aa": b"x",
    ".git/objects/bb": b"x",
    "__MACOSX/c.jpg": b"x",
}
PASSED = {
    "unclaimed": 1, "unsupported": 2, "pickle": 1, "empty": 1, "unknown_type": 1, "hidden": 4, "not_a_file": 2,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "source"
    for name, data in FOLDER.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    (root / "nowhere.jpg").symlink_to(tmp_path / "gone")
    os.mkfifo(root / "pipe.jpg")  # reading it would wait for ever
    return root


def account(source: Source) -> Seen:
    """What a source's listing and the reads of all its shards saw."""
    seen = Seen()
    for shard in source.iter_shards():
        reader = source.read(shard)
        for _ in reader:
            pass
        seen.add(reader.stats.seen)
    assert source.listing is not None
    seen.add(source.listing)
    return seen


def test_every_file_of_a_folder_is_accounted_for(folder: Path) -> None:
    seen = account(open_source(str(folder)))
    assert (seen.rows, seen.parts, seen.containers) == (4, 2, 0)
    assert {name: count for name, count in seen.passed.items() if count} == PASSED
    assert seen.things == sum(len(files) for _, _, files in os.walk(folder)) == open_source(str(folder)).count_files()
    assert seen.examples["hidden"] == [".DS_Store", ".git/", "__MACOSX/"]
    assert "2 of a format that is not read (sub/film.mp4, sub/layers)" in "\n".join(seen.told())
    assert Seen.from_json(seen.to_json()) == seen


def test_a_link_that_leads_back_up_is_passed_over_once(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(PICTURES[0])
    (tmp_path / "in" / "up").symlink_to(tmp_path)
    source = open_source(str(tmp_path))
    seen = account(source)
    assert (seen.rows, seen.passed["not_a_file"], source.count_files()) == (1, 1, None)


def test_a_remote_listing_sees_what_a_local_one_does(folder: Path) -> None:
    for name in ("nowhere.jpg", "pipe.jpg"):  # an object store has no such things
        (folder / name).unlink()
    local, remote = Seen(), Seen()
    for here in Location(str(folder)).walk(local):
        assert here.files is not None
    for there in _walk_remote(f"local://{folder}"):
        for reason, name, count in there.passed:
            remote.pass_over(reason, below(there.path, name), count)
    assert local.counts() == remote.counts()
    assert local.examples == remote.examples


def test_pictures_beside_tars_are_named_and_not_read(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        (tmp_path / "x.jpg").write_bytes(PICTURES[0])
        tar.add(tmp_path / "x.jpg", "x.jpg")
    for name in ("0_stats.json", "0.parquet", "notes.csv"):
        (tmp_path / name).write_bytes(b"")
    seen = account(open_source(str(tmp_path)))
    assert (seen.rows, seen.parts, seen.containers) == (1, 2, 1)
    assert dict(seen.passed) == {"other_kind": 1, "unclaimed": 1}


def test_pictures_without_an_ending_make_a_folder(tmp_path: Path) -> None:
    for number, data in enumerate(PICTURES[:3]):
        (tmp_path / f"{number:05d}").write_bytes(data)
    source = open_source(str(tmp_path))
    assert (source.kind, account(source).rows) == ("folder", 3)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a").write_bytes(b"no picture")
    with pytest.raises(RefusedError, match=r"but a\)"):
        open_source(str(tmp_path / "words"))


def test_a_run_keeps_the_account_and_verify_compares_it_with_the_source(folder: Path, tmp_path: Path) -> None:
    request = JobRequest("embed", str(folder), str(tmp_path / "out"), engine="local")
    result = run_job(request)
    seen = result.totals.seen
    assert seen is not None
    assert (seen.rows, seen.things) == (result.totals.rows, sum(len(files) for _, _, files in os.walk(folder)))
    assert run_job(request).version == result.version, "the same source again is no new version"
    proof = verify_run(result.out)
    assert not proof.problems
    assert any("the source lists the same 18 files today" in line for line in proof.proved)
    filtered = run_job(JobRequest("filter", result.out, str(tmp_path / "out2"), policy="curate-basic", engine="local"))
    assert filtered.totals.seen == seen
    (folder / "new.md").write_text("words")
    proof = verify_run(result.out)
    assert not proof.problems
    assert any("not what it was" in line for line in proof.notes)
    shutil.rmtree(folder)
    assert any("cannot be listed" in line for line in verify_run(result.out).notes)


def test_nights_keep_the_account_that_one_run_over_all_has(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.jpg").write_bytes(PICTURES[0])
    (source / "notes.csv").write_text("when,what\nnow,this\n")
    request = NightRequest(JobRequest("score", str(source), str(tmp_path / "nights"), engine="local"))
    assert run_night(request).exit_code == 0
    (source / "b").write_bytes(PICTURES[1])
    (source / "b.txt").write_text("a caption")
    (source / ".hidden").write_bytes(b"")
    grown = run_night(request).totals.seen
    at_once = run_job(JobRequest("score", str(source), str(tmp_path / "run"), engine="local")).totals.seen
    assert grown == at_once
    assert grown is not None
    assert grown.counts() == (2, 1, 0, {"hidden": 1, "unclaimed": 1})
    assert grown.told()[-1] == "not read: notes.csv, no column names a picture"


def test_rows_left_out_by_a_limit_are_counted(folder: Path, tmp_path: Path) -> None:
    result = run_job(JobRequest("embed", str(folder), str(tmp_path / "out"), engine="local", limit=1))
    seen = next(Run(result.out).commits()).seen
    assert seen is not None
    assert (seen.rows, seen.passed["not_chosen"]) == (1, 3)


def test_a_run_without_a_row_says_what_was_there(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "source").mkdir()
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "source" / "a.parquet")
    (tmp_path / "source" / "b.jpg").write_bytes(PICTURES[0])
    result = run_job(JobRequest("embed", str(tmp_path / "source"), str(tmp_path / "out"), engine="local"))
    assert result.exit_code == 3
    assert result.messages[0] == (
        "The source has no row, so nothing was judged; it holds 1 container and 1 other thing: 1 beside files of another kind "
        "(b.jpg)."
    )


def test_a_dry_run_refuses_what_the_run_would(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    overview = plan_overview(JobRequest("embed", str(folder), str(out), engine="local"))
    assert not out.exists()
    assert [row["key"] for row in overview["first_rows"]] == ["a.jpg", "sub/b.jpg", "sub/no_ending", "sub/wrong.backup"]
    first = overview["first_rows"][0]
    assert (first["caption"], first["bytes"], max(first["width"], first["height"])) == (
        "a caption of a",
        len(PICTURES[0]),
        240,
    )
    assert overview["account"]["rows"] == 4
    out.write_text("a file")
    with pytest.raises(RefusedError, match="cannot be written"):
        plan_overview(JobRequest("embed", str(folder), str(out / "below"), engine="local"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(RefusedError, match=r"holds other files \(letter.txt\)"):
        plan_overview(JobRequest("embed", str(folder), str(tmp_path / "full"), engine="local"))
    with pytest.raises(RefusedError, match="--address needs a Ray cluster"):
        plan_overview(JobRequest("embed", str(folder), str(tmp_path / "new"), engine="local", address="auto"))
