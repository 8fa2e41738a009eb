"""What a run directory has been through, night by night and version by version, and the way back to an earlier version."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from clipfilter.decisions import DECISIONS
from clipfilter.errors import RefusedError
from clipfilter.nightly import record
from clipfilter.runs import Run, Version, ledger
from clipfilter.storage import Directory


def history(url: str) -> dict[str, Any]:
    """The plan hash, every version (number, rows, decisions, what it came from) and every night's record, JSON-ready.

    Raises RefusedError when `url` holds no run.
    """
    run = Run(url)
    versions = []
    for version in run.versions():
        totals = version.totals
        versions.append(
            {
                "version": version.name,
                "rows": totals.rows,
                **{part: totals[part] for part in (*DECISIONS, "failed", "shards", "failed_shards")},
                "rolled_back_to": version.rolled_back_to,
                "set_aside": len(version.set_aside or []),
            }
        )
    records = record.nights(run.directory)
    nights = [{key: value for key, value in night.items() if key != "scores"} for night in records]
    return {"run": run.url, "plan": run.plan.sha256, "versions": versions, "nights": nights}


def accept_night(url: str, night: int) -> None:
    """Compare later nights with this one and its successors only. Raises RefusedError where there is no such night."""
    directory = Directory(url)
    with directory:
        record.accept(directory, night)


def roll_back(url: str, version: str) -> Version:
    """Make an earlier version the dataset again: a new version with its list of commits; nothing is deleted.

    What the versions since then had added is set aside: later nights leave those files out until they change. Rolling
    back to the version before the rollback brings it back. Returns the new version. Raises RefusedError
    when there is no such version, or when files of it are gone.
    """
    directory = Run(url).directory
    names = ledger.version_names(directory)
    wanted = version.zfill(6)
    if wanted not in names:
        raise RefusedError(f"{url} has no version {version!r}; it has {', '.join(names) or 'none'}.")
    if wanted == names[-1]:
        raise RefusedError(f"version {wanted} is the newest one already.")
    target = ledger.read_version(directory, wanted)
    _refuse_incomplete(directory, wanted, target.commits)
    started = time.time()
    number = record.begin(directory, started)
    before: list[int] = []

    def change(newest: Version | None) -> Version:
        assert newest is not None
        before[:] = [newest.number]
        since = dict.fromkeys([*(newest.set_aside or []), *newest.commits])
        held = set(target.commits)
        order = tuple(key for key in target.order if key not in ("set_aside", "rolled_back_to"))
        aside = [name for name in since if name not in held]
        return replace(target, rolled_back_to=target.number, set_aside=aside, order=order)

    with directory:
        made = ledger.update_version(directory, change)
        record.finish(
            directory,
            {
                "night": number,
                "started": record.stamp(started),
                "seconds": 0.0,
                "outcome": "rollback",
                "version": made.name,
                "from": before[0],
                "to": int(wanted),
                "totals": made.totals,
                "alerts": [],
            },
        )
    return made


def _refuse_incomplete(directory: Directory, version: str, commits: list[str]) -> None:
    """An old version may name files that are gone on purpose (rows that had to be forgotten)."""
    there = {f"commits/{name}" for name in directory.names("commits")}
    folders: dict[str, set[str]] = {}
    gone = [name for name in commits if name not in there]
    if not gone:
        for commit in ledger.commits(directory, commits):
            for file in commit.files.values():
                folder, _, base = file.name.partition("/")
                if folder not in folders:
                    folders[folder] = set(directory.names(folder))
                if base not in folders[folder]:
                    gone.append(file.name)
    if gone:
        raise RefusedError(f"version {version} cannot come back: {len(gone)} of its files are gone, such as {gone[0]}.")
