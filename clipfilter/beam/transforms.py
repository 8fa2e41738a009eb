"""The Beam functions of this package. All elements are str, bytes, int or tuples of these, with coders that say so."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.coders import Coder, TupleCoder, VarIntCoder
from apache_beam.metrics import Metrics
from apache_beam.typehints import with_input_types, with_output_types
from apache_beam.utils.shared import Shared

from clipfilter import columns as cf
from clipfilter.beam.columns import DUPLICATES, count_by_host, exact_duplicates, hash_buckets
from clipfilter.beam.tasks import OneWorker, task_of
from clipfilter.decisions import DECISIONS
from clipfilter.engine import MAX_ATTEMPTS
from clipfilter.errors import RefusedError, ShardError
from clipfilter.policies import BUCKETS, high_histogram, low_histogram
from clipfilter.retry import retry
from clipfilter.runs import HASH_LENGTH, Commit, ledger
from clipfilter.storage import Directory, file_sha256

log = logging.getLogger("clipfilter.beam")
_RETRY_SECONDS = 2.0
#: Rows that are kept, to review, rejected.
Counts = tuple[int, int, int]


class Decide(beam.DoFn):  # type: ignore[misc]
    """Reference of a shard (JSON text) -> id of the shard, once its commit is in OUT.

    spec, common: JSON texts, the same for all shards of a stage. A shard that cannot be decided gives nothing; the
    reason is in the worker's log, and the driver records the shard as failed.
    """

    def __init__(self, spec: str, common: str) -> None:
        self._spec = spec
        self._common = common
        self._shared = Shared()
        self._rows = Metrics.counter("clipfilter", "rows")
        self._failed = Metrics.counter("clipfilter", "shard_failures")

    def setup(self) -> None:
        # One model per process, however many threads the runner starts in it.
        spec = self._spec
        self._worker = self._shared.acquire(lambda: OneWorker(spec), tag=spec)

    def process(self, element: str) -> Iterator[str]:
        def decide() -> Commit:
            commit: Commit = self._worker.process(task_of(element, json.loads(self._common))).commit
            return commit

        def may_pass(error: Exception, attempt: int) -> bool:
            if not isinstance(error, RefusedError):
                log.warning("%s: attempt %d failed: %s: %s", element, attempt, type(error).__name__, error)
            return not isinstance(error, RefusedError | ShardError)

        try:
            commit = retry(decide, (_RETRY_SECONDS * n for n in range(1, MAX_ATTEMPTS)), may_pass)
        except RefusedError:
            raise
        except Exception:
            self._failed.inc()
            return
        self._rows.inc(commit.counts.rows)
        yield commit.shard.id


class HistogramCoder(Coder):  # type: ignore[misc]
    """int64 [65536] counts as compressed little-endian bytes."""

    def encode(self, value: np.ndarray) -> bytes:
        return zlib.compress(value.astype("<i8").tobytes(), 1)

    def decode(self, encoded: bytes) -> np.ndarray:
        return np.frombuffer(zlib.decompress(encoded), "<i8").astype(np.int64)

    def is_deterministic(self) -> bool:
        return True

    def to_type_hint(self) -> Any:
        return np.ndarray


@with_input_types(bytes)
@with_output_types(bytes)
class SumHistograms(beam.CombineFn):  # type: ignore[misc]
    """Scores (float32 bytes) -> one histogram (bytes of `HistogramCoder`): of the upper halves of their keys, or of the
    lower halves of the keys in one bucket (`low`; the bucket is the first four bytes of each input)."""

    def __init__(self, low: bool = False) -> None:
        self._low = low

    def create_accumulator(self) -> np.ndarray:
        return np.zeros(BUCKETS, np.int64)

    def add_input(self, accumulator: np.ndarray, element: bytes) -> np.ndarray:
        if self._low:
            bucket = int.from_bytes(element[:4], "little")
            accumulator += low_histogram(np.frombuffer(element[4:], "<f4"), bucket)
        else:
            accumulator += high_histogram(np.frombuffer(element, "<f4"))
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[np.ndarray]) -> np.ndarray:
        total = self.create_accumulator()
        for part in accumulators:
            total += part
        return total

    def extract_output(self, accumulator: np.ndarray) -> bytes:
        return HistogramCoder().encode(accumulator)

    def get_accumulator_coder(self) -> Coder:
        return HistogramCoder()


@with_input_types(Counts)
@with_output_types(Counts)
class SumCounts(beam.CombineFn):  # type: ignore[misc]
    """Adds (keep, review, reject)."""

    def create_accumulator(self) -> Counts:
        return 0, 0, 0

    def add_input(self, accumulator: Counts, element: Counts) -> Counts:
        a, b = accumulator, element
        return a[0] + b[0], a[1] + b[1], a[2] + b[2]

    def merge_accumulators(self, accumulators: Iterable[Counts]) -> Counts:
        total = self.create_accumulator()
        for part in accumulators:
            total = self.add_input(total, part)
        return total

    def extract_output(self, accumulator: Counts) -> Counts:
        return accumulator

    def get_accumulator_coder(self) -> Coder:
        return TupleCoder([VarIntCoder()] * 3)


class _Columns(beam.DoFn):  # type: ignore[misc]
    """Base of what reads some columns of a commit's annotated rows; the element is the commit's name."""

    def __init__(self, run: str) -> None:
        self._run = run

    def read(self, commit: str, columns: list[str] | None) -> pa.Table | None:
        """The columns, all scores with None; nothing for a commit without rows."""
        directory = Directory(self._run)
        annotated = ledger.read_commit(directory, commit).files.annotated
        if annotated is None:
            return None
        with directory.open(annotated.name) as handle:
            file = pq.ParquetFile(handle)
            if columns is None:
                columns = [n for n in file.schema_arrow.names if n == cf.SIMILARITY or n.startswith(cf.SCORE)]
            return file.read(columns=columns)


class ReadScores(_Columns):
    """Commit -> (score's column name, its float32 values as bytes; NaN where a row has none)."""

    def process(self, element: str) -> Iterator[tuple[str, bytes]]:
        table = self.read(element, None)
        if table is None:
            return
        for name in table.column_names:
            yield name, np.asarray(table[name].to_numpy(), "<f4").tobytes()


class CountHosts(_Columns):
    """Commit -> (host, (keep, review, reject))."""

    def __init__(self, run: str, url_column: str) -> None:
        super().__init__(run)
        self._url_column = url_column

    def process(self, element: str) -> Iterator[tuple[str, Counts]]:
        table = self.read(element, [self._url_column, cf.DECISION])
        if table is not None:
            yield from count_by_host(table[self._url_column], table[cf.DECISION]).items()  # type: ignore[misc]


class SplitByHash(_Columns):
    """Commit -> (part of the hashes, the identities of its rows in that part as an Arrow stream)."""

    def __init__(self, run: str, buckets: int) -> None:
        super().__init__(run)
        self._buckets = buckets

    def process(self, element: str) -> Iterator[tuple[int, bytes]]:
        table = self.read(element, [cf.SHA256, cf.UID, cf.SHARD, cf.ROW])
        if table is None:
            return
        table = table.filter(pa.compute.is_valid(table[cf.SHA256])).combine_chunks()
        part_of = hash_buckets(table[cf.SHA256], self._buckets)
        for part in np.unique(part_of).tolist():
            some = table.filter(pa.array(part_of == part))
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, some.schema) as writer:
                writer.write_table(some)
            yield part, sink.getvalue().to_pybytes()


class _Writer(beam.DoFn):  # type: ignore[misc]
    """Base of what writes content-named Parquet files below a directory."""

    def __init__(self, out: str) -> None:
        self._out = out

    def write(self, table: pa.Table, folder: str, part: int) -> dict[str, Any]:
        """Publish the table; its entry for the summary. Nothing is written for no rows."""
        entry: dict[str, Any] = {"rows": table.num_rows}
        if table.num_rows:
            directory = Directory(self._out)
            with directory:
                path = directory.scratch() / f"{folder}-{part}"
                pq.write_table(table, path, compression="zstd")
                entry["name"] = f"{folder}/{part:05d}-{file_sha256(path)[:HASH_LENGTH]}.parquet"
                directory.publish(path, entry["name"])
        return entry


class WriteDuplicates(_Writer):
    """(part, Arrow streams) -> ("duplicates", entry of the file that names them, as JSON)."""

    def process(self, element: tuple[int, Iterable[bytes]]) -> Iterator[tuple[str, str]]:
        part, streams = element
        table = pa.concat_tables([pa.ipc.open_stream(stream).read_all() for stream in streams])
        found = exact_duplicates(table)
        groups = len(found[cf.SHA256].unique())
        yield "duplicates", json.dumps(self.write(found.cast(DUPLICATES), "duplicates", part) | {"groups": groups})


class WriteHosts(_Writer):
    """(part, (host, (keep, review, reject))...) -> ("domains", entry of the file that lists them, as JSON)."""

    def process(self, element: tuple[int, Iterable[tuple[str, Counts]]]) -> Iterator[tuple[str, str]]:
        part, counted = element
        rows = sorted(counted, key=lambda item: (-sum(item[1]), item[0]))
        counts = np.array([three for _, three in rows], np.int64).reshape(-1, 3)
        table = pa.table(
            {
                "domain": pa.array([host for host, _ in rows], pa.string()),
                "rows": counts.sum(axis=1),
                **{name: counts[:, place] for place, name in enumerate(DECISIONS)},
                "keep_rate": counts[:, 0] / counts.sum(axis=1),
            }
        )
        yield "domains", json.dumps(self.write(table, "domains", part))


class WriteSummary(beam.DoFn):  # type: ignore[misc]
    """("", (kind, JSON)...) -> statistics.json, and its text."""

    def __init__(self, out: str) -> None:
        self._out = out

    def process(self, element: tuple[str, Iterable[tuple[str, str]]]) -> Iterator[str]:
        found: dict[str, list[Any]] = {}
        for kind, text in element[1]:
            found.setdefault(kind, []).append(json.loads(text))
        summary = dict(found["run"][0])
        summary["scores"] = {
            item.pop("name"): item for item in sorted(found.get("scores", []), key=lambda i: str(i["name"]))
        }
        for kind in ("domains", "duplicates"):
            parts = sorted(found.get(kind, []), key=lambda item: str(item.get("name", "")))
            summary[kind] = {
                name: sum(part[name] for part in parts)
                for name in ("groups", "rows")
                if kind == "duplicates" or name == "rows"
            } | {"files": [part["name"] for part in parts if "name" in part]}
        text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
        directory = Directory(self._out)
        with directory:
            directory.replace("statistics.json", text.encode())
        yield text
