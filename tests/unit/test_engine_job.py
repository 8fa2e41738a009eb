"""A request of a job is resolved once: what is asked for, what the output directory says already, what depends on the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipfilter.engine import DEFAULT_BATCH_SIZE, JobRequest, Resources, resolve
from clipfilter.engine.worker import Done, Inputs, Task
from clipfilter.errors import RefusedError
from clipfilter.runs import Base, settle_plan
from tests.support.engine import PHOTOS
from tests.support.runs import commit_of
from tests.support.search import unit, write_run

FINGERPRINT = {"model": "nano@3", "weights_sha256": "w", "architecture": "a", "dtype": "fp32", "backend": "torch"}


def request(out: Path, /, **more: object) -> JobRequest:
    return JobRequest(**{"job": "embed", "source": str(PHOTOS), "out": str(out), **more})  # type: ignore[arg-type]


def test_a_new_job_takes_the_defaults_of_its_device(tmp_path: Path) -> None:
    assert set(DEFAULT_BATCH_SIZE) == {"cpu", "cuda"}
    plan = resolve(request(tmp_path / "out"))
    assert (plan.existing, plan.base, plan.text) == (None, None, True)
    assert (plan.options("cpu")["batch_size"], plan.dtype("cpu")) == (DEFAULT_BATCH_SIZE["cpu"], "fp32")
    assert (plan.options("cuda")["batch_size"], plan.dtype("cuda")) == (DEFAULT_BATCH_SIZE["cuda"], "bf16")
    spec = plan.spec(Resources(1, 2, "cuda"))
    assert (spec.model, spec.dtype, spec.options) == (plan.model, "bf16", plan.options("cuda"))
    settled = plan.settled("cpu", FINGERPRINT)
    assert settled.model == {name: value for name, value in FINGERPRINT.items() if name != "backend"}
    assert (settled.source, settled.policy, settled.text_column) == (plan.dataset.to_plan(), None, True)
    assert not (tmp_path / "out").exists(), "nothing is written"


def test_a_repeated_job_takes_what_its_plan_says_and_another_is_refused(tmp_path: Path) -> None:
    first = resolve(request(tmp_path / "out", batch_size=7))
    settle_plan(first.directory, first.settled("cpu", FINGERPRINT))
    again = resolve(request(tmp_path / "out"))
    assert (again.options("cuda")["batch_size"], again.dtype("cuda")) == (7, "fp32")
    assert again.settled("cuda", FINGERPRINT) == again.existing
    for change, said in (
        ({"batch_size": 9}, "options.batch_size was 7, now 9"),
        ({"model": "ViT-B-32"}, "model.model was"),
        ({"job": "score"}, 'job was "embed"'),
        ({"captions": "none"}, "text_column was true"),
        ({"color": "managed"}, 'options.color was .*, now "managed"'),
    ):
        with pytest.raises(RefusedError, match=f"another plan .*{said}"):
            resolve(request(tmp_path / "out", **change))


def test_a_filter_takes_everything_from_the_run_it_decides(tmp_path: Path) -> None:
    model = {**FINGERPRINT, "dtype": "bf16"}
    run = str(write_run(tmp_path / "run", {0: unit(3)}, model=model))
    plan = resolve(request(tmp_path / "out", job="filter", source=run, policy="demo"))
    assert plan.base is not None
    assert (plan.model, plan.dtype("cpu"), plan.options("cuda")) == (
        "nano@3",
        "bf16",
        {"copy": False, "decode": "fast"},
    )
    assert plan.input == {
        "run": run, "version": "000001", "plan_sha256": plan.base.plan.sha256, "source": plan.base.plan.source,
    }  # fmt: skip
    for change, said in (({"limit": 5}, "used whole"), ({"out": run}, "is the run itself")):
        with pytest.raises(RefusedError, match=said):
            resolve(request(tmp_path / "out", **{"job": "filter", "source": run, "policy": "demo", **change}))


def test_tasks_and_their_results_travel_as_json() -> None:
    commit = commit_of("a" * 16, "decided", base=Base("/run", "commits/x"), thresholds={"r.reject": 0.5})
    for inputs in (None, Inputs("/run", commit)):
        task = Task("decide", commit.shard, 2, "p", isolated=True, inputs=inputs, thresholds={"r.reject": None})
        assert Task.from_json(task.to_json()) == task
    assert Done.from_json(Done(commit, False).to_json()) == Done(commit, False)
