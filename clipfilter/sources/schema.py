"""Column schemas: frozen once from a bounded sample, then everything that does not fit becomes JSON text."""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter.errors import RefusedError

# The first columns of every batch a source delivers, in order.
COLUMN_PREFIX = pa.schema(
    [
        pa.field(cf.ROW, pa.int64()),
        pa.field(cf.KEY, pa.string()),
        pa.field(cf.UID, pa.string()),
        pa.field(cf.IMAGE, pa.large_binary()),
        pa.field(cf.CAPTIONS, pa.list_(pa.string())),
        pa.field(cf.ERROR_CLASS, pa.string()),
        pa.field(cf.ERROR, pa.string()),
        pa.field(cf.SOURCE_JSON, pa.string()),
    ]
)
# Columns an earlier run of clipfilter may have left in its output; they travel on as cf_prev_*.
# fmt: off
_EARLIER_RUN = frozenset({
    cf.SHARD, cf.ROW, cf.KEY, cf.UID, cf.SHA256, cf.WIDTH, cf.HEIGHT, cf.FORMAT, cf.SIMILARITY,
    cf.DECISION, cf.REASONS, cf.BRIGHTNESS, cf.CONTRAST, cf.BLUR, cf.ENTROPY, cf.PHASH, cf.CAPTIONS,
    cf.CAPTION, cf.ERROR_CLASS, cf.ERROR, cf.SOURCE_JSON, cf.OVERRIDE, cf.KEPT_AS, cf.CLUSTER,
    cf.COLOURFULNESS, cf.SEVERITY, cf.ACTION,
    cf.DUPLICATE, cf.DUPLICATE_OF, cf.DUPLICATE_KIND, cf.DUPLICATE_COSINE, cf.DUPLICATE_BITS, cf.NEGCLIP,
    cf.NORMSIM, cf.BALANCED,
})
# fmt: on
_JSON_TEXT = {b"clipfilter:json": b"1"}


def full_schema(columns: pa.Schema) -> pa.Schema:
    """The schema of delivered batches: our prefix, then the source's columns."""
    return pa.schema([*COLUMN_PREFIX, *columns])


def travel_name(name: str) -> str:
    """The name under which a source column travels: cf_ columns of an earlier run become cf_prev_*."""
    if name.startswith(cf.PREFIX) and not name.startswith(cf.EARLIER):
        return cf.EARLIER + name[3:]
    return name


def freeze(schema: pa.Schema, without: Iterable[str] = ()) -> pa.Schema:
    """The travelling columns of a file schema, less `without`; file metadata stays behind.

    Raises RefusedError for a column name that would clash with ours, or that occurs twice.
    """
    without = set(without)
    names = [name for name in schema.names if name not in without]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise RefusedError(f"The source has several columns named {doubled[0]!r}; rename one of them.")
    fields = {}
    for item in schema:
        if item.name in without:
            continue
        if (
            item.name.startswith(cf.PREFIX)
            and not item.name.startswith((cf.EARLIER, cf.SCORE))
            and item.name not in _EARLIER_RUN
        ):
            raise RefusedError(
                f"The source column {item.name!r} begins with cf_, which is reserved for clipfilter's own columns; "
                "rename it."
            )
        name = travel_name(item.name)
        if name == item.name and name in fields:
            continue  # cf_prev_x of a still earlier run gives way to this cf_x
        fields[name] = item.with_name(name).with_nullable(True)
    return pa.schema(list(fields.values()))


def only_used(table: pa.Table) -> pa.Table:
    """The table with dictionaries that hold only words its rows use; a part of a table still carries all of the whole."""
    for number, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):
            plain = table.column(number).cast(column.type.value_type)
            table = table.set_column(number, column, plain.dictionary_encode().cast(column.type))
    return table


def schema_to_text(schema: pa.Schema) -> str:
    return base64.b64encode(schema.serialize().to_pybytes()).decode("ascii")


def schema_from_text(text: str) -> pa.Schema:
    return pa.ipc.read_schema(pa.py_buffer(base64.b64decode(text)))


# --- JSON and CSV records -------------------------------------------------------------------------------------------


def infer_record_schema(records: Iterable[dict[str, Any]]) -> pa.Schema:
    """Arrow types for JSON records: scalars and lists of them natively, objects and mixtures as JSON text.

    A field that is null throughout the sample becomes a string. Int and float together are double; strings mixed with
    other scalars stay strings (the others do not fit, and go to cf_source_json).
    """
    samples: dict[str, list[Any]] = {}
    for record in records:
        for name, value in record.items():
            samples.setdefault(name, []).append(value)
    fields = []
    for name, values in samples.items():
        kind = _infer(values)
        fields.append(pa.field(name, pa.string(), metadata=_JSON_TEXT) if kind is None else pa.field(name, kind))
    return freeze(pa.schema(fields))


def _infer(values: Sequence[Any]) -> pa.DataType | None:
    """The type of these values, pa.string() when there is nothing but null, None when only JSON text can hold them."""
    values = [value for value in values if value is not None]
    kinds = set(map(type, values))
    if float in kinds and not kinds <= {float, int}:  # NaN as "no value" among strings, lists, booleans
        values = [value for value in values if not (type(value) is float and math.isnan(value))]
        kinds = set(map(type, values))
    if not kinds or kinds == {str}:
        return pa.string()
    if kinds == {bool}:
        return pa.bool_()
    if kinds == {int}:
        return pa.int64() if all(-(2**63) <= value < 2**63 for value in values) else pa.float64()
    if kinds <= {int, float}:
        return pa.float64()
    if kinds == {list}:
        inner = _infer([item for value in values for item in value])
        return None if inner is None else pa.list_(inner)
    if str in kinds and kinds <= {str, bool, int, float}:
        return pa.string()
    return None


def fit_records(
    records: Sequence[dict[str, Any]], schema: pa.Schema, unfit: Sequence[dict[str, Any] | None] = ()
) -> tuple[list[pa.Array], list[str | None]]:
    """Columns of `schema` from records, and per record the JSON text of whatever did not fit (else None).

    `unfit` are leftovers already known, one per record.
    """
    misfits: list[dict[str, Any] | None] = list(unfit) or [None] * len(records)
    known = set(schema.names)
    travelled = [_travelling(record) for record in records]
    columns = []
    for item in schema:
        values = [record.get(item.name) for record in travelled]
        if item.metadata and item.metadata.get(b"clipfilter:json"):
            values = [None if value is None else json_text(value) for value in values]
        columns.append(_fit_values(values, item, misfits))
    for row, (record, travelling) in enumerate(zip(records, travelled, strict=True)):
        if not travelling.keys() <= known:
            left = _misfit(misfits, row)
            left.update({name: value for name, value in record.items() if travel_name(name) not in known})
    return columns, [None if left is None else json_text(left) for left in misfits]


def _travelling(record: dict[str, Any]) -> dict[str, Any]:
    """A record under the names its fields travel by; a cf_x goes before a cf_prev_x."""
    if not any(name.startswith(cf.PREFIX) for name in record):
        return record
    renamed = {travel_name(name): value for name, value in record.items()}
    renamed.update({travel_name(name): value for name, value in record.items() if travel_name(name) != name})
    return renamed


def _misfit(misfits: list[dict[str, Any] | None], row: int) -> dict[str, Any]:
    left = misfits[row]
    if left is None:
        left = misfits[row] = {}
    return left


def _fit_values(values: list[Any], item: pa.Field, misfits: list[dict[str, Any] | None]) -> pa.Array:
    try:
        if all(_of_kind(value, item.type) for value in values):
            return pa.array(values, type=item.type)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
        pass
    fitted = []
    for row, value in enumerate(values):
        if type(value) is float and math.isnan(value) and not pa.types.is_floating(item.type):
            value = None  # how pandas writes "no value" into JSON
        if value is not None:
            try:
                if not _of_kind(value, item.type):
                    raise TypeError
                pa.scalar(value, type=item.type)
            except (pa.ArrowException, UnicodeEncodeError, OverflowError, TypeError, ValueError):
                _misfit(misfits, row)[item.name] = value
                value = None
        fitted.append(value)
    return pa.array(fitted, type=item.type)


def _of_kind(value: Any, kind: pa.DataType) -> bool:
    """Whether lists stand where `kind` has lists: Arrow would also take text for one, and "" for the empty list."""
    if value is None or not pa.types.is_list(kind):
        return True
    return isinstance(value, list) and all(_of_kind(item, kind.value_type) for item in value)


def json_text(value: Any) -> str:
    """Strict JSON on one line: NaN and infinities as null, bytes as base64, dates as ISO text."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return json.dumps(_jsonable(value), allow_nan=False)


def _jsonable(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(name): _jsonable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    return str(value)


# --- Arrow batches --------------------------------------------------------------------------------------------------


def fit_batch(batch: pa.RecordBatch, schema: pa.Schema) -> tuple[list[pa.Array], list[str | None] | None]:
    """The columns of `schema` from a batch of another file, and per row the JSON text of what did not fit.

    The second value is None when everything fitted. A missing column is null. Numbers widen, text and lists change
    their physical kind; nothing is turned from one kind into another.
    """
    by_name: dict[str, tuple[str, pa.Array]] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        target = travel_name(name)
        if target != name or target not in by_name:
            by_name[target] = (name, column)
    misfits: list[dict[str, Any] | None] = [None] * batch.num_rows
    columns = []
    for item in schema:
        name, column = by_name.pop(item.name, (item.name, None))
        if column is None:
            columns.append(pa.nulls(batch.num_rows, item.type))
        elif column.type == item.type:
            columns.append(column)
        else:
            columns.append(_fit_column(column, item.type, name, misfits))
    for name, column in by_name.values():
        for row, value in enumerate(column.to_pylist()):
            if value is not None:
                _misfit(misfits, row)[name] = value
    if not any(misfits):
        return columns, None
    return columns, [None if left is None else json_text(left) for left in misfits]


def _fit_column(column: pa.Array, target: pa.DataType, name: str, misfits: list[dict[str, Any] | None]) -> pa.Array:
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), target)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _castable(column.type, target):
        try:
            return pc.cast(column, target, safe=True)
        except pa.ArrowException:
            fitted = []
            for row, scalar in enumerate(column):
                try:
                    value = scalar.cast(target, safe=True)
                except pa.ArrowException:
                    plain = scalar.as_py()
                    if not (isinstance(plain, float) and math.isnan(plain)):
                        _misfit(misfits, row)[name] = plain
                    value = pa.scalar(None, target)
                fitted.append(value.as_py())
            return pa.array(fitted, target)
    for row, value in enumerate(column.to_pylist()):
        if value is not None:
            _misfit(misfits, row)[name] = value
    return pa.nulls(len(column), target)


def _castable(source: pa.DataType, target: pa.DataType) -> bool:
    if source == target:
        return True
    if pa.types.is_dictionary(target):
        return _castable(source, target.value_type)
    if is_text(target):
        return is_text(source)
    if is_binary(target):
        return is_binary(source)
    if pa.types.is_integer(target):
        return bool(pa.types.is_integer(source) or pa.types.is_floating(source))
    if pa.types.is_floating(target):
        narrower = pa.types.is_floating(source) and source.bit_width > target.bit_width
        return bool(pa.types.is_integer(source) or pa.types.is_floating(source)) and not narrower
    if is_list(target):
        return is_list(source) and _castable(source.value_type, target.value_type)
    same_kind = (pa.types.is_timestamp, pa.types.is_date, pa.types.is_time, pa.types.is_duration, pa.types.is_decimal)
    return any(kind(source) and kind(target) for kind in same_kind)


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def plain_text(column: pa.Array) -> pa.Array:
    """A text column (or a dictionary of text) as pa.string()."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column if pa.types.is_string(column.type) else pc.cast(column, pa.string())


def caption_lists(column: pa.Array) -> pa.Array:
    """list<string> of the captions in a text or list-of-text column; blank ones dropped, null when none is left."""
    rows = len(column)
    if pa.types.is_null(column.type):
        return pa.nulls(rows, pa.list_(pa.string()))
    if is_list(column.type):
        values = plain_text(pc.list_flatten(column))
        parents = pc.list_parent_indices(column).to_numpy(zero_copy_only=False)
    else:
        values = plain_text(column)
        parents = np.arange(rows)
    blank = pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), True)
    keep = ~blank.to_numpy(zero_copy_only=False)
    counts = np.bincount(parents[keep], minlength=rows) if rows else np.zeros(0, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), values.filter(pa.array(keep)), mask=pa.array(counts == 0))
