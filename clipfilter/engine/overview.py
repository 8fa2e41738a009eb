"""What `--dry-run` shows: all that a job would refuse checked by the job's own code, the account, the first rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from clipfilter import columns as cf
from clipfilter.engine.executors.interface import Resources
from clipfilter.engine.hardware import MAX_THREADS, cpu_count
from clipfilter.engine.job import JobPlan, JobRequest, choose_executor, engine_of, refuse_foreign_directory, resolve
from clipfilter.engine.worker import compile_for
from clipfilter.errors import RowError, ShardError
from clipfilter.images import read_header
from clipfilter.sources import Seen, Shard, Source

_ROWS = 10


def plan_overview(request: JobRequest) -> dict[str, Any]:
    """The request checked, the model loaded, the shards listed, the first rows read; nothing started or written.

    `account` is what the source's listing saw, with the rows that can be counted before they are read; `uncounted` shards
    (tars) show theirs only then. `first_rows`: key, caption, and width, height and bytes of the image, or an error.
    Raises RefusedError as the job would.
    """
    from clipfilter.models import load_encoder
    from clipfilter.policies import LabelScorer

    plan = resolve(request)
    refuse_foreign_directory(plan.directory, make=False)
    resources = _resources(request)
    device = resources.device
    encoder = load_encoder(plan.model, device=device, dtype=plan.dtype(device), threads=resources.threads)
    plan.checked(device, encoder.fingerprint)
    source, policy = plan.dataset, plan.policy
    warnings = [] if policy is None else list(compile_for(source, policy, encoder, plan.decode).warnings)
    if request.labels is not None:
        LabelScorer(request.labels, encoder)
    shards, seen = _listed(plan, source)
    sizes = {shard.path: shard.size for shard in shards}
    return {
        "job": request.job,
        "source": request.source,
        "kind": source.kind if plan.base is None else "run",
        "shards": len(shards),
        "bytes": sum(sizes.values()),
        "out": plan.directory.url,
        "resumes": plan.existing is not None,
        "policy": f"{policy.name} version {policy.version}" if policy else None,
        "rules": [rule.id for rule in policy.rules] if policy else [],
        "model": plan.model,
        "weights": encoder.fingerprint["weights_sha256"],
        "captions": plan.text,
        "warnings": warnings,
        "account": seen.to_json(),
        "uncounted": sum(shard.stop is None for shard in shards) if plan.base is None else 0,
        "first_rows": _stored_rows(plan) if plan.base is not None else _first_rows(source, shards),
    }


def _resources(request: JobRequest) -> Resources:
    """What the workers would get. Raises RefusedError where they cannot be had; no cluster is started to find out."""
    if engine_of(request) == "local" or request.address is not None:
        executor = choose_executor(request)
        try:
            return executor.resources()
        finally:
            executor.close()
    device = "cpu" if request.device in ("auto", "cpu") else request.device
    return Resources(request.workers or 1, request.threads or min(MAX_THREADS, cpu_count()), device)


def _listed(plan: JobPlan, source: Source) -> tuple[list[Shard], Seen]:
    """The shards, and the account of what was seen while they were listed."""
    if plan.base is not None:
        return [commit.shard for commit in plan.base.commits()], plan.base.version.totals.seen or Seen()
    shards = list(source.iter_shards())
    seen = Seen()
    seen.add(source.listing or Seen())
    seen.rows += sum(shard.known_rows for shard in shards)
    return shards, seen


def _first_rows(source: Source, shards: list[Shard]) -> list[dict[str, Any]]:
    """The first rows of a dataset; a shard that cannot be read is one of them, with its path and error."""
    found: list[dict[str, Any]] = []
    for shard in shards:
        try:
            for row in _rows_of(source, shard, _ROWS - len(found)):
                found.append(row)
        except ShardError as error:
            found.append({"key": shard.path, "error": str(error)})
        if len(found) >= _ROWS:
            break
    return found


def _rows_of(source: Source, shard: Shard, most: int) -> Iterator[dict[str, Any]]:
    for batch in source.read(shard):
        for row in batch.slice(0, most).to_pylist():
            yield _shown(row)
        most -= batch.num_rows
        if most <= 0:
            return


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    shown = {"key": row[cf.KEY], "caption": next(iter(row[cf.CAPTIONS] or ()), None)}
    if row[cf.IMAGE] is None:
        return {**shown, "error": row[cf.ERROR] or "no image"}
    size = {"bytes": len(row[cf.IMAGE])}
    try:
        header = read_header(row[cf.IMAGE])
    except RowError as error:
        return {**shown, **size, "error": error.message}
    width, height = header.display_size
    return {**shown, "width": width, "height": height, **size}


def _stored_rows(plan: JobPlan) -> list[dict[str, Any]]:
    """The first rows of the run that is used again."""
    assert plan.base is not None
    wanted = {cf.KEY: "key", cf.CAPTION: "caption", cf.WIDTH: "width", cf.HEIGHT: "height"}
    for _, batch in plan.base.batches(columns=lambda name: name in wanted, size=_ROWS):
        return [{shown: row.get(name) for name, shown in wanted.items()} for row in batch.to_pylist()]
    return []
