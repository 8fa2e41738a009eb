"""Metadata rules' numbers: sizes, caption lengths, image facts and numeric source columns, as float64 per row."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.policies.parts.fields import suggest

Floats = np.ndarray  # float64 [n], NaN where the row has no value

# name -> number from width and height (both > 0, of the image as displayed)
_SIZES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "width": lambda width, height: width,
    "height": lambda width, height: height,
    "min_side": np.minimum,
    "max_side": np.maximum,
    "aspect_ratio": lambda width, height: np.maximum(width, height) / np.minimum(width, height),
    "pixels": np.multiply,
}
_FACTS = {name: f"{cf.PREFIX}{name}" for name in ("brightness", "contrast", "blur", "entropy", "colourfulness")}
_CAPTIONS = ("caption_words", "caption_chars")
BUILTINS = (*_SIZES, *_CAPTIONS, *_FACTS)


def check_metadata(name: str, schema: pa.Schema) -> None:
    """Refuse a metadata rule that this data can never answer: an unknown column, or one that holds no
    numbers.

    Caption lengths are never refused: where there is no caption the rule's `on_missing` applies.
    """
    if name in _SIZES or name in _CAPTIONS:
        return

    def hint() -> str:
        known = [*BUILTINS, *(field.name for field in schema if is_numeric(field.type))]
        return suggest(name, known) or f" (numbers here: {', '.join(known)[:300]})"

    kind = column_type(_FACTS.get(name, name), schema, "the metadata rule", hint)
    if not is_numeric(kind):
        raise RefusedError(
            f"the column {name!r} holds {kind}, and a metadata rule compares numbers; name a numeric column"
        )


def column_type(name: str, schema: pa.Schema, who: str, hint: Callable[[], str] = str) -> pa.DataType:
    """The type of a column; where it is not there, RefusedError says who needs it, and a hint."""
    index = schema.get_field_index(name)
    if index < 0:
        raise RefusedError(f"{who} needs the column {name!r}, which this data does not have{hint()}")
    return schema.field(index).type


def metadata_values(name: str, table: pa.Table) -> Floats:
    """The number that a metadata rule of this name compares, float64 [n]; NaN where a row has none.

    Sizes are `original_width` x `original_height` where the source has both (img2dataset resizes and pads, so
    the stored image's size says nothing about the original), else the decoded image's. Captions count as
    DataComp counts them: words split at white space, characters as code points, of the first caption. Raises
    RefusedError as `check_metadata`.
    """
    check_metadata(name, table.schema)
    if name in _SIZES:
        values = _size(name, table)
    elif name in _CAPTIONS:
        values = _caption(name, table)
    else:
        values = _column(_FACTS.get(name, name), table)
    values[~np.isfinite(values)] = np.nan
    return values


def is_numeric(kind: pa.DataType) -> bool:
    """Whether a metadata rule can compare values of this type."""
    tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
    return any(test(kind) for test in tests)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _column(name: str, table: pa.Table) -> Floats:
    """One numeric column as float64 [n] (a copy); null and absent become NaN."""
    index = table.schema.get_field_index(name)
    if index < 0 or not is_numeric(table.schema.field(index).type):
        return np.full(table.num_rows, np.nan)
    column = table.column(index)
    if pa.types.is_boolean(column.type):
        column = pc.cast(column, pa.int8())
    elif pa.types.is_decimal(column.type):
        column = pc.cast(column, pa.float64(), safe=False)
    return np.array(column.to_numpy(), dtype=np.float64)


def _size(name: str, table: pa.Table) -> Floats:
    width, height = _column(cf.WIDTH, table), _column(cf.HEIGHT, table)
    if "original_width" in table.column_names and "original_height" in table.column_names:
        first_width, first_height = _column("original_width", table), _column("original_height", table)
        original = (first_width > 0) & (first_height > 0)
        width, height = np.where(original, first_width, width), np.where(original, first_height, height)
    known = (width > 0) & (height > 0)
    width, height = np.where(known, width, np.nan), np.where(known, height, np.nan)
    return np.array(_SIZES[name](width, height), dtype=np.float64)


def _caption(name: str, table: pa.Table) -> Floats:
    """Words or characters of `cf_caption` (text), or of the first of `cf_captions` (list of texts)."""
    if cf.CAPTION in table.column_names:
        captions = table.column(cf.CAPTION)
    elif cf.CAPTIONS in table.column_names:
        captions = _first(table.column(cf.CAPTIONS))
    else:
        return np.full(table.num_rows, np.nan)
    if name == "caption_chars":
        counts = pc.utf8_length(captions)
    else:
        trimmed = pc.utf8_trim_whitespace(captions)
        words = pc.list_value_length(pc.utf8_split_whitespace(trimmed))
        counts = pc.if_else(pc.equal(pc.utf8_length(trimmed), 0), pa.scalar(0, pa.int32()), words)
    return np.array(pc.cast(counts, pa.float64()).to_numpy(), dtype=np.float64)


def _first(captions: pa.ChunkedArray) -> pa.ChunkedArray:
    """The first caption of every row, null where there is none."""
    offered = pc.fill_null(pc.greater(pc.list_value_length(captions), 0), False)
    # list_element fails on an empty list, so such rows become null before it looks.
    return pa.chunked_array(
        [
            pc.list_element(pc.if_else(mask, chunk, pa.scalar([None], chunk.type)), 0)
            for chunk, mask in zip(captions.chunks, offered.chunks, strict=True)
        ],
        type=captions.type.value_type,
    )
