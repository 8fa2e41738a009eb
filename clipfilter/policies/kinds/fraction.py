"""Fractions: rows ranked over the whole dataset by an earlier rule's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clipfilter.policies.kinds.base import Answer, Measure, Words, Written
from clipfilter.policies.parts.attachments import Attachments
from clipfilter.policies.parts.bands import Band
from clipfilter.policies.parts.fields import Identifier, fail, shown, suggest


class Fraction(Measure):
    """Ranks all rows of the dataset that have the score of an earlier rule."""

    kind = "fraction"
    about = "Ranks the whole dataset by an earlier rule's score."
    measures = False
    ranks = True

    of: Identifier

    @property
    def of_rule(self) -> str | None:
        return self.of

    def check_rule(self, rule: Any) -> None:
        if not rule.bands:
            fail(
                f"the fraction rule {rule.id!r} needs a band, for example reject: {{outside_top: 0.30}}",
                self.kind, key=True,
            )  # fmt: skip
        if rule.when is not None:
            fail("a fraction ranks the rows of its rule; put the condition into that rule", "when", key=True)

    def check_place(self, rule: Any, earlier: Mapping[str, Any], all_ids: set[str], decides: bool) -> None:
        at = (self.kind, "of")
        if self.of == rule.id:
            fail(f"the fraction rule {self.of!r} ranks itself; `of` names an earlier rule of another kind", *at)
        if self.of not in earlier:
            if self.of in all_ids:
                fail(f"the rule {self.of!r} comes later; put it before {rule.id!r}", *at)
            fail(f"there is no rule {shown(self.of)} before {rule.id!r}" + suggest(self.of, earlier), *at)
        if earlier[self.of].measure.ranks:
            fail(f"{self.of!r} is itself a fraction; `of` names a rule with a score of its own", *at)

    def check_band(self, band: Band, *at: str | int) -> None:
        direction, value = band.direction, band.value
        if not band.ranks:
            fail(
                f"a fraction rule ranks, so write outside_top or outside_bottom instead of {direction}",
                *at, direction, key=True,
            )  # fmt: skip
        if not 0.0 < value <= 1.0:
            hint = f"; did you mean {value / 100:g}?" if 1.0 < value <= 100.0 else ""
            fail(f"{direction} is {value:g}, but a fraction is above 0 and at most 1{hint}", *at, direction)

    def answer(self, thresholds: Sequence[float], files: Attachments) -> Answer:
        return Answer(lambda rows: (rows.values[self.of], None))

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        return ["Ranks all images by the score of ", Written(spec["of"]), "."]

    @classmethod
    def measured(cls, spec: Any) -> Words:
        return [f"the score of {spec['of']}"]
