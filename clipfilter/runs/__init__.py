"""The noun of the product: a run on disk. Its plan, commits, versions, columns and vectors, and who may write them."""

from __future__ import annotations

from clipfilter.runs import ledger
from clipfilter.runs.columns import (
    FACTS,
    FAILED,
    IDENTITY,
    annotate,
    as_matrix,
    decision_inputs,
    embeddings_schema,
    failed_table,
    vector_column,
    with_facts,
)
from clipfilter.runs.derive import derive, finish_run, refuse_existing
from clipfilter.runs.ledger import FINAL_STAGE
from clipfilter.runs.pictures import Pictures
from clipfilter.runs.plan import PLAN_FILE, Job, Plan, of_run, read_plan, refuse_if_different, settle_plan
from clipfilter.runs.records import (
    COUNTS,
    FILE_KINDS,
    Account,
    Base,
    Commit,
    Counts,
    DataFile,
    FailedShard,
    FileKind,
    Files,
    Thresholds,
    Totals,
    Version,
    Work,
    WorkerDetails,
    check_keys,
)
from clipfilter.runs.run import DERIVED, Run, RunShard, embeddings_of, is_run, read_table, read_tables
from clipfilter.runs.vectors import RunVectors, VectorShard
from clipfilter.runs.writer import HASH_LENGTH, ShardWriter

__all__ = [
    "COUNTS",
    "DERIVED",
    "FACTS",
    "FAILED",
    "FILE_KINDS",
    "FINAL_STAGE",
    "HASH_LENGTH",
    "IDENTITY",
    "PLAN_FILE",
    "Account",
    "Base",
    "Commit",
    "Counts",
    "DataFile",
    "FailedShard",
    "FileKind",
    "Files",
    "Job",
    "Pictures",
    "Plan",
    "Run",
    "RunShard",
    "RunVectors",
    "ShardWriter",
    "Thresholds",
    "Totals",
    "VectorShard",
    "Version",
    "Work",
    "WorkerDetails",
    "annotate",
    "as_matrix",
    "check_keys",
    "decision_inputs",
    "derive",
    "embeddings_of",
    "embeddings_schema",
    "failed_table",
    "finish_run",
    "is_run",
    "ledger",
    "of_run",
    "read_plan",
    "read_table",
    "read_tables",
    "refuse_existing",
    "refuse_if_different",
    "settle_plan",
    "vector_column",
    "with_facts",
]
