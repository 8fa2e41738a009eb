"""Finding out what lies at a path or URL: patterns, refusals, and planning that opens next to nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from clipfilter.errors import RefusedError
from clipfilter.sources import SourceOptions, open_source
from clipfilter.sources.discover import expand_braces, locate
from tests.support import sources as make
from tests.support.sources import read_rows


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("a{0..2}.tar", ["a0.tar", "a1.tar", "a2.tar"]),
        ("{00008..00011}", ["00008", "00009", "00010", "00011"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("x{a,{0..1}}y", ["xay", "x0y", "x1y"]),
        ("{,x}z", ["z", "xz"]),
        ("plain", ["plain"]),
        ("{single}", ["{single}"]),
        ("{un{0..1}", ["{un0", "{un1"]),
        ("a}b{", ["a}b{"]),
        ("{0..3}{", ["0{", "1{", "2{", "3{"]),
    ],
)
def test_braces(pattern: str, wanted: list[str]) -> None:
    assert list(expand_braces(pattern)) == wanted


def test_braces_like_the_braceexpand_library() -> None:
    braceexpand = pytest.importorskip("braceexpand").braceexpand
    for pattern in ("{000..012}.tar", "{a,b{1..3}c}", "x{1,2}{3..4}", "{01..3}"):
        assert list(expand_braces(pattern)) == list(braceexpand(pattern))


def test_huge_braces_are_lazy() -> None:
    assert list(itertools.islice(expand_braces("{0..999999999999}.tar"), 2)) == ["0.tar", "1.tar"]


def test_files_globs_and_braces_agree(tmp_path: Path) -> None:
    for number in range(12):
        make.write_webdataset(tmp_path / "part" / f"{number:05d}.tar", make.samples(1, start=number))
    make.write_webdataset(tmp_path / "other.tar", make.samples(1, start=90))

    def keys(pattern: str) -> list[int]:
        return [int(row["cf_key"]) for row in read_rows(open_source(f"{tmp_path}/{pattern}"))]

    assert keys("part/{00003..00005}.tar") == [3, 4, 5]
    assert keys("part/0000[0-2].tar") == [0, 1, 2]
    assert keys("*/{00010,00001}.tar") == [10, 1]
    assert keys("part/00007.tar") == [7]
    assert keys("**/*[0r].tar") == [90, 0, 10]
    assert keys("part/../part/00007.tar") == [7]
    assert keys("") == [90, *range(12)]
    assert open_source(f"file://{tmp_path}/part").kind == "webdataset"
    single = open_source(f"{tmp_path}/part/00007.tar")
    assert next(single.iter_shards()).path == "00007.tar"


def test_a_path_with_special_characters_that_exists_is_taken_literally(tmp_path: Path) -> None:
    make.write_webdataset(tmp_path / "data[1]{x,y}" / "a.tar", make.samples(1))
    assert len(read_rows(open_source(str(tmp_path / "data[1]{x,y}")))) == 1


def test_a_missing_shard_of_a_brace_shows_up(tmp_path: Path) -> None:
    make.write_webdataset(tmp_path / "0.tar", make.samples(1))
    source = open_source(f"{tmp_path}/{{0..1}}.tar")
    assert [shard.path for shard in source.iter_shards()] == ["0.tar", "1.tar"]


@pytest.mark.parametrize(
    ("prepare", "url", "message"),
    [
        (None, "nothing", "does not exist; check the spelling"),
        (None, "*.tar", r"No file matches .*\*\.tar"),
        ("empty/", "empty", "is empty; give webdataset tars"),
        ("docs/readme.md", "docs", r"holds no tar, Parquet or image file \(but readme.md\)"),
        ("x.bin", "x.bin", "holds no tar, Parquet or image file"),
        (None, "nosuchscheme://bucket/x", "not a location clipfilter knows|cannot be read"),
        (None, "pipe:cat x", "would start a program"),
    ],
)
def test_refusals_say_what_to_do(tmp_path: Path, prepare: str | None, url: str, message: str) -> None:
    if prepare:
        target = tmp_path / prepare
        (target if prepare.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not prepare.endswith("/"):
            target.write_text("x")
    with pytest.raises(RefusedError, match=message) as refusal:
        open_source(url if ":" in url else str(tmp_path / url))
    assert str(refusal.value).endswith(".")
    assert "\n" not in str(refusal.value)


class CountingFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """An in-memory store that counts what is opened."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    opened: ClassVar[list[str]] = []

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("counting://").strip("/")

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        if mode == "rb":
            self.opened.append(path)
        return super()._open(path, mode, **options)

    def cat_file(self, path: str, **options: Any) -> bytes:
        self.opened.append(path)
        return super().cat_file(path, **options)


@pytest.mark.parametrize("suffix", ["tar", "parquet", "jpg"])
def test_planning_a_large_store_opens_a_handful_of_files(tmp_path: Path, suffix: str) -> None:
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    store = fsspec.filesystem("counting")
    CountingFileSystem.store.clear()
    count = 3000
    if suffix == "tar":
        data = make.write_webdataset(tmp_path / "a", make.samples(2)).read_bytes()
    elif suffix == "parquet":
        data = make.write_parquet(tmp_path / "a", make.samples(2)).read_bytes()
    else:
        data = make.jpeg(0)
    for number in range(count):
        store.pipe_file(f"/bucket/{number:06d}.{suffix}", data)
    CountingFileSystem.opened.clear()
    source = open_source("counting:///bucket", SourceOptions(rows_per_shard=500))
    assert len(set(CountingFileSystem.opened)) <= 8
    CountingFileSystem.opened.clear()
    shards = source.iter_shards()
    first = next(shards)
    assert len(set(CountingFileSystem.opened)) <= 1
    assert first.start == 0
    total = 1 + sum(1 for _ in shards)
    assert total == (count // 500 if suffix == "jpg" else count)
    if suffix != "parquet":
        assert not CountingFileSystem.opened
    rows = [row for batch in source.read(first) for row in batch.to_pylist()]
    assert all(row["cf_image"] for row in rows)
    (tmp_path / "out").mkdir()
    assert source.copy_rows(first, [1], tmp_path / "out" / "copy") == 1


def test_the_root_of_a_pattern(tmp_path: Path) -> None:
    location = locate(f"{tmp_path}/a/{{train,val}}/*.tar")
    assert (location.root, location.pattern) == (f"{tmp_path}/a", "{train,val}/*.tar")
