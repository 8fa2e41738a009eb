"""Fetches shards of a list with img2dataset's own downloader and writer, in processes of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import multiprocessing
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter.egress import Limits
from clipfilter.errors import ClipfilterError, RefusedError, RowError
from clipfilter.ingest.fetching import OPT_OUTS, Fetch
from clipfilter.ingest.states import DIGITS, OUTCOMES, SUCCESS, Outcome, shard_name, state_of
from clipfilter.ingest.urls import row_ids

_QUALITY = 95


def require_img2dataset() -> None:
    """Raises RefusedError where the extra is not installed."""
    for package in ("img2dataset", "cv2"):
        if importlib.util.find_spec(package) is None:
            raise RefusedError(f"ingest needs {package}, which is not installed; `pip install clipfilter[ingest]`.")


@dataclass(frozen=True)
class ShardTask:
    """One shard to fetch: its number, and rows of `url`, `uid`, maybe `caption`, and other columns.

    tried: how often each row has been fetched before.
    """

    number: int
    rows: pa.Table
    tried: tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """What a process needs to know; travels to it."""

    folder: str
    rows_per_shard: int
    threads: int
    image_size: int | None
    limits: Limits


class Workers:
    """Processes that fetch shards; close them when done."""

    def __init__(self, processes: int, settings: Settings) -> None:
        self._folder = Path(settings.folder)
        self._folder.mkdir(exist_ok=True)
        self._settings = settings
        self._most = processes + 1
        # Spawned: img2dataset's libraries do not survive a fork of a process with threads.
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))

    def run(self, tasks: Iterable[ShardTask]) -> Iterator[Outcome]:
        """The outcomes, in the order in which shards are finished; one task more than processes is read ahead.

        Raises ClipfilterError when a shard cannot be written; what was published before stays.
        """
        running: dict[Future[None], ShardTask] = {}
        waiting = iter(tasks)
        exhausted = False
        while not exhausted or running:
            while not exhausted and len(running) < self._most:
                task = next(waiting, None)
                if task is None:
                    exhausted = True
                    break
                path = self._folder / f"{task.number}.feather"
                rows = task.rows
                with pa.OSFile(str(path), "wb") as handle, pa.ipc.new_file(handle, rows.schema) as writer:
                    writer.write_table(rows)
                running[self._pool.submit(_fetch_shard, task.number, str(path), self._settings)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done if running else ():
                task = running.pop(future)
                try:
                    future.result()
                except (OSError, BrokenProcessPool, pa.ArrowException) as error:
                    raise ClipfilterError(
                        f"shard {shard_name(task.number)} could not be fetched ({type(error).__name__}: {error}); what is "
                        "finished stays, run the same command again."
                    ) from error
                yield self._outcome(task)

    def close(self) -> None:
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _outcome(self, task: ShardTask) -> Outcome:
        """Every row of the task with its one state, whatever img2dataset wrote or forgot."""
        name = shard_name(task.number)
        sidecar, tar = self._folder / f"{name}.parquet", self._folder / f"{name}.tar"
        written = pq.read_table(sidecar)
        digits = 10 ** (len(written["key"][0].as_py()) - DIGITS) if written.num_rows else 1
        said = {
            int(key) % digits: (key, status, error)
            for key, status, error in zip(
                *(written[column].to_pylist() for column in ("key", "status", "error_message")), strict=True
            )
        }
        missing = (None, "", "img2dataset lost the row")
        found = [said.get(place, missing) for place in range(task.rows.num_rows)]
        states = [state_of(status, error) for _, status, error in found]
        good = pc.equal(written["status"], SUCCESS)
        count = pc.sum(good).as_py() or 0
        if count:
            # Failures are in the outcomes; the sidecar beside the tar tells of what is in it.
            pq.write_table(written.filter(good), sidecar, compression="zstd")
        rows = pa.table(
            {
                "uid": task.rows["uid"],
                "url": task.rows["url"],
                "state": pa.array(states, pa.string()),
                "error": pa.array([error for _, _, error in found], pa.string()),
                "shard": pa.array([name if state == SUCCESS else None for state in states], pa.string()),
                "key": pa.array(
                    [key if state == SUCCESS else None for (key, _, _), state in zip(found, states, strict=True)],
                    pa.string(),
                ),
                "attempt": pa.array([tried + 1 for tried in task.tried], pa.int32()),
                "id": pa.array(row_ids(task.rows["uid"])),
            },
            schema=OUTCOMES,
        )
        return Outcome(task.number, tar if count else None, sidecar if count else None, rows)


def _fetch_shard(number: int, feather: str, settings: Settings) -> None:
    """In a process of its own: fetch one shard into the folder."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it would ask the network for a newer version of itself
    from img2dataset import downloader
    from img2dataset.writer import WebDatasetSampleWriter

    downloader.download_image = Fetch(settings.limits)
    schema = pa.ipc.open_file(pa.memory_map(feather)).schema
    downloader.Downloader(
        sample_writer_class=WebDatasetSampleWriter,
        resizer=_Whole() if settings.image_size is None else _Scaled(settings.image_size),
        thread_count=settings.threads,
        save_caption="caption" in schema.names,
        extract_exif=False,
        output_folder=settings.folder,
        column_list=schema.names,
        timeout=settings.limits.timeout,
        number_sample_per_shard=max(settings.rows_per_shard, 2),
        oom_shard_count=DIGITS,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,
        user_agent_token=None,
        disallowed_header_directives=list(OPT_OUTS),
    ).download_shard((number, feather))


class _Whole:
    """img2dataset's resizer, but the bytes stay as they came; what the later reader cannot decode is not stored."""

    def __call__(self, stream: io.BytesIO, boxes: Any = None) -> tuple[Any, ...]:
        from clipfilter.images import decode

        data = stream.read()
        try:
            found = decode(data, mode="fast", min_side=64)
        except RowError as error:
            return None, None, None, None, None, error.message
        return data, found.width, found.height, found.width, found.height, None


class _Scaled:
    """img2dataset's resizer, for images that can be decoded within the limits."""

    def __init__(self, size: int) -> None:
        from img2dataset.resizer import Resizer

        self._resizer = Resizer(
            image_size=size, resize_mode="keep_ratio", resize_only_if_bigger=True, encode_quality=_QUALITY,
            skip_reencode=True,
        )  # fmt: skip

    def __call__(self, stream: io.BytesIO, boxes: Any = None) -> tuple[Any, ...]:
        from clipfilter.images import read_header

        try:
            read_header(stream.getvalue())
        except RowError as error:
            return None, None, None, None, None, error.message
        found: tuple[Any, ...] = self._resizer(stream)
        return found
