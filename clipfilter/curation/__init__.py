"""Dataset-level filters: rules that rank or compare all rows of a dataset."""

from __future__ import annotations

from clipfilter.curation.fraction import Threshold, dataset_thresholds, fraction_threshold, fraction_thresholds

__all__ = ["Threshold", "dataset_thresholds", "fraction_threshold", "fraction_thresholds"]
