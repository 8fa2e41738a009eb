"""Tables as people have them, record by record: csv in any dialect and encoding, JSON Lines, JSON documents."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TextIO

from clipfilter import storage
from clipfilter.errors import one_line
from clipfilter.sources.json_stream import parts
from clipfilter.sources.names import looks_like_picture, spelled

JSON_LINES = (".jsonl", ".ndjson")
CSV = (".csv", ".tsv")
# The field that names the image file, best first, in lower case and with "_" for what is no letter.
# fmt: off
_FILE_COLUMNS = (
    "file_name", "filename", "file_path", "filepath", "image_path", "img_path", "image_file", "image_filename", "path",
    "image", "images", "file", "image_name", "img", "img_name", "picture", "photo", "jpg", "image_url", "img_url",
    "url", "image_id", "img_id", "key", "name", "id",
)
# fmt: on
_WITHIN = ("file_name", "filename", "path", "image", "url", "src")  # the fields of a picture that is an object
_DELIMITERS = (",", "\t", ";", "|")
_HEAD = 1 << 18  # bytes that are looked at first
_SAMPLED = 200  # records that are looked at first
_LONGEST = 16 << 20  # characters of one line
_SMALL = 1 << 20  # characters of a section without records
_BOMS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# Bytes that are no UTF-8 are read as Windows-1252, in which most other tables of western languages are written.
_CP1252 = {0xDC00 + code: bytes([code]).decode("cp1252", "replace") for code in range(0x80, 0x100)}
_ESCAPED = re.compile("[\udc80-\udcff]")
_SEPARATOR = re.compile(r'"?sep=(.)"?[\r\n]+')  # what Excel may write above the header


class Unreadable(Exception):
    """Why nothing is read of a table, as half a sentence: "no column names a picture"."""


class Line(NamedTuple):
    """One record: its text in the file, its fields, and the names (`spelled`) of the pictures it speaks of.

    of: the `id` of the record that this is a caption of (COCO's annotations), None for a record of its own.
    """

    raw: str
    fields: dict[str, Any]
    names: list[str]
    of: str | None = None


@dataclass
class Dialect:
    """How a table is written. kind: "csv", "lines" (JSON Lines), or a document: "list" of records, "sections" with one of
    records (COCO), or "map" from names to captions or records.

    column: the field that names pictures. section: the key of the records. Of a csv: its columns, its lines up to the
    header as they stand there ("" without one), and the arguments of csv.reader.
    """

    kind: str
    encoding: str
    column: str = ""
    section: str = ""
    names: list[str] = field(default_factory=list)
    header: str = ""
    reader: dict[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> str:
        """Undecodable bytes of UTF-8 are kept apart, so that a line can be written again as it was."""
        return "surrogateescape" if self.encoding.startswith("utf-8") else "replace"

    def parse(self, raw: str) -> dict[str, Any]:
        """The fields of one record from its text."""
        text = _decoded(raw)
        if self.kind == "csv":
            return self.fields(next(csv.reader(io.StringIO(text, newline=""), **self.reader)))
        record: dict[str, Any] = json.loads(text)
        return record

    def fields(self, row: Sequence[str]) -> dict[str, Any]:
        """A csv row by its columns; what goes beyond them belongs to the last (a delimiter that nobody quoted)."""
        if len(row) > len(self.names):
            last = len(self.names) - 1
            delimiter = self.reader["delimiter"] + " " * self.reader["skipinitialspace"]
            row = [*row[:last], delimiter.join(row[last:])]
        return {name: text or None for name, text in zip(self.names, row, strict=False) if name}


@dataclass
class TableLines:
    """A table to iterate over, its `Line`s in file order; iterating raises Unreadable where a document breaks.

    broken: lines that could not be parsed; rest: what a document holds beside its records, where it is small.
    """

    url: str
    dialect: Dialect
    broken: int = 0
    rest: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, url: str, column: str | None = None) -> TableLines:
        """Find out how a table is written; column: the field that names pictures, where it is known. Raises Unreadable."""
        head, encoding, whole = _head(url)
        if not head.strip():
            raise Unreadable("it is empty")
        if url.lower().endswith((*CSV, ".txt", ".token")):
            return cls(url, _csv_dialect(head, whole, url.lower(), encoding, column))
        table = cls(url, Dialect(_json_kind(head, url.lower()), encoding))
        table._find_records(column)
        return table

    def __iter__(self) -> Iterator[Line]:
        dialect = self.dialect
        self.broken = 0
        if dialect.kind == "csv":
            for raw, row in itertools.islice(self._rows(), 1 if dialect.header else 0, None):
                record = dialect.fields(row)
                yield Line(raw, record, names_in(record.get(dialect.column)))
        elif dialect.kind == "lines":
            for raw, record in self._objects():
                yield Line(raw, record, names_in(record.get(dialect.column)))
        else:
            yield from self._document()

    def _document(self) -> Iterator[Line]:
        """Records and captions of a document; other sections go to `rest`."""
        kind, column, wanted = self.dialect.kind, self.dialect.column, self.dialect.section
        for section, raw, value, inside in self._parts():
            if kind == "map":
                record = {**(value if isinstance(value, dict) else {"captions": value}), column: section}
                yield Line(json.dumps(record), record, [spelled(section)])
            elif section == wanted and inside and isinstance(value, dict):
                yield Line(raw, value, names_in(value.get(column)))
            elif inside and isinstance(value, dict) and "image_id" in value:
                if isinstance(value.get("caption"), str):
                    yield Line(raw, value, [], str(value["image_id"]))
            elif len(raw) <= _SMALL:
                if inside:
                    self.rest.setdefault(section, []).append(value)
                else:
                    self.rest[section] = value

    def _rows(self) -> Iterator[tuple[str, list[str]]]:
        """(text, fields) of the rows of a csv, its header first."""
        csv.field_size_limit(_LONGEST)
        taken: list[str] = []
        with self._text() as handle:
            rows = csv.reader(_recorded(_lines(handle), taken), **self.dialect.reader)
            while True:
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error:
                    self.broken += 1
                    taken.clear()
                    continue
                if row and not _SEPARATOR.fullmatch("".join(taken)):
                    yield "".join(taken), row
                taken.clear()

    def _objects(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(text, object) of JSON Lines."""
        with self._text() as handle:
            for line in _lines(handle):
                try:
                    record = json.loads(_decoded(line))
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict):
                    yield line, record
                elif line.strip():
                    self.broken += 1

    def _parts(self) -> Iterator[Any]:
        with self._text() as handle:
            try:
                yield from parts(handle)
            except ValueError as error:
                raise Unreadable(f"it cannot be parsed as JSON: {one_line(error)}") from error

    def _find_records(self, wanted: str | None) -> None:
        """The section and the field that name pictures; raises Unreadable where there is none."""
        samples: dict[str, list[dict[str, Any]]] = {}
        named: dict[str, Any] = {}
        if self.dialect.kind == "lines":
            samples[""] = [record for _, record in itertools.islice(self._objects(), _SAMPLED)]
            if not samples[""]:
                raise Unreadable("it cannot be parsed: no line is a JSON object")
        else:
            for section, _, value, inside in self._parts():
                if inside and isinstance(value, dict):
                    some = samples.setdefault(section, [])
                    if len(some) < _SAMPLED:
                        some.append(value)
                    elif not section:
                        break
                elif section and isinstance(value, (str, list, dict)) and len(named) < _SAMPLED:
                    named[section] = value
        for section in sorted(samples, key=lambda name: name != "images"):
            columns: dict[str, list[Any]] = {}
            for record in samples[section]:
                for name, value in record.items():
                    columns.setdefault(name, []).append(value)
            column = _choose(columns, wanted)
            if column is not None and (section != "annotations" or "images" not in samples):
                self.dialect.section, self.dialect.column = section, column
                self.dialect.kind = "sections" if section else self.dialect.kind
                return
        if not sum(looks_like_picture(name) for name in named) * 2 > len(named) > 0:
            raise Unreadable("no field names a picture")
        self.dialect.kind, self.dialect.column = "map", "file_name"

    def _text(self) -> TextIO:
        fs, path = storage.filesystem(self.url)
        return io.TextIOWrapper(fs.open(path, "rb"), self.dialect.encoding, self.dialect.errors, newline="")


def names_in(value: Any) -> list[str]:
    """The (spelled) names of pictures in a field."""
    return [spelled(path) for path in paths_in(value)]


def paths_in(value: Any) -> list[str]:
    """The paths of pictures in a field, as they stand there: one, the items of a list, or the path within an object."""
    if isinstance(value, list):
        return [path for item in value for path in paths_in(item)]
    if isinstance(value, dict):
        value = next((value[name] for name in _WITHIN if value.get(name)), None)
    if isinstance(value, bool) or not isinstance(value, (str, int)) or not str(value).strip():
        return []
    return [str(value).strip()]


def _head(url: str) -> tuple[str, str, bool]:
    """(text of the beginning, encoding, whether that is all)."""
    fs, path = storage.filesystem(url)
    with fs.open(path, "rb") as handle:
        data: bytes = handle.read(_HEAD)
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    if encoding == "utf-8" and len(data) > 3 and 0 in data[:4]:  # UTF-16 of a latin script, without its mark
        encoding = "utf-16-be" if data[0] == 0 else "utf-16-le"
    errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
    return data.decode(encoding, errors), encoding, len(data) < _HEAD


def _decoded(text: str) -> str:
    """Text whose undecodable bytes are read as Windows-1252."""
    return text if text.isascii() or not _ESCAPED.search(text) else text.translate(_CP1252)


def _lines(handle: TextIO) -> Iterator[str]:
    while line := handle.readline(_LONGEST):
        if len(line) == _LONGEST:
            raise Unreadable(f"it has a line of more than {_LONGEST >> 20} MiB")
        yield line


def _recorded(lines: Iterator[str], taken: list[str]) -> Iterator[str]:
    """The lines for csv.reader, which takes as many as a row has; `taken` are those since it was last emptied."""
    for line in lines:
        taken.append(line)
        yield _decoded(line)


def _json_kind(head: str, url: str) -> str:
    """ "lines" for JSON Lines, which are also found under the name of a document, else "document"."""
    first, _, more = head.lstrip().partition("\n")
    if first.startswith("["):
        return "list"
    try:
        alone = json.loads(first)
    except (ValueError, RecursionError):
        alone = None
    if not isinstance(alone, dict):
        return "lines" if url.endswith(JSON_LINES) and first.rstrip() != "{" else "sections"
    single = any(map(looks_like_picture, alone.values())) and not any(
        isinstance(value, list) for value in alone.values()
    )
    return "lines" if url.endswith(JSON_LINES) or more.lstrip().startswith("{") or single else "sections"


def _csv_dialect(head: str, whole: bool, url: str, encoding: str, column: str | None) -> Dialect:
    """Delimiter, quotes, header and columns from the first lines; raises Unreadable where no column names a picture."""
    lines = head.splitlines(keepends=True)
    lines = lines if whole or len(lines) < 2 else lines[:-1]
    given = _SEPARATOR.fullmatch(lines[0])
    above = lines.pop(0) if given and len(lines) > 1 else ""
    usual = "\t" if url.endswith((".tsv", ".token")) else ","
    tried = [_Try.of(lines, delimiter) for delimiter in ([given[1]] if given else _DELIMITERS)]
    best = max(tried, key=lambda found: (found.width > 1, found.named, found.even, found.reader["delimiter"] == usual))
    if best.width < 2 and not given:
        best = next(found for found in tried if found.reader["delimiter"] == usual)
    if not best.rows:
        raise Unreadable("it cannot be parsed as csv")
    dialect = Dialect("csv", encoding, reader=best.reader)
    if not any(map(looks_like_picture, best.rows[0])):
        taken: list[str] = []
        next(csv.reader(_recorded(iter(lines), taken), **best.reader))
        dialect.header, dialect.names = above + "".join(taken), [name.strip() for name in best.rows.pop(0)]
    else:
        dialect.names = _names_of_columns(best.rows)
    columns = {name: [row[place] for row in best.rows if place < len(row)] for place, name in enumerate(dialect.names)}
    dialect.column = _choose(columns, column) or ""
    if not dialect.column:
        raise Unreadable("no column names a picture")
    return dialect


@dataclass
class _Try:
    """The first rows read with one delimiter. width: fields of the first one; even: the share of rows that have as many;
    named: how many of those name a picture."""

    reader: dict[str, Any]
    rows: list[list[str]]
    width: int = 0
    even: float = 0.0
    named: int = 0

    @classmethod
    def of(cls, lines: list[str], delimiter: str) -> _Try:
        """With quotes as csv has them, but where they are only letters: a field opens one and does not close it, and
        rows are as even without."""
        quoted, plain = (cls._read(lines, delimiter, quoting) for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE))
        torn = any(cell[:1] == '"' and (len(cell) < 2 or cell[-1] != '"') for row in plain.rows for cell in row)
        if not torn or plain.even < quoted.even:
            return quoted
        better = plain.named > quoted.named or (plain.named == quoted.named and delimiter != ",")
        return plain if better else quoted

    @classmethod
    def _read(cls, lines: list[str], delimiter: str, quoting: int) -> _Try:
        reader: dict[str, Any] = {
            "delimiter": delimiter,
            "quoting": quoting,
            "skipinitialspace": delimiter + " " in lines[0],
        }
        found = cls(reader, [])
        try:
            for row in csv.reader(_recorded(iter(lines), []), **reader):
                if row:
                    found.rows.append(row)
                if len(found.rows) >= _SAMPLED:
                    break
        except csv.Error:
            return found
        if found.rows:
            found.width = len(found.rows[0])
            even = [row for row in found.rows if len(row) == found.width]
            found.even = len(even) / len(found.rows)
            found.named = sum(any(map(looks_like_picture, row)) for row in even)
        return found


def _names_of_columns(rows: list[list[str]]) -> list[str]:
    """Names for a csv without a header: the picture, and as caption the longest text beside it."""
    image = next(place for place, cell in enumerate(rows[0]) if looks_like_picture(cell))
    lengths = [sum(len(row[place]) for row in rows if place < len(row)) for place in range(len(rows[0]))]
    others = [place for place in range(len(lengths)) if place != image]
    caption = max(others, key=lambda place: lengths[place], default=-1)
    names = {image: "file_name", caption: "caption"}
    return [names.get(place, f"column_{place + 1}") for place in range(len(lengths))]


def _choose(columns: dict[str, list[Any]], wanted: str | None) -> str | None:
    """The column that names pictures: the one that is wanted, else by content and name, else by either."""
    if wanted is not None:
        return wanted if wanted in columns else None
    plain = {name: re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in columns if name}
    named = sorted(
        (name for name in plain if plain[name] in _FILE_COLUMNS), key=lambda n: _FILE_COLUMNS.index(plain[n])
    )
    found = {name: [item for value in columns[name] for item in names_in(value)] for name in plain}
    looking = [
        name for name in (*named, *plain) if sum(map(looks_like_picture, found[name])) * 2 > len(found[name]) > 0
    ]
    return next(iter([*looking, *(name for name in named if found[name])]), None)
