"""What a run records, typed: the commit of a shard, its data files and counts, and the version that lists commits.

The files are JSON objects with fixed keys, read strictly: a key that is missing or not known is refused with the name of
the file. `to_json` gives back what was read, with the keys in the order in which they are written.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from clipfilter import text
from clipfilter.decisions import DECISIONS
from clipfilter.errors import RefusedError
from clipfilter.sources import Seen, Shard

#: What a data file of a shard holds, which is also the folder it lies in.
FileKind = Literal["embeddings", "failed", "scored", "annotated", "kept", "review"]
FILE_KINDS: tuple[FileKind, ...] = ("annotated", "failed", "embeddings", "kept", "review", "scored")

Thresholds = dict[str, float | None]


def check_keys(value: Any, where: str, required: Collection[str], optional: Collection[str] = ()) -> dict[str, Any]:
    """The JSON object, if it has these keys and no others. Raises RefusedError that names the file and the key."""
    cure = "it was edited, or written by another version of clipfilter: restore the file, or use that version."
    if not isinstance(value, dict):
        raise RefusedError(f"{where} does not hold a JSON object; {cure}")
    for key in required:
        if key not in value:
            raise RefusedError(f"{where} lacks the key {key!r}; {cure}")
    for key in value:
        if key not in required and key not in optional:
            raise RefusedError(f"{where} has the key {key!r}, which this version does not know; {cure}")
    return value


class _Number:
    """A number in a JSON object as an attribute: 0 where the object lacks it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, counts: dict[str, Any], owner: type) -> int:
        return int(counts.get(self._name, 0))


class _Rows(dict[str, Any]):
    """Numbers of rows by what became of them, which a shard and a version both have."""

    rows = _Number()
    failed = _Number()
    embedded = _Number()
    decided = _Number()
    keep = _Number()
    review = _Number()
    reject = _Number()
    escalated = _Number()
    profiles_ignored = _Number()
    not_downloaded = _Number()
    duplicate_keys = _Number()


class Counts(_Rows):
    """Rows of a shard by what became of them, in the order in which they were counted; an absent count is 0.

    rows = embedded + failed, and where decided: decided = keep + review + reject; escalated ones are among the rejected.
    profiles_ignored: of the embedded, those whose colour profile could not be used.
    The last four are of the source: rows without an image, repeated keys, members passed over, rows with leftovers.
    """

    clashes = _Number()
    misfits = _Number()

    def of_source(self) -> dict[str, int]:
        """What reading the source counted, which every later stage repeats."""
        found = {name: self.get(name, 0) for name in ("not_downloaded", "duplicate_keys", "clashes", "misfits")}
        return found | ({"profiles_ignored": self.profiles_ignored} if self.profiles_ignored else {})


_COUNTS = {name for kind in (_Rows, Counts) for name, value in vars(kind).items() if isinstance(value, _Number)}


@dataclass(frozen=True, slots=True)
class DataFile:
    """A published file (or folder) of a run: its name below the run, its rows, its size, the hash of its content."""

    name: str
    rows: int
    bytes: int
    sha256: str

    @staticmethod
    def from_json(value: Any, where: str) -> DataFile:
        return DataFile(**check_keys(value, where, ("name", "rows", "bytes", "sha256")))


class _File:
    """A data file as an attribute, None where there is none."""

    def __set_name__(self, owner: type, name: FileKind) -> None:
        self._kind = name

    def __get__(self, files: dict[FileKind, DataFile], owner: type) -> DataFile | None:
        return files.get(self._kind)


class Files(dict[FileKind, DataFile]):
    """The data files of a shard by what they hold, in the order in which they were written.

    annotated: the rows that did not fail, with their decision (if any); scored: the same before dataset-level rules
    decide. embeddings: vectors and facts of these rows, in the same order. failed: the other rows, with class and message.
    kept, review: the source's own bytes of the rows that were decided so.
    """

    annotated = _File()
    scored = _File()
    embeddings = _File()
    failed = _File()
    kept = _File()
    review = _File()

    def only(self, *kinds: FileKind) -> Files:
        """Those of these kinds."""
        return Files({kind: file for kind, file in self.items() if kind in kinds})


@dataclass(frozen=True)
class Base:
    """The commit that embedded the rows which another run decided: URL of its run, its name there."""

    run: str
    commit: str


@dataclass(frozen=True)
class Work:
    """When and where a commit was made; recorded, never compared. Times are Unix seconds.

    of_worker: what only a worker says (seconds by step, attempt, isolated, batch_halvings, encoder_waited, backend);
    None for shards that are written without one (import, curate, forget).
    """

    started: float
    finished: float
    machine: dict[str, Any]
    of_worker: WorkerDetails | None = None

    @staticmethod
    def since(started: float, of_worker: WorkerDetails | None = None) -> Work:
        """Work on this machine that has just finished."""
        machine = {"host": socket.gethostname(), "cpu": platform.machine(), "cores": len(os.sched_getaffinity(0))}
        return Work(round(started, 3), round(time.time(), 3), machine, of_worker)

    def to_json(self) -> dict[str, Any]:
        times = {"started": self.started, "finished": self.finished}
        more = self.of_worker
        if more is None:
            return {**times, "machine": self.machine}
        details = {name: value for name, value in vars(more).items() if name not in ("seconds", "backend")}
        return {"seconds": more.seconds, **times, **details, "machine": self.machine, "backend": more.backend}

    @staticmethod
    def from_json(value: Any, where: str) -> Work:
        own = ("started", "finished", "machine")
        if not isinstance(value, dict) or "seconds" not in value:
            return Work(**check_keys(value, where, own))
        details = ("seconds", "attempt", "isolated", "batch_halvings", "encoder_waited", "backend")
        check_keys(value, where, (*own, *details))
        of_worker = WorkerDetails(**{name: value[name] for name in details})
        return Work(value["started"], value["finished"], value["machine"], of_worker)


@dataclass(frozen=True)
class WorkerDetails:
    """How a worker made a commit: seconds by step, which attempt it was, whether images were decoded in another process,
    how often the batch was halved, seconds in which the encoder had no batch, and the encoder's backend."""

    seconds: dict[str, float]
    attempt: int
    isolated: bool
    batch_halvings: int
    encoder_waited: float
    backend: Any


@dataclass(frozen=True)
class Account:
    """What became of the rows of a shard; each is counted as embedded (and decided), or as failed.

    rules: rows per band of each rule. damaged, bytes_unread: of a tar that breaks off. seen: what became of everything in
    the shard, of which `counts` has the rows; None in runs of earlier versions.
    """

    counts: Counts
    failed_by_class: dict[str, int]
    rules: dict[str, dict[str, int]] = field(default_factory=dict)
    captions_truncated: int = 0
    damaged: bool = False
    bytes_unread: int = 0
    seen: Seen | None = None


@dataclass(frozen=True, kw_only=True)
class Commit(Account):
    """One shard at one stage: all that is true of it, and the files that hold it.

    stage: scored, decided or embedded. generation: 1, more when the shard was processed again. plan: sha256 of the
    run's plan. base_generation: that of the commit whose rows were decided. thresholds: the dataset's own ones that
    decided. base: see `Base`.
    """

    shard: Shard
    stage: str
    generation: int
    plan: str
    files: Files
    work: Work
    base_generation: int | None = None
    thresholds: Thresholds | None = None
    base: Base | None = None

    @property
    def name(self) -> str:
        """The commit's file, below the run."""
        return f"commits/{self.shard.id}.{self.stage}.{self.generation:03d}.json"

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {name: getattr(self, name) for name in _COMMIT_KEYS}
        value["shard"] = self.shard.to_json()
        value["files"] = {kind: asdict(file) for kind, file in self.files.items()}
        for name in _COMMIT_OPTIONS:
            if getattr(self, name) is not None:
                value[name] = getattr(self, name)
        if self.base is not None:
            value["base"] = asdict(self.base)
        if self.seen is not None:
            value["seen"] = self.seen.to_json()
        return {**value, "work": self.work.to_json()}

    @staticmethod
    def from_json(value: Any, where: str) -> Commit:
        """Raises RefusedError for keys that a commit has not; `where` names its file."""
        found = check_keys(value, where, (*_COMMIT_KEYS, "work"), _COMMIT_OPTIONS)
        files = check_keys(found["files"], f"{where} (files)", (), FILE_KINDS)
        base = found.get("base")
        return Commit(
            **found
            | {
                "shard": _shard(found["shard"], where),
                "counts": Counts(check_keys(found["counts"], f"{where} (counts)", (), _COUNTS)),
                "files": Files({kind: DataFile.from_json(files[kind], f"{where} ({kind})") for kind in files}),
                "base": None if base is None else Base(**check_keys(base, f"{where} (base)", ("run", "commit"))),
                "work": Work.from_json(found["work"], f"{where} (work)"),
                "seen": _seen(found.get("seen"), f"{where} (seen)"),
            }
        )


_COMMIT_KEYS = (
    "shard", "stage", "generation", "plan", "counts", "failed_by_class", "rules", "captions_truncated", "damaged",
    "bytes_unread", "files",
)  # fmt: skip
_COMMIT_OPTIONS = ("base_generation", "thresholds", "base", "seen")
_SHARD_KEYS = tuple(Shard("", "", "tar").to_json())


def _seen(value: Any, where: str) -> Seen | None:
    if value is None:
        return None
    named = ("examples", "captions", "not_read")
    return Seen.from_json(check_keys(value, where, ("rows", "parts", "containers", "passed"), named))


def _shard(value: Any, where: str) -> Shard:
    return Shard.from_json(check_keys(value, f"{where} (shard)", _SHARD_KEYS))


@dataclass(frozen=True)
class FailedShard:
    """A shard that could not be processed, why, and how often it was tried."""

    shard: Shard
    error: str
    attempts: int

    @staticmethod
    def from_json(value: Any, where: str) -> FailedShard:
        found = check_keys(value, f"{where} (failed_shards)", ("shard", "error", "attempts"))
        return FailedShard(_shard(found["shard"], where), found["error"], found["attempts"])


#: The counts that a version adds up.
COUNTS = ("rows", "decided", *DECISIONS, "failed", "embedded", "not_downloaded", "duplicate_keys")


#: Counts of embedded rows that most datasets have none of, and that stand in the totals only where they are not 0.
_RARE = ("escalated", "profiles_ignored")


class Totals(_Rows):
    """The sums over the commits of a version, as JSON and as attributes; all derived, so `verify` can repeat it."""

    shards = _Number()
    failed_shards = _Number()
    damaged_shards = _Number()
    bytes_unread = _Number()
    captions_truncated = _Number()

    @property
    def failed_by_class(self) -> dict[str, int]:
        """Failed rows by class of error, sorted by name."""
        return dict(self["failed_by_class"])

    @property
    def rules(self) -> dict[str, dict[str, int]]:
        """Rows per band of each rule."""
        return dict(self["rules"])

    @property
    def seen(self) -> Seen | None:
        """The account of everything in the source; None for runs of earlier versions."""
        return _seen(self.get("seen"), "totals")

    @property
    def without_rows(self) -> str:
        """The sentence for a run that has no row: what its source holds instead."""
        seen = self.seen or Seen()
        instead = f": {seen.passed_in_words()}" if seen.passed.total() else ""
        holds = f"{text.plural(seen.containers, 'container')} and {text.plural(seen.things - seen.containers, 'other thing')}"
        return f"The source has no row, so nothing was judged; it holds {holds}{instead}."

    @staticmethod
    def of(commits: Iterable[Commit], failed_shards: Sequence[FailedShard], listing: Seen | None = None) -> Totals:
        """Add up commits, which are gone through once. listing: what the source's listing passed over (see `Version`)."""
        totals = Totals(dict.fromkeys(COUNTS, 0))
        classes: Counter[str] = Counter()
        rules: dict[str, Counter[str]] = {}
        sums: Counter[str] = Counter(dict.fromkeys(_SUMS, 0))
        seen, told = Seen(), listing is not None
        for commit in commits:
            for name in COUNTS:
                totals[name] += commit.counts.get(name, 0)
            classes.update(commit.failed_by_class)
            for rule, bands in commit.rules.items():
                rules.setdefault(rule, Counter()).update(bands)
            if commit.seen is not None:
                seen.add(commit.seen)
                told = True
            sums.update(
                escalated=commit.counts.escalated,
                profiles_ignored=commit.counts.profiles_ignored,
                shards=1,
                damaged_shards=commit.damaged,
                bytes_unread=commit.bytes_unread,
                captions_truncated=commit.captions_truncated,
            )
        for name in _RARE:
            if count := sums.pop(name, 0):
                totals[name] = count
        totals["failed_by_class"] = dict(sorted(classes.items()))
        totals["rules"] = {rule: dict(sorted(bands.items())) for rule, bands in rules.items()}
        totals |= {**sums, "failed_shards": len(failed_shards)}
        if told:
            seen.add(listing or Seen())
            seen.pass_over_unread_tables()
            for failed in failed_shards:
                seen.pass_over("unread", failed.shard.path, failed.shard.known_rows)
            totals["seen"] = seen.to_json()
        return totals


_SUMS = ("shards", "failed_shards", "damaged_shards", "bytes_unread", "captions_truncated")
_TOTALS = (*COUNTS, "failed_by_class", "rules", *_SUMS)


@dataclass(frozen=True)
class Version:
    """A state of the dataset: the commits that make it up, by name, and what they add up to.

    number: from 1; 0 before it is written. stage: of its commits. thresholds: fixed numbers of dataset-level rules.
    listing: what became of the files of the source that are in no shard; None where they were not listed to the end.
    rolled_back_to, set_aside: after a rollback, the version it went back to, and the commits that later nights leave out.
    """

    plan: str
    stage: str
    commits: list[str]
    failed_shards: list[FailedShard]
    thresholds: Thresholds
    totals: Totals
    listing: Seen | None = None
    rolled_back_to: int | None = None
    set_aside: list[str] | None = None
    number: int = 0
    order: tuple[str, ...] = field(default=(), compare=False, repr=False)  # of the keys in the file, where it was read

    @staticmethod
    def of(
        plan: str,
        stage: str,
        commits: Iterable[Commit],
        failed_shards: list[FailedShard],
        thresholds: Thresholds | None = None,
        listing: Seen | None = None,
    ) -> Version:
        """The version that these commits make; they are gone through once."""
        names: list[str] = []

        def named() -> Iterable[Commit]:
            for commit in commits:
                names.append(commit.name)
                yield commit

        totals = Totals.of(named(), failed_shards, listing)
        return Version(plan, stage, names, failed_shards, thresholds or {}, totals, listing)

    @property
    def name(self) -> str:
        """The number as files and people write it: "000001"."""
        return f"{self.number:06d}"

    def to_json(self) -> dict[str, Any]:
        value: dict[str, Any] = {"version": self.number}
        value |= {name: getattr(self, name) for name in _VERSION_KEYS}
        value |= {name: getattr(self, name) for name in _VERSION_OPTIONS if getattr(self, name) is not None}
        value["failed_shards"] = [asdict(shard) for shard in self.failed_shards]
        if self.listing is not None:
            value["listing"] = self.listing.to_json()
        names = [*(name for name in self.order if name in value), *value]
        return {name: value[name] for name in dict.fromkeys(names)}

    @staticmethod
    def from_json(value: Any, where: str) -> Version:
        """Raises RefusedError for keys that a version has not; `where` names its file."""
        found = check_keys(value, where, ("version", *_VERSION_KEYS), _VERSION_OPTIONS)
        totals = check_keys(found["totals"], f"{where} (totals)", _TOTALS, (*_RARE, "seen"))
        return Version(
            **{name: item for name, item in found.items() if name != "version"}
            | {
                "failed_shards": [FailedShard.from_json(item, where) for item in found["failed_shards"]],
                "totals": Totals(totals),
                "listing": _seen(found.get("listing"), f"{where} (listing)"),
                "number": found["version"],
                "order": tuple(found),
            }
        )


_VERSION_KEYS = ("plan", "stage", "commits", "failed_shards", "thresholds", "totals")
_VERSION_OPTIONS = ("listing", "rolled_back_to", "set_aside")
