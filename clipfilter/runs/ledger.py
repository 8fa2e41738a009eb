"""The ledger: create-only commits (one per shard and stage) and versions; all that readers trust.

A commit is the last file written for a shard, so its presence means that everything it names is whole. A shard that is
processed again (its file changed, or a retry was asked for) gets the next generation; the newest generation counts.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from clipfilter.runs.records import Commit, Version
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


def write_commit(directory: Directory, commit: Commit) -> tuple[Commit, bool]:
    """Create the commit; when another attempt was first, the existing one is returned instead (and False)."""
    text = json.dumps(commit.to_json(), indent=1, ensure_ascii=False) + "\n"
    # A lone surrogate stands for a byte of a file name that is no UTF-8; its backslash form is its JSON form.
    if directory.create(commit.name, text.encode("utf-8", "backslashreplace")):
        return commit, True
    return read_commit(directory, commit.name), False


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


def shard_of(commit: str) -> str:
    """The id of the shard of a commit, from its name."""
    return commit.rsplit("/", 1)[-1].split(".", 1)[0]


def read_commit(directory: Directory, name: str) -> Commit:
    """One commit by its name below the directory. Raises FileNotFoundError, RefusedError as `Commit.from_json`."""
    return Commit.from_json(directory.read_json(name), f"{directory.url}/{name}")


def commits(directory: Directory, names: Iterable[str] | None = None) -> Iterator[Commit]:
    """Commits by name in the order given (None: every commit of any stage and generation), a bounded number in memory.

    They are fetched together from object stores. Raises FileNotFoundError, RefusedError as `Commit.from_json`.
    """
    wanted = iter([f"commits/{name}" for name in directory.names("commits")] if names is None else names)
    while part := list(itertools.islice(wanted, _COMMITS_AT_ONCE)):
        if directory.local or len(part) == 1:
            found = {name: directory.read_bytes(name) for name in part}
        else:
            contents = directory.fs.cat([directory.path(name) for name in part])
            found = {name: contents[directory.path(name)] for name in part}
        yield from (Commit.from_json(json.loads(found[name]), f"{directory.url}/{name}") for name in part)


def version_names(directory: Directory) -> list[str]:
    """The names of all versions, "000001" and on, oldest first."""
    return [name[:6] for name in directory.names("versions") if re.fullmatch(r"\d{6}\.json", name)]


def read_version(directory: Directory, name: str) -> Version:
    """A version by its name ("000001"). Raises FileNotFoundError, RefusedError as `Version.from_json`."""
    file = f"versions/{name}.json"
    return Version.from_json(directory.read_json(file), f"{directory.url}/{file}")


def newest_version(directory: Directory) -> Version | None:
    """The newest version, None before the first."""
    names = version_names(directory)
    return read_version(directory, names[-1]) if names else None


def write_version(directory: Directory, version: Version) -> Version:
    """Append a version unless the newest one already says the same; first writer of a number wins."""
    return update_version(directory, lambda newest: version)


def update_version(directory: Directory, change: Callable[[Version | None], Version]) -> Version:
    """Append what `change` makes of the newest version (None before the first), with the next number.

    When another process appends a version meanwhile, `change` is asked again with that one. Nothing is written when the
    newest version already says the same.
    """
    while True:
        newest = newest_version(directory)
        wanted = replace(change(newest), number=newest.number + 1 if newest else 1)
        content = wanted.to_json()
        if newest is not None:
            same = newest.to_json()
            if all(same.get(key) == value for key, value in content.items() if key != "version"):
                return newest
        if directory.create(f"versions/{wanted.name}.json", (json.dumps(content, indent=1) + "\n").encode()):
            return wanted
