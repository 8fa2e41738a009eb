"""One ingest: what of a list is still to be fetched, shards of it through img2dataset, and a state for every row."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from clipfilter import defaults
from clipfilter.egress import Limits
from clipfilter.errors import RefusedError
from clipfilter.ingest import states
from clipfilter.ingest.shards import Settings, ShardTask, Workers, require_img2dataset
from clipfilter.ingest.urls import UrlList, open_list, row_ids
from clipfilter.scratch import only_one
from clipfilter.storage import Directory

Retry = Literal["failed", "transient", "none"]

PLAN_FILE = f"{states.FOLDER}/plan.json"
_FORMAT = 1


@dataclass(frozen=True)
class IngestRequest:
    """What an ingest is told.

    image_size: scale images down to this shorter side, as JPEG of quality 95; None stores the bytes as they came.
    retry: which rows of earlier runs are fetched again: all that failed, those whose failure may pass, or none.
    timeout: seconds of one wait for a server; deadline: seconds of one whole download. private: also fetch from addresses
    that are not on the public internet, and use the environment's proxies. max_failures: share of all rows that may
    have failed before the exit code says so.
    """

    urls: str
    out: str
    url_column: str | None = None
    caption_column: str | None = None
    image_size: int | None = None
    rows_per_shard: int = defaults.ROWS_PER_SHARD
    processes: int = 1
    threads: int = 64
    timeout: float = 10.0
    deadline: float = 60.0
    retry: Retry = "failed"
    private: bool = False
    max_failures: float = 0.9


@dataclass
class IngestResult:
    """rows: of the list, without repeats; duplicates: repeats. fetched: rows of this run by state; states: of all rows."""

    out: str
    rows: int
    duplicates: int
    fetched: dict[str, int]
    states: dict[str, int]
    shards: int
    status: str
    seconds: float
    exit_code: int
    messages: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True)
class Pending:
    """What of a list is to be fetched: `wanted` marks its rows in the order of the list (first occurrences only)."""

    rows: int
    duplicates: int
    wanted: np.ndarray

    @property
    def count(self) -> int:
        return int(self.wanted.sum())


def plan_ingest(request: IngestRequest) -> dict[str, Any]:
    """What `--dry-run` shows: the list read, what is to be fetched, where it goes; nothing fetched or written."""
    listed, directory = _checked(request)
    pending = _pending(request, listed, directory)
    return {
        "list": request.urls,
        "format": listed.format,
        "url column": listed.url_column,
        "caption column": listed.caption_column,
        "other columns": list(listed.columns),
        "rows": pending.rows,
        "duplicates": pending.duplicates,
        "done before": pending.rows - pending.count,
        "to fetch": pending.count,
        "shards": math.ceil(pending.count / request.rows_per_shard),
        "out": directory.url,
        "image size": request.image_size or "as it comes",
    }


def ingest(request: IngestRequest, progress: Any = None) -> IngestResult:
    """Fetch what a list names and is not there yet; run again, it fetches only what failed.

    progress: called with (rows done, rows to do, states so far). Raises RefusedError before anything is fetched.
    """
    began = time.monotonic()
    require_img2dataset()
    listed, directory = _checked(request)
    with _only_one(directory):
        _settle(request, directory)
        states.sweep(directory)
        pending = _pending(request, listed, directory)
        fetched = _fetch(request, listed, directory, pending, progress)
        counts = states.write_status(directory)
        directory.clean_scratch(stale_only=False)
        directory.clean_scratch(stale_only=True)
    failed = sum(count for state, count in counts.items() if state.startswith("failed"))
    total = sum(counts.values())
    messages = []
    if failed > request.max_failures * total:
        messages.append(f"{failed:,} of {total:,} rows failed, more than {request.max_failures:.0%} (--max-failures).")
    return IngestResult(
        out=directory.url,
        rows=pending.rows,
        duplicates=pending.duplicates,
        fetched=dict(sorted(fetched.items())),
        states=counts,
        shards=len(states.finished(directory)),
        status=directory.url + "/" + states.STATUS,
        seconds=time.monotonic() - began,
        exit_code=3 if messages else 0,
        messages=messages,
    )


def _checked(request: IngestRequest) -> tuple[UrlList, Directory]:
    for name in ("rows_per_shard", "processes", "threads", "timeout", "deadline"):
        if getattr(request, name) <= 0:
            raise RefusedError(f"--{name.replace('_', '-')} must be above 0.")
    if request.image_size is not None and request.image_size < 1:
        raise RefusedError("--image-size is a number of pixels, 1 or more.")
    directory = Directory(request.out)
    found = directory.names("")
    if found and not directory.exists(PLAN_FILE):
        # `names` leaves hidden ones out, so a folder with only a `.DS_Store` is empty.
        others = [name for name in found if name != states.FOLDER]
        if others:
            raise RefusedError(
                f"--out {directory.url} holds other files ({', '.join(others[:3])}); choose an empty directory."
            )
    return open_list(request.urls, request.url_column, request.caption_column), directory


def _settle(request: IngestRequest, directory: Directory) -> None:
    """Write what decides the content of shards, or accept the same that is already there."""
    wanted = {"format": _FORMAT, "image_size": request.image_size}
    if directory.create(PLAN_FILE, (json.dumps(wanted) + "\n").encode()):
        return
    existing = directory.read_json(PLAN_FILE)
    if existing != wanted:
        raise RefusedError(
            f"{directory.url} was ingested with image size {existing.get('image_size') or 'as it comes'}, now "
            f"{request.image_size or 'as it comes'}; choose another --out."
        )


@contextlib.contextmanager
def _only_one(directory: Directory) -> Iterator[None]:
    """Two ingests into one local folder would fetch the same rows twice; the second is refused."""
    with contextlib.ExitStack() as stack:
        if directory.local:
            refusal = f"another ingest is writing to {directory.url}; wait for it."
            try:
                stack.enter_context(only_one(Path(directory.path(states.FOLDER)), refusal))
            except OSError as error:
                raise RefusedError(
                    f"--out {directory.url} cannot be written ({error}); choose another place."
                ) from error
        yield


def _pending(request: IngestRequest, listed: UrlList, directory: Directory) -> Pending:
    """Compare the list with the states of earlier runs. Memory: some 20 bytes per row of the list."""
    parts = [row_ids(table["uid"]) for table in listed.batches()]
    ids = np.concatenate(parts) if parts else np.empty(0, np.uint64)
    _, first = np.unique(ids, return_index=True)
    wanted = np.zeros(len(ids), bool)
    wanted[first] = True
    closed = states.closed(directory, request.retry, private=request.private)
    wanted &= ~np.isin(ids, closed)
    return Pending(len(first), len(ids) - len(first), wanted)


def _fetch(
    request: IngestRequest, listed: UrlList, directory: Directory, pending: Pending, progress: Any
) -> Counter[str]:
    done: Counter[str] = Counter()
    if not pending.count:
        return done
    folder = directory.scratch() / "fetched"
    limits = Limits(request.timeout, request.deadline, request.private)
    settings = Settings(str(folder), request.rows_per_shard, request.threads, request.image_size, limits)
    workers = Workers(request.processes, settings)
    try:
        for outcome in workers.run(_tasks(request, listed, directory, pending)):
            done.update(states.publish(directory, outcome))
            if progress is not None:
                progress(sum(done.values()), pending.count, dict(done))
    finally:
        workers.close()
    return done


def _tasks(request: IngestRequest, listed: UrlList, directory: Directory, pending: Pending) -> Iterator[ShardTask]:
    """The rows to fetch, cut into shards with numbers of their own."""
    number = states.next_number(directory)
    tried = states.attempts(directory)
    position = 0
    held: list[pa.Table] = []
    for table in listed.batches():
        wanted = pending.wanted[position : position + table.num_rows]
        position += table.num_rows
        held.append(table.filter(pa.array(wanted)))
        while sum(part.num_rows for part in held) >= request.rows_per_shard:
            whole = pa.concat_tables(held, promote_options="permissive")
            yield _task(number, whole.slice(0, request.rows_per_shard), tried)
            held, number = [whole.slice(request.rows_per_shard)], number + 1
    rest = pa.concat_tables(held, promote_options="permissive") if held else None
    if rest is not None and rest.num_rows:
        yield _task(number, rest, tried)


def _task(number: int, rows: pa.Table, tried: dict[int, int]) -> ShardTask:
    rows = rows.combine_chunks()
    return ShardTask(number, rows, tuple(tried.get(int(i), 0) for i in row_ids(rows["uid"])))
