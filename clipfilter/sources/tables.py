"""Caption tables beside pictures: which there are, what each says of a picture, and copies of the lines that do."""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from clipfilter import storage
from clipfilter.errors import ShardError, one_line
from clipfilter.sources.discover import below, is_image_name
from clipfilter.sources.names import PathIndex, fit, folded, meant
from clipfilter.sources.records import caption_fields
from clipfilter.sources.table_lines import CSV, JSON_LINES, Dialect, TableLines, Unreadable, names_in

_CUSTOMARY = ("metadata", "captions", "labels", "annotations")
# Words in the names of text files, of JSON files among many, and of folders beside the pictures', that hold captions.
_TEXTS = re.compile(r"^captions?\.txt$|token|\.captions\.txt$", re.IGNORECASE)
_SPEAKING = re.compile(r"anno|caption|label|meta|text|token|json|csv|instruct|conversation|descri", re.IGNORECASE)
_ENDING = re.compile(r"\.[A-Za-z]\w{0,8}$")
_FOLDERS = 20
_DOCUMENTS = 16  # JSON files of a folder that are looked at whatever they are called
_IN_MEMORY = 1 << 20  # bytes of a table's text


def is_table(name: str) -> bool:
    """Whether a file may be a caption table by its name. A JSON file may also belong to one picture."""
    lower = name.lower()
    if lower.endswith((".txt", ".token")):
        return _TEXTS.search(lower) is not None
    return lower.endswith((*CSV, *JSON_LINES, ".json")) and not lower.endswith("_stats.json")


def tables_of(folder: str, names: Collection[str]) -> list[str]:
    """The paths of the tables among the names in a folder: first those with a customary name, then the shorter names."""
    stems = {name.rpartition(".")[0] for name in names if is_image_name(name)}
    found = [name for name in names if is_table(name) and not (_is_document(name) and name[:-5] in stems)]
    if sum(map(_is_document, found)) > _DOCUMENTS:  # of pictures that are gone
        found = [name for name in found if not _is_document(name) or _SPEAKING.search(name)]
    order = sorted(found, key=lambda name: (name.lower().rpartition(".")[0] not in _CUSTOMARY, len(name), name))
    return [below(folder, name) for name in order]


def speaking_folders(folder: str, names: Iterable[str]) -> list[str]:
    """The subfolders (they have no ending) whose tables may speak of pictures beside them, COCO's `annotations`: 20."""
    found = [name for name in sorted(names) if _SPEAKING.search(name) and not _ENDING.search(name)]
    return [below(folder, name) for name in found[:_FOLDERS]]


def _is_document(name: str) -> bool:
    return name.lower().endswith(".json")


class Said(NamedTuple):
    """What a table says of pictures: the numbers of the records that speak of them, each with the names that do, or why
    it is not clear which do."""

    records: dict[int, set[str]]
    doubt: str = ""


class Table:
    """One caption table, ready to be asked about pictures by their path.

    In memory are the names in it and about 60 bytes a row; its text, if it is long, lies in an unnamed temporary file.
    note: what of it could not be read, as half a sentence. Raises ShardError where its file system fails.
    """

    def __init__(self, root: str, path: str) -> None:
        self.path, self.note = path, ""
        self._dialect = Dialect("list", "utf-8")
        self._rest: dict[str, Any] = {}
        self._names = PathIndex()
        self._numbers = array("Q")  # of each name: its record
        self._texts = _Texts()
        self._captions = _Captions()
        url = storage.join(root, path)
        try:
            self._read(TableLines.open(url))
        except Unreadable as why:
            self.note = str(why)
        except PermissionError:
            self.note = "it may not be read"
        except Exception as error:  # every filesystem has exceptions of its own
            raise ShardError(f"{url} cannot be read: {one_line(error)}") from error

    def _read(self, lines: TableLines) -> None:
        self._dialect, self._rest = lines.dialect, lines.rest
        for line in lines:
            if line.of is not None:
                self._captions.add(line.of, line.raw)
            elif line.names:
                for name in line.names:
                    self._names.add(name)
                    self._numbers.append(len(self._texts))
                self._texts.add(line.raw)
        if lines.broken:
            self.note = f"{lines.broken:,} of its lines cannot be parsed"

    def __len__(self) -> int:
        return len(self._texts)

    def find(self, picture: str, pictures: Callable[[], PathIndex]) -> Said:
        """Which records speak of a picture: those whose name fits it best, if that name fits no other picture as well.

        picture: its path below the table's folder, or the folder beside which that lies. pictures: all of them there, asked
        for only where a name is not the path itself.
        """
        best: tuple[int, int, int] | None = None
        found: list[tuple[str, int]] = []
        for position in self._names.alike(picture):
            name = self._names[position]
            how = fit(name, picture)
            if how is not None and (best is None or how <= best):
                found = [*(found if how == best else []), (name, self._numbers[position])]
                best = how
        if best is None:
            return Said({})
        names = list(dict.fromkeys(name for name, _ in found))
        if best[0]:
            others = meant(names[0], pictures())
            if picture not in others and others:
                return Said({})  # it is the path of another picture
            if len(others) > 1:
                return Said({}, f"its name {names[0]} fits {others[0]} and {others[1]}")
            if len({folded(name) for name in names}) > 1:
                return Said({}, f"its names {names[0]} and {names[1]} both fit {picture}")
        records: dict[int, set[str]] = {}
        for name, number in found:
            records.setdefault(number, set()).add(name)
        return Said(records)

    def records(self, said: Mapping[int, Collection[str]], numeric: Collection[str] = ()) -> list[dict[str, Any]]:
        """Records by number, of a list of images those that are named. COCO's captions are under `captions`; csv fields of
        the columns `numeric` become numbers."""
        found = []
        for number, names in said.items():
            record = self._narrowed(number, names) or self._dialect.parse(self._texts[number])
            record = with_numbers(record, numeric if self._dialect.kind == "csv" else ())
            captions = [json.loads(text)["caption"] for text in self._captions.of(record.get("id"))]
            found.append({**record, "captions": captions} if captions else record)
        return found

    def _narrowed(self, number: int, names: Collection[str]) -> dict[str, Any] | None:
        """A record whose list of images has others, too, without these; None for any other record."""
        if self._dialect.kind == "csv" or not names:
            return None
        record = self._dialect.parse(self._texts[number])
        images = record.get(self._dialect.column)
        kept = (
            [item for item in images if set(names_in(item)).intersection(names)] if isinstance(images, list) else images
        )
        return None if kept == images else {**record, self._dialect.column: kept}

    def sample(self, rows: int) -> list[dict[str, Any]]:
        """The first records; a csv column of numbers throughout has numbers."""
        found = self.records(dict.fromkeys(range(min(rows, len(self))), ()))
        numeric = numeric_columns(found) if self._dialect.kind == "csv" else []
        return [with_numbers(record, numeric) for record in found]

    def copy(self, said: Mapping[int, Collection[str]], target: Path) -> None:
        """Write these records, in their order, as a table of the same kind, lines as they are; nothing where there are none.

        Of a list of images those that are named stay.
        """
        if not said:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        dialect = self._dialect
        texts = {}
        for number in sorted(said):
            narrowed = self._narrowed(number, said[number])
            texts[number] = self._texts[number] if narrowed is None else json.dumps(narrowed, ensure_ascii=False)
        encoding = dialect.encoding if dialect.kind in ("csv", "lines") else "utf-8"
        with open(target, "w", encoding=encoding, errors=dialect.errors, newline="") as output:
            if dialect.kind in ("csv", "lines"):
                output.write(dialect.header)
                output.writelines(text if text.endswith(("\n", "\r")) else text + "\n" for text in texts.values())
            else:
                self._copy_document(list(texts.values()), output)

    def _copy_document(self, texts: list[str], output: TextIO) -> None:
        kind = self._dialect.kind
        if kind == "list":
            _write_list(texts, output)
            output.write("\n")
            return
        if kind == "map":
            records = (json.loads(text) for text in texts)
            pairs = {record.pop(self._dialect.column): record for record in records}
            plain = {
                name: record["captions"] if set(record) == {"captions"} else record for name, record in pairs.items()
            }
            json.dump(plain, output, ensure_ascii=False)
            return
        head = json.dumps(self._rest, ensure_ascii=False)[1:-1]
        output.write("{" + head + (", " if head else "") + json.dumps(self._dialect.section) + ": ")
        _write_list(texts, output)
        if self._captions:
            ids = (json.loads(text).get("id") for text in texts)
            output.write(', "annotations": ')
            _write_list((text for key in ids for text in self._captions.of(key)), output)
        output.write("}\n")


class _Texts:
    """Texts by number, in memory while they are few, then in an unnamed temporary file."""

    def __init__(self) -> None:
        self._ends = array("Q")
        self._held = bytearray()
        self._file: Any = None
        self._written = 0

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, text: str) -> None:
        self._held += text.encode("utf-8", "surrogatepass")
        self._ends.append(self._written + len(self._held))
        if len(self._held) > _IN_MEMORY:
            self._file = self._file or tempfile.TemporaryFile(prefix="clipfilter-")  # noqa: SIM115  gone with the table
            self._file.write(self._held)
            self._file.flush()
            self._written += len(self._held)
            self._held.clear()

    def __getitem__(self, number: int) -> str:
        start, end = self._ends[number - 1] if number else 0, self._ends[number]
        if start >= self._written:
            data = bytes(self._held[start - self._written : end - self._written])
        else:  # read by position: threads may ask at once
            data = os.pread(self._file.fileno(), end - start, start)
        return data.decode("utf-8", "surrogatepass")


class _Captions:
    """COCO's captions by the id of their image."""

    def __init__(self) -> None:
        self._texts = _Texts()
        self._hashes = array("q")
        self._sorted: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, image: str, text: str) -> None:
        self._hashes.append(hash(image))
        self._texts.add(text)

    def of(self, image: Any) -> Iterator[str]:
        """The captions (JSON texts) of an image, in the order of the document."""
        if not self or image is None:
            return
        if self._sorted is None:
            values = np.frombuffer(self._hashes, np.int64)
            order = np.argsort(values, kind="stable")
            self._sorted = values[order], order
        hashes, order = self._sorted
        low, high = (int(np.searchsorted(hashes, hash(str(image)), side)) for side in ("left", "right"))
        for place in order[low:high].tolist():
            text = self._texts[place]
            if str(json.loads(text)["image_id"]) == str(image):
                yield text


def _write_list(texts: Iterable[str], output: TextIO) -> None:
    separator = "["
    for text in texts:
        output.write(separator + text)
        separator = ",\n"
    output.write("[]" if separator == "[" else "]")


def numeric_columns(records: Sequence[dict[str, Any]]) -> list[str]:
    """The columns of a csv that are numbers throughout; captions never are."""
    names = dict.fromkeys(field for record in records for field in record)
    columns = {name: [_value(record.get(name)) for record in records] for name in names if not caption_fields([name])}
    return [name for name, values in columns.items() if not any(isinstance(value, (str, list)) for value in values)]


def with_numbers(record: dict[str, Any], numeric: Iterable[str]) -> dict[str, Any]:
    """A record of a csv with numbers in place of the texts in these columns."""
    return {**record, **{name: _value(record[name]) for name in numeric if name in record}}


def _value(text: Any) -> Any:
    """A csv field as the plainest type it spells: whole number, number, text."""
    if not isinstance(text, str) or not text:
        return text
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
