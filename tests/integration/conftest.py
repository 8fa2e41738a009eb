"""One dataset and one undisturbed run of it, shared by the integration tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipfilter.engine.job import JobRequest, JobResult, run_job
from tests.support.engine import policy_file, write_tars


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three webdataset shards of 40 real photographs each."""
    return write_tars(tmp_path_factory.mktemp("dataset") / "tars", 3, 40)


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return policy_file(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def finished(dataset: Path, policy: str, tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    """A finished local run; tests must not change it."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return run_job(JobRequest("run", str(dataset), str(out), policy=policy, engine="local"))


@pytest.fixture(scope="session")
def embedded(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    out = tmp_path_factory.mktemp("embedded") / "out"
    return run_job(JobRequest("embed", str(dataset), str(out), engine="local"))
