"""What a run directory has been through, night by night and version by version, and the way back to an earlier version."""

from __future__ import annotations

import re
import time
from typing import Any

from clipfilter.decisions import DECISIONS
from clipfilter.errors import RefusedError
from clipfilter.nightly import record
from clipfilter.runs import ledger, read_plan
from clipfilter.storage import Directory


def history(url: str) -> dict[str, Any]:
    """The plan hash, every version (number, rows, decisions, what it came from) and every night's record, JSON-ready.

    Raises RefusedError when `url` holds no run.
    """
    directory = Directory(url)
    plan = read_plan(directory)
    if plan is None:
        raise RefusedError(f"{url} is not a run directory (it has no plan.json); give the --out of a run.")
    versions = []
    for name in _version_names(directory):
        content = directory.read_json(f"versions/{name}.json")
        totals = content["totals"]
        versions.append(
            {
                "version": name,
                "rows": totals["rows"],
                **{part: totals[part] for part in (*DECISIONS, "failed", "shards", "failed_shards")},
                "rolled_back_to": content.get("rolled_back_to"),
                "set_aside": len(content.get("set_aside", [])),
            }
        )
    nights = [{key: value for key, value in night.items() if key != "scores"} for night in record.nights(directory)]
    return {"run": directory.url, "plan": plan.sha256, "versions": versions, "nights": nights}


def accept_night(url: str, night: int) -> None:
    """Compare later nights with this one and its successors only. Raises RefusedError where there is no such night."""
    directory = Directory(url)
    with directory:
        record.accept(directory, night)


def roll_back(url: str, version: str, now: float | None = None) -> tuple[str, dict[str, Any]]:
    """Make an earlier version the dataset again: a new version with its list of commits; nothing is deleted.

    What the versions since then had added is set aside: later nights leave those files out until they change. Rolling
    back to the version before the rollback brings it back. Returns the new version's name and content. Raises RefusedError
    when there is no such version, or when files of it are gone.
    """
    directory = Directory(url)
    if read_plan(directory) is None:
        raise RefusedError(f"{url} is not a run directory (it has no plan.json); give the --out of a run.")
    names = _version_names(directory)
    wanted = version.zfill(6)
    if wanted not in names:
        raise RefusedError(f"{url} has no version {version!r}; it has {', '.join(names) or 'none'}.")
    if wanted == names[-1]:
        raise RefusedError(f"version {wanted} is the newest one already.")
    target = directory.read_json(f"versions/{wanted}.json")
    _refuse_incomplete(directory, wanted, target["commits"])
    started = time.time() if now is None else now
    number = record.begin(directory, started)
    before: list[int] = []

    def change(newest: tuple[str, dict[str, Any]] | None) -> dict[str, Any]:
        assert newest is not None
        before[:] = [int(newest[0])]
        since = dict.fromkeys([*newest[1].get("set_aside", []), *newest[1]["commits"]])
        held = set(target["commits"])
        kept = {key: value for key, value in target.items() if key not in ("version", "set_aside", "rolled_back_to")}
        return {**kept, "rolled_back_to": int(wanted), "set_aside": [name for name in since if name not in held]}

    with directory:
        name, content = ledger.update_version(directory, change)
        record.finish(
            directory,
            {
                "night": number,
                "started": record.stamp(started),
                "seconds": 0.0,
                "outcome": "rollback",
                "version": name,
                "from": before[0],
                "to": int(wanted),
                "totals": content["totals"],
                "alerts": [],
            },
        )
    return name, content


def _version_names(directory: Directory) -> list[str]:
    return [name[:6] for name in directory.names("versions") if re.fullmatch(r"\d{6}\.json", name)]


def _refuse_incomplete(directory: Directory, version: str, commits: list[str]) -> None:
    """An old version may name files that are gone on purpose (rows that had to be forgotten)."""
    there = {f"commits/{name}" for name in directory.names("commits")}
    folders: dict[str, set[str]] = {}
    gone = [name for name in commits if name not in there]
    if not gone:
        for _, commit in ledger.iter_commits(directory, commits):
            for entry in commit["files"].values():
                folder, _, base = entry["name"].partition("/")
                if folder not in folders:
                    folders[folder] = set(directory.names(folder))
                if base not in folders[folder]:
                    gone.append(entry["name"])
    if gone:
        raise RefusedError(f"version {version} cannot come back: {len(gone)} of its files are gone, such as {gone[0]}.")
