"""The noun: a run on disk, opened to be read. Its plan, one of its versions, the commits and tables of its shards."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.runs import ledger
from clipfilter.runs.columns import FAILED, is_decision_column
from clipfilter.runs.plan import PLAN_FILE, Plan, of_run, read_plan
from clipfilter.runs.records import Commit, DataFile, FileKind, Version
from clipfilter.storage import Directory, normalise

#: The folder of a run that says what was made from it: one JSON file for each place.
DERIVED = "derived"
#: Names of columns, or which of the names that a file has; None for all.
Columns = Sequence[str] | Callable[[str], bool] | None


def is_run(url: str) -> bool:
    """Whether a run directory is at this path or URL, finished or not."""
    # Whatever is wrong with a source that cannot even be asked, opening it says in a better sentence.
    with contextlib.suppress(Exception):
        return Directory(url).exists(PLAN_FILE)
    return False


@dataclass(frozen=True)
class RunShard:
    """One shard of a run: its commit, its rows (source and identity columns) and their embeddings, equally long."""

    commit: Commit
    rows: pa.Table
    embeddings: pa.Table

    @property
    def id(self) -> int:
        """The shard's id as a number."""
        return int(self.commit.shard.id, 16)


class Run:
    """A run directory, opened to be read: its plan, and one of its versions with the shards that it lists.

    Reading never writes into a local run; files of a run on an object store are copied to a local temporary folder while
    they are read. Safe to use from several threads.
    """

    def __init__(self, url: str, version: str | int | None = None) -> None:
        """The run at a path or URL, finished or not, at a version ("000001" or 1), by default its newest.

        Raises RefusedError where no run directory is there, or it has no such version.
        """
        self.given = url
        self.directory = Directory(url)
        plan = read_plan(self.directory)
        if plan is None:
            raise RefusedError(
                f"{url} is not a run directory (it has no {PLAN_FILE}); give the --out of an earlier run or embed."
            )
        self.plan: Plan = plan
        self._version = (
            ledger.newest_version(self.directory) if version is None else _version(self.directory, url, version)
        )

    @classmethod
    def open(cls, url: str, version: str | int | None = None) -> Run:
        """The same for a finished run. Raises RefusedError where it has not finished."""
        run = cls(url, version)
        _ = run.version
        return run

    @property
    def url(self) -> str:
        return self.directory.url

    @property
    def finished(self) -> bool:
        """Whether there is a version to read."""
        return self._version is not None

    @property
    def version(self) -> Version:
        """What the run was opened at. Raises RefusedError where it has not finished."""
        if self._version is None:
            raise RefusedError(
                f"the run in {self.given} has not finished; repeat its command to resume it, then try again."
            )
        return self._version

    def versions(self) -> Iterator[Version]:
        """All versions, oldest first."""
        return (ledger.read_version(self.directory, name) for name in ledger.version_names(self.directory))

    @property
    def dataset(self) -> dict[str, Any]:
        """The plan of the dataset of images behind the run, for `Source.from_plan`."""
        return self.plan.dataset

    def origin(self) -> Run:
        """The finished run that holds the embeddings: this one, or after a `filter` the run that it decided (its newest
        version). Raises RefusedError where that is gone or has not finished."""
        if of_run(self.plan.source):
            return Run(self.plan.source["run"]).origin()
        _ = self.version
        return self

    def commits(self, names: Iterable[str] | None = None) -> Iterator[Commit]:
        """The commits of the version in its order, or some of them by name; a bounded number in memory."""
        return ledger.commits(self.directory, self.version.commits if names is None else names)

    def scored(self) -> Iterator[Commit]:
        """The newest commits, by name, of the first stage that a policy with dataset-level rules has, of the version's shards."""
        ours = {ledger.shard_of(name) for name in self.version.commits}
        newest = ledger.list_commits(self.directory).values()
        return ledger.commits(self.directory, sorted(n.path for n in newest if n.stage == "scored" and n.shard in ours))

    def record(self, url: str) -> None:
        """Note in the run that something was made from it, which `forget` names; a run that may not be written stays."""
        place = normalise(url)
        with contextlib.suppress(OSError), Directory(self.url) as directory:
            name = hashlib.sha256(place.encode("utf-8", "surrogateescape")).hexdigest()[:16]
            directory.create(f"{DERIVED}/{name}.json", (json.dumps({"url": place}) + "\n").encode())

    # --- data files --------------------------------------------------------------------------------------------------

    def table(self, file: DataFile, columns: Columns = None) -> pa.Table:
        """Some columns of a data file (Parquet or Arrow), by default all."""
        return read_table(self.directory, file, columns)

    def batches(
        self, kind: FileKind = "annotated", columns: Columns = None, size: int = 65_536
    ) -> Iterator[tuple[Commit, pa.RecordBatch]]:
        """(commit, some columns of its annotated or failed rows), shard by shard in batches of at most `size` rows."""
        for commit in self.commits():
            for batch in self.batches_of(commit.files.get(kind), columns, size):
                yield commit, batch

    def batches_of(
        self, file: DataFile | None, columns: Columns = None, size: int = 65_536
    ) -> Iterator[pa.RecordBatch]:
        """The same of one Parquet file; none where there is no file."""
        if file is None:
            return
        with self.directory.open(file.name) as handle:
            parquet = pq.ParquetFile(handle)
            yield from parquet.iter_batches(size, columns=_chosen(parquet.schema_arrow, columns))

    # --- shards with their embeddings, of a run that holds them (`origin`) ----------------------------------------------

    def read(self, commit: Commit, *, similarity: bool = False) -> RunShard | None:
        """A shard's rows without their decision (but with `cf_similarity` if wanted) and their embeddings, memory-mapped.

        None where no row of the shard was embedded.
        """
        if commit.files.annotated is None:
            return None
        rows = (self.directory, commit.files.annotated)
        return RunShard(commit, *read_tables(rows, self.embeddings_at(commit), similarity=similarity))

    def embeddings_at(self, commit: Commit) -> tuple[Directory, DataFile]:
        """Where the embeddings of a commit's annotated rows are: this run, or the one that it decided, and the file.

        Raises RefusedError where that run is gone.
        """
        base = commit.base
        if base is None:
            return self.directory, embeddings_of(commit, self.url)
        there = Directory(base.run)
        try:
            return there, embeddings_of(ledger.read_commit(there, base.commit), base.run)
        except FileNotFoundError as error:
            raise RefusedError(
                f"the embeddings lie in the run that was decided, {base.run}, and that is gone; restore it, then try again."
            ) from error

    def shards(self, *, similarity: bool = False) -> Iterator[RunShard]:
        """Every shard that has rows, in the order of the version, one at a time."""
        for commit in self.commits():
            shard = self.read(commit, similarity=similarity)
            if shard is not None:
                yield shard

    def failed(self, commit: Commit) -> pa.Table:
        """The rows of a shard that failed, of schema FAILED."""
        return FAILED.empty_table() if commit.files.failed is None else self.table(commit.files.failed)

    @property
    def dim(self) -> int:
        """How many numbers an embedding has. Raises RefusedError where the run has no rows."""
        for shard in self.shards():
            return int(shard.embeddings.schema.field("image_emb").type.list_size)
        raise RefusedError(f"the run in {self.url} has no rows; there is nothing to compute.")


def _chosen(schema: pa.Schema, columns: Columns) -> list[str] | None:
    if columns is None:
        return None
    return [name for name in schema.names if columns(name)] if callable(columns) else list(columns)


def embeddings_of(commit: Commit, run: str) -> DataFile:
    """The embeddings that a commit of a run with rows must name. Raises RefusedError where it does not."""
    if commit.files.embeddings is None:
        raise RefusedError(
            f"{commit.name} of {run} names no embeddings; `clipfilter verify {run}` tells what is damaged."
        )
    return commit.files.embeddings


def read_table(directory: Directory, file: DataFile, columns: Columns = None) -> pa.Table:
    """`Run.table` by the directory of the run."""
    with directory.open(file.name) as handle:
        if file.name.endswith(".arrow"):
            table = pa.ipc.open_file(handle).read_all()
            return table if columns is None else table.select(_chosen(table.schema, columns))
        parquet = pq.ParquetFile(handle)
        return parquet.read(columns=_chosen(parquet.schema_arrow, columns))


def read_tables(
    rows: tuple[Directory, DataFile], embeddings: tuple[Directory, DataFile], *, similarity: bool = False
) -> tuple[pa.Table, pa.Table]:
    """A shard's rows without their decision (see `Run.read`) and their embeddings, each from the run that has the file."""
    # A copied file is removed at the end of this block; its map stays.
    with rows[0].fetched(rows[1].name) as rows_file, embeddings[0].fetched(embeddings[1].name) as embeddings_file:
        table = pq.read_table(rows_file)
        kept = [n for n in table.column_names if (similarity and n == cf.SIMILARITY) or not is_decision_column(n)]
        return table.select(kept), pa.ipc.open_file(pa.memory_map(str(embeddings_file))).read_all()


def _version(directory: Directory, url: str, version: str | int) -> Version:
    if not re.fullmatch(r"\d{1,6}", str(version)):
        raise RefusedError(f"versions are numbers such as 1, not {version!r}.")
    name = f"{int(version):06d}"
    have = ledger.version_names(directory)
    if name not in have:
        shown = ", ".join(str(int(each)) for each in have) or "none"
        raise RefusedError(f"{url} has no version {int(version)}; it has {shown}.")
    return ledger.read_version(directory, name)
