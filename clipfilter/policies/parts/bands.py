"""Bands: the thresholds of a rule, each with its direction; calibrated ones by model, with the evidence for each number."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, model_validator

from clipfilter.decisions import LIMITS
from clipfilter.policies.parts.fields import (
    Identifier,
    Model,
    Number,
    Numbers,
    Sha256,
    Whole,
    choice,
    fail,
    shown,
    text,
)

DIRECTIONS = ("above", "below", "outside_top", "outside_bottom")


class Band(Model):
    """One threshold with its direction: the band holds the rows strictly above or below it.

    `outside_top: f` and `outside_bottom: f` (fraction rules) hold the rows outside the best or worst fraction
    f.
    """

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

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

    @property
    def ranks(self) -> bool:
        """Whether the threshold is a share of all rows, not a score."""
        return self.direction.startswith("outside_")


def _rules(value: Any) -> Any:
    if not isinstance(value, list | tuple) or not value:
        fail(f"rules is a list of the ids of rules, not {shown(value)}")
    if len(set(map(str, value))) != len(value):
        fail("a rule is in the list twice")
    return tuple(value)


class OneSided(Model):
    """A threshold with other keys beside it."""

    above: Number | None = None
    below: Number | None = None

    @property
    def band(self) -> Band:
        """The threshold alone."""
        return Band(above=self.above, below=self.below)


class Tighten(OneSided):
    """Where the rule's score lies beyond this threshold, the thresholds of `rules` move by `by`, so that more is caught."""

    by: Number
    rules: Annotated[tuple[Identifier, ...], BeforeValidator(_rules)]

    @model_validator(mode="after")
    def _sensible(self) -> Tighten:
        if (self.above is None) == (self.below is None):
            fail("tighten has exactly one of above and below, from which on it applies")
        if self.by <= 0:
            fail(f"by is {self.by:g}, but thresholds move by an amount above 0", "by")
        return self


def moved(direction: str, threshold: float, by: float) -> float:
    """A threshold moved so that more lies beyond it."""
    return threshold - by if direction == "above" else threshold + by


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


class CalibratedBand(OneSided):
    """A calibrated threshold with its evidence, as `policy calibrate` found it.

    What `n`, `m` and `k` count depends on the target. precision: `n` labels, of which `m` lie beyond the threshold, of
    which `k` are true. miss-rate: `n` labels, `m` of them positive, of which `k` lie on the other side of the threshold.
    review-budget: `n` rows of the run, of which `m` lie in the band. `bound` holds with this `confidence` where
    `guarantee` is true; else it is an estimate.
    """

    n: Whole | None = None
    m: Whole | None = None
    k: Whole | None = None
    target: Annotated[str, BeforeValidator(text("target", 100))] | None = None
    confidence: Number | None = None
    bound: Number | None = None
    design: Annotated[str, BeforeValidator(text("design", 100))] | None = None
    guarantee: bool | None = None
    date: Annotated[str, BeforeValidator(text("date", 10))] | None = None

    @model_validator(mode="after")
    def _one_direction(self) -> CalibratedBand:
        if (self.above is None) == (self.below is None):
            fail("a calibrated band has exactly one of above and below")
        return self


class Platt(Model):
    """P(true) = 1 / (1 + exp(-(a score + b))). Brier and expected calibration error are cross-validated."""

    a: Number
    b: Number
    brier: Number
    ece: Number


class Isotonic(Model):
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


class Probability(Model):
    """How probable it is that a row with a score is what the rule looks for, fitted to `n` labels."""

    n: Whole
    platt: Platt
    isotonic: Isotonic


class CalibratedRule(Model):
    """The calibrated bands of one rule; a band that is not here keeps the threshold written in the rule."""

    review: CalibratedBand | None = None
    reject: CalibratedBand | None = None
    probability: Probability | None = None

    @model_validator(mode="after")
    def _some_band(self) -> CalibratedRule:
        if self.review is None and self.reject is None:
            fail("a calibrated rule has review, reject or both")
        return self

    @property
    def bands(self) -> dict[str, Band]:
        """The bands it has, by name."""
        return {name: own.band for name in LIMITS if (own := getattr(self, name)) is not None}


class Calibration(Model):
    """Thresholds that belong to one model: used only where the hashes of weights and prompts match."""

    model: Annotated[str, BeforeValidator(text("model", 300))]
    weights_sha256: Sha256
    prompts_sha256: Sha256
    preprocess_sha256: Sha256 | None = None
    decode: Annotated[Literal["fast", "exact"], BeforeValidator(choice("decode", "fast", "exact"))] | None = None
    rules: dict[str, CalibratedRule]
