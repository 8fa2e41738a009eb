"""Conditions on columns: the same rows as SQLite gives, and a sentence for everything that is no condition."""

from __future__ import annotations

import sqlite3
from datetime import datetime

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter.errors import RefusedError
from clipfilter.search import parse_where

TABLE = pa.table(
    {
        "width": pa.array([1, 200, None, 300, 301, -5], pa.int32()),
        "big": pa.array([0, 1, 2, 2**63 - 1, None, 7], pa.int64()),
        "cf_score.off-caption": pa.array([0.1, 0.25, None, 0.5, 1.0, -0.5], pa.float32()),
        "caption": pa.array(["a cat", "it's 100%", None, "a_b", "", "A CAT"], pa.string()),
        "cf_decision": pa.array(["keep", "review", "reject", None, "keep", "keep"], pa.string()).dictionary_encode(),
        "flag": pa.array([True, False, None, True, False, True]),
    }
)
CONDITIONS = [
    "width > 300",
    "width >= 300 AND cf_decision = 'keep'",
    "cf_decision = 'keep' or width < 2 and not flag",
    "(cf_decision = 'keep' or width < 2) and not flag",
    "not (width = 1)",
    "not not width = 1",
    "width != 200",
    "width <> 200",
    "width in (1, 300, 999)",
    "width not in (1, 300)",
    "width IN (1, 200.5, 300)",
    "width between 200 and 300",
    "width not between 1 and 299.5",
    "caption like 'a%'",
    "caption like '_ cat'",
    "caption not like '%c%'",
    "caption = 'it''s 100%'",
    "caption is null or caption = ''",
    "cf_decision is not null",
    '"cf_score.off-caption" >= 0.25',
    '"cf_score.off-caption" < -1e-3',
    '"cf_score.off-caption" = .5',
    "flag",
    "flag = false and width > 0",
    "width < big",
    "big = 9223372036854775807",
    "big > 9223372036854775806.5",
    "big < 18446744073709551616",
    "width > -10 and width < +10",
    '"width" = 1',
    "cf_decision in ('keep', 'review') and caption is not null",
]


def rows(condition: str) -> list[int]:
    held = ds.dataset(TABLE).to_table(columns={"held": parse_where(condition, TABLE.schema)})["held"]
    return [row for row, value in enumerate(pc.fill_null(held, False).to_pylist()) if value]


@pytest.fixture(scope="module")
def sqlite() -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.execute("PRAGMA case_sensitive_like = ON")
    names = ", ".join(f'"{name}"' for name in TABLE.column_names)
    connection.execute(f"CREATE TABLE t ({names})")
    connection.executemany(f"INSERT INTO t VALUES ({', '.join('?' * TABLE.num_columns)})",
                           [tuple(row.values()) for row in TABLE.to_pylist()])  # fmt: skip
    return connection


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions_hold_for_the_rows_that_sqlite_finds(condition: str, sqlite: sqlite3.Connection) -> None:
    expected = [row - 1 for (row,) in sqlite.execute(f"SELECT rowid FROM t WHERE {condition}")]
    assert rows(condition) == expected


_TEST = st.sampled_from(["width > 200", "flag", "caption is null", "cf_decision = 'keep'", "big in (1, 7)"])
_CONDITION = st.recursive(
    _TEST,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join),
        inner.map(lambda text: f"not {text}"),
        inner.map(lambda text: f"({text})"),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(condition=_CONDITION)
def test_precedence_and_nulls_are_those_of_sql(condition: str, sqlite: sqlite3.Connection) -> None:
    expected = [row - 1 for (row,) in sqlite.execute(f"SELECT rowid FROM t WHERE {condition}")]
    assert rows(condition) == expected


def test_names_with_dots_and_hyphens_need_no_quotes() -> None:
    assert rows("cf_score.off-caption >= 0.25") == rows('"cf_score.off-caption" >= 0.25') == [1, 3, 4]
    assert rows("`cf_score.off-caption` >= 0.25") == [1, 3, 4]


def test_times_compare_with_text() -> None:
    table = pa.table({"seen": pa.array([datetime(2026, 1, day) for day in (1, 2, 3)], pa.timestamp("ms"))})
    held = ds.dataset(table).to_table(columns={"held": parse_where("seen > '2026-01-02'", table.schema)})
    assert held["held"].to_pylist() == [False, False, True]
    with pytest.raises(RefusedError, match="is no timestamp"):
        parse_where("seen > 'yesterday'", table.schema)


def test_unsigned_columns_take_any_number() -> None:
    table = pa.table({"hash": pa.array([0, 2**64 - 1], pa.uint64()), "small": pa.array([3, 255], pa.uint8())})
    for condition, expected in {
        "hash > 18446744073709551614": [False, True],
        "hash > -1": [True, True],
        "small < 300": [True, True],
        "small < hash": [False, True],
    }.items():
        held = ds.dataset(table).to_table(columns={"held": parse_where(condition, table.schema)})["held"]
        assert held.to_pylist() == expected, condition


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ("", "the condition is empty"),
        ("widht > 3", "did you mean 'width'"),
        ("off-caption > 3", "cannot be read from '-caption"),
        ("decision = 'keep'", "did you mean 'cf_decision'"),
        ("nothing_like_it = 1", "there are width, big"),
        ("caption = 3", "wants a text in single quotes"),
        ("width = '3'", "wants a number"),
        ("width = null", "IS NULL"),
        ("width =", "where it ends"),
        ("(width = 1", "wants '\\)'"),
        ("width = 1 width = 2", "wants and, or"),
        ("caption = 'abc", "a quote is opened and not closed"),
        ('caption = "abc"', "did you mean|which the rows do not have"),
        ("width = 1; drop table t", "cannot be read from ';"),
        ("__import__('os').system('id')", "cannot be read from"),
        ("'width' = 1", "single quotes, which hold text"),
        ("width like 'a'", "LIKE is for text"),
        ("width = caption", "cannot be compared"),
        ("not", "wants the name of a column"),
        ("width", "wants =, !=, <"),
        ("list = 1", "cannot compare"),
        ("twice = 1", "ambiguous"),
        ("(" * 70 + "width = 1" + ")" * 70, "nested more than"),
        ("width in (" + ", ".join(map(str, range(300))) + ")", "more than 200 values"),
        ("width = 1 or " * 1000 + "width = 1", "characters, more than"),
        ("width > " + "9" * 9000, "larger than any"),
        ("width in (1, -" + "9" * 9000 + ")", "larger than any"),
        ("width > 1e999999", "larger than any"),
        ("big between 1 and 1." + "9" * 4000 + "e400", "larger than any"),
        ("width > 1" + "1" * 9900 + "x", "cannot be read from"),  # in milliseconds: digits are read once
    ],
)
def test_what_is_no_condition_is_refused_with_a_sentence(condition: str, sentence: str) -> None:
    schema = pa.schema([*TABLE.schema, ("list", pa.list_(pa.int32())), ("twice", pa.int32()), ("twice", pa.int32())])
    with pytest.raises(RefusedError, match=sentence):
        parse_where(condition, schema)


def test_long_conditions_are_evaluated() -> None:
    assert rows(" or ".join(["width = 1"] * 600)) == [0]
    assert rows("not " * 1000 + "width = 1") == [0]
