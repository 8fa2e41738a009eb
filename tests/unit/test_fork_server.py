"""The fork server's children are like processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import command, fork_server

PROGRAM = """
import os, sys, threading
print(sys.argv, __name__, sorted(os.environ), os.getcwd(), sys.stdin.read(), sys.stdout.isatty(), threading.active_count())
print("to stderr", file=sys.stderr)
import atexit; atexit.register(lambda: print("at exit"))
threading.Thread(target=lambda: (__import__("time").sleep(0.2), print("a thread"))).start()
sys.exit({code})
"""


@pytest.mark.parametrize("code", ["0", "3", "None", "'a sentence'", "1 / 0", "os.kill(os.getpid(), 9)"])
def test_a_program_sees_and_says_what_it_would_in_a_process_of_its_own(code: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "COLUMNS": "77", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    seen = []
    for python in (sys.executable, fork_server().python):
        done = subprocess.run(
            [python, "-c", PROGRAM.format(code=code), "one", "two"],
            input="typed", capture_output=True, text=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
        seen.append((done.returncode, done.stdout, done.stderr.replace("\n           ~~^~~", "")))
    assert seen[1] == seen[0]


def test_scripts_modules_and_the_command_itself(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 7")
    (tmp_path / "script.py").write_text("import sys, beside; print(sys.argv[1:], beside.VALUE, __file__)")
    script = str(tmp_path / "script.py")
    want = subprocess.run([sys.executable, script, "x"], capture_output=True, text=True, check=True).stdout
    assert command(script, "x").stdout == want
    wrong = [["-m", "clipfilter", "run"], ["-m", "clipfilter", "policy", "validate", "/nowhere"], ["-m", "clipfilter"]]
    for arguments in wrong:
        want, found = (command(*arguments, check=False, processes=processes) for processes in (True, False))
        assert (found.returncode, found.stdout, found.stderr) == (want.returncode, want.stdout, want.stderr)
    for name in (fork_server().shims / "clipfilter", Path(sys.executable).parent / "clipfilter"):
        done = subprocess.run([name, "policy", "show", "nothing"], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert "nothing" in done.stderr


def test_signals_reach_the_command_and_a_lost_connection_ends_it(tmp_path: Path) -> None:
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"

    def begin() -> tuple[subprocess.Popen[bytes], int]:
        process = subprocess.Popen([fork_server().python, "-c", code], stderr=subprocess.DEVNULL)
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        pid = int((tmp_path / "pid").read_text())
        (tmp_path / "pid").unlink()
        return process, pid

    process, _ = begin()
    process.terminate()
    assert process.wait(timeout=10) == -signal.SIGTERM
    process, pid = begin()
    process.kill()
    process.wait()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.05)
    else:
        pytest.fail("the command goes on")
    with pytest.raises(subprocess.TimeoutExpired):
        command("-c", "import time; time.sleep(60)", timeout=0.3)
