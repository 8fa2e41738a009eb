"""Human decisions by uid: a list in the policy or a CSV or JSON Lines file, looked up for whole columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.json as pajson
from pydantic import BeforeValidator, GetJsonSchemaHandler, ValidationInfo, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from clipfilter import columns as cf
from clipfilter.decisions import DECISIONS, Decision
from clipfilter.errors import RefusedError
from clipfilter.policies.hashes import DigestTable, name_digests
from clipfilter.policies.parts.attachments import Attachment, Attachments, filed
from clipfilter.policies.parts.fields import FILE, Model, choice, fail, shown, suggest, text

#: The name under which an override stands among the reasons of a row; no rule may have it.
OVERRIDE_RULE = "override"
MAX_LISTED = 1000

_NEEDED = (cf.UID, "decision")
_OPTIONAL = ("by", "date", "note")
_SCHEMA = pa.schema([(name, pa.string()) for name in (*_NEEDED, *_OPTIONAL)])


class Override(Model):
    """What a person decided about one row."""

    cf_uid: Annotated[str, BeforeValidator(text(cf.UID, 1000))]
    decision: Annotated[Decision, BeforeValidator(choice("the decision", *DECISIONS))]
    by: Annotated[str, BeforeValidator(text("by", 200))] | None = None
    date: Annotated[str, BeforeValidator(text("date", 40))] | None = None
    note: Annotated[str, BeforeValidator(text("note", 2000))] | None = None


@dataclass(frozen=True)
class OverrideTable:
    """All overrides of a policy, found by uid."""

    table: DigestTable
    codes: np.ndarray  # int8 [n]: 0 keep, 1 review, 2 reject

    @classmethod
    def of(cls, uids: pa.ChunkedArray, decisions: pa.ChunkedArray) -> OverrideTable:
        """uids and decisions: texts, one of each per override."""
        digests = [name_digests(chunk.to_pylist()) for chunk in uids.chunks]
        codes = pc.index_in(decisions, value_set=pa.array(DECISIONS))
        table = DigestTable.of(np.concatenate(digests) if digests else np.zeros((0, 16), dtype=np.uint8))
        return cls(table, np.asarray(codes).astype(np.int8))

    def find(self, uids: pa.ChunkedArray) -> np.ndarray:
        """Code of each row's override, int8 [n]; -1 where it has none."""
        place = self.table.find(name_digests(uids.to_pylist()))
        return np.where(place >= 0, self.codes[place], np.int8(-1)).astype(np.int8)


def read_overrides(path: Path) -> pa.Table:
    """The overrides of a CSV file with a header, or of JSON Lines: cf_uid, decision, by, date, note as text.

    Other columns are left out. Raises RefusedError with the row.
    """
    try:
        with path.open("rb") as file:
            is_json = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
        table = _read_json(path) if is_json else _read_csv(path)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise RefusedError(f"the overrides {path} cannot be read: {str(error).splitlines()[0][:200]}") from None
    uids, decisions = table[cf.UID], table["decision"]
    usable = pc.and_(pc.fill_null(pc.greater(pc.utf8_length(uids), 0), False), uids.is_valid())
    known = pc.is_in(decisions, value_set=pa.array(DECISIONS))
    for row in np.flatnonzero(~np.asarray(usable))[:1].tolist():
        raise RefusedError(f"the overrides {path} have no cf_uid in row {row + 1}")
    for row in np.flatnonzero(~np.asarray(known))[:1].tolist():
        given = decisions[row].as_py()
        raise RefusedError(
            f"the overrides {path} have the decision {given!r} in row {row + 1}, "
            f"which must be one of {', '.join(DECISIONS)}{suggest(given, DECISIONS)}"
        )
    counts = pc.value_counts(uids)
    for twice in counts.filter(pc.greater(counts.field("counts"), 1))[:1].to_pylist():
        raise RefusedError(f"the overrides {path} have the cf_uid {twice['values']!r} {twice['counts']} times")
    return table


def _read_csv(path: Path) -> pa.Table:
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = [name.strip().strip('"') for name in file.readline(10_000).split(",")]
    for name in _NEEDED:
        if name not in header:
            raise RefusedError(
                f"the overrides {path} have no column {name!r} (a header line names {', '.join(_SCHEMA.names)})"
                + suggest(name, header)
            )
    names = [name for name in _SCHEMA.names if name in header]
    convert = pacsv.ConvertOptions(
        column_types=dict.fromkeys(names, pa.string()),
        include_columns=names,
        strings_can_be_null=True,
        null_values=[""],
    )
    parse = pacsv.ParseOptions(newlines_in_values=True)
    return _whole(pacsv.read_csv(path, convert_options=convert, parse_options=parse))


def _read_json(path: Path) -> pa.Table:
    options = pajson.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore")
    return _whole(pajson.read_json(path, parse_options=options))


def _whole(table: pa.Table) -> pa.Table:
    for name in _OPTIONAL:
        if name not in table.column_names:
            table = table.append_column(name, pa.nulls(table.num_rows, pa.string()))
    return table.select(_SCHEMA.names)


class Overrides(Model):
    """Human decisions by uid: listed in the policy, or in a file beside it."""

    rows: tuple[Override, ...] | None = None
    source: Attachment | None = None

    @model_validator(mode="after")
    def _once(self) -> Overrides:
        seen: set[str] = set()
        for place, row in enumerate(self.rows or ()):
            if row.cf_uid in seen:
                fail(f"the cf_uid {shown(row.cf_uid)} is there twice", place, cf.UID)
            seen.add(row.cf_uid)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"anyOf": [{"type": "array", "items": handler(Override.__pydantic_core_schema__)}, *FILE["anyOf"]]}

    @model_serializer
    def _plain(self) -> Any:
        if self.rows is not None:
            return [row.model_dump(mode="json", exclude_none=True) for row in self.rows]
        return {"sha256": self.source.sha256 if self.source else None}

    def table(self, files: Attachments) -> OverrideTable:
        """All of them, ready to be looked up. Raises RefusedError."""
        read = self._read(files)
        return OverrideTable.of(read[cf.UID], read["decision"])

    def find(self, uid: str, files: Attachments) -> dict[str, Any] | None:
        """One row's override: decision, by, date, note; None where it has none. Raises RefusedError."""
        read = self._read(files)
        rows = read.filter(pc.equal(read[cf.UID], uid)).to_pylist()
        return {name: value for name, value in rows[0].items() if value} if rows else None

    def _read(self, files: Attachments) -> pa.Table:
        if self.rows is None:
            assert self.source is not None
            return read_overrides(files.path(self.source))
        return pa.Table.from_pylist([row.model_dump() for row in self.rows], _SCHEMA)


def _given(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, list | tuple):
        if len(value) > MAX_LISTED:
            fail(
                f"there are {len(value):,} overrides, more than the {MAX_LISTED:,} a policy may list; "
                "put them into a CSV file and name that",
                MAX_LISTED,
            )
        return {"rows": tuple(value)}
    return filed(value, info, lambda path, _: read_overrides(path))


OverridesField = Annotated[Overrides, BeforeValidator(_given)]
