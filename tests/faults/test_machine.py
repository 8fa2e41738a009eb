"""Machines that lack something or lose it: links, renames, locks, space for temporary files, threads, the time of day."""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from clipfilter.operations.verify import verify_run
from tests.faults.conftest import OPTIONS, Inputs
from tests.faults.test_every_call import content, newest
from tests.support.faults import Fault, calls, clipfilter, started


def run(inputs: Inputs, out: Path, source: Path | None = None) -> list[str | Path]:
    return ["run", source or inputs.tars, "--policy", inputs.policy, "--out", out, *OPTIONS]


def one_sentence(errors: str) -> bool:
    """Whether a person reads one sentence of ours, and no trace of the code."""
    return "Traceback" not in errors and errors.count("clipfilter: ") == 1


def always(kinds: str, number: int, below: Path) -> Fault:
    """Every such call below a folder fails with an error number, as on a file system that has no such thing."""
    return Fault(below=below, calls=kinds, at=1, how="full", errno=number)


@pytest.mark.parametrize(
    "number",
    [errno.EPERM, *(pytest.param(n, marks=pytest.mark.soak) for n in (errno.ENOTSUP, errno.ENOSYS, errno.EMLINK))],
)
def test_a_file_system_without_hard_links(number: int, inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = clipfilter(*run(inputs, out), fault=always("link", number, out))
    assert done.returncode == 0, done.stderr
    assert content(out) == content(inputs.decided)


@pytest.mark.parametrize("kinds", ["link,lock", pytest.param("lock", marks=pytest.mark.soak)])
def test_a_file_system_without_locks(kinds: str, inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = clipfilter(*run(inputs, out), fault=always(kinds, errno.ENOLCK, out))
    assert done.returncode == 0, done.stderr
    assert content(out) == content(inputs.decided)


@pytest.mark.parametrize(
    ("kinds", "number"),
    [
        ("link,rename", errno.EBUSY),
        pytest.param("rename", errno.EIO, marks=pytest.mark.soak),
        pytest.param("rename", errno.EXDEV, marks=pytest.mark.soak),
        pytest.param("sync", errno.EIO, marks=pytest.mark.soak),
    ],
)
def test_where_nothing_can_be_published_a_run_ends_and_can_go_on(
    kinds: str, number: int, inputs: Inputs, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = clipfilter(*run(inputs, out), fault=always(kinds, number, out))
    assert done.returncode in (1, 2, 3)
    assert one_sentence(done.stderr), done.stderr
    assert clipfilter(*run(inputs, out)).returncode == 0
    assert newest(out) == newest(inputs.decided)


def test_a_place_that_is_read_only(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    everything = "open,write,sync,rename,link,mkdir,unlink"
    done = clipfilter(*run(inputs, out), fault=always(everything, errno.EROFS, out))
    assert done.returncode == 2
    assert one_sentence(done.stderr), done.stderr
    assert "cannot be written" in done.stderr
    assert not out.exists()


@pytest.mark.parametrize("share", [0.5, *(pytest.param(n / 20, marks=pytest.mark.soak) for n in range(2, 20))])
def test_a_place_that_vanishes_is_never_called_done(share: float, inputs: Inputs, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    clipfilter(*run(inputs, tmp_path / "first"), fault=Fault(below=tmp_path / "first", log=log))
    count = next(call.number for call in reversed(calls(log)) if "/versions" in call.path)
    done = clipfilter(*run(inputs, out), fault=Fault(below=out, at=max(5, int(share * count)), how="vanish"))
    assert "Traceback" not in done.stderr
    if done.returncode == 0:
        assert verify_run(str(out)).problems == []
        assert content(out) == content(inputs.decided)
    else:
        assert one_sentence(done.stderr), done.stderr
    shutil.rmtree(out, ignore_errors=True)
    os.rename(f"{out}.gone", out)
    assert clipfilter(*run(inputs, out)).returncode == 0
    assert content(out) == content(inputs.decided)


def test_temporary_files_without_space_or_folder(inputs: Inputs, tmp_path: Path) -> None:
    """Zipped tars are unzipped there."""
    source, space = tmp_path / "zipped", tmp_path / "space"
    source.mkdir()
    space.mkdir()
    for tar in inputs.tars.iterdir():
        (source / f"{tar.name}.gz").write_bytes(gzip.compress(tar.read_bytes(), mtime=0))
    out = tmp_path / "out"
    full = always("write", errno.ENOSPC, space)
    done = clipfilter(*run(inputs, out, source), fault=full, env={"TMPDIR": str(space)})
    assert done.returncode in (1, 2, 3)
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr
    assert clipfilter(*run(inputs, out, source), env={"TMPDIR": str(tmp_path / "nowhere")}).returncode == 0
    assert verify_run(str(out)).problems == []


@pytest.mark.parametrize("count", [0, pytest.param(3, marks=pytest.mark.soak)])
def test_few_threads_can_be_started(count: int, inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = clipfilter(*run(inputs, out), fault=Fault(threads=count))
    assert done.returncode in (0, 3) or one_sentence(done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert clipfilter(*run(inputs, out)).returncode == 0
    assert newest(out) == newest(inputs.decided)


@pytest.mark.parametrize("count", [12, *(pytest.param(n, marks=pytest.mark.soak) for n in range(8, 40, 3))])
def test_few_files_can_be_open(count: int, inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = clipfilter(*run(inputs, out), fault=Fault(files=count))
    assert done.returncode in (0, 3) or one_sentence(done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert clipfilter(*run(inputs, out)).returncode == 0
    assert newest(out) == newest(inputs.decided)


@pytest.mark.soak("test_few_threads_can_be_started")
@pytest.mark.processes
@pytest.mark.parametrize("count", [0, 1, 2, 4, 7, 10, 15])
def test_few_threads_can_be_started_in_each_process(count: int, inputs: Inputs, tmp_path: Path) -> None:
    """Libraries that need a thread and get none end their process, with SIGABRT; nothing else is lost."""
    out = tmp_path / "out"
    process = started(run(inputs, out), Fault(threads=count))
    _, errors = process.communicate(timeout=240)
    assert process.returncode in (0, 3, -signal.SIGABRT) or (process.returncode == 1 and one_sentence(errors)), errors
    assert clipfilter(*run(inputs, out)).returncode == 0
    assert newest(out) == newest(inputs.decided)


@pytest.mark.processes
def test_no_worker_can_be_started(inputs: Inputs, tmp_path: Path) -> None:
    process = started(run(inputs, tmp_path / "out"), Fault(forks=0))
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (1, 2)
    assert one_sentence(errors), errors


@pytest.mark.parametrize(
    "every", [7, pytest.param(1, marks=pytest.mark.soak), pytest.param(50, marks=pytest.mark.soak)]
)
def test_a_clock_that_jumps(every: int, inputs: Inputs, tmp_path: Path) -> None:
    """An hour back, two days ahead, and so on: nothing is waited for, taken for stale, or different."""
    out = tmp_path / "out"
    fault = Fault(clock=f"{every}:0,-3600,172800,-400000000")
    done = clipfilter(*run(inputs, out), fault=fault)
    assert done.returncode == 0, done.stderr
    assert content(out) == content(inputs.decided)


@pytest.mark.soak("test_a_clock_that_jumps")
@pytest.mark.processes
def test_a_run_whose_clock_is_days_ahead_leaves_the_unfinished_files_of_another(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    other = started(run(inputs, out), Fault())
    try:
        while not any(path.name.startswith(".") for path in out.glob(".*")) and other.poll() is None:
            time.sleep(0.01)
        os.killpg(other.pid, signal.SIGSTOP)
        before = sorted(path.name for path in out.glob(".*"))
        done = clipfilter(*run(inputs, out), fault=Fault(clock="1000000:432000"))
        assert done.returncode == 0, done.stderr
        assert before
        assert sorted(path.name for path in out.glob(".*")) == before
    finally:
        os.killpg(other.pid, signal.SIGCONT)
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    assert content(out) == content(inputs.decided)


@pytest.mark.soak("test_a_clock_that_jumps")  # and tests/chaos/test_hang.py
@pytest.mark.processes
@pytest.mark.chaos
@pytest.mark.parametrize("who", ["driver", "worker"])
@pytest.mark.parametrize("moment", [0.5, 2.0, 3.0, 4.5])
def test_stopped_for_a_while(who: str, moment: float, inputs: Inputs, tmp_path: Path) -> None:
    """SIGSTOP, and SIGCONT two seconds later: a machine that was suspended."""
    out = tmp_path / "out"
    process = started(run(inputs, out), Fault())
    time.sleep(moment)
    family = psutil.Process(process.pid).children(recursive=True)
    victims = [psutil.Process(process.pid)] if who == "driver" else family
    for victim in victims:
        _quietly(victim.suspend)
    time.sleep(2)
    for victim in victims:
        _quietly(victim.resume)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert content(out) == content(inputs.decided)


def _quietly(call: Any) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it had ended already
        call()
