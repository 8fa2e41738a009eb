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


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core; each needs two gigabytes, so four at most."""
    return min(4, len(os.sched_getaffinity(0)))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: what the test's markers say of worker processes and of nano."""
    quick.processes = item.get_closest_marker("processes") is not None
    quick.fresh = item.get_closest_marker("fresh") is not None


@pytest.fixture(scope="session", autouse=True)
def _encoders_stay_as_they_are() -> Iterator[None]:
    yield
    assert quick.changed_encoders() == []
