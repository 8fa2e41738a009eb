"""img2dataset's sidecars: the Parquet beside each shard, joined on key (it is in completion order), and _stats.json."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from clipfilter import storage
from clipfilter.sources.discover import PARQUET_SUFFIXES, TAR_SUFFIXES, Location
from clipfilter.sources.schema import freeze

SUCCESS = "success"
_COLUMNS = {"key", "status"}
_STATS = "_stats.json"


def stem(path: str) -> str:
    """The relative path of a shard without its ending: `a/00000` of `a/00000.tar` or of the folder `a/00000`."""
    for suffix in sorted((*TAR_SUFFIXES, *PARQUET_SUFFIXES), key=len, reverse=True):
        if path.lower().endswith(suffix):
            return path[: -len(suffix)]
    return path


def is_sidecar(names: Collection[str], name: str) -> bool:
    """Whether a file is the Parquet or `_stats.json` of a shard; names: of the files and folders in its folder."""
    own = name.removesuffix(_STATS).removesuffix(".parquet")
    shards = ("", *TAR_SUFFIXES, *(PARQUET_SUFFIXES if name.endswith(_STATS) else ()))
    return own != name and any(own + suffix in names for suffix in shards)


def sidecar_schema(location: Location, shards: Sequence[str]) -> pa.Schema | None:
    """The travelling columns of the first readable sidecar of these shards; None when there is none."""
    import pyarrow.parquet as pq

    for path in shards:
        fs, inside = storage.filesystem(location.url(stem(path) + ".parquet"))
        try:
            with fs.open(inside, "rb") as handle:
                schema = pq.read_schema(handle)
        except (OSError, pa.ArrowException):
            continue
        if set(schema.names) >= _COLUMNS:
            return freeze(schema)
    return None


def merge(sidecar: pa.Schema, fields: pa.Schema) -> pa.Schema:
    """The sidecar's columns, then the JSON fields it lacks; a column it knows only as null takes the JSON type."""
    merged = []
    for item in sidecar:
        place = fields.get_field_index(item.name)
        merged.append(fields.field(place) if pa.types.is_null(item.type) and place >= 0 else item)
    return pa.schema([*merged, *(item for item in fields if item.name not in sidecar.names)])


def has_stats(location: Location, path: str) -> bool:
    """Whether the shard at `path` has its `_stats.json`, which img2dataset writes last."""
    fs, inside = storage.filesystem(location.url(stem(path) + _STATS))
    return bool(fs.exists(inside))


@dataclass
class Sidecar:
    """The sidecar of one shard: how many downloads failed, and the records by key (read only when asked for)."""

    url: str
    present: bool
    not_downloaded: int = 0
    unfinished: bool = False
    _records: dict[str, dict[str, Any]] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, location: Location, path: str, stats_expected: bool) -> Sidecar:
        """The sidecar of the shard at `path`; a missing or broken one counts nothing.

        `stats_expected`: other shards have a `_stats.json`, which is written last, so one without is unfinished.
        """
        unfinished = stats_expected and not has_stats(location, path)
        sidecar = cls(location.url(stem(path) + ".parquet"), False, 0, unfinished)
        table = sidecar._read(["status"])
        if table is not None:
            sidecar.present = True
            sidecar.not_downloaded = sum(1 for status in table["status"].to_pylist() if status != SUCCESS)
        return sidecar

    def record(self, key: str) -> dict[str, Any]:
        """The fields of one successful row; empty when there is no sidecar or no such key."""
        if self._records is None:
            table = self._read(None) if self.present else None
            names = table.column_names if table is not None else []
            columns = [column.to_pylist() for column in table.columns] if table is not None else []
            rows = (dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True))
            self._records = {str(row["key"]): row for row in rows if row["status"] == SUCCESS}
        return dict(self._records.get(key, {}))

    def _read(self, columns: list[str] | None) -> pa.Table | None:
        import pyarrow.parquet as pq

        fs, inside = storage.filesystem(self.url)
        try:
            with fs.open(inside, "rb") as handle:
                return pq.ParquetFile(handle).read(columns)
        except (OSError, pa.ArrowException, KeyError, ValueError):
            return None
