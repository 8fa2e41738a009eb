"""The policy language as a JSON Schema, generated from its models, so that editors complete keys and mark mistakes.

It is a help while writing: what it passes may still be refused when it is loaded (two rules of one id, a threshold that
cannot belong to its rule), but every policy that loads passes.
"""

from __future__ import annotations

from typing import Any

from clipfilter.policies.kinds import PIXELS
from clipfilter.policies.language.about import SAFESEARCH
from clipfilter.policies.language.schema import KINDS, Policy
from clipfilter.policies.prompts import TEMPLATES

_TEXT: dict[str, Any] = {"type": "string"}
_TEXTS: dict[str, Any] = {"type": "array", "items": _TEXT, "minItems": 1}
_VARIABLE: dict[str, Any] = {"type": "string", "pattern": r"^\$\{[A-Za-z][A-Za-z0-9_-]*\}$"}
_SHA256: dict[str, Any] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_FILE: dict[str, Any] = {
    "anyOf": [
        _TEXT,
        {
            "type": "object",
            "properties": {"file": _TEXT, "sha256": _SHA256},
            "additionalProperties": False,
            "minProperties": 1,
        },
    ]
}
_TEXT_OR_TEXTS: dict[str, Any] = {"anyOf": [_TEXT, _TEXTS]}
_TEXTS_OR_FILE: dict[str, Any] = {"anyOf": [_TEXTS, *_FILE["anyOf"]]}
_PHRASES: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _TEXT,
            {
                "type": "object",
                "properties": {"text": _TEXT, "weight": {"type": "number", "exclusiveMinimum": 0}},
                "required": ["text"],
                "additionalProperties": False,
            },
        ]
    },
}
_TEMPLATES: dict[str, Any] = {
    "anyOf": [{"enum": list(TEMPLATES)}, {**_TEXTS, "items": {"type": "string", "pattern": r"\{\}"}}]
}
_CATEGORIES: dict[str, Any] = {"type": "object", "additionalProperties": _TEXTS, "minProperties": 1}

#: What the checks before pydantic's own accept besides, or instead of, the type they end in.
_WRITTEN: dict[str, dict[str, dict[str, Any]]] = {
    "Policy": {"templates": _TEMPLATES},
    "Rule": {"templates": _TEMPLATES, "pixels": {"enum": list(PIXELS)}},
    "Concept": {
        "any_of": _PHRASES, "but_not": _PHRASES, "vectors": _FILE, "generic": {"type": ["boolean", "integer"]},
    },
    "Safety": {"file": _FILE},
    "Text": {"language": _TEXT_OR_TEXTS, "matches": _TEXT_OR_TEXTS, "block_list": _TEXTS_OR_FILE},
    "Known": {"sha256": _TEXTS_OR_FILE, "phash": _TEXTS_OR_FILE},
    "Interchange": {
        "openai": _CATEGORIES, "rekognition": _CATEGORIES,
        "safesearch": {**_CATEGORIES, "propertyNames": {"enum": list(SAFESEARCH)}},
    },
}  # fmt: skip
#: What an editor says about a key.
_DESCRIPTIONS: dict[str, dict[str, str]] = {
    "Policy": {
        "policy": "The policy's name: letters, digits, - and _.",
        "version": "A whole number; raise it with every change.",
        "templates": "Prompt ensemble of the concept rules: a name, or texts that hold {} once.",
        "rules": "The decision is the worst that any rule says.",
        "on_missing": "What happens where a rule cannot be evaluated, for example without a caption.",
        "calibrations": "Thresholds that belong to one model, written by `clipfilter policy calibrate`.",
        "overrides": "Human decisions by cf_uid; they win over the rules.",
        "tests": "What `clipfilter policy test` checks.",
        "interchange": "Which rules stand for which category in the answers of other services.",
    },
    "Rule": {
        "id": "Names the score's column, cf_score.<id>.",
        "concept": "Something told in words, against what it is mistaken for.",
        "alignment": "Cosine of image and caption; write alignment: {}.",
        "head": "A small model on the embedding, by name or file:/path.",
        "metadata": "A number of the row: min_side, aspect_ratio, caption_words, or a source column.",
        "fraction": "Ranks the whole dataset by an earlier rule's score.",
        "review": "Scores that send the row to people.",
        "reject": "Scores that throw the row out.",
    },
    "Concept": {
        "any_of": "Phrases of which one must be seen.",
        "but_not": "Near misses: what the concept is mistaken for.",
        "generic": "Also stand against ordinary things (true), none (false), or a version of that list.",
        "background": "Also stand against a fixed cosine: what the model gives to things that have nothing to do with it.",
    },
}


def policy_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a policy file."""
    made = Policy.model_json_schema(by_alias=True, mode="validation")
    definitions: dict[str, Any] = made.pop("$defs")
    root = {key: made[key] for key in ("type", "properties", "additionalProperties")}
    for name, definition in (("Policy", root), *definitions.items()):
        _settle(name, definition)
    definitions["Band"] |= {"minProperties": 1, "maxProperties": 1}
    expectation = definitions["Expectation"]["properties"]
    outcome = definitions["RuleExpectation"]["properties"]["band"]
    expectation["rules"] = {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {"anyOf": [outcome, {"$ref": "#/$defs/RuleExpectation"}]},
    }
    head = {"anyOf": [_TEXT, {"$ref": "#/$defs/Head"}]}
    definitions["Rule"]["properties"]["head"] = head
    definitions["Rule"]["required"] = ["id"]
    overrides = root["properties"]["overrides"]
    rows = {"type": "array", "items": {"$ref": "#/$defs/Override"}}
    root["properties"]["overrides"] = {"anyOf": [rows, *_FILE["anyOf"]], **_described(overrides)}
    root["properties"] |= _building()
    for unused in {"Listed", "Overrides", "Attachment"} & set(definitions):
        del definitions[unused]
    one_kind = {"oneOf": [{"required": [kind]} for kind in KINDS]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "clipfilter policy",
        "description": "What to keep, review and reject; see docs/reference/policy.md.",
        **root,
        "required": ["policy", "version"],
        # A rule that changes one of the base's needs no kind of its own.
        "if": {"required": ["extends"]},
        "else": {"required": ["rules"], "properties": {"rules": {"items": one_kind}}},
        "$defs": definitions,
    }


def _settle(name: str, definition: dict[str, Any]) -> None:
    """One model: what may be written, no nulls, variables for values, words for the editor."""
    definition.pop("title", None)
    for key, schema in definition.get("properties", {}).items():
        written = _WRITTEN.get(name, {}).get(key) or _without_null(schema)
        if (name, key) not in (("Policy", "policy"), ("Policy", "version"), ("Policy", "calibrations")):
            written = _or_variable(written)
        said = _DESCRIPTIONS.get(name, {}).get(key)
        definition["properties"][key] = {**written, **({"description": said} if said else {})}


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema of an optional key: it may be left out, and is never null."""
    schema = {key: value for key, value in schema.items() if key not in ("default", "title")}
    parts = [part for part in schema.get("anyOf", ()) if part != {"type": "null"}]
    return parts[0] if len(parts) == 1 else schema


def _or_variable(schema: dict[str, Any]) -> dict[str, Any]:
    """A value, or the variable that stands for it."""
    if "$ref" in schema or (schema.get("type") in ("string", "object") and "enum" not in schema):
        return schema
    return {"anyOf": [schema, _VARIABLE]}


def _described(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("description",) if key in schema}


def _building() -> dict[str, Any]:
    """The keys that are gone once a policy is put together."""
    value = {"type": ["string", "number", "boolean"]}
    return {
        "extends": {**_TEXT_OR_TEXTS, "description": "Packs or files whose rules come first; merged by id."},
        "remove": {**_TEXTS, "description": "Ids of rules of the extended policies to leave out."},
        "variables": {
            "type": "object",
            "propertyNames": {"pattern": "^[A-Za-z][A-Za-z0-9_-]{0,63}$"},
            "additionalProperties": {"anyOf": [value, {"type": "array", "items": value}]},
            "description": 'Values for "${name}", alone or within a text.',
        },
    }
