"""Decoding in a child process, one image at a time, so that an image that kills its decoder is found and costs one row.

Used when a shard has already killed a worker. Messages are a JSON line with the length of the bytes that follow.
"""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, BinaryIO

import numpy as np
import PIL.Image

from clipfilter.engine.decoding import DecodeSettings, Image, load_guarded
from clipfilter.errors import DECODER_CRASH, MISSING_IMAGE, RowError
from clipfilter.images import ImageFacts, LoadedImage, PreprocessConfig

#: Seconds one image may take before its decoder is taken for hung.
IMAGE_TIMEOUT = 60.0
#: Seconds the child may take to start; a machine that is too busy for that is no image's fault.
START_TIMEOUT = 300.0
#: What is said of an image in the line before its pixels, besides its facts.
_TOLD = ("width", "height", "sha256", "format", "profile_ignored")


class IsolatedDecoder:
    """A `Decoder` whose work happens in a child process that may die."""

    def __init__(self, settings: DecodeSettings, timeout: float = IMAGE_TIMEOUT) -> None:
        self._settings = settings
        self._timeout = timeout
        self._child: subprocess.Popen[bytes] | None = None

    def load_many(self, data: Sequence[memoryview | None]) -> list[Image]:
        return [RowError(MISSING_IMAGE, "no image bytes") if item is None else self._load(item) for item in data]

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    def _load(self, data: memoryview) -> Image:
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            _send(child.stdin, {}, data)
            if not select.select([child.stdout], [], [], self._timeout)[0]:
                self.close()
                return RowError(DECODER_CRASH, f"the decoder took longer than {self._timeout:.0f} s")
            header, body = _receive(child.stdout)
        except (BrokenPipeError, EOFError):
            code = child.wait()
            self._child = None
            reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            return RowError(DECODER_CRASH, f"the image killed its decoder ({reason})")
        if "error_class" in header:
            return RowError(header["error_class"], header["message"])
        return _unpack(header, body)

    def _start(self) -> subprocess.Popen[bytes]:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "clipfilter.engine.isolation"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._child.stdin is not None
        settings = self._settings
        _send(
            self._child.stdin,
            {
                "preprocess": settings.preprocess.to_json(),
                "mode": settings.mode,
                "max_pixels": settings.max_pixels,
                "color": settings.color,
            },
            b"",
        )
        self._await_ready(self._child)
        return self._child

    def _await_ready(self, child: subprocess.Popen[bytes]) -> None:
        """Wait for the child's imports, so that the clock of an image measures the image. Raises OSError."""
        assert child.stdout is not None
        try:
            if select.select([child.stdout], [], [], START_TIMEOUT)[0]:
                _receive(child.stdout)
                return
            problem = f"was not ready after {START_TIMEOUT:.0f} s"
        except EOFError:
            problem = "ended before it was ready"
        self.close()
        raise OSError(f"the process that decodes apart {problem}")


def _send(stream: BinaryIO | Any, header: dict[str, Any], body: bytes | memoryview) -> None:
    stream.write(json.dumps(header | {"bytes": len(body)}).encode() + b"\n")
    stream.write(body)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> tuple[dict[str, Any], bytes]:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    header = json.loads(line)
    body = stream.read(header["bytes"])
    if len(body) != header["bytes"]:
        raise EOFError
    return header, body


def _pack(image: Any) -> tuple[dict[str, Any], bytes]:
    facts = asdict(image.facts)
    return {name: getattr(image, name) for name in _TOLD} | {
        "facts": facts,
        "shape": image.pixels.shape,
    }, image.pixels.tobytes()


def _unpack(header: dict[str, Any], body: bytes) -> LoadedImage:
    pixels = np.frombuffer(body, np.uint8).reshape(header["shape"])
    return LoadedImage(pixels=pixels, facts=ImageFacts(**header["facts"]), **{name: header[name] for name in _TOLD})


def _first_picture() -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    return buffer.getvalue()


def main() -> None:
    """The child: settings first, then images until the parent goes away."""
    stdin, stdout = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not break the protocol
    first, _ = _receive(stdin)
    settings = DecodeSettings(
        PreprocessConfig.from_json(first["preprocess"]), first["mode"], first["max_pixels"], first["color"]
    )
    load_guarded(_first_picture(), settings)  # what decoding imports when it is first used
    _send(stdout, {}, b"")
    while True:
        try:
            _, data = _receive(stdin)
        except EOFError:
            return
        image = load_guarded(data, settings)
        if isinstance(image, RowError):
            _send(stdout, {"error_class": image.error_class, "message": image.message}, b"")
        else:
            _send(stdout, *_pack(image))


if __name__ == "__main__":
    main()
