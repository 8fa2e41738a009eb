"""What goes through a pipeline for each shard, and the worker that does it."""

from __future__ import annotations

import json
import threading
from typing import Any

from clipfilter.engine import Done, Inputs, JobSpec, Task, Worker
from clipfilter.runs import ledger
from clipfilter.storage import Directory


def reference_to(task: Task) -> str:
    """A short JSON text that stands for the task, among the tasks of its stage."""
    assert task.inputs is not None
    return json.dumps({"commit": task.inputs.commit.name, "generation": task.generation, "attempt": task.attempt})


def task_of(reference: str, common: dict[str, Any]) -> Task:
    """The task that a reference stands for; reads the commit it names."""
    fields = json.loads(reference)
    commit = ledger.read_commit(Directory(common["run"]), fields["commit"])
    return Task(
        op=common["op"],
        shard=commit.shard,
        generation=fields["generation"],
        plan_sha256=common["plan_sha256"],
        inputs=Inputs(common["run"], commit),
        thresholds=common["thresholds"],
        attempt=fields["attempt"],
    )


class OneWorker:
    """The engine's worker of one process: loaded once, used by one thread at a time, nothing left behind."""

    def __init__(self, spec: str) -> None:
        self._worker = Worker(JobSpec(**json.loads(spec)))
        self._turn = threading.Lock()

    def process(self, task: Task) -> Done:
        with self._turn:
            try:
                return self._worker.process(task)
            finally:
                self._worker.close()
