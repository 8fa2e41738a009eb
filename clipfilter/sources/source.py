"""The one door: open a source, plan its shards, read their rows, copy chosen rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from clipfilter import storage
from clipfilter.sources.discover import Location, count_files, detect, holds, locate, refusing
from clipfilter.sources.model import ReadStats, Shard, ShardReader, SourceOptions
from clipfilter.sources.schema import schema_from_text, schema_to_text
from clipfilter.sources.seen import Seen


class _Format(Protocol):
    """What each of the formats does; `plan` is JSON."""

    location: Location
    options: SourceOptions
    columns: pa.Schema
    plan: dict[str, Any]

    def iter_shards(self, listing: Seen) -> Iterator[Shard]: ...

    def read(
        self, shard: Shard, rows: Sequence[int] | None, images: bool, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]: ...

    def copy_rows(self, shard: Shard, rows: Sequence[int], target: Path) -> int: ...


def _format_class(kind: str) -> Any:
    if kind in ("webdataset", "zip", "img2dataset-webdataset"):
        from clipfilter.sources.webdataset import Webdataset

        return Webdataset
    if kind in ("parquet", "arrow", "img2dataset-parquet"):
        from clipfilter.sources.parquet import Parquet

        return Parquet
    if kind == "table":
        from clipfilter.sources.table_rows import TableRows

        return TableRows
    if kind == "import":
        from clipfilter.sources.imported import Imported

        return Imported
    from clipfilter.sources.folder import ImageFolder

    return ImageFolder


class Source:
    """A dataset to read: `kind` is webdataset, parquet, folder, or img2dataset-webdataset, -parquet, -files.

    `schema` are the columns that travel with each row (after our prefix); `has_captions` is None where the sample
    was empty. A Source is cheap to rebuild elsewhere from `to_plan()`: no listing and no inference again.
    """

    def __init__(self, url: str, reader: _Format) -> None:
        self.url = url
        self.kind: str = reader.plan["kind"]
        self._format = reader
        self.options = reader.options
        self.schema = reader.columns
        self.has_captions: bool | None = reader.plan["has_captions"]
        self.listing: Seen | None = None  # once all shards are listed: what became of the files that are in no shard

    def to_plan(self) -> dict[str, Any]:
        """Everything workers need, as JSON."""
        location = self._format.location
        return {
            "url": self.url,
            "kind": self.kind,
            "root": location.root,
            "pattern": location.pattern,
            "options": self.options.to_json(),
            "schema": schema_to_text(self.schema),
            "columns": {item.name: str(item.type) for item in self.schema},
            "format": self._format.plan,
        }

    @classmethod
    def from_plan(cls, plan: dict[str, Any]) -> Source:
        location = Location(plan["root"], plan["pattern"])
        options = SourceOptions.from_json(plan["options"])
        columns = schema_from_text(plan["schema"])
        return cls(plan["url"], _format_class(plan["kind"])(location, options, columns, plan["format"]))

    def is_at(self, url: str) -> bool:
        """Whether a path or URL, however it is spelled, means this source."""
        return storage.same_place(url, self._place)

    def holds(self, url: str) -> bool:
        """Whether files below a path or URL would be read as those of this source."""
        return holds(self._place, url)

    @property
    def _place(self) -> str:
        location = self._format.location
        return location.url(location.pattern or "")

    def iter_shards(self) -> Iterator[Shard]:
        """The shards in listing order, found as they are asked for; only Parquet footers are opened, one at a time."""
        listing = Seen()
        yield from self._format.iter_shards(listing)
        self.listing = listing

    def count_files(self) -> int | None:
        """How many files there are, counted apart from what they are; None where links to folders or a pattern, whose
        matches alone belong to the source, leave that open."""
        location = self._format.location
        return None if location.pattern is not None else count_files(location.root)

    def read(self, shard: Shard, rows: Sequence[int] | None = None, images: bool = True) -> ShardReader:
        """Rows of a shard as record batches; `rows` restricts them to these cf_row, `images=False` skips the bytes.

        Raises ShardError (while iterating) when nothing of the shard can be read, or it changed since it was listed.
        """
        return ShardReader(lambda stats: self._format.read(shard, rows, images, stats))

    def copy_rows(self, shard: Shard, rows: Sequence[int], target: Path) -> int:
        """Write these rows to a local file (tar, Parquet) or folder (image folder) in the source's own format.

        Image bytes and members are copied as they are, rows in source order; the same call gives the same bytes.
        Returns the number of rows. Raises ShardError as `read` does.
        """
        return self._format.copy_rows(shard, rows, Path(target))


def open_source(url: str, options: SourceOptions | None = None) -> Source:
    """Find out what is at a path or fsspec URL and freeze its columns from a bounded sample.

    Raises RefusedError when nothing readable is there, or when guessing is not enough.
    """
    options = options or SourceOptions()
    location = locate(url)
    with refusing(url):
        found = detect(location)
        reader = _format_class(found.kind).infer(location, options, found)
    return Source(storage.normalise(url), reader)
