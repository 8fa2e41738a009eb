"""One file per thing that is done to finished runs or with a model: verify, export, forget, compare, import, rank, classify."""

from __future__ import annotations

from clipfilter.operations.classify import CLASSIFIED, classify_stream
from clipfilter.operations.compare import Comparison, Flip, Side, compare_policies, escalated_rows
from clipfilter.operations.estimate import CostConfig, Estimate, estimate_lines
from clipfilter.operations.expectations import TestReport, run_tests
from clipfilter.operations.export import export_run
from clipfilter.operations.forget import forget_rows
from clipfilter.operations.import_run import ImportOptions, import_embeddings
from clipfilter.operations.rank import Best, Ranker, best_of, rank
from clipfilter.operations.receipt import check_receipt, read_receipt
from clipfilter.operations.reshard import reshard
from clipfilter.operations.verify import verify_run

__all__ = [
    "CLASSIFIED",
    "Best",
    "Comparison",
    "CostConfig",
    "Estimate",
    "Flip",
    "ImportOptions",
    "Ranker",
    "Side",
    "TestReport",
    "best_of",
    "check_receipt",
    "classify_stream",
    "compare_policies",
    "escalated_rows",
    "estimate_lines",
    "export_run",
    "forget_rows",
    "import_embeddings",
    "rank",
    "read_receipt",
    "reshard",
    "run_tests",
    "verify_run",
]
