"""Lists of URLs: read piece by piece from txt, csv, tsv, jsonl and Parquet, each row with an id of its own."""

from __future__ import annotations

import csv
import gzip
import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from clipfilter import storage
from clipfilter.errors import RefusedError
from clipfilter.policies import suggest
from clipfilter.sources import refusing

_URL_NAMES = ("url", "URL", "image_url", "link")
_CAPTION_NAMES = ("caption", "text", "TEXT", "alt", "alt_text")
#: Columns that img2dataset writes itself.
RESERVED = frozenset(
    {"key", "caption", "url", "width", "height", "original_width", "original_height", "status", "error_message"}
    | {"exif", "md5", "sha256", "sha512", "uid"}
)
_ROWS = 10_000
_LONGEST_LINE = 16 << 20  # bytes; a zipped line without an end would fill the memory
_SUFFIXES = ("txt", "csv", "tsv", "jsonl", "parquet")


@dataclass(frozen=True)
class UrlList:
    """A list of URLs: its format and which columns mean what. `columns` are the others, which travel along."""

    url: str
    format: str
    zipped: bool
    url_column: str
    caption_column: str | None
    uid_column: str | None
    columns: tuple[str, ...]

    def batches(self) -> Iterator[pa.Table]:
        """Rows as tables of `url`, `uid`, `caption` (where there is one) and the other columns; blank URLs left out.

        uid: the list's own, else 32 hex digits of a hash of (URL, caption): the same row in every list.
        """
        for table in _tables(self.url, self.format, self.zipped):
            yield self._prepared(table)

    def _prepared(self, table: pa.Table) -> pa.Table:
        urls = [str(value).strip() if value is not None else "" for value in table[self.url_column].to_pylist()]
        captions = _texts(table, self.caption_column)
        columns: dict[str, Any] = {"url": pa.array(urls, pa.string())}
        if self.caption_column is not None:
            columns["caption"] = pa.array(captions, pa.string())
        own = _texts(table, self.uid_column)
        made = [given or row_uid(url, caption) for given, url, caption in zip(own, urls, captions, strict=True)]
        columns["uid"] = pa.array(made, pa.string())
        for name in self.columns:
            column = _plain_column(table[name])
            if column is not None:
                columns[f"source_{name}" if name in RESERVED else name] = column
        return pa.table(columns).filter(pa.array([bool(url) for url in urls]))


def row_uid(url: str, caption: str | None) -> str:
    """32 hex digits: the first 128 bits of sha256 of (URL, caption)."""
    return hashlib.sha256(f"{url}\0{caption or ''}".encode("utf-8", "surrogatepass")).hexdigest()[:32]


def row_ids(uids: pa.ChunkedArray) -> np.ndarray:
    """uint64 [n]: 64 bits of a hash of each uid, small enough to hold for every row of a list."""
    digests = b"".join(hashlib.sha256(uid.encode("utf-8", "surrogatepass")).digest()[:8] for uid in uids.to_pylist())
    return np.frombuffer(digests, np.uint64)


def _plain_column(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """A column that JSON can carry: dates and decimals as text, bytes not at all."""
    kind = column.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return None
    return column.cast(pa.string()) if pa.types.is_temporal(kind) or pa.types.is_decimal(kind) else column


def _texts(table: pa.Table, name: str | None) -> list[str | None]:
    if name is None:
        return [None] * table.num_rows
    return [None if value is None else str(value) for value in table[name].to_pylist()]


def open_list(url: str, url_column: str | None = None, caption_column: str | None = None) -> UrlList:
    """Find a list's format by its name and its columns by theirs. Raises RefusedError where guessing is not enough."""
    name = url.lower()
    zipped = name.endswith(".gz")
    kind = name.removesuffix(".gz").rpartition(".")[2]
    kind = {"json": "jsonl", "ndjson": "jsonl", "pq": "parquet"}.get(kind, kind)
    if kind not in _SUFFIXES or (zipped and kind == "parquet"):
        raise RefusedError(
            f"{url} is no list of URLs: its name must end in {', '.join('.' + s for s in _SUFFIXES)} (or .gz)."
        )
    with refusing(url):
        first = next(_tables(url, kind, zipped), None)
    if first is None:
        raise RefusedError(f"{url} is empty.")
    names = first.column_names
    if kind == "txt":
        return UrlList(url, kind, zipped, "url", None, None, ())
    column = _column(url_column, _URL_NAMES, names, url, "--url-column")
    if column is None:
        raise RefusedError(
            f"{url} has no column of URLs that is easily told (its columns: {', '.join(names)}); name it with --url-column."
        )
    caption = _column(caption_column, _CAPTION_NAMES, names, url, "--caption-column")
    uid = "uid" if "uid" in names else None
    others = tuple(name for name in names if name not in (column, caption, uid))
    return UrlList(url, kind, zipped, column, caption, uid, others)


def _column(given: str | None, guesses: tuple[str, ...], names: list[str], url: str, option: str) -> str | None:
    if given is not None and given not in names:
        raise RefusedError(
            f"{url} has no column {given!r} ({option}); it has {', '.join(names)}{suggest(given, names)}."
        )
    return given or next((name for name in guesses if name in names), None)


def _tables(url: str, kind: str, zipped: bool) -> Iterator[pa.Table]:
    fs, path = storage.filesystem(url)
    with fs.open(path, "rb") as raw:
        if kind == "parquet":
            for batch in pq.ParquetFile(raw).iter_batches(_ROWS):
                yield pa.Table.from_batches([batch])
            return
        lines = gzip.GzipFile(fileobj=raw) if zipped else raw
        try:
            if kind in ("csv", "tsv"):
                yield from _csv_tables(lines, "\t" if kind == "tsv" else ",")
            else:
                yield from _line_tables(lines, kind)
        except (pa.ArrowInvalid, ValueError) as error:
            raise RefusedError(f"{url} cannot be read as {kind}: {error}") from None


def _csv_tables(lines: Any, delimiter: str) -> Iterator[pa.Table]:
    """All columns as text: a number here and a word there must not depend on where a block ends."""
    header = next(csv.reader([lines.readline(_LONGEST_LINE).decode("utf-8-sig")], delimiter=delimiter), [])
    if not header:
        return
    options = pa_csv.ReadOptions(column_names=header, block_size=4 << 20)
    convert = pa_csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    parse = pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    try:
        reader = pa_csv.open_csv(
            pa.PythonFile(lines, "r"), read_options=options, parse_options=parse, convert_options=convert
        )
    except pa.ArrowInvalid as error:
        if "Empty CSV" in str(error):
            return
        raise
    for batch in reader:
        yield pa.Table.from_batches([batch])


def _line_tables(lines: Any, kind: str) -> Iterator[pa.Table]:
    fields: list[str] | None = None
    whole = _whole_lines(lines)
    while piece := list(itertools.islice(whole, _ROWS)):
        texts = [line.decode("utf-8").strip().removeprefix("\ufeff") for line in piece]
        texts = [text for text in texts if text]
        if kind == "txt":
            yield pa.table({"url": pa.array(texts, pa.string())})
            continue
        rows = [json.loads(text) for text in texts]
        if not all(isinstance(row, dict) for row in rows):
            raise ValueError("a line is not an object")
        fields = fields or list(dict.fromkeys(name for row in rows for name in row))
        yield pa.table({name: pa.array([_plain(row.get(name)) for row in rows], pa.string()) for name in fields})


def _whole_lines(lines: Any) -> Iterator[bytes]:
    while line := lines.readline(_LONGEST_LINE + 1):
        if len(line) > _LONGEST_LINE:
            raise ValueError(f"a line is longer than {_LONGEST_LINE >> 20} MiB")
        yield line


def _plain(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
