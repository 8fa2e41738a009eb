"""The image embeddings of one version of a run as one long matrix, memory-mapped, and the annotated rows behind it."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.policies import suggest
from clipfilter.runs import ledger
from clipfilter.runs.columns import as_matrix
from clipfilter.runs.records import Base, Commit, DataFile
from clipfilter.runs.run import Run, embeddings_of, read_tables
from clipfilter.sources import Shard
from clipfilter.storage import Directory

#: Embedding files that stay open (each costs a file descriptor).
_OPEN_FILES = 512
_COMMITS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class VectorShard:
    """One shard that has rows. start: position of its first row; name: its commit, as the version names it.

    origin: the run directory that holds the embeddings, another one after a `filter`.
    """

    name: str
    start: int
    rows: int
    shard: Shard
    annotated: DataFile
    embeddings: DataFile
    origin: str


@dataclass(frozen=True, slots=True)
class _Opened:
    """A shard's memory-mapped file: its vectors as `shard_blocks` gives them, and its uids."""

    blocks: list[tuple[int, np.ndarray]]
    uids: pa.ChunkedArray


class RunVectors:
    """The rows of one version of a run in the order of its commits: position 0 is the first row of the first shard.

    Memory: the list of shards. Vectors are memory-mapped; those of a run on an object store are first copied to a local
    temporary folder, shard by shard as they are asked for, and removed by `close`. Safe to read from several threads.
    """

    def __init__(self, run: Run) -> None:
        """Raises RefusedError where the run has no row, or the run that it decided is gone."""
        self.run = run
        self.directory = run.directory
        self.url = run.url
        self.version = run.version.name
        self.plan = run.plan
        self.shards = list(_shards(run))
        if not self.shards:
            raise RefusedError(
                f"version {run.version.number} of {run.given} has no row with an embedding, so there is nothing to search."
            )
        self.rows = self.shards[-1].start + self.shards[-1].rows
        self._starts = np.array([shard.start for shard in self.shards], np.int64)
        self._origins: dict[str, Directory] = {run.url: run.directory}
        self._open: OrderedDict[int, _Opened] = OrderedDict()
        self._lock = threading.Lock()
        with pa.memory_map(str(self._local(self.shards[0]))) as file:
            self.dim = int(pa.ipc.open_file(file).schema.field("image_emb").type.list_size)
        with self.directory.open(self.shards[0].annotated.name) as file:
            self.schema: pa.Schema = pq.read_schema(file).remove_metadata()

    @classmethod
    def open(cls, run: str, version: str | int | None = None) -> RunVectors:
        """Open `run` (path or URL of a run, embed, score or filter) at `version` ("000001" or 1), by default the newest.

        Raises RefusedError when there is no finished run, no such version, or no row.
        """
        return cls(Run.open(run, version))

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """(position of the first row, float16 [n, dim] memory-mapped, unit norm), in order, at most 65 536 rows each."""
        for number in range(len(self.shards)):
            yield from self.shard_blocks(number)

    def shard_blocks(self, number: int) -> Iterator[tuple[int, np.ndarray]]:
        """The blocks of one shard."""
        yield from self._opened(number).blocks

    def locate(self, positions: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(number in `shards`, row in that shard's files), int64 [n] each. Raises IndexError beyond the last row."""
        wanted = np.asarray(positions, np.int64).reshape(-1)
        if len(wanted) and (wanted.min() < 0 or wanted.max() >= self.rows):
            raise IndexError(f"positions run from 0 to {self.rows - 1}")
        number = np.searchsorted(self._starts, wanted, side="right") - 1
        return number, wanted - self._starts[number]

    def vectors_at(self, positions: Sequence[int] | np.ndarray) -> np.ndarray:
        """float16 [n, dim] of these rows, copied, in the order asked."""
        number, row = self.locate(positions)
        out = np.empty((len(number), self.dim), np.float16)
        for shard in np.unique(number):
            mine = np.flatnonzero(number == shard)
            start = self.shards[shard].start
            for first, block in self.shard_blocks(int(shard)):
                here = mine[(row[mine] >= first - start) & (row[mine] < first - start + len(block))]
                out[here] = block[row[here] - (first - start)]
        return out

    def rows_at(self, positions: Sequence[int] | np.ndarray, columns: Sequence[str] | None = None) -> pa.Table:
        """Annotated columns (None is all of them) of these rows, in the order asked; only their shards are read.

        Raises RefusedError for a column the run does not have.
        """
        names = list(self.schema.names if columns is None else dict.fromkeys(columns))
        self.check_columns(names)
        number, row = self.locate(positions)
        parts, order = [], []
        for shard in np.unique(number):
            mine = np.flatnonzero(number == shard)
            with self.directory.open(self.shards[shard].annotated.name) as handle:
                parts.append(_take(pq.ParquetFile(handle), row[mine], names))
            order.append(mine)
        schema = pa.schema([self.schema.field(name) for name in names])
        if not parts:
            return schema.empty_table()
        table = pa.concat_tables(part.cast(schema) for part in parts)
        return table.take(pa.array(np.argsort(np.concatenate(order))))

    def check_columns(self, names: Sequence[str]) -> None:
        """Raise RefusedError when the annotated rows lack one of these columns."""
        for name in names:
            if name not in self.schema.names:
                hint = suggest(name, self.schema.names) or f"; it has {', '.join(self.schema.names)}."
                raise RefusedError(f"{self.url} has no column {name!r}{hint}")

    def uid_position(self, uid: str) -> int | None:
        """The position of the first row with this cf_uid, None when no row has it; reads the uids shard by shard."""
        wanted = pa.scalar(uid, pa.string())
        for number, shard in enumerate(self.shards):
            found = pc.index(self._opened(number).uids, wanted).as_py()
            if found >= 0:
                return shard.start + int(found)
        return None

    def mask(self, where: pc.Expression) -> np.ndarray:
        """bool [rows]: where the expression (see `where.parse_where`) holds; null counts as no. Reads its columns only."""
        import pyarrow.dataset as ds

        out = np.empty(self.rows, bool)
        for shard in self.shards:
            file = ds.dataset(
                self.directory.path(shard.annotated.name),
                schema=self.schema,
                format="parquet",
                filesystem=self.directory.fs,
            )
            held = file.to_table(columns={"held": where})["held"]
            out[shard.start : shard.start + shard.rows] = pc.fill_null(held, False).to_numpy()
        return out

    def stored(self, number: int) -> tuple[pa.Table, pa.Table]:
        """The annotated rows of one shard without their decision, and their embeddings, as the engine reads them."""
        shard = self.shards[number]
        return read_tables((self.directory, shard.annotated), (Directory(shard.origin), shard.embeddings))

    def close(self) -> None:
        """Unmap the files and remove local copies of remote ones."""
        with self._lock:
            self._open.clear()
            for origin in self._origins.values():
                origin.clean_scratch(stale_only=False)

    def __enter__(self) -> RunVectors:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _opened(self, number: int) -> _Opened:
        with self._lock:
            if number in self._open:
                self._open.move_to_end(number)
                return self._open[number]
            shard = self.shards[number]
            table = pa.ipc.open_file(pa.memory_map(str(self._local(shard)))).read_all()
            if table.num_rows != shard.rows:
                raise RefusedError(
                    f"{shard.embeddings.name} has {table.num_rows} rows where its commit says {shard.rows}; "
                    f"`clipfilter verify {shard.origin}` tells what is damaged."
                )
            blocks, start = [], shard.start
            for chunk in table["image_emb"].chunks:
                if len(chunk):
                    blocks.append((start, as_matrix(chunk, self.dim)))
                    start += len(chunk)
            self._open[number] = _Opened(blocks, table[cf.UID])
            while len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
            return self._open[number]

    def _local(self, shard: VectorShard) -> Path:
        """The embeddings file on a local disk."""
        origin = self._origins.get(shard.origin)
        if origin is None:
            origin = self._origins[shard.origin] = Directory(shard.origin)
        name = shard.embeddings.name
        if origin.local:
            path = Path(origin.path(name))
            if not path.exists():
                raise RefusedError(
                    f"the embeddings of {self.url} are no longer in {shard.origin} ({name} is missing); "
                    "embed the source again."
                )
            return path
        copy: Path = origin.scratch() / name.rsplit("/", 1)[-1]
        if not copy.exists():
            partial = copy.with_suffix(".part")
            origin.fs.get_file(origin.path(name), str(partial))
            partial.rename(copy)
        return copy


def _shards(run: Run) -> Iterator[VectorShard]:
    start = 0
    for commit, annotated, embeddings, origin in _with_base(run):
        yield VectorShard(commit.name, start, annotated.rows, commit.shard, annotated, embeddings, origin)
        start += annotated.rows


def _with_base(run: Run) -> Iterator[tuple[Commit, DataFile, DataFile, str]]:
    """(commit, its rows, their embeddings, the run that holds these) of all shards that have rows, fetched in batches."""
    commits = run.commits()
    while part := list(itertools.islice(commits, _COMMITS_AT_ONCE)):
        there = [commit for commit in part if commit.files.annotated is not None]
        based: dict[str, list[str]] = {}
        for commit in there:
            if commit.base is not None:
                based.setdefault(commit.base.run, []).append(commit.base.commit)
        found: dict[Base, Commit] = {}
        for url, wanted in based.items():
            try:
                theirs = list(ledger.commits(Directory(url), wanted))
            except FileNotFoundError as error:
                raise RefusedError(
                    f"{run.url} decided the rows of {url}, which is no longer there; put it back, or search another run."
                ) from error
            found |= {Base(url, name): commit for name, commit in zip(wanted, theirs, strict=True)}
        for commit in there:
            origin = run.url if commit.base is None else commit.base.run
            held = commit if commit.base is None else found[commit.base]
            assert commit.files.annotated is not None
            yield commit, commit.files.annotated, embeddings_of(held, origin), origin


def _take(file: pq.ParquetFile, rows: np.ndarray, columns: list[str]) -> pa.Table:
    """These rows of a Parquet file, in the order asked; only the row groups they are in are read."""
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    starts = np.cumsum([0, *sizes])
    group = np.searchsorted(starts, rows, side="right") - 1
    parts, order = [], []
    for number in np.unique(group):
        mine = np.flatnonzero(group == number)
        table = file.read_row_group(int(number), columns=columns).select(columns)
        parts.append(table.take(pa.array(rows[mine] - starts[number])))
        order.append(mine)
    return pa.concat_tables(parts).take(pa.array(np.argsort(np.concatenate(order))))
