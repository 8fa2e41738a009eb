"""Compiles a policy for one model: every phrase becomes one column of a single float32 matrix, once.

Also the place where thresholds meet their model (promise 5): calibrated thresholds are taken only where the
hashes of weights and prompts match, and refused with a sentence where they belong to something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.policies import deciding
from clipfilter.policies.arithmetic import bent
from clipfilter.policies.deciding import Decider, Decisions
from clipfilter.policies.fraction import DatasetThreshold
from clipfilter.policies.kinds.base import Answer, CompiledRule, Plan, naming
from clipfilter.policies.kinds.registry import KINDS
from clipfilter.policies.language.rule import Rule
from clipfilter.policies.language.schema import Policy, json_sha256, rule_prompts_sha256
from clipfilter.policies.parts.attachments import Attachments
from clipfilter.policies.parts.bands import Band, Calibration
from clipfilter.policies.parts.conditions import check_condition
from clipfilter.policies.scoring import Scorer, Scores
from clipfilter.policies.texts import TextEncoder


@dataclass(frozen=True)
class CompiledPolicy:
    """A policy bound to one model. Immutable; safe to send to workers and to use from several threads."""

    policy: Policy
    scorer: Scorer
    decider: Decider
    prompts_sha256: str
    rule_prompts_sha256: dict[str, str]
    model: str
    truncated_texts: int
    calibration: Calibration | None

    @property
    def rules(self) -> tuple[CompiledRule, ...]:
        return self.decider.rules

    @property
    def labels(self) -> pa.StringArray:
        """What reasons name: the phrases, then concepts of safety checkers, languages, patterns, entries."""
        return self.decider.labels

    @property
    def matrix(self) -> np.ndarray:
        """float32 [dim, k]: everything linear of the policy; scores start as `image_emb @ matrix`."""
        return self.scorer.matrix.T

    @property
    def needs_text(self) -> bool:
        return any(rule.measure.needs_text for rule in self.rules)

    @property
    def dataset_rules(self) -> list[str]:
        return [rule.id for rule in self.rules if rule.measure.ranks]

    @property
    def uncalibrated(self) -> list[str]:
        """Rules whose thresholds depend on a model and were not calibrated for this one; every record says so."""
        return [rule.id for rule in self.rules if rule.calibrated is False and rule.thresholds]

    @property
    def warnings(self) -> list[str]:
        """Sentences for the user before a run."""
        found = []
        if self.uncalibrated:
            found.append(
                f"uncalibrated for {self.model}: {', '.join(self.uncalibrated)}; the thresholds are as written in "
                "the policy, and the records say so"
            )
        if self.truncated_texts:
            found.append(f"{self.truncated_texts} prompts are longer than {self.model} reads and were cut")
        return found

    @property
    def dataset_thresholds(self) -> tuple[DatasetThreshold, ...]:
        return self.policy.dataset_thresholds

    @property
    def score_columns(self) -> list[str]:
        return [cf.score(rule.id) for rule in self.rules]

    def check_columns(self, schema: pa.Schema) -> None:
        """Refuse, before work begins, rules that data with this schema can never answer."""
        for rule in self.policy.rules:
            with naming(rule.id):
                rule.measure.check_columns(schema)
                if rule.when is not None:
                    check_condition(rule.when, schema)

    def score(
        self, image_emb: np.ndarray, text_emb: np.ndarray | None, has_text: np.ndarray | None, columns: pa.Table
    ) -> Scores:
        """Scores of n rows; see `Scorer.score`."""
        return self.scorer.score(image_emb, text_emb, has_text, columns)

    def decide(self, scores: Scores, thresholds: dict[str, float | None] | None = None) -> Decisions:
        """Decisions of scored rows; see `deciding.decide`."""
        return deciding.decide(self.decider, scores, thresholds or {})

    def annotation(self, scores: Scores, decisions: Decisions | None) -> pa.Table:
        """The annotated columns of scored rows; see `deciding.annotation`."""
        return deciding.annotation(self.decider, scores, decisions)


def compile_policy(
    policy: Policy, encoder: TextEncoder, *, decode: str = "fast", files: Attachments | None = None
) -> CompiledPolicy:
    """The policy's texts as vectors of this model, its thresholds settled, its lists read.

    Per phrase: the mean of the unit-norm template embeddings, renormalised (in float64, stored as float32).
    Equal prompts are embedded once. `decode` is the decode mode the images will have ("fast" or "exact");
    calibrated thresholds may be bound to it. files: where the files of the policy are, besides where this process has
    seen them. Raises RefusedError where a calibration belongs to other weights, prompts, preprocessing or decoding,
    where a rule has thresholds for other models only, or where a file or package is missing.
    """
    rule_prompts = rule_prompts_sha256(policy)
    prompts_sha256 = json_sha256(rule_prompts)
    calibration = matching_calibration(policy, encoder.fingerprint, prompts_sha256, decode)
    rules = tuple(_compile_rule(rule, policy, calibration, encoder.name) for rule in policy.rules)
    files = files or Attachments()
    labels: list[str] = []
    plans: list[tuple[Plan, int]] = []
    for measure in KINDS.values():
        plan = measure.plan([rule for rule in rules if type(rule.measure) is measure], encoder, files)
        if plan is not None:
            plans.append((plan, len(labels)))
            labels += plan.labels
    answers: dict[str, tuple[Answer, int]] = {}
    for rule in rules:
        with naming(rule.id):
            answer = rule.measure.answer(rule.thresholds, files)
        if answer is not None:
            answers[rule.id] = answer, len(labels)
            labels += answer.labels
    prompts = list(dict.fromkeys(prompt for plan, _ in plans for prompt in plan.prompts))
    none = np.zeros((0, encoder.dim), dtype=np.float32)
    overrides = policy.overrides.table(files) if policy.overrides is not None else None
    return CompiledPolicy(
        policy=policy,
        scorer=Scorer(
            rules, np.concatenate([none, *(plan.weights for plan, _ in plans)]), tuple(plans), answers, overrides
        ),
        decider=Decider(rules, policy.dataset_thresholds, pa.array(labels, pa.string())),
        prompts_sha256=prompts_sha256,
        rule_prompts_sha256=rule_prompts,
        model=encoder.name,
        truncated_texts=encoder.count_truncated(prompts) if prompts else 0,
        calibration=calibration,
    )


def matching_calibration(policy: Policy, fingerprint: dict[str, Any], prompts: str, decode: str) -> Calibration | None:
    """The policy's calibration for the model with this fingerprint, None where it has none.

    prompts: hash over `rule_prompts_sha256`. Raises RefusedError where the calibration belongs to other weights of
    this name, or to other prompts, heads, preprocessing or decoding.
    """
    model, weights = fingerprint.get("model"), fingerprint.get("weights_sha256")
    judged = dict.fromkeys(["prompts", *(rule.measure.judged_by for rule in policy.rules)])
    for entry in policy.calibrations:
        if entry.weights_sha256 != weights:
            if entry.model == model:
                raise RefusedError(
                    f"policy {policy.name!r} is calibrated for other weights of {model} "
                    f"({entry.weights_sha256[:12]}, here {str(weights)[:12]}); "
                    "recalibrate: remove that entry, decide a run with these weights, and use `clipfilter policy calibrate` on it"
                )
            continue
        for what, bound, here in (
            (" or ".join(judged), entry.prompts_sha256, prompts),
            ("preprocessing", entry.preprocess_sha256, json_sha256(fingerprint.get("preprocess"))),
            ("decode mode", entry.decode, decode),
        ):
            if bound is not None and bound != here:
                raise RefusedError(
                    f"policy {policy.name!r} is calibrated for {model} with other {what} "
                    f"({bound[:12]}, here {here[:12]}); recalibrate: remove that entry, decide the run "
                    "anew, and use `clipfilter policy calibrate` on it"
                )
        return entry
    return None


def _compile_rule(rule: Rule, policy: Policy, calibration: Calibration | None, model: str) -> CompiledRule:
    measure = rule.measure
    bands = dict(rule.bands)
    own = calibration.rules.get(rule.id) if calibration is not None and measure.needs_model else None
    curve = measure.curve(own, rule.id, model)
    if own is not None:
        for name, band in own.bands.items():
            # Calibrated thresholds are raw scores; the curve carries them over to probabilities.
            bands[name] = band if curve is None else Band(**{band.direction: bent(curve, band.value)})
    tighten = rule.tighten.band if rule.tighten is not None else None
    given = [*bands.values(), *([tighten] if tighten is not None else [])]
    if policy.decides and not given and not measure.actions and rule.id not in policy.used:
        others = ", ".join(entry.model for entry in policy.calibrations if rule.id in entry.rules)
        raise RefusedError(
            f"the rule {rule.id!r} of policy {policy.name!r} has thresholds only for {others}, not for {model}; "
            "recalibrate: write a band into the rule, decide a run with it, and use `clipfilter policy calibrate` on that"
        )
    values = {} if measure.ranks else {name: band.value for name, band in bands.items()}
    amounts = {other.tighten.by for other in policy.rules if other.tighten and rule.id in other.tighten.rules}
    return CompiledRule(
        id=rule.id,
        measure=measure,
        templates=rule.templates or policy.templates,
        direction=given[0].direction if given else None,
        review=values.get("review"),
        reject=values.get("reject"),
        on_missing=rule.on_missing or policy.on_missing,
        ranked=any(other.measure.of_rule == rule.id for other in policy.rules),
        calibrated=(own is not None) if measure.needs_model else None,
        when=rule.when,
        severity=rule.severity,
        action=rule.action,
        tighten=tighten.value if tighten is not None else None,
        tighten_by=rule.tighten.by if rule.tighten is not None else 0.0,
        tightens=rule.tighten.rules if rule.tighten is not None else (),
        moved_by=tuple(sorted(amounts)),
        curve=curve,
    )
