"""The policy language: what a policy file may say as a whole, and its one canonical form.

Every rule yields one float32 score per row and has `review` and `reject` bands with one direction. Values are
strict (a number in quotes is text), keys that are not listed are refused, and whatever cannot make sense is
refused here, with the path of the value at fault, so that the loader can name its line.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from clipfilter.decisions import ESCALATE
from clipfilter.errors import RefusedError
from clipfilter.policies.fraction import DatasetThreshold
from clipfilter.policies.language.about import Card, Expectation, Interchange, check_rules
from clipfilter.policies.language.rule import Rule, check_band
from clipfilter.policies.parts.attachments import Attachment
from clipfilter.policies.parts.bands import Calibration, Tighten, check_order, moved
from clipfilter.policies.parts.fields import (
    Identifier,
    Missing,
    Model,
    Templates,
    Whole,
    fail,
    shown,
    suggest,
    text,
    within,
)
from clipfilter.policies.parts.overrides import OverridesField
from clipfilter.policies.prompts import DEFAULT_TEMPLATES, TEMPLATES

MAX_TOTAL_PHRASES = 4096
MAX_RULES = 200


class Policy(Model):
    """A whole policy. `canonical()` is its one resolved form and `sha256` the hash of that."""

    #: Whether every rule must have a band; a policy that only scores has none.
    decides: ClassVar[bool] = True

    policy: Annotated[Identifier, Field(description="The policy's name: letters, digits, - and _.")]
    version: Annotated[Whole, Field(description="A whole number; raise it with every change.")]
    description: Annotated[str, BeforeValidator(text("description", 2000))] | None = None
    templates: Annotated[
        Templates, Field(description="Prompt ensemble of the concept rules: a name, or texts that hold {} once.")
    ] = TEMPLATES[DEFAULT_TEMPLATES]
    # Lists arrive as lists; strict mode would want tuples.
    rules: Annotated[tuple[Rule, ...], Field(strict=False, description="The decision is the worst that any rule says.")]
    on_missing: Annotated[
        Missing, Field(description="What happens where a rule cannot be evaluated, for example without a caption.")
    ] = "review"
    calibrations: Annotated[
        tuple[Calibration, ...],
        Field(
            strict=False, description="Thresholds that belong to one model, written by `clipfilter policy calibrate`."
        ),
    ] = ()
    overrides: Annotated[
        OverridesField | None, Field(description="Human decisions by cf_uid; they win over the rules.")
    ] = None
    # About the policy; none of it changes a decision, so none of it is in `canonical()`.
    card: Card | None = None
    tests: Annotated[
        tuple[Expectation, ...], Field(strict=False, description="What `clipfilter policy test` checks.")
    ] = ()
    interchange: Annotated[
        Interchange | None, Field(description="Which rules stand for which category in the answers of other services.")
    ] = None

    @model_validator(mode="after")
    def _consistent(self) -> Policy:
        rules = self._check_rules()
        for position, entry in enumerate(self.calibrations):
            self._check_calibration(entry, rules, position)
        for position, rule in enumerate(self.rules):
            if rule.tighten is not None:
                self._check_tighten(rule, rule.tighten, rules, position)
        self._check_idle()
        check_rules(self.tests, self.interchange, rules)
        return self

    def _check_rules(self) -> dict[str, Rule]:
        """The rules by id, each checked beside those before it."""
        if not self.rules:
            fail("a policy needs at least one rule", "rules")
        if len(self.rules) > MAX_RULES:
            fail(f"there are {len(self.rules)} rules, more than the {MAX_RULES} allowed", "rules", MAX_RULES)
        seen: dict[str, Rule] = {}
        ids = {rule.id for rule in self.rules}
        phrases = 0
        for position, rule in enumerate(self.rules):
            phrases += rule.measure.phrases
            if phrases > MAX_TOTAL_PHRASES:
                fail(f"the rules have more than the {MAX_TOTAL_PHRASES:,} phrases allowed in all", "rules", position)
            if rule.id in seen:
                fail(f"two rules have the id {rule.id!r}", "rules", position, "id")
            with within("rules", position):
                rule.measure.check_place(rule, seen, ids, self.decides)
            seen[rule.id] = rule
        return seen

    def _check_idle(self) -> None:
        """Refuse rules that nothing comes of."""
        calibrated = {name for entry in self.calibrations for name in entry.rules}
        for position, rule in enumerate(self.rules):
            idle = not rule.bands and rule.tighten is None and not rule.measure.actions
            if self.decides and idle and rule.id not in self.used | calibrated:
                fail(
                    f"the rule {rule.id!r} would decide nothing: "
                    "give it a review or reject band, or rank it in a fraction rule",
                    "rules", position,
                )  # fmt: skip

    def _check_tighten(self, rule: Rule, tighten: Tighten, rules: dict[str, Rule], position: int) -> None:
        for place, name in enumerate(tighten.rules):
            at = ("rules", position, "tighten", "rules", place)
            target = rules.get(name)
            if target is None:
                fail(f"there is no rule {shown(name)}" + suggest(name, rules), *at)
            if name == rule.id:
                fail(f"the rule {name!r} cannot tighten itself", *at)
            if not target.measure.measures:
                fail(f"{name!r} is of kind {target.kind}, which has no threshold that could move", *at)
            for band in target.bands.values():
                if target.measure.has_probability:
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
                    f"the calibration names {shown(name)}, but there is no such rule" + suggest(name, rules),
                    *here,
                    key=True,
                )
            if not rule.measure.needs_model:
                fail(f"{name!r} is of kind {rule.kind}, whose threshold depends on no model", *here, key=True)
            merged = rule
            for which, band in bands.bands.items():
                written = rule.bands.get(which)
                if written is not None and written.direction != band.direction:
                    fail(
                        f"the rule {name!r} points {written.direction}, its calibration {band.direction}", *here, which
                    )
                check_band(rule, band, *here, which)
                merged = merged.model_copy(update={which: band})
            if merged.review is not None and merged.reject is not None:
                check_order(name, merged.review, merged.reject, *here)

    @property
    def name(self) -> str:
        return self.policy

    @property
    def used(self) -> set[str]:
        """The ids of rules whose scores other rules read."""
        return {name for rule in self.rules for name in rule.measure.uses}

    @property
    def dataset_thresholds(self) -> tuple[DatasetThreshold, ...]:
        """The thresholds that must be computed over all rows before this policy can decide."""
        return tuple(
            DatasetThreshold(
                key=f"{rule.id}.{name}",
                rule=rule.id,
                of=str(rule.measure.of_rule),
                fraction=band.value,
                tail=band.direction.removeprefix("outside_"),
            )
            for rule in self.rules
            if rule.measure.ranks
            for name, band in rule.bands.items()
        )

    @classmethod
    def from_canonical(cls, data: dict[str, Any]) -> Self:
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
            entry[rule.kind] = rule.measure.plain()
            if rule.measure.prompted:
                entry["templates"] = list(rule.templates or self.templates)
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
        found = [wanted for rule in self.rules for wanted in rule.measure.attachments]
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


def rule_prompts_sha256(policy: Policy) -> dict[str, str]:
    """For every rule whose score depends on the model the hash of all that it depends on besides: phrases, templates,
    kind of score, vectors; the files of heads and safety checkers."""
    identities = {rule.id: rule.measure.identity(rule.templates or policy.templates) for rule in policy.rules}
    return {name: json_sha256(identity) for name, identity in identities.items() if identity is not None}
