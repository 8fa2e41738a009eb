"""Checked values of the policy language: phrases, templates, hashes, thresholds, as annotated types."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, WithJsonSchema

from clipfilter.decisions import LIMITS, Limit
from clipfilter.policies.parts.fields import (
    TEXTS,
    WEIGHED_PHRASES,
    choice,
    fail,
    identifier,
    number,
    shown,
    suggest,
    text,
    within,
)
from clipfilter.policies.prompts import GENERIC_NEGATIVES, GENERIC_VERSION, TEMPLATES

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
