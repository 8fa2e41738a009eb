"""What became of every row: one file of outcomes per shard, the shard itself, and the table that joins them.

A shard is published in this order: outcomes, sidecar and stats, then the tar. It counts once its tar is there (or when its
outcomes have no success, so that there is none); whatever a killed run left before that point is swept away, and its rows
are fetched again.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter.ingest.fetching import OPTED_OUT, REFUSED
from clipfilter.storage import Directory

FOLDER = "_ingest"
STATUS = f"{FOLDER}/status.parquet"
SUCCESS, DOWNLOAD, RESIZE, OUT, NO = "success", "failed_to_download", "failed_to_resize", "opted_out", "refused"
STATES = (SUCCESS, DOWNLOAD, RESIZE, OUT, NO)
DIGITS = 8

OUTCOMES = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),
        ("state", pa.string()),
        ("error", pa.string()),
        ("shard", pa.string()),
        ("key", pa.string()),
        ("attempt", pa.int32()),
        ("id", pa.uint64()),
    ]
)
#: Failures that may pass: no answer, too slow, broken off, server trouble.
_PASSING = re.compile(
    r"HTTP (408|421|425|429|5\d\d)|not whole after|no answer for|no connection|breaks off|lost"
    r"|TimeoutError|URLError|RemoteDisconnected|Connection|Incomplete|Name or service"  # in the words of earlier versions
)


@dataclass(frozen=True)
class Outcome:
    """A fetched shard on this machine's disk: its number, its files, and the state of each of its rows."""

    number: int
    tar: Path | None
    sidecar: Path | None
    rows: pa.Table


def state_of(status: str, error: str | None) -> str:
    """The one state of a row, from what img2dataset says of it."""
    if error and error.startswith(OPTED_OUT):
        return OUT
    if error and error.startswith(REFUSED):
        return NO
    return status if status in STATES else DOWNLOAD


def shard_name(number: int) -> str:
    return f"{number:0{DIGITS}d}"


def publish(directory: Directory, outcome: Outcome) -> Counter[str]:
    """Make a fetched shard part of the dataset; rows by state."""
    name = shard_name(outcome.number)
    path = directory.scratch() / f"{name}.outcomes.parquet"
    pq.write_table(outcome.rows, path, compression="zstd")
    directory.publish(path, f"{FOLDER}/outcomes/{name}.parquet")
    counts = Counter(outcome.rows["state"].to_pylist())
    if outcome.tar is not None and outcome.sidecar is not None:
        directory.publish(outcome.sidecar, f"{name}.parquet")
        stats = {"count": counts[SUCCESS], "successes": counts[SUCCESS], "failed_to_download": 0, "failed_to_resize": 0}
        directory.replace(f"{name}_stats.json", (json.dumps(stats) + "\n").encode())
        directory.publish(outcome.tar, f"{name}.tar")
    return counts


def finished(directory: Directory) -> list[int]:
    """Numbers of the shards that are part of the dataset."""
    return sorted(int(name[:DIGITS]) for name in directory.names("") if re.fullmatch(rf"\d{{{DIGITS}}}\.tar", name))


def next_number(directory: Directory) -> int:
    """The first number no shard has had."""
    return max([*finished(directory), *_numbers(directory)], default=-1) + 1


def sweep(directory: Directory) -> None:
    """Remove what a killed run left of shards that do not count."""
    tars = set(finished(directory))
    for number in _numbers(directory):
        if number not in tars and _successes(directory, number):
            for name in (f"{FOLDER}/outcomes/{shard_name(number)}.parquet", f"{shard_name(number)}.parquet"):
                if directory.exists(name):
                    directory.fs.rm(directory.path(name))
            stats = f"{shard_name(number)}_stats.json"
            if directory.exists(stats):
                directory.fs.rm(directory.path(stats))


def closed(directory: Directory, retry: str, *, private: bool) -> np.ndarray:
    """uint64 ids of rows that are not to be fetched (again)."""
    latest = _latest(directory)
    keep = latest.are(SUCCESS, OUT, *([] if private else [NO]))
    failed = latest.are(DOWNLOAD, RESIZE)
    if retry == "none":
        keep |= failed
    elif retry == "transient":
        keep |= failed & ~latest.passing
    return np.asarray(latest.ids[keep])


def write_status(directory: Directory) -> dict[str, int]:
    """Write `status.parquet`, one row per row of all lists with its newest state; rows by state."""
    latest = _latest(directory)
    counts = np.bincount(latest.codes, minlength=len(STATES))
    order = np.sort(latest.places)
    path = directory.scratch() / "status.parquet"
    schema = pa.schema([item for item in OUTCOMES if item.name != "id"])
    seen = 0
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in _tables(directory):
            low, high = np.searchsorted(order, [seen, seen + table.num_rows])
            chosen = table.take(pa.array(order[low:high] - seen)).drop_columns(["id"])
            seen += table.num_rows
            if chosen.num_rows:
                writer.write_table(chosen)
    if directory.local:
        path.replace(directory.path(STATUS))
    else:
        directory.fs.put_file(str(path), directory.path(STATUS))
    return {state: int(count) for state, count in zip(STATES, counts, strict=True) if count}


def attempts(directory: Directory) -> dict[int, int]:
    """How often each row that is not settled has been tried, by its id."""
    latest = _latest(directory)
    open_ids = set(latest.ids[latest.are(DOWNLOAD, RESIZE, NO)].tolist())
    tried: Counter[int] = Counter()
    for table in _tables(directory) if open_ids else ():
        tried.update(i for i in table["id"].to_pylist() if i in open_ids)
    return dict(tried)


@dataclass(frozen=True)
class _Latest:
    """Of every row: its id, the place of its newest outcome, that state's number in STATES, whether the failure may pass."""

    ids: np.ndarray
    places: np.ndarray
    codes: np.ndarray
    passing: np.ndarray

    def are(self, *states: str) -> np.ndarray:
        return np.isin(self.codes, [STATES.index(state) for state in states])


def _latest(directory: Directory) -> _Latest:
    ids, codes, passing = [np.empty(0, np.uint64)], [np.empty(0, np.int8)], [np.empty(0, bool)]
    for table in _tables(directory):
        ids.append(np.asarray(table["id"]))
        codes.append(np.asarray(pc.index_in(table["state"], pa.array(STATES)), np.int8))
        errors = table["error"].to_pylist()
        passing.append(np.fromiter((bool(e and _PASSING.search(e)) for e in errors), bool, len(errors)))
    every = np.concatenate(ids)
    unique, last = np.unique(every[::-1], return_index=True)
    places = len(every) - 1 - last
    return _Latest(unique, places, np.concatenate(codes)[places], np.concatenate(passing)[places])


def _tables(directory: Directory) -> Iterator[pa.Table]:
    for number in _numbers(directory):
        with directory.open(f"{FOLDER}/outcomes/{shard_name(number)}.parquet") as handle:
            yield pq.read_table(handle)


def _successes(directory: Directory, number: int) -> bool:
    with directory.open(f"{FOLDER}/outcomes/{shard_name(number)}.parquet") as handle:
        return SUCCESS in pq.read_table(handle, columns=["state"])["state"].to_pylist()


def _numbers(directory: Directory) -> list[int]:
    return sorted(int(name[:DIGITS]) for name in directory.names(f"{FOLDER}/outcomes") if name[:DIGITS].isdigit())
