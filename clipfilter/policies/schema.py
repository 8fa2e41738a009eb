"""The policy language: what a policy file may say, as pydantic models, and its one canonical form.

Every rule yields one float32 score per row and has `review` and `reject` bands with one direction. Values are
strict (a number in quotes is text), keys that are not listed are refused, and whatever cannot make sense is
refused here, with the path of the value at fault, so that the loader can name its line.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ValidationError, model_validator

from clipfilter.errors import RefusedError
from clipfilter.models import heads
from clipfilter.policies.about import Card, Expectation, Interchange, check_rules
from clipfilter.policies.fields import Model as _Model
from clipfilter.policies.fields import choice as _choice
from clipfilter.policies.fields import fail
from clipfilter.policies.fields import identifier as _identifier
from clipfilter.policies.fields import number as _number
from clipfilter.policies.fields import shown as _shown
from clipfilter.policies.fields import suggest as suggest
from clipfilter.policies.fields import text as _text
from clipfilter.policies.prompts import DEFAULT_TEMPLATES, GENERIC_NEGATIVES, GENERIC_VERSION, TEMPLATES

MAX_PHRASES = 256
MAX_TOTAL_PHRASES = 4096
MAX_PHRASE_CHARS = 300
MAX_TEMPLATES = 100
MAX_RULES = 200

OnMissing = Literal["review", "reject", "keep"]
DIRECTIONS = ("above", "below", "outside_top", "outside_bottom")
KINDS = ("concept", "alignment", "head", "metadata", "fraction")

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 2_000_000_000:
        fail(f"{_shown(value)} is not a whole number")
    return value


def _sha256(value: Any) -> Any:
    if not isinstance(value, str) or not _SHA256.match(value):
        fail(f"{_shown(value)} is not a sha256 (64 lower-case hex digits)")
    return value


def _phrases(value: Any) -> Any:
    if isinstance(value, str):
        fail(f'this must be a list of phrases; write ["{value[:40]}"]')
    if not isinstance(value, list | tuple):
        fail(f"this must be a list of phrases, not {_shown(value)}")
    if not value:
        fail("the list of phrases is empty")
    if len(value) > MAX_PHRASES:
        fail(f"there are {len(value)} phrases, more than the {MAX_PHRASES} allowed", MAX_PHRASES)
    seen: dict[str, int] = {}
    for position, phrase in enumerate(value):
        if not isinstance(phrase, str):
            fail(f"a phrase must be text, not {_shown(phrase)}; put it in quotes if it is meant as text", position)
        if not phrase.strip():
            fail("a phrase is empty", position)
        if len(phrase) > MAX_PHRASE_CHARS:
            fail(f"a phrase has {len(phrase):,} characters, more than the {MAX_PHRASE_CHARS} allowed", position)
        folded = same_phrase(phrase)
        if folded in seen:
            fail(f"the phrase {_shown(phrase)} is in the list twice", position)
        seen[folded] = position
    return tuple(" ".join(phrase.split()) for phrase in value)


def same_phrase(phrase: str) -> str:
    """What two phrases are compared by: case and spacing make no difference to a text encoder worth the name."""
    return " ".join(phrase.split()).casefold()


def _templates(value: Any) -> Any:
    if isinstance(value, str):
        if value not in TEMPLATES:
            names = ", ".join(TEMPLATES)
            fail(
                f"{_shown(value)} is no prompt ensemble (there are {names}; or give a list)" + suggest(value, TEMPLATES)
            )
        return TEMPLATES[value]
    if not isinstance(value, list | tuple) or not value:
        fail(f"templates must be one of {', '.join(TEMPLATES)}, or a list of texts that hold {{}}")
    if len(value) > MAX_TEMPLATES:
        fail(f"there are {len(value)} templates, more than the {MAX_TEMPLATES} allowed", MAX_TEMPLATES)
    for position, template in enumerate(value):
        if not isinstance(template, str):
            fail(f"a template must be text, not {_shown(template)}", position)
        if len(template) > MAX_PHRASE_CHARS:
            fail(f"a template has {len(template):,} characters, more than the {MAX_PHRASE_CHARS} allowed", position)
        if template.count("{}") != 1 or template.count("{") != 1 or template.count("}") != 1:
            fail(f"the template {_shown(template)} must hold {{}} exactly once, and no other braces", position)
    if len(set(value)) != len(value):
        fail("the same template is in the list twice")
    return tuple(value)


def _generic(value: Any) -> Any:
    if value is True:
        return GENERIC_VERSION
    if value is False:
        return 0
    if not isinstance(value, int) or value not in GENERIC_NEGATIVES:
        versions = ", ".join(str(version) for version in GENERIC_NEGATIVES)
        fail(f"generic is {_shown(value)}, but must be true, false or the version of a list ({versions})")
    return value


def _numbers(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        fail(f"this must be a list of numbers, not {_shown(value)}")
    return tuple(_number(item) for item in value)


def _head(value: Any) -> Any:
    """A name, or {name, sha256}; a head of one's own is read here once, so that the policy holds what it must be."""
    if not isinstance(value, str | dict):
        fail(f"head must be the name of a head, not {_shown(value)}")
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


def _empty_map(value: Any) -> Any:
    if not isinstance(value, dict):
        fail("alignment takes no value; write `alignment: {}`")
    return value


Identifier = Annotated[str, BeforeValidator(_identifier)]
Number = Annotated[float, BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_whole)]
Numbers = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
Sha256 = Annotated[str, BeforeValidator(_sha256)]
Phrases = Annotated[tuple[str, ...], BeforeValidator(_phrases)]
Templates = Annotated[tuple[str, ...], BeforeValidator(_templates)]
Generic = Annotated[int, BeforeValidator(_generic)]
Missing = Annotated[OnMissing, BeforeValidator(_choice("on_missing", "review", "reject", "keep"))]
Score = Annotated[
    Literal["probability", "margin", "cosine"], BeforeValidator(_choice("score", "probability", "margin", "cosine"))
]


class Band(_Model):
    """One threshold with its direction: the band holds the rows strictly above or below it.

    `outside_top: f` and `outside_bottom: f` (fraction rules) hold the rows outside the best or worst fraction
    f.
    """

    above: Number | None = None
    below: Number | None = None
    outside_top: Number | None = None
    outside_bottom: Number | None = None

    @model_validator(mode="after")
    def _one_direction(self) -> Band:
        given = [name for name in DIRECTIONS if getattr(self, name) is not None]
        if not given:
            fail("this band has no threshold; write for example {above: 0.85} or {below: 200}")
        if len(given) > 1:
            fail(f"this band has {' and '.join(given)}, but a band has exactly one direction", given[1], key=True)
        return self

    @property
    def direction(self) -> str:
        return next(name for name in DIRECTIONS if getattr(self, name) is not None)

    @property
    def value(self) -> float:
        return float(getattr(self, self.direction))


class Concept(_Model):
    """A concept told in words: positives, near misses (`but_not`), and the versioned generic negatives."""

    any_of: Phrases
    but_not: Phrases = ()
    generic: Generic = GENERIC_VERSION
    score: Score = "probability"

    @model_validator(mode="after")
    def _contrast(self) -> Concept:
        positives = {same_phrase(phrase) for phrase in self.any_of}
        for position, phrase in enumerate(self.but_not):
            if same_phrase(phrase) in positives:
                fail(f"the phrase {_shown(phrase)} is in any_of and in but_not", "but_not", position)
        if self.score != "cosine" and not self.but_not and not self.generic:
            fail(
                f"a {self.score} needs something to compare with: give but_not, leave generic on, or use score: cosine",
                "generic",
                key=True,
            )
        return self

    @property
    def generic_phrases(self) -> tuple[str, ...]:
        """The generic negatives in use: those of the version that the rule does not name itself."""
        named = {same_phrase(phrase) for phrase in (*self.any_of, *self.but_not)}
        return tuple(phrase for phrase in GENERIC_NEGATIVES.get(self.generic, ()) if same_phrase(phrase) not in named)


class Alignment(_Model):
    """Cosine of image and caption."""


class Head(_Model):
    """A small model on the image embedding: a published one by name, or `file:/path` with the sha256 of that file."""

    name: Annotated[str, BeforeValidator(_text("name", 1000))]
    sha256: Sha256 | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the score besides the embedding: the hash of a head's own file, or those behind a name."""
        if self.name in heads.HEADS:
            originals = heads.HEADS[self.name].originals
            return {"head": self.name, "files": {model: original.sha256 for model, original in originals.items()}}
        return {"head": heads.FILE, "sha256": self.sha256}


class Fraction(_Model):
    """Ranks all rows of the dataset that have the score of an earlier rule."""

    of: Identifier


class Rule(_Model):
    """One rule: an id, one kind, its bands."""

    id: Identifier
    concept: Concept | None = None
    alignment: Annotated[Alignment, BeforeValidator(_empty_map)] | None = None
    head: Annotated[Head, BeforeValidator(_head)] | None = None
    metadata: Annotated[str, BeforeValidator(_text("metadata", 200))] | None = None
    fraction: Fraction | None = None
    templates: Templates | None = None
    review: Band | None = None
    reject: Band | None = None
    on_missing: Missing | None = None

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
        if self.templates is not None and self.concept is None:
            fail(f"templates belong to concept rules, and {self.id!r} is of kind {self.kind}", "templates", key=True)
        for name, band in (("review", self.review), ("reject", self.reject)):
            if band is not None:
                check_band(self, name, band)
        if self.review is not None and self.reject is not None:
            check_order(self.id, self.review, self.reject)
        if self.fraction is not None and self.review is None and self.reject is None:
            fail(
                f"the fraction rule {self.id!r} needs a band, for example reject: {{outside_top: 0.30}}",
                "fraction",
                key=True,
            )
        return self

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if getattr(self, kind) is not None)


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
    elif ranked:
        fail(
            f"{direction} belongs to fraction rules; a {rule.kind} rule takes above or below",
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
    return rule.concept is not None and rule.concept.score == "probability"


def check_order(rule_id: str, review: Band, reject: Band, *at: str | int) -> None:
    """Refuse bands of two directions, and a review band that the reject band hides."""
    if review.direction != reject.direction:
        fail(
            f"the bands of {rule_id!r} point {review.direction} and {reject.direction}; "
            "a rule has one direction, so write two rules",
            *at, "review",
        )  # fmt: skip
    looser = review.value > reject.value if review.direction == "below" else review.value < reject.value
    # Scores are float32: two thresholds that a float32 can hardly tell apart make no band.
    if not looser or abs(review.value - reject.value) <= 1e-6 * max(abs(review.value), abs(reject.value)):
        order = "above" if review.direction == "below" else "below"
        fail(
            f"review at {review.value:g} never applies beside reject at {reject.value:g}; "
            f"for {review.direction} the review threshold must be {order} the reject threshold",
            *at, "review", review.direction,
        )  # fmt: skip


class CalibratedBand(_Model):
    """A calibrated threshold with its evidence, as `policy calibrate` found it.

    What `n`, `m` and `k` count depends on the target. precision: `n` labels, of which `m` lie beyond the threshold, of
    which `k` are true. miss-rate: `n` labels, `m` of them positive, of which `k` lie on the other side of the threshold.
    review-budget: `n` rows of the run, of which `m` lie in the band. `bound` holds with this `confidence` where
    `guarantee` is true; else it is an estimate.
    """

    above: Number | None = None
    below: Number | None = None
    n: Whole | None = None
    m: Whole | None = None
    k: Whole | None = None
    target: Annotated[str, BeforeValidator(_text("target", 100))] | None = None
    confidence: Number | None = None
    bound: Number | None = None
    design: Annotated[str, BeforeValidator(_text("design", 100))] | None = None
    guarantee: bool | None = None
    date: Annotated[str, BeforeValidator(_text("date", 10))] | None = None

    def band(self) -> Band:
        return Band(above=self.above, below=self.below)

    @model_validator(mode="after")
    def _one_direction(self) -> CalibratedBand:
        if (self.above is None) == (self.below is None):
            fail("a calibrated band has exactly one of above and below")
        return self


class Platt(_Model):
    """P(true) = 1 / (1 + exp(-(a score + b))). Brier and expected calibration error are cross-validated."""

    a: Number
    b: Number
    brier: Number
    ece: Number


class Isotonic(_Model):
    """P(true) by linear interpolation between these points, constant beyond them; scores ascend."""

    scores: Numbers
    probabilities: Numbers
    brier: Number
    ece: Number

    @model_validator(mode="after")
    def _points(self) -> Isotonic:
        if not self.scores or len(self.scores) != len(self.probabilities):
            fail("an isotonic curve has as many scores as probabilities, and at least one")
        return self


class Probability(_Model):
    """How probable it is that a row with a score is what the rule looks for, fitted to `n` labels."""

    n: Whole
    platt: Platt
    isotonic: Isotonic


class CalibratedRule(_Model):
    """The calibrated bands of one rule; a band that is not here keeps the threshold written in the rule."""

    review: CalibratedBand | None = None
    reject: CalibratedBand | None = None
    probability: Probability | None = None

    @model_validator(mode="after")
    def _some_band(self) -> CalibratedRule:
        if self.review is None and self.reject is None:
            fail("a calibrated rule has review, reject or both")
        return self


class Calibration(_Model):
    """Thresholds that belong to one model: used only where the hashes of weights and prompts match."""

    model: Annotated[str, BeforeValidator(_text("model", 300))]
    weights_sha256: Sha256
    prompts_sha256: Sha256
    preprocess_sha256: Sha256 | None = None
    decode: Annotated[Literal["fast", "exact"], BeforeValidator(_choice("decode", "fast", "exact"))] | None = None
    rules: dict[str, CalibratedRule]


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
            phrases += len((*rule.concept.any_of, *rule.concept.but_not)) if rule.concept is not None else 0
            if phrases > MAX_TOTAL_PHRASES:
                fail(f"the rules have more than the {MAX_TOTAL_PHRASES:,} phrases allowed in all", "rules", position)
            if rule.id in seen:
                fail(f"two rules have the id {rule.id!r}", "rules", position, "id")
            if rule.fraction is not None:
                self._check_fraction(rule, seen, position)
            seen[rule.id] = rule
        for position, entry in enumerate(self.calibrations):
            self._check_calibration(entry, seen, position)
        ranked = {rule.fraction.of for rule in self.rules if rule.fraction is not None}
        calibrated = {name for entry in self.calibrations for name in entry.rules}
        for position, rule in enumerate(self.rules):
            if self.decides and rule.review is None and rule.reject is None and rule.id not in ranked | calibrated:
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
            if rule.concept is None and rule.alignment is None and rule.head is None:
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
            if rule.concept is not None:
                entry["templates"] = list(rule.templates or self.templates)
                if not rule.concept.but_not:
                    del entry["concept"]["but_not"]
                entry["concept"]["generic"] = rule.concept.generic or False
            rules.append(entry)
        calibrations = [entry.model_dump(mode="json", exclude_none=True) for entry in self.calibrations]
        return {
            "policy": self.policy,
            "version": self.version,
            "rules": rules,
            "calibrations": sorted(calibrations, key=lambda entry: entry["weights_sha256"]),
        }

    @property
    def sha256(self) -> str:
        """Hash of the canonical form (JSON with sorted keys, UTF-8)."""
        return json_sha256(self.canonical())


def json_sha256(value: Any) -> str:
    """sha256 of JSON data, the same wherever it is computed: sorted keys, no spaces, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()
