"""What a policy file says about itself: its card, its tests, and its names in the answers of moderation services.

None of it changes a decision, so none of it is part of the policy's canonical form or hash.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from clipfilter.decisions import DECISIONS, Decision
from clipfilter.policies.parts.fields import (
    TEXTS,
    VARIABLE,
    Model,
    Number,
    choice,
    fail,
    shown,
    suggest,
    text,
    written_as,
)

MAX_TESTS = 500
MAX_CATEGORIES = 200
_MAX_SIDE = 4096
SERVICES = ("openai", "rekognition", "safesearch")
#: What SafeSearch answers about, each with a likelihood.
SAFESEARCH = ("adult", "spoof", "medical", "violence", "racy")

Expected = Annotated[Decision, BeforeValidator(choice("the expected decision", *DECISIONS))]
#: What a rule may say of a row; keep where it says nothing.
Outcome = Literal[Decision, "missing", "escalate", "tighten"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


def _prose(what: str) -> BeforeValidator:
    return BeforeValidator(text(what, 2000))


class Card(Model):
    """For people who consider using the policy; short and honest."""

    intended_use: Annotated[str, _prose("intended_use")]
    confuses: Annotated[str, _prose("confuses")]
    not_for: Annotated[str, _prose("not_for")]
    measured: Annotated[str, _prose("measured")] | None = None


class RuleExpectation(Model):
    """What one rule should say about a picture: its band, and a range for its raw score."""

    model_config = written_as(lambda own: {"anyOf": [{"enum": list(OUTCOMES)}, VARIABLE, own]})

    band: Annotated[Outcome, BeforeValidator(choice("what the rule says", *OUTCOMES))] | None = None
    above: Number | None = None
    below: Number | None = None

    @model_validator(mode="before")
    @classmethod
    def _alone(cls, value: Any) -> Any:
        return {"band": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _something(self) -> RuleExpectation:
        if self.band is None and self.above is None and self.below is None:
            fail("this expects nothing; write keep, review, reject or missing, or {above: 0.5}")
        if self.above is not None and self.below is not None and self.above >= self.below:
            fail(f"no score is above {self.above:g} and below {self.below:g}", "above")
        return self


def _map_of_lists(what: str, names: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            fail(f"{what} must be a map of category to a list of rule ids, not {shown(value)}")
        if not value:
            fail(f"{what} names no category")
        if len(value) > MAX_CATEGORIES:
            fail(f"{what} has {len(value)} categories, more than the {MAX_CATEGORIES} allowed")
        for name, rules in value.items():
            names(name)
            if isinstance(rules, str) or not isinstance(rules, list | tuple) or not rules:
                fail(f"a category must be a list of rule ids, not {shown(rules)}", name)
            for position, rule in enumerate(rules):
                if not isinstance(rule, str):
                    fail(f"a rule id must be text, not {shown(rule)}", name, position)
            if len(set(rules)) != len(rules):
                fail("the same rule is in the list twice", name)
        return {name: tuple(rules) for name, rules in value.items()}

    return check


def _category(value: Any) -> None:
    parts = str(value).split("/")
    if len(str(value)) > 100 or not all(part.strip() for part in parts) or len(parts) > 3:
        fail(f"{shown(value)} is not a category; write Name or Parent/Name, at most three levels", str(value), key=True)


def _likelihood(value: Any) -> None:
    if value not in SAFESEARCH:
        fail(
            f"safesearch answers about {', '.join(SAFESEARCH)}, not {shown(value)}" + suggest(value, SAFESEARCH),
            str(value),
            key=True,
        )


_CATEGORIES = {"type": "object", "additionalProperties": TEXTS, "minProperties": 1}
Categories = Annotated[dict[str, tuple[str, ...]], WithJsonSchema(_CATEGORIES)]
Likelihoods = Annotated[
    dict[str, tuple[str, ...]], WithJsonSchema({**_CATEGORIES, "propertyNames": {"enum": list(SAFESEARCH)}})
]


class Interchange(Model):
    """Which rules stand for which category in the answers of OpenAI moderation, Rekognition and SafeSearch.

    Rekognition's categories have levels, written `Violence/Weapons`.
    """

    openai: Annotated[Categories, BeforeValidator(_map_of_lists("openai", _category))] | None = None
    rekognition: Annotated[Categories, BeforeValidator(_map_of_lists("rekognition", _category))] | None = None
    safesearch: Annotated[Likelihoods, BeforeValidator(_map_of_lists("safesearch", _likelihood))] | None = None

    @model_validator(mode="after")
    def _something(self) -> Interchange:
        if not any(getattr(self, service) for service in SERVICES):
            fail(f"interchange maps nothing; it has the keys {', '.join(SERVICES)}")
        return self


def _size(value: Any) -> Any:
    pair = isinstance(value, list | tuple) and len(value) == 2
    if not pair or not all(type(side) is int and 1 <= side <= _MAX_SIDE for side in value):
        fail(f"size is [width, height] in pixels, each 1 to {_MAX_SIDE:,}, not {shown(value)}")
    return tuple(value)


def _rule_map(value: Any) -> Any:
    if not isinstance(value, dict) or not value:
        fail(f"rules is a map of rule id to what it should say, for example {{weapons: keep}}, not {shown(value)}")
    return value


class Expectation(Model):
    """One test of a policy: a picture, a caption or both, and what should be decided about them.

    image: path relative to the policy's own file. size: [width, height] of a plain gray picture that stands in where the
    test is about captions and sizes only. columns: numbers of the source's own columns, for metadata rules on them.
    """

    name: Annotated[str, BeforeValidator(text("name", 200))] | None = None
    image: Annotated[str, BeforeValidator(text("image", 1000))] | None = None
    size: Annotated[tuple[int, int], BeforeValidator(_size)] | None = None
    caption: Annotated[str, BeforeValidator(text("caption", 5000))] | None = None
    columns: dict[str, Number] = {}  # noqa: RUF012
    expect: Expected | None = None
    rules: Annotated[dict[str, RuleExpectation], Field(min_length=1), BeforeValidator(_rule_map)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Expectation:
        if (self.image is None) == (self.size is None):
            fail("a test has an image, or the size of a plain gray one, for example size: [640, 480]")
        if self.expect is None and self.rules is None:
            fail("a test expects something: expect (keep, review or reject), rules, or both")
        return self


def check_rules(tests: tuple[Expectation, ...], interchange: Interchange | None, rules: Iterable[str]) -> None:
    """Refuse tests and mappings that name rules which the policy does not have."""
    known = list(rules)
    if len(tests) > MAX_TESTS:
        fail(f"there are {len(tests)} tests, more than the {MAX_TESTS} allowed", "tests", MAX_TESTS)
    for position, test in enumerate(tests):
        for rule in test.rules or ():
            if rule not in known:
                message = f"the test names {shown(rule)}, but there is no such rule" + suggest(rule, known)
                fail(message, "tests", position, "rules", rule, key=True)
    for service in SERVICES:
        mapping: Mapping[str, tuple[str, ...]] = getattr(interchange, service, None) or {}
        for category, names in mapping.items():
            for place, rule in enumerate(names):
                if rule not in known:
                    message = f"there is no rule {shown(rule)}" + suggest(rule, known)
                    fail(message, "interchange", service, category, place)
