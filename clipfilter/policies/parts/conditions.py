"""`when:` conditions on columns: checked when a policy is read, answered for whole columns with three values.

A condition is true, false or unknown (the column has no value); `not`, `all` and `any` follow Kleene's logic, so what
is unknown stays unknown unless the rest decides alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial, reduce
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import PlainValidator, WithJsonSchema

from clipfilter.errors import RefusedError
from clipfilter.policies.parts.columns import BUILTINS, column_type, is_numeric, is_text, metadata_values
from clipfilter.policies.parts.fields import fail, number, shown, suggest

MAX_DEPTH = 8
MAX_VALUES = 1000
_COMPARISONS = ("is", "above", "below", "present")
_KEYS = ("column", *_COMPARISONS, "all", "any", "not")


def _condition(value: Any) -> dict[str, Any]:
    return _checked(value, ())


def _checked(value: Any, at: tuple[str | int, ...]) -> dict[str, Any]:
    """The condition in its one form: `is` a list, numbers as float; refused with the place below `when`."""
    if len(at) > 2 * MAX_DEPTH:
        fail(f"the condition is nested more than {MAX_DEPTH} levels deep", *at)
    if not isinstance(value, dict):
        fail(f"a condition is a map, for example {{column: source, is: [a, b]}}, not {shown(value)}", *at)
    for key in value:
        if key not in _KEYS:
            fail(
                f"unknown key {str(key)[:60]!r} in a condition" + (suggest(key, _KEYS) or f"; {', '.join(_KEYS)}"),
                *at, key, key=True,
            )  # fmt: skip
    kinds = [key for key in ("column", "all", "any", "not") if key in value]
    if len(kinds) != 1:
        fail("a condition has exactly one of column, all, any and not", *at)
    kind = kinds[0]
    if kind != "column":
        if len(value) > 1:
            other = next(key for key in value if key != kind)
            fail(f"{other!r} belongs to a column, not beside {kind!r}", *at, other, key=True)
        if kind == "not":
            return {"not": _checked(value["not"], (*at, "not"))}
        parts = value[kind]
        if not isinstance(parts, list | tuple) or not parts:
            fail(f"{kind!r} takes a list of conditions", *at, kind)
        return {kind: [_checked(part, (*at, kind, place)) for place, part in enumerate(parts)]}
    return _leaf(value, at)


def _leaf(value: dict[str, Any], at: tuple[str | int, ...]) -> dict[str, Any]:
    name = value["column"]
    if not isinstance(name, str) or not name.strip() or len(name) > 200:
        fail(f"column must be the name of a column, not {shown(name)}", *at, "column")
    given = [key for key in _COMPARISONS if key in value]
    if not given or (len(given) > 1 and given != ["above", "below"]):
        fail("a column is compared with is, above, below (or both) or present", *at)
    result: dict[str, Any] = {"column": name}
    if "present" in value:
        if not isinstance(value["present"], bool):
            fail(f"present is true or false, not {shown(value['present'])}", *at, "present")
        result["present"] = value["present"]
    if "is" in value:
        wanted = value["is"] if isinstance(value["is"], list | tuple) else [value["is"]]
        if not wanted or len(wanted) > MAX_VALUES:
            fail(f"is takes 1 to {MAX_VALUES} values", *at, "is")
        kinds = {bool if isinstance(item, bool) else str if isinstance(item, str) else float for item in wanted}
        for place, item in enumerate(wanted):
            if not isinstance(item, str | bool | int | float):
                fail(f"is compares with texts, numbers or true and false, not {shown(item)}", *at, "is", place)
        if len(kinds) > 1:
            fail("the values of is must all be texts, all numbers, or all true or false", *at, "is")
        result["is"] = [item if isinstance(item, str | bool) else number(item) for item in wanted]
    for key in ("above", "below"):
        if key in value:
            if isinstance(value[key], bool) or not isinstance(value[key], int | float):
                fail(f"{shown(value[key])} is not a number", *at, key)
            result[key] = number(value[key])
    if "above" in result and "below" in result and result["above"] >= result["below"]:
        fail(f"nothing is above {result['above']:g} and below {result['below']:g}", *at, "above")
    return result


_LEAF_SCHEMA = {
    "type": "object",
    "properties": {
        "column": {"type": "string", "description": "A column of the source, or a metadata name such as width."},
        "is": {"description": "The value, or a list of values, that the column may have."},
        "above": {"type": "number"},
        "below": {"type": "number"},
        "present": {"type": "boolean"},
        "all": {"type": "array", "items": {"type": "object"}},
        "any": {"type": "array", "items": {"type": "object"}},
        "not": {"type": "object"},
    },
    "additionalProperties": False,
}
Condition = Annotated[dict[str, Any], PlainValidator(_condition), WithJsonSchema(_LEAF_SCHEMA)]


def leaves(condition: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every comparison of a column in the condition."""
    if "column" in condition:
        yield condition
    for key in ("all", "any"):
        for part in condition.get(key, ()):
            yield from leaves(part)
    if "not" in condition:
        yield from leaves(condition["not"])


def check_condition(condition: dict[str, Any], schema: pa.Schema) -> None:
    """Refuse a condition that data with this schema can never answer."""
    for leaf in leaves(condition):
        name = leaf["column"]
        if name in BUILTINS:
            kind: pa.DataType = pa.float64()
        else:
            hint = partial(suggest, name, [*BUILTINS, *schema.names])
            kind = column_type(name, schema, "the condition", hint)
        if "present" in leaf:
            continue
        wants_text = isinstance(leaf.get("is", [0.0])[0], str)
        if wants_text != is_text(kind) or not (wants_text or is_numeric(kind)):
            what = "a text" if wants_text else "a number"
            raise RefusedError(f"the condition compares {name!r} with {what}, but the column holds {kind}")


def truth(condition: dict[str, Any], table: pa.Table) -> np.ndarray:
    """int8 [n]: 1 where the condition holds, 0 where it does not, -1 where a missing value leaves it open."""
    return np.asarray(pc.fill_null(pc.cast(_holds(condition, table), pa.int8()), -1))


def _holds(condition: dict[str, Any], table: pa.Table) -> pa.Array:
    """bool [n], null where it is open; Arrow's own Kleene logic, as of the conditions after --where."""
    if "not" in condition:
        return pc.invert(_holds(condition["not"], table))
    for key, join in (("all", pc.and_kleene), ("any", pc.or_kleene)):
        if key in condition:
            return reduce(join, (_holds(part, table) for part in condition[key]))
    return _compare(condition, table)


def _compare(leaf: dict[str, Any], table: pa.Table) -> pa.Array:
    check_condition(leaf, table.schema)
    name = leaf["column"]
    if name not in BUILTINS:
        column = table.column(name).combine_chunks()
        if pa.types.is_dictionary(column.type):
            column = pc.cast(column, column.type.value_type)
        if "present" in leaf:
            return pc.equal(column.is_valid(), leaf["present"])
        if isinstance(leaf.get("is", [0.0])[0], str):
            hit = pc.is_in(column, value_set=pa.array(leaf["is"], column.type))
            return pc.if_else(column.is_valid(), hit, pa.scalar(None, pa.bool_()))
    values = metadata_values(name, table)
    unknown = np.isnan(values)
    if "present" in leaf:
        return pa.array(unknown != leaf["present"])
    with np.errstate(invalid="ignore"):
        hit = np.isin(values, np.array(leaf["is"], dtype=np.float64)) if "is" in leaf else np.ones(len(values), bool)
        if "above" in leaf:
            hit &= values > leaf["above"]
        if "below" in leaf:
            hit &= values < leaf["below"]
    return pa.array(hit, mask=unknown)


def in_words(condition: dict[str, Any]) -> str:
    """The condition as part of a sentence."""
    if "not" in condition:
        return f"not ({in_words(condition['not'])})"
    for key, joint in (("all", " and "), ("any", " or ")):
        if key in condition:
            return joint.join(
                f"({in_words(part)})" if "column" not in part else in_words(part) for part in condition[key]
            )
    name = condition["column"]
    if "present" in condition:
        return f"{name} {'has a' if condition['present'] else 'has no'} value"
    if "is" in condition:
        values = [value if isinstance(value, str) else f"{value:g}" for value in condition["is"]]
        return f"{name} is {' or '.join(values[:8])}" + (
            f" (or one of {len(values) - 8} more)" if len(values) > 8 else ""
        )
    limits = [f"{key} {condition[key]:g}" for key in ("above", "below") if key in condition]
    return f"{name} is {' and '.join(limits)}"
