"""What may be written for values that end as another type, as JSON Schema: beside the checks that read them."""

from __future__ import annotations

from typing import Any

TEXT: dict[str, Any] = {"type": "string"}
TEXTS: dict[str, Any] = {"type": "array", "items": TEXT, "minItems": 1}
TEXT_OR_TEXTS: dict[str, Any] = {"anyOf": [TEXT, TEXTS]}
#: What stands for a value.
VARIABLE: dict[str, Any] = {"type": "string", "pattern": r"^\$\{[A-Za-z][A-Za-z0-9_-]*\}$"}
SHA256: dict[str, Any] = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_NAMED_FILE: dict[str, Any] = {
    "type": "object",
    "properties": {"file": TEXT, "sha256": SHA256},
    "additionalProperties": False,
    "minProperties": 1,
}
FILE: dict[str, Any] = {"anyOf": [TEXT, _NAMED_FILE]}
TEXTS_OR_FILE: dict[str, Any] = {"anyOf": [TEXTS, TEXT, _NAMED_FILE]}
_WEIGHED: dict[str, Any] = {
    "type": "object",
    "properties": {"text": TEXT, "weight": {"type": "number", "exclusiveMinimum": 0}},
    "required": ["text"],
    "additionalProperties": False,
}
WEIGHED_PHRASES: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": [TEXT, _WEIGHED]}}
