"""A process that has imported everything and forks one child per command: `python -m tests.support.fork_server SOCKET`.

A connection to SOCKET brings one line of JSON and three descriptors (stdin, stdout, stderr). The line says what to run:
`argv` (what follows the interpreter: `-m MODULE ...`, `-c CODE ...`, `FILE ...`; or a console script: `clipfilter ...`),
`cwd`, `env` and `cores` (those it may use). Back come the child's process id and, when it has ended, its exit code
(negative: the signal), a line each. When the connection is closed before, the child is killed.

The child sees what a process of its own would see: arguments, working directory, environment, descriptors, signals in
their default state, `__main__`, exit code. What the environment decides while modules are imported is as it was when the
server started; `tests.support.commands` starts a real process where that matters.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import selectors
import signal
import socket
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import Any, NoReturn

#: Too slow or too particular to import for all: extras that few commands need.
_LEFT_OUT = ("clipfilter.__main__", "clipfilter.beam", "clipfilter.ingest", "clipfilter.training", "clipfilter.serve")
_LINE = 1 << 22


def preload() -> None:
    """Import what commands import, and load nano; one thread only, since a pool of threads does not survive a fork."""
    import torch

    import clipfilter
    from clipfilter.models import torch_with_torchvision
    from tests.support import quick

    torch.set_num_threads(1)
    torch_with_torchvision()

    for module in pkgutil.walk_packages(clipfilter.__path__, "clipfilter."):
        if not module.name.startswith(_LEFT_OUT) and "hugging" not in module.name and "onnx" not in module.name:
            importlib.import_module(module.name)
    importlib.import_module("pandas")  # Arrow looks for it when it first makes an array, which takes half a second
    quick.install()
    quick.remember_exports()
    from clipfilter.models import load_encoder

    load_encoder("nano", threads=1)


def serve(path: str) -> None:
    """Accept commands until stdin is closed."""
    import torch

    threads = torch.get_num_threads()
    preload()
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    server.listen(64)
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ, None)
    selector.register(0, selectors.EVENT_READ, None)
    print("ready", flush=True)
    children: set[int] = set()
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return
            if key.fd == server.fileno():
                connection, _ = server.accept()
                pid = _fork(connection, threads)
                connection.sendall(f"{pid}\n".encode())
                children.add(pid)
                selector.register(connection, selectors.EVENT_READ, (pid, None))
                selector.register(os.pidfd_open(pid), selectors.EVENT_READ, (pid, connection))
            elif key.data[1] is None:  # whoever asked has gone, and the command with it
                selector.unregister(key.fileobj)
                os.kill(key.data[0], signal.SIGKILL)
            else:
                pid, connection = key.data
                children.discard(pid)
                with contextlib.suppress(KeyError):
                    selector.unregister(connection)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                selector.unregister(key.fd)
                os.close(key.fd)
                with contextlib.suppress(OSError):  # whoever asked may have gone
                    connection.sendall(f"{code}\n".encode())
                connection.close()


def _fork(connection: socket.socket, threads: int) -> int:
    """Start the child of one connection; its process id."""
    data, descriptors, _, _ = socket.recv_fds(connection, _LINE, 3)
    while not data.endswith(b"\n"):
        data += connection.recv(_LINE)
    pid = os.fork()
    if pid:
        for descriptor in descriptors:
            os.close(descriptor)
        return pid
    try:
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        os.closerange(3, max(descriptors) + 64)
        _become(json.loads(data), threads)
    finally:
        os._exit(70)  # not reached: _become ends the process


def _become(request: dict[str, Any], threads: int) -> NoReturn:
    """Be the process that `request` describes, to its end."""
    import torch

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE, signal.SIGCHLD):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as the interpreter sets it
    os.sched_setaffinity(0, request["cores"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    if request["env"].get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    torch.set_num_threads(threads)
    code = 1
    try:
        _run(request["argv"])
        code = 0
    except SystemExit as stop:
        code = _exit_code(stop)
    except BaseException as error:
        within = error.__traceback__
        while within is not None and within.tb_frame.f_code.co_filename == __file__:
            within = within.tb_next
        traceback.print_exception(type(error), error, within)
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        code = code or 120  # what the interpreter says when it cannot flush
    os._exit(code & 0xFF)


def _run(argv: list[str]) -> None:
    """What the interpreter does with its arguments."""
    import runpy

    kind, rest = argv[0], argv[1:]
    if kind == "-m":
        sys.argv, sys.path[0] = ["-m", *rest[1:]], os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if kind == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif Path(kind).name == "clipfilter":
        sys.argv, sys.path[0] = argv, str(Path(sys.executable).parent)
        exec("import sys; from clipfilter.cli.main import main; sys.exit(main())", main.__dict__)
    else:
        sys.argv, sys.path[0] = argv, str(Path(kind).absolute().parent)
        main.__file__ = kind
        exec(compile(Path(kind).read_text(encoding="utf-8"), kind, "exec"), main.__dict__)


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    print(stop.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    # As a module of its own name, so that children find its functions after `__main__` has become theirs.
    from tests.support.fork_server import serve as _serve

    _serve(sys.argv[1])
