"""An executor that gives a job's tasks to a Beam pipeline; the driver, the worker and the files stay the engine's.

What goes through the pipeline is one short JSON text per shard: the name of the commit that holds its rows. Workers
read that commit from the run and write their own into OUT, from where the driver takes the result: nothing comes back
through the runner.
"""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from clipfilter.beam.options import BeamOptions
from clipfilter.beam.tasks import reference_to
from clipfilter.engine import Done, JobSpec, Outcome, Resources, Task, Worker
from clipfilter.errors import RefusedError
from clipfilter.runs import ledger
from clipfilter.storage import Directory

if TYPE_CHECKING:
    import apache_beam as beam

log = logging.getLogger("clipfilter.engine")

#: Tasks of one pipeline. References are about 100 bytes, and runners refuse graphs of more than some megabytes.
TASKS_PER_PIPELINE = 50_000


class BeamExecutor:
    """Runs `filter` jobs on a Beam runner. Use it as `run_job(request, executor=BeamExecutor(options))`.

    Raises RefusedError where Beam is not installed, and for jobs that read images.
    """

    name = "beam"

    def __init__(self, options: BeamOptions, *, tasks_per_pipeline: int = TASKS_PER_PIPELINE) -> None:
        self._options = options
        self._capacity = tasks_per_pipeline
        self._tasks: dict[int, Task] = {}
        self._rows = 0
        self._spec: JobSpec | None = None

    def resources(self) -> Resources:
        # The runner decides how many processes there are; each uses one thread.
        return Resources(workers=1, threads=1, device="cpu")

    def start(self, spec: JobSpec) -> dict[str, Any]:
        if spec.job != "filter":
            raise RefusedError(
                "Beam decides stored embeddings again; for jobs that read images use --engine local or ray."
            )
        self._options.refuse_unshared(spec.out, "--out")
        self._options.refuse_unshared(spec.source["run"], "the run")
        self._spec = spec
        worker = Worker(spec)
        try:
            return worker.describe()
        finally:
            worker.close()

    def free(self) -> int:
        return self._capacity - len(self._tasks)

    def submit(self, ticket: int, task: Task) -> None:
        self._tasks[ticket] = task

    def poll(self, timeout: float) -> list[Outcome]:
        """Run one pipeline over everything that was submitted, to its end; `timeout` is not used."""
        tasks, self._tasks = self._tasks, {}
        if not tasks:
            return []
        assert self._spec is not None
        trouble = self._run(self._spec, list(tasks.values()))
        directory = Directory(self._spec.out)
        found = ledger.list_commits(directory)
        names = {ticket: _commit_name(task) for ticket, task in tasks.items()}
        done = {t: n.path for t, n in names.items() if _is_there(n, found)}
        commits = dict(zip(done, ledger.commits(directory, done.values()), strict=True))
        outcomes = []
        for ticket in tasks:
            if ticket in done:
                commit = commits[ticket]
                self._rows += commit.counts.rows
                outcomes.append(Outcome(ticket, "done", result=Done(commit, True)))
            else:
                # The worker has tried it three times; a pipeline that broke as a whole is worth another one.
                message = trouble or "it could not be decided; the log of the Beam workers says why"
                outcomes.append(Outcome(ticket, "error", message=message, permanent=not trouble))
        return outcomes

    def rows_done(self) -> int:
        return self._rows

    def workers_alive(self) -> int:
        return 1

    def waits_for(self) -> list[str]:
        return []

    def close(self) -> None:
        """Nothing outlives a pipeline."""

    def _run(self, spec: JobSpec, tasks: list[Task]) -> str:
        """Run a pipeline over tasks of one stage; "" or what went wrong with the pipeline as a whole."""
        log.info("a Beam pipeline decides %d shards on %s", len(tasks), self._options.runner)
        pipeline = self._options.pipeline()
        build(pipeline, spec, tasks)
        began = time.monotonic()
        try:
            state = pipeline.run().wait_until_finish()
        except ImportError as error:
            raise RefusedError(f"the Beam runner lacks a package: {error}; install what it names.") from error
        except Exception as error:
            log.exception("the Beam pipeline failed")
            return f"the Beam pipeline failed: {_last_line(error)}"
        log.info("the pipeline ended as %s after %.1f s", state, time.monotonic() - began)
        return "" if state == "DONE" else f"the Beam pipeline ended as {state}"


def build(pipeline: beam.Pipeline, spec: JobSpec, tasks: list[Task]) -> beam.PCollection:
    """Add a stage to a pipeline: Create(references) | Reshuffle | Decide. All elements are `str`, coded as UTF-8.

    The tasks are of one stage: they differ in commit, generation and attempt only.
    """
    import apache_beam as beam

    from clipfilter.beam.transforms import Decide

    first = tasks[0]
    assert first.inputs is not None
    common = {
        "op": first.op,
        "plan_sha256": first.plan_sha256,
        "thresholds": first.thresholds,
        "run": first.inputs.run,
    }
    references = [reference_to(task) for task in tasks]
    return (
        pipeline
        | "Shards" >> beam.Create(references).with_output_types(str)
        | "Spread" >> beam.Reshuffle()
        | "Decide" >> beam.ParDo(Decide(json.dumps(spec.to_json()), json.dumps(common))).with_output_types(str)
    )


def _commit_name(task: Task) -> ledger.CommitName:
    stage = "scored" if task.op == "score" else ledger.FINAL_STAGE["filter"]
    return ledger.CommitName(task.shard.id, stage, task.generation)


def _is_there(name: ledger.CommitName, found: dict[tuple[str, str], ledger.CommitName]) -> bool:
    newest = found.get((name.shard, name.stage))
    return newest is not None and newest.generation >= name.generation


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
