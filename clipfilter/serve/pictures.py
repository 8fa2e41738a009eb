"""Pictures of rows as JPEGs that we encode ourselves: read from the source, checked, decoded under guard, blurred or not."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

from clipfilter import columns as cf
from clipfilter.errors import ClipfilterError
from clipfilter.report import jpeg_of
from clipfilter.runs import Pictures, RunVectors

log = logging.getLogger("clipfilter.serve")

#: Longest side and largest JPEG of each kind of picture.
SIZES = {"small": (256, 20_000), "large": (960, 240_000)}
_CACHE_BYTES = 64 << 20
#: Pictures of one page are asked for one by one, and read together.
_GATHER_SECONDS = 0.01


class NoPictureError(ClipfilterError):
    """There is no picture to show; the text says why."""


@dataclass(frozen=True)
class Wanted:
    """A picture of one row. size: of SIZES; blurred: only a few averages of it."""

    position: int
    size: str
    blurred: bool


class Gallery:
    """Reads the pictures of a run's rows, those asked for together shard by shard, and keeps the newest ones in memory.

    The bytes of the source are never handed on: what is shown was decoded and encoded here.
    """

    def __init__(self, vectors: RunVectors) -> None:
        self._vectors = vectors
        self._pictures: Pictures | None = None
        self._reading = threading.Lock()
        self._cache: OrderedDict[Wanted, bytes] = OrderedDict()
        self._cached_bytes = 0
        self._waiting: dict[Wanted, asyncio.Future[bytes]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def get(self, wanted: Wanted) -> bytes:
        """A JPEG. Raises NoPictureError."""
        if wanted in self._cache:
            self._cache.move_to_end(wanted)
            return self._cache[wanted]
        if wanted not in self._waiting:
            self._waiting[wanted] = asyncio.get_running_loop().create_future()
            if len(self._waiting) == 1:
                task = asyncio.create_task(self._gather())
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(self._waiting[wanted])

    async def _gather(self) -> None:
        await asyncio.sleep(_GATHER_SECONDS)
        batch, self._waiting = self._waiting, {}
        by_shard: dict[int, list[Wanted]] = defaultdict(list)
        numbers, _ = self._vectors.locate([wanted.position for wanted in batch])
        for wanted, number in zip(batch, numbers.tolist(), strict=True):
            by_shard[number].append(wanted)
        for number, group in by_shard.items():
            try:
                found = await asyncio.to_thread(self._read, number, group)
                problem = "The source no longer holds this picture as it was decided."
            except Exception as error:  # whatever library lies between us and the source, only pictures are lost
                log.warning("no pictures from %s: %s", self._vectors.shards[number].shard.path, error)
                found, problem = {}, "The source cannot be read here."
            for wanted in group:
                self._settle(batch[wanted], wanted, found.get(wanted), problem)

    def _settle(self, future: asyncio.Future[bytes], wanted: Wanted, jpeg: bytes | None, problem: str) -> None:
        if jpeg is None:
            future.set_exception(NoPictureError(problem))
            future.exception()  # nobody may be waiting any more
            return
        self._cached_bytes += len(jpeg) - len(self._cache.pop(wanted, b""))
        self._cache[wanted] = jpeg
        while self._cached_bytes > _CACHE_BYTES:
            self._cached_bytes -= len(self._cache.popitem(last=False)[1])
        future.set_result(jpeg)

    def _read(self, number: int, group: list[Wanted]) -> dict[Wanted, bytes]:
        positions = sorted({wanted.position for wanted in group})
        identity = self._vectors.rows_at(positions, [cf.ROW, cf.SHA256]).to_pylist()
        place = {row[cf.ROW]: at for at, row in zip(positions, identity, strict=True)}
        with self._reading:
            if self._pictures is None:
                self._pictures = Pictures(self._vectors.plan.dataset)
            rows = {row[cf.ROW]: row[cf.SHA256] for row in identity}
            data = {place[row]: image for row, image in self._pictures.read(self._vectors.shards[number].shard, rows)}
        return {
            wanted: jpeg
            for wanted in group
            if wanted.position in data and (jpeg := _jpeg(data[wanted.position], wanted)) is not None
        }


def _jpeg(data: bytes, wanted: Wanted) -> bytes | None:
    side, most = SIZES[wanted.size]
    return jpeg_of(data, blurred=wanted.blurred, side=side, max_bytes=most)
