"""A run with further columns: computed over all rows of an embedded run, usable by policies like any source column."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.policies import REASONS
from clipfilter.runs import ledger
from clipfilter.runs.columns import is_decision_column
from clipfilter.runs.plan import Plan, settle_plan
from clipfilter.runs.run import local_json_files as local_files
from clipfilter.runs.run import machine, open_run
from clipfilter.runs.writer import ShardWriter
from clipfilter.sources import Shard, schema_from_text, schema_to_text
from clipfilter.storage import Directory

_CARRIED = ("not_downloaded", "duplicate_keys", "clashes", "misfits")


@dataclass(frozen=True)
class RunShard:
    """One shard of an embedded run: rows (source and identity columns, `cf_similarity`) and embeddings, equally long."""

    name: str
    commit: dict[str, Any]
    rows: pa.Table
    embeddings: pa.Table

    @property
    def id(self) -> int:
        """The shard's id as a number."""
        return int(self.commit["shard"]["id"], 16)


class EmbeddedRun:
    """The newest version of a run that holds embeddings, shard by shard; a filtered run leads to the run it decided."""

    def __init__(self, url: str) -> None:
        self.directory, self.version, self.content, self.plan = open_run(url)

    @property
    def dim(self) -> int:
        """How many numbers an embedding has."""
        for shard in self.shards():
            return int(shard.embeddings.schema.field("image_emb").type.list_size)
        raise RefusedError(f"the run in {self.directory.url} has no rows; there is nothing to compute.")

    def shards(self) -> Iterator[RunShard]:
        """Every shard that has rows, in the order of the version, one at a time."""
        for name, commit in self.commits():
            shard = self.read(name, commit)
            if shard is not None:
                yield shard

    def read(self, name: str, commit: dict[str, Any]) -> RunShard | None:
        """One shard, its embeddings memory-mapped; None where no row of it was embedded."""
        if "annotated" not in commit["files"]:
            return None
        with local_files(self.directory, commit["files"], self.directory.scratch()) as local:
            rows = pq.read_table(local["annotated"])
            chosen = [n for n in rows.column_names if n == cf.SIMILARITY or not is_decision_column(n)]
            # A fetched file is removed at the end of this block; its map stays.
            embeddings = pa.ipc.open_file(pa.memory_map(str(local["embeddings"]))).read_all()
            return RunShard(name, commit, rows.select(chosen), embeddings)

    def commits(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from ledger.iter_commits(self.directory, self.content["commits"])


Compute = Callable[[RunShard], dict[str, pa.Array]]


def refuse_existing(run: EmbeddedRun, out: str, added: pa.Schema) -> None:
    """Refuse before any work what `derive` could not write. Raises RefusedError."""
    if Directory(out).url == run.directory.url:
        raise RefusedError(f"--out is the run itself ({run.directory.url}); name another directory.")
    have = set(schema_from_text(run.plan.source["schema"]).names)
    for name in added.names:
        if name in have:
            raise RefusedError(
                f"the run in {run.directory.url} already has the column {name!r}; start from the run before."
            )


def derived_plan(run: EmbeddedRun, added: pa.Schema, options: dict[str, Any]) -> Plan:
    """The plan of `run` with further columns; `options` (JSON) is what they were computed from."""
    schema = schema_from_text(run.plan.source["schema"])
    source = {
        **run.plan.source,
        "schema": schema_to_text(pa.schema([*schema, *added])),
        "columns": {item.name: str(item.type) for item in (*schema, *added)},
    }
    earlier = run.plan.options.get("curation", [])
    here = {"run": run.directory.url, "version": run.version, "plan_sha256": run.plan.sha256, **options}
    return Plan(
        job="curate",
        source=source,
        policy=None,
        policy_sha256=None,
        model=run.plan.model,
        options={**run.plan.options, "copy": False, "curation": [*earlier, here]},
        text_column=run.plan.text_column,
    )


def derive(run: EmbeddedRun, out: str, added: pa.Schema, options: dict[str, Any], compute: Compute) -> dict[str, Any]:
    """Write the run `out`: the rows and embeddings of `run`, and the columns `added` that `compute` gives for each shard.

    Its annotated rows hold no decisions, as after `embed`; `filter`, `verify`, `search` and `export` (of a filter of it)
    work as ever. Embeddings are hard links to the run's files on the same disk, copies elsewhere. Repeating an
    interrupted call resumes it. Returns {"out", "version", "totals"}. Raises RefusedError where `out` holds another plan.
    """
    refuse_existing(run, out, added)
    directory = Directory(out)
    plan = settle_plan(directory, derived_plan(run, added, options))
    done = ledger.list_commits(directory)
    names: list[str] = []
    try:
        for name, commit in run.commits():
            shard_id = commit["shard"]["id"]
            target = ledger.CommitName(shard_id, "embedded", 1)
            names.append(target.path)
            if (shard_id, "embedded") not in done:
                _write_shard(run, directory, plan, commit, run.read(name, commit), added, compute, target)
        content = embedded_version(plan, names, run.content["failed_shards"], directory)
        version, written = ledger.write_version(directory, content)
    finally:
        directory.clean_scratch(stale_only=False)
        run.directory.clean_scratch(stale_only=False)
    summary = {"out": directory.url, "version": version, "totals": written["totals"]}
    directory.replace("run.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def embedded_version(
    plan: Plan, names: list[str], failed_shards: list[dict[str, Any]], directory: Directory
) -> dict[str, Any]:
    """The content of the version that these commits make; none of them holds a decision."""
    commits = [commit for _, commit in ledger.iter_commits(directory, names)]
    return {
        "plan": plan.sha256,
        "stage": "embedded",
        "commits": names,
        "failed_shards": failed_shards,
        "thresholds": {},
        "totals": ledger.totals_of(commits, failed_shards),
    }


def _write_shard(
    run: EmbeddedRun,
    directory: Directory,
    plan: Plan,
    base: dict[str, Any],
    shard: RunShard | None,
    added: pa.Schema,
    compute: Compute,
    target: ledger.CommitName,
) -> None:
    started = time.time()
    writer = ShardWriter(directory, Shard.from_json(base["shard"]), None)
    try:
        files = {}
        for kind in ("embeddings", "failed"):
            if kind in base["files"]:
                files[kind] = base["files"][kind]
                carry(run.directory, directory, files[kind]["name"])
        if shard is not None:
            writer.annotated(with_columns(shard.rows, added, compute(shard)), final=True)
        counts = {name: base["counts"].get(name, 0) for name in ("rows", "failed", "embedded", *_CARRIED)}
        commit = {
            "shard": base["shard"],
            "stage": "embedded",
            "generation": 1,
            "plan": plan.sha256,
            "counts": counts,
            "failed_by_class": base["failed_by_class"],
            "rules": {},
            "captions_truncated": base.get("captions_truncated", 0),
            "damaged": base.get("damaged", False),
            "bytes_unread": base.get("bytes_unread", 0),
            "files": {**files, **writer.files},
            "work": {"started": round(started, 3), "finished": round(time.time(), 3), "machine": machine()},
        }
        ledger.write_commit(directory, target, commit)
    finally:
        writer.close()


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
