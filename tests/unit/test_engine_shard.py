"""The unit of work with a stand-in encoder: fixed batches, zero slots, captions, lost memory."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clipfilter.engine.decoding import (
    StageTimes,
    ThreadDecoder,
    decode_batches,
    decoded_ahead,
    prefetch,
)
from clipfilter.engine.shard import embed_rows, process_shard
from clipfilter.errors import DECODE_ERROR, MISSING_IMAGE, READ_ERROR
from clipfilter.images import DecodeSettings, PreprocessConfig
from tests.support.engine import photos
from tests.support.policies import FakeEncoder

SIZE = 32
PREPROCESS = PreprocessConfig(size=SIZE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
SETTINGS = DecodeSettings(PREPROCESS, "fast", 10_000_000)


class Encoder(FakeEncoder):
    """Embeds an image as its 8x8 grey thumbnail; remembers batch sizes, can run out of memory or give NaN."""

    def __init__(self, memory: int | None = None) -> None:
        super().__init__(dim=64)
        self.preprocess = PREPROCESS
        self.memory = memory
        self.batches: list[np.ndarray] = []

    def encode_images(self, pixels: np.ndarray) -> np.ndarray:
        if self.memory is not None and len(pixels) > self.memory:
            raise OutOfMemoryError("CUDA out of memory")
        self.batches.append(pixels)
        grey = pixels.mean(axis=1).reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4)).reshape(-1, 64) + 1.0
        return (grey / np.linalg.norm(grey, axis=1, keepdims=True)).astype(np.float32)


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


class Sink:
    def __init__(self) -> None:
        self.tables: dict[str, pa.Table] = {}

    def embeddings(self, table: pa.Table) -> None:
        self.tables["embeddings"] = table

    def failed(self, table: pa.Table) -> None:
        self.tables["failed"] = table

    def annotated(self, table: pa.Table, *, final: bool) -> None:
        self.tables["annotated"] = table

    def copy(self, what: str, rows: list[int]) -> None:
        self.tables[what] = rows


def batches(cut: int, broken: dict[int, Any] | None = None, rows: int = 23) -> list[pa.RecordBatch]:
    """Source batches of `cut` rows each over the same rows."""
    some = photos()
    made = []
    for row in range(rows):
        data: bytes | None = some[row][1]
        error = None
        problem = (broken or {}).get(row)
        if isinstance(problem, bytes):
            data = problem
        elif problem is not None:
            data, error = None, problem
        made.append(
            {
                "cf_row": row, "cf_key": f"k{row}", "cf_uid": f"{row:032x}", "cf_image": data,
                "cf_captions": None if row % 5 == 4 else [some[row][2], "another caption"],
                "cf_error_class": error, "cf_error": "could not fetch" if error else None,
                "cf_source_json": None, "number": row,
            }
        )  # fmt: skip
    schema = pa.schema(
        [
            ("cf_row", pa.int64()), ("cf_key", pa.string()), ("cf_uid", pa.string()), ("cf_image", pa.large_binary()),
            ("cf_captions", pa.list_(pa.string())), ("cf_error_class", pa.string()), ("cf_error", pa.string()),
            ("cf_source_json", pa.string()), ("number", pa.int64()),
        ]
    )  # fmt: skip
    return pa.Table.from_pylist(made, schema).to_batches(max_chunksize=cut)


def embed(encoder: Encoder, cut: int = 7, broken: dict[int, Any] | None = None, batch: int = 8, **more: Any) -> tuple:
    sink = Sink()
    decoded = decode_batches(batches(cut, broken), ThreadDecoder(SETTINGS, 2), SIZE, batch, StageTimes())
    options = {"text": True, **more}
    report = process_shard(
        decoded, encoder, None, sink, shard="s" * 16, source_schema=pa.schema([("number", pa.int64())]), **options
    )
    return sink.tables, report


def test_embeddings_do_not_depend_on_how_the_source_batched_the_rows() -> None:
    one, _ = embed(Encoder(), cut=23)
    for cut in (1, 5, 8, 9):
        other, _ = embed(Encoder(), cut=cut)
        assert one["embeddings"].equals(other["embeddings"])
        assert one["annotated"].equals(other["annotated"])


def test_batches_have_one_size_the_last_padded_and_failed_rows_keep_a_zero_slot() -> None:
    encoder = Encoder()
    tables, report = embed(encoder, broken={3: b"garbage", 9: READ_ERROR, 11: MISSING_IMAGE})
    assert [len(batch) for batch in encoder.batches] == [8, 8, 8]
    assert not encoder.batches[0][3].any()
    assert encoder.batches[0][2].any()
    assert not encoder.batches[1][1].any()
    assert not encoder.batches[2][7].any()  # padding
    assert report.counts == {"rows": 23, "failed": 3, "embedded": 20}
    assert report.failed_by_class == {DECODE_ERROR: 1, MISSING_IMAGE: 1, READ_ERROR: 1}
    failed = tables["failed"].to_pylist()
    assert [(row["cf_row"], row["cf_error_class"]) for row in failed] == [
        (3, DECODE_ERROR), (9, READ_ERROR), (11, MISSING_IMAGE),
    ]  # fmt: skip
    assert failed[1]["cf_error"] == "could not fetch"
    assert failed[0]["cf_key"] == "k3"
    assert tables["annotated"]["cf_row"].to_pylist() == [row for row in range(23) if row not in (3, 9, 11)]


def test_a_broken_row_changes_no_other_row() -> None:
    clean, _ = embed(Encoder())
    broken, _ = embed(Encoder(), broken={0: b"", 7: b"<html>", 8: b"\xff\xd8\xff", 22: b"x" * 99})
    others = pa.array([row not in (0, 7, 8, 22) for row in range(23)])
    assert clean["embeddings"].filter(others).equals(broken["embeddings"])


def test_out_of_memory_halves_the_batch_and_says_so() -> None:
    whole, _ = embed(Encoder())
    encoder = Encoder(memory=2)
    halved, report = embed(encoder)
    assert report.batch_halvings == 2
    assert {len(batch) for batch in encoder.batches} == {2}
    assert whole["embeddings"].equals(halved["embeddings"])


def test_out_of_memory_with_a_single_image_is_an_error() -> None:
    with pytest.raises(OutOfMemoryError):
        embed(Encoder(memory=0))


@pytest.mark.parametrize(("where", "what"), [(slice(None), np.nan), (slice(7, 8), np.inf)])
def test_an_embedding_that_is_not_finite_costs_its_row(where: slice, what: float) -> None:
    class Overflowing(Encoder):
        def encode_images(self, pixels: np.ndarray) -> np.ndarray:
            values = super().encode_images(pixels)
            if len(self.batches) == 2:
                values[4, where] = what
            return values

    tables, report = embed(Overflowing())
    assert report.failed_by_class == {"encode_error": 1}
    assert tables["failed"]["cf_row"].to_pylist() == [12]


def test_captions_first_max_mean() -> None:
    encoder = Encoder()
    some = photos()
    first, second = encoder.vector(some[0][2]), encoder.vector("another caption")

    def text(captions: str) -> tuple[np.ndarray, np.ndarray]:
        tables, _ = embed(encoder, captions=captions)
        row = tables["embeddings"].slice(0, 1).to_pylist()[0]
        return np.array(row["text_emb"], np.float64), np.array(row["image_emb"], np.float64)

    found, image = text("first")
    assert np.abs(found - first).max() < 1e-3
    best = max((first, second), key=lambda vector: vector @ image)
    assert np.abs(text("max")[0] - best).max() < 1e-3
    mean = (first + second) / np.linalg.norm(first + second)
    assert np.abs(text("mean")[0] - mean).max() < 1e-3


def test_rows_without_caption_have_a_null_text_embedding_and_no_similarity() -> None:
    tables, _ = embed(Encoder())
    missing = [row for row in range(23) if row % 5 == 4]
    assert [i for i, v in enumerate(tables["embeddings"]["text_emb"].is_null().to_pylist()) if v] == missing
    assert [i for i, v in enumerate(tables["annotated"]["cf_similarity"].is_null().to_pylist()) if v] == missing
    tables, _ = embed(Encoder(), text=False)
    assert "text_emb" not in tables["embeddings"].column_names


@pytest.mark.parametrize("ahead", [0, 2])
def test_decoding_ahead_gives_the_same_batches_and_ends_with_its_block(ahead: int) -> None:
    threads = set(threading.enumerate())
    decoder = ThreadDecoder(SETTINGS, 2)
    whole = list(decode_batches(batches(7), decoder, SIZE, 8, StageTimes(), None, 20))
    with decoded_ahead(batches(7), decoder, SIZE, 8, StageTimes(), ahead, max_rows=20) as decoded:
        found = list(decoded)
    assert [batch.rows.num_rows for batch in found] == [8, 8, 4]
    assert all((a.pixels == b.pixels).all() for a, b in zip(found, whole, strict=True))
    with decoded_ahead(batches(7), decoder, SIZE, 8, StageTimes(), ahead) as decoded:
        next(iter(decoded))
    assert not [thread for thread in set(threading.enumerate()) - threads if thread.name == "prefetch"]


def test_other_captions_take_the_place_of_a_shards_own() -> None:
    stored = embed_rows(
        decode_batches(batches(7, rows=3), ThreadDecoder(SETTINGS, 2), SIZE, 8, StageTimes()), Encoder(), shard="s" * 16,
        source_schema=pa.schema([("number", pa.int64())]), text=True, captions="first", times=StageTimes(),
    )  # fmt: skip
    text = np.eye(3, Encoder().dim, dtype=np.float16)
    found = stored.with_captions(["a", None, "c"], text, np.array([True, False, True]))
    assert found.rows["cf_caption"].to_pylist() == ["a", None, "c"]
    assert found.rows.column_names.count("cf_caption") == 1
    assert found.embeddings["text_emb"].is_valid().to_pylist() == [True, False, True]
    assert found.embeddings.column_names.count("text_emb") == 1


def test_prefetch_passes_items_on_in_order_and_raises_where_the_source_did() -> None:
    def source() -> Any:
        yield from range(5)
        raise OSError("the disk is gone")

    got: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        got.extend(prefetch(source(), 2))
    assert got == list(range(5))


def test_prefetch_stays_within_its_depth_and_stops_when_the_reader_does() -> None:
    made = []

    def source() -> Any:
        for item in range(1000):
            made.append(item)
            yield item

    items = prefetch(source(), 2)
    assert next(items) == 0
    items.close()
    assert len(made) <= 5
    assert list(items) == []


def test_prefetch_begins_before_anyone_reads() -> None:
    begun = threading.Event()

    def source() -> Any:
        begun.set()
        yield 1

    items = prefetch(source(), 1)
    assert begun.wait(10)
    items.close()
