"""Decoding in child processes with limits of memory and time: an image that kills its decoder, or never ends, costs one row."""

from __future__ import annotations

import queue
import signal
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from clipfilter.engine.decoding import timed_out
from clipfilter.errors import DECODER_CRASH, MISSING_IMAGE, RowError
from clipfilter.images import DecodeSettings, Image, apart


class ProcessDecoder:
    """A `Decoder` whose work happens in as many child processes as it has threads."""

    def __init__(self, settings: DecodeSettings, processes: int, timeout: float) -> None:
        self._settings, self._timeout = settings, timeout
        self._pool = ThreadPoolExecutor(processes, thread_name_prefix="decode")
        self._idle: queue.SimpleQueue[apart.Child] = queue.SimpleQueue()
        apart.prepare()

    def load_many(self, data: Sequence[memoryview | None]) -> list[Image]:
        return list(self._pool.map(self._load, data))

    def close(self) -> None:
        self._pool.shutdown()
        while not self._idle.empty():
            self._idle.get().end()

    def _load(self, data: memoryview | None) -> Image:
        """Raises OSError where no child can be started."""
        if data is None:
            return RowError(MISSING_IMAGE, "no image bytes")
        code = 0
        for _ in range(2):  # a child may end for reasons of the machine's; one image ends two only by itself
            child = self._child()
            try:
                image = child.load(data, self._timeout)
                self._idle.put(child)
                return image
            except TimeoutError:
                child.end()
                return timed_out(self._timeout)
            except (EOFError, OSError):
                code = child.end()
                if code == -signal.SIGXCPU:
                    return timed_out(self._timeout)
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return RowError(DECODER_CRASH, f"the image killed its decoder ({ended})")

    def _child(self) -> apart.Child:
        try:
            return self._idle.get_nowait()
        except queue.Empty:
            return apart.new_child(self._settings, self._timeout)
