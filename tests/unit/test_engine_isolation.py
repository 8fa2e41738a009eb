"""Decoding in threads and in child processes: what hangs, crashes or eats memory costs one row, and all others stay the same."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from clipfilter.engine.decoding import Decoder, ThreadDecoder
from clipfilter.engine.isolation import ProcessDecoder
from clipfilter.errors import DECODE_ERROR, DECODE_TIMEOUT, DECODER_CRASH, IMAGE_TOO_LARGE, MISSING_IMAGE
from clipfilter.images import apart, load
from tests.support.engine import REPO, photos
from tests.support.hostile import plant
from tests.unit.test_engine_shard import SETTINGS

GOOD = photos()[0][1]


@pytest.fixture
def hostile(own_nursery: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", plant(tmp_path))


def load_many(decoder: Decoder, *images: bytes | None) -> list[Any]:
    try:
        return decoder.load_many([None if image is None else memoryview(image) for image in images])
    finally:
        decoder.close()


def same(one: Any, other: Any) -> bool:
    return (one.sha256, one.facts, one.width, one.height, one.format) == (
        other.sha256, other.facts, other.width, other.height, other.format
    ) and np.array_equal(one.pixels, other.pixels)  # fmt: skip


def test_children_give_the_same_and_survive_what_images_do(hostile: None) -> None:
    ends = [b"KILLME", b"HANGME", b"SPINME", b"EAT ME", b"EXITME"]
    images = [GOOD, *(GOOD + end for end in ends), b"broken", None, photos()[1][1], GOOD]
    found = load_many(ProcessDecoder(SETTINGS, 2, timeout=3), *images)
    direct = load_many(ThreadDecoder(SETTINGS, 1), GOOD, photos()[1][1])
    assert same(found[0], direct[0])
    assert same(found[-1], direct[0])
    assert same(found[-2], direct[1])
    assert [getattr(image, "error_class", None) for image in found] == [
        None, DECODER_CRASH, DECODE_TIMEOUT, DECODE_TIMEOUT, IMAGE_TOO_LARGE, DECODER_CRASH, DECODE_ERROR, MISSING_IMAGE,
        None, None,
    ]  # fmt: skip
    assert "SIGSEGV" in found[1].message
    assert "longer than 3 s" in found[2].message
    assert "exit code 7" in found[5].message


def test_a_child_that_somebody_kills_is_no_images_fault(own_nursery: None) -> None:
    decoder = ProcessDecoder(SETTINGS, 1, timeout=30)
    decoder.load_many([memoryview(GOOD)])
    assert apart._nursery is not None
    [child] = psutil.Process(apart._nursery._process.pid).children()
    os.kill(child.pid, signal.SIGKILL)
    assert load_many(decoder, GOOD)[0].sha256
    # Interrupts reach all processes of a terminal: they are for the owner.
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(apart._nursery._process.pid, number)
    decoder = ProcessDecoder(SETTINGS, 1, timeout=30)
    assert load_many(decoder, GOOD)[0].sha256


def test_children_end_with_their_owner_also_in_the_middle_of_an_image(hostile: None) -> None:
    nursery = apart._Nursery()
    child = nursery.child(SETTINGS, 60)
    apart._send(child._connection, {}, GOOD + b"HANGME", 10)
    process = psutil.Process(child.pid)
    nursery._control.close()
    process.wait(20)
    nursery.close()


@pytest.mark.parametrize(("start", "works"), [("import time; time.sleep(3)", True), ("import os; os._exit(3)", False)])
def test_a_start_that_is_slow_or_fails_is_no_images_fault(
    start: str, works: bool, own_nursery: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(start)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{REPO}")
    decoder = ProcessDecoder(SETTINGS, 1, timeout=2)
    if works:
        assert load_many(decoder, GOOD)[0].sha256
    else:
        with pytest.raises(OSError, match="ended before it was ready"):
            load_many(decoder, GOOD)


def test_a_thread_that_an_image_keeps_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = load.decode

    def sleeps(data: Any, **more: Any) -> Any:
        if bytes(data[-6:]) == b"HANGME":
            time.sleep(20)
        return decode(data, **more)

    monkeypatch.setattr(load, "decode", sleeps)
    decoder = ThreadDecoder(SETTINGS, 2, timeout=2)
    began = time.monotonic()
    hang = memoryview(GOOD + b"HANGME")
    found = decoder.load_many([hang, memoryview(GOOD), hang, hang, memoryview(GOOD)])
    assert [getattr(image, "error_class", None) for image in found] == [
        DECODE_TIMEOUT,
        None,
        *[DECODE_TIMEOUT] * 2,
        None,
    ]
    assert time.monotonic() - began < 15
    monkeypatch.undo()
    assert all(image.sha256 for image in load_many(decoder, *[GOOD] * 5))  # type: ignore[union-attr]
