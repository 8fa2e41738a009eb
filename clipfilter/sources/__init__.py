"""Datasets as they lie: Parquet, webdataset tars, image folders and img2dataset output, read as Arrow batches."""

from __future__ import annotations

from clipfilter.sources.discover import (
    CONTAINER_SUFFIXES,
    PARQUET_SUFFIXES,
    TABLE_SUFFIXES,
    TAR_SUFFIXES,
    Location,
    holds,
    is_image_name,
    refusing,
)
from clipfilter.sources.fetch import Fetcher, fetch_images, read_url
from clipfilter.sources.imported import IMPORTED_KIND, Imported
from clipfilter.sources.model import ReadStats, Shard, SourceOptions, row_uid, shard_id
from clipfilter.sources.schema import (
    COLUMN_PREFIX,
    freeze,
    is_binary,
    only_used,
    schema_from_text,
    schema_to_text,
    travel_name,
)
from clipfilter.sources.seen import REASONS, Reason, Seen
from clipfilter.sources.source import Source, open_source
from clipfilter.sources.spool import read_prefix
from clipfilter.sources.tar import TarFile, Wanted, index_tar
from clipfilter.sources.tar_shards import TarShards, row_members, safe_key

__all__ = [
    "COLUMN_PREFIX",
    "CONTAINER_SUFFIXES",
    "IMPORTED_KIND",
    "PARQUET_SUFFIXES",
    "REASONS",
    "TABLE_SUFFIXES",
    "TAR_SUFFIXES",
    "Fetcher",
    "Imported",
    "Location",
    "ReadStats",
    "Reason",
    "Seen",
    "Shard",
    "Source",
    "SourceOptions",
    "TarFile",
    "TarShards",
    "Wanted",
    "fetch_images",
    "freeze",
    "holds",
    "index_tar",
    "is_binary",
    "is_image_name",
    "only_used",
    "open_source",
    "read_prefix",
    "read_url",
    "refusing",
    "row_members",
    "row_uid",
    "safe_key",
    "schema_from_text",
    "schema_to_text",
    "shard_id",
    "travel_name",
]
