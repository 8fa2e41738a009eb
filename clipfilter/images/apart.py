"""Decoding in processes of their own, with limits of memory and time: one process forks a child per decoder.

That process imports everything once and decodes nothing itself, so that a child which an image has killed is replaced in
milliseconds. It has a socket on which its owner asks for children, and for the end of one. A child gets a socket of its own, on
which images go in and pixels come back. Both end when their owner does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from clipfilter.errors import RowError
from clipfilter.images.facts import ImageFacts
from clipfilter.images.guarded import DecodeSettings, Image, load_guarded
from clipfilter.images.load import LoadedImage
from clipfilter.images.preprocess import PreprocessConfig

#: Seconds a child, or the process that forks it, may take to start; a machine too busy for that is no image's fault.
START_TIMEOUT = 300.0
#: Waiting is counted in steps of so many seconds, so that time in which this whole process stood still does not count.
TICK = 0.5
#: Address space that a child may take beyond what it has when it begins: so many bytes, and so many per pixel of the limit.
_SPARE_BYTES, _BYTES_PER_PIXEL = 1 << 30, 24
#: What is said of an image in the header before its pixels, besides its facts.
_TOLD = ("width", "height", "sha256", "format", "profile_ignored")
_LENGTHS = struct.Struct("<QQ")
_LINE = 1 << 16
_PROGRAM = "from clipfilter.images import apart; apart.main()"


class Child:
    """A process that decodes one image at a time, and may die of it."""

    def __init__(self, nursery: _Nursery, connection: socket.socket, pid: int) -> None:
        self._nursery, self._connection, self.pid = nursery, connection, pid
        connection.settimeout(TICK)

    def load(self, data: memoryview | bytes, seconds: float) -> Image:
        """Raises TimeoutError after so many seconds, and EOFError or OSError where the child has ended."""
        _send(self._connection, {}, data, seconds)
        header, body = _receive(self._connection, seconds)
        if "error_class" in header:
            return RowError(header["error_class"], header["message"])
        pixels = np.frombuffer(body, np.uint8).reshape(header["shape"])
        return LoadedImage(pixels=pixels, facts=ImageFacts(**header["facts"]), **{name: header[name] for name in _TOLD})

    def end(self) -> int:
        """Kill it, unless it has ended; its exit code (negative: the signal)."""
        self._connection.close()
        return self._nursery.end(self.pid)


class _Nursery:
    """The process that forks children, seen from its owner. Raises OSError where it has ended or does not answer."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(START_TIMEOUT)
        threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                env=os.environ | threads | {"PYTHONPATH": _python_path()},
            )  # fmt: skip
        self.ready = False

    def child(self, settings: DecodeSettings, seconds: float) -> Child:
        ours, theirs = socket.socketpair()
        request = {"settings": asdict(settings) | {"preprocess": settings.preprocess.to_json()}, "seconds": seconds}
        with theirs:
            return Child(self, ours, self._ask(request, theirs.fileno())["pid"])

    def end(self, pid: int) -> int:
        return int(self._ask({"end": pid})["code"])

    def close(self) -> None:
        self._control.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, request: dict[str, Any], *descriptors: int) -> dict[str, Any]:
        with self._lock:
            try:
                if not self.ready:
                    self._answer()
                    self.ready = True
                socket.send_fds(self._control, [json.dumps(request).encode()], descriptors)
                return self._answer()
            except TimeoutError as error:
                raise OSError(f"the process that decodes apart gave no answer for {START_TIMEOUT:.0f} s") from error

    def _answer(self) -> dict[str, Any]:
        message = self._control.recv(_LINE)
        if not message:
            raise OSError("the process that decodes apart has ended" if self.ready else "ended before it was ready")
        return dict(json.loads(message))


_nursery: _Nursery | None = None
_nursery_lock = threading.Lock()


def prepare() -> None:
    """Start the process that forks children, without waiting for it."""
    global _nursery
    with _nursery_lock:
        if _nursery is None or _nursery.owner != os.getpid():  # one that this process was forked with is its parent's
            _nursery = _Nursery()


def new_child(settings: DecodeSettings, seconds: float) -> Child:
    """A child for images of at most so many seconds each. Raises OSError where there is none."""
    global _nursery
    prepare()
    nursery = _nursery
    assert nursery is not None
    try:
        return nursery.child(settings, seconds)
    except OSError:
        with _nursery_lock:
            if _nursery is nursery:
                _nursery = None
        nursery.close()
        raise


def _python_path() -> str:
    """Where this package is found, whatever the working directory."""
    return os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])


# --- messages: two lengths, a JSON header, a body --------------------------------------------------------------------


def _send(connection: socket.socket, header: dict[str, Any], body: bytes | memoryview, seconds: float) -> None:
    text = json.dumps(header).encode()
    for part in (_LENGTHS.pack(len(text), len(body)) + text, body):
        view, sent, left = memoryview(part), 0, seconds
        while sent < len(view):
            try:
                sent += connection.send(view[sent:])
            except TimeoutError:
                left -= TICK
                if left <= 0:
                    raise


def _receive(connection: socket.socket, seconds: float) -> tuple[dict[str, Any], bytearray]:
    """Raises EOFError where the other side has gone."""

    def exactly(size: int) -> bytearray:
        nonlocal seconds
        found = bytearray(size)
        view, filled = memoryview(found), 0
        while filled < size:
            try:
                more = connection.recv_into(view[filled:])
            except TimeoutError:
                seconds -= TICK
                if seconds <= 0:
                    raise
                continue
            if not more:
                raise EOFError
            filled += more
        return found

    text, body = _LENGTHS.unpack(exactly(_LENGTHS.size))
    return json.loads(exactly(text)), exactly(body)


# --- the process that forks, and its children ------------------------------------------------------------------------


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the owner, whose end is seen here
        signal.signal(number, signal.SIG_IGN)
    _import_all()
    control.send(b"{}")
    children: set[int] = set()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, _LINE, 1)
        if not message:
            break
        request = json.loads(message)
        if "end" in request:
            children.discard(request["end"])
            answer = {"code": _end(request["end"])}
        else:
            pid = os.fork()
            if pid == 0:
                control.close()
                _child(descriptors[0], request)
            os.close(descriptors[0])
            children.add(pid)
            answer = {"pid": pid}
        control.send(json.dumps(answer).encode())
    for pid in children:
        _end(pid)


def _end(pid: int) -> int:
    os.kill(pid, signal.SIGKILL)  # it is ours and not waited for yet, so the number is still its own
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _import_all() -> None:
    """Decode a first picture, in one thread: what that imports and starts is there for all children."""
    import torch

    torch.set_num_threads(1)
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (300, 300)).save(buffer, "JPEG")
    load_guarded(buffer.getvalue(), DecodeSettings(PreprocessConfig(224, (0.5,) * 3, (0.5,) * 3), "fast", 1 << 20))


def _child(descriptor: int, request: dict[str, Any]) -> None:
    """Decode what comes, until the owner goes away."""
    code = 1
    try:
        given = request["settings"]
        settings = DecodeSettings(**given | {"preprocess": PreprocessConfig.from_json(given["preprocess"])})
        connection = socket.socket(fileno=descriptor)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _limit(
            resource.RLIMIT_AS,
            pages * resource.getpagesize() + _SPARE_BYTES + _BYTES_PER_PIXEL * settings.max_pixels,
        )
        _limit(resource.RLIMIT_CORE, 0)
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                _, data = _receive(connection, float("inf"))
                used = resource.getrusage(resource.RUSAGE_SELF)
                _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + request["seconds"]) + 2)
                _send(connection, *_packed(load_guarded(bytes(data), settings)), float("inf"))
        code = 0
    finally:
        os._exit(code)


def _limit(what: int, value: int) -> None:
    """Set a soft limit, as far as the hard one allows."""
    hard = resource.getrlimit(what)[1]
    resource.setrlimit(what, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _packed(image: Image) -> tuple[dict[str, Any], bytes | memoryview]:
    if isinstance(image, RowError):
        return {"error_class": image.error_class, "message": image.message}, b""
    told = {name: getattr(image, name) for name in _TOLD}
    return told | {"facts": asdict(image.facts), "shape": image.pixels.shape}, image.pixels.tobytes()
