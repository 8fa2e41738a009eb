"""Webdataset tars and img2dataset's tar output as sources: rows, columns, counts, copies."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from clipfilter.errors import RefusedError, ShardError
from clipfilter.sources import Shard, Source, SourceOptions, open_source
from clipfilter.sources.model import row_uid
from clipfilter.sources.spool import unzipped
from tests.support import sources as make
from tests.support.sources import read_rows, read_shard


def test_rows_carry_image_captions_identity_and_fields(tmp_path: Path) -> None:
    made = make.samples(30)
    make.write_webdataset(tmp_path / "00000.tar", made[:20])
    make.write_webdataset(tmp_path / "sub" / "00001.tar", made[20:])
    source = open_source(str(tmp_path))
    assert (source.kind, source.has_captions) == ("webdataset", True)
    assert source.schema.names == ["caption", "url", "uid", "original_width", "original_height", "score"]
    shards = list(source.iter_shards())
    assert [shard.path for shard in shards] == ["00000.tar", "sub/00001.tar"]
    assert all(len(shard.id) == 16 and shard.size and shard.etag for shard in shards)
    rows = read_rows(source)
    assert [row["cf_row"] for row in rows] == [*range(20), *range(10)]
    for row, sample in zip(rows, made, strict=True):
        assert row["cf_key"] == sample["__key__"]
        assert row["cf_image"] == sample["jpg"]
        assert row["cf_captions"] == [sample["txt"]]
        assert row["cf_uid"] == sample["json"]["uid"] == row["uid"]
        assert row["score"] == sample["json"]["score"]
        assert row["cf_error_class"] is row["cf_error"] is row["cf_source_json"] is None


def test_the_plan_rebuilds_the_source_without_looking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make.write_webdataset(tmp_path / "a.tar", make.samples(5))
    source = open_source(str(tmp_path), SourceOptions(max_batch_rows=2))
    shards = list(source.iter_shards())
    plan = json.loads(json.dumps(source.to_plan()))
    monkeypatch.setattr("clipfilter.sources.source.detect", None)
    again = Source.from_plan(plan)
    assert again.schema.equals(source.schema, check_metadata=True)
    assert (again.kind, again.has_captions, again.options) == (source.kind, source.has_captions, source.options)
    shard = Shard.from_json(json.loads(json.dumps(shards[0].to_json())))
    assert shard == shards[0]
    batches = list(again.read(shard))
    assert [batch.num_rows for batch in batches] == [2, 2, 1]
    assert again.to_plan() == plan


def test_batches_are_bounded_by_bytes(tmp_path: Path) -> None:
    made = make.samples(10)
    make.write_webdataset(tmp_path / "a.tar", made)
    size = max(len(sample["jpg"]) for sample in made)
    source = open_source(str(tmp_path), SourceOptions(max_batch_bytes=3 * size))
    (shard,) = source.iter_shards()
    for batch in source.read(shard):
        assert sum(len(image) for image in batch["cf_image"].to_pylist()) <= 3 * size
    tiny = open_source(str(tmp_path), SourceOptions(max_batch_bytes=1))
    assert [batch.num_rows for batch in tiny.read(shard)] == [1] * 10


def test_chosen_rows_and_no_images(tmp_path: Path) -> None:
    make.write_webdataset(tmp_path / "a.tar", make.samples(10))
    source = open_source(str(tmp_path))
    (shard,) = source.iter_shards()
    everything, _ = read_shard(source, shard)
    some, stats = read_shard(source, shard, rows=[7, 2])
    assert some == [everything[2], everything[7]]
    assert stats.rows == 2
    bare, _ = read_shard(source, shard, rows=[3], images=False)
    assert bare == [{**everything[3], "cf_image": None}]


def test_json_fields_are_frozen_and_the_rest_is_kept_as_json(tmp_path: Path) -> None:
    first = [
        {
            "__key__": f"{n}",
            "jpg": b"x",
            "json": f'{{"n": {n}, "f": NaN, "tags": ["a"], "deep": {{"x": [1]}}, "none": null}}',
        }
        for n in range(5)
    ]
    second = [
        {"__key__": "0", "jpg": b"x", "json": {"n": "five", "f": 1, "tags": [1], "deep": [1, 2], "none": "now text"}},
        {"__key__": "1", "jpg": b"x", "json": {"n": 2**70, "f": float("inf"), "new": {"b": float("nan")}, "n2": 1}},
        {"__key__": "2", "jpg": b"x", "json": b'{"n": 1, '},
        {"__key__": "3", "jpg": b"x", "json": b"[1, 2]"},
        {"__key__": "4", "jpg": b"x", "json": b'{"none": "\\ud800", "f": 2.5, "n": 3.0}'},
        {"__key__": "5", "jpg": b"x", "json": b"[" * 100_000},
    ]
    make.write_webdataset(tmp_path / "0.tar", first)
    make.write_webdataset(tmp_path / "1.tar", second)
    source = open_source(str(tmp_path / "0.tar"))
    types = {item.name: item.type for item in source.schema}
    assert types == {
        "n": pa.int64(), "f": pa.float64(), "tags": pa.list_(pa.string()), "deep": pa.string(), "none": pa.string()
    }  # fmt: skip
    rows = read_rows(source)
    assert [row["n"] for row in rows] == list(range(5))
    assert all(math.isnan(row["f"]) and json.loads(row["deep"]) == {"x": [1]} for row in rows)
    plan = source.to_plan()
    plan["pattern"] = None
    wider = Source.from_plan(plan)
    shard = list(wider.iter_shards())[1]
    rows, stats = read_shard(wider, shard)
    left = [json.loads(row["cf_source_json"]) if row["cf_source_json"] else None for row in rows]
    assert left[0] == {"n": "five", "tags": [1]}
    assert (rows[0]["f"], rows[0]["none"], json.loads(rows[0]["deep"])) == (1.0, "now text", [1, 2])
    assert left[1] == {"n": 2**70, "new": {"b": None}, "n2": 1}
    assert rows[1]["f"] == math.inf
    assert left[2] == {"json": '{"n": 1, '}
    assert left[3] == {"json": [1, 2]}
    assert left[4] == {"none": "\ud800"}
    assert (rows[4]["f"], rows[4]["n"]) == (2.5, 3)
    assert left[5] is not None
    assert stats.misfits == 6


def test_captions_come_from_text_members_and_lists(tmp_path: Path) -> None:
    make.write_webdataset(
        tmp_path / "a.tar",
        [
            {"__key__": "0", "jpg": b"x", "txt": "one", "json": {"captions": ["one", "two", None, " ", "two"]}},
            {"__key__": "1", "jpg": b"x", "json": {"captions": [], "text": "from text"}},
            {"__key__": "2", "jpg": b"x", "txt": "  \n"},
            {"__key__": "3", "jpg": b"x", "caption": "caption member", "json": {"text": "other"}},
            {"__key__": "4", "jpg": b"x", "txt": b"\xef\xbb\xbflatin \xe9\r\n"},
        ],
    )
    rows = read_rows(open_source(str(tmp_path)))
    assert [row["cf_captions"] for row in rows] == [
        ["one", "two"], ["from text"], None, ["caption member"], ["latin �"],
    ]  # fmt: skip
    named = read_rows(open_source(str(tmp_path), SourceOptions(caption_column="text")))
    assert [row["cf_captions"] for row in named] == [None, ["from text"], None, ["other"], None]
    member = read_rows(open_source(str(tmp_path), SourceOptions(caption_column="txt")))
    assert [row["cf_captions"] for row in member][3] is None
    with pytest.raises(RefusedError, match=r"--caption-column legend is not in .*captions, text"):
        open_source(str(tmp_path), SourceOptions(caption_column="legend"))


def test_uids_are_the_sources_or_a_hash_of_path_and_key(tmp_path: Path) -> None:
    good = "ABCDEF0123456789abcdef0123456789"
    make.write_webdataset(
        tmp_path / "d" / "a.tar",
        [
            {"__key__": "0", "jpg": b"x", "json": {"uid": good, "id": 7}},
            {"__key__": "1", "jpg": b"x", "json": {"uid": "not one", "id": 8}},
            {"__key__": "2", "jpg": b"x", "json": {"id": None}},
            {"__key__": "2", "jpg": b"y", "json": {}},
        ],
    )
    rows = read_rows(open_source(str(tmp_path)))
    assert [row["cf_uid"] for row in rows] == [
        good, row_uid("d/a.tar", "1"), row_uid("d/a.tar", "2"), row_uid("d/a.tar", "2", 2),
    ]  # fmt: skip
    assert len({row["cf_uid"] for row in rows}) == 4
    named = read_rows(open_source(str(tmp_path), SourceOptions(uid_column="id")))
    assert [row["cf_uid"] for row in named][:2] == ["7", "8"]
    assert named[2]["cf_uid"] == row_uid("d/a.tar", "2")


def test_columns_of_an_earlier_run_travel_under_another_name(tmp_path: Path) -> None:
    fields = {"cf_similarity": 0.5, "cf_score.weapons": 0.1, "cf_prev_similarity": 0.4, "cf_decision": "keep"}
    make.write_webdataset(tmp_path / "a.tar", [{"__key__": "0", "jpg": b"x", "json": fields}])
    source = open_source(str(tmp_path))
    (row,) = read_rows(source)
    assert {name: row[name] for name in source.schema.names} == {
        "cf_prev_similarity": 0.5, "cf_prev_score.weapons": 0.1, "cf_prev_decision": "keep",
    }  # fmt: skip
    assert row["cf_source_json"] is None
    make.write_webdataset(tmp_path / "a.tar", [{"__key__": "0", "jpg": b"x", "json": {"cf_mine": 1}}])
    with pytest.raises(RefusedError, match=r"cf_mine.*rename"):
        open_source(str(tmp_path))


def test_damage_is_counted_and_rows_before_it_are_read(tmp_path: Path) -> None:
    path = make.write_webdataset(tmp_path / "a.tar", make.samples(20))
    whole = read_rows(open_source(str(tmp_path)))
    make.cut(path, path.read_bytes().index(make.jpeg(10)) + 1000)
    source = open_source(str(tmp_path))
    (shard,) = source.iter_shards()
    rows, stats = read_shard(source, shard)
    assert rows == whole[:10]
    assert (stats.damaged, stats.bytes_unread) == (True, 1000 + 512)


def test_counts_of_trouble(tmp_path: Path) -> None:
    make.write_members(
        tmp_path / "a.tar",
        [
            ("a.jpg", b"1"), ("a.png", b"2"), ("b.txt", b"alone"), ("c.jpg", b"3"), ("a.jpg", b"4"), ("e.pkl", b"."),
            ("c.pyd", b"cos\nsystem\n(S'touch /tmp/clipfilter-pwned'\ntR."), ("c.cls", b"12"),
        ],
    )  # fmt: skip
    source = open_source(str(tmp_path))
    (shard,) = source.iter_shards()
    rows, stats = read_shard(source, shard)
    assert [(row["cf_key"], row["cf_image"], row["cf_error_class"]) for row in rows] == [
        ("a.jpg", b"1", None), ("a.png", b"2", None), ("b", None, "missing_image"), ("c", b"3", None), ("a", b"4", None),
    ]  # fmt: skip
    assert rows[2]["cf_error"]
    assert rows[3]["cls"] == 12
    assert (stats.duplicate_keys, stats.clashes) == (1, 0)
    assert (stats.seen.rows, stats.seen.parts, stats.seen.passed) == (5, 1, {"pickle": 2})
    assert not os.path.exists("/tmp/clipfilter-pwned")
    without, _ = read_shard(source, shard, images=False)
    assert all(row["cf_error_class"] is None for row in without)


def test_an_image_extension_of_ones_own(tmp_path: Path) -> None:
    make.write_members(tmp_path / "a.tar", [("a.input.bin", b"1"), ("a.mask.png", b"2"), ("a.txt", b"t")])
    (row,) = read_rows(open_source(str(tmp_path), SourceOptions(image_column="input.bin")))
    assert row["cf_image"] == b"1"
    make.write_members(tmp_path / "a.tar", [("a.npy", b"1"), ("a.txt", b"t")])
    with pytest.raises(RefusedError, match=r"no image members; its extensions are: npy, txt .*--image-column"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.tar.bz2", "a.tar.xz", "a.tar.zst"])
def test_zipped_tars(tmp_path: Path, name: str) -> None:
    make.write_webdataset(tmp_path / "plain.tar", make.samples(150))
    plain = read_rows(open_source(str(tmp_path / "plain.tar")))
    path = make.write_webdataset(tmp_path / name, make.samples(150))
    source = open_source(str(path))
    rows, stats = read_shard(source, next(source.iter_shards()))
    assert [row["cf_image"] for row in rows] == [row["cf_image"] for row in plain]
    assert not stats.damaged
    make.cut(path, 0.6)
    source = open_source(str(path))
    rows, stats = read_shard(source, next(source.iter_shards()))
    assert 40 < len(rows) < 110 or "bz2" in name  # which unzips blocks of 900 kB, or nothing
    assert stats.damaged


def test_a_stream_that_fails_is_not_taken_for_a_zipped_tar_that_breaks_off() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 1000:
                raise OSError("connection reset")
            return super().read(500)

    for zipped in (gzip.compress, bz2.compress, lzma.compress):
        with pytest.raises(OSError, match="connection reset"):
            list(unzipped(Failing(zipped(os.urandom(100_000)))))
    assert b"".join(unzipped(io.BytesIO(gzip.compress(b"a") + gzip.compress(b"b") + bytes(99)))) == b"ab"


def test_a_tar_that_changed_or_went_is_a_failed_shard(tmp_path: Path) -> None:
    path = make.write_webdataset(tmp_path / "a.tar", make.samples(3))
    source = open_source(str(tmp_path))
    (shard,) = source.iter_shards()
    make.write_webdataset(path, make.samples(4))
    with pytest.raises(ShardError, match="has changed since it was listed"):
        read_shard(source, shard)
    path.unlink()
    with pytest.raises(ShardError, match="does not exist any more"):
        read_shard(source, shard)
    with pytest.raises(ShardError):
        source.copy_rows(shard, [0], tmp_path / "out.tar")


# --- copies -----------------------------------------------------------------------------------------------------------


def tar_members(path: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(path) as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]


def test_a_copy_has_the_rows_members_as_they_are_and_is_deterministic(tmp_path: Path) -> None:
    made = make.samples(10)
    listed = make.members(made)
    make.write_members(tmp_path / "in" / "a.tar", [*listed[::2], *listed[1::2]])  # members of a key come apart
    source = open_source(str(tmp_path / "in"))
    (shard,) = source.iter_shards()
    keys = [row["cf_key"] for row in read_shard(source, shard)[0]]
    assert source.copy_rows(shard, [5, 1, 2], tmp_path / "1.tar") == 3
    assert source.copy_rows(shard, [1, 2, 5], tmp_path / "2.tar") == 3
    data = (tmp_path / "1.tar").read_bytes()
    assert data == (tmp_path / "2.tar").read_bytes()
    assert len(data) % tarfile.RECORDSIZE == 0
    copied = tar_members(tmp_path / "1.tar")
    assert [name.partition(".")[0] for name, _ in copied] == [keys[row] for row in (1, 2, 5) for _ in range(3)]
    assert set(copied) == {item for item in listed if item[0].partition(".")[0] in {keys[row] for row in (1, 2, 5)}}
    with tarfile.open(tmp_path / "1.tar") as tar:
        assert all((info.mtime, info.uid, info.gid, info.uname) == (0, 0, 0, "") for info in tar)
    rows = read_rows(open_source(str(tmp_path / "1.tar")))
    again = read_shard(source, shard, rows=[1, 2, 5])[0]
    assert [row["cf_image"] for row in rows] == [row["cf_image"] for row in again]


def test_copied_duplicates_get_names_of_their_own_and_paths_are_made_safe(tmp_path: Path) -> None:
    long = "long/" * 30 + "name"
    listed = [
        ("a.jpg", b"1"), ("a.txt", b"t1"), ("../../b.jpg", b"2"), ("a.jpg", b"3"), ("a.txt", b"t3"),
        ("/abs/c.jpg", b"4"), (f"{long}.jpg", b"5"),
        ("./d.jpg", b"6"), ("a~2.jpg", b"7"), ("e.pkl", b"pickle"), ("e.jpg", b"8"),
    ]  # fmt: skip
    make.write_members(tmp_path / "a.tar", listed)
    source = open_source(str(tmp_path / "a.tar"))
    (shard,) = source.iter_shards()
    rows, _ = read_shard(source, shard)
    assert source.copy_rows(shard, range(len(rows)), tmp_path / "out.tar") == len(rows) == 8
    copied = tar_members(tmp_path / "out.tar")
    names = [name for name, _ in copied]
    assert len(set(names)) == len(names)
    assert not any(name.startswith("/") or ".." in name.split("/") for name in names)
    assert dict(copied) == {
        "a.jpg": b"1", "a.txt": b"t1", "b.jpg": b"2", "a~2.jpg": b"3", "a~2.txt": b"t3", "abs/c.jpg": b"4",
        f"{long}.jpg": b"5", "./d.jpg": b"6", "a~2~2.jpg": b"7", "e.pkl": b"pickle", "e.jpg": b"8",
    }  # fmt: skip
    with pytest.raises(IndexError):
        source.copy_rows(shard, [8], tmp_path / "out.tar")


DOTTED = [
    (f"img_1.5x_{n}.{kind}", data) for n in range(3) for kind, data in (("jpg", make.jpeg(n)), ("txt", b"text %d" % n))
]


def test_pictures_with_dots_in_their_names_are_rows_of_their_own_also_in_copies(tmp_path: Path) -> None:
    make.write_members(tmp_path / "a.tar", [*DOTTED, ("img_1.json", b'{"uid": "%s", "lens": "50 mm"}' % (b"a" * 32))])
    source = open_source(str(tmp_path))
    (shard,) = source.iter_shards()
    rows, stats = read_shard(source, shard)
    assert [(row["cf_key"], row["cf_captions"], row["lens"]) for row in rows] == [
        (f"img_1.5x_{n}.jpg", [f"text {n}"], "50 mm") for n in range(3)
    ]
    assert [row["cf_image"] for row in rows] == [make.jpeg(n) for n in range(3)]
    assert len({row["cf_uid"] for row in rows}) == 3  # though the sample has one uid
    assert (stats.seen.rows, stats.seen.parts, stats.seen.passed) == (3, 4, {})
    assert source.copy_rows(shard, [0, 2], tmp_path / "out.tar") == 2
    assert dict(tar_members(tmp_path / "out.tar")) == {
        "img_1~5x_0.jpg": make.jpeg(0), "img_1~5x_0.txt": b"text 0", "img_1~5x_0.json": listed_json(tmp_path),
        "img_1~5x_2.jpg": make.jpeg(2), "img_1~5x_2.txt": b"text 2", "img_1~5x_2.json": listed_json(tmp_path),
    }  # fmt: skip
    again = read_rows(open_source(str(tmp_path / "out.tar")))
    assert [(row["cf_image"], row["cf_captions"]) for row in again] == [(make.jpeg(n), [f"text {n}"]) for n in (0, 2)]


def listed_json(folder: Path) -> bytes:
    return dict(tar_members(folder / "a.tar"))["img_1.json"]


def test_a_copy_holds_no_picture_that_was_not_a_row(tmp_path: Path) -> None:
    listed = [
        ("k.depth.png", make.jpeg(1)), ("k.jpg", make.jpeg(2)), ("k.txt", b"t"), ("k.npy", b"\x93NUMPY"),
        ("k.psd", b"8BPS" + bytes(60)), ("l.jpg", make.jpeg(3)), ("l.png", make.jpeg(4)), ("m", make.jpeg(5)),
        ("m.txt", b"of m"),
    ]  # fmt: skip
    make.write_members(tmp_path / "a.tar", listed)
    source = open_source(str(tmp_path / "a.tar"))
    (shard,) = source.iter_shards()
    rows, stats = read_shard(source, shard)
    assert [row["cf_key"] for row in rows] == ["k.depth.png", "k", "l.jpg", "l.png", "m"]
    assert [row["cf_captions"] for row in rows] == [["t"], ["t"], None, None, ["of m"]]
    assert stats.seen.examples == {"unsupported": ["k.psd"]}
    for row, names in enumerate(
        (
            ["k~depth.png", "k~depth.txt", "k~depth.npy"],
            ["k.jpg", "k.txt", "k.npy"],
            ["l.jpg"],
            ["l.png"],
            ["m", "m.txt"],
        )
    ):
        assert source.copy_rows(shard, [row], tmp_path / "out.tar") == 1
        assert sorted(name for name, _ in tar_members(tmp_path / "out.tar")) == sorted(names)
    source.copy_rows(shard, range(5), tmp_path / "out.tar")
    assert len({name.partition(".")[0] for name, _ in tar_members(tmp_path / "out.tar")}) == 5
    plain = open_source(str(tmp_path / "a.tar"), SourceOptions(pictures="first"))
    (shard,) = plain.iter_shards()
    rows, stats = read_shard(plain, shard)
    assert [(row["cf_key"], row["cf_image"]) for row in rows] == [
        ("k", make.jpeg(2)), ("l", make.jpeg(3)), ("m", make.jpeg(5)),
    ]  # fmt: skip
    assert [row["cf_uid"] for row in rows] == [row_uid("a.tar", key) for key in "klm"]
    assert stats.seen.examples["other_picture"] == ["k.depth.png", "l.png"]
    plain.copy_rows(shard, range(3), tmp_path / "out.tar")
    assert [name for name, _ in tar_members(tmp_path / "out.tar")] == ["k.jpg", "k.txt", "k.npy", "l.jpg", "m", "m.txt"]


def test_a_plan_says_which_pictures_only_where_somebody_did(tmp_path: Path) -> None:
    make.write_members(tmp_path / "a.tar", DOTTED)
    plan = open_source(str(tmp_path)).to_plan()
    assert "pictures" not in plan["options"]
    assert Source.from_plan(plan).options.pictures == "all"
    first = open_source(str(tmp_path), SourceOptions(pictures="first")).to_plan()
    assert Source.from_plan(first).options.pictures == "first"


# --- zips -------------------------------------------------------------------------------------------------------------


def write_zip(path: Path, listed: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in listed:
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path


def test_zips_are_read_by_the_rules_of_tars(tmp_path: Path) -> None:
    listed = [
        ("cats/", b""), ("cats/a.JPG", make.jpeg(0)), ("cats/a.txt", b"a cat"), ("cats/b", make.jpeg(1)),
        ("c.1.jpg", make.jpeg(2)), ("c.2.jpg", make.jpeg(3)), ("c.2.txt", b"second"), ("readme.md", b"hello"),
        ("__MACOSX/cats/._a.JPG", b"x"), ("d.svg", b"<svg/>"),
        ("win\\e.jpg", make.jpeg(4)),
    ]  # fmt: skip
    write_zip(tmp_path / "one.zip", listed)
    write_zip(tmp_path / "two.zip", make.members(make.samples(2)))
    source = open_source(str(tmp_path))
    shards = list(source.iter_shards())
    assert [shard.path for shard in shards] == ["one.zip", "two.zip"]
    rows, stats = read_shard(source, shards[0])
    assert [(row["cf_key"], row["cf_image"], row["cf_captions"]) for row in rows] == [
        ("cats/a", make.jpeg(0), ["a cat"]), ("cats/b", make.jpeg(1), None), ("c.1.jpg", make.jpeg(2), None),
        ("c.2.jpg", make.jpeg(3), ["second"]), ("win/e", make.jpeg(4), None),
    ]  # fmt: skip
    assert (stats.seen.rows, stats.seen.parts) == (5, 2)
    assert stats.seen.passed == {"unknown_type": 1, "hidden": 1, "unsupported": 1}
    assert source.copy_rows(shards[0], [0, 3, 4], tmp_path / "out.tar") == 3
    assert dict(tar_members(tmp_path / "out.tar")) == {
        "cats/a.JPG": make.jpeg(0), "cats/a.txt": b"a cat", "c~2.jpg": make.jpeg(3), "c~2.txt": b"second",
        "win/e.jpg": make.jpeg(4),
    }  # fmt: skip
    assert [row["cf_image"] for row in read_rows(open_source(str(tmp_path / "two.zip")))] == [
        make.jpeg(0),
        make.jpeg(1),
    ]


def test_what_a_zip_hides_costs_its_row_or_the_archive(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", [("a.jpg", make.jpeg(0)), ("b.jpg", make.jpeg(1)), ("c.jpg", make.jpeg(2))])
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02")  # of a.jpg in the directory: set the bit that says encrypted
    data[entry + 8] |= 1
    data[6] |= 1
    place = data.index(b"b.jpg") + 200
    data[place : place + 8] = bytes(8)
    path.write_bytes(data)
    source = open_source(str(path))
    (shard,) = source.iter_shards()
    rows, _ = read_shard(source, shard)
    assert [row["cf_error_class"] for row in rows] == ["read_error", "read_error", None]
    assert "encrypted" in rows[0]["cf_error"]
    make.cut(path, 0.5)
    with pytest.raises(RefusedError, match=r"a\.zip cannot be read.*copy or pack it again"):
        open_source(str(path))
    with pytest.raises(ShardError, match="has changed"):
        read_shard(Source.from_plan(source.to_plan()), shard)


def test_a_zip_that_unzips_to_far_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipfilter.egress.UNZIPPED_FREE", 1 << 20)
    path = write_zip(tmp_path / "a.zip", [("a.jpg", make.jpeg(0)), ("b.npy", bytes(16 << 20))])
    with pytest.raises(RefusedError, match="unzips to more than"):
        open_source(str(path))


# --- img2dataset ------------------------------------------------------------------------------------------------------


def test_img2dataset_tars_with_failures_in_completion_order(tmp_path: Path) -> None:
    make.write_img2dataset(tmp_path, make.samples(25), failures=5, shard=0)
    make.write_img2dataset(tmp_path, make.samples(8, start=50), failures=3, shard=1)
    (tmp_path / "_tmp").mkdir()
    make.write_webdataset(tmp_path / "_tmp" / "00009.tar", make.samples(3))
    source = open_source(str(tmp_path))
    assert (source.kind, source.has_captions) == ("img2dataset-webdataset", True)
    assert source.schema.field("original_width").type == pa.int32()
    assert [shard.path for shard in source.iter_shards()] == ["00000.tar", "00001.tar"]
    shard = next(source.iter_shards())
    rows, stats = read_shard(source, shard)
    assert (stats.rows, stats.not_downloaded, stats.unfinished, stats.damaged) == (25, 5, False, False)
    wanted = {f"00000{n:04d}": sample for n, sample in enumerate(make.samples(25))}
    assert {row["cf_key"] for row in rows} == set(wanted)
    for row in rows:
        sample = wanted[row["cf_key"]]
        assert row["cf_image"] == sample["jpg"]
        assert row["cf_captions"] == [sample["txt"]]
        assert row["key"] == row["cf_key"]
        assert (row["original_width"], row["status"]) == (640, "success")
        assert row["cf_uid"] == row["uid"] == make.uid(int(row["cf_key"]))


def test_img2dataset_sidecars_fill_in_for_missing_json_and_may_be_missing(tmp_path: Path) -> None:
    make.write_img2dataset(tmp_path, make.samples(10), failures=2, shard=0)
    make.write_img2dataset(tmp_path, make.samples(10), failures=2, shard=1, unfinished=True)
    make.write_img2dataset(tmp_path, make.samples(10), failures=2, shard=2, sidecar=False)
    with tarfile.open(tmp_path / "00000.tar") as tar:
        images = [(info.name, tar.extractfile(info).read()) for info in tar if info.name.endswith(".jpg")]  # type: ignore[union-attr]
    make.write_members(tmp_path / "00000.tar", images)
    source = open_source(str(tmp_path))
    read = [read_shard(source, shard) for shard in source.iter_shards()]
    assert [stats.not_downloaded for _, stats in read] == [2, 2, 0]
    assert [stats.unfinished for _, stats in read] == [False, True, False]
    assert all(len(rows) == 10 for rows, _ in read)
    for rows, _ in read:
        assert all(row["url"] and row["uid"] == row["cf_uid"] and row["cf_captions"] for row in rows)


def test_tars_with_plain_parquet_beside_are_no_img2dataset_output(tmp_path: Path) -> None:
    make.write_webdataset(tmp_path / "a.tar", make.samples(3))
    make.write_parquet(tmp_path / "a.parquet", make.samples(3))
    source = open_source(str(tmp_path))
    assert "image" not in source.schema.names
    assert len(read_rows(source)) == 3
