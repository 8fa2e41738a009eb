"""The Ray executor: equal results, an image that kills its worker, two nodes, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipfilter.engine.job import JobRequest, run_job
from clipfilter.errors import RefusedError
from clipfilter.operations.verify import verify_run
from tests.support.engine import FRACTION_POLICY, cli, commits, data_files, policy_file, samples
from tests.support.quick import BATCH_SIZE
from tests.support.sources import write_webdataset

pytestmark = pytest.mark.integration

KILLER = """
import hashlib, os, signal
real = hashlib.sha256
def sha256(data=b"", **more):
    if bytes(data[-6:]) == b"KILLME":
        os.kill(os.getpid(), signal.SIGKILL)
    return real(data, **more)
hashlib.sha256 = sha256
"""


def test_ray_gives_the_very_files_of_the_local_executor(
    finished: object, embedded: object, dataset: Path, policy: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cli("run", str(dataset), "--policy", policy, "--out", str(out), "--engine", "ray", "-q")
    assert data_files(out) == data_files(Path(finished.out))  # type: ignore[attr-defined]
    want = {name: {**commit, "plan": ""} for name, commit in commits(Path(finished.out)).items()}  # type: ignore[attr-defined]
    assert {name: {**commit, "plan": ""} for name, commit in commits(out).items()} == want
    fraction = policy_file(tmp_path, FRACTION_POLICY)
    run = embedded.out  # type: ignore[attr-defined]
    for engine in ("local", "ray"):
        cli("filter", run, "--policy", fraction, "--out", str(tmp_path / engine), "--engine", engine, "-q")
    assert data_files(tmp_path / "local") == data_files(tmp_path / "ray")


def test_ray_may_be_imported_before(embedded: object, policy: str, tmp_path: Path) -> None:
    """In a notebook it often is. Ray has read its authentication mode then, so the cluster does without tokens, and says so."""
    program = (
        "import logging, sys, ray\n"
        "from clipfilter.engine.job import JobRequest, run_job\n"
        "logging.basicConfig()\n"
        "run_job(JobRequest('filter', sys.argv[1], sys.argv[3], policy=sys.argv[2], engine='ray'))\n"
    )
    out = str(tmp_path / "out")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", program, embedded.out, policy, out],  # type: ignore[attr-defined]
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr
    assert not verify_run(out).problems


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_an_image_that_kills_its_decoder_costs_that_row(engine: str, policy: str, tmp_path: Path) -> None:
    made = samples(60)
    clean = write_webdataset(tmp_path / "clean" / "0.tar", made).parent
    made[41]["jpg"] += b"KILLME"
    write_webdataset(tmp_path / "tars" / "0.tar", made)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(KILLER)
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parents[2])])}
    out = tmp_path / "out"
    done = cli(
        "run", str(tmp_path / "tars"), "--policy", policy, "--out", str(out), "--engine", engine,
        "--max-failures", "0.05", "--batch-size", str(BATCH_SIZE), "--json", env=environment,
    )  # fmt: skip
    totals = json.loads(done.stdout)["totals"]
    assert totals["failed_by_class"] == {"decoder_crash": 1}
    assert totals["rows"] == 60
    commit = next(iter(json.loads(p.read_text()) for p in (out / "commits").iterdir()))
    assert commit["work"]["isolated"] is True
    assert verify_run(str(out)).problems == []
    import pyarrow.parquet as pq

    want = run_job(JobRequest("run", str(clean), str(tmp_path / "want"), policy=policy, engine="local"))
    tables = [pq.read_table(next(Path(p, "annotated").glob("*"))).to_pylist() for p in (out, want.out)]
    assert tables[0] == [row for row in tables[1] if row["cf_row"] != 41]


def test_a_cluster_that_does_not_answer_is_refused(dataset: Path, policy: str, tmp_path: Path) -> None:
    done = cli(
        "run", str(dataset), "--policy", policy, "--out", str(tmp_path / "out"), "--address", "127.0.0.1:1", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no Ray cluster answers" in done.stderr


def test_local_paths_are_refused_on_a_cluster_of_several_machines() -> None:
    from clipfilter.engine.executors.ray import RayExecutor

    executor = object.__new__(RayExecutor)
    executor.hosts = {"one", "two"}
    executor.close = lambda: None  # type: ignore[method-assign]
    with pytest.raises(RefusedError, match="path of one machine"):
        executor.refuse_unshared("/data/tars", "the source")
    executor.refuse_unshared("s3://bucket/tars", "the source")
    executor.refuse_unshared("file:///mnt/shared/tars", "the source")
    executor.hosts = {"one"}
    executor.refuse_unshared("/data/tars", "the source")
