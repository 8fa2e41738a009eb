"""Compiles a policy for one model: every phrase becomes one column of a single float32 matrix, once.

Also the place where thresholds meet their model (promise 5): calibrated thresholds are taken only where the
hashes of weights and prompts match, and refused with a sentence where they belong to something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.decisions import LIMITS
from clipfilter.errors import RefusedError
from clipfilter.models.heads import Head, SafetyChecker, load_head
from clipfilter.policies import column_rules, deciding, evaluate
from clipfilter.policies.column_rules import ColumnRule
from clipfilter.policies.deciding import Decisions
from clipfilter.policies.evaluate import Scores
from clipfilter.policies.language.attachments import Attachments
from clipfilter.policies.language.bands import Band, bent, moved
from clipfilter.policies.language.calibrated import CalibratedRule
from clipfilter.policies.language.overrides import OverrideTable
from clipfilter.policies.language.schema import MODEL_KINDS, Calibration, DatasetThreshold, Policy, Rule, json_sha256
from clipfilter.policies.phrases import PhraseColumns, unit_vectors
from clipfilter.policies.plans import ConceptPlan, HeadPlan
from clipfilter.policies.safety import SafetyMember, SafetyPlan


class TextEncoder(Protocol):
    """What compiling needs of a model."""

    name: str
    dim: int
    logit_scale: float
    logit_bias: float | None
    score_kind: Literal["softmax", "sigmoid"]
    fingerprint: dict[str, Any]

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray: ...

    def count_truncated(self, texts: Sequence[str]) -> int: ...


@dataclass(frozen=True)
class CompiledRule:
    """One rule ready to be decided. Thresholds are exact float64 here and float32 where they meet scores."""

    id: str
    kind: str
    direction: str | None
    review: float | None
    reject: float | None
    on_missing: str
    of: str | None
    calibrated: bool | None  # None: its threshold depends on no model
    combine: tuple[tuple[str, float], ...] = ()  # rules and weights
    when: dict[str, Any] | None = None
    severity: int | None = None
    action: str | None = None
    tighten: float | None = None  # beyond it, the thresholds of `tightens` move by `tighten_by`
    tighten_by: float = 0.0
    tightens: tuple[str, ...] = ()
    moved_by: tuple[float, ...] = ()  # how far others may move its thresholds
    curve: tuple[float, float] | None = None  # of a calibrated score

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Every threshold that a score may be compared with."""
        written = [value for value in (self.review, self.reject) if value is not None]
        found = [*written, *([self.tighten] if self.tighten is not None else [])]
        return tuple(found + [moved(str(self.direction), value, by) for by in self.moved_by for value in written])


@dataclass(frozen=True)
class CompiledPolicy:
    """A policy bound to one model. Immutable; safe to send to workers and to use from several threads."""

    policy: Policy
    rules: tuple[CompiledRule, ...]
    concepts: ConceptPlan
    heads: HeadPlan
    safety: SafetyPlan
    columns: dict[str, ColumnRule]
    overrides: OverrideTable | None
    labels: (
        pa.StringArray
    )  # what reasons name: the phrases, then concepts of safety checkers, languages, patterns, entries
    prompts_sha256: str
    rule_prompts_sha256: dict[str, str]
    model: str
    truncated_texts: int
    calibration: Calibration | None

    @property
    def matrix(self) -> np.ndarray:
        """float32 [dim, k]: everything linear of the policy; scores start as `image_emb @ matrix`."""
        return self.concepts.weights.T

    @property
    def needs_text(self) -> bool:
        return any(rule.kind == "alignment" for rule in self.rules)

    @property
    def dataset_rules(self) -> list[str]:
        return [rule.id for rule in self.rules if rule.kind == "fraction"]

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
    def has_severities(self) -> bool:
        return any(rule.severity is not None for rule in self.rules)

    @property
    def has_actions(self) -> bool:
        """Whether a rule names what is to be done beyond its bands."""
        return any(rule.action is not None and rule.action not in LIMITS for rule in self.rules)

    @property
    def score_columns(self) -> list[str]:
        return [cf.score(rule.id) for rule in self.rules]

    def check_columns(self, schema: pa.Schema) -> None:
        """Refuse, before work begins, rules that data with this schema can never answer."""
        for rule in self.policy.rules:
            with _naming(rule):
                column_rules.check_columns(rule, schema)

    def score(
        self,
        image_emb: np.ndarray,
        text_emb: np.ndarray | None,
        has_text: np.ndarray | None,
        columns: pa.Table,
    ) -> Scores:
        """Scores of n rows; see `evaluate.score`."""
        return evaluate.score(self, image_emb, text_emb, has_text, columns)

    def decide(self, scores: Scores, thresholds: dict[str, float | None] | None = None) -> Decisions:
        """Decisions of scored rows; see `deciding.decide`."""
        return deciding.decide(self, scores, thresholds or {})

    def annotation(self, scores: Scores, decisions: Decisions | None) -> pa.Table:
        """The annotated columns of scored rows; see `deciding.annotation`."""
        return deciding.annotation(self, scores, decisions)


@contextmanager
def _naming(rule: Rule) -> Iterator[None]:
    """Say in a refusal which rule it is about."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"rule {rule.id!r}: {error}") from None


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
    files = files or Attachments()
    rule_prompts = rule_prompts_sha256(policy)
    prompts_sha256 = json_sha256(rule_prompts)
    calibration = matching_calibration(policy, encoder.fingerprint, prompts_sha256, decode)
    rules = tuple(_compile_rule(rule, policy, calibration, encoder.name) for rule in policy.rules)
    heads = _load_heads(policy, encoder)
    phrases = PhraseColumns()
    for rule in policy.rules:
        if rule.concept is not None:
            with _naming(rule):
                phrases.add(rule, rule.concept, policy, encoder, files)
    safety, safety_labels, safety_prompts = _compile_safety(policy, encoder, files, len(phrases.labels))
    concepts = phrases.plan(encoder, {rule.id: rule for rule in rules}, np.concatenate([heads.weights, safety.weights]))
    labels = [*concepts.phrases, *safety_labels]
    columns: dict[str, ColumnRule] = {}
    for rule in policy.rules:
        with _naming(rule):
            compiled = ColumnRule.of(rule, files, len(labels))
        if compiled is not None:
            columns[rule.id] = compiled
            labels += compiled.labels
    prompts = list(dict.fromkeys([*phrases.prompts, *safety_prompts]))
    return CompiledPolicy(
        policy=policy,
        rules=rules,
        concepts=concepts,
        heads=heads,
        safety=safety,
        columns=columns,
        overrides=policy.overrides.table(files) if policy.overrides is not None else None,
        labels=pa.array(labels, pa.string()),
        prompts_sha256=prompts_sha256,
        rule_prompts_sha256=rule_prompts,
        model=encoder.name,
        truncated_texts=encoder.count_truncated(prompts) if prompts else 0,
        calibration=calibration,
    )


def rule_prompts_sha256(policy: Policy) -> dict[str, str]:
    """For every rule whose score depends on the model the hash of all that it depends on besides: phrases, templates,
    kind of score, vectors; the files of heads and safety checkers."""
    found = {}
    for rule in policy.rules:
        if rule.concept is not None:
            concept = rule.concept
            identity: dict[str, Any] = {
                "any_of": concept.any_of,
                "but_not": concept.but_not,
                "generic": concept.generic_phrases,
                "generic_version": int(concept.generic),
                "templates": rule.templates or policy.templates,
                # Platt's curve, and so what it gives, is fitted to the probability.
                "score": "probability" if concept.score == "calibrated" else concept.score,
            }
            identity |= {"all_of": concept.all_of} if concept.all_of else {}
            identity |= {"weights": concept.weights} if concept.weights else {}
            identity |= {"background": concept.background} if concept.background is not None else {}
            identity |= {"vectors": concept.vectors.sha256} if concept.vectors is not None else {}
            found[rule.id] = json_sha256(identity)
        elif rule.safety is not None:
            templates = None if rule.safety.file is not None else rule.templates or policy.templates
            found[rule.id] = json_sha256({"safety": rule.safety.model_dump(mode="json"), "templates": templates})
    return found | {rule.id: json_sha256(rule.head.identity) for rule in policy.rules if rule.head is not None}


def matching_calibration(policy: Policy, fingerprint: dict[str, Any], prompts: str, decode: str) -> Calibration | None:
    """The policy's calibration for the model with this fingerprint, None where it has none.

    prompts: hash over `rule_prompts_sha256`. Raises RefusedError where the calibration belongs to other weights of
    this name, or to other prompts, heads, preprocessing or decoding.
    """
    model, weights = fingerprint.get("model"), fingerprint.get("weights_sha256")
    texts = "prompts or heads" if any(rule.head is not None for rule in policy.rules) else "prompts"
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
            (texts, entry.prompts_sha256, prompts),
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
    bands = {"review": rule.review, "reject": rule.reject}
    depends = rule.kind in MODEL_KINDS
    own = calibration.rules.get(rule.id) if calibration is not None and depends else None
    curve = _curve(rule, own, model)
    if own is not None:
        for name, calibrated in (("review", own.review), ("reject", own.reject)):
            if calibrated is not None:
                band = calibrated.band()
                # Calibrated thresholds are raw scores; the curve carries them over to probabilities.
                bands[name] = band if curve is None else Band(**{band.direction: bent(curve, band.value)})
    tighten = rule.tighten.band if rule.tighten is not None else None
    given = [band for band in (*bands.values(), tighten) if band is not None]
    used = {other.fraction.of for other in policy.rules if other.fraction is not None}
    used |= {name for other in policy.rules if other.combine is not None for name in other.combine.weighted}
    if policy.decides and not given and rule.known is None and rule.id not in used:
        others = ", ".join(entry.model for entry in policy.calibrations if rule.id in entry.rules)
        raise RefusedError(
            f"the rule {rule.id!r} of policy {policy.name!r} has thresholds only for {others}, not for {model}; "
            "recalibrate: write a band into the rule, decide a run with it, and use `clipfilter policy calibrate` on that"
        )
    fraction = rule.fraction is not None
    amounts = {other.tighten.by for other in policy.rules if other.tighten and rule.id in other.tighten.rules}
    return CompiledRule(
        id=rule.id,
        kind=rule.kind,
        direction=given[0].direction if given else None,
        review=None if fraction or bands["review"] is None else bands["review"].value,
        reject=None if fraction or bands["reject"] is None else bands["reject"].value,
        on_missing=rule.on_missing or policy.on_missing,
        of=rule.fraction.of if rule.fraction is not None else None,
        calibrated=(own is not None) if depends else None,
        combine=tuple(rule.combine.weighted.items()) if rule.combine is not None else (),
        when=rule.when,
        severity=rule.severity,
        action=rule.action,
        tighten=tighten.value if tighten is not None else None,
        tighten_by=rule.tighten.by if rule.tighten is not None else 0.0,
        tightens=rule.tighten.rules if rule.tighten is not None else (),
        moved_by=tuple(sorted(amounts)),
        curve=curve,
    )


def _curve(rule: Rule, own: CalibratedRule | None, model: str) -> tuple[float, float] | None:
    """Platt's curve of a rule whose score is its calibrated probability."""
    if rule.concept is None or rule.concept.score != "calibrated":
        return None
    if own is None or own.probability is None:
        raise RefusedError(
            f"the score of {rule.id!r} is calibrated, but it was not calibrated for {model}: write score: probability, "
            "decide a run with it, use `clipfilter policy calibrate` on that, and then write score: calibrated"
        )
    if own.probability.platt.a <= 0:
        raise RefusedError(
            f"the calibrated probability of {rule.id!r} falls while its score rises, so it found the opposite of what "
            "was labelled; correct its phrases, or write score: probability"
        )
    return own.probability.platt.a, own.probability.platt.b


def _load_heads(policy: Policy, encoder: TextEncoder) -> HeadPlan:
    """The heads that the rules name, each loaded once."""
    loaded: dict[tuple[str, str | None], Head] = {}
    members: list[tuple[str, Head]] = []
    for rule in policy.rules:
        if rule.head is not None:
            key = (rule.head.name, rule.head.sha256)
            try:
                if key not in loaded:
                    loaded[key] = load_head(key[0], encoder.fingerprint, encoder.dim, sha256=key[1])
            except RefusedError as error:
                raise RefusedError(f"rule {rule.id!r}: {error}") from None
            members.append((rule.id, loaded[key]))
    return HeadPlan.build(members, encoder.dim)


def _compile_safety(
    policy: Policy, encoder: TextEncoder, files: Attachments, first: int
) -> tuple[SafetyPlan, list[str], list[str]]:
    """Safety rules as columns, the names of their concepts (labels from `first` on), and their prompts."""
    members: list[SafetyMember] = []
    rows = [np.zeros((0, encoder.dim), dtype=np.float32)]
    labels: list[str] = []
    prompts: list[str] = []
    for rule in policy.rules:
        if rule.safety is None:
            continue
        with _naming(rule):
            if rule.safety.file is not None:
                checker = _checker(files, rule, encoder)
                vectors = np.concatenate([checker.concepts, checker.special])
                limits, special = checker.thresholds, checker.special_thresholds
                names = [f"concept {number + 1}" for number in range(len(limits))]
            else:
                every = (*rule.safety.concepts, *rule.safety.special_care)
                templates = rule.templates or policy.templates
                vectors, asked = unit_vectors([(concept.text, templates) for concept in every], encoder)
                prompts += asked
                limits = np.array([concept.threshold for concept in rule.safety.concepts])
                special = np.array([concept.threshold for concept in rule.safety.special_care])
                names = [concept.text for concept in rule.safety.concepts]
        start = sum(len(part) for part in rows)
        adjustment, strictness = rule.safety.adjustment, rule.safety.strictness
        members.append(SafetyMember(rule.id, start, limits, special, adjustment, strictness, first + len(labels)))
        rows.append(vectors.astype(np.float32))
        labels += names
    return SafetyPlan(tuple(members), np.concatenate(rows)), labels, prompts


def _checker(files: Attachments, rule: Rule, encoder: TextEncoder) -> SafetyChecker:
    assert rule.safety is not None
    assert rule.safety.file is not None
    head = load_head(f"file:{files.path(rule.safety.file)}", encoder.fingerprint, encoder.dim)
    if not isinstance(head.network, SafetyChecker):
        raise RefusedError("the file holds a head and no safety checker; write head: instead of safety:")
    return head.network
