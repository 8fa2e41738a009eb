"""Caption tables of an image folder: a csv, tsv or jsonl that names files (metadata.jsonl among them)."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

import pyarrow as pa

from clipfilter import storage
from clipfilter.sources.discover import Folder, below
from clipfilter.sources.records import CAPTION_NAMES

SUFFIXES = (".csv", ".tsv", ".jsonl")
_NAMES = ("metadata", "captions", "labels", "annotations")
# The column that names the image file, best first.
# fmt: off
_FILE_COLUMNS = (
    "file_name", "filename", "file_path", "filepath", "path", "image_path", "img_path", "image", "file", "image_name",
    "img", "key", "name", "id",
)
# fmt: on
_FIELD_LIMIT = 16 << 20  # characters of one csv field


def tables_of(folder: Folder) -> list[str]:
    """The caption tables among a folder's files: those with a customary name; else the only csv, tsv or jsonl there.

    `captions.txt` counts (Flickr8k's own captions file is a csv of that name).
    """
    names = [entry.name for entry in folder.files if entry.name.lower().endswith(SUFFIXES)]
    named = [name for name in names if name.lower().rpartition(".")[0] in _NAMES]
    if not named and any(entry.name.lower() == "captions.txt" for entry in folder.files):
        named = [entry.name for entry in folder.files if entry.name.lower() == "captions.txt"]
    if not named and len(names) == 1:
        named = names
    return [below(folder.path, name) for name in named]


@dataclass
class Table:
    """One caption table in memory: the records under each file name, in file order."""

    path: str
    column: str | None = None
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def find(self, image: str) -> list[dict[str, Any]]:
        """The records of an image (path relative to the root); empty when it is not named."""
        for name in candidates(self.path, image):
            if name in self.rows:
                return self.rows[name]
        return []


def candidates(table: str, image: str) -> list[str]:
    """The names a table may call an image by: path from the table's folder, basename, both without ending."""
    folder = table.rpartition("/")[0]
    inside = image[len(folder) :].lstrip("/") if folder else image
    base = image.rpartition("/")[2]
    return [inside, base, inside.rpartition(".")[0], base.rpartition(".")[0]]


def load(root: str, path: str, columns: pa.Schema) -> Table:
    """Read a table whole; one that names no files (no such column) stays empty. csv numbers follow `columns`."""
    table = Table(path)
    numeric = {item.name for item in columns if pa.types.is_integer(item.type) or pa.types.is_floating(item.type)}
    convert = not path.lower().endswith(".jsonl")
    with _open(root, path) as handle:
        for _, record in _records(handle, path):
            table.column = table.column or _file_column(record)
            if table.column is None:
                break
            name = record.get(table.column)
            if isinstance(name, (str, int)) and name != "":
                if convert:
                    record.update({field: _value(record[field]) for field in numeric & record.keys()})
                table.rows.setdefault(_normal(str(name)), []).append(record)
    return table


def sample(root: str, path: str, rows: int) -> list[dict[str, Any]]:
    """The first records of a table; empty when it names no files. A csv column of numbers throughout has numbers."""
    with _open(root, path) as handle:
        found = [record for _, record in itertools.islice(_records(handle, path), rows)]
    if not found or _file_column(found[0]) is None:
        return []
    if not path.lower().endswith(".jsonl"):
        for name in dict.fromkeys(field for record in found for field in record):
            values = [_value(record.get(name)) for record in found]
            if name not in CAPTION_NAMES and not any(isinstance(value, str) for value in values):
                for record, value in zip(found, values, strict=True):
                    record[name] = value
    return found


def copy(root: str, path: str, images: Iterable[str], target: TextIO) -> int:
    """Write the header and the lines of a table that speak of `images`, in their order; how many."""
    names = {name for image in images for name in candidates(path, image)}
    column: str | None = None
    count = 0
    with _open(root, path) as handle:
        header = ""
        for text, record in _records(handle, path):
            if column is None:
                column = _file_column(record)
                if column is None:
                    return 0
                header = _csv_line(list(record), path) if not path.lower().endswith(".jsonl") else ""
            if _normal(str(record.get(column, ""))) in names:
                if not count:
                    target.write(header)
                target.write(text)
                count += 1
    return count


def _file_column(record: dict[str, Any]) -> str | None:
    return next((name for name in _FILE_COLUMNS if name in record), None)


def _normal(name: str) -> str:
    return name.strip().replace("\\", "/").removeprefix("./")


def _open(root: str, path: str) -> TextIO:
    fs, inside = storage.filesystem(storage.join(root, path))
    return io.TextIOWrapper(fs.open(inside, "rb"), "utf-8-sig", errors="replace", newline="")


def _records(handle: TextIO, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(the line as it is to be written again, its fields) of every readable row."""
    if path.lower().endswith(".jsonl"):
        for line in handle:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield line.rstrip("\r\n") + "\n", record
        return
    csv.field_size_limit(_FIELD_LIMIT)
    rows = csv.reader(handle, delimiter=_delimiter(path))
    names: list[str] | None = None
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error:
            continue
        if names is None:
            names = [name.strip() for name in row]
        elif row:
            fields = {name: text or None for name, text in zip(names, row, strict=False) if name}
            yield _csv_line(row, path), fields


def _delimiter(path: str) -> str:
    return "\t" if path.lower().endswith(".tsv") else ","


def _csv_line(row: list[str], path: str) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=_delimiter(path), lineterminator="\n").writerow(row)
    return buffer.getvalue()


def _value(text: str | None) -> Any:
    """A csv field as the plainest type it spells: whole number, number, text."""
    if text is None:
        return None
    if text[0] in "-0123456789.":
        try:
            number = int(text)
        except ValueError:
            pass
        else:
            return number if str(number) == text and -(2**63) <= number < 2**63 else text
        try:
            real = float(text)
        except ValueError:
            return text
        return real if math.isfinite(real) else text
    return text
