"""Datasets as they lie: Parquet, webdataset tars, image folders and img2dataset output, read as Arrow batches."""

from __future__ import annotations

from clipfilter.sources.model import ReadStats, Shard, ShardReader, SourceOptions
from clipfilter.sources.source import Source, open_source

__all__ = ["ReadStats", "Shard", "ShardReader", "Source", "SourceOptions", "open_source"]
