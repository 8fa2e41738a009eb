"""One row at most: whatever is raised while a row is read, decoded, measured, embedded or scored, that row alone is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from clipfilter.engine import InlineExecutor, JobRequest, run_job, shard
from clipfilter.engine.culprits import but_for_culprits
from clipfilter.errors import UNEXPECTED_ERROR
from clipfilter.images import load
from clipfilter.operations.verify import verify_run
from clipfilter.sources import folder, parquet, webdataset
from tests.support.engine import data_files, policy_file, samples
from tests.support.quick import BATCH_SIZE
from tests.support.sources import write_image_folder, write_parquet, write_webdataset
from tests.unit.test_engine_shard import Encoder, embed

ROWS, BAD = 40, (3, 8, 37)
MARK = b"NOBODY FORESAW"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same rows in every kind of source; the pictures of the rows in BAD end in MARK, or (`KIND-broken`) are none."""
    root = tmp_path_factory.mktemp("sources")
    for which in ("", "-broken"):
        made = samples(ROWS)
        for row in BAD:
            made[row]["jpg"] = b"no picture" if which else made[row]["jpg"] + MARK
        write_webdataset(root / f"tar{which}" / "0.tar", made)
        write_parquet(root / f"parquet{which}" / "0.parquet", made, row_group_size=16)
        write_image_folder(root / f"folder{which}", made)
    return {path.name: str(path) for path in root.iterdir()}


def rows(out: Path, kind: str = "annotated") -> list[dict[str, Any]]:
    return [row for path in sorted((out / kind).glob("*")) for row in pq.read_table(path).to_pylist()]


def marked(value: Any) -> bool:
    return MARK in bytes(value or b"")


def tar_row(monkeypatch: pytest.MonkeyPatch) -> None:
    read = webdataset.Webdataset._row

    def fails(self: Any, tar: Any, index: Any, number: int, images: bool, *more: Any) -> Any:
        row = read(self, tar, index, number, images, *more)
        if marked(row.image):
            raise KeyError("a row of a tar")
        return row

    monkeypatch.setattr(webdataset.Webdataset, "_row", fails)


def parquet_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    make = parquet.Parquet._batch

    def fails(self: Any, *given: Any) -> Any:
        batch = make(self, *given)
        if any(marked(image.as_py()) for image in batch["cf_image"]):
            raise AssertionError("a row of a table")
        return batch

    monkeypatch.setattr(parquet.Parquet, "_batch", fails)


def folder_file(monkeypatch: pytest.MonkeyPatch) -> None:
    read = folder.fetch_url

    def fails(url: str) -> Any:
        found = read(url)
        if marked(found.data):
            raise RecursionError("a file of a folder")
        return found

    monkeypatch.setattr(folder, "fetch_url", fails)


def raising(error: BaseException) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        decode = load.decode

        def fails(data: Any, **more: Any) -> Any:
            if marked(data):
                raise error
            return decode(data, **more)

        monkeypatch.setattr(load, "decode", fails)

    return plant


@pytest.mark.parametrize(
    ("kind", "plant", "name"),
    [
        ("tar", tar_row, "KeyError"),
        ("parquet", parquet_batch, "AssertionError"),
        ("folder", folder_file, "RecursionError"),
        ("tar", raising(ZeroDivisionError("in a decoder")), "ZeroDivisionError"),
        ("folder", raising(SystemExit(3)), "SystemExit"),
    ],
)
def test_what_a_row_raises_costs_that_row(
    kind: str, plant: Callable[..., None], name: str, sources: dict[str, str], tmp_path: Path, monkeypatch: Any
) -> None:
    policy = policy_file(tmp_path)

    def run(source: str, out: str) -> Any:
        request = JobRequest("run", sources[source], str(tmp_path / out), policy=policy, max_failures=0.2)
        return run_job(request, executor=InlineExecutor())

    run(f"{kind}-broken", "want")
    plant(monkeypatch)
    result = run(kind, "out")
    assert result.totals["failed_by_class"] == {UNEXPECTED_ERROR: len(BAD)}
    assert (result.exit_code, result.totals["rows"], result.failed_shards) == (0, ROWS, [])
    failed = rows(tmp_path / "out", "failed")
    assert [row["cf_row"] for row in failed] == list(BAD)
    assert {row["cf_error"].partition(":")[0] for row in failed} == {name}
    identity = [[row[name] for name in ("cf_key", "cf_uid")] for row in rows(tmp_path / "want", "failed")]
    assert [[row[name] for name in ("cf_key", "cf_uid")] for row in failed] == identity
    good = [{k: v for k, v in data_files(tmp_path / out).items() if "failed/" not in k} for out in ("out", "want")]
    assert good[0] == good[1]
    assert verify_run(result.out).problems == []


class Choosy(Encoder):
    """Raises for some pictures (of its second batch) and for some texts."""

    def __init__(self, pictures: Sequence[int] = (), text: str | None = None) -> None:
        super().__init__()
        self.refused: list[np.ndarray] = []
        self._pictures, self._text, self._calls = pictures, text, 0

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        self._calls += 1
        if self._calls == 2:
            self.refused = [pixels[place].copy() for place in self._pictures]
        if any((pixels == one).all(axis=(1, 2, 3)).any() for one in self.refused):
            raise RuntimeError("a bad tensor")
        return super().encode_images(pixels)

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        if self._text in texts:
            raise ValueError("a bad text")
        return super().encode_texts(texts)


@pytest.mark.parametrize("pictures", [(4,), (0, 1, 7)])
def test_an_encoder_that_raises_costs_the_rows_that_make_it(pictures: Sequence[int]) -> None:
    whole, _ = embed(Encoder())
    tables, report = embed(Choosy(pictures))
    lost = [BATCH_SIZE + place for place in pictures]
    assert report.failed_by_class == {UNEXPECTED_ERROR: len(lost)}
    assert tables["failed"]["cf_row"].to_pylist() == lost
    assert set(tables["failed"]["cf_error"].to_pylist()) == {"RuntimeError: a bad tensor"}
    assert tables["embeddings"].to_pylist() == [
        row for row in whole["embeddings"].to_pylist() if row["cf_row"] not in lost
    ]


@pytest.mark.parametrize("captions", ["first", "max", "mean"])
def test_a_caption_that_makes_the_encoder_raise_costs_its_row(captions: str) -> None:
    whole, _ = embed(Encoder(), captions=captions)
    caption = whole["annotated"]["cf_caption"][11].as_py()
    tables, report = embed(Choosy(text=caption), captions=captions)
    assert report.failed_by_class == {UNEXPECTED_ERROR: 1}
    assert tables["failed"]["cf_row"].to_pylist() == [11]
    assert tables["embeddings"].to_pylist() == [row for row in whole["embeddings"].to_pylist() if row["cf_row"] != 11]


def test_a_row_that_cannot_be_scored_costs_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = embed(Encoder())
    annotate = shard.annotate

    def fails(rows: Any, *more: Any) -> Any:
        if 5 in rows["cf_row"].to_pylist():
            raise IndexError("in a rule")
        return annotate(rows, *more)

    monkeypatch.setattr(shard, "annotate", fails)
    tables, report = embed(Encoder(), broken={2: b"", 9: b""})
    assert tables["failed"]["cf_row"].to_pylist() == [2, 5, 9]
    assert report.counts == {"rows": 23, "failed": 3, "embedded": 20}
    for name in ("annotated", "embeddings"):
        assert tables[name].to_pylist() == [row for row in whole[name].to_pylist() if row["cf_row"] not in (2, 5, 9)]


def test_what_no_row_is_to_blame_for_is_raised() -> None:
    def always(rows: Sequence[int]) -> None:
        raise RuntimeError("the model is broken")

    with pytest.raises(RuntimeError, match="the model is broken"):
        but_for_culprits(8, lambda: always(range(8)), always)

    def disk(rows: Sequence[int]) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        but_for_culprits(8, lambda: disk(range(8)), lambda rows: None)
    once = iter([RuntimeError("once")])

    def passing(rows: Sequence[int]) -> int:
        for error in once:
            raise error
        return len(rows)

    assert but_for_culprits(8, lambda: passing(range(8)), passing) == (8, {})
