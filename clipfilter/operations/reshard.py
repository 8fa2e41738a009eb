"""Tars of a dataset reduced to the rows of a uid subset, as DataComp's resharder does it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clipfilter import defaults
from clipfilter.curation import HALVES
from clipfilter.errors import RefusedError
from clipfilter.sources import TarFile, TarShards, row_members
from clipfilter.storage import Directory, directory_of

MARKER = "reshard.json"
_UID = re.compile(r"[0-9a-fA-F]{1,32}")


@dataclass
class Resharded:
    """Rows read and written, tars written, and what was wrong with the input (one sentence each)."""

    read: int = 0
    written: int = 0
    tars: int = 0
    problems: list[str] = field(default_factory=list)


def load_subset(url: str) -> np.ndarray:
    """A subset file: .npy of `HALVES`, sorted; memory-mapped where it is local. Raises RefusedError for another file."""
    directory, name = directory_of(url)
    try:
        if directory.local:
            subset = np.load(directory.path(name), mmap_mode="r", allow_pickle=False)
        else:
            with directory.open(name) as handle:
                subset = np.load(handle, allow_pickle=False)
    except FileNotFoundError as error:
        raise RefusedError(f"{url} does not exist; check the spelling.") from error
    except (ValueError, EOFError) as error:
        raise RefusedError(f"{url} is not a .npy file that can be read safely ({error}).") from error
    if subset.dtype != HALVES or subset.ndim != 1:
        raise RefusedError(f"{url} holds {subset.dtype}, and a uid subset is one array of u8,u8.")
    return np.asarray(subset)


def reshard(source: str, subset: str, out: str, rows_per_shard: int = defaults.ROWS_PER_SHARD) -> Resharded:
    """Copy the rows whose `uid` (a field of the json member) is in the subset, in input order, to new tars in `out`.

    source: folder of `{:08d}.tar`; how many rows each should have is read from `sizes.json` or `{:08d}_stats.json`. A row
    is written as often as the subset has its uid, with the keys `<uid>-0`, `<uid>-1`, ..., as the original does. Rows
    without json or uid are counted as problems. Repeating an interrupted call finishes it. Raises RefusedError when
    there are no tars, the subset is not sorted or `out` holds something else.
    """
    wanted = load_subset(subset)
    first, second = (np.ascontiguousarray(wanted[half]) for half in ("f0", "f1"))
    if ((first[1:] < first[:-1]) | ((first[1:] == first[:-1]) & (second[1:] < second[:-1]))).any():
        raise RefusedError(f"{subset} is not sorted; sort it with numpy.sort first.")
    directory, target = Directory(source), Directory(out)
    tars = [name for name in directory.names("") if name.endswith(".tar")]
    if not tars:
        raise RefusedError(f"{source} holds no .tar files.")
    identity = {"source": directory.url, "subset": hashlib.sha256(wanted.tobytes()).hexdigest(), "rows": rows_per_shard}
    claim(target, MARKER, identity)
    expected = _expected(directory, tars)
    result = Resharded()
    shards = TarShards(target, rows_per_shard)
    with target:
        for name in tars:
            with directory.fetched(name, target.scratch()) as path:
                tar = TarFile(os.open(path, os.O_RDONLY), path.stat().st_size)
                _copy(tar, name, (first, second), shards, result)
                if name in expected and expected[name] != len(tar.index):
                    result.problems.append(f"{name} should have {expected[name]:,} rows, {len(tar.index):,} were found")
        result.tars = shards.close()
    return result


def claim(target: Directory, marker: str, identity: dict[str, Any]) -> None:
    """Mark an empty folder as the place of this very job, or find it marked so. Raises RefusedError otherwise."""
    if not target.create(marker, (json.dumps(identity, indent=1) + "\n").encode()):
        if target.read_json(marker) != identity:
            raise RefusedError(f"{target.url} holds the result of another command; choose an empty directory.")
    elif target.walk("") != ["/" + marker]:
        target.fs.rm(target.path(marker))
        raise RefusedError(f"{target.url} is not empty; choose an empty directory.")


def _copy(tar: TarFile, name: str, subset: tuple[np.ndarray, np.ndarray], shards: TarShards, result: Resharded) -> None:
    for row in range(len(tar.index)):
        result.read += 1
        document = next((m for m in tar.index.members(row) if m.extension.rpartition(".")[2] == "json"), None)
        try:
            fields = {} if document is None else json.loads(tar.read(document))
            uid = str(fields["uid"])
            if not _UID.fullmatch(uid):
                raise ValueError(uid)
            high, low = divmod(int(uid, 16), 2**64)
        except (ValueError, KeyError, TypeError):
            result.problems.append(f"{name}: {tar.index.keys[row]} has no json with a uid of 32 hex digits")
            continue
        count = _occurrences(subset, high, low)
        if count:
            members = row_members(tar, row)
            for number in range(count):
                shards.add(f"{uid}-{number}", members)
                result.written += 1


def _occurrences(subset: tuple[np.ndarray, np.ndarray], high: int, low: int) -> int:
    first, second = subset
    start, stop = (int(first.searchsorted(np.uint64(high), side)) for side in ("left", "right"))
    part = second[start:stop]
    return int(part.searchsorted(np.uint64(low), "right") - part.searchsorted(np.uint64(low), "left"))


def _expected(directory: Directory, tars: list[str]) -> dict[str, int]:
    """Rows per tar as `sizes.json` or the tars' own stats say."""
    if directory.exists("sizes.json"):
        return {str(name): int(size) for name, size in directory.read_json("sizes.json").items()}
    names = set(directory.names(""))
    found = {}
    for tar in tars:
        stats = f"{tar.removesuffix('.tar')}_stats.json"
        if stats in names:
            found[tar] = int(directory.read_json(stats)["successes"])
    return found
