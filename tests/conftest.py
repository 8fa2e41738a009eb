"""What all tests share: quick jobs, one core per process when several processes test at once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import pytest

from clipfilter.images import apart
from tests.support import quick

_all_cores = _own_cores = os.sched_getaffinity(0)


def pytest_configure(config: pytest.Config) -> None:
    """Give each of pytest-xdist's processes a core of its own: teams of threads that compete cost twice the time."""
    global _own_cores
    worker, cores = os.environ.get("PYTEST_XDIST_WORKER", ""), sorted(_all_cores)
    if worker.startswith("gw"):
        _own_cores = {cores[int(worker[2:]) % len(cores)]}
        os.sched_setaffinity(0, _own_cores)  # before torch counts them
    if quick.MEMORY not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="clipfilter-vectors-")
        config.add_cleanup(folder.cleanup)
        os.environ[quick.MEMORY] = folder.name
    quick.install()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process per core; each needs two gigabytes, so four at most."""
    return min(4, len(os.sched_getaffinity(0)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse a soak test that has no smaller one beside it: other parameters, or the test that its marker names."""
    if any("::" in argument for argument in config.args):
        return  # some of a file's tests only
    every_time = {(item.path, item.originalname) for item in items if not item.get_closest_marker("soak")}  # type: ignore[attr-defined]
    for item in items:
        soak = item.get_closest_marker("soak")
        if soak and (item.path, *(soak.args or (item.originalname,))) not in every_time:  # type: ignore[attr-defined]
            raise pytest.UsageError(f"{item.nodeid} is soak, and no smaller test runs every time")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before any fixture: what the test's markers say of worker processes and of nano."""
    quick.processes = item.get_closest_marker("processes") is not None
    os.sched_setaffinity(0, _all_cores if item.get_closest_marker("cores") else _own_cores)
    quick.fresh = item.get_closest_marker("fresh") is not None


@pytest.fixture(scope="session", autouse=True)
def _encoders_stay_as_they_are() -> Iterator[None]:
    yield
    assert quick.changed_encoders() == []


@pytest.fixture
def own_nursery(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process that forks children is started afresh, and ended with the test."""
    monkeypatch.setattr(apart, "_nursery", None)
    yield
    if apart._nursery is not None:
        apart._nursery.close()
