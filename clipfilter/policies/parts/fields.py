"""What every model of the policy language is made of: refusals with a place, checked values as annotated types, and what may be
written for values that end as another type, as JSON Schema.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, WithJsonSchema
from pydantic_core import PydanticCustomError

from clipfilter.decisions import LIMITS, Limit
from clipfilter.policies.prompts import GENERIC_NEGATIVES, GENERIC_VERSION, TEMPLATES

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")


def fail(message: str, *at: str | int, key: bool = False) -> NoReturn:
    """Refuse with one sentence; `at` is the path below the model being validated, `key` points at the key itself."""
    raise PydanticCustomError("policy", "{message}", {"message": message, "at": at, "at_key": key})


@contextmanager
def within(*at: str | int) -> Iterator[None]:
    """Put `at` before the place of whatever is refused inside."""
    try:
        yield
    except PydanticCustomError as error:
        found = error.context or {}
        fail(str(found["message"]), *at, *found["at"], key=found["at_key"])


def shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def identifier(value: Any) -> Any:
    if not isinstance(value, str) or not _ID.match(value):
        fail(
            f"{shown(value)} is not a name: use 1 to 64 letters, digits, '-' and '_', beginning with a letter or digit"
        )
    return value


def number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        fail(f"{shown(value)} is not a number")
    if not math.isfinite(value):
        fail(f"{value} is not a threshold; write a finite number")
    if abs(value) > 3e38:
        fail(f"{value} is too large for a float32 score")
    return float(value)


def text(what: str, limit: int) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, str):
            fail(f"{what} must be text, not {shown(value)}; put it in quotes if it is meant as text")
        if not value.strip():
            fail(f"{what} is empty")
        if len(value) > limit:
            fail(f"{what} has {len(value):,} characters, more than the {limit} allowed")
        return value

    return check


def choice(what: str, *values: str) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value not in values:
            fail(f"{what} is {shown(value)}, but must be one of {', '.join(values)}" + suggest(value, values))
        return value

    return check


def suggest(value: Any, known: Any) -> str:
    """ "; did you mean 'x'?" for the nearest of the `known` names, else an empty text."""
    import difflib

    close = difflib.get_close_matches(str(value)[:64].lower(), list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def written_as(shape: Callable[[dict[str, Any]], dict[str, Any]]) -> ConfigDict:
    """For a model that is written otherwise than as a map: its JSON Schema, given the one of the map."""

    def change(schema: dict[str, Any]) -> None:
        made = shape(dict(schema))
        schema.clear()
        schema.update(made)

    return ConfigDict(json_schema_extra=change)


class Model(BaseModel):
    """Base of every part of the language: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=False)


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


MAX_PHRASES = 256
MAX_PHRASE_CHARS = 300
MAX_TEMPLATES = 100

OnMissing = Literal[Limit, "keep"]

_TEMPLATES: dict[str, Any] = {
    "anyOf": [{"enum": list(TEMPLATES)}, {**TEXTS, "items": {"type": "string", "pattern": r"\{\}"}}]
}
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2_000_000_000:
        fail(f"{shown(value)} is not a whole number")
    return value


def _sha256(value: Any) -> Any:
    if not isinstance(value, str) or not _SHA256.match(value):
        fail(f"{shown(value)} is not a sha256 (64 lower-case hex digits)")
    return value


def phrases(value: Any) -> Any:
    if isinstance(value, str):
        fail(f'this must be a list of phrases; write ["{value[:40]}"]')
    if not isinstance(value, list | tuple):
        fail(f"this must be a list of phrases, not {shown(value)}")
    if not value:
        fail("the list of phrases is empty")
    if len(value) > MAX_PHRASES:
        fail(f"there are {len(value)} phrases, more than the {MAX_PHRASES} allowed", MAX_PHRASES)
    seen: dict[str, int] = {}
    for position, phrase in enumerate(value):
        with within(position):
            text("a phrase", MAX_PHRASE_CHARS)(phrase)
        folded = same_phrase(phrase)
        if folded in seen:
            fail(f"the phrase {shown(phrase)} is in the list twice", position)
        seen[folded] = position
    return tuple(" ".join(phrase.split()) for phrase in value)


def same_phrase(phrase: str) -> str:
    """What two phrases are compared by: case and spacing make no difference to a text encoder worth the name."""
    return " ".join(phrase.split()).casefold()


def _templates(value: Any) -> Any:
    if isinstance(value, str):
        if value not in TEMPLATES:
            names = ", ".join(TEMPLATES)
            fail(
                f"{shown(value)} is no prompt ensemble (there are {names}; or give a list)" + suggest(value, TEMPLATES)
            )
        return TEMPLATES[value]
    if not isinstance(value, list | tuple) or not value:
        fail(f"templates must be one of {', '.join(TEMPLATES)}, or a list of texts that hold {{}}")
    if len(value) > MAX_TEMPLATES:
        fail(f"there are {len(value)} templates, more than the {MAX_TEMPLATES} allowed", MAX_TEMPLATES)
    for position, template in enumerate(value):
        if not isinstance(template, str):
            fail(f"a template must be text, not {shown(template)}", position)
        if len(template) > MAX_PHRASE_CHARS:
            fail(f"a template has {len(template):,} characters, more than the {MAX_PHRASE_CHARS} allowed", position)
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            fail(f"the template {shown(template)} must hold {{}} exactly once, and no other braces", position)
    if len(set(value)) != len(value):
        fail("the same template is in the list twice")
    return tuple(value)


def _generic(value: Any) -> Any:
    if value is True:
        return GENERIC_VERSION
    if value is False:
        return 0
    if not isinstance(value, int) or value not in GENERIC_NEGATIVES:
        versions = ", ".join(str(version) for version in GENERIC_NEGATIVES)
        fail(f"generic is {shown(value)}, but must be true, false or the version of a list ({versions})")
    return value


def _numbers(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        fail(f"this must be a list of numbers, not {shown(value)}")
    return tuple(number(item) for item in value)


Identifier = Annotated[str, BeforeValidator(identifier)]
Number = Annotated[float, BeforeValidator(number)]
Whole = Annotated[int, BeforeValidator(_whole)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
Sha256 = Annotated[str, BeforeValidator(_sha256)]
Phrases = Annotated[tuple[str, ...], BeforeValidator(phrases)]
#: Phrases that may be written with a weight, which is taken off before they come here.
WeighedPhrases = Annotated[tuple[str, ...], BeforeValidator(phrases), WithJsonSchema(WEIGHED_PHRASES)]
Templates = Annotated[tuple[str, ...], BeforeValidator(_templates), WithJsonSchema(_TEMPLATES)]
Generic = Annotated[int, BeforeValidator(_generic), WithJsonSchema({"type": ["boolean", "integer"]})]
Missing = Annotated[OnMissing, BeforeValidator(choice("on_missing", *LIMITS, "keep"))]
