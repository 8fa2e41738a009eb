"""`forget`: rows removed from every file of a run, as a new version and then the deletion of all that held them, and proof.

The order makes a crash harmless: shards are written anew and committed as the next generation, the new version is
created, and only then the old files go, data before the commits that name them. Repeating the command goes on from
wherever it stopped, because what is to be done is found in the files themselves: a commit whose files hold a uid is
replaced if it is the newest of its shard and stage, and deleted in any case. What the rows were recognised by is kept
in a hidden file until the last step, which searches every byte of the run for it and writes the receipt.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter.engine import shard_report
from clipfilter.errors import RefusedError
from clipfilter.operations.export import MARKER as EXPORT
from clipfilter.operations.receipt import Pending, Place, Receipt, places_with, read_pending, sha256_of, write_pending
from clipfilter.operations.reshard import load_subset
from clipfilter.operations.traces import Search, Traces, shared_with
from clipfilter.policies import ATTACHMENTS_FOLDER as ATTACHMENTS
from clipfilter.runs import (
    DERIVED,
    FAILED,
    FILE_KINDS,
    Account,
    Base,
    Commit,
    Counts,
    DataFile,
    FileKind,
    Pictures,
    Run,
    ShardWriter,
    Totals,
    Version,
    is_run,
    ledger,
    read_table,
)
from clipfilter.sources import Shard, Source, only_used
from clipfilter.storage import Directory, join, same_place

_TABLES = ("annotated", "failed", "scored", "embeddings")
#: Where rows are looked for; embeddings are those of the annotated (or scored) rows of the same commit.
_SEARCHED = ("annotated", "failed", "scored")
_COPIES: dict[FileKind, str] = {"kept": "keep", "review": "review"}
#: For people, or made of the data: written again by their own commands.
_DERIVED = ("report.html", "run.json", "run.log")
_INDEX = "index"

#: Pictures that pages show of an encoded picture (`report`, contact sheets), so that they are found, too.
MakeThumbnails = Callable[[bytes], Iterable[bytes]]


@dataclass
class Forgotten:
    """What was done. rows: removed by this call; unknown: uids that no file holds; deleted: files that are gone.

    files, bytes: what was searched afterwards. left: where something of the rows was found all the same, and what to do;
    empty when they are forgotten. receipt: the file that says all this, "" where there was nothing to do.
    """

    run: str
    version: str = ""
    rows: int = 0
    unknown: int = 0
    shards: int = 0
    deleted: list[str] = field(default_factory=list)
    files: int = 0
    bytes: int = 0
    left: list[str] = field(default_factory=list)
    receipt: str = ""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_uids(path: str) -> set[str]:
    """The uids of a file: .npy of u8,u8 (a DataComp subset), else one per line. Raises RefusedError when it is empty."""
    if path.endswith(".npy"):
        return {f"{high:016x}{low:016x}" for high, low in load_subset(path).tolist()}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{path} cannot be read as a list of uids ({error}).") from error
    uids = {line.strip() for line in lines if line.strip()}
    if not uids:
        raise RefusedError(f"{path} holds no uids; write one cf_uid per line.")
    return uids


def forget_rows(
    run: str,
    uids_file: str,
    *,
    also: Sequence[str] = (),
    receipt: str | None = None,
    thumbnails: MakeThumbnails | None = None,
) -> Forgotten:
    """Remove the rows with these uids from every file below `run`, search every byte for what is left, write a receipt.

    All generations and stages are looked at, kept and review images too; older versions that name a file that held a row
    are deleted, and so are the search index in the run, the report and the log. also: files and folders elsewhere (labels,
    exports, pages) that are searched too, and not changed. The source and other runs (filters, runs with curation columns)
    are not touched: forget there too. Memory: the uids and one shard. Raises RefusedError when there is no finished run,
    or the uids or a place in `also` cannot be read.
    """
    opened = Run.open(run)
    directory = opened.directory
    uids = read_uids(uids_file)
    for place in also:
        if not Directory(place).exists(""):
            raise RefusedError(f"--also {place}: nothing is there; name a file or folder to search.")
    values = pa.array(sorted(uids), pa.string())
    result = Forgotten(directory.url)
    pending = read_pending(directory)
    found: set[str] = set()
    with directory:
        touched = _touched(directory, values, found)
        pending.traces.update(Traces({"uid": uids, "key": set(), "caption": set()}))
        pending.thumbnails |= _recognise(opened, touched, values, pending.traces, thumbnails, result)
        write_pending(directory, pending)
        newest = {name.path for name in ledger.list_commits(directory).values()}
        for name in sorted(touched, key=lambda name: ".scored." not in name):
            if name in newest:
                result.rows += _rewrite(opened, name, touched[name], values)
                result.shards += 1
        result.unknown = len(uids - found)
        result.version = _new_version(directory)
        doomed = _doomed(directory, set(touched))
        pending.removed |= {name: sha256_of(directory, name) for name in doomed}
        write_pending(directory, pending)
        for name in doomed:
            _remove(directory, name, result)
        for stale_only in (False, True):
            directory.clean_scratch(stale_only=stale_only)
        _prove(opened, pending, also, receipt, result)
        _note_others(opened, values, result)
        write_pending(directory, None)
    return result


def _prove(run: Run, pending: Pending, also: Sequence[str], receipt: str | None, result: Forgotten) -> None:
    """Search all bytes for the rows, and write the receipt."""
    directory = run.directory
    shared = shared_with(pending.traces, _remaining(directory))
    search = Search(pending.traces, shared, pending.thumbnails)
    places = list(places_with(directory, search))
    elsewhere = [place for url in also for place in places_with(Directory(url), search)]
    _say_what_is_left(places, elsewhere, result)
    made = Receipt.of(run, result.version, pending, places, elsewhere, search, len(shared))
    if pending.removed:
        result.receipt = made.keep(directory)
    if receipt is not None:
        Path(receipt).write_bytes(made.to_bytes())
        result.receipt = receipt


def _recognise(
    run: Run,
    touched: dict[str, set[int]],
    values: pa.Array,
    traces: Traces,
    thumbnails: MakeThumbnails | None,
    result: Forgotten,
) -> set[str]:
    """Take up what the rows are recognised by; the sha256 of the pictures that pages make of theirs."""
    made: set[str] = set()
    pictures = Pictures(run.dataset) if thumbnails is not None else None
    for commit in ledger.commits(run.directory, sorted(touched)):
        wanted: dict[int, str | None] = {}
        for kind, file in commit.files.items():
            with contextlib.suppress(FileNotFoundError):  # deleted by an interrupted call
                if kind in _SEARCHED and cf.UID in (table := read_table(run.directory, file)).column_names:
                    rows = table.filter(pc.is_in(table[cf.UID], value_set=values))
                    traces.add(rows)
                    if cf.SHA256 in rows.column_names:
                        wanted |= dict(zip(rows[cf.ROW].to_pylist(), rows[cf.SHA256].to_pylist(), strict=True))
        if wanted and pictures is not None and thumbnails is not None:
            try:
                for _, picture in pictures.read(commit.shard, wanted):
                    made |= {hashlib.sha256(data).hexdigest() for data in thumbnails(picture)}
            except Exception as error:  # whatever reading a source that has gone raises
                result.notes.append(f"thumbnails of the rows could not be made again to look for them ({error}).")
                pictures = None
    return made


def _remaining(directory: Directory) -> Iterator[pa.Table]:
    """The rows that stay: all text that is their own."""
    for commit in ledger.commits(directory):
        for kind, file in commit.files.items():
            if kind in _SEARCHED:
                table = read_table(directory, file)
                own = (cf.KEY, cf.CAPTION, cf.SHA256, cf.SOURCE_JSON)
                yield table.select([n for n in table.column_names if n in own or not n.startswith(cf.PREFIX)])


# --- finding ---------------------------------------------------------------------------------------------------------


def _touched(directory: Directory, values: pa.Array, found: set[str]) -> dict[str, set[int]]:
    """Every commit by name, of any stage and generation, whose files hold one of the uids, with the numbers of those rows."""
    rows_of: dict[tuple[str, str], set[int]] = {}  # by shard and its listing: another listing numbers other rows
    referring: set[str] = set()
    for commit in ledger.commits(directory):
        for folder, file in commit.files.items():
            if folder in _SEARCHED:
                if _refers(directory, file, values):
                    referring.add(commit.name)
                for uid, row in _matches(directory, file, values):
                    found.add(uid)
                    rows_of.setdefault((commit.shard.id, commit.shard.etag), set()).add(row)
    # The scores of a filter carry no uid: their rows are known from the other files of the shard.
    again = ((c, rows_of.get((c.shard.id, c.shard.etag), set())) for c in ledger.commits(directory))
    return {c.name: rows for c, rows in again if c.name in referring or _holds(directory, c, rows)}


def _matches(directory: Directory, file: DataFile, values: pa.Array) -> Iterator[tuple[str, int]]:
    with contextlib.suppress(FileNotFoundError):  # deleted by an interrupted call
        table = _read(directory, file, [cf.UID, cf.ROW])
        if table is not None:
            chosen = table.filter(pc.is_in(table[cf.UID], value_set=values))
            yield from zip(chosen[cf.UID].to_pylist(), chosen[cf.ROW].to_pylist(), strict=True)


def _refers(directory: Directory, file: DataFile, values: pa.Array) -> bool:
    """Whether other rows name one of the uids as that of which they are a duplicate."""
    with contextlib.suppress(FileNotFoundError):
        table = _read(directory, file, [cf.DUPLICATE_OF])
        return table is not None and bool(pc.any(pc.is_in(table[cf.DUPLICATE_OF], value_set=values)).as_py())
    return False


def _holds(directory: Directory, commit: Commit, rows: set[int]) -> bool:
    """Whether a file of the commit still has one of the rows, or is gone already (deleted by an interrupted call)."""
    wanted = pa.array(sorted(rows), pa.int64())
    for folder, file in commit.files.items():
        if not rows or folder not in _SEARCHED:
            if not directory.exists(file.name):
                return True
            continue
        try:
            table = _read(directory, file, [cf.ROW])
        except FileNotFoundError:
            return True
        if table is not None and pc.any(pc.is_in(table[cf.ROW], value_set=wanted)).as_py():
            return True
    return False


def _read(directory: Directory, file: DataFile, columns: list[str]) -> pa.Table | None:
    """These columns of a Parquet file, None where it lacks one."""
    with directory.open(file.name) as handle:
        parquet = pq.ParquetFile(handle)
        return parquet.read(columns=columns) if set(columns) <= set(parquet.schema_arrow.names) else None


# --- writing anew ----------------------------------------------------------------------------------------------------


def _rewrite(run: Run, name: str, rows: set[int], uids: pa.Array) -> int:
    """Write the next generation of a commit without these rows; how many rows it had of them."""
    directory = run.directory
    commit = ledger.read_commit(directory, name)
    drop = pa.array(sorted(rows), pa.int64())
    tables = {folder: read_table(directory, file) for folder, file in commit.files.items() if folder in _TABLES}
    left = {f: table.filter(pc.invert(pc.is_in(table[cf.ROW], value_set=drop))) for f, table in tables.items()}
    with ShardWriter(directory, _without_names(commit.shard, rows), None) as writer:
        if "embeddings" in left:
            writer.embeddings(left["embeddings"].combine_chunks())
        if "failed" in left:
            writer.failed(left["failed"])
        for folder in ("annotated", "scored"):
            if folder in left and left[folder].num_rows:
                writer.annotated(_own_words(left[folder], uids), final=folder == "annotated")
        for copies, decision in _COPIES.items():
            file = commit.files.get(copies)
            if file is not None:
                old = tables["annotated"].filter(pc.equal(tables["annotated"][cf.DECISION], decision))
                keep = ~np.isin(np.asarray(old[cf.ROW]), np.asarray(drop))
                if keep.all():
                    writer.files[copies] = file
                else:
                    _copy(run, file, keep, commit.shard, writer, copies)
        account = _account_after(commit, left)
        writer.commit(
            account,
            stage=commit.stage,
            plan=commit.plan,
            generation=commit.generation + 1,
            thresholds=commit.thresholds,
            **_bases(directory, commit),
        )
    return 0 if commit.stage == "scored" else commit.counts.rows - account.counts.rows


def _account_after(commit: Commit, left: dict[FileKind, pa.Table]) -> Account:
    """What became of the rows that are left."""
    failed = left.get("failed", FAILED.empty_table())
    rows = left.get("annotated", left.get("scored", FAILED.empty_table()))
    report = shard_report(rows, failed, cf.REASONS in rows.column_names and commit.stage == "decided")
    before = {name: count for name, count in commit.counts.items() if name != "escalated"}
    counts = Counts(before | report.counts)
    seen = commit.seen and commit.seen.forgotten(commit.counts.rows - counts.rows)
    return replace(commit, counts=counts, failed_by_class=report.failed_by_class, rules=report.rules, seen=seen)


def _bases(directory: Directory, commit: Commit) -> dict[str, Any]:
    """Which commit the decision was made from, after that one got a new generation itself."""
    same = {"base": commit.base, "base_generation": commit.base_generation}
    if commit.base is not None:
        stage = commit.base.commit.split(".")[-3]
        newest = ledger.list_commits(Directory(commit.base.run)).get((commit.shard.id, stage))
        if newest is not None:
            return {"base": Base(commit.base.run, newest.path), "base_generation": newest.generation}
        return same
    scored = ledger.list_commits(directory).get((commit.shard.id, "scored"))
    if commit.base_generation is not None and scored is not None and commit.stage != "scored":
        return {"base_generation": scored.generation}
    return same


def _without_names(shard: Shard, rows: set[int]) -> Shard:
    """An image folder's shard lists file names by row; those of forgotten rows are emptied."""
    members = tuple("" if number in rows else member for number, member in enumerate(shard.members))
    return Shard.from_json({**shard.to_json(), "members": members})


def _own_words(table: pa.Table, uids: pa.Array) -> pa.Table:
    """The table with dictionaries that hold only words its rows use, and rows that are a duplicate of none of the uids."""
    if cf.DUPLICATE_OF in table.column_names:
        place, column = table.schema.get_field_index(cf.DUPLICATE_OF), table[cf.DUPLICATE_OF]
        gone = pc.is_in(column, value_set=uids)
        table = table.set_column(
            place, table.schema.field(place), pc.if_else(gone, pa.scalar(None, column.type), column)
        )
    return only_used(table)


def _copy(run: Run, file: DataFile, keep: np.ndarray, shard: Shard, writer: ShardWriter, kind: FileKind) -> None:
    """The kept or review images without the forgotten rows: the old copy, read as the source it came from."""
    if not keep.any():
        return
    directory = run.directory
    scratch = directory.scratch() / "copies"
    shutil.rmtree(scratch, ignore_errors=True)
    old = scratch / "old" / Path(file.name).name
    old.parent.mkdir(parents=True)
    if directory.local:
        old.symlink_to(Path(directory.path(file.name)).absolute())
    else:
        directory.fs.get(directory.path(file.name), str(old), recursive=directory.fs.isdir(directory.path(file.name)))
    plan = run.dataset
    if shard.format == "parquet":  # also the copies of Arrow files and of tables of names
        plan = {**plan, "kind": "parquet", "format": {**plan["format"], "kind": "parquet"}}
    root = old if old.is_dir() else old.parent
    options = plan["options"] | {"rows_per_shard": file.rows + 1}
    source = Source.from_plan({**plan, "root": str(root), "pattern": None, "options": options})
    pieces = [piece for piece in source.iter_shards() if piece.format != "folder" or piece.members]
    rows = np.flatnonzero(keep).tolist()
    if len(pieces) != 1 or sum(batch.num_rows for batch in source.read(pieces[0], images=False)) != len(keep):
        raise RefusedError(
            f"{file.name} does not hold its {len(keep)} rows any more; run `clipfilter verify {run.url}`."
        )
    target = scratch / Path(file.name).name
    copied = source.copy_rows(pieces[0], rows, target)
    assert copied == len(rows)
    stem = re.sub(rf"{shard.id}-[0-9a-f]+(\..*)?$", "", Path(file.name).name)
    writer.publish(target, kind, "".join(Path(file.name).suffixes[-1:]), copied, stem)


# --- version and deletion --------------------------------------------------------------------------------------------


def _new_version(directory: Directory) -> str:
    """The newest version with every commit replaced by its newest generation."""
    generations = ledger.list_commits(directory)

    def change(newest: Version | None) -> Version:
        assert newest is not None
        names = []
        for path in newest.commits:
            shard, stage = path.removeprefix("commits/").split(".")[:2]
            names.append(generations[shard, stage].path)
        listing = newest.listing and newest.listing.forgotten(0)
        totals = Totals.of(ledger.commits(directory, names), newest.failed_shards, listing)
        return replace(newest, commits=names, totals=totals, listing=listing)

    return ledger.update_version(directory, change).name


def _doomed(directory: Directory, touched: set[str]) -> list[str]:
    """What is to be deleted, in that order."""
    doomed = [name for name in (*_DERIVED, _INDEX) if touched and directory.exists(name)]
    for version in ledger.version_names(directory)[:-1]:
        if touched & set(ledger.read_version(directory, version).commits):
            doomed.append(f"versions/{version}.json")
    needed = {file.name for c in ledger.commits(directory) if c.name not in touched for file in c.files.values()}
    # Files that no commit names are leftovers of killed attempts, and may hold anything.
    for folder in FILE_KINDS:
        doomed += [f"{folder}/{file}" for file in directory.names(folder) if f"{folder}/{file}" not in needed]
    return doomed + sorted(touched)


def _remove(directory: Directory, name: str, result: Forgotten) -> None:
    directory.fs.rm(directory.path(name), recursive=directory.fs.isdir(directory.path(name)))
    result.deleted.append(name)
    if name == _INDEX:
        result.notes.append("the search index was deleted; make it anew with `clipfilter index`.")


# --- what is left ----------------------------------------------------------------------------------------------------


def _say_what_is_left(places: list[Place], elsewhere: list[Place], result: Forgotten) -> None:
    searched = places + elsewhere
    result.files, result.bytes = len(searched), sum(place.bytes for place in searched)
    for place in searched:
        if place.problem is not None:
            result.left.append(f"{place.url} cannot be searched whole ({place.problem}); delete it, or look into it.")
        if not place.found:
            continue
        what = f"{place.url} still holds a {' and a '.join(sorted(place.found))} of a forgotten row"
        if f"/{ATTACHMENTS}/" in place.url and place in places:
            # A list of overrides is part of the policy: without it the run could not be explained, so it is not cut.
            cure = "it is a list of the policy: take it out of the list, decide into another directory and delete this run."
        elif "/.tmp/" in place.url:
            cure = "it is an unfinished file of a running process: end that and repeat the command."
        else:
            cure = "take it out of the file, or delete the file."
        result.left.append(f"{what}; {cure}")


def _note_others(run: Run, values: pa.Array, result: Forgotten) -> None:
    """Name what was made from this run or this run from, as far as that is recorded, and the source."""
    for url, what in _relatives(run):
        holds: set[str] = set()
        with contextlib.suppress(Exception):  # whatever is wrong with another run is for its own commands to say
            if is_run(url) and not _touched(Directory(url), values, holds) and not holds:
                continue
        cure = (
            f"forget there too: `clipfilter forget {url}`" if is_run(url) else "make it anew, or search it with --also"
        )
        result.notes.append(f"{url} {what} and may hold the rows: {cure}.")
    result.notes.append(
        f"the source {run.dataset['url']} was not touched: remove the rows there too, or processing a changed shard brings "
        "them back."
    )


def _relatives(run: Run) -> Iterator[tuple[str, str]]:
    """(where, how it is related) of runs this one was made from, and of runs and exports made from it: those that lie
    beside it, or that this run has on record."""
    for url in _bases_of(run.plan.source, run.plan.options):
        yield url, "is a run that this one was made from"
    parent = run.url.rpartition("/")[0]
    recorded = [run.directory.read_json(f"{DERIVED}/{name}")["url"] for name in run.directory.names(DERIVED)]
    beside = [join(parent, name) for name in Directory(parent).names("")] if parent else []
    for url in dict.fromkeys([*recorded, *beside]):
        with contextlib.suppress(Exception):  # not a directory of ours, or gone
            place = Directory(url)
            if same_place(url, run.url):
                continue
            if place.exists(EXPORT):
                made_from = [str(place.read_json(EXPORT).get("run"))]
            elif is_run(url):
                other = Run(url).plan
                made_from = _bases_of(other.source, other.options)
            else:
                made_from = [run.url] if url in recorded and place.exists("") else []
            if any(same_place(base, run.url) for base in made_from):
                yield url, "was made from this run"


def _bases_of(source: dict[str, Any], options: dict[str, Any]) -> list[str]:
    """The runs that a plan names as what it was made from."""
    found = [str(step["run"]) for step in options.get("curation", [])]
    while "run" in source:
        found.append(str(source["run"]))
        source = source["source"]
    return list(dict.fromkeys(found))
