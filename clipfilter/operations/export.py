"""`export`: the kept (or review) rows of a run as a dataset of their own, in the forms that other tools read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter.curation import HALVES, uid_halves
from clipfilter.errors import RefusedError
from clipfilter.operations.repack import rechunk, repack_source
from clipfilter.runs import Commit, Run, as_matrix, read_table
from clipfilter.sources import Source
from clipfilter.storage import Directory

What = Literal["kept", "review"]
Form = Literal["source", "clip-retrieval", "datacomp"]
MARKER = "export.json"
_DECISION = {"kept": "keep", "review": "review"}
_TABLES = (".csv", ".tsv", ".jsonl")


def export_run(
    run: str, to: str, *, what: What = "kept", form: Form = "source", rows_per_shard: int | None = None
) -> dict[str, Any]:
    """Write the kept or review rows of a run's newest version to `to`.

    source        : shards in the source's own format, bytes never re-encoded, numbered from 0, none empty. Tars and
                    Parquet come with `{:08d}_stats.json`; tars also with `sizes.json` and the annotated rows of each.
    clip-retrieval: `img_emb/img_emb_N.npy`, `text_emb/text_emb_N.npy` (float16, unit norm) and `metadata_N.parquet`,
                    aligned by position.
    datacomp      : `subset.npy` of dtype "u8,u8": the two halves of each cf_uid, sorted (DataComp's resharder reads it).

    rows_per_shard: rows of each tar, Parquet file or .npy; None keeps the cuts of the source.

    Repeating an interrupted export finishes it. Raises RefusedError when the run holds no decisions, when `to` holds
    something else, or when rows per shard mean nothing for the form.
    """
    opened = Run.open(run)
    if opened.version.stage != "decided":
        raise RefusedError(
            f"{run} holds no decisions; run `clipfilter filter {run} --policy ...` first, then export that."
        )
    if rows_per_shard is not None and (rows_per_shard < 1 or form == "datacomp"):
        raise RefusedError("--rows-per-shard is 1 or more, and a DataComp subset has no shards.")
    target = Directory(to)
    if Source.from_plan(opened.dataset).holds(to):
        raise RefusedError(
            f"{to} lies inside the source, where its files would be read as data; choose another directory."
        )
    identity: dict[str, Any] = {
        "run": opened.url,
        "plan": opened.plan.sha256,
        "version": opened.version.name,
        "what": what,
        "form": form,
    }
    identity |= {"rows_per_shard": rows_per_shard} if rows_per_shard else {}
    with target:
        target.clean_scratch(stale_only=True)  # of an export that was killed
        if not target.create(MARKER, (json.dumps(identity, indent=1) + "\n").encode()):
            if target.read_json(MARKER) != identity:
                raise RefusedError(f"{to} holds another export; choose an empty directory.")
        elif target.walk("") != ["/" + MARKER]:
            target.fs.rm(target.path(MARKER))
            raise RefusedError(f"{to} is not empty; choose an empty directory.")
        opened.record(to)
        writer = {"source": _source_shards, "clip-retrieval": _clip_retrieval, "datacomp": _datacomp}[form]
        rows, files = writer(opened, target, what, rows_per_shard)
    return {"to": target.url, "what": what, "form": form, "rows": rows, "files": files}


def _chosen(run: Run, what: What) -> Iterator[tuple[Commit, pa.Table]]:
    """Each commit with its annotated rows of the wanted decision; shards without any are left out."""
    for commit in run.commits():
        if commit.files.annotated is None or not (commit.counts.keep if what == "kept" else commit.counts.review):
            continue
        table = run.table(commit.files.annotated)
        yield commit, table.filter(pc.equal(table[cf.DECISION], _DECISION[what]))


def _source_shards(run: Run, target: Directory, what: What, rows_per_shard: int | None) -> tuple[int, int]:
    source = Source.from_plan(run.dataset)
    if rows_per_shard is not None:
        return repack_source(source, _chosen(run, what), target, rows_per_shard)
    if source.kind in ("folder", "img2dataset-files"):
        return _source_folder(run, source, target, what)
    rows = files = 0
    sizes: dict[str, int] = {}
    for number, (commit, table) in enumerate(_chosen(run, what)):
        shard = commit.shard
        name = f"{number:08d}"
        file = f"{name}.{shard.format}"
        sizes[file] = table.num_rows
        rows += table.num_rows
        files += 1
        stats = f"{name}_stats.json"
        if target.exists(stats):  # written last, so its shard is whole
            continue
        path = target.scratch() / file
        own = commit.files.get(what)
        if own is not None and own.rows == table.num_rows:
            # The run's own copy has the same bytes, and is there when the source's file has changed or gone.
            run.directory.fs.get_file(run.directory.path(own.name), str(path))
            copied = own.rows
        else:
            copied = source.copy_rows(shard, table[cf.ROW].to_pylist(), path)
        if copied != table.num_rows:
            raise RefusedError(f"{shard.path} is not what it was when it was decided; run again, then export.")
        target.publish(path, file)
        if shard.format == "tar":
            side = target.scratch() / f"{name}.parquet"
            pq.write_table(table, side, compression="zstd")
            target.publish(side, f"{name}.parquet")
        target.replace(stats, (json.dumps({"count": copied, "successes": copied}) + "\n").encode())
    if source.kind.endswith("webdataset"):
        target.replace("sizes.json", (json.dumps(sizes, indent=1) + "\n").encode())
    return rows, files


def _source_folder(run: Run, source: Source, target: Directory, what: What) -> tuple[int, int]:
    """Images under their own relative paths; caption tables, which chunks share, are put together at the end."""
    rows = 0
    written: set[str] = set()
    tables = target.scratch() / "tables"
    for commit, table in _chosen(run, what):
        shard = commit.shard
        part = target.scratch() / shard.id
        rows += source.copy_rows(shard, table[cf.ROW].to_pylist(), part)
        for path in sorted(item for item in part.rglob("*") if item.is_file()):
            name = path.relative_to(part).as_posix()
            if path.suffix.lower() in _TABLES:
                _append_table(path, tables / name)
            elif name not in written:
                target.publish(path, name)
                written.add(name)
        shutil.rmtree(part)
    for path in sorted(item for item in tables.rglob("*") if item.is_file()):
        target.publish(path, path.relative_to(tables).as_posix())
    return rows, len(written)


def _append_table(part: Path, whole: Path) -> None:
    """Add a chunk's caption table to the whole one; the header line of a csv or tsv stands once."""
    whole.parent.mkdir(parents=True, exist_ok=True)
    first = not whole.exists()
    with open(part, "rb") as source, open(whole, "ab") as output:
        if not first and part.suffix.lower() != ".jsonl":
            source.readline()
        shutil.copyfileobj(source, output)


def _clip_retrieval(run: Run, target: Directory, what: What, rows_per_shard: int | None) -> tuple[int, int]:
    totals = run.version.totals
    parts: Iterable[tuple[pa.Table, ...]] = _with_embeddings(run, what)
    if rows_per_shard is not None:
        parts = rechunk(parts, rows_per_shard)
    count = len(run.version.commits)
    if rows_per_shard is not None:
        count = -(-(totals.keep if what == "kept" else totals.review) // rows_per_shard)
    digits = len(str(max(count - 1, 0)))
    rows = files = 0
    for number, (table, chosen) in enumerate(parts):
        dim = chosen.schema.field("image_emb").type.list_size
        part = f"{number:0{digits}d}"
        for name, column in (("img", "image_emb"), ("text", "text_emb")):
            if column in chosen.column_names:
                path = target.scratch() / "part.npy"
                np.save(path, as_matrix(chosen[column].combine_chunks(), dim), allow_pickle=False)
                target.publish(path, f"{name}_emb/{name}_emb_{part}.npy")
                files += 1
        names = {old: new for old, new in _METADATA_NAMES.items() if new not in table.column_names}
        metadata = table.rename_columns([names.get(name, name) for name in table.column_names])
        path = target.scratch() / "part.parquet"
        pq.write_table(metadata, path, compression="zstd")
        target.publish(path, f"metadata/metadata_{part}.parquet")
        files += 1
        rows += table.num_rows
    return rows, files


def _with_embeddings(run: Run, what: What) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The chosen rows of each shard, and their embeddings in the same order."""
    for commit, table in _chosen(run, what):
        store = read_table(*run.embeddings_at(commit))
        yield table, store.take(pc.index_in(table[cf.ROW], value_set=store[cf.ROW]))


#: clip-retrieval calls these columns so; its own index and front end look for them.
_METADATA_NAMES = {cf.KEY: "image_path", cf.CAPTION: "caption"}


def _datacomp(run: Run, target: Directory, what: What, rows_per_shard: int | None) -> tuple[int, int]:
    halves = [uid_halves(table[cf.UID]) for _, table in _chosen(run, what)]
    subset = np.sort(np.concatenate(halves)) if halves else np.empty(0, HALVES)
    path = target.scratch() / "subset.npy"
    np.save(path, subset, allow_pickle=False)
    target.publish(path, "subset.npy")
    return len(subset), 1
