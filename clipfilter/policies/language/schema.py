"""The policy language: what a policy file may say as a whole, and its one canonical form.

Every rule yields one float32 score per row and has `review` and `reject` bands with one direction. Values are
strict (a number in quotes is text), keys that are not listed are refused, and whatever cannot make sense is
refused here, with the path of the value at fault, so that the loader can name its line.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ValidationError, model_validator

from clipfilter.decisions import ESCALATE, LIMITS
from clipfilter.errors import RefusedError
from clipfilter.policies.kinds import Concept
from clipfilter.policies.language.about import Card, Expectation, Interchange, check_rules
from clipfilter.policies.language.attachments import Attachment
from clipfilter.policies.language.bands import Band, Tighten, check_order, moved
from clipfilter.policies.language.calibrated import CalibratedBand, Calibration
from clipfilter.policies.language.fields import Model as _Model
from clipfilter.policies.language.fields import fail, suggest
from clipfilter.policies.language.fields import shown as _shown
from clipfilter.policies.language.fields import text as _text
from clipfilter.policies.language.overrides import OverridesField
from clipfilter.policies.language.rule import (
    KINDS,
    KNOWN_ACTIONS,
    MODEL_KINDS,
    Rule,
    check_band,
    is_probability,
)
from clipfilter.policies.language.values import Identifier, Missing, Templates, Whole
from clipfilter.policies.prompts import DEFAULT_TEMPLATES, TEMPLATES

__all__ = [
    "KINDS", "MODEL_KINDS", "Band", "CalibratedBand", "Calibration", "Concept", "DatasetThreshold", "Policy", "Rule",
    "Tighten", "check_band", "check_order", "json_sha256", "suggest",
]  # fmt: skip

MAX_TOTAL_PHRASES = 4096
MAX_RULES = 200


@dataclass(frozen=True)
class DatasetThreshold:
    """A threshold that only the whole dataset can give: `key` ("<rule>.reject") names its number, `of` what to rank."""

    key: str
    rule: str
    of: str
    fraction: float
    tail: str  # "top" | "bottom"


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
    overrides: OverridesField | None = None
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
                if band is not None and is_probability(target):
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
            for which in LIMITS:
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
