"""Dataset-level filters: rules that rank or compare all rows of a dataset."""

from __future__ import annotations

from clipfilter.curation.fraction import Threshold, fraction_threshold, fraction_thresholds

__all__ = ["Threshold", "fraction_threshold", "fraction_thresholds"]
