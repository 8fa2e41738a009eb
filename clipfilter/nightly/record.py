"""The run history: two create-only files per night in `OUT/nights/`, one when it begins and one when it is over."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from clipfilter.errors import RefusedError
from clipfilter.storage import Directory

_FOLDER = "nights"
_NAME = re.compile(r"^(\d{6})\.(begun|over|accepted)\.json$")
#: A night of another machine that began longer ago than this and is not over has been killed.
_GIVEN_UP_SECONDS = 20 * 3600

#: Outcomes of nights that looked at the source; only these count as silent or not.
LOOKED = ("done", "unchanged")


def stamp(seconds: float) -> str:
    """A Unix time as ISO 8601, UTC."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def begin(directory: Directory, now: float) -> int:
    """Take the next number; two nights that begin together get two numbers."""
    number = max(_numbers(directory), default=0) + 1
    content: dict[str, Any] = {"night": number, "started": stamp(now), "host": socket.gethostname(), "pid": os.getpid()}
    content["born"] = _born(os.getpid())
    while not directory.create(_file(number, "begun"), _bytes(content)):
        number += 1
        content["night"] = number
    return number


def finish(directory: Directory, record: dict[str, Any]) -> None:
    """Write a night's record, last of all."""
    directory.create(_file(record["night"], "over"), _bytes(record))


def accept(directory: Directory, night: int) -> None:
    """Take a night's distribution as the new normal: later nights are compared with it and its successors only.

    Raises RefusedError when there is no finished night of this number.
    """
    record = read(directory, night)
    if record is None or "scores" not in record:
        raise RefusedError(f"{directory.url} has no finished night {night} with rows; see `clipfilter history`.")
    directory.create(_file(night, "accepted"), _bytes({"night": night}))


def accepted(directory: Directory) -> int:
    """The newest accepted night, 0 when none was."""
    return max(_numbers(directory, "accepted"), default=0)


def read(directory: Directory, night: int) -> dict[str, Any] | None:
    """The record of a night, None while it is not over."""
    name = _file(night, "over")
    return dict(directory.read_json(name)) if directory.exists(name) else None


def nights(directory: Directory) -> Iterator[dict[str, Any]]:
    """All nights, oldest first: the records, and for a night that is not over what its beginning says."""
    over = set(_numbers(directory, "over"))
    for number in _numbers(directory, "begun"):
        if number in over:
            yield directory.read_json(_file(number, "over"))
        else:
            begun = directory.read_json(_file(number, "begun"))
            yield {**begun, "outcome": "unfinished" if gave_up(begun) else "running", "alerts": []}


def backwards(directory: Directory, below: int) -> Iterator[dict[str, Any]]:
    """Records of nights that are over, newest first, from the one before number `below`."""
    for number in reversed(_numbers(directory, "over")):
        if number < below:
            yield directory.read_json(_file(number, "over"))


def close_killed(directory: Directory, below: int) -> list[int]:
    """Give nights before number `below` that were killed a record that says so; the numbers of those that had none."""
    over = set(_numbers(directory, "over"))
    killed = []
    for number in _numbers(directory, "begun"):
        if number >= below or number in over:
            continue
        begun = directory.read_json(_file(number, "begun"))
        if gave_up(begun):
            content = {**begun, "outcome": "unfinished", "alerts": []}
            if directory.create(_file(number, "over"), _bytes(content)):
                killed.append(number)
    return killed


def gave_up(begun: dict[str, Any]) -> bool:
    """Whether the process that began a night is gone: known on its own machine, else judged by its age."""
    if begun["host"] == socket.gethostname() and begun["born"]:
        return bool(_born(begun["pid"]) != begun["born"])
    started = datetime.fromisoformat(begun["started"])
    return (datetime.now(UTC) - started).total_seconds() > _GIVEN_UP_SECONDS


def _born(pid: int) -> str:
    """When a process of this machine started, in ticks since boot (Linux); "" when there is none, or no way to know."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _file(number: int, kind: str) -> str:
    return f"{_FOLDER}/{number:06d}.{kind}.json"


def _numbers(directory: Directory, kind: str | None = None) -> list[int]:
    matches = (_NAME.match(name) for name in directory.names(_FOLDER))
    return sorted({int(match[1]) for match in matches if match and kind in (None, match[2])})


def _bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False) + "\n").encode()
