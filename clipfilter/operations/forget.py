"""`forget`: rows removed from every file of a run, as a new version and then the deletion of all that held them.

The order makes a crash harmless: shards are written anew and committed as the next generation, the new version is
created, and only then the old files go, data before the commits that name them. Repeating the command goes on from
wherever it stopped, because what is to be done is found in the files themselves: a commit whose files hold a uid is
replaced if it is the newest of its shard and stage, and deleted in any case.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import tarfile
from collections.abc import Iterator
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
from clipfilter.operations.reshard import load_subset
from clipfilter.policies import ATTACHMENTS_FOLDER as ATTACHMENTS
from clipfilter.runs import (
    FAILED,
    FILE_KINDS,
    Account,
    Base,
    Commit,
    Counts,
    DataFile,
    FileKind,
    Run,
    ShardWriter,
    Totals,
    Version,
    ledger,
    read_table,
)
from clipfilter.sources import Shard
from clipfilter.storage import Directory

_TABLES = ("annotated", "failed", "scored", "embeddings")
#: Where rows are looked for; embeddings are those of the annotated (or scored) rows of the same commit.
_SEARCHED = ("annotated", "failed", "scored")
_COPIES: dict[FileKind, str] = {"kept": "keep", "review": "review"}
#: For people, or made of the data: written again by their own commands.
_DERIVED = ("report.html", "run.json", "run.log")
_INDEX = "index"


@dataclass
class Forgotten:
    """What was done. rows: removed by this call; unknown: uids that no file holds; deleted: files that are gone."""

    run: str
    version: str = ""
    rows: int = 0
    unknown: int = 0
    shards: int = 0
    deleted: list[str] = field(default_factory=list)
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


def forget_rows(run: str, uids_file: str) -> Forgotten:
    """Remove the rows with these uids from every file below `run`, and prove it with `verify` afterwards.

    All generations and stages are looked at, kept and review images too; older versions that name a file that held a row
    are deleted, and so are the search index in the run, the report and the log. The source and other runs (filters, runs
    with curation columns) are not touched: forget there too. Memory: the uids and one shard. Raises RefusedError when
    there is no finished run, or the uids cannot be read.
    """
    opened = Run.open(run)
    directory = opened.directory
    uids = read_uids(uids_file)
    values = pa.array(sorted(uids), pa.string())
    result = Forgotten(directory.url)
    found: set[str] = set()
    try:
        touched = _touched(directory, values, found)
        newest = {name.path for name in ledger.list_commits(directory).values()}
        for name in sorted(touched, key=lambda name: ".scored." not in name):
            if name in newest:
                result.rows += _rewrite(directory, name, touched[name])
                result.shards += 1
        result.unknown = len(uids - found)
        result.version = _new_version(directory)
        _delete(directory, set(touched), result)
    finally:
        directory.clean_scratch(stale_only=False)
        directory.clean_scratch(stale_only=True)
    _note_what_is_left(opened, uids, result)
    return result


# --- finding ---------------------------------------------------------------------------------------------------------


def _touched(directory: Directory, values: pa.Array, found: set[str]) -> dict[str, set[int]]:
    """Every commit by name, of any stage and generation, whose files hold one of the uids, with the numbers of those rows."""
    rows_of: dict[str, set[int]] = {}
    for commit in ledger.commits(directory):
        for folder, file in commit.files.items():
            if folder in _SEARCHED:
                for uid, row in _matches(directory, file, values):
                    found.add(uid)
                    rows_of.setdefault(commit.shard.id, set()).add(row)
    # The scores of a filter carry no uid: their rows are known from the other files of the shard.
    again = ((commit, rows_of.get(commit.shard.id, set())) for commit in ledger.commits(directory))
    return {commit.name: rows for commit, rows in again if _holds(directory, commit, rows)}


def _matches(directory: Directory, file: DataFile, values: pa.Array) -> Iterator[tuple[str, int]]:
    try:
        table = _read(directory, file, [cf.UID, cf.ROW])
    except FileNotFoundError:  # deleted by an interrupted call
        return
    if table is None:
        return
    chosen = table.filter(pc.is_in(table[cf.UID], value_set=values))
    yield from zip(chosen[cf.UID].to_pylist(), chosen[cf.ROW].to_pylist(), strict=True)


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


def _rewrite(directory: Directory, name: str, rows: set[int]) -> int:
    """Write the next generation of a commit without these rows; how many rows it had of them."""
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
                writer.annotated(left[folder], final=folder == "annotated")
        for copies, decision in _COPIES.items():
            file = commit.files.get(copies)
            if file is not None:
                old = tables["annotated"].filter(pc.equal(tables["annotated"][cf.DECISION], decision))
                keep = ~np.isin(np.asarray(old[cf.ROW]), np.asarray(drop))
                if keep.all():
                    writer.files[copies] = file
                else:
                    _copy(directory, file.name, old, keep, commit.shard, writer, copies)
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


def _copy(
    directory: Directory,
    name: str,
    old: pa.Table,
    keep: np.ndarray,
    shard: Shard,
    writer: ShardWriter,
    folder: FileKind,
) -> None:
    """The kept or review images without the forgotten rows; `old` are the rows of the file, in its order."""
    if not keep.any():
        return
    scratch = directory.scratch() / "copies"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    fetched = Path(directory.path(name))
    if not directory.local:
        fetched = scratch / "old"
        directory.fs.get(directory.path(name), str(fetched), recursive=directory.fs.isdir(directory.path(name)))
    target = scratch / Path(name).name
    if name.endswith(".tar"):
        _copy_tar(fetched, target, keep)
    elif name.endswith(".parquet"):
        table = pq.read_table(fetched)
        pq.write_table(table.filter(pa.array(keep)), target, compression="zstd")
    else:
        _copy_folder(fetched, target, shard, np.asarray(old[cf.ROW])[~keep].tolist())
    stem = re.sub(rf"{shard.id}-[0-9a-f]+(\..*)?$", "", Path(name).name)
    writer.publish(target, folder, "".join(Path(name).suffixes[-1:]), int(keep.sum()), stem)


def _copy_tar(old: Path, target: Path, keep: np.ndarray) -> None:
    """Members of a row are adjacent, and rows in the order of the annotated ones."""
    position, key = -1, None
    with tarfile.open(old, "r:") as source, tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as output:
        for member in source:
            folder, _, base = member.name.rpartition("/")
            if (folder, base.split(".", 1)[0]) != key:
                key = (folder, base.split(".", 1)[0])
                position += 1
            if keep[position]:
                output.addfile(member, source.extractfile(member))


def _copy_folder(old: Path, target: Path, shard: Shard, rows: list[int]) -> None:
    """Without the images, their sidecars and the lines of caption tables that name them."""
    shutil.copytree(old, target)
    prefix = "" if shard.path in (".", "") else shard.path + "/"
    for row in rows:
        image = target / (prefix + shard.members[row])
        for path in [image, *(image.with_suffix(suffix) for suffix in (".txt", ".json", ".caption"))]:
            path.unlink(missing_ok=True)
    names = {prefix + shard.members[row] for row in rows}
    for path in [p for p in target.rglob("*") if p.suffix.lower() in (".csv", ".tsv", ".jsonl")]:
        base = path.parent.relative_to(target).as_posix()
        local = {name.removeprefix("" if base == "." else base + "/") for name in names}
        _drop_lines(path, local)


def _drop_lines(path: Path, names: set[str]) -> None:
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".jsonl":
        lines = [line for line in text.splitlines(keepends=True) if not names & _strings(line)]
        path.write_text("".join(lines), encoding="utf-8")
        return
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter=delimiter, lineterminator="\n")
    writer.writerows(row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if not names & set(row))
    path.write_text(buffer.getvalue(), encoding="utf-8")


def _strings(line: str) -> set[str]:
    try:
        value = json.loads(line)
    except ValueError:
        return set()
    return {item for item in value.values() if isinstance(item, str)} if isinstance(value, dict) else set()


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


def _delete(directory: Directory, touched: set[str], result: Forgotten) -> None:
    for name in (*_DERIVED, _INDEX) if touched else ():
        if directory.exists(name):
            _remove(directory, name, result)
            if name == _INDEX:
                result.notes.append("the search index was deleted; make it anew with `clipfilter index`.")
    for version in ledger.version_names(directory)[:-1]:
        if touched & set(ledger.read_version(directory, version).commits):
            _remove(directory, f"versions/{version}.json", result)
    needed = {file.name for c in ledger.commits(directory) if c.name not in touched for file in c.files.values()}
    # Files that no commit names are leftovers of killed attempts, and may hold anything.
    for folder in FILE_KINDS:
        for file in directory.names(folder):
            if f"{folder}/{file}" not in needed:
                _remove(directory, f"{folder}/{file}", result)
    for path in sorted(touched):
        _remove(directory, path, result)


def _remove(directory: Directory, name: str, result: Forgotten) -> None:
    directory.fs.rm(directory.path(name), recursive=directory.fs.isdir(directory.path(name)))
    result.deleted.append(name)


def _note_what_is_left(run: Run, uids: set[str], result: Forgotten) -> None:
    directory = run.directory
    wanted = re.compile(rb"[^\s,;\"']+")
    names = {uid.encode() for uid in uids}
    for file in directory.names(ATTACHMENTS):
        # A list of overrides is part of the policy: without it the run could not be explained, so it is not cut.
        if names & set(wanted.findall(directory.read_bytes(f"{ATTACHMENTS}/{file}"))):
            result.notes.append(
                f"{ATTACHMENTS}/{file[:12]}... is a list of the policy that names such a uid; take it out of the list, decide "
                "into another directory and delete this run."
            )
    result.notes.append(
        f"the source {run.dataset['url']} was not touched: remove the rows there too, or processing a changed shard brings "
        "them back."
    )
    if unfinished := directory.unfinished():
        result.notes.append(
            f"unfinished files of running processes or other machines remain in {', '.join(unfinished)}."
        )
