"""Sums: the weighted scores of earlier rules as one score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator

from clipfilter.policies.arithmetic import settle
from clipfilter.policies.kinds.base import Answer, Measure, Rows, Words, Written
from clipfilter.policies.parts.attachments import Attachments
from clipfilter.policies.parts.fields import MAX_PHRASES, fail, number, shown, suggest


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


class Combine(Measure):
    """A weighted sum of the scores of earlier rules."""

    kind = "combine"
    about = "A weighted sum of the scores of earlier rules."

    weighted: Annotated[dict[str, float], BeforeValidator(_parts)]

    @property
    def uses(self) -> tuple[str, ...]:
        return tuple(self.weighted)

    def check_place(self, rule: Any, earlier: Mapping[str, Any], all_ids: set[str], decides: bool) -> None:
        for name in self.weighted:
            at = (self.kind, "weighted", name)
            if name not in earlier:
                if name in all_ids:
                    fail(f"the rule {name!r} does not come before {rule.id!r}; put it there", *at, key=True)
                fail(f"there is no rule {shown(name)} before {rule.id!r}" + suggest(name, earlier), *at, key=True)
            if not earlier[name].measure.measures:
                fail(f"{name!r} is of kind {earlier[name].kind}, whose score cannot be weighed", *at, key=True)

    def answer(self, thresholds: Sequence[float], files: Attachments) -> Answer:
        def score(rows: Rows) -> tuple[np.ndarray, None]:
            """The sum in float64; a part that does not apply to a row adds nothing."""
            total: np.ndarray | float = 0.0
            for name, weight in self.weighted.items():
                part = rows.values[name].astype(np.float64)
                if name in rows.skipped:
                    part[rows.skipped[name]] = 0.0
                total = total + weight * part
            return settle(np.asarray(total), thresholds), None

        return Answer(score)

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        said: list[str | Written] = ["The weighted sum of other rules’ scores: "]
        for place, (name, weight) in enumerate(spec["weighted"].items()):
            said += [" + " if place else "", f"{weight:g} × ", Written(name)]
        return [*said, "."]

    @classmethod
    def measured(cls, spec: Any) -> Words:
        return ["the sum of " + " + ".join(f"{weight:g} {name}" for name, weight in spec["weighted"].items())]

    @classmethod
    def reach(cls, threshold: float) -> float:
        # The parts' own errors grow with their weights.
        return 1e-3 * max(1.0, abs(threshold))
