"""The stored scores of one rule of a finished run, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.decisions import LIMITS
from clipfilter.errors import RefusedError
from clipfilter.policies import (
    Band,
    Policy,
    Rule,
    json_sha256,
    matching_calibration,
    rule_prompts_sha256,
    suggest,
)
from clipfilter.runs import Plan, Run

_BATCH = 16_384
#: What a rule says besides what its scores are.
_NOT_SCORE = ("id", *LIMITS, "on_missing", "tighten", "severity", "action")


@dataclass(frozen=True)
class ScoredRun:
    """A finished run whose policy scored and decided every row."""

    run: Run
    policy: Policy

    @property
    def url(self) -> str:
        return self.run.url

    @property
    def plan(self) -> Plan:
        return self.run.plan

    @property
    def rows(self) -> int:
        """Rows with a decision."""
        return self.run.version.totals.decided

    @property
    def model(self) -> str:
        return str(self.plan.model["model"])

    @property
    def decode(self) -> str:
        return str(self.plan.options["decode"])

    def batches(self, rule: str, columns: tuple[str, ...]) -> Iterator[tuple[str, pa.RecordBatch, np.ndarray]]:
        """(path of the shard, these columns, scores of the rule as float32 with NaN for none), batch by batch."""
        name = cf.score(rule)
        for commit, batch in self.run.batches("annotated", [*columns, name], _BATCH):
            scores = batch.column(name).to_numpy(zero_copy_only=False).astype(np.float32, copy=False)
            yield commit.shard.path, batch.select(list(columns)), scores


def open_scored(url: str) -> ScoredRun:
    """Raises RefusedError where there is no finished run, or one without a policy."""
    run = Run.open(url)
    plan = run.plan
    if plan.policy is None:
        raise RefusedError(
            f"{url} holds no scores of rules, because `{plan.job}` decides nothing; decide it with "
            f"`clipfilter filter {url} --policy POLICY --out OUT` and give that run."
        )
    return ScoredRun(run, Policy.from_canonical(plan.policy))


def find_rule(policy: Policy, name: str | None) -> Rule:
    """The rule of this id, or the only one whose threshold depends on a model. Raises RefusedError."""
    able = [rule for rule in policy.rules if rule.measure.needs_model]
    if name is None:
        if len(able) == 1:
            return able[0]
        names = ", ".join(rule.id for rule in able) or "none"
        raise RefusedError(f"say which rule with --rule (rules with a model's score in {policy.name!r}: {names}).")
    found = next((rule for rule in policy.rules if rule.id == name), None)
    if found is None:
        ids = [rule.id for rule in policy.rules]
        raise RefusedError(f"policy {policy.name!r} has no rule {name!r} (rules: {', '.join(ids)}){suggest(name, ids)}")
    if found not in able:
        raise RefusedError(
            f"{name!r} is a {found.kind} rule, whose threshold depends on no model; it needs no calibration."
        )
    if found.measure.is_calibrated(found.measure.plain()):
        raise RefusedError(
            f"the score of {name!r} is calibrated already; write score: probability, decide a run with that, and "
            "calibrate on it."
        )
    return found


def refuse_other_scores(run: ScoredRun, policy: Policy, rule: Rule) -> None:
    """Refuse where the run's scores of this rule are not those that the policy would give (promise 5)."""
    theirs, ours = _score_of(run.policy, rule.id), _score_of(policy, rule.id)
    again = f"decide it anew with `clipfilter filter {run.url} --policy ... --out OUT` and calibrate on that run"
    if theirs is None:
        raise RefusedError(f"the policy of {run.url} has no rule {rule.id!r}; {again}.")
    if theirs != ours:
        what = "other prompts" if rule.measure.takes_templates and rule.kind in theirs else "another definition"
        raise RefusedError(f"the run's scores of {rule.id!r} come from {what} than the policy's; {again}.")
    matching_calibration(policy, run.plan.model, prompts_sha256(policy), run.decode)


def prompts_sha256(policy: Policy) -> str:
    """The hash of a policy's prompts, as compiling it gives."""
    return json_sha256(rule_prompts_sha256(policy))


def _score_of(policy: Policy, rule: str) -> dict[str, Any] | None:
    entry = next((entry for entry in policy.canonical()["rules"] if entry["id"] == rule), None)
    return None if entry is None else {name: value for name, value in entry.items() if name not in _NOT_SCORE}


def bands_in_use(policy: Policy, rule: Rule, weights_sha256: str | None) -> dict[str, Band]:
    """The review and reject bands of a rule as they decide with these weights: calibrated, else as written."""
    entry = next((entry for entry in policy.calibrations if entry.weights_sha256 == weights_sha256), None)
    own = entry.rules.get(rule.id) if entry is not None else None
    return rule.bands | (own.bands if own is not None else {})


def direction_of(policy: Policy, rule: Rule) -> str:
    """ "above" or "below": where the rule's bands point. Raises RefusedError for a rule without any."""
    bands = [*rule.bands.values()]
    for entry in policy.calibrations:
        bands += entry.rules[rule.id].bands.values() if rule.id in entry.rules else ()
    direction = next((band.direction for band in bands), None)
    if direction is None:
        raise RefusedError(
            f"the rule {rule.id!r} has no band, so nobody knows which end of its scores is meant; write one into the policy, "
            "for example reject: {above: 0.9}."
        )
    return direction
