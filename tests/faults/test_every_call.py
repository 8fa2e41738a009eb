"""A fault at every call that changes a file of a small run, one after the other: the disk is full or broken, the process killed.

After each fault the command has ended with a sentence, `verify` says what is true, and the same command given again leaves
what an undisturbed one leaves, byte for byte.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from clipfilter.errors import RefusedError
from clipfilter.operations.verify import verify_run
from clipfilter.storage import file_sha256
from tests.faults.conftest import OPTIONS, Inputs
from tests.support.engine import commits
from tests.support.faults import Fault, calls, clipfilter

Command = Callable[[Inputs, Path], list[str | Path]]
COMMANDS: dict[str, Command] = {
    "run": lambda i, out: ["run", i.tars, "--policy", i.policy, "--out", out, *OPTIONS],
    "run-folder": lambda i, out: ["run", i.pictures, "--policy", i.policy, "--out", out, *OPTIONS],
    "run-fraction": lambda i, out: ["run", i.tars, "--policy", i.fraction, "--out", out, *OPTIONS],
    "filter": lambda i, out: ["filter", i.embedded, "--policy", i.policy, "--out", out, "--threads", "1", "-q"],
    "export": lambda i, out: ["export", i.decided, "--to", out],
    "export-vectors": lambda i, out: ["export", i.decided, "--to", out, "--as", "clip-retrieval"],
    "forget": lambda i, out: ["forget", out, "--uids", i.uids],
}
HOW: dict[str, dict[str, Any]] = {
    "full": {"how": "full", "errno": errno.ENOSPC},
    "broken": {"how": "error", "errno": errno.EIO},
    "killed": {"how": "kill"},  # before the call, which is after the one before it
}
#: What differs between equal runs: the times, and the page that shows them.
_TIMED = ("run.log", "run.json", "report.html", "receipts/")


def content(out: Path) -> dict[str, Any]:
    """Every finished file of a directory with its sha256; of commits what they say, but for the work it took."""
    found: dict[str, Any] = commits(out) if (out / "commits").is_dir() else {}
    for path in sorted(item for item in out.rglob("*") if item.is_file()):
        name = path.relative_to(out).as_posix()
        if not name.startswith((*_TIMED, "commits/", ".")):
            found[name] = file_sha256(path)
    return found


def newest(out: Path) -> dict[str, Any]:
    """The same with the newest version only, whatever its number: a run may have ended without some shards before."""
    found = content(out)
    versions = [name for name in found if name.startswith("versions/")]
    last = json.loads((out / max(versions)).read_text())
    return {name: value for name, value in found.items() if name not in versions} | {"version": last | {"version": ""}}


class Subject:
    """A command, the calls that it makes, and what it leaves when nothing disturbs it."""

    def __init__(self, name: str, inputs: Inputs, folder: Path) -> None:
        self._command, self._inputs, self._folder = COMMANDS[name], inputs, folder
        self.name, self.is_run = name, not name.startswith("export")
        out, log = folder / "undisturbed", folder / "calls"
        self._begin(out)
        done = clipfilter(*self._command(inputs, out), fault=Fault(below=out, log=log))
        assert done.returncode == 0, done.stderr
        self.calls = calls(log)
        self.want = content(out)

    def disturb(self, call: int, how: str) -> tuple[str, ...]:
        """Disturb the command at one call, and check all that must hold; how it ended, and what `verify` said then."""
        out = self._folder / "out"
        self._begin(out)
        command = self._command(self._inputs, out)
        done = clipfilter(*command, fault=Fault(below=out, at=call, **HOW[how]))
        said = f"{how} at call {call}: exit code {done.returncode}: {done.stderr}"
        ended = _ended(done.returncode, done.stderr)
        assert ended, said
        proof = self._proof(out)
        if ended == "done":
            assert proof in ("proved", "an export"), said
        if ended == "done" or (proof == "proved" and self.name != "forget"):
            assert content(out) == self.want, said
        again = clipfilter(*command)
        assert again.returncode == 0, f"{said}, then {again.stderr}"
        assert content(out) == self.want, said
        assert not list(out.glob(".*")), said
        if self.is_run:
            assert verify_run(str(out)).problems == [], said
        return ended, proof

    def _begin(self, out: Path) -> None:
        """What is there before the command: nothing, or the run that it changes."""
        shutil.rmtree(out, ignore_errors=True)
        if self.name == "forget":
            shutil.copytree(self._inputs.decided, out)

    def _proof(self, out: Path) -> str:
        if not self.is_run:
            return "an export"
        try:
            problems = verify_run(str(out)).problems
        except RefusedError:
            return "no version yet"
        return "problems" if problems else "proved"


def _ended(code: int, errors: str) -> str:
    """How a command ended; nothing where that is not allowed."""
    if "Traceback" in errors:
        return ""
    if code == 0:
        return "done"
    if code == -9:
        return "killed"
    lines = [line for line in errors.splitlines() if line.startswith("clipfilter: ")]
    return "a sentence" if code in (1, 2, 3) and len(lines) == 1 else ""


@pytest.fixture(scope="module")
def subject(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    return cache(lambda name: Subject(name, inputs, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.soak("test_at_one_call_of_each_kind")
@pytest.mark.timeout(3600)
def test_at_every_call(name: str, how: str, subject: Callable[[str], Subject]) -> None:
    it = subject(name)
    outcomes = Counter(it.disturb(call.number, how) for call in it.calls)
    assert len(it.calls) > 10
    said = {", ".join(outcome): count for outcome, count in sorted(outcomes.items())}
    print(f"FAULTS {name} {how}: {len(it.calls)} calls: {said}")


#: Which fault meets which kinds of calls every time.
_SOME = {"full": {"write", "sync", "link"}, "broken": {"open", "mkdir", "unlink"}, "killed": {"rename"}}


@pytest.mark.parametrize("how", _SOME)
def test_at_one_call_of_each_kind(how: str, subject: Callable[[str], Subject]) -> None:
    """The last of each kind before the version is written, when most of the work is at stake."""
    it = subject("run")
    version = next(call.number for call in it.calls if "versions" in call.path)
    last = {call.kind: call for call in it.calls if call.number < version}
    assert set(last) == set().union(*_SOME.values())
    for kind in sorted(_SOME[how]):
        it.disturb(last[kind].number, how)
