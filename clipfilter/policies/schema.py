"""The policy language: what a policy file may say, as pydantic models, and its one canonical form.

Every rule yields one float32 score per row and has `review` and `reject` bands with one direction. Values are
strict (a number in quotes is text), keys that are not listed are refused, and whatever cannot make sense is
refused here, with the path of the value at fault, so that the loader can name its line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ValidationError, ValidationInfo, model_serializer, model_validator

from clipfilter.errors import RefusedError
from clipfilter.models import heads
from clipfilter.policies import overrides as override_lists
from clipfilter.policies.about import Card, Expectation, Interchange, check_rules
from clipfilter.policies.attachments import Attachment, Attachments, attach
from clipfilter.policies.bands import Band, Tighten, check_order, moved
from clipfilter.policies.calibrated import CalibratedBand, Calibration
from clipfilter.policies.conditions import Condition
from clipfilter.policies.fields import Model as _Model
from clipfilter.policies.fields import fail, suggest
from clipfilter.policies.fields import identifier as _identifier
from clipfilter.policies.fields import shown as _shown
from clipfilter.policies.fields import text as _text
from clipfilter.policies.kinds import (
    PIXELS,
    Alignment,
    Combine,
    Concept,
    Fraction,
    Head,
    Known,
    Safety,
    Text,
    empty_map,
    read_head,
)
from clipfilter.policies.overrides import Override
from clipfilter.policies.prompts import DEFAULT_TEMPLATES, TEMPLATES
from clipfilter.policies.values import Identifier, Missing, Templates, Whole

__all__ = [
    "KINDS", "MODEL_KINDS", "Band", "CalibratedBand", "Calibration", "Concept", "DatasetThreshold", "Policy", "Rule",
    "Tighten", "check_band", "check_order", "json_sha256", "suggest",
]  # fmt: skip

MAX_TOTAL_PHRASES = 4096
MAX_RULES = 200
MAX_SEVERITY = 100

KINDS = ("concept", "alignment", "head", "safety", "metadata", "pixels", "text", "known", "combine", "fraction")
#: Kinds whose score depends on the model, and so their thresholds.
MODEL_KINDS = ("concept", "alignment", "head", "safety")
ESCALATE = "escalate"
#: What may happen to a picture that is on a list of known ones.
KNOWN_ACTIONS = (ESCALATE, "reject", "review")


def _pixels(value: Any) -> Any:
    if value not in PIXELS:
        fail(f"{_shown(value)} is no pixel quality (there are {', '.join(PIXELS)})" + suggest(value, PIXELS))
    return value


def _severity(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_SEVERITY:
        fail(f"severity is {_shown(value)}, but must be a whole number from 0 to {MAX_SEVERITY}")
    return value


class Rule(_Model):
    """One rule: an id, one kind, its bands, and to which rows it applies."""

    id: Identifier
    concept: Concept | None = None
    alignment: Annotated[Alignment, BeforeValidator(empty_map)] | None = None
    head: Annotated[Head, BeforeValidator(read_head)] | None = None
    safety: Safety | None = None
    metadata: Annotated[str, BeforeValidator(_text("metadata", 200))] | None = None
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
    action: Annotated[str, BeforeValidator(_identifier)] | None = None
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
        if self.id == override_lists.RULE:
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
                    f"the action of a known rule is one of {', '.join(KNOWN_ACTIONS)}, not {_shown(self.action)}"
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
    elif _is_probability(rule):
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


def _is_probability(rule: Rule) -> bool:
    if rule.head is not None:
        return rule.head.name in heads.HEADS and heads.HEADS[rule.head.name].score == "probability"
    return rule.concept is not None and rule.concept.score in ("probability", "calibrated")


@dataclass(frozen=True)
class DatasetThreshold:
    """A threshold that only the whole dataset can give: `key` ("<rule>.reject") names its number, `of` what to rank."""

    key: str
    rule: str
    of: str
    fraction: float
    tail: str  # "top" | "bottom"


class Overrides(_Model):
    """Human decisions by uid: listed in the policy, or in a file beside it."""

    rows: tuple[Override, ...] | None = None
    source: Attachment | None = None

    @model_validator(mode="after")
    def _once(self) -> Overrides:
        seen: set[str] = set()
        for place, row in enumerate(self.rows or ()):
            if row.cf_uid in seen:
                fail(f"the cf_uid {_shown(row.cf_uid)} is there twice", place, "cf_uid")
            seen.add(row.cf_uid)
        return self

    @model_serializer
    def _plain(self) -> Any:
        if self.rows is not None:
            return [row.model_dump(mode="json", exclude_none=True) for row in self.rows]
        return {"sha256": self.source.sha256 if self.source else None}

    def table(self, files: Attachments) -> override_lists.OverrideTable:
        """All of them, ready to be looked up. Raises RefusedError."""
        if self.rows is not None:
            return override_lists.OverrideTable.of(
                [row.cf_uid for row in self.rows], [row.decision for row in self.rows]
            )
        assert self.source is not None
        read = override_lists.read_overrides(files.path(self.source), self.source.sha256)
        return override_lists.OverrideTable.of(read["cf_uid"].to_pylist(), read["decision"].to_pylist())

    def find(self, uid: str, files: Attachments) -> dict[str, Any] | None:
        """One row's override: decision, by, date, note; None where it has none. Raises RefusedError."""
        if self.rows is not None:
            return next((row.model_dump(exclude_none=True) for row in self.rows if row.cf_uid == uid), None)
        assert self.source is not None
        read = override_lists.read_overrides(files.path(self.source), self.source.sha256)
        return override_lists.override_of(read, uid)


def _overrides(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, list | tuple):
        if len(value) > override_lists.MAX_LISTED:
            fail(
                f"there are {len(value):,} overrides, more than the {override_lists.MAX_LISTED:,} a policy may list; "
                "put them into a CSV file and name that",
                override_lists.MAX_LISTED,
            )
        return {"rows": tuple(value)}
    source = attach(value, info)
    if isinstance(value, str) or "file" in value:
        attachment = Attachment.model_validate(source)
        try:
            override_lists.read_overrides(Attachments().path(attachment), attachment.sha256)
        except RefusedError as error:
            fail(str(error))
    return {"source": source}


class Policy(_Model):
    """A whole policy. `canonical()` is its one resolved form and `sha256` the hash of that."""

    #: Whether every rule must have a band; a policy that only scores has none.
    decides: ClassVar[bool] = True

    policy: Identifier
    version: Whole
    description: Annotated[str, BeforeValidator(_text("description", 2000))] | None = None
    templates: Templates = TEMPLATES[DEFAULT_TEMPLATES]
    rules: tuple[Rule, ...]
    on_missing: Missing = "review"
    calibrations: tuple[Calibration, ...] = ()
    overrides: Annotated[Overrides, BeforeValidator(_overrides)] | None = None
    # About the policy; none of it changes a decision, so none of it is in `canonical()`.
    card: Card | None = None
    tests: tuple[Expectation, ...] = ()
    interchange: Interchange | None = None

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, data: Any) -> Any:
        # Lists arrive as lists; strict mode wants tuples.
        if isinstance(data, dict):
            data = dict(data)
            for key in ("rules", "calibrations", "tests"):
                if isinstance(data.get(key), list):
                    data[key] = tuple(data[key])
        return data

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        if not self.rules:
            fail("a policy needs at least one rule", "rules")
        if len(self.rules) > MAX_RULES:
            fail(f"there are {len(self.rules)} rules, more than the {MAX_RULES} allowed", "rules", MAX_RULES)
        seen: dict[str, Rule] = {}
        phrases = 0
        for position, rule in enumerate(self.rules):
            phrases += rule.concept.phrases if rule.concept is not None else 0
            if phrases > MAX_TOTAL_PHRASES:
                fail(f"the rules have more than the {MAX_TOTAL_PHRASES:,} phrases allowed in all", "rules", position)
            if rule.id in seen:
                fail(f"two rules have the id {rule.id!r}", "rules", position, "id")
            if rule.fraction is not None:
                self._check_fraction(rule, seen, position)
            if rule.combine is not None:
                self._check_combine(rule, seen, position)
            if self.decides and rule.known is not None and rule.action is None:
                fail(
                    f"the known rule {rule.id!r} needs an action: {', '.join(KNOWN_ACTIONS)}", "rules", position, "known",
                    key=True,
                )  # fmt: skip
            seen[rule.id] = rule
        for position, entry in enumerate(self.calibrations):
            self._check_calibration(entry, seen, position)
        for position, rule in enumerate(self.rules):
            if rule.tighten is not None:
                self._check_tighten(rule, rule.tighten, seen, position)
        used = {rule.fraction.of for rule in self.rules if rule.fraction is not None}
        used |= {name for rule in self.rules if rule.combine is not None for name in rule.combine.weighted}
        calibrated = {name for entry in self.calibrations for name in entry.rules}
        for position, rule in enumerate(self.rules):
            idle = rule.review is None and rule.reject is None and rule.tighten is None and rule.known is None
            if self.decides and idle and rule.id not in used | calibrated:
                fail(
                    f"the rule {rule.id!r} would decide nothing: "
                    "give it a review or reject band, or rank it in a fraction rule",
                    "rules", position,
                )  # fmt: skip
        check_rules(self.tests, self.interchange, seen)
        return self

    def _check_fraction(self, rule: Rule, seen: dict[str, Rule], position: int) -> None:
        assert rule.fraction is not None
        of = rule.fraction.of
        at = ("rules", position, "fraction", "of")
        if of == rule.id:
            fail(f"the fraction rule {of!r} ranks itself; `of` names an earlier rule of another kind", *at)
        if of not in seen:
            if any(other.id == of for other in self.rules):
                fail(f"the rule {of!r} comes later; put it before {rule.id!r}", *at)
            fail(f"there is no rule {_shown(of)} before {rule.id!r}" + suggest(of, seen), *at)
        if seen[of].fraction is not None:
            fail(f"{of!r} is itself a fraction; `of` names a rule with a score of its own", *at)

    def _check_combine(self, rule: Rule, seen: dict[str, Rule], position: int) -> None:
        assert rule.combine is not None
        for name in rule.combine.weighted:
            at = ("rules", position, "combine", "weighted", name)
            if name not in seen:
                if any(other.id == name for other in self.rules):
                    fail(f"the rule {name!r} does not come before {rule.id!r}; put it there", *at, key=True)
                fail(f"there is no rule {_shown(name)} before {rule.id!r}" + suggest(name, seen), *at, key=True)
            if seen[name].fraction is not None or seen[name].known is not None:
                fail(f"{name!r} is of kind {seen[name].kind}, whose score cannot be weighed", *at, key=True)

    def _check_tighten(self, rule: Rule, tighten: Tighten, rules: dict[str, Rule], position: int) -> None:
        for place, name in enumerate(tighten.rules):
            at = ("rules", position, "tighten", "rules", place)
            target = rules.get(name)
            if target is None:
                fail(f"there is no rule {_shown(name)}" + suggest(name, rules), *at)
            if name == rule.id:
                fail(f"the rule {name!r} cannot tighten itself", *at)
            if target.fraction is not None or target.known is not None:
                fail(f"{name!r} is of kind {target.kind}, which has no threshold that could move", *at)
            for band in (target.review, target.reject):
                if band is not None and _is_probability(target):
                    shifted = moved(band.direction, band.value, tighten.by)
                    if not 0.0 < shifted < 1.0:
                        fail(f"by {tighten.by:g} moves the threshold {band.value:g} of {name!r} to {shifted:g}", *at)

    def _check_calibration(self, entry: Calibration, rules: dict[str, Rule], position: int) -> None:
        at: tuple[str | int, ...] = ("calibrations", position)
        twin = [other.weights_sha256 for other in self.calibrations[:position]]
        if entry.weights_sha256 in twin:
            fail("two calibrations have the same weights_sha256; there is one entry per model", *at, "weights_sha256")
        for name, bands in entry.rules.items():
            here = (*at, "rules", name)
            rule = rules.get(name)
            if rule is None:
                fail(
                    f"the calibration names {_shown(name)}, but there is no such rule" + suggest(name, rules),
                    *here,
                    key=True,
                )
            if rule.kind not in MODEL_KINDS:
                fail(f"{name!r} is of kind {rule.kind}, whose threshold depends on no model", *here, key=True)
            merged = rule
            for which in ("review", "reject"):
                calibrated: CalibratedBand | None = getattr(bands, which)
                if calibrated is None:
                    continue
                band = calibrated.band()
                written: Band | None = getattr(rule, which)
                if written is not None and written.direction != band.direction:
                    fail(
                        f"the rule {name!r} points {written.direction}, its calibration {band.direction}", *here, which
                    )
                check_band(rule, which, band, (*here, which))
                merged = merged.model_copy(update={which: band})
            if merged.review is not None and merged.reject is not None:
                check_order(name, merged.review, merged.reject, *here)

    @property
    def name(self) -> str:
        return self.policy

    @property
    def dataset_thresholds(self) -> tuple[DatasetThreshold, ...]:
        """The thresholds that must be computed over all rows before this policy can decide."""
        return tuple(
            DatasetThreshold(
                key=f"{rule.id}.{name}",
                rule=rule.id,
                of=rule.fraction.of,
                fraction=band.value,
                tail=band.direction.removeprefix("outside_"),
            )
            for rule in self.rules
            if rule.fraction is not None
            for name, band in (("review", rule.review), ("reject", rule.reject))
            if band is not None
        )

    @classmethod
    def from_canonical(cls, data: dict[str, Any]) -> Policy:
        """The policy whose `canonical()` this is, for instance from a run's plan. Raises RefusedError."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise RefusedError(f"the stored policy cannot be used: {error.errors()[0]['msg']}") from None

    def canonical(self) -> dict[str, Any]:
        """The policy as JSON data with everything resolved into its rules: named lists written out, defaults
        filled in.

        It holds exactly what can change a decision (so not the description), is itself a valid policy, and
        has itself as its canonical form.
        """
        rules = []
        for rule in self.rules:
            entry = rule.model_dump(mode="json", exclude_none=True)
            entry["on_missing"] = rule.on_missing or self.on_missing
            if rule.head is not None and rule.head.sha256 is None:
                entry["head"] = rule.head.name
            if rule.concept is not None or (rule.safety is not None and rule.safety.file is None):
                entry["templates"] = list(rule.templates or self.templates)
            if rule.concept is not None:
                for name in ("any_of", "all_of", "but_not", "weights"):
                    if not entry["concept"][name]:
                        del entry["concept"][name]
                entry["concept"]["generic"] = rule.concept.generic or False
            if rule.safety is not None:
                for name in ("concepts", "special_care"):
                    if not entry["safety"][name]:
                        del entry["safety"][name]
            rules.append(entry)
        calibrations = [entry.model_dump(mode="json", exclude_none=True) for entry in self.calibrations]
        return {
            "policy": self.policy,
            "version": self.version,
            "rules": rules,
            "calibrations": sorted(calibrations, key=lambda entry: entry["weights_sha256"]),
        } | ({"overrides": self.overrides.model_dump(mode="json")} if self.overrides is not None else {})

    @property
    def attachments(self) -> tuple[Attachment, ...]:
        """The files that belong to the policy, each once."""
        found = [wanted for rule in self.rules for wanted in rule.attachments]
        if self.overrides is not None and self.overrides.source is not None:
            found.append(self.overrides.source)
        return tuple(dict.fromkeys(found))

    @property
    def escalates(self) -> bool:
        """Whether a rule may escalate rows, which are then never shown."""
        return any(rule.action == ESCALATE for rule in self.rules)

    @property
    def sha256(self) -> str:
        """Hash of the canonical form (JSON with sorted keys, UTF-8)."""
        return json_sha256(self.canonical())


def json_sha256(value: Any) -> str:
    """sha256 of JSON data, the same wherever it is computed: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
