"""csv, JSON Lines and JSON documents as the source: rows by name, lists, captions, shards, copies that are Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.errors import RefusedError, ShardError
from clipfilter.sources import Source, SourceOptions, open_source
from clipfilter.sources.model import row_uid
from tests.support import sources as make
from tests.support.sources import read_rows, read_shard


def pictures(root: Path, count: int) -> list[bytes]:
    made = [make.jpeg(number, (16, 12)) for number in range(count)]
    for number, data in enumerate(made):
        (root / "i").mkdir(parents=True, exist_ok=True)
        (root / "i" / f"{number}.jpg").write_bytes(data)
    return made


def table(root: Path, name: str, content: Any) -> str:
    text = content if isinstance(content, str) else "".join(json.dumps(record) + "\n" for record in content)
    (root / name).write_text(text)
    return str(root / name)


TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a boat"}]
TABLES: dict[str, tuple[Any, list[list[str] | None]]] = {
    "a.jsonl": ([{"image": f"i/{k}.jpg", "text": f"view {k}"} for k in range(3)], [["view 0"], ["view 1"], ["view 2"]]),
    "excel.csv": ("\ufeffFile Name;TITLE\r\ni\\0.jpg;a, b\r\n./i/1.jpg;c\r\ni/2.jpg;\r\n", [["a, b"], ["c"], None]),
    "plain.tsv": ("i/0.jpg\ta view\ni/1.jpg\tanother\ni/2.jpg\tthird\n", [["a view"], ["another"], ["third"]]),
    "flickr.token": ("i/0.jpg#0\ta\ni/0.jpg#1\tb\ni/1.jpg#0\tc\ni/2.jpg#0\td\n", [["a", "b"], ["c"], ["d"]]),
    "results.csv": (
        "image_name| comment_number| comment\ni/0.jpg| 0| a\ni/0.jpg| 1| b\ni/1.jpg| 0| c\ni/2.jpg| 0| d\n",
        [["a", "b"], ["c"], ["d"]],
    ),
    "llava.json": (
        json.dumps([{"id": k, "image": f"i/{k}.jpg", "conversations": TALK} for k in range(3)], indent=1),
        [["a boat"]] * 3,
    ),
    "coco.json": (
        json.dumps({
            "annotations": [{"image_id": 9 - k, "caption": f"c{j}{k}"} for j in range(2) for k in range(3)],
            "images": [{"id": 9 - k, "file_name": f"i/{k}.jpg"} for k in range(3)],
        }),
        [["c00", "c10"], ["c01", "c11"], ["c02", "c12"]],
    ),
    "map.json": (json.dumps({f"i/{k}.jpg": f"view {k}" for k in range(3)}), [["view 0"], ["view 1"], ["view 2"]]),
    "karpathy.json": (
        json.dumps({"images": [{"filename": f"i/{k}.jpg", "sentences": [{"raw": "a"}, {"raw": "b"}]} for k in range(3)]}),
        [["a", "b"]] * 3,
    ),
    "objects.ndjson": (
        [{"image": {"path": f"i/{k}.jpg", "bytes": None}, "caption": [f"a{k}", "b"]} for k in range(3)],
        [["a0", "b"], ["a1", "b"], ["a2", "b"]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_rows_name_their_pictures_and_copies_are_parquet(tmp_path: Path, name: str) -> None:
    content, captions = TABLES[name]
    made = pictures(tmp_path, 3)
    source = open_source(table(tmp_path, name, content))
    assert (source.kind, source.has_captions) == ("table", True)
    source = Source.from_plan(json.loads(json.dumps(source.to_plan())))
    (shard,) = source.iter_shards()
    rows, stats = read_shard(source, shard)
    assert [row["cf_image"] for row in rows] == made
    assert [row["cf_captions"] for row in rows] == captions
    assert [row["cf_key"] for row in rows] == ["0", "1", "2"]
    assert [row["cf_uid"] for row in rows] == [row_uid(name, str(k)) for k in range(3)]
    assert (stats.seen.rows, stats.seen.passed, stats.misfits) == (3, {}, 0)
    assert source.listing is not None
    assert source.listing.containers == 1
    assert source.copy_rows(shard, [2, 0], tmp_path / "kept.parquet") == 2
    copied = read_rows(open_source(str(tmp_path / "kept.parquet")))
    assert [(row["cf_image"], row["cf_captions"]) for row in copied] == [(made[k], captions[k]) for k in (0, 2)]


def test_a_list_of_images_is_as_many_rows(tmp_path: Path) -> None:
    made = pictures(tmp_path, 3)
    lines = [{"images": ["i/0.jpg", {"path": "i/1.jpg"}], "text": "both", "n": 1}, {"images": ["i/2.jpg"], "text": "c"}]
    source = open_source(table(tmp_path, "a.jsonl", lines))
    (shard,) = source.iter_shards()
    rows, _ = read_shard(source, shard)
    assert [(row["cf_key"], row["cf_image"], row["cf_captions"]) for row in rows] == [
        ("0#0", made[0], ["both"]), ("0#1", made[1], ["both"]), ("1#0", made[2], ["c"]),
    ]  # fmt: skip
    assert len({row["cf_uid"] for row in rows}) == 3
    source.copy_rows(shard, [1], tmp_path / "kept.parquet")
    assert [row["cf_image"] for row in read_rows(open_source(str(tmp_path / "kept.parquet")))] == [made[1]]
    assert b"i/0.jpg" not in (tmp_path / "kept.parquet").read_bytes()


def test_names_that_are_absolute_urls_or_nothing(tmp_path: Path) -> None:
    made = pictures(tmp_path, 2)
    names = [f"{tmp_path}/i/0.jpg", f"file://{tmp_path}/i/1.jpg", "", "i/9.jpg", None]
    source = open_source(table(tmp_path, "a.jsonl", [{"image": name, "n": k} for k, name in enumerate(names)]))
    rows = read_rows(source)
    assert [row["cf_image"] for row in rows] == [*made, None, None, None]
    assert [row["cf_error_class"] for row in rows] == [None, None, *["missing_image"] * 3]


def test_shards_are_ranges_of_rows_and_what_does_not_fit_is_kept(tmp_path: Path) -> None:
    pictures(tmp_path, 1)
    text = (
        "path,n,code,caption\n" + "".join(f"i/0.jpg,{k},00{k},view {k}\n" for k in range(2500)) + "i/0.jpg,many,x,y\n"
    )
    url = table(tmp_path, "a.csv", text + "\n")
    source = open_source(url, SourceOptions(rows_per_shard=1000))
    assert [str(source.schema.field(name).type) for name in ("path", "n", "code")] == ["string", "int64", "string"]
    shards = list(source.iter_shards())
    assert [(shard.start, shard.stop) for shard in shards] == [(0, 1000), (1000, 2000), (2000, 2501)]
    again = Source.from_plan(source.to_plan())
    rows, stats = read_shard(again, shards[2])
    assert [row["cf_key"] for row in rows] == [str(number) for number in range(2000, 2501)]
    assert (rows[-2]["n"], rows[-1]["n"], rows[-2]["cf_source_json"]) == (2499, None, None)
    assert (json.loads(rows[-1]["cf_source_json"]), stats.misfits) == ({"n": "many"}, 1)
    assert read_shard(again, shards[2], rows=[500], images=False)[0] == [{**rows[500], "cf_image": None}]
    table(tmp_path, "a.csv", text.replace("view 7\n", "view seven\n"))
    with pytest.raises(ShardError, match="has changed since it was listed"):
        read_shard(Source.from_plan(source.to_plan()), shards[0])


def test_broken_lines_and_tables_are_counted(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    table(tmp_path, "a.jsonl", '{"image": "i/0.jpg"}\n{"image": \n[1]\n{"image": "i/1.jpg", "new": 1}\n')
    table(tmp_path, "b.jsonl", "no table at all\n")
    source = open_source(str(tmp_path / "*.jsonl"))
    good, bad = source.iter_shards()
    rows, stats = read_shard(source, good)
    assert (len(rows), stats.seen.passed["unread"]) == (2, 2)
    assert [row["new"] for row in rows] == [None, 1]
    with pytest.raises(ShardError, match=r"b\.jsonl: it cannot be parsed: no line is a JSON object"):
        read_shard(source, bad)


def test_options_name_columns(tmp_path: Path) -> None:
    made = pictures(tmp_path, 2)
    url = table(tmp_path, "a.csv", "key,a,b,said,mine\nk0,i/0.jpg,i/1.jpg,x,u0\nk1,i/1.jpg,i/0.jpg,y,u1\n")
    rows = read_rows(open_source(url, SourceOptions(image_column="b", caption_column="said", uid_column="mine")))
    assert [(row["cf_key"], row["cf_image"], row["cf_captions"], row["cf_uid"]) for row in rows] == [
        ("k0", made[1], ["x"], "u0"), ("k1", made[0], ["y"], "u1"),
    ]  # fmt: skip
    talk = table(tmp_path, "b.jsonl", [{"image": "i/0.jpg", "talk": TALK, "caption": "no"}])
    assert [row["cf_captions"] for row in read_rows(open_source(talk, SourceOptions(caption_column="talk")))] == [
        ["a boat"]
    ]
    for options, message in [
        (SourceOptions(image_column="nope"), "no column names a picture; give a table with a column of image paths"),
        (SourceOptions(caption_column="nope"), "--caption-column nope is not in"),
        (SourceOptions(uid_column="nope"), "--uid-column nope is not a column of"),
    ]:
        with pytest.raises(RefusedError, match=message):
            open_source(url, options)


def test_pictures_in_base64(tmp_path: Path) -> None:
    made = make.jpeg(1, (16, 12))
    import base64

    url = table(tmp_path, "a.jsonl", [{"image": base64.b64encode(made).decode(), "text": "a"}])
    (row,) = read_rows(open_source(url))
    assert (row["cf_image"], row["cf_captions"]) == (made, ["a"])
    source = open_source(url)
    source.copy_rows(next(source.iter_shards()), [0], tmp_path / "kept.parquet")
    assert pa.types.is_string(pq.read_schema(tmp_path / "kept.parquet").field("image").type)


def test_what_names_no_picture_is_refused(tmp_path: Path) -> None:
    for name, text, why in [
        ("a.csv", "date,remark\n1,2\n", "no column names a picture"),
        ("b.json", '{"a": [1', "it cannot be parsed as JSON"),
        ("c.jsonl", "", "it is empty"),
    ]:
        with pytest.raises(RefusedError, match=why):
            open_source(table(tmp_path, name, text))
    with pytest.raises(RefusedError, match="or the very csv or JSON file that names images"):
        open_source(str(tmp_path))
