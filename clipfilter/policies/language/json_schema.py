"""The policy language as a JSON Schema, generated from its models, so that editors complete keys and mark mistakes.

It is a help while writing: what it passes may still be refused when it is loaded (two rules of one id, a threshold that
cannot belong to its rule), but every policy that loads passes.
"""

from __future__ import annotations

from typing import Any

from clipfilter.policies.kinds.registry import KINDS
from clipfilter.policies.language.schema import Policy
from clipfilter.policies.parts.fields import TEXT_OR_TEXTS, TEXTS, VARIABLE

_VALUE: dict[str, Any] = {"type": ["string", "number", "boolean"]}
#: Keys whose values are never variables.
_LITERAL = ("policy", "version", "calibrations")
#: The keys that are gone once a policy is put together.
_BUILDING: dict[str, Any] = {
    "extends": {**TEXT_OR_TEXTS, "description": "Packs or files whose rules come first; merged by id."},
    "remove": {**TEXTS, "description": "Ids of rules of the extended policies to leave out."},
    "variables": {
        "type": "object",
        "propertyNames": {"pattern": "^[A-Za-z][A-Za-z0-9_-]{0,63}$"},
        "additionalProperties": {"anyOf": [_VALUE, {"type": "array", "items": _VALUE}]},
        "description": 'Values for "${name}", alone or within a text.',
    },
}


def policy_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a policy file."""
    made = Policy.model_json_schema(mode="validation")
    definitions: dict[str, Any] = made.pop("$defs")
    # What is written as a word or a list stands where it is used, like any other value.
    written = {name: definitions.pop(name) for name, own in [*definitions.items()] if "properties" not in own}
    made = _settled(made, written, _LITERAL)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "clipfilter policy",
        "description": "What to keep, review and reject; see docs/reference/policy.md.",
        "type": "object",
        "properties": made["properties"] | _BUILDING,
        "additionalProperties": False,
        "required": ["policy", "version"],
        # A rule that changes one of the base's needs no kind of its own.
        "if": {"required": ["extends"]},
        "else": {
            "required": ["rules"],
            "properties": {"rules": {"items": {"oneOf": [{"required": [kind]} for kind in KINDS]}}},
        },
        "$defs": {name: _settled(own, written) for name, own in definitions.items()},
    }


def _settled(schema: Any, written: dict[str, Any], literal: tuple[str, ...] = ()) -> Any:
    """A schema for people who write: its models without titles and nulls, with variables for values.

    written: definitions that take the place of references to them. literal: keys whose values are never variables.
    """
    if isinstance(schema, list):
        return [_settled(part, written) for part in schema]
    if not isinstance(schema, dict):
        return schema
    name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
    if name in written:
        return _settled({**written[name], **{key: schema[key] for key in schema if key != "$ref"}}, written)
    found = {key: _settled(part, written) for key, part in schema.items()}
    if "title" in schema and "properties" in schema:  # a model
        found = {key: part for key, part in found.items() if key not in ("title", "description")}
        found["properties"] = {
            key: _value(part, variable=key not in literal) for key, part in found["properties"].items()
        }
    return found


def _value(schema: dict[str, Any], *, variable: bool) -> dict[str, Any]:
    """The schema of a key, which may be left out but is never null, or of the variable that stands for it."""
    said = {"description": schema["description"]} if "description" in schema else {}
    schema = {key: value for key, value in schema.items() if key not in ("default", "title", "description")}
    parts = [part for part in schema.get("anyOf", ()) if part != {"type": "null"}]
    if parts:
        schema = {**parts[0]} if len(parts) == 1 else {**schema, "anyOf": parts}
    texts = schema.get("type") in ("string", "object") and "enum" not in schema
    return (schema if "$ref" in schema or texts or not variable else {"anyOf": [schema, VARIABLE]}) | said
