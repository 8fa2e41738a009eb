"""Writes the data files of one shard: whole, hashed, named by their content, then published."""

from __future__ import annotations

import re
import shutil
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter.runs import ledger
from clipfilter.runs.records import Account, Commit, DataFile, FileKind, Files, Work, WorkerDetails
from clipfilter.sources import Shard, Source
from clipfilter.storage import Directory, file_sha256

_ROW_GROUP = 65_536
#: Bytes written to disk at once: Arrow's own writes are a hundred small ones for each table.
_BUFFER = 1 << 20
#: Characters of a file's sha256 that its name carries.
HASH_LENGTH = 16
_EXTENSION = {"tar": ".tar", "parquet": ".parquet", "folder": ""}


class ShardWriter:
    """The `Sink` of one shard: publishes its data files, then the commit that names them. To be used in a `with` block.

    score_columns_only: what `scored` holds: everything (a `run`, whose rows are nowhere else yet) or only scores.
    """

    def __init__(
        self, directory: Directory, shard: Shard, source: Source | None, *, score_columns_only: bool = False
    ) -> None:
        self._started = time.time()
        self._directory = directory
        self._shard = shard
        self._source = source
        self._score_columns_only = score_columns_only
        self._folder = directory.scratch() / f"{shard.id}-{threading.get_ident()}"
        self._folder.mkdir()
        self.files = Files()

    def embeddings(self, table: pa.Table) -> None:
        if table.num_rows:
            path = self._folder / "embeddings"
            with pa.output_stream(path, buffer_size=_BUFFER) as handle, pa.ipc.new_file(handle, table.schema) as writer:
                writer.write_table(table, max_chunksize=_ROW_GROUP)
            self.publish(path, "embeddings", ".arrow", table.num_rows)

    def failed(self, table: pa.Table) -> None:
        if table.num_rows:
            self._parquet(table, "failed")

    def annotated(self, table: pa.Table, *, final: bool) -> None:
        if not final and self._score_columns_only:
            wanted = (cf.SHARD, cf.ROW)
            table = table.select([n for n in table.column_names if n in wanted or n.startswith(cf.SCORE)])
        if table.num_rows:
            self._parquet(table, "annotated" if final else "scored")

    def copy(self, what: Literal["kept", "review"], rows: list[int]) -> None:
        if self._source is None:
            return
        extension = _EXTENSION[self._shard.format]
        path = self._folder / f"{what}{extension}"
        written = self._source.copy_rows(self._shard, rows, path)
        if written != len(rows):
            raise OSError(
                f"{self._shard.path} changed while it was read: {len(rows)} rows were decided, {written} copied"
            )
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(self._shard.path).name.split(".")[0]).strip("_")[:48]
        self.publish(path, what, extension, written, f"{stem or 'images'}-")

    def commit(
        self,
        account: Account,
        *,
        stage: str,
        plan: str,
        generation: int = 1,
        carried: Files | None = None,
        of_worker: WorkerDetails | None = None,
        **more: Any,
    ) -> tuple[Commit, bool]:
        """Write the commit of what was published; where another attempt was first, that one's is returned (and False).

        carried: files of an earlier commit that this one names too. more: `base_generation`, `thresholds`, `base`.
        """
        commit = Commit(
            shard=self._shard,
            stage=stage,
            generation=generation,
            plan=plan,
            **{item.name: getattr(account, item.name) for item in fields(Account)},
            files=Files({**(carried or {}), **self.files}),
            work=Work.since(self._started, of_worker),
            **more,
        )
        return ledger.write_commit(self._directory, commit)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *raised: object) -> None:
        """Remove what was not published."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _parquet(self, table: pa.Table, folder: FileKind) -> None:
        path = self._folder / folder
        table = table.cast(parquet_schema(table.schema))
        with pa.output_stream(path, buffer_size=_BUFFER) as handle:
            pq.write_table(table, handle, compression="zstd", row_group_size=_ROW_GROUP)
        self.publish(path, folder, ".parquet", table.num_rows)

    def publish(self, path: Path, folder: FileKind, extension: str, rows: int, prefix: str = "") -> None:
        """Give a finished file or folder its content's name below `folder`, and list it for the commit."""
        digest = file_sha256(path)
        size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
        name = f"{folder}/{prefix}{self._shard.id}-{digest[:HASH_LENGTH]}{extension}"
        self._directory.publish(path, name)
        self.files[folder] = DataFile(name, rows, size, digest)


def parquet_schema(schema: pa.Schema) -> pa.Schema:
    """The schema with list items named "element", as Parquet has them.

    A table that was read from Parquet has that name, one made in memory has "item"; without this their files differ.
    """
    return pa.schema([field.with_type(_parquet_type(field.type)) for field in schema], metadata=schema.metadata)


def _parquet_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_parquet_type(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_element(kind))
    if pa.types.is_large_list(kind):
        return pa.large_list(_element(kind))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_element(kind), kind.list_size)
    return kind


def _element(kind: pa.DataType) -> pa.Field:
    inner = kind.value_field
    return pa.field("element", _parquet_type(inner.type), inner.nullable, inner.metadata)
