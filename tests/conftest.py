"""What all tests share: quick jobs, one core per process when several processes test at once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

from tests.support import quick


def pytest_configure(config: pytest.Config) -> None:
    """Give each of pytest-xdist's processes a core of its own: teams of threads that compete cost twice the time."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    cores = sorted(os.sched_getaffinity(0))
    if worker.startswith("gw") and len(cores) > 1:
        os.sched_setaffinity(0, {cores[int(worker[2:]) % len(cores)]})
    if quick.MEMORY not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="clipfilter-vectors-")
        config.add_cleanup(folder.cleanup)
        os.environ[quick.MEMORY] = folder.name
    quick.install()


@pytest.fixture(autouse=True)
def _processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Worker processes for the tests that are about them (marker `processes`)."""
    quick.processes = request.node.get_closest_marker("processes") is not None
    yield
    quick.processes = False


@pytest.fixture(scope="session", autouse=True)
def _encoders_stay_as_they_are() -> Iterator[None]:
    yield
    assert quick.changed_encoders() == []
