"""Dataset-level filters: rules that rank or compare all rows of a dataset."""

from __future__ import annotations

from clipfilter.curation.curate import add_balance, add_scores
from clipfilter.curation.datacomp import make_baselines, select, write_subset
from clipfilter.curation.dedup import DedupOptions, find_duplicates
from clipfilter.curation.uids import HALVES, uid_halves
from clipfilter.policies import Threshold, dataset_thresholds, fraction_threshold, fraction_thresholds

__all__ = [
    "HALVES",
    "DedupOptions",
    "Threshold",
    "add_balance",
    "add_scores",
    "dataset_thresholds",
    "find_duplicates",
    "fraction_threshold",
    "fraction_thresholds",
    "make_baselines",
    "select",
    "uid_halves",
    "write_subset",
]
