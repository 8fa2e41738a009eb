"""One rule of a policy: its kind, its bands, and to which rows it applies; what cannot belong together is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, create_model, model_validator

from clipfilter.decisions import DECISIONS, LIMITS
from clipfilter.policies.kinds.base import Measure
from clipfilter.policies.kinds.registry import KINDS
from clipfilter.policies.parts.bands import Band, Tighten, check_order
from clipfilter.policies.parts.conditions import Condition
from clipfilter.policies.parts.fields import Identifier, Missing, Model, Templates, fail, identifier, shown
from clipfilter.policies.parts.overrides import OVERRIDE_RULE

MAX_SEVERITY = 100


def _severity(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEVERITY:
        fail(f"severity is {shown(value)}, but must be a whole number from 0 to {MAX_SEVERITY}")
    return value


class _Named(Model):
    id: Annotated[Identifier, Field(description="Names the score's column, cf_score.<id>.")]


if TYPE_CHECKING:
    _Measured = _Named
else:
    # One optional key for each kind, between the id and the keys that all rules have.
    _Measured = create_model(
        "Measured",
        __base__=_Named,
        **{name: (measure | None, Field(None, description=measure.about)) for name, measure in KINDS.items()},
    )


class Rule(_Measured):
    """One rule: an id, one kind, its bands, and to which rows it applies."""

    templates: Templates | None = None
    when: Condition | None = None
    review: Annotated[Band | None, Field(description="Scores that send the row to people.")] = None
    reject: Annotated[Band | None, Field(description="Scores that throw the row out.")] = None
    tighten: Tighten | None = None
    severity: Annotated[int, BeforeValidator(_severity)] | None = None
    action: Annotated[str, BeforeValidator(identifier)] | None = None
    on_missing: Missing | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_bands(cls, data: Any) -> Any:
        """Some kinds have bands without saying so."""
        if isinstance(data, dict) and all(data.get(name) is None for name in (*LIMITS, "tighten")):
            for name, measure in KINDS.items():
                if data.get(name) is not None:
                    return {**data, **(measure.default_bands(data[name]) or {})}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Rule:
        kinds = [kind for kind in KINDS if getattr(self, kind) is not None]
        if not kinds:
            fail(f"the rule {self.id!r} has no kind; give it one of {', '.join(KINDS)}")
        if len(kinds) > 1:
            fail(
                f"the rule {self.id!r} is of kind {' and '.join(kinds)}; a rule has exactly one kind",
                kinds[1],
                key=True,
            )
        if self.id == OVERRIDE_RULE:
            fail(f"the name {self.id!r} is taken by human decisions; give the rule another", "id")
        if self.templates is not None and not self.measure.prompted:
            prompted = next(kind for kind, measure in KINDS.items() if measure.takes_templates)
            fail(f"templates belong to {prompted} rules, and {self.id!r} is of kind {self.kind}", "templates", key=True)
        self._check_bands()
        self.measure.check_rule(self)
        self._check_action()
        return self

    def _check_bands(self) -> None:
        for name, band in self.bands.items():
            check_band(self, band, name)
        if self.review is not None and self.reject is not None:
            check_order(self.id, self.review, self.reject)
        if self.tighten is not None:
            check_band(self, self.tighten.band, "tighten")
            for band in self.bands.values():
                if band.direction != self.tighten.band.direction:
                    fail(
                        f"the bands of {self.id!r} point {band.direction} and tighten {self.tighten.band.direction}; "
                        "a rule has one direction",
                        "tighten",
                    )

    def _check_action(self) -> None:
        if self.action is None or self.measure.actions:
            return
        for other in KINDS.values():
            if self.action in other.own_actions:
                fail(other.own_actions[self.action], "action")
        if self.action in DECISIONS:
            fail(
                f"the bands decide what is {self.action}ed or kept; action is a name for what to do beyond that",
                "action",
            )

    @property
    def bands(self) -> dict[str, Band]:
        """The bands it has, by name."""
        return {name: band for name in LIMITS if (band := getattr(self, name)) is not None}

    @property
    def measure(self) -> Measure:
        """What the rule measures: the value under its kind's name."""
        found: Measure = getattr(self, self.kind)
        return found

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


def check_band(rule: Rule, band: Band, *at: str | int) -> None:
    """Refuse a band whose direction or threshold cannot belong to this kind of rule; `at` is its place."""
    if band.ranks and not rule.measure.ranks and not rule.measure.actions:
        ranking = next(kind for kind, measure in KINDS.items() if measure.ranks)
        fail(
            f"{band.direction} belongs to {ranking} rules; a {rule.kind} rule takes above or below",
            *at, band.direction, key=True,
        )  # fmt: skip
    rule.measure.check_band(band, *at)
