"""Parts of an ingest without a network: lists in every format, states, and what is still to be fetched."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.errors import RefusedError
from clipfilter.ingest import IngestRequest, plan_ingest, states
from clipfilter.ingest.urls import open_list, row_ids, row_uid
from clipfilter.storage import Directory

ROWS = [
    {"url": "http://a.example/1.jpg", "caption": 'a "quoted", comma', "licence": "by"},
    {"url": "http://a.example/2.jpg", "caption": "zwei Wörter\nund eine Zeile", "licence": "by-sa"},
    {"url": "http://a.example/2.jpg", "caption": "the same picture, other words", "licence": None},
]


def written(folder: Path, kind: str) -> str:
    import csv

    path = folder / f"list.{kind}"
    plain = folder / f"list.{kind.removesuffix('.gz')}"
    match kind.removesuffix(".gz"):
        case "parquet":
            pq.write_table(pa.Table.from_pylist(ROWS), path)
        case "jsonl":
            plain.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
        case "csv" | "tsv" as form:
            with open(plain, "w", newline="", encoding="utf-8-sig") as file:
                writer = csv.DictWriter(file, list(ROWS[0]), delimiter="," if form == "csv" else "\t")
                writer.writeheader()
                writer.writerows(ROWS)
    if kind.endswith(".gz"):
        data = plain.read_bytes()
        half = len(data) // 2
        path.write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "jsonl.gz", "csv", "csv.gz", "tsv"])
def test_every_format_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    listed = open_list(written(tmp_path, kind))
    table = pa.concat_tables(listed.batches())
    assert table["url"].to_pylist() == [row["url"] for row in ROWS]
    assert table["caption"].to_pylist() == [row["caption"] for row in ROWS]
    assert table["licence"].to_pylist() == [row["licence"] for row in ROWS]
    assert table["uid"].to_pylist() == [row_uid(str(row["url"]), row["caption"]) for row in ROWS]
    assert len(set(row_ids(table["uid"]).tolist())) == 3


def test_plain_text_has_one_url_a_line(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(
        b"\xef\xbb\xbfhttp://a.example/1,2.jpg\r\n\n  http://a.example/3.jpg  \nhttp://a.example/1,2.jpg"
    )
    table = pa.concat_tables(open_list(str(tmp_path / "list.txt")).batches())
    assert table["url"].to_pylist() == [
        "http://a.example/1,2.jpg",
        "http://a.example/3.jpg",
        "http://a.example/1,2.jpg",
    ]


def test_columns_keep_their_values_where_json_can_carry_them(tmp_path: Path) -> None:
    day = datetime.date(2026, 1, 2)
    columns: dict[str, Any] = {
        "URL": ["http://a.example/1.jpg"], "TEXT": ["x"], "uid": ["0" * 32], "sha256": ["abc"], "seen": [day],
        "boxes": [[[0.1, 0.2]]], "blob": [b"\0"], "WIDTH": [640],
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "list.parquet")
    listed = open_list(str(tmp_path / "list.parquet"))
    row = next(listed.batches()).to_pylist()[0]
    assert (listed.url_column, listed.caption_column, row["uid"]) == ("URL", "TEXT", "0" * 32)
    assert row == {
        "url": "http://a.example/1.jpg", "caption": "x", "uid": "0" * 32, "source_sha256": "abc", "seen": "2026-01-02",
        "boxes": [[0.1, 0.2]], "WIDTH": 640,
    }  # fmt: skip


def test_lists_that_cannot_be_read_are_refused_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("address,words\nhttp://a.example/1.jpg,x\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"url": "http://a.example/1.jpg"}\n{"url": \n')
    (tmp_path / "list.xlsx").write_text("?")
    (tmp_path / "endless.txt.gz").write_bytes(gzip.compress(bytes(40 << 20)))
    for name, more, sentence in (
        ("list.csv", {}, "--url-column"),
        ("list.csv", {"url_column": "adress"}, "did you mean 'address'"),
        ("list.csv", {"url_column": "address", "caption_column": "text"}, "--caption-column"),
        ("empty.txt", {}, "is empty"),
        ("endless.txt.gz", {}, "a line is longer than 16 MiB"),
        ("bad.jsonl", {}, "cannot be read as jsonl"),
        ("list.xlsx", {}, "must end in"),
        ("nowhere.txt", {}, "does not exist"),
    ):
        with pytest.raises(RefusedError, match=sentence):
            open_list(str(tmp_path / name), **more)
    assert open_list(str(tmp_path / "list.csv"), "address", "words").columns == ()


def outcomes(directory: Directory, number: int, found: list[tuple[str, str, str | None]]) -> None:
    uids = pa.chunked_array([pa.array([uid for uid, _, _ in found], pa.string())])
    columns = {
        "uid": uids, "url": uids, "state": [state for _, state, _ in found], "error": [error for _, _, error in found],
        "shard": [None] * len(found), "key": [None] * len(found), "attempt": [1] * len(found), "id": row_ids(uids),
    }  # fmt: skip
    tar = Path(directory.root) / "made.tar"
    tar.write_bytes(b"tar")
    sidecar = Path(directory.root) / "made.parquet"
    sidecar.write_bytes(b"sidecar")
    success = any(state == "success" for _, state, _ in found)
    table = pa.table(columns, schema=states.OUTCOMES)
    states.publish(directory, states.Outcome(number, tar if success else None, sidecar if success else None, table))


def test_the_newest_state_of_a_row_counts(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    directory = Directory(str(tmp_path / "out"))
    outcomes(
        directory, 0,
        [("a", "success", None), ("b", "failed_to_download", "HTTP 503: busy"), ("c", "failed_to_resize", "no image"),
         ("d", "opted_out", "opted out: noai"), ("e", "refused", "refused: private"), ("f", "failed_to_download", "HTTP 404")],
    )  # fmt: skip
    outcomes(directory, 1, [("b", "success", None), ("c", "failed_to_download", "TimeoutError: slow")])
    assert states.write_status(directory) == {
        "success": 2, "failed_to_download": 2, "opted_out": 1, "refused": 1,
    }  # fmt: skip
    rows = pq.read_table(tmp_path / "out" / states.STATUS).to_pylist()
    assert {row["uid"]: row["state"] for row in rows} == {
        "a": "success", "b": "success", "c": "failed_to_download", "d": "opted_out", "e": "refused",
        "f": "failed_to_download",
    }  # fmt: skip

    def still(retry: str, private: bool = False) -> set[str]:
        closed = set(states.closed(directory, retry, private=private).tolist())
        ids = row_ids(pa.chunked_array([pa.array(list("abcdef"))])).tolist()
        return {name for name, identity in zip("abcdef", ids, strict=True) if identity not in closed}

    assert still("failed") == {"c", "f"}
    assert still("transient") == {"c"}
    assert still("none") == set()
    assert still("none", private=True) == {"e"}
    assert states.next_number(directory) == 2


def test_outcomes_without_their_tar_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    directory = Directory(str(tmp_path / "out"))
    outcomes(directory, 0, [("a", "success", None)])
    outcomes(directory, 1, [("b", "success", None), ("c", "opted_out", "opted out: noai")])
    outcomes(directory, 2, [("d", "failed_to_download", "HTTP 404")])
    (tmp_path / "out" / "00000001.tar").unlink()
    states.sweep(directory)
    assert states.write_status(directory) == {"success": 1, "failed_to_download": 1}
    assert sorted(path.name for path in (tmp_path / "out").glob("0*")) == [
        "00000000.parquet", "00000000.tar", "00000000_stats.json",
    ]  # fmt: skip


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("".join(f"http://a.example/{n % 25}.jpg\n" for n in range(30)))
    plan = plan_ingest(IngestRequest(str(tmp_path / "list.txt"), str(tmp_path / "out"), rows_per_shard=10))
    assert (plan["rows"], plan["duplicates"], plan["to fetch"], plan["shards"]) == (25, 5, 25, 3)
    assert not (tmp_path / "out").exists()
