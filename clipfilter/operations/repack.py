"""Exports whose shards have a chosen number of rows instead of the source's own cuts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.runs import Commit
from clipfilter.sources import Source, TarFile, TarShards, row_members, safe_key
from clipfilter.storage import Directory

_BATCH = 256

Chosen = Iterable[tuple[Commit, pa.Table]]


def repack_source(source: Source, chosen: Chosen, target: Directory, rows_per_shard: int) -> tuple[int, int]:
    """(rows, shards) of an export in the source's format with `rows_per_shard` rows per tar or Parquet file.

    chosen: each commit with its rows. Members and image bytes are copied as they are; a key that its new tar has already
    gets `~2`. Raises RefusedError where the source is an image folder, or has changed.
    """
    if source.kind in ("folder", "img2dataset-files"):
        raise RefusedError("--rows-per-shard is for tars and Parquet; an image folder is exported as a folder.")
    if source.kind.endswith("webdataset"):
        return _tars(source, chosen, target, rows_per_shard)
    return _parquet(source, chosen, target, rows_per_shard)


def rechunk(tables: Iterable[tuple[pa.Table, ...]], rows: int) -> Iterator[tuple[pa.Table, ...]]:
    """Aligned tables cut anew into pieces of `rows` rows; the last may have fewer."""
    pending: list[tuple[pa.Table, ...]] = []
    held = 0
    for group in tables:
        pending.append(group)
        held += group[0].num_rows
        while held >= rows:
            whole = tuple(pa.concat_tables(parts) for parts in zip(*pending, strict=True))
            yield tuple(table.slice(0, rows) for table in whole)
            pending, held = [tuple(table.slice(rows) for table in whole)], held - rows
    if held:
        yield tuple(pa.concat_tables(parts) for parts in zip(*pending, strict=True))


def _copied(source: Source, commit: Commit, table: pa.Table, target: Directory) -> Path:
    shard = commit.shard
    path = target.scratch() / f"part.{shard.format}"
    if source.copy_rows(shard, table[cf.ROW].to_pylist(), path) != table.num_rows:
        raise RefusedError(f"{shard.path} is not what it was when it was decided; run again, then export.")
    return path


def _tars(source: Source, chosen: Chosen, target: Directory, rows_per_shard: int) -> tuple[int, int]:
    shards = TarShards(target, rows_per_shard)
    rows = 0

    def tables() -> Iterator[tuple[pa.Table]]:
        nonlocal rows
        for commit, table in chosen:
            path = _copied(source, commit, table, target)
            tar = TarFile(os.open(path, os.O_RDONLY), path.stat().st_size)
            for row, key in enumerate(tar.index.keys):
                shards.add(safe_key(key), row_members(tar, row))
            rows += table.num_rows
            yield (table,)

    for number, (part,) in enumerate(rechunk(tables(), rows_per_shard)):
        side = target.scratch() / f"{number:08d}.parquet"
        pq.write_table(part, side, compression="zstd")
        target.publish(side, side.name)
    return rows, shards.close()


def _parquet(source: Source, chosen: Chosen, target: Directory, rows_per_shard: int) -> tuple[int, int]:
    rows = files = held = 0
    writer: pq.ParquetWriter | None = None
    path = target.scratch() / "shard.parquet"

    def finish() -> None:
        nonlocal writer, files, held
        if writer is not None:
            writer.close()
            target.publish(path, f"{files:08d}.parquet")
            stats = json.dumps({"count": held, "successes": held}) + "\n"
            target.replace(f"{files:08d}_stats.json", stats.encode())
            writer, files, held = None, files + 1, 0

    schema: pa.Schema | None = None
    for commit, table in chosen:
        copied = pq.ParquetFile(_copied(source, commit, table, target))
        schema = schema or copied.schema_arrow
        codec = copied.metadata.row_group(0).column(0).compression.lower()
        for batch in copied.iter_batches(_BATCH):
            part = pa.Table.from_batches([batch]).replace_schema_metadata(schema.metadata).cast(schema)
            while part.num_rows:
                if writer is None:
                    writer = pq.ParquetWriter(path, schema, compression=codec if codec != "uncompressed" else "none")
                now = part.slice(0, rows_per_shard - held)
                writer.write_table(now)
                held += now.num_rows
                rows += now.num_rows
                part = part.slice(now.num_rows)
                if held == rows_per_shard:
                    finish()
    finish()
    return rows, files
