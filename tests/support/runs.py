"""Commits and versions for tests that build a run by hand, with every key that a job would write."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from clipfilter.runs import Commit, Counts, DataFile, Files, Version, Work
from clipfilter.sources import Shard

MACHINE = {"host": "test", "cpu": "none", "cores": 1}


def commit_of(shard: str | Shard, stage: str = "embedded", **more: Any) -> Commit:
    """A commit of a shard (or of a tar with this id) without rows, but for what `more` says of it.

    counts is a dictionary, files one of `DataFile`s (or of their fields) by kind.
    """
    if isinstance(shard, str):
        shard = Shard(shard, f"{shard}.tar", "tar")
    files = {kind: DataFile(**item) if isinstance(item, dict) else item for kind, item in more.pop("files", {}).items()}
    empty = {
        "generation": 1, "plan": "p", "failed_by_class": {}, "rules": {}, "captions_truncated": 0, "damaged": False,
        "bytes_unread": 0,
    }  # fmt: skip
    counts = Counts(more.pop("counts", {}))
    return Commit(
        **{"shard": shard, "stage": stage, "counts": counts, "files": Files(files), "work": Work(0.0, 0.0, MACHINE)}
        | empty
        | more
    )


def version_of(commits: list[Commit], **more: Any) -> Version:
    """The version that these commits make, but for what `more` says."""
    made = Version.of("p", commits[0].stage if commits else "embedded", commits, [])
    return Version(**{item.name: getattr(made, item.name) for item in fields(Version)} | more)
