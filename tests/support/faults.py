"""Commands under which calls of the system fail on purpose: what `faults.c` does, asked for from tests.

The library is compiled when first needed; where there is no compiler, tests that need it are skipped.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.commands import REPO, ForkServer

SOURCE = Path(__file__).with_name("faults.c")
#: What a child of the fork server runs: the library takes its orders, then the command begins. It waits less than a user's:
#: one second for an answer of S3 instead of fifteen, and nothing before a shard is tried again.
_PROGRAM = """
import ctypes, resource, sys, tempfile
tempfile.tempdir = None
ctypes.CDLL(None).fault_arm()
files = int({files!r})
if files:
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
from clipfilter import storage
storage._S3_REQUESTS["read_timeout"] = 1
from clipfilter.engine import driver
driver._RETRY_SECONDS = 0.01
from clipfilter.cli.main import main
sys.argv[0] = "clipfilter"
main()
"""


@dataclass(frozen=True)
class Fault:
    """What goes wrong in a command; the fields are the variables of `faults.c`, where they are explained.

    files: descriptors that the process may have open; None is no limit of ours.
    """

    below: Path | None = None
    at: int = 0
    how: str = "error"
    errno: int = 0
    calls: str = ""
    log: Path | None = None
    clock: str = ""
    threads: int | None = None
    forks: int | None = None
    files: int | None = None

    def env(self) -> dict[str, str]:
        said = {name: value for name, value in vars(self).items() if name != "files"}
        return {f"FAULT_{name.upper()}": "" if value is None else str(value) for name, value in said.items()}


@dataclass(frozen=True)
class Call:
    """A call that counted: its number, its kind ("write", "rename", ...), and the file."""

    number: int
    kind: str
    path: str


@functools.cache
def library() -> Path:
    """The compiled library; skips the test where there is no compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler, on Linux, for calls that fail on purpose")
    folder = tempfile.TemporaryDirectory(prefix="clipfilter-faults-")
    _kept.append(folder)
    made = Path(folder.name) / "faults.so"
    subprocess.run([compiler, "-Wall", "-O2", "-shared", "-fPIC", "-o", made, SOURCE, "-ldl", "-lpthread"], check=True)
    return made


_kept: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def _server() -> ForkServer:
    return ForkServer(LD_PRELOAD=str(library()))


def clipfilter(
    *arguments: str | Path, fault: Fault | None = None, timeout: float = 120, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command with its output and exit code, however it ended; with the fault."""
    fault = fault or Fault()
    environment = os.environ | fault.env() | (env or {})
    program = _PROGRAM.format(files=fault.files or 0)
    argv = ["-c", program, *map(str, arguments)]
    return _server().run(argv, REPO, dict(environment), timeout=timeout)


def started(arguments: Sequence[str | Path], fault: Fault) -> subprocess.Popen[str]:
    """The command as a user starts it, with worker processes, in a session of its own; the fault counts in each process."""
    return subprocess.Popen(
        [sys.executable, "-m", "clipfilter", *map(str, arguments)],
        cwd=REPO, env=os.environ | fault.env() | {"LD_PRELOAD": str(library())},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def calls(log: Path) -> list[Call]:
    """The calls that a command made, in their order; an empty list where it made none that count."""
    lines = log.read_text().splitlines() if log.exists() else []
    found = [line.split(" ", 2) for line in lines]
    return sorted((Call(int(number), kind, path) for number, kind, path in found), key=lambda call: call.number)
