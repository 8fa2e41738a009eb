"""Calibrated thresholds in a policy file: one entry per model, with the evidence for each number."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, model_validator

from clipfilter.policies.parts.bands import Band
from clipfilter.policies.parts.fields import Model, choice, fail, text
from clipfilter.policies.parts.values import Number, Numbers, Sha256, Whole


class CalibratedBand(Model):
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
    target: Annotated[str, BeforeValidator(text("target", 100))] | None = None
    confidence: Number | None = None
    bound: Number | None = None
    design: Annotated[str, BeforeValidator(text("design", 100))] | None = None
    guarantee: bool | None = None
    date: Annotated[str, BeforeValidator(text("date", 10))] | None = None

    def band(self) -> Band:
        return Band(above=self.above, below=self.below)

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


class Calibration(Model):
    """Thresholds that belong to one model: used only where the hashes of weights and prompts match."""

    model: Annotated[str, BeforeValidator(text("model", 300))]
    weights_sha256: Sha256
    prompts_sha256: Sha256
    preprocess_sha256: Sha256 | None = None
    decode: Annotated[Literal["fast", "exact"], BeforeValidator(choice("decode", "fast", "exact"))] | None = None
    rules: dict[str, CalibratedRule]
