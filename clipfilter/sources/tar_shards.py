"""Numbered webdataset tars of a bounded number of rows, written as DataComp's resharder and img2dataset lay them out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from clipfilter.sources.tar import TarFile, write_end, write_member, written_extension
from clipfilter.storage import Directory


class TarShards:
    """`{:08d}.tar` with `{:08d}_stats.json` (after its tar) and, at the end, `sizes.json`.

    Rows go into one tar until it has `rows_per_shard`; none is empty. A key that its tar has already gets `~2`, `~3`, ...
    Times and owners are zero, so the same rows give the same bytes.
    """

    def __init__(self, target: Directory, rows_per_shard: int) -> None:
        self._target = target
        self._rows_per_shard = rows_per_shard
        self._output: BinaryIO | None = None
        self._path: Path | None = None
        self._keys: set[str] = set()
        self.sizes: dict[str, int] = {}

    def add(self, key: str, members: Sequence[tuple[str, bytes]]) -> None:
        """One row: its key, and (extension, bytes) of each member."""
        if self._output is None:
            self._path = self._target.scratch() / f"{len(self.sizes):08d}.tar"
            self._output = open(self._path, "wb")  # noqa: SIM115, closed by _finish
        unique, number = key, 1
        while unique in self._keys:
            number += 1
            unique = f"{key}~{number}"
        self._keys.add(unique)
        for extension, data in members:
            write_member(self._output, f"{unique}.{extension}", len(data), [data])
        if len(self._keys) == self._rows_per_shard:
            self._finish()

    def close(self) -> int:
        """Finish the last tar and write `sizes.json`; the number of tars."""
        self._finish()
        self._target.replace("sizes.json", (json.dumps(self.sizes, indent=1) + "\n").encode())
        return len(self.sizes)

    def _finish(self) -> None:
        if self._output is None or self._path is None:
            return
        write_end(self._output)
        self._output.close()
        self._target.publish(self._path, self._path.name)
        self.sizes[self._path.name] = len(self._keys)
        stats = json.dumps({"count": len(self._keys), "successes": len(self._keys)}) + "\n"
        self._target.replace(f"{self._path.stem}_stats.json", stats.encode())
        self._output, self._path = None, None
        self._keys = set()


def row_members(tar: TarFile, row: int) -> list[tuple[str, bytes]]:
    """(extension as it was written, bytes) of every member of a row."""
    return [(written_extension(tar.name(member), member), tar.read(member)) for member in tar.index.members(row)]


def safe_key(key: str) -> str:
    """A row's key as a member name: no leading slash and no `..`."""
    return "/".join(part for part in key.split("/") if part not in ("", ".."))
