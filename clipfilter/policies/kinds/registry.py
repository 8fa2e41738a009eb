"""Every kind of rule, in the order in which reports and refusals list them.

A new kind is one file beside this one, with a subclass of `Measure`, and its entry here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipfilter.policies.kinds.alignment import Alignment
from clipfilter.policies.kinds.base import Measure
from clipfilter.policies.kinds.combine import Combine
from clipfilter.policies.kinds.concept import Concept
from clipfilter.policies.kinds.fraction import Fraction
from clipfilter.policies.kinds.head import Head
from clipfilter.policies.kinds.known import Known
from clipfilter.policies.kinds.metadata import Metadata
from clipfilter.policies.kinds.pixels import Pixels
from clipfilter.policies.kinds.safety import Safety
from clipfilter.policies.kinds.text import Text

MEASURES: tuple[type[Measure], ...] = (
    Concept, Alignment, Head, Safety, Metadata, Pixels, Text, Known, Combine, Fraction,
)  # fmt: skip
#: By name; a test that tries a kind out adds it for a while.
KINDS: dict[str, type[Measure]] = {measure.kind: measure for measure in MEASURES}


def measure_of(kind: str) -> type[Measure]:
    """The kind of this name."""
    return KINDS[kind]


def measure_in(rule: Mapping[str, Any]) -> type[Measure]:
    """The kind of a rule in its canonical form (JSON data)."""
    return next(measure for kind, measure in KINDS.items() if kind in rule)
