"""The kinds of rules: what each measures, and which values it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from clipfilter.errors import RefusedError
from clipfilter.models import heads
from clipfilter.policies.language.attachments import Attached, Attachments
from clipfilter.policies.language.fields import Model, choice, fail, number, shown, text
from clipfilter.policies.language.values import (
    MAX_PHRASE_CHARS,
    MAX_PHRASES,
    Generic,
    Identifier,
    Number,
    Phrases,
    Sha256,
    same_phrase,
)
from clipfilter.policies.prompts import GENERIC_NEGATIVES, GENERIC_VERSION
from clipfilter.policies.vectors import LearnedVectors, read_vectors

Score = Annotated[
    Literal["probability", "margin", "cosine", "calibrated"],
    BeforeValidator(choice("score", "probability", "margin", "cosine", "calibrated")),
]
MAX_WEIGHT = 1000.0


# ---------------------------------------------------------------- concepts


class Concept(Model):
    """A concept told in words: positives, near misses (`but_not`), and the versioned generic negatives.

    any_of: one of these must be seen. all_of: each of these must be. vectors: learned positives and negatives, which
    stand beside the phrases. weights: how much a phrase counts, 1 where it is not named. background: a cosine that stands
    for "none of these" among what a probability is contrasted with; softmax models only, the others have their bias.
    """

    any_of: Phrases = ()
    all_of: Phrases = ()
    but_not: Phrases = ()
    vectors: Attached | None = None
    weights: dict[str, Number] = {}  # noqa: RUF012
    generic: Generic = GENERIC_VERSION
    background: Number | None = None
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
        positives: dict[str, str] = {}
        for name in ("any_of", "all_of"):
            for place, phrase in enumerate(getattr(self, name)):
                if same_phrase(phrase) in positives:
                    fail(f"the phrase {shown(phrase)} is in any_of and in all_of", name, place)
                positives[same_phrase(phrase)] = name
        for place, phrase in enumerate(self.but_not):
            other = positives.get(same_phrase(phrase))
            if other is not None:
                fail(f"the phrase {shown(phrase)} is in {other} and in but_not", "but_not", place)
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
    def phrases(self) -> int:
        """How many phrases the rule names itself."""
        return len((*self.any_of, *self.all_of, *self.but_not))

    @property
    def generic_phrases(self) -> tuple[str, ...]:
        """The generic negatives in use: those of the version that the rule does not name itself."""
        named = {same_phrase(phrase) for phrase in (*self.any_of, *self.all_of, *self.but_not)}
        return tuple(phrase for phrase in GENERIC_NEGATIVES.get(self.generic, ()) if same_phrase(phrase) not in named)


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


class Alignment(Model):
    """Cosine of image and caption."""


def empty_map(value: Any) -> Any:
    """The value of `alignment: {}`."""
    if not isinstance(value, dict):
        fail("alignment takes no value; write `alignment: {}`")
    return value


# ---------------------------------------------------------------- heads


class Head(Model):
    """A small model on the image embedding: a published one by name, or `file:/path` with the sha256 of that file."""

    name: Annotated[str, BeforeValidator(text("name", 1000))]
    sha256: Sha256 | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the score besides the embedding: the hash of a head's own file, or those behind a name."""
        if self.name in heads.HEADS:
            originals = heads.HEADS[self.name].originals
            return {"head": self.name, "files": {model: original.sha256 for model, original in originals.items()}}
        return {"head": heads.FILE, "sha256": self.sha256}


def read_head(value: Any) -> Any:
    """A name, or {name, sha256}; a head of one's own is read here once, so that the policy holds what it must be."""
    if not isinstance(value, str | dict):
        fail(f"head must be the name of a head, not {shown(value)}")
    named = {"name": value} if isinstance(value, str) else dict(value)
    name = named.get("name")
    if not isinstance(name, str):
        fail("head needs a name; write for example `head: laion-aesthetic-v2`")
    try:
        heads.check_name(name)
        if name.startswith(heads.FILE):
            path = heads.file_path(name)
            named["name"] = f"{heads.FILE}{path}"
            if named.get("sha256") is None:
                named["sha256"] = heads.check_file(path)
    except RefusedError as error:
        fail(str(error))
    return named


# ---------------------------------------------------------------- safety checkers


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


class Safety(Model):
    """The structure of Stable Diffusion's safety checker, with concepts in words or from a published checker's file.

    a = adjustment if any(cos(x, s_k) - t_k + strictness > 0) else 0; the score is max_j(cos(x, c_j) - t_j) + a, with
    special-care concepts s, concepts c and their thresholds t.
    """

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


# ---------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Quality:
    """A pixel quality: the number it compares, on which side, where by default, and what that means."""

    metadata: str
    direction: Literal["above", "below"]
    threshold: float
    meaning: str


PIXELS = {
    "dark": Quality("brightness", "below", 25.0, "mean luma, 0 to 255"),
    "bright": Quality("brightness", "above", 235.0, "mean luma, 0 to 255"),
    "blurry": Quality("blur", "below", 10.0, "variance of the Laplacian"),
    "low_information": Quality("entropy", "below", 3.0, "entropy of the luma histogram in bits, 0 to 8"),
    "odd_aspect": Quality("aspect_ratio", "above", 3.0, "longer side by shorter side"),
    "grayscale": Quality("colourfulness", "below", 2.0, "colourfulness, 0 without any colour"),
}


# ---------------------------------------------------------------- rules about rules


def _parts(value: Any) -> Any:
    if not isinstance(value, dict) or not value:
        fail(
            f"weighted is a map of rules and their weights, for example {{blood: 0.6, weapons: 0.4}}, not {shown(value)}"
        )
    if len(value) > MAX_PHRASES:
        fail(f"there are {len(value)} parts, more than the {MAX_PHRASES} allowed")
    for name, weight in value.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            fail(f"{shown(weight)} is not a number", name)
    return {name: number(weight) for name, weight in value.items()}


class Combine(Model):
    """A weighted sum of the scores of earlier rules."""

    weighted: Annotated[dict[str, float], BeforeValidator(_parts)]


class Fraction(Model):
    """Ranks all rows of the dataset that have the score of an earlier rule."""

    of: Identifier
