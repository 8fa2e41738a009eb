"""The receipt of `forget`: what was removed and searched, with hashes before and after, in a form that names no row.

    RUN/receipts/000001.json   create-only, one per time that rows were forgotten

Uids are in it as sha256 of a salt and the uid: whoever has a uid can ask whether it is meant, nobody can read it out. The
last key is the sha256 of all others. It shows that a receipt was changed by accident or by someone careless; who must be
sure of more keeps the hash that the command prints, or signs the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.operations.traces import Kind, Search, Traces
from clipfilter.runs import FILE_KINDS, PLAN_FILE, Run, check_keys, ledger, read_table
from clipfilter.storage import Directory
from clipfilter.version import __version__

RECEIPTS = "receipts"
FORMAT = 1
_PENDING = ".forgetting.json"
#: What never changes once it is there; the rest (a report, a log) may be made anew.
_SETTLED = (*FILE_KINDS, "commits", "versions", "thresholds", "policy", PLAN_FILE)


@dataclass
class Pending:
    """What an unfinished `forget` has to remember: it is in a hidden file of the run until the receipt is written."""

    traces: Traces = field(default_factory=Traces)
    thumbnails: set[str] = field(default_factory=set)
    removed: dict[str, str] = field(default_factory=dict)


def read_pending(directory: Directory) -> Pending:
    """What an interrupted call left, empty where there was none."""
    if not directory.exists(_PENDING):
        return Pending()
    value = directory.read_json(_PENDING)
    return Pending(Traces.from_json(value["traces"]), set(value["thumbnails"]), value["removed"])


def write_pending(directory: Directory, pending: Pending | None) -> None:
    """Remember (None: that nothing is pending)."""
    if pending is None:
        directory.fs.rm(directory.path(_PENDING))
        return
    value = {"traces": pending.traces.to_json(), "thumbnails": sorted(pending.thumbnails), "removed": pending.removed}
    directory.replace(_PENDING, json.dumps(value).encode())


@dataclass(frozen=True)
class Place:
    """One file that was searched: where it is (`url`), its name below what was searched, and what was found."""

    url: str
    name: str
    sha256: str
    bytes: int
    found: frozenset[Kind]
    problem: str | None


def places_with(directory: Directory, search: Search) -> Iterator[Place]:
    """Search every file below a directory (or the one file that it is), hidden and unfinished ones too."""
    for name in sorted(_all_files(directory)):
        if name == _PENDING:
            continue
        url = f"{directory.url}/{name}" if name else directory.url
        with directory.fs.open(directory.path(name).rstrip("/"), "rb") as handle:
            searched = search.file(handle)
        found = frozenset(searched.found | search.name(name))
        yield Place(url, name, searched.sha256, searched.size, found, searched.problem)


def _all_files(directory: Directory) -> list[str]:
    if directory.fs.isfile(directory.root):
        return [""]
    if not directory.local:
        return [name.strip("/") for name in directory.walk("")]
    places = ((Path(folder), name) for folder, _, names in os.walk(directory.root) for name in names)
    files = (folder / name for folder, name in places)
    return [path.relative_to(directory.root).as_posix() for path in files if path.is_file()]


def sha256_of(directory: Directory, name: str) -> str:
    """Of a file its sha256; of a folder the sha256 over the names and hashes of its files."""
    if directory.fs.isdir(directory.path(name)):
        folder = Directory(f"{directory.url}/{name}")
        return _of_folder((file, sha256_of(folder, file)) for file in _all_files(folder))
    with directory.open(name) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _of_folder(files: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"{name}\0{digest}\n" for name, digest in sorted(files))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _settled(places: list[Place]) -> dict[str, str]:
    """What never changes of these files, with its sha256; a folder of pictures is one thing, whose names are not told."""
    inside: dict[str, list[tuple[str, str]]] = {}
    for place in places:
        if _is_settled(place.name):
            parts = place.name.split("/")
            inside.setdefault("/".join(parts[:2]), []).append(("/".join(parts[2:]), place.sha256))
    return {name: files[0][1] if files[0][0] == "" else _of_folder(files) for name, files in inside.items()}


@dataclass(frozen=True)
class Receipt:
    """What was forgotten in a run. Files are named below the run, by a
    salted sha256 where the name itself says something of a row.

    rows: salted sha256 of each uid. looked_for: how many texts of each kind, and pictures, were searched for; of them
    shared: with rows that stay, which keep them; too_short: to be told from chance. removed: what is gone, with the sha256
    it had. files: what never changes of what is there now, with its sha256. left: where something was found all the same.
    """

    run: str
    version: str
    time: str
    salt: str
    rows: list[str]
    looked_for: dict[str, int]
    searched: dict[str, int]
    removed: dict[str, str]
    files: dict[str, str]
    left: list[dict[str, Any]]
    format: int = FORMAT
    created_by: str = f"clipfilter {__version__}"

    @staticmethod
    def of(
        run: Run,
        version: str,
        pending: Pending,
        places: list[Place],
        elsewhere: list[Place],
        search: Search,
        shared: int,
    ) -> Receipt:
        """places: all files of the run; elsewhere: others that were searched, of which only what was found is named."""
        salt = secrets.token_hex(16)

        def named(name: str) -> str:
            return _salted(salt, name) if search.name(name) else name

        traces = pending.traces
        searched = places + elsewhere
        return Receipt(
            run=run.url,
            version=version,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            salt=salt,
            rows=sorted(_salted(salt, uid) for uid in traces.words["uid"]),
            looked_for={
                **{str(kind): len(texts) for kind, texts in traces.words.items()},
                "picture": len(traces.pictures),
                "thumbnail": len(pending.thumbnails),
                "shared": shared,
                "too_short": traces.too_short(),
            },
            searched={"files": len(searched), "bytes": sum(place.bytes for place in searched)},
            removed={named(name): digest for name, digest in sorted(pending.removed.items())},
            files={named(name): digest for name, digest in _settled(places).items()},
            left=[
                {"url": named(place.url), "found": sorted(place.found), "unreadable": place.problem is not None}
                for place in searched
                if place.found or place.problem
            ],
        )

    def to_bytes(self) -> bytes:
        return (json.dumps({**asdict(self), "sha256": _digest(asdict(self))}, indent=1) + "\n").encode()

    def keep(self, directory: Directory) -> str:
        """Write it into the run; where."""
        number = len(directory.names(RECEIPTS)) + 1
        while not directory.create(f"{RECEIPTS}/{number:06d}.json", self.to_bytes()):
            number += 1
        return f"{directory.url}/{RECEIPTS}/{number:06d}.json"


def check_receipt(run: Run, value: Any, where: str) -> list[str]:
    """What does not hold of a receipt (JSON) in the run it is about, each a sentence; empty where all does.

    It is whole; what it says was removed has not come back; what it says is there is there unchanged, or was removed by a
    later receipt; and no row of the run has a uid that it names. Raises RefusedError for what is no receipt.
    """
    known = [*asdict(_EMPTY), "sha256"]
    found = check_keys(value, where, known)
    if found["format"] != FORMAT or found["sha256"] != _digest({name: found[name] for name in known[:-1]}):
        return [f"{where} was changed: it does not match its own hash"]
    directory = run.directory
    problems = [f"{where} says that something was left in {len(found['left'])} places"] if found["left"] else []
    later = set[str]()
    for name in directory.names(RECEIPTS):
        other = directory.read_json(f"{RECEIPTS}/{name}")
        if other["time"] >= found["time"] and other["sha256"] != found["sha256"]:
            later |= set(other["removed"])
    for name, digest in found["removed"].items():
        if _is_settled(name) and directory.exists(name) and sha256_of(directory, name) == digest:
            problems.append(f"{name} is back, which was removed")
    for name, digest in found["files"].items():
        if not directory.exists(name):
            if name not in later:
                problems.append(f"{name} is gone since rows were forgotten")
        elif sha256_of(directory, name) != digest:
            problems.append(f"{name} is not what it was after rows were forgotten")
    problems += _returned(directory, found["salt"], set(found["rows"]))
    return problems


def _returned(directory: Directory, salt: str, rows: set[str]) -> Iterator[str]:
    for commit in ledger.commits(directory):
        for kind, file in commit.files.items():
            if kind in ("annotated", "scored", "failed") and directory.exists(file.name):
                table = read_table(directory, file, lambda name: name == cf.UID)
                uids = table[cf.UID].to_pylist() if table.num_columns else []
                count = sum(_salted(salt, uid) in rows for uid in uids if uid)
                if count:
                    yield f"{file.name} holds {count} rows that were forgotten"


def read_receipt(path: str) -> Any:
    """The JSON in a receipt file. Raises RefusedError where it cannot be read."""
    try:
        return json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise RefusedError(f"{path} cannot be read as a receipt of `clipfilter forget` ({error}).") from None


def _is_settled(name: str) -> bool:
    return name.split("/")[0] in _SETTLED


def _salted(salt: str, text: str) -> str:
    return hashlib.sha256(f"{salt}{text}".encode("utf-8", "surrogatepass")).hexdigest()


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


_EMPTY = Receipt("", "", "", "", [], {}, {}, {}, {}, [])
