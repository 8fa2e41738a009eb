"""Compiles a policy for one model: every phrase becomes one column of a single float32 matrix, once.

Also the place where thresholds meet their model (promise 5): calibrated thresholds are taken only where the
hashes of weights and prompts match, and refused with a sentence where they belong to something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from clipfilter.errors import RefusedError
from clipfilter.models.heads import Head, load_head
from clipfilter.policies import columns as column_rules
from clipfilter.policies import evaluate
from clipfilter.policies.evaluate import ConceptPlan, Decisions, HeadPlan, Scores
from clipfilter.policies.prompts import fill
from clipfilter.policies.schema import Calibration, DatasetThreshold, Policy, Rule, json_sha256

_TEXT_BATCH = 1024


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
    metadata: str | None
    of: str | None
    calibrated: bool | None  # None: its threshold depends on no model

    @property
    def thresholds(self) -> tuple[float, ...]:
        return tuple(value for value in (self.review, self.reject) if value is not None)


@dataclass(frozen=True)
class CompiledPolicy:
    """A policy bound to one model. Immutable; safe to send to workers and to use from several threads."""

    policy: Policy
    rules: tuple[CompiledRule, ...]
    concepts: ConceptPlan
    heads: HeadPlan
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
    def score_columns(self) -> list[str]:
        return [f"cf_score.{rule.id}" for rule in self.rules]

    def check_columns(self, schema: pa.Schema) -> None:
        """Refuse, before work begins, metadata rules that data with this schema can never answer."""
        for rule in self.rules:
            if rule.metadata is not None:
                try:
                    column_rules.check_metadata(rule.metadata, schema)
                except RefusedError as error:
                    raise RefusedError(f"rule {rule.id!r}: {error}") from None

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
        """Decisions of scored rows; see `evaluate.decide`."""
        return evaluate.decide(self, scores, thresholds or {})

    def annotation(self, scores: Scores, decisions: Decisions | None) -> pa.Table:
        """The annotated columns of scored rows; see `evaluate.annotation`."""
        return evaluate.annotation(self, scores, decisions)


def compile_policy(policy: Policy, encoder: TextEncoder, *, decode: str = "fast") -> CompiledPolicy:
    """The policy's texts as vectors of this model, its thresholds settled.

    Per phrase: the mean of the unit-norm template embeddings, renormalised (in float64, stored as float32).
    Equal prompts are embedded once. `decode` is the decode mode the images will have ("fast" or "exact");
    calibrated thresholds may be bound to it. Raises RefusedError where a calibration belongs to other
    weights, prompts, preprocessing or decoding, or where a rule has thresholds for other models only.
    """
    rule_prompts = rule_prompts_sha256(policy)
    prompts_sha256 = json_sha256(rule_prompts)
    calibration = matching_calibration(policy, encoder.fingerprint, prompts_sha256, decode)
    rules = tuple(_compile_rule(rule, policy, calibration, encoder.name) for rule in policy.rules)
    heads = _load_heads(policy, encoder)
    concepts, truncated = _compile_concepts(policy, rules, encoder, heads.weights)
    return CompiledPolicy(
        policy=policy,
        rules=rules,
        concepts=concepts,
        heads=heads,
        prompts_sha256=prompts_sha256,
        rule_prompts_sha256=rule_prompts,
        model=encoder.name,
        truncated_texts=truncated,
        calibration=calibration,
    )


def rule_prompts_sha256(policy: Policy) -> dict[str, str]:
    """For every concept and head rule the hash of all that its score depends on besides the model: phrases, templates,
    kind of score; the files of the head."""
    concepts = {
        rule.id: json_sha256(
            {
                "any_of": rule.concept.any_of,
                "but_not": rule.concept.but_not,
                "generic": rule.concept.generic_phrases,
                "generic_version": int(rule.concept.generic),
                "templates": rule.templates or policy.templates,
                "score": rule.concept.score,
            }
        )
        for rule in policy.rules
        if rule.concept is not None
    }
    return concepts | {rule.id: json_sha256(rule.head.identity) for rule in policy.rules if rule.head is not None}


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
    depends = rule.concept is not None or rule.alignment is not None or rule.head is not None
    own = calibration.rules.get(rule.id) if calibration is not None and depends else None
    if own is not None:
        for name, calibrated in (("review", own.review), ("reject", own.reject)):
            if calibrated is not None:
                bands[name] = calibrated.band()
    given = [band for band in bands.values() if band is not None]
    if (
        policy.decides
        and not given
        and not any(other.fraction is not None and other.fraction.of == rule.id for other in policy.rules)
    ):
        others = ", ".join(entry.model for entry in policy.calibrations if rule.id in entry.rules)
        raise RefusedError(
            f"the rule {rule.id!r} of policy {policy.name!r} has thresholds only for {others}, not for {model}; "
            "recalibrate: write a band into the rule, decide a run with it, and use `clipfilter policy calibrate` on that"
        )
    fraction = rule.fraction is not None
    return CompiledRule(
        id=rule.id,
        kind=rule.kind,
        direction=given[0].direction if given else None,
        review=None if fraction or bands["review"] is None else bands["review"].value,
        reject=None if fraction or bands["reject"] is None else bands["reject"].value,
        on_missing=rule.on_missing or policy.on_missing,
        metadata=rule.metadata,
        of=rule.fraction.of if rule.fraction is not None else None,
        calibrated=(own is not None) if depends else None,
    )


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


def _compile_concepts(
    policy: Policy, rules: tuple[CompiledRule, ...], encoder: TextEncoder, heads: np.ndarray
) -> tuple[ConceptPlan, int]:
    """The phrase matrix and which of its columns (groups of neighbours) every concept reads.

    heads: float32 [h, dim], the columns of linear heads, which follow those of the phrases.
    """
    columns: list[tuple[str, tuple[str, ...]]] = []  # phrase and templates of every column
    starts: list[int] = []
    shared: dict[Any, int] = {}  # generic groups are the same for most rules
    members: list[tuple[str, int, int, int, str]] = []  # rule, group of positives, of near misses, of generics, score

    def group(phrases: tuple[str, ...], templates: tuple[str, ...]) -> int:
        if not phrases:
            return -1
        starts.append(len(columns))
        columns.extend((phrase, templates) for phrase in phrases)
        return len(starts) - 1

    for rule in policy.rules:
        if rule.concept is None:
            continue
        templates = rule.templates or policy.templates
        positives = group(rule.concept.any_of, templates)
        near = group(rule.concept.but_not, templates)
        generic = rule.concept.generic_phrases
        if (generic, templates) not in shared:
            shared[generic, templates] = group(generic, templates)
        members.append((rule.id, positives, near, shared[generic, templates], rule.concept.score))

    prompts = {fill(template, phrase): None for phrase, templates in columns for template in templates}
    position = {prompt: index for index, prompt in enumerate(prompts)}
    vectors = _embed(list(prompts), encoder)
    weights = np.empty((len(columns), encoder.dim), dtype=np.float32)
    for index, (phrase, templates) in enumerate(columns):
        mean = vectors[[position[fill(template, phrase)] for template in templates]].mean(axis=0)
        norm = float(np.linalg.norm(mean))
        if not norm > 1e-6:
            raise RefusedError(f"the model {encoder.name} gives no usable vector for the phrase {phrase!r}")
        weights[index] = mean / norm
    thresholds = {rule.id: rule.thresholds for rule in rules}
    plan = ConceptPlan.build(
        weights=np.concatenate([weights, heads]),
        phrases=tuple(phrase for phrase, _ in columns),
        starts=starts,
        members=members,
        thresholds=[thresholds[member[0]] for member in members],
        always_explained={rule.of for rule in rules if rule.of is not None},
        logit_scale=float(encoder.logit_scale),
        logit_bias=float(encoder.logit_bias or 0.0),
        sigmoid=encoder.score_kind == "sigmoid",
    )
    return plan, encoder.count_truncated(list(prompts)) if prompts else 0


def _embed(prompts: list[str], encoder: TextEncoder) -> np.ndarray:
    """Unit-norm float64 [n, dim]."""
    parts = [
        np.asarray(encoder.encode_texts(prompts[start : start + _TEXT_BATCH]), dtype=np.float64)
        for start in range(0, len(prompts), _TEXT_BATCH)
    ]
    vectors = np.concatenate(parts) if parts else np.zeros((0, encoder.dim))
    if vectors.shape != (len(prompts), encoder.dim) or not np.isfinite(vectors).all():
        raise RefusedError(f"the model {encoder.name} did not give finite text vectors of {encoder.dim} numbers")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12))
