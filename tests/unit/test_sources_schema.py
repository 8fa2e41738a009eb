"""Freezing and fitting columns: nothing is lost, nothing changes its kind."""

from __future__ import annotations

import json
import math
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipfilter.errors import RefusedError
from clipfilter.sources.schema import (
    caption_lists,
    fit_batch,
    fit_records,
    freeze,
    infer_record_schema,
    json_text,
    schema_from_text,
    schema_to_text,
)

SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=5))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
RECORDS = st.lists(st.dictionaries(st.sampled_from("abcd"), VALUES, max_size=4), max_size=6)


def same(left: Any, right: Any) -> bool:
    """Equal as JSON values, NaN and infinities counting as null; text that is not Unicode is beyond comparison."""
    return bool(json.loads(json_text(left)) == json.loads(json_text(right)))


@given(RECORDS, RECORDS)
@example([{"a": []}], [{"a": ""}])
@example([{"a": [[1]]}], [{"a": [""]}])
@settings(max_examples=120, deadline=None)
def test_every_value_is_in_its_column_or_in_the_json(
    sample: list[dict[str, Any]], records: list[dict[str, Any]]
) -> None:
    schema = schema_from_text(schema_to_text(infer_record_schema(sample)))
    columns, left = fit_records(records, schema)
    for column, item in zip(columns, schema, strict=True):
        assert column.type == item.type
    for row, record in enumerate(records):
        rest = json.loads(left[row]) if left[row] else {}
        for name, value in record.items():
            if name in rest:
                assert same(rest[name], value)
                continue
            held = columns[schema.get_field_index(name)][row].as_py()
            if schema.field(name).metadata and held is not None:
                held = json.loads(held)
            if isinstance(value, float) and math.isnan(value):
                assert held is None or math.isnan(held)
            else:
                assert same(held, value), name


@given(RECORDS)
@settings(max_examples=60, deadline=None)
def test_a_sample_of_one_kind_fits_its_own_schema(records: list[dict[str, Any]]) -> None:
    kinds = {(name, type(value)) for record in records for name, value in record.items()}
    single = {name for name, _ in kinds if sum(1 for other, _ in kinds if other == name) == 1}
    plain = [{name: record[name] for name in record if name in single} for record in records]
    plain = [{n: v for n, v in r.items() if isinstance(v, (str, bool)) or v is None} for r in plain]
    _, left = fit_records(plain, infer_record_schema(plain))
    assert left == [None] * len(plain)


def test_inferred_types() -> None:
    records = [
        {
            "i": 1,
            "f": 1,
            "b": True,
            "s": "x",
            "l": [1],
            "n": [[1.5]],
            "d": {"a": 1},
            "m": 1,
            "big": 2**64,
            "e": [],
            "x": None,
        },
        {
            "i": None,
            "f": 0.5,
            "b": None,
            "s": float("nan"),
            "l": None,
            "n": [],
            "d": None,
            "m": "a",
            "big": 1,
            "ld": [{}],
        },
    ]
    assert {item.name: str(item.type) for item in infer_record_schema(records)} == {
        "i": "int64", "f": "double", "b": "bool", "s": "string", "l": "list<item: int64>",
        "n": "list<item: list<item: double>>", "d": "string", "m": "string", "big": "double", "e": "list<item: string>",
        "x": "string", "ld": "string",
    }  # fmt: skip


def test_widening_but_no_change_of_kind() -> None:
    frozen = pa.schema(
        [
            ("i", pa.int64()),
            ("f", pa.float32()),
            ("s", pa.string()),
            ("t", pa.timestamp("us")),
            ("l", pa.list_(pa.string())),
        ]
    )
    batch = pa.record_batch(
        {
            "i": pa.array([1, 2, 2**40], pa.uint64()),
            "f": pa.array([0.1, 0.5, None], pa.float64()),
            "s": pa.array([1, None, 3], pa.int8()),
            "t": pa.array([1_700_000_000_000, None, 5], pa.timestamp("ms")),
            "l": pa.array([["a"], None, []], pa.large_list(pa.large_string())),
        }
    )
    columns, left = fit_batch(batch, frozen)
    assert [column.type for column in columns] == [item.type for item in frozen]
    assert columns[0].to_pylist() == [1, 2, 2**40]
    assert columns[4].to_pylist() == [["a"], None, []]
    assert columns[1].null_count == columns[2].null_count == 3
    assert [json.loads(text) if text else None for text in left or []] == [{"f": 0.1, "s": 1}, {"f": 0.5}, {"s": 3}]
    same_columns, nothing = fit_batch(pa.record_batch(columns, schema=frozen), frozen)
    assert nothing is None
    assert same_columns == columns


@given(
    st.lists(
        st.one_of(st.none(), st.text(max_size=3), st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=3)),
        max_size=12,
    )
)
@settings(max_examples=60, deadline=None)
def test_caption_lists(values: list[Any]) -> None:
    lists = [[value] if isinstance(value, str) else value for value in values]
    wanted = [[text for text in value or [] if text and text.strip()] or None for value in lists]
    for kind in (pa.list_(pa.string()), pa.large_list(pa.large_string())):
        column = pa.array(lists, kind)
        assert strip(caption_lists(column)) == strip(pa.array(wanted, pa.list_(pa.string())))
        assert strip(caption_lists(column.slice(len(lists) // 2))) == wanted[len(lists) // 2 :]
    texts = [value if isinstance(value, str) else None for value in values]
    wanted = [[text] if text and text.strip() else None for text in texts]
    for column in (
        pa.array(texts, pa.string()),
        pa.array(texts, pa.large_string()),
        pa.array(texts, pa.string()).dictionary_encode(),
    ):
        assert strip(caption_lists(column)) == wanted


def strip(column: pa.Array) -> list[Any]:
    assert column.type == pa.list_(pa.string())
    return list(column.to_pylist())


def test_names() -> None:
    schema = pa.schema([("cf_x", pa.int8())])
    with pytest.raises(RefusedError, match="cf_x"):
        freeze(schema)
    kept = freeze(
        pa.schema([("cf_prev_uid", pa.int8()), ("a", pa.int8()), ("cf_uid", pa.string()), ("cf_prev_a", pa.int8())])
    )
    assert kept.names == ["cf_prev_uid", "a", "cf_prev_a"]
    assert kept.field("cf_prev_uid").type == pa.string()
