"""The labels a person gives in the browser: one CSV file that `policy calibrate` reads, written whole at every change."""

from __future__ import annotations

import contextlib
import csv
import fcntl
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.calibration import SAMPLE_COLUMNS, Design, Sample, read_labels, write_sample
from clipfilter.errors import RefusedError

#: What `sample_design` says of rows that a person picked: no design of `policy sample`, so they earn no guarantee.
BY_HAND = "by hand"
_SCHEMA = pa.schema(
    [
        (
            name,
            {cf.ROW: pa.int64(), "score": pa.float32(), "inclusion_probability": pa.float64()}.get(name, pa.string()),
        )
        for name in SAMPLE_COLUMNS
    ]
)

Row = dict[str, Any]


class LabelFile:
    """The labels file and, for rows picked by hand of a rule that has a sample in it, `NAME.by-hand.csv` beside it.

    Mixed with rows that somebody picked, a uniform sample would lose its guarantee, so the two never share a file. One
    process writes: a second one is refused while the first has the file open.
    """

    def __init__(self, path: str) -> None:
        """Raises RefusedError where the file cannot be written, is no labels file, or is in use."""
        self.path = Path(path).absolute()
        if self.path.suffix.lower() != ".csv":
            raise RefusedError(f"--labels {path} must end in .csv.")
        if not self.path.parent.is_dir():
            raise RefusedError(f"--labels {path}: there is no folder {self.path.parent}.")
        self.by_hand_path = self.path.with_name(f"{self.path.stem}.by-hand.csv")
        self._lock_path = self.path.with_name(f".{self.path.name}.lock")
        self._lock_file = self._take_lock()
        self._guard = threading.Lock()
        try:
            self._rows: dict[tuple[str, str], Row] = {}
            for file in (self.by_hand_path, self.path):
                self._rows |= {(row["rule"], row[cf.UID]): row for row in _read(file)}
        except BaseException:
            self.close()
            raise

    def get(self, uid: str, rule: str) -> bool | None:
        """What a person said about this row and rule, None where nothing."""
        row = self._rows.get((rule, uid))
        return {"1": True, "0": False}.get(row["label"]) if row is not None else None

    def labelled(self, rule: str) -> dict[str, bool]:
        """uid -> label of all labelled rows of the rule."""
        with self._guard:
            return {u: row["label"] == "1" for (r, u), row in self._rows.items() if r == rule and row["label"]}

    def sample(self, rule: str) -> list[str]:
        """The uids of the rule's sample in the order they were drawn; empty where there is none."""
        with self._guard:
            return [uid for (r, uid), row in self._rows.items() if r == rule and row["sample_design"] != BY_HAND]

    def set(self, row: Mapping[str, Any], rule: str, label: bool | None) -> None:
        """Record a label, or take it back (None), and write the file before returning.

        row: cf_uid, cf_key, path, cf_shard, cf_row, caption, score and band of the row.
        """
        key = (rule, str(row[cf.UID]))
        with self._guard:
            known = self._rows.get(key)
            if known is None:
                if label is None:
                    return
                known = {**row, "rule": rule, "sample_design": BY_HAND, "inclusion_probability": None}
                self._rows[key] = known
            known["label"] = "" if label is None else str(int(label))
            if label is None and known["sample_design"] == BY_HAND:
                del self._rows[key]
            self._write(by_hand=known["sample_design"] == BY_HAND)

    def start_sample(self, sample: Sample) -> None:
        """Put a drawn sample into the file; labels that its rows have already stay. A larger draw replaces a smaller one."""
        with self._guard:
            drawn = {(sample.rule, str(row[cf.UID])): row for row in sample.rows.to_pylist()}
            for key, row in drawn.items():
                if key in self._rows:
                    row["label"] = self._rows[key]["label"]
            # Labelled rows of an earlier draw that this one does not hold are rows picked in another way.
            kept: dict[tuple[str, str], Row] = {}
            for key, row in self._rows.items():
                if key in drawn:
                    continue
                if key[0] == sample.rule and row["sample_design"] != BY_HAND:
                    if not row["label"]:
                        continue
                    row = {**row, "sample_design": BY_HAND, "inclusion_probability": None}
                kept[key] = row
            self._rows = kept | drawn
            self._write(by_hand=True)

    def close(self) -> None:
        """Let another process write the file."""
        with contextlib.suppress(OSError):
            self._lock_path.unlink()
        os.close(self._lock_file)

    def _write(self, *, by_hand: bool) -> None:
        sampled = {rule for (rule, _), row in self._rows.items() if row["sample_design"] != BY_HAND}
        apart = [row for (rule, _), row in self._rows.items() if rule in sampled and row["sample_design"] == BY_HAND]
        together = [
            row for (rule, _), row in self._rows.items() if rule not in sampled or row["sample_design"] != BY_HAND
        ]
        if by_hand and (apart or self.by_hand_path.exists()):
            _replace(self.by_hand_path, apart)
        _replace(self.path, together)

    def _take_lock(self) -> int:
        while True:
            try:
                handle = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise RefusedError(
                    f"--labels {self.path} cannot be written: {error.strerror}; name another file."
                ) from None
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(handle)
                raise RefusedError(
                    f"another `clipfilter serve` writes labels to {self.path}; end it, or name another file with --labels."
                ) from None
            # The process that had the lock may have removed the file between our opening and our locking it.
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == self._lock_path.stat().st_ino:
                    return handle
            os.close(handle)


def _read(path: Path) -> list[Row]:
    """The rows of an earlier session or of `policy sample`, checked by the reader that `policy calibrate` uses."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8-sig", newline="", errors="replace") as file:
        reader = csv.DictReader(file)
        found = list(reader)
    if not found and set(reader.fieldnames or SAMPLE_COLUMNS) >= set(SAMPLE_COLUMNS):
        return []  # all labels were taken back
    labels = read_labels(str(path))
    rows = []
    for text, label in zip(found, labels, strict=True):
        if label.uid is None or label.rule is None or not set(SAMPLE_COLUMNS) <= set(text):
            raise RefusedError(
                f"{path} is not a file of `clipfilter policy sample` or of this page (columns {', '.join(SAMPLE_COLUMNS)}); name "
                "another one with --labels."
            )
        row: Row = {name: text[name] for name in SAMPLE_COLUMNS}
        row[cf.ROW], row["score"] = int(text[cf.ROW]), float(text["score"] or "nan")
        row["inclusion_probability"] = label.probability
        row["label"] = "" if label.true is None else str(int(label.true))
        row["sample_design"] = label.design or BY_HAND
        rows.append(row)
    return rows


def _replace(path: Path, rows: list[Row]) -> None:
    """Write the rows beside the file, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.csv")
    temporary.unlink(missing_ok=True)
    table = pa.Table.from_pylist([{name: row[name] for name in SAMPLE_COLUMNS} for row in rows], schema=_SCHEMA)
    try:
        write_sample(Sample(table, Design(BY_HAND), "", len(rows), 0), str(temporary))
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
