"""From source batches to decoded batches of one fixed size: the step between reading and embedding."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, cast

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter import defaults
from clipfilter.errors import DECODE_TIMEOUT, MISSING_IMAGE, RowError
from clipfilter.images import DecodeSettings, Image, apart, load_guarded

log = logging.getLogger("clipfilter.engine")
T = TypeVar("T")
_CLOSING_SECONDS = 5.0


@dataclass
class DecodedBatch:
    """At most `batch_size` consecutive rows of a shard, ready for the encoder.

    rows   : RecordBatch, n rows: identity and source columns, without the image bytes.
    images : one LoadedImage or RowError per row.
    pixels : uint8 [batch_size, 3, S, S]; failed rows and the padding of the last batch are zero.
    """

    rows: pa.RecordBatch
    images: list[Image]
    pixels: np.ndarray


@dataclass
class StageTimes:
    """Seconds of wall time a shard spent per step, for the commit and the report; and what is under way, for heartbeats.

    under_way: the step, since when (monotonic seconds), and the key of the first row that it is about.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    under_way: dict[str, tuple[float, str]] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str, key: str = "", *, counted: bool = True) -> Iterator[None]:
        """Time what is done in a `with` block; steps of two threads may overlap."""
        began = time.monotonic()
        self.under_way[name] = began, key
        try:
            yield
        finally:
            self.under_way.pop(name, None)
            if counted:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began


class Decoder(Protocol):
    """Decodes many images at once; `threads` and `processes` are the two ways."""

    def load_many(self, data: Sequence[memoryview | None]) -> list[Image]: ...

    def close(self) -> None: ...


class _Job:
    """One image to decode. waited: seconds of waiting for it since a thread began with it."""

    def __init__(self, data: memoryview | None) -> None:
        self.data = data
        self.begun = False
        self.waited = 0.0
        self.done = threading.Event()
        self.image: Image | None = None


class ThreadDecoder:
    """Decodes in threads of this process: the fast way, since all heavy parts release the interpreter lock.

    What takes too long is given up: its row fails, and another thread takes the place of the one that is still at it.
    """

    def __init__(self, settings: DecodeSettings, threads: int, timeout: float = defaults.DECODE_TIMEOUT) -> None:
        self._settings, self._timeout = settings, timeout
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._settling = threading.Lock()
        for _ in range(threads):
            self._add_thread()
        self._end = weakref.finalize(self, _end_threads, self._jobs, threads)

    def load_many(self, data: Sequence[memoryview | None]) -> list[Image]:
        jobs = [_Job(item) for item in data]
        for job in jobs:
            self._jobs.put(job)
        for index, job in enumerate(jobs):
            while not job.done.wait(apart.TICK):
                for other in jobs[index:]:
                    other.waited += apart.TICK * other.begun
                    if other.waited >= self._timeout and self._settle(other, timed_out(self._timeout)):
                        log.warning("an image is given up after %.0f s; its thread goes on", self._timeout)
                        self._add_thread()
        return [cast("Image", job.image) for job in jobs]

    def close(self) -> None:
        self._end()

    def _add_thread(self) -> None:
        # Daemons: nothing waits at the end of the process for one that an image keeps.
        work = partial(_decode_jobs, self._jobs, self._settings, self._settling)
        threading.Thread(target=work, name="decode", daemon=True).start()

    def _settle(self, job: _Job, image: Image) -> bool:
        return _settle(job, image, self._settling)


def _decode_jobs(jobs: queue.SimpleQueue[_Job | None], settings: DecodeSettings, settling: threading.Lock) -> None:
    """What a thread does: no reference to its decoder, which ends with the last of those."""
    while (job := jobs.get()) is not None:
        job.begun = True
        missing = RowError(MISSING_IMAGE, "no image bytes")
        if not _settle(job, missing if job.data is None else load_guarded(job.data, settings), settling):
            return  # it was given up, and another thread has this one's place


def _end_threads(jobs: queue.SimpleQueue[_Job | None], threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)


def _settle(job: _Job, image: Image, settling: threading.Lock) -> bool:
    """Whether this is what became of the image; False where that was settled before."""
    with settling:
        if job.done.is_set():
            return False
        job.image = image
        job.done.set()
        return True


def timed_out(seconds: float) -> RowError:
    """The error of an image that takes too long to decode."""
    return RowError(DECODE_TIMEOUT, f"decoding took longer than {seconds:g} s (--decode-timeout)")


def decode_batches(
    batches: Iterable[pa.RecordBatch],
    decoder: Decoder,
    image_size: int,
    batch_size: int,
    times: StageTimes,
    keep_row: Callable[[str], bool] | None = None,
    max_rows: int | None = None,
) -> Iterator[DecodedBatch]:
    """Re-cut source batches into decoded batches of exactly `batch_size` rows (the last may be shorter).

    The cut depends on the rows alone, never on how the source happened to batch them, so that embeddings are
    the same in every attempt. `keep_row` (of cf_uid) drops rows that a sample does not include; of the others the first
    `max_rows` are taken.
    """
    waiting: list[tuple[pa.RecordBatch, list[Image]]] = []
    count = 0
    for batch in _told(batches, times):
        if keep_row is not None:
            batch = batch.filter(pa.array([keep_row(uid) for uid in batch.column(cf.UID).to_pylist()], pa.bool_()))
        if max_rows is not None:
            batch = batch.slice(0, max_rows)
            max_rows -= batch.num_rows
        if batch.num_rows == 0:
            continue
        with times.step("decode", batch.column(cf.KEY)[0].as_py()):
            images = _load_rows(batch, decoder)
        rows = batch.select([name for name in batch.schema.names if name != cf.IMAGE])
        del batch
        waiting.append((rows, images))
        count += rows.num_rows
        while count >= batch_size:
            ready, waiting = _take(waiting, batch_size)
            count -= batch_size
            yield _assemble(ready, image_size, batch_size)
        if max_rows == 0:
            break
    if count:
        yield _assemble(waiting, image_size, batch_size)


def _told(batches: Iterable[pa.RecordBatch], times: StageTimes) -> Iterator[pa.RecordBatch]:
    """The batches; waiting for one is a step of its own."""
    key = ""
    rest = iter(batches)
    while True:
        with times.step("read", key, counted=False):
            batch = next(rest, None)
        if batch is None:
            return
        key = batch.column(cf.KEY)[-1].as_py() if batch.num_rows else key
        yield batch


def _load_rows(batch: pa.RecordBatch, decoder: Decoder) -> list[Image]:
    column = batch.column(cf.IMAGE)
    data = [memoryview(value.as_buffer()) if value.is_valid else None for value in column]
    images = decoder.load_many(data)
    classes = batch.column(cf.ERROR_CLASS).to_pylist()
    for index, error_class in enumerate(classes):
        if error_class is not None:
            images[index] = RowError(error_class, batch.column(cf.ERROR)[index].as_py() or error_class)
    return images


def _take(
    waiting: list[tuple[pa.RecordBatch, list[Image]]], size: int
) -> tuple[list[tuple[pa.RecordBatch, list[Image]]], list[tuple[pa.RecordBatch, list[Image]]]]:
    taken: list[tuple[pa.RecordBatch, list[Image]]] = []
    for index, (rows, images) in enumerate(waiting):
        if rows.num_rows <= size:
            taken.append((rows, images))
            size -= rows.num_rows
            if size == 0:
                return taken, waiting[index + 1 :]
        else:
            taken.append((rows.slice(0, size), images[:size]))
            return taken, [(rows.slice(size), images[size:]), *waiting[index + 1 :]]
    return taken, []


def _assemble(parts: list[tuple[pa.RecordBatch, list[Image]]], size: int, batch_size: int) -> DecodedBatch:
    images = [image for _, some in parts for image in some]
    pixels = np.zeros((batch_size, 3, size, size), np.uint8)
    for slot, image in zip(pixels, images, strict=False):
        if not isinstance(image, RowError):
            slot[...] = image.pixels
    table = pa.Table.from_batches([rows for rows, _ in parts]).combine_chunks()
    return DecodedBatch(table.to_batches()[0], images, pixels)


class prefetch(Generic[T]):
    """Run an iterator in a thread, from now on and at most `depth` items ahead; its exception surfaces here.

    Close it in any case: that stops the thread.
    """

    def __init__(self, items: Iterable[T], depth: int) -> None:
        self._items = items
        self._ready: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        if self._stop.is_set():
            raise StopIteration
        kind, item = self._ready.get()
        if kind == "item":
            return cast("T", item)
        self._stop.set()
        if kind == "error":
            raise item
        raise StopIteration

    def close(self) -> None:
        self._stop.set()
        self._thread.join(_CLOSING_SECONDS)  # a daemon: one that hangs is left behind

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put("item", item):
                    return
            self._put("end", None)
        except BaseException as error:
            self._put("error", error)

    def _put(self, kind: str, item: Any) -> bool:
        while not self._stop.is_set():
            try:
                self._ready.put((kind, item), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


@contextlib.contextmanager
def decoded_ahead(
    batches: Iterable[pa.RecordBatch],
    decoder: Decoder,
    image_size: int,
    batch_size: int,
    times: StageTimes,
    ahead: int,
    keep_row: Callable[[str], bool] | None = None,
    max_rows: int | None = None,
) -> Iterator[Iterable[DecodedBatch]]:
    """`decode_batches` with reading one batch ahead in a thread, and decoding `ahead` batches, for a `with` block."""
    with contextlib.closing(prefetch(batches, 1)) as read:
        decoded = decode_batches(read, decoder, image_size, batch_size, times, keep_row, max_rows)
        if not ahead:
            yield decoded
            return
        with contextlib.closing(prefetch(decoded, ahead)) as waiting:
            yield waiting


def image_columns(images: Sequence[Image]) -> dict[str, pa.Array]:
    """sha256, size and pixel facts of the images that were decoded, as columns."""
    good = [image for image in images if not isinstance(image, RowError)]
    return {
        cf.SHA256: pa.array([image.sha256 for image in good], pa.string()),
        cf.WIDTH: pa.array([image.width for image in good], pa.int32()),
        cf.HEIGHT: pa.array([image.height for image in good], pa.int32()),
        cf.FORMAT: pa.array([image.format for image in good], pa.string()),
        cf.BRIGHTNESS: pa.array([image.facts.brightness for image in good], pa.float32()),
        cf.CONTRAST: pa.array([image.facts.contrast for image in good], pa.float32()),
        cf.BLUR: pa.array([image.facts.blur for image in good], pa.float32()),
        cf.ENTROPY: pa.array([image.facts.entropy for image in good], pa.float32()),
        cf.PHASH: pa.array([image.facts.phash for image in good], pa.uint64()),
        cf.COLOURFULNESS: pa.array([image.facts.colourfulness for image in good], pa.float32()),
    }
