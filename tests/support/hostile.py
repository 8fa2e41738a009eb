"""Files that harm whoever decodes them, each in its way: real damage, and faults planted where every picture passes."""

from __future__ import annotations

import io
import struct
from pathlib import Path

from PIL import Image

from tests.support.engine import photos

#: Code for a `sitecustomize.py`: the last bytes of a picture say what it does to its decoder.
PLANTED = """
import hashlib, os, signal, time
real = hashlib.sha256
def sha256(data=b"", **more):
    end = bytes(data[-6:])
    if end == b"KILLME":
        os.kill(os.getpid(), signal.SIGSEGV)
    if end == b"EXITME":
        os._exit(7)
    if end == b"HANGME":
        time.sleep(600)
    if end == b"SPINME":
        while True:
            pass
    if end == b"EAT ME":
        bytearray(64 << 30)
    if end == b"FAILME":
        raise LookupError("nobody foresaw this")
    if end == b"QUITME":
        raise SystemExit(3)
    return real(data, **more)
hashlib.sha256 = sha256
"""


def plant(folder: Path) -> str:
    """Write `PLANTED` where a Python with this folder on its path finds it; the value for PYTHONPATH."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(PLANTED)
    return f"{folder}:{Path(__file__).parents[2]}"


def hostile_files() -> dict[str, tuple[bytes, str]]:
    """By name: the bytes, and the class that their row gets."""
    good = photos()[0][1]
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16)).save(buffer, "PNG")
    png = bytearray(buffer.getvalue())
    png[16:24] = struct.pack(">II", 60_000, 60_000)
    ends = {
        "crash": (b"KILLME", "decoder_crash"),
        "exit": (b"EXITME", "decoder_crash"),
        "sleep": (b"HANGME", "decode_timeout"),
        "loop": (b"SPINME", "decode_timeout"),
        "memory": (b"EAT ME", "image_too_large"),
        "exception": (b"FAILME", "unexpected_error"),
        "quit": (b"QUITME", "unexpected_error"),
    }
    return {
        "empty": (b"", "decode_error"),
        "page": (b"<!doctype html><title>404</title>", "decode_error"),
        "cut": (good[: len(good) // 2], "decode_error"),
        "noise": (good[:200] + bytes(range(256)) * 8, "decode_error"),
        "bomb": (bytes(png), "image_too_large"),
        **{name: (good + end, error_class) for name, (end, error_class) in ends.items()},
    }
