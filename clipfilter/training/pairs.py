"""Image-caption pairs of a source, read once into a memory-mapped file that gives any row at any time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.errors import MISSING_IMAGE, RefusedError, RowError
from clipfilter.images import decode
from clipfilter.sources import Source, SourceOptions, open_source
from clipfilter.storage import replacing

_SCHEMA = pa.schema(
    [
        pa.field("uid", pa.string()),
        pa.field("image", pa.large_binary()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("label", pa.string()),
    ]
)


@dataclass
class PairCounts:
    """What became of the rows of a source: `rows` met the conditions, of which `used` are in the file."""

    rows: int = 0
    used: int = 0
    without_caption: int = 0
    without_label: int = 0
    failed: dict[str, int] = field(default_factory=dict)

    def fail(self, error_class: str) -> None:
        self.failed[error_class] = self.failed.get(error_class, 0) + 1

    def sentence(self) -> str:
        parts = [f"{self.used:,} of {self.rows:,} rows"]
        if self.without_caption:
            parts.append(f"{self.without_caption:,} without caption")
        if self.without_label:
            parts.append(f"{self.without_label:,} without label")
        parts += [f"{count:,} {name}" for name, count in sorted(self.failed.items())]
        return ", ".join(parts)


@dataclass(frozen=True)
class PairRequest:
    """Which rows of which source. where: `column=value`; a row must have one of the values given for each column, compared
    as text. `label_column` is given where labels are wanted instead of captions."""

    url: str
    where: Sequence[str] = ()
    limit: int | None = None
    image_column: str | None = None
    caption_column: str | None = None
    private: bool = False
    label_column: str | None = None


def collect_pairs(request: PairRequest, path: Path, threads: int) -> PairCounts:
    """Write the usable rows of a source to `path` (Arrow IPC), in source order; kept when it is already there.

    Usable rows meet every condition, have a caption (or a label) and an image that can be decoded; the others are
    counted. Raises RefusedError for a source that cannot be read, an unknown column, or when no row is usable.
    """
    counts_path = path.with_suffix(".json")
    if counts_path.exists() and path.exists():
        return PairCounts(**json.loads(counts_path.read_text(encoding="utf-8")))
    options = SourceOptions(request.image_column, request.caption_column, private=request.private)
    source = open_source(request.url, options)
    conditions = _conditions(request, source)
    counts = PairCounts()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        with (
            ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool,
            open(unfinished, "wb") as handle,
            pa.ipc.new_file(handle, _SCHEMA) as writer,
        ):
            for batch, rows in _wanted_rows(source, request.limit, conditions, counts):
                chosen = _usable(batch, rows, request.label_column, counts, pool)
                if chosen:
                    writer.write_batch(pa.RecordBatch.from_pylist(chosen, schema=_SCHEMA))
                    counts.used += len(chosen)
        if not counts.used:
            what = "label" if request.label_column else "caption"
            conditioned = f" where {' and '.join(request.where)}" if request.where else ""
            raise RefusedError(
                f"{request.url} has no row{conditioned} with an image and a {what} ({counts.sentence()}); "
                f"check the conditions and --{what}-column."
            )
    counts_path.write_text(json.dumps(asdict(counts)), encoding="utf-8")
    return counts


def _conditions(request: PairRequest, source: Source) -> dict[str, set[str]]:
    """Column -> the texts that a row may have there. Raises RefusedError for a column that the source has not."""
    conditions: dict[str, set[str]] = {}
    for condition in request.where:
        name, _, value = condition.partition("=")
        conditions.setdefault(name, set()).add(value)
    for name in [*conditions, *([request.label_column] if request.label_column else [])]:
        if name not in source.schema.names:
            columns = ", ".join(source.schema.names) or "none"
            raise RefusedError(f"{request.url} has no column {name!r}; its columns are: {columns}.")
    return conditions


def _wanted_rows(
    source: Source, limit: int | None, conditions: Mapping[str, set[str]], counts: PairCounts
) -> Iterator[tuple[pa.RecordBatch, list[int]]]:
    """Batches of the source with the numbers of their rows that meet the conditions, up to the limit."""
    for shard in source.iter_shards():
        if limit is not None and counts.rows >= limit:
            return
        for batch in source.read(shard):
            rows = list(_matching(batch, conditions))
            if limit is not None:
                rows = rows[: limit - counts.rows]
            counts.rows += len(rows)
            yield batch, rows


def _matching(batch: pa.RecordBatch, conditions: Mapping[str, set[str]]) -> Iterator[int]:
    columns = [(batch.column(name).to_pylist(), wanted) for name, wanted in conditions.items()]
    for row in range(batch.num_rows):
        if all(values[row] is not None and str(values[row]) in wanted for values, wanted in columns):
            yield row


def _usable(
    batch: pa.RecordBatch,
    rows: Sequence[int],
    label_column: str | None,
    counts: PairCounts,
    pool: ThreadPoolExecutor,
) -> list[dict[str, Any]]:
    errors = batch.column(cf.ERROR_CLASS).to_pylist()
    captions = batch.column(cf.CAPTIONS).to_pylist()
    labels = batch.column(label_column).to_pylist() if label_column else [None] * batch.num_rows
    uids = batch.column(cf.UID).to_pylist()
    images = batch.column(cf.IMAGE)
    found = []
    for row in rows:
        texts = [text.strip() for text in captions[row] or () if text and text.strip()]
        if label_column and labels[row] is None:
            counts.without_label += 1
        elif not label_column and not texts:
            counts.without_caption += 1
        elif errors[row] is not None or not images[row].is_valid:
            counts.fail(errors[row] or MISSING_IMAGE)
        else:
            label = str(labels[row]) if label_column else None
            found.append({"uid": uids[row], "image": images[row].as_py(), "captions": texts, "label": label})
    good = []
    for item, error in zip(found, pool.map(lambda item: _decode_error(item["image"]), found), strict=True):
        if error is None:
            good.append(item)
        else:
            counts.fail(error)
    return good


def _decode_error(data: bytes) -> str | None:
    try:
        decode(data, min_side=1)
    except RowError as error:
        return error.error_class
    return None


class Pairs:
    """Rows of a file that `collect_pairs` wrote, or some of them; images are read from disk when asked for."""

    def __init__(self, path: Path, rows: np.ndarray | None = None) -> None:
        self.path = path
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.uids: list[str] = table.column("uid").to_pylist()
        self._images = table.column("image")
        self._captions = table.column("captions")
        self._labels = table.column("label")
        self.rows = np.arange(len(self.uids)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def subset(self, positions: np.ndarray) -> Pairs:
        """The rows at these positions."""
        return Pairs(self.path, self.rows[positions])

    def image(self, position: int) -> memoryview:
        return memoryview(self._images[int(self.rows[position])].as_buffer())

    def captions(self, position: int) -> list[str]:
        found: list[str] = self._captions[int(self.rows[position])].as_py()
        return found

    def label(self, position: int) -> str:
        return str(self._labels[int(self.rows[position])].as_py())

    def shares(self, purpose: str) -> np.ndarray:
        """float64 [n]: for each row a number in [0, 1) that depends on its uid and the purpose alone."""
        digests = (hashlib.sha256(f"{purpose}\0{self.uids[row]}".encode()).digest() for row in self.rows)
        return np.array([int.from_bytes(digest[:8], "big") / 2**64 for digest in digests])

    def halves(self) -> tuple[Pairs, Pairs]:
        """Two halves by a hash of the uids: one to choose on, one to report on."""
        first = self.shares("half") < 0.5
        return self.subset(np.flatnonzero(first)), self.subset(np.flatnonzero(~first))

    def hold_out(self, share: float) -> tuple[Pairs, Pairs]:
        """(the rest, the held-out share), by a hash of the uids."""
        held = self.shares("held-out") < share
        return self.subset(np.flatnonzero(~held)), self.subset(np.flatnonzero(held))
