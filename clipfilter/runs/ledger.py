"""The ledger: create-only commits (one per shard and stage) and versions; all that readers trust.

A commit is the last file written for a shard, so its presence means that everything it names is whole. A shard that is
processed again (its file changed, or a retry was asked for) gets the next generation; the newest generation counts.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from clipfilter.decisions import DECISIONS
from clipfilter.storage import Directory

_COMMIT_NAME = re.compile(r"^(?P<shard>[0-9a-f]{16})\.(?P<stage>[a-z]+)\.(?P<generation>\d{3})\.json$")

#: Stages that end a shard's processing; `scored` comes before `decided` when a policy has dataset-level rules.
FINAL_STAGE = {"run": "decided", "filter": "decided"} | dict.fromkeys(
    ("embed", "score", "import", "curate"), "embedded"
)
_COMMITS_AT_ONCE = 64


@dataclass(frozen=True)
class CommitName:
    shard: str
    stage: str
    generation: int

    @property
    def path(self) -> str:
        return f"commits/{self.shard}.{self.stage}.{self.generation:03d}.json"


def write_commit(directory: Directory, name: CommitName, commit: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Create the commit; when another attempt was first, the existing one is returned instead (and False)."""
    if directory.create(name.path, (json.dumps(commit, indent=1, ensure_ascii=False) + "\n").encode()):
        return commit, True
    return directory.read_json(name.path), False


def list_commits(directory: Directory) -> dict[tuple[str, str], CommitName]:
    """The newest commit of every (shard id, stage), from names alone."""
    newest: dict[tuple[str, str], CommitName] = {}
    for file in directory.names("commits"):
        match = _COMMIT_NAME.match(file)
        if match is None:
            continue
        name = CommitName(match["shard"], match["stage"], int(match["generation"]))
        key = (name.shard, name.stage)
        if key not in newest or newest[key].generation < name.generation:
            newest[key] = name
    return newest


def read_commits(directory: Directory, names: list[str]) -> list[dict[str, Any]]:
    """Commits by file name below the directory, in the order given; fetched together from object stores."""
    if not names:
        return []
    if directory.local:
        return [directory.read_json(name) for name in names]
    found = directory.fs.cat([directory.path(name) for name in names])
    if isinstance(found, bytes):
        return [json.loads(found)]
    return [json.loads(found[directory.path(name)]) for name in names]


def iter_commits(directory: Directory, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, commit) of many commits in order, a bounded number in memory."""
    for start in range(0, len(names), _COMMITS_AT_ONCE):
        part = names[start : start + _COMMITS_AT_ONCE]
        yield from zip(part, read_commits(directory, part), strict=True)


COUNTS = ("rows", "decided", *DECISIONS, "failed", "embedded", "not_downloaded", "duplicate_keys")


def totals_of(commits: Iterable[dict[str, Any]], failed_shards: list[dict[str, Any]]) -> dict[str, Any]:
    """The sums over commits (gone through once) that a version records; all derived, so `verify` can repeat it."""
    totals: dict[str, Any] = dict.fromkeys(COUNTS, 0)
    classes: Counter[str] = Counter()
    rules: dict[str, Counter[str]] = {}
    sums: Counter[str] = Counter()
    for commit in commits:
        for name in COUNTS:
            totals[name] += commit["counts"].get(name, 0)
        classes.update(commit.get("failed_by_class", {}))
        for rule, bands in commit.get("rules", {}).items():
            rules.setdefault(rule, Counter()).update(bands)
        sums["escalated"] += commit["counts"].get("escalated", 0)
        sums["shards"] += 1
        sums["damaged_shards"] += bool(commit.get("damaged"))
        sums["bytes_unread"] += commit.get("bytes_unread", 0)
        sums["captions_truncated"] += commit.get("captions_truncated", 0)
    if sums["escalated"]:  # among the rejected; most datasets have none
        totals["escalated"] = sums["escalated"]
    totals["failed_by_class"] = dict(sorted(classes.items()))
    totals["rules"] = {rule: dict(sorted(bands.items())) for rule, bands in rules.items()}
    totals["shards"] = sums["shards"]
    totals["failed_shards"] = len(failed_shards)
    totals["damaged_shards"] = sums["damaged_shards"]
    totals["bytes_unread"] = sums["bytes_unread"]
    totals["captions_truncated"] = sums["captions_truncated"]
    return totals


def latest_version(directory: Directory) -> tuple[str, dict[str, Any]] | None:
    """Name and content of the newest version, None before the first."""
    names = [name for name in directory.names("versions") if re.fullmatch(r"\d{6}\.json", name)]
    if not names:
        return None
    return names[-1].removesuffix(".json"), directory.read_json(f"versions/{names[-1]}")


def write_version(directory: Directory, content: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Append a version unless the newest one already says the same; first writer of a number wins."""
    return update_version(directory, lambda newest: content)


def update_version(
    directory: Directory, change: Callable[[tuple[str, dict[str, Any]] | None], dict[str, Any]]
) -> tuple[str, dict[str, Any]]:
    """Append what `change` makes of the newest version (None before the first); its name and content.

    When another process appends a version meanwhile, `change` is asked again with that one. Nothing is written when the
    newest version already says the same.
    """
    while True:
        newest = latest_version(directory)
        content = change(newest)
        if newest is not None and all(newest[1].get(key) == value for key, value in content.items()):
            return newest
        number = int(newest[0]) + 1 if newest else 1
        version = {"version": number, **content}
        if directory.create(f"versions/{number:06d}.json", (json.dumps(version, indent=1) + "\n").encode()):
            return f"{number:06d}", version
