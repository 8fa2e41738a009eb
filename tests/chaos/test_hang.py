"""What hangs: stopped workers, sleeping decoders, hostile files among photos. Each job ends by itself with the right rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from clipfilter.engine import InlineExecutor, JobRequest, run_job
from clipfilter.engine.executors.local import LocalExecutor
from clipfilter.operations.verify import verify_run
from tests.support.engine import REPO, data_files, policy_file, samples, write_tars
from tests.support.hostile import hostile_files, plant
from tests.support.sources import write_webdataset

pytestmark = [pytest.mark.chaos, pytest.mark.cores]

# A job that stops one of its own workers once a shard is done, and says what its progress line says.
STOPPED = """
import os, signal, sys
import psutil
from clipfilter.engine import JobRequest, run_job
from clipfilter.engine.executors import interface

interface.SILENT_SECONDS, interface.TOLD_SECONDS = 6.0, 2.0
source, policy, out, engine, workers, marker, count = sys.argv[1:]
stopped = []

class Display:
    def update(self, progress):
        print(*progress.waits_for, sep="\\n", flush=True)
        if progress.shards_done and not stopped:
            for child in psutil.Process().children(recursive=True):
                if marker in " ".join(child.cmdline()) and len(stopped) < int(count):
                    os.kill(child.pid, signal.SIGSTOP)
                    stopped.append(child.pid)

request = JobRequest("run", source, out, policy=policy, engine=engine, workers=int(workers), threads=1, batch_size=8)
result = run_job(request, Display())
assert stopped
print(result.totals["rows"], result.totals["failed"], result.exit_code)
"""


@pytest.mark.parametrize(
    ("engine", "workers", "count"),
    [
        ("local", 1, 1),
        pytest.param("local", 2, 2, marks=pytest.mark.soak),
        pytest.param("ray", 1, 1, marks=pytest.mark.soak),
    ],
)
def test_a_stopped_worker_is_named_ended_and_its_shards_done_by_another(
    engine: str, workers: int, count: int, tmp_path: Path
) -> None:
    source = write_tars(tmp_path / "tars", 4, 16)
    policy = policy_file(tmp_path)
    marker = "worker_process" if engine == "local" else "ray::EncoderActor"
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, source, policy, tmp_path / "out", engine, str(workers), marker, str(count)],
        capture_output=True, text=True, timeout=300, cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "64 0 0"
    assert "worker 1 silent for " in done.stdout
    assert "ending it at 6 s" in done.stdout
    assert "and was ended" in (tmp_path / "out" / "run.log").read_text()
    want = JobRequest("run", str(source), str(tmp_path / "want"), policy=policy, batch_size=8)
    run_job(want, executor=InlineExecutor(threads=1))
    assert data_files(tmp_path / "out") == data_files(tmp_path / "want")
    assert verify_run(str(tmp_path / "out")).problems == []


# A job whose replacement worker dies while it loads; another worker goes on, and a third start succeeds.
REPLACED = """
import os, signal, sys
from clipfilter.engine import JobRequest, run_job
from clipfilter.engine.executors import local

source, policy, out = sys.argv[1:]
start = local.LocalExecutor._start_worker
started = []

def start_worker(self):
    os.environ["END_AT_ONCE"] = "1" if len(started) == 2 else ""
    start(self)
    started.append(self._workers[-1])

local.LocalExecutor._start_worker = start_worker
killed = []

class Display:
    def update(self, progress):
        if progress.shards_done and not killed:
            killed.append(next(worker for worker in started if worker.tickets))
            killed[0].kill()

request = JobRequest("run", source, out, policy=policy, engine="local", workers=2, threads=1, batch_size=8)
result = run_job(request, Display())
print(len(started), result.totals["rows"], result.totals["failed"], result.exit_code)
"""


@pytest.mark.soak("test_a_stopped_worker_is_named_ended_and_its_shards_done_by_another")
def test_a_replacement_that_dies_while_it_loads_does_not_end_the_job(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import os\nif os.environ.get('END_AT_ONCE'): os._exit(5)\n")
    source = write_tars(tmp_path / "tars", 6, 16)
    done = subprocess.run(
        [sys.executable, "-c", REPLACED, source, policy_file(tmp_path), tmp_path / "out"],
        capture_output=True, text=True, timeout=300, cwd=REPO,
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}:{REPO}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["4", "96", "0", "0"]
    assert "died while it started (exit code 5)" in (tmp_path / "out" / "run.log").read_text()


def failures(out: Path) -> dict[str, str]:
    found = [row for path in (out / "failed").glob("*") for row in pq.read_table(path).to_pylist()]
    return {row["cf_key"]: row["cf_error_class"] for row in found}


@pytest.mark.parametrize(
    ("decode_in", "photos"),
    [
        ("processes", 200),
        pytest.param("threads", 200, marks=pytest.mark.soak),
        pytest.param("processes", 10_000, marks=pytest.mark.soak),
        pytest.param("threads", 10_000, marks=pytest.mark.soak),
    ],
)
def test_of_many_photos_the_hostile_files_alone_fail(
    decode_in: str, photos: int, own_nursery: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", plant(tmp_path / "site"))
    hostile = hostile_files()
    made: dict[str, list[dict[str, Any]]] = {"hostile": samples(photos), "broken": samples(photos)}
    want: dict[str, str] = {}
    for place, (data, error_class) in enumerate(hostile.values()):
        row = (2 * place + 1) * photos // (2 * len(hostile))
        made["hostile"][row]["jpg"], made["broken"][row]["jpg"] = data, b"no picture"
        want[made["hostile"][row]["__key__"]] = error_class
    policy = policy_file(tmp_path)
    for name, rows in made.items():
        write_webdataset(tmp_path / name / "0.tar", rows)
        request = JobRequest(
            "run", str(tmp_path / name), str(tmp_path / f"out-{name}"), policy=policy, engine="local", workers=1, threads=2,
            max_failures=0.1, decode_in=decode_in, decode_timeout=4.0,  # type: ignore[arg-type]
        )  # fmt: skip
        # What kills a child leaves its owner alone: only threads need a worker process around them.
        result = run_job(request, executor=InlineExecutor(2) if decode_in == "processes" else LocalExecutor(1, 2))
        assert (result.totals["rows"], result.exit_code) == (photos, 0)
    assert failures(tmp_path / "out-hostile") == want
    good = [{k: v for k, v in data_files(tmp_path / f"out-{n}").items() if "failed/" not in k} for n in made]
    assert good[0] == good[1]
    [commit] = [json.loads(path.read_text()) for path in (tmp_path / "out-hostile" / "commits").iterdir()]
    assert commit["work"]["attempt"] == (1 if decode_in == "processes" else 2)
    assert verify_run(str(tmp_path / "out-hostile")).problems == []
