"""Reads a file of labels (CSV, JSON lines or Parquet); whatever is no label is refused with its line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfilter import columns as cf
from clipfilter.errors import RefusedError

_TRUE = {"1", "yes", "true", "1.0"}  # 1.0: what spreadsheets make of a column that has empty cells
_FALSE = {"0", "no", "false", "0.0"}
_MAX_LABELS = 10_000_000


@dataclass(frozen=True)
class Label:
    """One row of a labels file. `true` is None where nobody has judged the row yet.

    design, probability: how the row was drawn and how likely that was, None where the file does not say.
    line: of the file, from 1 (Parquet: the row).
    """

    uid: str | None
    key: str | None
    true: bool | None
    rule: str | None
    design: str | None
    probability: float | None
    line: int


def read_labels(path: str) -> list[Label]:
    """The rows of a labels file in their order.

    It needs `label` (1/0, yes/no, true/false; empty: not judged) and `cf_uid` or `cf_key`; `rule`, `sample_design` and
    `inclusion_probability` are read where they are there. Raises RefusedError naming the line of anything else, and
    where two rows for one image disagree.
    """
    if not Path(path).is_file():
        raise RefusedError(f"there is no labels file {path}; `clipfilter policy sample` makes one to fill in.")
    suffix = Path(path).suffix.lower()
    readers = {".csv": _csv, ".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    if suffix not in readers:
        raise RefusedError(f"--labels {path} must be a .csv, .jsonl or .parquet file.")
    try:
        labels = _checked(path, readers[suffix](path))
    except UnicodeDecodeError:
        raise RefusedError(f"--labels {path} is not UTF-8 text; save it as UTF-8.") from None
    except OSError as error:
        raise RefusedError(f"--labels {path} cannot be read: {error.strerror or error}.") from None
    if not labels:
        raise RefusedError(f"--labels {path} holds no rows.")
    return labels


def _checked(path: str, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> list[Label]:
    labels: list[Label] = []
    seen: dict[tuple[str | None, str | None], Label] = {}
    for line, row in rows:
        if len(labels) >= _MAX_LABELS:
            raise RefusedError(f"--labels {path} has more than {_MAX_LABELS:,} rows.")
        where = f"{path}:{line}"
        if "label" not in row:
            raise RefusedError(f"{where}: there is no column 'label'; it holds 1 or 0 (or yes/no, true/false).")
        uid, key = _text(row.get(cf.UID)), _text(row.get(cf.KEY))
        if uid is None and key is None:
            raise RefusedError(f"{where}: the row has neither cf_uid nor cf_key, which say the image it is about.")
        label = Label(
            uid=uid,
            key=key,
            true=_judgement(row["label"], where),
            rule=_text(row.get("rule")),
            design=_text(row.get("sample_design")),
            probability=_probability(row.get("inclusion_probability"), where),
            line=line,
        )
        name = (uid or key, label.rule)
        twin = seen.get(name)
        if twin is None:
            seen[name] = label
        elif twin.true is not None and label.true is not None and twin.true != label.true:
            raise RefusedError(f"{where}: this image has another label in line {twin.line}; decide for one of them.")
        labels.append(label)
    return labels


def _csv(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        header = file.readline()
        file.seek(0)
        # Spreadsheets of many countries write semicolons.
        reader = csv.DictReader(file, delimiter=";" if header.count(";") > header.count(",") else ",", strict=True)
        try:
            for row in reader:
                if None in row:
                    raise RefusedError(f"{path}:{reader.line_num}: the line has more cells than the header has names.")
                yield reader.line_num, {name: value for name, value in row.items() if value is not None}
        except csv.Error as error:
            raise RefusedError(f"{path}:{reader.reader.line_num}: this is not valid CSV ({error}).") from None


def _jsonl(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise RefusedError(f"{path}:{line}: this is not JSON ({str(error)[:100]}).") from None
            if not isinstance(row, dict):
                raise RefusedError(f"{path}:{line}: a line must be an object with cf_uid or cf_key, and label.")
            yield line, row


def _parquet(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = (cf.UID, cf.KEY, "label", "rule", "sample_design", "inclusion_probability")
    try:
        file = pq.ParquetFile(path)
        names = [name for name in wanted if name in file.schema_arrow.names]
        line = 0
        for batch in file.iter_batches(4096, columns=names):
            for row in batch.to_pylist():
                line += 1
                yield line, row
    except pa.ArrowException as error:
        raise RefusedError(f"--labels {path} is not a readable Parquet file ({str(error)[:100]}).") from None


def _text(value: Any) -> str | None:
    text = "" if value is None else str(value).strip()
    return text or None


def _judgement(value: Any, where: str) -> bool | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    text = str(value).strip().lower()
    if not text:
        return None
    if text not in _TRUE | _FALSE:
        raise RefusedError(
            f"{where}: {str(value)[:40]!r} is no label; write 1 or 0 (or yes/no, true/false), or nothing."
        )
    return text in _TRUE


def _probability(value: Any, where: str) -> float | None:
    text = _text(value)
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise RefusedError(f"{where}: the inclusion_probability {text[:40]!r} is not above 0 and at most 1.")
    return number
