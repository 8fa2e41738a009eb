"""Safety checkers: concepts with thresholds of their own, special care, one score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator, model_validator

from clipfilter.errors import RefusedError
from clipfilter.models.heads import SafetyChecker, load_head
from clipfilter.policies.arithmetic import RECHECK, Recheck, exact_products
from clipfilter.policies.kinds.base import Block, CompiledRule, Found, Measure, Words, Written, naming, phrase_list
from clipfilter.policies.parts.attachments import Attached, Attachments
from clipfilter.policies.parts.fields import MAX_PHRASE_CHARS, MAX_PHRASES, Model, Number, fail, shown, text
from clipfilter.policies.texts import TextEncoder, unit_vectors


class SafetyConcept(Model):
    """One concept of a safety checker, with the cosine from which it counts."""

    text: Annotated[str, BeforeValidator(text("text", MAX_PHRASE_CHARS))]
    threshold: Number

    @model_validator(mode="after")
    def _cosine(self) -> SafetyConcept:
        if abs(self.threshold) >= 1:
            fail(f"threshold is {self.threshold:g}, but a cosine lies between -1 and 1", "threshold")
        return self


def _concepts(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        fail(f"this must be a list of {{text, threshold}}, not {shown(value)}")
    if len(value) > MAX_PHRASES:
        fail(f"there are {len(value)} concepts, more than the {MAX_PHRASES} allowed", MAX_PHRASES)
    return tuple(value)


SafetyConcepts = Annotated[tuple[SafetyConcept, ...], BeforeValidator(_concepts)]


class Safety(Measure):
    """The structure of Stable Diffusion's safety checker, with concepts in words or from a published checker's file.

    a = adjustment if any(cos(x, s_k) - t_k + strictness > 0) else 0; the score is max_j(cos(x, c_j) - t_j) + a, with
    special-care concepts s, concepts c and their thresholds t.
    """

    kind = "safety"
    about = "A safety checker: concepts with thresholds of their own, in words or from a file."
    needs_model = True
    file_keys = ("file",)
    found_as = "by"

    concepts: SafetyConcepts = ()
    special_care: SafetyConcepts = ()
    file: Attached | None = None
    adjustment: Number = 0.01
    strictness: Number = 0.0

    @model_validator(mode="after")
    def _one_source(self) -> Safety:
        if (self.file is None) == (not self.concepts):
            fail("a safety checker has either concepts in words or a file")
        if self.file is not None and self.special_care:
            fail("special_care in words belongs to concepts in words; a file brings its own", "special_care", key=True)
        for name in ("adjustment", "strictness"):
            if not 0.0 <= getattr(self, name) < 1.0:
                fail(f"{name} is {getattr(self, name):g}, but must be at least 0 and below 1", name)
        return self

    def plain(self) -> Any:
        found = super().plain()
        return {name: value for name, value in found.items() if value or name not in ("concepts", "special_care")}

    @property
    def prompted(self) -> bool:
        return self.file is None

    def identity(self, templates: Sequence[str]) -> Any:
        return {"safety": self.model_dump(mode="json"), "templates": templates if self.prompted else None}

    @classmethod
    def plan(cls, rules: Sequence[CompiledRule], encoder: TextEncoder, files: Attachments) -> SafetyPlan | None:
        if not rules:
            return None
        members: list[SafetyMember] = []
        start = label = 0
        for rule in rules:
            assert isinstance(rule.measure, cls)
            with naming(rule.id):
                found = rule.measure._concepts(rule.templates, encoder, files)
            members.append(SafetyMember(rule.measure, found, start, label, Recheck.of([rule.thresholds])))
            start, label = start + len(found.vectors), label + len(found.names)
        every = [member.found for member in members]
        return SafetyPlan(
            rules=tuple(rule.id for rule in rules),
            members=tuple(members),
            weights=np.concatenate([found.vectors for found in every]),
            labels=tuple(name for found in every for name in found.names),
            prompts=tuple(prompt for found in every for prompt in found.prompts),
        )

    def _concepts(self, templates: tuple[str, ...], encoder: TextEncoder, files: Attachments) -> _Concepts:
        """Its concepts for the model, from its words or its file. Raises RefusedError."""
        if self.file is not None:
            return self._checker(encoder, files)
        every = (*self.concepts, *self.special_care)
        vectors, prompts = unit_vectors([(concept.text, templates) for concept in every], encoder)
        limits = np.array([concept.threshold for concept in self.concepts])
        special = np.array([concept.threshold for concept in self.special_care])
        return _Concepts(vectors, limits, special, [concept.text for concept in self.concepts], prompts)

    def _checker(self, encoder: TextEncoder, files: Attachments) -> _Concepts:
        assert self.file is not None
        head = load_head(f"file:{files.path(self.file)}", encoder.fingerprint, encoder.dim)
        checker = head.network
        if not isinstance(checker, SafetyChecker):
            raise RefusedError("the file holds a head and no safety checker; write head: instead of safety:")
        vectors = np.concatenate([checker.concepts, checker.special]).astype(np.float32)
        names = [f"concept {number + 1}" for number in range(len(checker.thresholds))]
        return _Concepts(vectors, checker.thresholds, checker.special_thresholds, names, [])

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        said: list[str | Written] = ["A safety checker"]
        if "concepts" in spec:
            said += [" for ", *phrase_list([concept["text"] for concept in spec["concepts"]])]
        if spec.get("special_care"):
            said += [f", stricter by {spec['adjustment']:g} where it sees "]
            said += phrase_list([concept["text"] for concept in spec["special_care"]])
        return [*said, ". The score is the highest similarity to a concept, less the threshold of that concept."]

    @classmethod
    def measured(cls, spec: Any) -> Words:
        return ["the highest similarity to a concept above its threshold"]


@dataclass(frozen=True)
class _Concepts:
    """What one rule looks for. vectors: float32 [m + k, dim] of the concepts, then of special care; thresholds float64 [m] and
    special float64 [k]: the cosines from which they count."""

    vectors: np.ndarray
    thresholds: np.ndarray
    special: np.ndarray
    names: list[str]
    prompts: list[str]


@dataclass(frozen=True)
class SafetyMember:
    """One safety rule. Its columns are those of the concepts, then those of special care.

    Formula (Stable Diffusion's safety checker): a = adjustment if any(cos(x, s_k) - t_k + strictness > 0) else 0; the
    score is max_j(cos(x, c_j) - t_j) + a.
    """

    measure: Safety
    found: _Concepts
    start: int  # of its columns among those of all safety rules
    label: int  # position of the first concept's name among the plan's labels
    recheck: Recheck

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + len(self.found.vectors))

    def scores(self, cosines: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """From cosines [m + k, n] of one float type: scores [n], the concept that decides each intp [n], and how near
        special care is to its limit [n] (infinite where there is none)."""
        dtype = cosines.dtype
        count = len(self.found.thresholds)
        beyond = cosines[:count] - self.found.thresholds.astype(dtype)[:, None]
        decides = beyond.argmax(axis=0)
        result = np.take_along_axis(beyond, decides[None], axis=0)[0]
        if not len(self.found.special):
            return result, decides, np.full(len(result), np.inf, dtype=dtype)
        care = cosines[count:] - self.found.special.astype(dtype)[:, None] + dtype.type(self.measure.strictness)
        result = result + np.where((care > 0).any(axis=0), dtype.type(self.measure.adjustment), dtype.type(0))
        return result, decides, np.abs(care).min(axis=0)


@dataclass(frozen=True)
class SafetyPlan:
    """The safety rules of a policy. weights: float32 [columns, dim], unit rows."""

    names: ClassVar[int] = 1  # the concept that decides

    rules: tuple[str, ...]
    members: tuple[SafetyMember, ...]
    weights: np.ndarray
    labels: tuple[str, ...]
    prompts: tuple[str, ...]

    def score(self, block: Block, products: np.ndarray, out: Found) -> None:
        """Scores of one block. What is close to a threshold, or to the limit of special care, is settled in float64."""
        assert out.nearest is not None
        half, valid = block.half, block.valid
        for place, member in enumerate(self.members):
            values, concept, care = member.scores(products[member.columns, : len(half)])
            values[~valid] = np.nan

            def exact(rows: np.ndarray, member: SafetyMember = member) -> np.ndarray:
                weights = self.weights[member.columns].astype(np.float64)
                return member.scores(exact_products(weights, half, rows))[0][None]

            member.recheck.settle(values[None], exact, valid & (care <= RECHECK))
            out.values[place] = values
            out.nearest[place] = np.where(valid, concept + member.label, -1)
