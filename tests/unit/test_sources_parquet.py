"""Parquet sources: columns found or named, row ranges, schemas that differ, images by name, copies."""

from __future__ import annotations

import base64
import datetime
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.errors import RefusedError, ShardError
from clipfilter.sources import Source, SourceOptions, open_source
from clipfilter.sources.model import row_uid
from tests.support import sources as make
from tests.support.sources import read_rows, read_shard


@pytest.mark.parametrize("style", ["bytes", "struct", "path"])
def test_rows_of_every_style(tmp_path: Path, style: str) -> None:
    made = make.samples(25)
    path = make.write_parquet(tmp_path / "a.parquet", made, style=style, row_group_size=10)  # type: ignore[arg-type]
    source = open_source(str(path))
    assert (source.kind, source.has_captions) == ("parquet", True)
    rows = read_rows(source)
    assert [row["cf_image"] for row in rows] == [sample["jpg"] for sample in made]
    assert [row["cf_captions"] for row in rows] == [[sample["txt"]] for sample in made]
    assert [row["cf_uid"] for row in rows] == [sample["json"]["uid"] for sample in made]
    assert [row["cf_key"] for row in rows] == [str(number) for number in range(25)]
    assert [row["score"] for row in rows] == [sample["json"]["score"] for sample in made]
    assert ("image" in source.schema.names) == (style == "path")
    assert ("image.path" in source.schema.names) == (style == "struct")
    assert all(row["cf_error_class"] is None for row in rows)
    bare, _ = read_shard(source, next(source.iter_shards()), rows=[3, 17], images=False)
    assert bare == [{**rows[number], "cf_image": None} for number in (3, 17)]
    some, _ = read_shard(source, next(source.iter_shards()), rows=[3, 17])
    assert some == [rows[3], rows[17]]


def test_shards_follow_row_groups_and_rows_are_counted_in_each(tmp_path: Path) -> None:
    made = make.samples(50, fields=False)
    make.write_parquet(tmp_path / "a.parquet", made, row_group_size=7)
    source = open_source(str(tmp_path), SourceOptions(rows_per_shard=20))
    shards = list(source.iter_shards())
    assert [(shard.start, shard.stop, shard.row_groups) for shard in shards] == [
        (0, 14, (0, 1)), (14, 28, (2, 3)), (28, 42, (4, 5)), (42, 50, (6, 7)),
    ]  # fmt: skip
    assert len({shard.id for shard in shards}) == 4
    rows = [read_shard(source, shard)[0] for shard in shards]
    assert [row["cf_row"] for row in rows[1]] == list(range(14))
    assert [row["cf_key"] for part in rows for row in part] == [str(number) for number in range(50)]
    assert [row["cf_image"] for part in rows for row in part] == [sample["jpg"] for sample in made]
    assert read_shard(source, shards[2], rows=[0, 13])[0] == [rows[2][0], rows[2][13]]


def test_a_far_too_large_row_group_is_split(tmp_path: Path) -> None:
    made = make.samples(50, fields=False)
    make.write_parquet(tmp_path / "a.parquet", made, row_group_size=50)
    source = open_source(str(tmp_path), SourceOptions(rows_per_shard=8))
    shards = list(source.iter_shards())
    assert [shard.start for shard in shards] == [0, 7, 14, 21, 28, 35, 42]
    rows = [row for shard in shards for row in read_shard(source, shard)[0]]
    assert [row["cf_image"] for row in rows] == [sample["jpg"] for sample in made]
    source.copy_rows(shards[3], [0, 6], tmp_path / "copy.parquet")
    copied = pq.read_table(tmp_path / "copy.parquet")["image"].to_pylist()
    assert copied == [made[21]["jpg"], made[27]["jpg"]]


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(int(size)) for size in rng.choice([100, 100, 100, 5000], 200)]
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path), SourceOptions(max_batch_bytes=9000, max_batch_rows=16))
    batches = list(source.read(next(source.iter_shards())))
    assert all(batch.num_rows <= 16 for batch in batches)
    assert all(sum(map(len, batch["cf_image"].to_pylist())) <= 9000 for batch in batches)
    assert [image for batch in batches for image in batch["cf_image"].to_pylist()] == images


def test_missing_images_cost_their_row(tmp_path: Path) -> None:
    table = pa.table({"image": pa.array([b"x", None, b""], pa.binary()), "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(open_source(str(tmp_path)))
    assert [(row["cf_image"], row["cf_error_class"]) for row in rows] == [
        (b"x", None), (None, "missing_image"), (b"", None),
    ]  # fmt: skip
    assert rows[1]["cf_error"] == "column image is null in this row"
    assert [row["n"] for row in rows] == [1, 2, 3]


def test_unusual_column_types_travel_untouched(tmp_path: Path) -> None:
    table = pa.table(
        {
            "jpg": pa.array([b"x", b"y"], pa.large_binary()),
            "thumb": pa.array([b"a", None], pa.binary()),
            "when": pa.array([datetime.datetime(2024, 1, 2), None], pa.timestamp("us", "UTC")),
            "nested": pa.array([{"a": [1, 2], "b": {"c": "x"}}, None]),
            "label": pa.array(["cat", "dog"]).dictionary_encode(),
            "vector": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
            "half": pa.array(np.array([1.5, 2.5], np.float16)),
            "pairs": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int8())),
            "price": pa.array(["1.10", None], pa.string()).cast(pa.decimal128(9, 2)),
            "dotted.name": pa.array([1, 2], pa.uint8()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    source = open_source(str(tmp_path))
    assert source.schema.equals(table.schema.remove(0))
    again = Source.from_plan(json.loads(json.dumps(source.to_plan())))
    (batch,) = again.read(next(again.iter_shards()))
    assert pa.Table.from_batches([batch]).select(source.schema.names).equals(table.drop(["jpg"]))
    again.copy_rows(next(again.iter_shards()), [0, 1], tmp_path / "copy.parquet")
    assert pq.read_table(tmp_path / "copy.parquet").equals(table)


def test_later_files_are_fitted_to_the_first_ones_schema(tmp_path: Path) -> None:
    images = pa.array([b"x"] * 3, pa.binary())
    first = {
        "image": images,
        "n": pa.array([1, 2, 3]),
        "f": pa.array([0.5] * 3),
        "s": ["a", "b", "c"],
        "tags": [["t"]] * 3,
    }
    second = {
        "s": pa.array(["d", "e", None], pa.large_string()),
        "n": pa.array([4.0, 5.5, float("nan")]),
        "f": pa.array([1, 2, 3], pa.int16()),
        "tags": pa.array(["one", None, "three"]),
        "new": pa.array([{"deep": 1}, None, None]),
        "raw": pa.array([b"\xff", None, None], pa.binary()),
        "image": pa.array([b"x", b"y", b"z"], pa.large_binary()),
    }
    third = {"other": [1, 2, 3], "n": ["x", "y", None]}
    for name, columns in (("a", first), ("b", second), ("c", third)):
        pq.write_table(pa.table(columns), tmp_path / f"{name}.parquet")
    source = open_source(str(tmp_path))
    read = [read_shard(source, shard) for shard in source.iter_shards()]
    rows = read[1][0]
    assert [row["n"] for row in rows] == [4, None, None]
    assert [row["f"] for row in rows] == [1.0, 2.0, 3.0]
    assert [row["s"] for row in rows] == ["d", "e", None]
    assert [row["cf_image"] for row in rows] == [b"x", b"y", b"z"]
    left = [json.loads(row["cf_source_json"]) if row["cf_source_json"] else None for row in rows]
    assert left == [{"tags": "one", "new": {"deep": 1}, "raw": "/w=="}, {"n": 5.5}, {"tags": "three"}]
    assert read[1][1].misfits == 3
    rows = read[2][0]
    assert {row["cf_error_class"] for row in rows} == {"missing_image"}
    assert [json.loads(row["cf_source_json"]) for row in rows] == [
        {"n": "x", "other": 1},
        {"n": "y", "other": 2},
        {"other": 3},
    ]


def test_several_captions_and_named_columns(tmp_path: Path) -> None:
    table = pa.table(
        {
            "photo_a": pa.array([make.jpeg(1)] * 3, pa.binary()),
            "photo_b": pa.array([make.jpeg(2)] * 3, pa.binary()),
            "captions": [["one", " ", None, "two"], [], None],
            "caption": ["x", "y", "z"],
            "id": [1, 2, None],
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(RefusedError, match=r"several hold images: photo_a, photo_b.*--image-column.*captions \(list"):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), SourceOptions(image_column="photo_b", uid_column="id"))
    rows = read_rows(source)
    assert [row["cf_captions"] for row in rows] == [["one", "two"], None, None]
    assert [row["cf_uid"] for row in rows] == ["1", "2", row_uid("a.parquet", "2")]
    assert rows[0]["photo_a"] is None  # nobody judges it
    named = open_source(str(tmp_path), SourceOptions(image_column="photo_b", caption_column="caption"))
    assert [row["cf_captions"] for row in read_rows(named)] == [["x"], ["y"], ["z"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SourceOptions(image_column="nope"), r"--image-column nope is not a column.*n \(int64\)"),
        (SourceOptions(image_column="n"), "--image-column n has type int64"),
        (SourceOptions(caption_column="nope"), "--caption-column nope is not a column"),
        (SourceOptions(caption_column="n"), "--caption-column n has type int64"),
        (SourceOptions(uid_column="nope"), "--uid-column nope is not a column"),
        (SourceOptions(uid_column="f"), "--uid-column f has type double"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, options: SourceOptions, message: str) -> None:
    pq.write_table(pa.table({"image": pa.array([b"x"], pa.binary()), "n": [1], "f": [0.5]}), tmp_path / "a.parquet")
    with pytest.raises(RefusedError, match=message):
        open_source(str(tmp_path), options)


def test_no_image_column_and_reserved_and_repeated_names(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": [1], "s": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(
        RefusedError, match=r"no column that is clearly the image.*--image-column.*n \(int64\), s \(string\)"
    ):
        open_source(str(tmp_path))
    image = pa.array([b"x"], pa.binary())
    pq.write_table(pa.table({"image": image, "cf_mine": [1]}), tmp_path / "a.parquet")
    with pytest.raises(RefusedError, match=r"cf_mine.*reserved"):
        open_source(str(tmp_path))
    pq.write_table(pa.table([image, pa.array([1]), pa.array([2])], ["image", "n", "n"]), tmp_path / "a.parquet")
    with pytest.raises(RefusedError, match="several columns named 'n'"):
        open_source(str(tmp_path))


def test_only_images(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([b"x", b"y"], pa.binary())}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path))
    assert source.has_captions is False
    rows = read_rows(source)
    assert [row["cf_image"] for row in rows] == [b"x", b"y"]
    assert [row["cf_uid"] for row in rows] == [row_uid("a.parquet", "0"), row_uid("a.parquet", "1")]
    bare, _ = read_shard(source, next(source.iter_shards()), images=False)
    assert [row["cf_key"] for row in bare] == ["0", "1"]


def test_a_file_without_footer_is_a_failed_shard(tmp_path: Path) -> None:
    make.write_parquet(tmp_path / "a.parquet", make.samples(5))
    broken = make.cut(make.write_parquet(tmp_path / "b.parquet", make.samples(5)), 0.7)
    source = open_source(str(tmp_path))
    good, bad = source.iter_shards()
    assert (bad.stop, bad.row_groups) == (None, ())
    with pytest.raises(ShardError, match=r"b\.parquet is not a readable Parquet file"):
        read_shard(source, bad)
    assert len(read_shard(source, good)[0]) == 5
    with pytest.raises(RefusedError, match="not a readable Parquet file"):
        open_source(str(broken))


def test_a_spoiled_row_group_costs_its_rows(tmp_path: Path) -> None:
    path = make.write_parquet(tmp_path / "a.parquet", make.samples(30, fields=False), row_group_size=10)
    metadata = pq.read_metadata(path)
    column = metadata.row_group(1).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    source = open_source(str(tmp_path))
    rows, stats = read_shard(source, next(source.iter_shards()))
    assert [row["cf_row"] for row in rows] == list(range(30))
    assert [row["cf_error_class"] for row in rows] == [None] * 10 + ["read_error"] * 10 + [None] * 10
    assert "row group 1 cannot be read" in rows[10]["cf_error"]
    assert stats.rows == 30


def test_copies_keep_schema_metadata_and_codecs(tmp_path: Path) -> None:
    features = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}
    path = make.write_parquet(
        tmp_path / "a.parquet",
        make.samples(60),
        style="struct",
        row_group_size=20,
        metadata=features,
        compression="zstd",
    )
    source = open_source(str(path))
    (shard,) = source.iter_shards()
    assert source.copy_rows(shard, [50, 3, 21], tmp_path / "1.parquet") == 3
    source.copy_rows(shard, [3, 21, 50], tmp_path / "2.parquet")
    assert (tmp_path / "1.parquet").read_bytes() == (tmp_path / "2.parquet").read_bytes()
    original, copied = pq.ParquetFile(path), pq.ParquetFile(tmp_path / "1.parquet")
    assert copied.schema_arrow.equals(original.schema_arrow, check_metadata=True)
    assert copied.metadata.row_group(0).column(0).compression == "ZSTD"
    assert copied.read().equals(original.read().take([3, 21, 50]))
    with pytest.raises(IndexError):
        source.copy_rows(shard, [60], tmp_path / "3.parquet")


def test_copies_of_named_images_still_find_them(tmp_path: Path) -> None:
    made = make.samples(6)
    path = make.write_parquet(tmp_path / "in" / "a.parquet", made, style="path")
    source = open_source(str(path))
    (tmp_path / "out").mkdir()
    source.copy_rows(next(source.iter_shards()), [1, 4], tmp_path / "out" / "a.parquet")
    rows = read_rows(open_source(str(tmp_path / "out")))
    assert [row["cf_image"] for row in rows] == [made[1]["jpg"], made[4]["jpg"]]
    assert [row["image"] for row in rows] == ["images/000000001.jpg", "images/000000004.jpg"]


def test_columns_of_an_earlier_run(tmp_path: Path) -> None:
    columns = {
        "image": pa.array([b"x"], pa.binary()), "cf_decision": ["keep"], "cf_score.a": [0.5],
        "cf_prev_decision": ["review"],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    source = open_source(str(tmp_path))
    assert source.schema.names == ["cf_prev_decision", "cf_prev_score.a"]
    (row,) = read_rows(source)
    assert (row["cf_prev_decision"], row["cf_prev_score.a"], row["cf_source_json"]) == ("keep", 0.5, None)


# --- img2dataset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encode_format", ["jpg", "webp"])
def test_img2dataset_parquet(tmp_path: Path, encode_format: str) -> None:
    made = make.samples(250)
    make.write_img2dataset(tmp_path, made, failures=40, format="parquet", encode_format=encode_format)
    source = open_source(str(tmp_path), SourceOptions(rows_per_shard=120))
    assert source.kind == "img2dataset-parquet"
    assert Source.from_plan(source.to_plan()).kind == "img2dataset-parquet"
    shards = list(source.iter_shards())
    read = [read_shard(source, shard) for shard in shards]
    assert sum(stats.not_downloaded for _, stats in read) == 40
    for (rows, stats), shard in zip(read, shards, strict=True):
        assert [row["cf_row"] for row in rows] == list(range(stats.rows))
        assert stats.rows + stats.not_downloaded == (shard.stop or 0) - shard.start
    rows = [row for part, _ in read for row in part]
    assert len(rows) == 250
    for row in rows:
        assert row["cf_key"] == row["key"]
        assert row["cf_image"] == made[int(row["key"][5:])]["jpg"]
        assert row["cf_captions"] == [row["caption"]]
    chosen = [5, 60, 80]
    some, stats = read_shard(source, shards[0], rows=chosen)
    assert some == [read[0][0][number] for number in chosen]
    source.copy_rows(shards[0], chosen, tmp_path / "copy.parquet")
    assert pq.read_table(tmp_path / "copy.parquet")["key"].to_pylist() == [row["cf_key"] for row in some]


def test_an_img2dataset_parquet_without_stats_is_reported(tmp_path: Path) -> None:
    make.write_img2dataset(tmp_path, make.samples(3), format="parquet", shard=0)
    make.write_img2dataset(tmp_path, make.samples(3), format="parquet", shard=1, unfinished=True)
    source = open_source(str(tmp_path))
    read = [read_shard(source, shard) for shard in source.iter_shards()]
    assert [(len(rows), stats.unfinished) for rows, stats in read] == [(3, False), (3, True)]


def test_duplicate_keys_are_counted_and_have_uids_of_their_own(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"key": ["a", "b", "a", None], "image": pa.array([b"1", b"2", b"3", b"4"])}), tmp_path / "a.parquet"
    )
    source = open_source(str(tmp_path))
    rows, stats = read_shard(source, next(source.iter_shards()))
    assert [row["cf_key"] for row in rows] == ["a", "b", "a", "3"]
    assert len({row["cf_uid"] for row in rows}) == 4
    assert stats.duplicate_keys == 1
    assert read_shard(source, next(source.iter_shards()), rows=[2])[0] == [rows[2]]


# --- several pictures in a row, and pictures in other guises ---------------------------------------------------------

PAIR = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
J = [make.jpeg(number) for number in range(6)]


def base64_of(data: bytes, *, url: bool = False) -> str:
    text = base64.b64encode(data).decode()
    return f"data:image/jpeg;base64,{text}" if url else text


#: An image column and the pictures of its rows, None for one that is not there; "" is a row without any.
GUISES: dict[str, tuple[pa.Array, list[tuple[str, bytes | None]]]] = {
    "lists of structs": (
        pa.array([[{"bytes": J[0], "path": "a.jpg"}], [{"bytes": J[1]}, {"bytes": J[2]}], [], None], pa.list_(PAIR)),
        [("0#0", J[0]), ("1#0", J[1]), ("1#1", J[2]), ("2", None), ("3", None)],
    ),
    "lists of bytes with nulls": (
        pa.array([[J[0], None, J[1]], [None]], pa.large_list(pa.large_binary())),
        [("0#0", J[0]), ("0#1", None), ("0#2", J[1]), ("1#0", None)],
    ),
    "lists of lists": (
        pa.array([[[J[0]], [], [J[1], J[2]]], [[]]], pa.list_(pa.list_(pa.binary()))),
        [("0#0", J[0]), ("0#1", None), ("0#2", J[1]), ("0#3", J[2]), ("1", None)],
    ),
    "lists of one size": (
        pa.array([[J[0], J[1]], [J[2], J[3]]], pa.list_(pa.binary(), 2)),
        [("0#0", J[0]), ("0#1", J[1]), ("1#0", J[2]), ("1#1", J[3])],
    ),
    "a dictionary": (
        pa.array([J[0], J[1], J[0], None]).dictionary_encode(),
        [("0", J[0]), ("1", J[1]), ("2", J[0]), ("3", None)],
    ),
    "base64": (pa.array([base64_of(J[0]), None, base64_of(J[1]).rstrip("=")]), [("0", J[0]), ("1", None), ("2", J[1])]),
    "data URLs": (pa.array([base64_of(J[0], url=True), base64_of(J[1])]), [("0", J[0]), ("1", J[1])]),
    "lists of base64": (
        pa.array([[base64_of(J[0]), base64_of(J[1])], [base64_of(J[2])]], pa.list_(pa.large_string())),
        [("0#0", J[0]), ("0#1", J[1]), ("1#0", J[2])],
    ),
    "structs of a path": (
        pa.array([{"path": "0.jpg"}, {"path": "1.jpg"}, {"path": "none.jpg"}]),
        [("0", J[0]), ("1", J[1]), ("2", None)],
    ),
    "lists of paths": (pa.array([["0.jpg", "1.jpg"], ["none.jpg"]]), [("0#0", J[0]), ("0#1", J[1]), ("1#0", None)]),
    "lists of structs of bytes or paths": (
        pa.array([[{"bytes": J[3], "path": None}, {"bytes": None, "path": "1.jpg"}]], pa.list_(PAIR)),
        [("0#0", J[3]), ("0#1", J[1])],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GUISES)
@pytest.mark.parametrize("file", ["a.parquet", "a.arrow", "a.feather"])
def test_each_picture_of_a_table_is_a_row_and_is_copied_as_one(case: str, file: str, tmp_path: Path) -> None:
    column, expected = GUISES[case]
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_bytes(J[number])
    texts = [f"text {number}" for number in range(len(column))]
    write_table(pa.table({"images": column, "text": texts}), tmp_path / file)
    source = open_source(str(tmp_path / file))
    (shard,) = source.iter_shards()
    rows, stats = read_shard(source, shard)
    assert [(row["cf_key"], row["cf_image"]) for row in rows] == expected
    assert [row["cf_row"] for row in rows] == list(range(len(expected)))
    assert [row["cf_captions"] for row in rows] == [[f"text {row['cf_key'][0]}"] for row in rows]
    assert all((row["cf_image"] is None) == (row["cf_error_class"] == "missing_image") for row in rows)
    assert len({row["cf_uid"] for row in rows}) == len(rows)
    assert stats.seen.rows == len(rows)
    assert not any(isinstance(row.get("images"), bytes) for row in rows)
    bare, _ = read_shard(source, shard, images=False)
    assert [(row["cf_row"], row["cf_key"], row["cf_uid"]) for row in bare] == [
        (row["cf_row"], row["cf_key"], row["cf_uid"]) for row in rows
    ]
    good = [row["cf_row"] for row in rows if row["cf_image"] is not None]
    for chosen in [good, good[1:], good[-1:]]:
        part, _ = read_shard(source, shard, rows=chosen)
        assert part == [rows[number] for number in chosen]
        target = tmp_path / "out" / "copy.parquet"
        target.parent.mkdir(exist_ok=True)
        assert source.copy_rows(shard, chosen, target) == len(chosen)
        assert pq.read_metadata(target).num_rows == len(chosen)
        again = read_rows(open_source(str(target), SourceOptions(image_column="images")))
        assert [(row["cf_image"], row["cf_captions"]) for row in again] == [
            (rows[number]["cf_image"], rows[number]["cf_captions"]) for number in chosen
        ]
        held = target.read_bytes()
        for number, row in enumerate(rows):
            if number not in chosen and row["cf_image"] not in [None, *(rows[other]["cf_image"] for other in chosen)]:
                assert row["cf_image"] not in held
                assert base64_of(row["cf_image"])[1200:1260].encode() not in held


def write_table(table: pa.Table, path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression="none", row_group_size=2)
    elif path.suffix == ".feather":
        with pa.OSFile(str(path), "wb") as handle, pa.ipc.new_file(handle, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        with pa.OSFile(str(path), "wb") as handle, pa.ipc.new_stream(handle, table.schema) as stream:
            stream.write_table(table, max_chunksize=2)


def test_the_first_picture_of_each_list(tmp_path: Path) -> None:
    column = pa.array([[J[0], J[1]], [], [J[2], J[3], J[4]]], pa.list_(pa.binary()))
    pq.write_table(pa.table({"images": column, "key": ["a", "b", "c"]}), tmp_path / "a.parquet")
    source = open_source(str(tmp_path), SourceOptions(pictures="first"))
    (shard,) = source.iter_shards()
    rows, stats = read_shard(source, shard)
    assert [(row["cf_key"], row["cf_image"]) for row in rows] == [("a", J[0]), ("b", None), ("c", J[2])]
    assert rows[0]["cf_uid"] == row_uid("a.parquet", "a")
    assert (stats.seen.rows, stats.seen.passed) == (3, {"other_picture": 3})
    source.copy_rows(shard, [0, 2], tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet")["images"].to_pylist() == [[J[0]], [J[2]]]


def test_pictures_of_other_columns_are_told_apart_and_left_out(tmp_path: Path) -> None:
    table = pa.table(
        {
            "image": pa.array([J[0], J[1]]),
            "mask": pa.array([{"bytes": J[2], "path": "m.png"}, None], PAIR),
            "notes": pa.array([b"no picture", None]),
            "thumbnails": pa.array([[base64_of(J[3])], []], pa.list_(pa.string())),
            "kind": pa.array(["cat", "dog"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        RefusedError, match=r"several hold images: image, mask, thumbnails\); say which with --image-column"
    ):
        open_source(str(tmp_path))
    source = open_source(str(tmp_path), SourceOptions(image_column="image"))
    (shard,) = source.iter_shards()
    rows, stats = read_shard(source, shard)
    assert (rows[0]["mask"], rows[0]["thumbnails"]) == ({"bytes": None, "path": "m.png"}, [None])
    assert rows[0]["notes"] == b"no picture"
    assert stats.seen.passed == {"other_picture": 2}
    assert stats.seen.examples == {"other_picture": ["column mask", "column thumbnails"]}
    source.copy_rows(shard, [0], tmp_path / "out.parquet")
    held = (tmp_path / "out.parquet").read_bytes()
    assert J[2] not in held
    assert base64_of(J[3])[1200:1260].encode() not in held
    assert b"dog" not in held  # a value of the dictionary that only the other row has
    copied = pq.read_table(tmp_path / "out.parquet")
    assert copied.schema.equals(pq.read_schema(tmp_path / "a.parquet"))
    assert copied["kind"].to_pylist() == ["cat"]


def test_paths_that_name_different_pictures_are_not_guessed_at(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    same = {"file_name": ["0.jpg", "1.jpg"], "image_path": ["/data/0.jpg", "/data/1.jpg"]}
    pq.write_table(pa.table(same), tmp_path / "a" / "a.parquet")
    assert open_source(str(tmp_path / "a")).to_plan()["format"]["image"] == "image_path"
    other = {"file_name": ["0.jpg", "1.jpg"], "image_path": ["0_depth.jpg", "1_depth.jpg"]}
    pq.write_table(pa.table(other), tmp_path / "b" / "a.parquet")
    with pytest.raises(RefusedError, match=r"several hold images: image_path, file_name"):
        open_source(str(tmp_path / "b"))


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    made = make.samples(6)
    for place, split in enumerate(("train", "test")):
        folder = tmp_path / split
        folder.mkdir()
        part = made[3 * place : 3 * place + 3]
        table = pa.table(
            {
                "image": pa.array([{"bytes": sample["jpg"]} for sample in part], PAIR),
                "text": [sample["txt"] for sample in part],
            }
        )
        write_table(table, folder / "data-00000-of-00001.arrow")
        write_table(table, folder / "cache-1234.arrow")
        (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
        (folder / "dataset_info.json").write_text("{}")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = open_source(str(tmp_path))
    shards = list(source.iter_shards())
    listing = source.listing
    assert listing is not None
    assert (source.kind, [shard.path for shard in shards]) == (
        "arrow", ["test/data-00000-of-00001.arrow", "train/data-00000-of-00001.arrow"],
    )  # fmt: skip
    assert (listing.containers, listing.parts, listing.passed) == (2, 5, {"other_kind": 2})
    rows = read_rows(source)
    assert [(row["cf_image"], row["cf_captions"]) for row in rows] == [
        (sample["jpg"], [sample["txt"]]) for sample in [*made[3:], *made[:3]]
    ]


def test_an_arrow_stream_that_breaks_off_gives_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    write_table(pa.table({"image": pa.array(J)}), path)
    make.cut(path, 0.7)
    source = open_source(str(path))
    (shard,) = source.iter_shards()
    rows, stats = read_shard(source, shard)
    assert [row["cf_image"] for row in rows] == J[:4]
    assert stats.damaged
    assert 0 < stats.bytes_unread < shard.size
    make.cut(path, 3)
    with pytest.raises(RefusedError, match="not a readable Arrow file"):
        open_source(str(path))
    with pytest.raises(ShardError):
        read_shard(source, shard)
