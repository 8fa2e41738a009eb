"""Commands as a person gives them, from the fork server where they need no process of their own."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).parents[2]
#: Variables that are read while modules are imported: with another value than here a command needs a process of its own.
_READ_AT_IMPORT = ("PYTHON", "OMP_", "MKL_", "OPENBLAS_", "HF_", "TORCH", "LD_", "RAY_")

#: Stands for `clipfilter` and `python` on the PATH: hands the command to the server, and signals to the command.
_SHIM = """#!{python} -IS
import json, os, signal, socket, sys
argv = [sys.argv[0], *sys.argv[1:]] if {console} else sys.argv[1:]
if not {console} and (not argv or (argv[0] not in ("-c", "-m") and argv[0].startswith("-"))):
    os.execv({python!r}, [{python!r}, *argv])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = dict(argv=argv, cwd=os.getcwd(), env=dict(os.environ), cores=[*os.sched_getaffinity(0)])
line = (json.dumps(request) + "\\n").encode()
server.sendall(line[socket.send_fds(server, [line], [0, 1, 2]):])
answer = server.makefile()
pid = int(answer.readline())
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda n, _: os.kill(pid, n))
code = int(answer.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


class ForkServer:
    """A server of this test process, with more in its environment: started when first used, ended with it."""

    def __init__(self, **environment: str) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="clipfilter-fork-"))
        self.address = str(self._folder / "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.fork_server", self.address],
            cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": ""} | environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self.close)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the fork server did not start")

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5)
        self._process.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    @functools.cached_property
    def shims(self) -> Path:
        """A folder for the PATH in which `clipfilter` and `python` are answered by this server."""
        folder = self._folder / "bin"
        folder.mkdir()
        for name in ("clipfilter", "python"):
            text = _SHIM.format(python=sys.executable, console=name == "clipfilter", address=self.address)
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        return folder

    @property
    def python(self) -> str:
        """Stands for the interpreter in a command line that is started as a process: signals reach the command."""
        return str(self.shims / "python")

    def run(
        self, argv: list[str], cwd: Path, env: dict[str, str], *, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """The command with its output as text; raises subprocess.TimeoutExpired after killing it."""
        with (
            socket.socket(socket.AF_UNIX) as connection,
            tempfile.TemporaryFile() as out,
            tempfile.TemporaryFile() as errors,
            open(os.devnull, "rb") as nothing,
        ):
            connection.settimeout(timeout)
            connection.connect(self.address)
            request = {"argv": argv, "cwd": str(cwd), "env": env, "cores": [*os.sched_getaffinity(0)]}
            line = (json.dumps(request) + "\n").encode()
            sent = socket.send_fds(connection, [line], [nothing.fileno(), out.fileno(), errors.fileno()])
            connection.sendall(line[sent:])
            answer = connection.makefile()
            answer.readline()
            try:
                code = int(answer.readline())
            except TimeoutError:  # the server kills it when the connection goes
                raise subprocess.TimeoutExpired(shlex.join(argv), timeout) from None
            texts = []
            for file in (out, errors):
                file.seek(0)
                texts.append(file.read().decode())
        return subprocess.CompletedProcess(argv, code, *texts)


@functools.cache
def fork_server() -> ForkServer:
    return ForkServer()


def command(
    *argv: str,
    env: dict[str, str] | None = None,
    cwd: Path = REPO,
    processes: bool = False,
    check: bool = True,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """`python ARGV` with its output; from the fork server unless the environment rules that out.

    processes: in a process of its own, with worker processes: what a user gets.
    """
    environment = os.environ | (env or {})
    if processes or any(
        name.startswith(_READ_AT_IMPORT) and os.environ.get(name) != value for name, value in (env or {}).items()
    ):
        done = subprocess.run(
            [sys.executable, *argv], capture_output=True, text=True, env=environment, cwd=cwd, timeout=timeout
        )
    else:
        done = fork_server().run(list(argv), cwd, dict(environment), timeout=timeout)
    if check and done.returncode != 0:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
