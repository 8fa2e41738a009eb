"""Image folders: what is a row, where captions come from, chunks, copies; and img2dataset's files output."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from clipfilter.errors import RefusedError
from clipfilter.sources import Shard, Source, SourceOptions, open_source
from clipfilter.sources.model import row_uid
from tests.support import sources as make
from tests.support.sources import read_rows, read_shard

FOLDERS = ("", "b", "b/c", "a")


@pytest.mark.parametrize("captions", ["txt", "json", "csv", "tsv", "jsonl"])
def test_captions_from_files_beside_or_from_a_table(tmp_path: Path, captions: Any) -> None:
    made = make.samples(12)
    make.write_image_folder(tmp_path, made, captions=captions, folders=FOLDERS)
    source = open_source(str(tmp_path))
    assert (source.kind, source.has_captions) == ("folder", True)
    rows = read_rows(source)
    by_key = {sample["__key__"]: sample for sample in made}
    order = [row["cf_key"] for row in rows]
    assert order[:3] == ["000000000.jpg", "000000004.jpg", "000000008.jpg"]
    assert order[3].startswith("a/")
    assert order[6].startswith("b/0")
    assert order[9].startswith("b/c/")
    for row in rows:
        sample = by_key[row["cf_key"].rpartition("/")[2][:-4]]
        assert row["cf_image"] == sample["jpg"]
        assert row["cf_captions"] == [sample["txt"]]
        assert row["cf_error_class"] is None
    if captions in ("csv", "tsv", "jsonl"):
        assert source.schema.names == ["file_name", "text", "rating"]
        assert source.schema.field("rating").type == pa.int64()
        assert [row["rating"] for row in rows] == [int(row["cf_key"].rpartition("/")[2][:-4]) for row in rows]
    if captions == "json":
        assert rows[1]["cf_uid"] == make.uid(4)
    elif captions == "txt":
        assert rows[1]["cf_uid"] == row_uid(".", "000000004.jpg")
    assert Source.from_plan(json.loads(json.dumps(source.to_plan()))).schema == source.schema


def test_only_visible_images_are_rows(tmp_path: Path) -> None:
    for name in (
        "x.jpg",
        "x.PNG",
        "y.webp",
        "x.txt",
        "notes.md",
        ".hidden.jpg",
        "._x.jpg",
        "Thumbs.db",
        "sub/.git/a.jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"caption of x")
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "x.jpg").write_bytes(b"no")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    rows = read_rows(open_source(str(tmp_path)))
    assert [(row["cf_key"], row["cf_captions"]) for row in rows] == [
        ("x.PNG", ["caption of x"]), ("x.jpg", ["caption of x"]), ("y.webp", None),
    ]  # fmt: skip
    assert len({row["cf_uid"] for row in rows}) == 3


def test_chunks_and_their_etags(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path, make.samples(10), folders=("a", "b"))
    source = open_source(str(tmp_path), SourceOptions(rows_per_shard=4))
    shards = list(source.iter_shards())
    assert [(shard.start, shard.stop, len(shard.members)) for shard in shards] == [(0, 4, 4), (4, 8, 4), (8, 10, 2)]
    assert Shard.from_json(json.loads(json.dumps(shards[1].to_json()))) == shards[1]
    rows = [row for shard in shards for row in read_shard(source, shard)[0]]
    assert [row["cf_row"] for row in rows] == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert read_shard(source, shards[1], rows=[2])[0] == [rows[6]]
    assert read_shard(source, shards[1], rows=[2], images=False)[0] == [{**rows[6], "cf_image": None}]
    (tmp_path / "b" / "000000009.txt").write_text("another caption")
    (tmp_path / "b" / "zzz.jpg").write_bytes(b"new")
    again = list(source.iter_shards())
    assert [shard.id for shard in again] == [shard.id for shard in shards]
    assert [shard.etag == old.etag for shard, old in zip(again, shards, strict=True)] == [True, True, False]


def test_tables_in_the_images_own_folder_come_first_and_may_repeat_an_image(tmp_path: Path) -> None:
    for name in ("train/1.jpg", "train/2.jpg", "test/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "train" / "metadata.jsonl").write_text(
        '{"file_name": "1.jpg", "text": "own", "extra": {"a": 1}}\nbroken\n'
    )
    (tmp_path / "captions.txt").write_text(
        'image,caption\n./train/1.jpg,root\ntrain/2.jpg,"two, quoted"\ntrain/2.jpg,another\n2.jpg,x\ntest\\1.jpg,007\n'
    )
    source = open_source(str(tmp_path))
    rows = {row["cf_key"]: row for row in read_rows(source)}
    assert rows["train/1.jpg"]["cf_captions"] == ["own"]
    assert json.loads(rows["train/1.jpg"]["extra"]) == {"a": 1}
    assert rows["train/2.jpg"]["cf_captions"] == ["two, quoted", "another"]
    assert rows["test/1.jpg"]["cf_captions"] == ["007"]


def test_csv_columns_keep_their_type(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")
    (tmp_path / "data.csv").write_text("key,n,f,code,caption\n0,1,0.5,007,1984\n1,2,1,08,\n2,,1e3,9,text\n")
    source = open_source(str(tmp_path))
    types = {item.name: str(item.type) for item in source.schema}
    assert (types["n"], types["f"], types["code"], types["caption"]) == ("int64", "double", "string", "string")
    rows = read_rows(source)
    assert [row["cf_captions"] for row in rows] == [["1984"], None, ["text"], None]
    assert [row["code"] for row in rows] == ["007", "08", "9", None]
    with open(tmp_path / "data.csv", "a") as handle:
        handle.write("3,many,x,z,last\n")
    row = read_rows(Source.from_plan(source.to_plan()))[3]
    assert (row["n"], row["f"], row["cf_captions"]) == (None, None, ["last"])
    assert json.loads(row["cf_source_json"]) == {"n": "many", "f": "x"}


@pytest.mark.parametrize("captions", ["txt", "json", "csv", "tsv", "jsonl"])
def test_copies_are_image_folders_again(tmp_path: Path, captions: Any) -> None:
    make.write_image_folder(tmp_path / "in", make.samples(12), captions=captions, folders=FOLDERS)
    source = open_source(str(tmp_path / "in"))
    (shard,) = source.iter_shards()
    rows, _ = read_shard(source, shard)
    chosen = [11, 2, 5]
    assert source.copy_rows(shard, chosen, tmp_path / "1") == 3
    source.copy_rows(shard, sorted(chosen), tmp_path / "2")
    files = sorted(path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file())
    assert len(files) == (6 if captions in ("txt", "json") else 4)
    assert [(tmp_path / "1" / name).read_bytes() for name in files] == [
        (tmp_path / "2" / name).read_bytes() for name in files
    ]
    copied = read_rows(open_source(str(tmp_path / "1")))
    for name in ("cf_key", "cf_image", "cf_captions", "cf_uid", *source.schema.names):
        assert [row[name] for row in copied] == [rows[number][name] for number in sorted(chosen)]
    if captions == "jsonl":
        original = (tmp_path / "in" / "metadata.jsonl").read_text().splitlines()
        assert set((tmp_path / "1" / "metadata.jsonl").read_text().splitlines()) < set(original)


def test_an_image_that_went_costs_its_row(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path, make.samples(3))
    source = open_source(str(tmp_path))
    (shard,) = source.iter_shards()
    (tmp_path / "000000001.jpg").unlink()
    rows, _ = read_shard(source, shard)
    assert [row["cf_error_class"] for row in rows] == [None, "missing_image", None]
    assert rows[1]["cf_image"] is None
    assert "there is no file" in rows[1]["cf_error"]


def test_odd_file_names_are_taken_literally(tmp_path: Path) -> None:
    names = [" space .jpg", "#hash?q.jpg", "data:x.jpg", "http:y.jpg", "per%20cent.jpg", "{a,b}[1]*.jpg", "ünïcode.jpg"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / name).with_suffix(".txt").write_text(name)
    source = open_source(str(tmp_path))
    rows = read_rows(source)
    assert [row["cf_key"] for row in rows] == names
    assert [row["cf_image"] for row in rows] == [name.encode() for name in names]
    assert [row["cf_captions"] for row in rows] == [[name] for name in names]
    source.copy_rows(next(source.iter_shards()), range(len(names)), tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.jpg")} == set(names)


def test_file_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9.jpg"
    with open(path, "wb") as handle:
        handle.write(b"x")
    source = Source.from_plan(json.loads(json.dumps(open_source(str(tmp_path)).to_plan())))
    shard = Shard.from_json(json.loads(json.dumps(next(source.iter_shards()).to_json())))
    (row,) = read_shard(source, shard)[0]
    assert (row["cf_key"], row["cf_image"]) == ("caf\\udce9.jpg", b"x")


def test_a_single_image_and_a_glob(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path, make.samples(12), folders=FOLDERS)
    assert [row["cf_key"] for row in read_rows(open_source(str(tmp_path / "b" / "000000001.jpg")))] == ["000000001.jpg"]
    rows = read_rows(open_source(str(tmp_path / "*" / "*.jpg")))
    wanted = [("a", 3), ("a", 7), ("a", 11), ("b", 1), ("b", 5), ("b", 9)]
    assert [row["cf_key"] for row in rows] == [f"{folder}/{number:09d}.jpg" for folder, number in wanted]
    assert all(row["cf_captions"] for row in rows)


def test_image_column_makes_no_sense_here(tmp_path: Path) -> None:
    make.write_image_folder(tmp_path, make.samples(1))
    with pytest.raises(RefusedError, match="--image-column does not apply"):
        open_source(str(tmp_path), SourceOptions(image_column="image"))
    with pytest.raises(RefusedError, match="--caption-column nope is not in"):
        open_source(str(tmp_path), SourceOptions(caption_column="nope"))


def test_img2dataset_files(tmp_path: Path) -> None:
    made = make.samples(30)
    make.write_img2dataset(tmp_path, made, failures=6, format="files")
    make.write_img2dataset(tmp_path, made[:4], failures=1, format="files", shard=1, unfinished=True)
    make.write_img2dataset(tmp_path, [], failures=3, format="files", shard=2)
    for path in (tmp_path / "00001").glob("*.json"):
        path.unlink()
    source = open_source(str(tmp_path), SourceOptions(rows_per_shard=20))
    assert source.kind == "img2dataset-files"
    shards = list(source.iter_shards())
    assert [(shard.path, shard.start, shard.stop) for shard in shards] == [
        ("00000", 0, 20), ("00000", 20, 30), ("00001", 0, 4), ("00002", 0, 0),
    ]  # fmt: skip
    read = [read_shard(source, shard) for shard in shards]
    assert [stats.not_downloaded for _, stats in read] == [6, 0, 1, 3]
    assert [stats.unfinished for _, stats in read] == [False, False, True, False]
    for row in [row for rows, _ in read[:2] for row in rows]:
        number = int(row["cf_key"])
        assert row["cf_image"] == made[number]["jpg"]
        assert row["cf_captions"] == [made[number]["txt"]]
        assert row["cf_uid"] == make.uid(number)
    assert all(row["original_width"] == 640 and row["status"] == "success" for row in read[2][0])
    assert source.copy_rows(shards[2], [0, 3], tmp_path / "out") == 2
    assert sorted(path.suffix for path in (tmp_path / "out" / "00001").iterdir()) == [".jpg", ".jpg", ".txt", ".txt"]
