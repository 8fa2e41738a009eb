"""What is new in a source since the newest version of its dataset, and the version that its processing leads to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from clipfilter.engine import StageResult, Unit, fix_thresholds, run_units
from clipfilter.errors import TRANSIENT, ClipfilterError, RefusedError
from clipfilter.policies import Policy
from clipfilter.runs import Commit, FailedShard, Thresholds, Totals, Version, ledger
from clipfilter.sources import Shard, Source
from clipfilter.storage import Directory

Missing = Literal["keep", "drop"]


State = tuple[str, int, str]


def state_of(shard: Shard) -> State:
    """(id, size, etag): the shard in one state of its file."""
    return shard.id, shard.size, shard.etag


@dataclass(frozen=True)
class Held:
    """A shard of the newest version. again: it is damaged or has failures that may pass."""

    commit: str
    path: str
    size: int
    etag: str
    again: bool


@dataclass
class Base:
    """The newest version (None before the first night), and its shards by id.

    set_aside: file states that a rollback took out; they do not come back by themselves.
    """

    version: Version | None = None
    shards: dict[str, Held] = field(default_factory=dict)
    set_aside: set[State] = field(default_factory=set)

    @classmethod
    def read(cls, directory: Directory) -> Base:
        newest = ledger.newest_version(directory)
        if newest is None:
            return cls()
        base = cls(newest)
        for commit in ledger.commits(directory, newest.commits):
            shard = commit.shard
            again = bool(commit.damaged or TRANSIENT & set(commit.failed_by_class))
            base.shards[shard.id] = Held(commit.name, shard.path, shard.size, shard.etag, again)
        base.set_aside = {state_of(commit.shard) for commit in ledger.commits(directory, newest.set_aside or [])}
        return base


@dataclass
class Arrivals:
    """How a listing of the source differs from the newest version.

    units: shards to process. vanished: ids of shards of the version whose file is gone. replaced: ids of shards of a
    changed file that its new listing does not have. changed_paths: files of the version to process again. known_paths:
    all that the listing has. retried: ids of shards in the very state that the version has, to be tried once more.
    """

    units: list[Unit] = field(default_factory=list)
    listed: int = 0
    new: int = 0
    changed: int = 0
    set_aside: int = 0
    vanished: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    changed_paths: set[str] = field(default_factory=set)
    known_paths: set[str] = field(default_factory=set)
    retried: set[str] = field(default_factory=set)

    @property
    def again(self) -> int:
        return len(self.retried)

    @property
    def fresh(self) -> int:
        """Shards that hold something the dataset did not have."""
        return self.new + self.changed


def find_arrivals(base: Base, listing: Iterable[Shard], *, retry_failed: bool) -> Arrivals:
    """Compare a listing with the newest version. Memory grows with the number of shards only."""
    found = Arrivals()
    held_paths = {held.path for held in base.shards.values()}
    ids: set[str] = set()
    passed_over: set[str] = set()
    for shard in listing:
        found.listed += 1
        ids.add(shard.id)
        found.known_paths.add(shard.path)
        held = base.shards.get(shard.id)
        same = held is not None and (held.size, held.etag) == (shard.size, shard.etag)
        if same and not (retry_failed and held is not None and held.again):
            continue
        if not same and state_of(shard) in base.set_aside:
            found.set_aside += 1
            passed_over.add(shard.path)
            continue
        found.units.append(Unit(shard))
        if same:
            found.retried.add(shard.id)
        elif shard.path in held_paths:
            found.changed += 1
        else:
            found.new += 1
        if shard.path in held_paths:
            found.changed_paths.add(shard.path)
    for identity, held in base.shards.items():
        if identity in ids or held.path in passed_over:
            continue
        (found.replaced if held.path in found.changed_paths else found.vanished).append(identity)
    return found


@dataclass
class Appending:
    """The engine's `Growth` for one night: process the arrivals, keep the rest of the version as it is.

    added: commits of what is new or changed and in the version; not of second tries.
    """

    directory: Directory
    base: Base
    arrivals: Arrivals
    missing: Missing
    refit: bool
    added: list[str] = field(default_factory=list)
    failed: list[FailedShard] = field(default_factory=list)

    def units(self, source: Source) -> Iterator[Unit]:
        """The shards that differ from the newest version."""
        return iter(self.arrivals.units)

    def scored(self, policy: Policy, scored: StageResult) -> tuple[Thresholds, Iterator[Unit]]:
        """Frozen numbers of dataset-level rules, or with `refit` new ones from all rows, to decide all rows again."""
        tonight = run_units(self.directory.url, scored.commits)
        if self.base.version is None:
            return fix_thresholds(self.directory, policy, scored.commits), tonight
        if not self.refit:
            return dict(self.base.version.thresholds), tonight
        done = {commit.shard.id for commit in scored.commits}
        dropped = set(self.arrivals.replaced) | (set(self.arrivals.vanished) if self.missing == "drop" else set())
        others = [
            self._scored_commit(held.commit)
            for identity, held in self.base.shards.items()
            if identity not in done and identity not in dropped
        ]
        numbers = [int(name[:6]) for name in self.directory.names("thresholds") if name[:6].isdigit()]
        commits = _Commits(self.directory, [*others, *(commit.name for commit in scored.commits)])
        thresholds = fix_thresholds(self.directory, policy, commits, max(numbers, default=0) + 1)
        return thresholds, run_units(self.directory.url, commits)

    def _scored_commit(self, decided: str) -> str:
        """The commit of the scored stage that a decision was made from."""
        generation = ledger.read_commit(self.directory, decided).base_generation
        assert generation is not None
        name = ledger.CommitName(ledger.shard_of(decided), "scored", generation).path
        if not self.directory.exists(name):
            raise ClipfilterError(f"a refit needs the scores of all rows, but {name} is gone; refit with a new --out.")
        return name

    def version(self, made: Version) -> Version:
        """Append the version: tonight's commits in the newest one's list. What another run changed meanwhile stands."""
        self.failed = made.failed_shards
        stale = [item.shard.path for item in self.failed if self.refit and item.shard.id in self.base.shards]
        if stale:
            raise ClipfilterError(
                f"{stale[0]} could not be decided with the new thresholds; the dataset stays as it was."
            )
        spoilt = {item.shard.path for item in self.failed} & self.arrivals.changed_paths
        paths = {unit.shard.id: unit.shard.path for unit in self.arrivals.units}
        names = {ledger.shard_of(name): name for name in made.commits}
        # A changed file that could not be read as a whole keeps its old rows: half a file would be neither.
        added = {identity: name for identity, name in names.items() if paths.get(identity) not in spoilt}
        gone = {identity for identity in self.arrivals.replaced if self.base.shards[identity].path not in spoilt}
        if self.missing == "drop":
            gone |= set(self.arrivals.vanished)
        return ledger.update_version(self.directory, lambda newest: self._merged(made, added, gone, newest))

    def _merged(self, made: Version, added: dict[str, str], gone: set[str], newest: Version | None) -> Version:
        before = {ledger.shard_of(name): name for name in self.base.version.commits} if self.base.version else {}
        now = {ledger.shard_of(name): name for name in newest.commits} if newest else {}
        theirs = [name for identity, name in now.items() if before.get(identity) != name]
        touched = {identity for identity in now if before.get(identity) != now[identity]} | (set(before) - set(now))
        if touched and newest is not None and newest.thresholds != made.thresholds:
            raise ClipfilterError(
                "another run changed the dataset and its thresholds meanwhile; run again, what is committed is not redone."
            )
        taken = {commit.shard.path for commit in ledger.commits(self.directory, theirs)}
        paths = {unit.shard.id: unit.shard.path for unit in self.arrivals.units}
        for identity in gone:
            if identity not in touched and self.base.shards[identity].path not in taken:
                now.pop(identity, None)
        self.added = []
        for identity, name in added.items():
            if identity in touched or paths.get(identity) in taken:
                continue
            now[identity] = name
            if identity in paths and identity not in self.arrivals.retried:
                self.added.append(name)
        failed = {
            item.shard.id: item
            for item in (newest.failed_shards if newest else [])
            if item.shard.id not in now and item.shard.path in self.arrivals.known_paths
        }
        failed |= {item.shard.id: item for item in self.failed}
        commits, failures = list(now.values()), list(failed.values())
        totals = Totals.of(ledger.commits(self.directory, commits), failures, made.listing)
        aside = [name for name in (newest and newest.set_aside) or [] if name not in set(commits)]
        return replace(made, commits=commits, failed_shards=failures, totals=totals, set_aside=aside or None)


@dataclass(frozen=True)
class _Commits:
    """Commits by name, read anew each time they are gone through, so that they never lie in memory together."""

    directory: Directory
    names: list[str]

    def __iter__(self) -> Iterator[Commit]:
        return ledger.commits(self.directory, self.names)


def refuse_refit(base: Base, arrivals: Arrivals, policy: Policy | None, *, copies: bool, missing: Missing) -> None:
    """Raise RefusedError where new thresholds cannot be applied to all rows."""
    if policy is None or not policy.dataset_thresholds:
        raise RefusedError("there is nothing to refit: the policy has no rule over the whole dataset (fraction).")
    if base.version is not None and arrivals.vanished and copies and missing == "keep":
        raise RefusedError(
            f"a refit decides all rows again, but the images of {len(arrivals.vanished)} shard(s) are gone from the source and "
            "cannot be copied; use --missing drop, or --no-copy from the first night on."
        )
