"""Dataset-level filters: rules that rank or compare all rows of a dataset."""

from __future__ import annotations

from clipfilter.curation.curate import add_balance, add_scores
from clipfilter.curation.datacomp import make_baselines, select, write_subset
from clipfilter.curation.dedup import DedupOptions, find_duplicates
from clipfilter.curation.uids import HALVES, uid_halves

__all__ = [
    "HALVES",
    "DedupOptions",
    "add_balance",
    "add_scores",
    "find_duplicates",
    "make_baselines",
    "select",
    "uid_halves",
    "write_subset",
]
