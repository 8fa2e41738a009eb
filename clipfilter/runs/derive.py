"""A run with further columns: computed over all rows of an embedded run, usable by policies like any source column."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.policies import REASONS
from clipfilter.runs import ledger
from clipfilter.runs.plan import Plan, settle_plan
from clipfilter.runs.records import Commit, Counts, FailedShard, Version
from clipfilter.runs.run import Run, RunShard
from clipfilter.runs.writer import ShardWriter
from clipfilter.sources import Seen, schema_from_text, schema_to_text
from clipfilter.storage import Directory

Compute = Callable[[RunShard], dict[str, pa.Array]]


def refuse_existing(run: Run, out: str, added: pa.Schema) -> None:
    """Refuse before any work what `derive` could not write. Raises RefusedError."""
    if Directory(out).url == run.directory.url:
        raise RefusedError(f"--out is the run itself ({run.directory.url}); name another directory.")
    have = set(schema_from_text(run.plan.source["schema"]).names)
    for name in added.names:
        if name in have:
            raise RefusedError(
                f"the run in {run.directory.url} already has the column {name!r}; start from the run before."
            )


def derived_plan(run: Run, added: pa.Schema, options: dict[str, Any]) -> Plan:
    """The plan of `run` with further columns; `options` (JSON) is what they were computed from."""
    schema = schema_from_text(run.plan.source["schema"])
    source = {
        **run.plan.source,
        "schema": schema_to_text(pa.schema([*schema, *added])),
        "columns": {item.name: str(item.type) for item in (*schema, *added)},
    }
    earlier = run.plan.options.get("curation", [])
    here = {"run": run.directory.url, "version": run.version.name, "plan_sha256": run.plan.sha256, **options}
    return Plan(
        job="curate",
        source=source,
        policy=None,
        policy_sha256=None,
        model=run.plan.model,
        options={**run.plan.options, "copy": False, "curation": [*earlier, here]},
        text_column=run.plan.text_column,
    )


def derive(run: Run, out: str, added: pa.Schema, options: dict[str, Any], compute: Compute) -> dict[str, Any]:
    """Write the run `out`: the rows and embeddings of `run`, and the columns `added` that `compute` gives for each shard.

    Its annotated rows hold no decisions, as after `embed`; `filter`, `verify`, `search` and `export` (of a filter of it)
    work as ever. Embeddings are hard links to the run's files on the same disk, copies elsewhere. Repeating an
    interrupted call resumes it. Returns {"out", "version", "totals"}. Raises RefusedError where `out` holds another plan.
    """
    refuse_existing(run, out, added)
    directory = Directory(out)
    plan = settle_plan(directory, derived_plan(run, added, options))
    run.record(out)
    done = ledger.list_commits(directory)
    names: list[str] = []
    with directory, run.directory:
        for commit in run.commits():
            name = ledger.CommitName(commit.shard.id, "embedded", 1)
            names.append(name.path)
            if (name.shard, name.stage) not in done:
                _write_shard(run, directory, plan, commit, added, compute)
        return finish_run(directory, plan, names, run.version.failed_shards, run.version.listing)


def finish_run(
    directory: Directory,
    plan: Plan,
    commits: list[str],
    failed_shards: list[FailedShard],
    listing: Seen | None = None,
) -> dict[str, Any]:
    """Write the version and `run.json` of a run that no job made; what it says: "out", "version" and "totals"."""
    made = Version.of(plan.sha256, "embedded", ledger.commits(directory, commits), failed_shards, listing=listing)
    version = ledger.write_version(directory, made)
    summary = {"out": directory.url, "version": version.name, "totals": version.totals}
    directory.replace("run.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _write_shard(run: Run, directory: Directory, plan: Plan, base: Commit, added: pa.Schema, compute: Compute) -> None:
    shard = run.read(base, similarity=True)
    with ShardWriter(directory, base.shard, None) as writer:
        carried = base.files.only("embeddings", "failed")
        for file in carried.values():
            carry(run.directory, directory, file.name)
        if shard is not None:
            writer.annotated(with_columns(shard.rows, added, compute(shard)), final=True)
        counts = {name: base.counts.get(name, 0) for name in ("rows", "failed", "embedded")} | base.counts.of_source()
        account = replace(base, counts=Counts(counts), rules={})
        writer.commit(account, stage="embedded", plan=plan.sha256, carried=carried)


def with_columns(rows: pa.Table, added: pa.Schema, values: dict[str, pa.Array]) -> pa.Table:
    """Annotated rows without a decision: rows, the added columns, similarity, and nulls for decision and reasons."""
    similarity = rows[cf.SIMILARITY]
    rows = rows.drop_columns([cf.SIMILARITY])
    for field in added:
        rows = rows.append_column(field, values[field.name].cast(field.type))
    rows = rows.append_column(cf.SIMILARITY, similarity)
    rows = rows.append_column(cf.DECISION, pa.nulls(rows.num_rows, pa.string()))
    return rows.append_column(cf.REASONS, pa.nulls(rows.num_rows, REASONS)).replace_schema_metadata(None)


def carry(base: Directory, target: Directory, name: str) -> None:
    """The same file under the same (content-hashed) name in another run: linked on one disk, copied otherwise."""
    if target.exists(name):
        return
    if base.local and target.local:
        Path(target.path(name)).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(base.path(name), target.path(name))
            return
        except OSError:  # another disk, or one without links
            pass
    copy = target.scratch() / Path(name).name
    if base.local:
        shutil.copyfile(base.path(name), copy)
    else:
        base.fs.get_file(base.path(name), str(copy))
    target.publish(copy, name)
