"""Concepts: something told in words or learned vectors, against what it is mistaken for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from clipfilter.errors import RefusedError
from clipfilter.policies.kinds.base import (
    CompiledRule,
    Measure,
    Words,
    Written,
    check_cosine,
    check_probability,
    naming,
    phrase_list,
)
from clipfilter.policies.kinds.concept_plan import ConceptPlan, Part
from clipfilter.policies.kinds.vectors import LearnedVectors, read_vectors
from clipfilter.policies.parts.attachments import Attached, Attachments
from clipfilter.policies.parts.bands import Band, CalibratedRule
from clipfilter.policies.parts.fields import Generic, Number, Phrases, WeighedPhrases, choice, fail, same_phrase, shown
from clipfilter.policies.prompts import GENERIC_NEGATIVES, GENERIC_VERSION
from clipfilter.policies.texts import Phrase, TextEncoder, unit_vectors

Score = Annotated[
    Literal["probability", "margin", "cosine", "calibrated"],
    BeforeValidator(choice("score", "probability", "margin", "cosine", "calibrated")),
]
MAX_WEIGHT = 1000.0
_SCORES = {
    "probability": "The score is a probability: 0 not at all, 1 certainly",
    "margin": "The score is the best phrase’s similarity minus the best contrast’s",
    "cosine": "The score is the similarity (cosine) to the best phrase",
    "calibrated": "The score is a probability calibrated on labels: of ten images with 0.9, nine are right",
}


class Concept(Measure):
    """A concept told in words: positives, near misses (`but_not`), and the versioned generic negatives.

    any_of: one of these must be seen. all_of: each of these must be. vectors: learned positives and negatives, which
    stand beside the phrases. weights: how much a phrase counts, 1 where it is not named. background: a cosine that stands
    for "none of these" among what a probability is contrasted with; softmax models only, the others have their bias.
    """

    kind = "concept"
    about = "Something told in words, against what it is mistaken for."
    needs_model = True
    file_keys = ("vectors",)
    merges = True
    takes_templates = True

    any_of: Annotated[WeighedPhrases, Field(description="Phrases of which one must be seen.")] = ()
    all_of: Phrases = ()
    but_not: Annotated[WeighedPhrases, Field(description="Near misses: what the concept is mistaken for.")] = ()
    vectors: Attached | None = None
    weights: dict[str, Number] = {}  # noqa: RUF012
    generic: Annotated[
        Generic,
        Field(description="Also stand against ordinary things (true), none (false), or a version of that list."),
    ] = GENERIC_VERSION
    background: Annotated[
        Number | None,
        Field(
            description="Also stand against a fixed cosine: what the model gives to things that have nothing to do with it."
        ),
    ] = None
    score: Score = "probability"

    @model_validator(mode="before")
    @classmethod
    def _weighted(cls, data: Any) -> Any:
        """{text, weight} among the phrases becomes the text, and its weight an entry of `weights`."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        weights = dict(data["weights"]) if isinstance(data.get("weights"), dict) else {}
        for key in ("any_of", "but_not"):
            if isinstance(data.get(key), list | tuple):
                data[key] = [_phrase_of(item, weights, (key, place)) for place, item in enumerate(data[key])]
        if weights:
            data["weights"] = weights
        return data

    @model_validator(mode="after")
    def _contrast(self) -> Concept:
        if not self.any_of and not self.all_of and self.vectors is None:
            fail("'concept' needs the key 'any_of' (or all_of, or vectors)")
        seen: dict[str, str] = {}
        for name in ("any_of", "all_of", "but_not"):
            for place, phrase in enumerate(getattr(self, name)):
                other = seen.setdefault(same_phrase(phrase), name)
                if other != name:
                    fail(f"the phrase {shown(phrase)} is in {other} and in {name}", name, place)
        self._check_weights()
        self._check_background()
        if self.score != "cosine" and not self.but_not and not self.generic and not self._learned_negatives():
            fail(
                f"a {self.score} needs something to compare with: give but_not, leave generic on, or use score: cosine",
                "generic",
                key=True,
            )
        return self

    def _check_weights(self) -> None:
        for phrase, weight in self.weights.items():
            if phrase not in (*self.any_of, *self.but_not):
                fail(f"there is no phrase {shown(phrase)} in any_of or but_not to weigh", "weights", phrase, key=True)
            if not 0.0 < weight <= MAX_WEIGHT:
                fail(
                    f"the weight of {shown(phrase)} is {weight:g}, but must be above 0 and at most {MAX_WEIGHT:g}",
                    "weights",
                )
        if self.weights and self.score in ("margin", "cosine"):
            fail(
                f"weights belong to probabilities; score: {self.score} takes the highest cosine whatever it weighs",
                "weights",
            )

    def _check_background(self) -> None:
        if self.background is None:
            return
        if not -1.0 <= self.background <= 1.0:
            fail(f"background is {self.background:g}, but must be a cosine, between -1 and 1", "background")
        if self.score in ("margin", "cosine"):
            fail(f"background belongs to probabilities; score: {self.score} has none", "background", key=True)

    def _learned_negatives(self) -> bool:
        if self.vectors is None:
            return False
        try:
            return bool(len(self.learned(Attachments()).negatives))
        except RefusedError:  # the file is elsewhere; compiling looks in the run too
            return True

    def learned(self, files: Attachments) -> LearnedVectors:
        """The learned vectors, which `vectors` names. Raises RefusedError."""
        assert self.vectors is not None
        return read_vectors(files.path(self.vectors), self.vectors.sha256)

    @property
    def generic_phrases(self) -> tuple[str, ...]:
        """The generic negatives in use: those of the version that the rule does not name itself."""
        named = {same_phrase(phrase) for phrase in (*self.any_of, *self.all_of, *self.but_not)}
        return tuple(phrase for phrase in GENERIC_NEGATIVES.get(self.generic, ()) if same_phrase(phrase) not in named)

    # ------------------------------------------------------------ the language

    def plain(self) -> Any:
        found = super().plain()
        for name in ("any_of", "all_of", "but_not", "weights"):
            if not found[name]:
                del found[name]
        return {**found, "generic": self.generic or False}

    @property
    def phrases(self) -> int:
        return len((*self.any_of, *self.all_of, *self.but_not))

    def check_band(self, band: Band, *at: str | int) -> None:
        if self.score in ("probability", "calibrated"):
            check_probability(band, *at)
        elif self.score == "margin":
            check_cosine(band, *at, what="margin", limit=2.0)
        else:
            check_cosine(band, *at)

    def identity(self, templates: Sequence[str]) -> Any:
        identity: dict[str, Any] = {
            "any_of": self.any_of,
            "but_not": self.but_not,
            "generic": self.generic_phrases,
            "generic_version": int(self.generic),
            "templates": templates,
            # Platt's curve, and so what it gives, is fitted to the probability.
            "score": self._raw_score,
        }
        identity |= {"all_of": self.all_of} if self.all_of else {}
        identity |= {"weights": self.weights} if self.weights else {}
        identity |= {"background": self.background} if self.background is not None else {}
        identity |= {"vectors": self.vectors.sha256} if self.vectors is not None else {}
        return identity

    # ------------------------------------------------------------ scoring

    @property
    def _raw_score(self) -> str:
        """The score before Platt's curve."""
        return "probability" if self.score == "calibrated" else self.score

    def curve(self, calibrated: CalibratedRule | None, rule: str, model: str) -> tuple[float, float] | None:
        if self.score != "calibrated":
            return None
        if calibrated is None or calibrated.probability is None:
            raise RefusedError(
                f"the score of {rule!r} is calibrated, but it was not calibrated for {model}: write score: probability, "
                "decide a run with it, use `clipfilter policy calibrate` on that, and then write score: calibrated"
            )
        platt = calibrated.probability.platt
        if platt.a <= 0:
            raise RefusedError(
                f"the calibrated probability of {rule!r} falls while its score rises, so it found the opposite of what "
                "was labelled; correct its phrases, or write score: probability"
            )
        return platt.a, platt.b

    @classmethod
    def plan(cls, rules: Sequence[CompiledRule], encoder: TextEncoder, files: Attachments) -> ConceptPlan | None:
        if not rules:
            return None
        columns = _Columns(encoder, files)
        for rule in rules:
            assert isinstance(rule.measure, cls)
            with naming(rule.id):
                columns.add(rule, rule.measure)
        return columns.plan(rules)

    # ------------------------------------------------------------ words

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        given = [phrase_list(spec["any_of"])] if spec.get("any_of") else []
        given += [["learned vectors"]] if "vectors" in spec else []
        said: list[str | Written] = ["Looks for " if given else "Looks"]
        for place, part in enumerate(given):
            said += [" or ", *part] if place else part
        if spec.get("all_of"):
            said += [", together with " if given else " for all of ", *phrase_list(spec["all_of"])]
        if spec.get("but_not"):
            said += [", told apart from ", *phrase_list(spec["but_not"])]
        said += [" and from what ordinary pictures show"] if spec.get("generic") else []
        score = _SCORES.get(spec.get("score", "probability"), "The score is as the policy defines it")
        return [*said, f". {score}."]

    @classmethod
    def measured(cls, spec: Any) -> Words:
        return [str(spec.get("score", "probability"))]

    def summary(self, conditional: bool) -> str:
        words = [*self.any_of, *self.all_of]
        said = f"“{words[0]}”" + (f" and {len(words) - 1} more" if len(words) > 1 else "") if words else "learned"
        if self.score == "cosine":
            return f"{said} (cosine)"
        return f"{said} against {len(self.but_not) + len(self.generic_phrases)} others ({self.score})"

    @property
    def compared(self) -> tuple[Sequence[str], Sequence[str], Sequence[str]] | None:
        positives = (*self.any_of, *self.all_of)
        return (positives, self.but_not, self.generic_phrases) if positives else None

    @classmethod
    def is_probability(cls, spec: Any) -> bool:
        return spec.get("score", "probability") in ("probability", "calibrated")

    @classmethod
    def is_calibrated(cls, spec: Any) -> bool:
        return bool(spec.get("score") == "calibrated")

    @classmethod
    def fills_unit(cls, spec: Any) -> bool:
        return bool(spec.get("score", "probability") == "probability")


def _phrase_of(item: Any, weights: dict[str, Any], at: tuple[str | int, ...]) -> Any:
    if not isinstance(item, dict):
        return item
    for key in item:
        if key not in ("text", "weight"):
            fail(f"unknown key {str(key)[:60]!r} in a phrase; the keys here are text, weight", *at, key, key=True)
    phrase = item.get("text")
    if not isinstance(phrase, str):
        fail("a phrase with a weight needs its text, for example {text: a rifle, weight: 2}", *at)
    if "weight" in item:
        given = item["weight"]
        if isinstance(given, bool) or not isinstance(given, int | float):
            fail(f"{shown(given)} is not a number", *at, "weight")
        if not 0.0 < given <= MAX_WEIGHT:
            fail(f"the weight is {given:g}, but must be above 0 and at most {MAX_WEIGHT:g}", *at, "weight")
        if given != 1:
            weights[" ".join(phrase.split())] = given
    return phrase


class _Column(NamedTuple):
    """One column of the plan: its name in reasons, what it is made of (a phrase, or a learned vector), and how it counts."""

    label: str
    made_of: Phrase | np.ndarray
    weight: float = 1.0


class _Columns:
    """Collects the columns of all concept rules; `plan` embeds them."""

    def __init__(self, encoder: TextEncoder, files: Attachments) -> None:
        self._encoder = encoder
        self._files = files
        self._groups: list[list[_Column]] = []
        self._shared: dict[Any, int] = {}  # generic groups are the same for most rules
        self._parts: list[Part] = []
        self._backgrounds: dict[str, float] = {}

    def add(self, rule: CompiledRule, concept: Concept) -> None:
        """One concept rule. Raises RefusedError where its learned vectors do not fit the model."""
        templates, encoder = rule.templates, self._encoder
        positive: list[_Column] = []
        negative: list[_Column] = []
        if concept.vectors is not None:
            learned = concept.learned(self._files)
            learned.check_model(self._files.path(concept.vectors), encoder.fingerprint, encoder.dim)
            positive = [_Column(f"learned vector {place}", row) for place, row in enumerate(learned.positives, 1)]
            negative = [_Column(f"learned contrast {place}", row) for place, row in enumerate(learned.negatives, 1)]

        def phrases(given: Sequence[str]) -> list[_Column]:
            return [_Column(phrase, (phrase, templates), concept.weights.get(phrase, 1.0)) for phrase in given]

        first = self._group(phrases(concept.any_of) + positive)
        near = self._group(phrases(concept.but_not) + negative)
        generic = concept.generic_phrases
        if (generic, templates) not in self._shared:
            self._shared[generic, templates] = self._group([_Column(name, (name, templates)) for name in generic])
        if concept.background is not None and encoder.score_kind == "softmax":
            self._backgrounds[rule.id] = concept.background
        all_of = [self._group([_Column(phrase, (phrase, templates))]) for phrase in concept.all_of]
        for group in [first, *all_of]:
            if group >= 0:
                self._parts.append(Part(rule.id, group, near, self._shared[generic, templates], concept._raw_score))

    def _group(self, columns: list[_Column]) -> int:
        """The number of a new group of columns, -1 where it would be empty."""
        if not columns:
            return -1
        self._groups.append(columns)
        return len(self._groups) - 1

    def plan(self, rules: Sequence[CompiledRule]) -> ConceptPlan:
        """All columns embedded."""
        encoder = self._encoder
        columns = [column for group in self._groups for column in group]
        made_of = [column.made_of for column in columns]
        vectors, prompts = unit_vectors([item for item in made_of if isinstance(item, tuple)], encoder)
        words = iter(vectors)
        weights = [next(words) if isinstance(item, tuple) else item for item in made_of]
        counted = np.array([column.weight for column in columns])
        return ConceptPlan.build(
            weights=np.array(weights, dtype=np.float32),
            labels=tuple(column.label for column in columns),
            starts=[0, *itertools.accumulate(len(group) for group in self._groups)][:-1],
            parts=self._parts,
            rules=rules,
            logit_scale=float(encoder.logit_scale),
            logit_bias=float(encoder.logit_bias or 0.0),
            sigmoid=encoder.score_kind == "sigmoid",
            counted=counted if (counted != 1.0).any() else None,
            backgrounds=self._backgrounds,
            prompts=tuple(prompts),
        )
