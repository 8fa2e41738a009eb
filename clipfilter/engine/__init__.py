"""Running a job: the unit of work (`process_shard`), the executors that schedule it, and the ledger that proves it."""

from __future__ import annotations

from clipfilter.engine.decoding import (
    DecodedBatch,
    StageTimes,
    ThreadDecoder,
    decode_batches,
    decoded_ahead,
    prefetch,
)
from clipfilter.engine.driver import MAX_ATTEMPTS, Display, Progress, StageResult, Unit, fix_thresholds, run_units
from clipfilter.engine.executors.inline import InlineExecutor
from clipfilter.engine.executors.interface import Outcome, Resources
from clipfilter.engine.executors.ray import RayExecutor
from clipfilter.engine.hardware import MAX_THREADS, cpu_count
from clipfilter.engine.job import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_DTYPE,
    EXIT_DONE,
    EXIT_FAILURES,
    JobPlan,
    JobRequest,
    JobResult,
    refuse_foreign_directory,
    refuse_other_weights,
    resolve,
    run_job,
    run_plan,
    stored_model,
)
from clipfilter.engine.metrics import MetricsOptions, published, together
from clipfilter.engine.overview import plan_overview
from clipfilter.engine.reading import PatientReader
from clipfilter.engine.shard import EmbeddedShard, embed_rows, shard_report
from clipfilter.engine.stream import (
    Input,
    StreamOptions,
    embed_stream,
    on_device,
    open_inputs,
    stream_options,
)
from clipfilter.engine.worker import Done, Inputs, JobSpec, Task, Worker, compile_for

__all__ = [
    "DEFAULT_BATCH_SIZE",
    "DEFAULT_DTYPE",
    "EXIT_DONE",
    "EXIT_FAILURES",
    "MAX_ATTEMPTS",
    "MAX_THREADS",
    "DecodedBatch",
    "Display",
    "Done",
    "EmbeddedShard",
    "InlineExecutor",
    "Input",
    "Inputs",
    "JobPlan",
    "JobRequest",
    "JobResult",
    "JobSpec",
    "MetricsOptions",
    "Outcome",
    "PatientReader",
    "Progress",
    "RayExecutor",
    "Resources",
    "StageResult",
    "StageTimes",
    "StreamOptions",
    "Task",
    "ThreadDecoder",
    "Unit",
    "Worker",
    "compile_for",
    "cpu_count",
    "decode_batches",
    "decoded_ahead",
    "embed_rows",
    "embed_stream",
    "fix_thresholds",
    "on_device",
    "open_inputs",
    "plan_overview",
    "prefetch",
    "published",
    "refuse_foreign_directory",
    "refuse_other_weights",
    "resolve",
    "run_job",
    "run_plan",
    "run_units",
    "shard_report",
    "stored_model",
    "stream_options",
    "together",
]
