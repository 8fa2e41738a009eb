"""One rule of a policy: its kind, its bands, and to which rows it applies; what cannot belong together is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BeforeValidator, model_validator

from clipfilter.decisions import ESCALATE, LIMITS
from clipfilter.models import heads
from clipfilter.policies.kinds import (
    PIXELS,
    Alignment,
    Combine,
    Concept,
    Fraction,
    Head,
    Safety,
    empty_map,
    read_head,
)
from clipfilter.policies.language.attachments import Attachment
from clipfilter.policies.language.bands import Band, Tighten, check_order
from clipfilter.policies.language.conditions import Condition
from clipfilter.policies.language.fields import Model, fail, identifier, shown, suggest
from clipfilter.policies.language.fields import text as text_value
from clipfilter.policies.language.overrides import OVERRIDE_RULE as OVERRIDE
from clipfilter.policies.language.values import Identifier, Missing, Templates
from clipfilter.policies.listed import Known, Text

MAX_SEVERITY = 100

KINDS = ("concept", "alignment", "head", "safety", "metadata", "pixels", "text", "known", "combine", "fraction")
#: Kinds whose score depends on the model, and so their thresholds.
MODEL_KINDS = ("concept", "alignment", "head", "safety")
#: What may happen to a picture that is on a list of known ones.
KNOWN_ACTIONS = (ESCALATE, *reversed(LIMITS))


def _pixels(value: Any) -> Any:
    if value not in PIXELS:
        fail(f"{shown(value)} is no pixel quality (there are {', '.join(PIXELS)})" + suggest(value, PIXELS))
    return value


def _severity(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEVERITY:
        fail(f"severity is {shown(value)}, but must be a whole number from 0 to {MAX_SEVERITY}")
    return value


class Rule(Model):
    """One rule: an id, one kind, its bands, and to which rows it applies."""

    id: Identifier
    concept: Concept | None = None
    alignment: Annotated[Alignment, BeforeValidator(empty_map)] | None = None
    head: Annotated[Head, BeforeValidator(read_head)] | None = None
    safety: Safety | None = None
    metadata: Annotated[str, BeforeValidator(text_value("metadata", 200))] | None = None
    pixels: Annotated[str, BeforeValidator(_pixels)] | None = None
    text: Text | None = None
    known: Known | None = None
    combine: Combine | None = None
    fraction: Fraction | None = None
    templates: Templates | None = None
    when: Condition | None = None
    review: Band | None = None
    reject: Band | None = None
    tighten: Tighten | None = None
    severity: Annotated[int, BeforeValidator(_severity)] | None = None
    action: Annotated[str, BeforeValidator(identifier)] | None = None
    on_missing: Missing | None = None

    @model_validator(mode="before")
    @classmethod
    def _default_band(cls, data: Any) -> Any:
        """A pixel quality without bands rejects from its documented threshold on."""
        if isinstance(data, dict) and data.get("review") is None and data.get("reject") is None:
            quality = PIXELS.get(data["pixels"]) if isinstance(data.get("pixels"), str) else None
            if quality is not None and data.get("tighten") is None:
                return {**data, "reject": {quality.direction: quality.threshold}}
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
        if self.id == OVERRIDE:
            fail(f"the name {self.id!r} is taken by human decisions; give the rule another", "id")
        if (
            self.templates is not None
            and self.concept is None
            and (self.safety is None or self.safety.file is not None)
        ):
            fail(f"templates belong to concept rules, and {self.id!r} is of kind {self.kind}", "templates", key=True)
        for name, band in (("review", self.review), ("reject", self.reject)):
            if band is not None:
                check_band(self, name, band)
        if self.review is not None and self.reject is not None:
            check_order(self.id, self.review, self.reject)
        if self.tighten is not None:
            check_band(self, "tighten", self.tighten.band)
            for band in (self.review, self.reject):
                if band is not None and band.direction != self.tighten.band.direction:
                    fail(
                        f"the bands of {self.id!r} point {band.direction} and tighten {self.tighten.band.direction}; "
                        "a rule has one direction",
                        "tighten",
                    )
        if self.fraction is not None and self.review is None and self.reject is None:
            fail(
                f"the fraction rule {self.id!r} needs a band, for example reject: {{outside_top: 0.30}}",
                "fraction",
                key=True,
            )
        if self.fraction is not None and self.when is not None:
            fail("a fraction ranks the rows of its rule; put the condition into that rule", "when", key=True)
        self._check_action()
        return self

    def _check_action(self) -> None:
        if self.known is not None:
            if self.action is not None and self.action not in KNOWN_ACTIONS:
                fail(
                    f"the action of a known rule is one of {', '.join(KNOWN_ACTIONS)}, not {shown(self.action)}"
                    + suggest(self.action, KNOWN_ACTIONS),
                    "action",
                )
        elif self.action == ESCALATE:
            fail(
                "escalate belongs to known rules: only a picture on a list of hashes is escalated, never one that "
                "resembles words",
                "action",
            )
        elif self.action in ("keep", *KNOWN_ACTIONS):
            fail(
                f"the bands decide what is {self.action}ed or kept; action is a name for what to do beyond that",
                "action",
            )

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    @property
    def number(self) -> str | None:
        """The metadata name whose number is the rule's score, if it is one."""
        return PIXELS[self.pixels].metadata if self.pixels is not None else self.metadata

    @property
    def attachments(self) -> Iterator[Attachment]:
        """The files that belong to the rule."""
        if self.concept is not None and self.concept.vectors is not None:
            yield self.concept.vectors
        if self.safety is not None and self.safety.file is not None:
            yield self.safety.file
        for listed in (self.text.block_list if self.text else None, self.known.listed if self.known else None):
            if listed is not None and listed.source is not None:
                yield listed.source


def check_band(rule: Rule, name: str, band: Band, at: tuple[str | int, ...] | None = None) -> None:
    """Refuse a band whose direction or threshold cannot belong to this kind of rule."""
    where = (name,) if at is None else at
    direction, value = band.direction, band.value
    ranked = direction.startswith("outside_")
    if rule.fraction is not None:
        if not ranked:
            fail(
                f"a fraction rule ranks, so write outside_top or outside_bottom instead of {direction}",
                *where,
                direction,
                key=True,
            )
        if not 0.0 < value <= 1.0:
            hint = f"; did you mean {value / 100:g}?" if 1.0 < value <= 100.0 else ""
            fail(f"{direction} is {value:g}, but a fraction is above 0 and at most 1{hint}", *where, direction)
    elif rule.known is not None:
        fail(f"a known rule has no bands; its action is one of {', '.join(KNOWN_ACTIONS)}", *where, key=True)
    elif ranked:
        fail(
            f"{direction} belongs to fraction rules; a {rule.kind} rule takes above or below",
            *where,
            direction,
            key=True,
        )
    elif rule.pixels is not None:
        if direction != PIXELS[rule.pixels].direction:
            fail(
                f"{rule.pixels} lies {PIXELS[rule.pixels].direction} its threshold, not {direction}",
                *where,
                direction,
                key=True,
            )
    elif is_probability(rule):
        if not 0.0 < value < 1.0:
            hint = f"; did you mean {value / 100:g}?" if 1.0 < value < 100.0 else ""
            fail(f"{direction} is {value:g}, but a probability threshold is between 0 and 1{hint}", *where, direction)
    elif rule.concept is not None or rule.alignment is not None:
        limit = 2.0 if rule.concept is not None and rule.concept.score == "margin" else 1.0
        if abs(value) >= limit:
            what = "margin" if limit == 2.0 else "cosine"
            fail(
                f"{direction} is {value:g}, but a {what} threshold is between {-limit:g} and {limit:g}",
                *where,
                direction,
            )


def is_probability(rule: Rule) -> bool:
    if rule.head is not None:
        return rule.head.name in heads.HEADS and heads.HEADS[rule.head.name].score == "probability"
    return rule.concept is not None and rule.concept.score in ("probability", "calibrated")
