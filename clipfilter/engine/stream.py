"""Any images as embedded shards, one after another, with nothing written: files, URLs, datasets, runs, pictures in memory."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter import defaults, storage
from clipfilter.engine.decoding import StageTimes, ThreadDecoder, decoded_ahead
from clipfilter.engine.hardware import MAX_THREADS, cpu_count, gpu_count
from clipfilter.engine.job import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_DTYPE,
    refuse_other_weights,
    stored_model,
)
from clipfilter.engine.reading import PatientReader
from clipfilter.engine.shard import EmbeddedShard, embed_rows
from clipfilter.errors import RefusedError, ShardError
from clipfilter.images import DecodeSettings, Mode
from clipfilter.models import load_encoder
from clipfilter.runs import IDENTITY, Run, embeddings_schema, is_run
from clipfilter.sources import (
    COLUMN_PREFIX,
    CONTAINER_SUFFIXES,
    TABLE_SUFFIXES,
    Fetcher,
    Source,
    SourceOptions,
    fetch_images,
    is_image_name,
    open_source,
    row_uid,
)

if TYPE_CHECKING:
    from clipfilter.models import Encoder

_FETCHED_BYTES = 64 << 20
_READ_AT_ONCE = 64
_SHARD = 10_000
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})


@dataclass(frozen=True)
class StreamOptions:
    """How images are read and embedded.

    batch_size: images per forward pass; a run's own size gives a run's own bits. threads: for decoding. decode_ahead:
    batches decoded while the model works, for GPUs. text: whether captions of datasets are embedded too.
    """

    batch_size: int = 64
    decode: Mode = defaults.DECODE
    color: defaults.Color = defaults.COLOR
    max_pixels: int = defaults.MAX_PIXELS
    threads: int | None = None
    decode_ahead: int = 0
    text: bool = False


@dataclass(frozen=True)
class Dataset:
    """A dataset to read; `folder` stands before the keys of an image folder, so that they are paths one can open."""

    source: Source
    folder: str


Named = list[Any]  # consecutive single images
Input = Named | Dataset | Run


def open_inputs(given: Sequence[Any], options: SourceOptions | None = None) -> list[Input]:
    """What each of the arguments is: runs and datasets opened, single images collected; nothing else is read.

    given: image files, http(s) URLs of images, folders, globs, any source, run directories; or images in memory (see
    `encode_image`), or their encoded bytes. A file that is not there, but is called like an image, is one that fails
    later under its name.

    Raises RefusedError for what is neither an image nor a dataset, and for nothing at all.
    """
    inputs: list[Input] = []
    for item in given:
        found = _open(item, options or SourceOptions())
        if isinstance(found, list) and inputs and isinstance(inputs[-1], list):
            inputs[-1] += found
        else:
            inputs.append(found)
    if not inputs:
        raise RefusedError("there are no images; give files, folders, URLs, a dataset or a run.")
    return inputs


def load_for(
    inputs: Sequence[Input],
    model: str | None,
    *,
    device: str = "cpu",
    dtype: defaults.Dtype = "fp32",
    threads: int | None = None,
) -> Encoder:
    """The model asked for (nano where none is); of a run, the one that embedded it and no other.

    Raises RefusedError where two runs, or a run and `model`, are of different weights.
    """
    runs = [item for item in inputs if isinstance(item, Run)]
    if not runs:
        return load_encoder(model or defaults.MODEL, device=device, dtype=dtype, threads=threads)
    plan = runs[0].plan
    encoder = load_encoder(
        model or stored_model(plan), device=device, dtype=plan.model.get("dtype", "fp32"), threads=threads
    )
    for run in runs:
        refuse_other_weights(run.plan, encoder.fingerprint)
    return encoder


def stream_options(
    inputs: Sequence[Input],
    model: str | None = None,
    *,
    device: str = defaults.DEVICE,
    dtype: defaults.Dtype | None = None,
    threads: int | None = None,
    batch_size: int | None = None,
    decode: str = defaults.DECODE,
    text: bool = False,
) -> tuple[Encoder, StreamOptions]:
    """The model and the options for some inputs, with the defaults of a job on this device where None is given."""
    at = on_device(device, dtype, batch_size)
    encoder = load_for(inputs, model, device=at.device, dtype=at.dtype, threads=threads)
    return encoder, StreamOptions(
        batch_size=at.batch_size,
        decode="exact" if decode == "exact" else "fast",
        threads=threads,
        decode_ahead=at.decode_ahead,
        text=text,
    )


class OnDevice(NamedTuple):
    """How a model is run on a device. decode_ahead: batches decoded while the model works."""

    device: str
    dtype: defaults.Dtype
    batch_size: int
    decode_ahead: int


def on_device(
    device: str = defaults.DEVICE, dtype: defaults.Dtype | None = None, batch_size: int | None = None
) -> OnDevice:
    """What is asked for, with the defaults of the device for None; "auto" takes a GPU where there is one."""
    wanted = device if device != "auto" else "cuda" if gpu_count() else "cpu"
    kind = wanted.split(":")[0]
    return OnDevice(
        wanted,
        dtype or DEFAULT_DTYPE.get(kind, "fp32"),
        batch_size or DEFAULT_BATCH_SIZE.get(kind, 64),
        0 if kind == "cpu" else 2,
    )


def embed_stream(
    inputs: Sequence[Input],
    encoder: Encoder,
    options: StreamOptions | None = None,
    on_rows: Callable[[int], None] | None = None,
    failed_shards: list[dict[str, str]] | None = None,
) -> Iterator[EmbeddedShard]:
    """Every image once, in the order given: embedded as a run embeds it, or taken from the run that has it.

    `rows` and `embeddings` are the tables of an annotated shard and its embeddings; `failed` are the images that could
    not be used, with class and message. Memory holds one shard. on_rows is told of every batch's rows. Shards that
    cannot be read, wholly or to their end, are appended to failed_shards ("path" and "error").

    Raises ShardError for those where failed_shards is None.
    """
    options = options or StreamOptions()
    told = on_rows or (lambda rows: None)
    settings = DecodeSettings(encoder.preprocess, options.decode, options.max_pixels, options.color)
    decoder = ThreadDecoder(settings, options.threads or min(MAX_THREADS, cpu_count()))
    lost: list[dict[str, str]] = [] if failed_shards is None else failed_shards
    for item in inputs:
        if isinstance(item, Run):
            yield from _stored(item, encoder, told, lost)
        elif isinstance(item, Dataset):
            yield from _dataset(item, encoder, decoder, options, told, lost)
        else:
            # A model's batch is always full; padding three images to sixty-four would make them wait for nothing.
            sized = replace(options, batch_size=min(options.batch_size, len(item)), text=False)
            for start in range(0, len(item), _SHARD):
                batches = _named(item[start : start + _SHARD], start)
                yield _embed(batches, encoder, decoder, sized, "images", pa.schema([]), told)
        if lost and failed_shards is None:
            raise ShardError(f"{lost[0]['path']}: {lost[0]['error']}")


def encode_image(image: Any) -> bytes:
    """A picture in memory as the bytes of a file, so that it goes the way of every other: lossless.

    image: Pillow image, or array [h, w], [h, w, 1], [h, w, 3] or [h, w, 4], uint8 or float from 0 to 1.

    Raises TypeError or ValueError for anything else.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if not isinstance(image, Image.Image):
        raise TypeError(f"an image is a path, a URL, bytes, a Pillow image or an array, not {type(image).__name__}")
    buffer = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _from_array(array: np.ndarray) -> Any:
    from PIL import Image

    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise ValueError(f"an image array has the shape [h, w], [h, w, 3] or [h, w, 4], not {list(array.shape)}")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all() or array.min() < 0 or array.max() > 1:
            raise ValueError("a floating-point image has values from 0 to 1")
        array = np.rint(array.astype(np.float32) * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"an image array is uint8 or floating point, not {array.dtype}")
    return Image.fromarray(array)


def _open(item: Any, options: SourceOptions) -> Input:
    if not isinstance(item, str | Path):
        return [bytes(item) if isinstance(item, bytearray | memoryview) else item]
    name = str(item)
    if _is_image(name):
        return [name]
    if is_run(name):
        return Run(name).origin()
    source = open_source(name, options)
    pattern = source.to_plan()["pattern"]
    folder = ""
    if source.kind == "folder":
        folder = name if pattern is None else name[: len(name) - len(pattern)] if name.endswith(pattern) else ""
    return Dataset(source, folder.rstrip("/") + "/" if folder.rstrip("/") else "")


def _is_image(name: str) -> bool:
    lower = name.lower()
    if lower.startswith("data:"):
        return True
    if lower.startswith(("http://", "https://")):
        return not lower.split("?")[0].endswith((*CONTAINER_SUFFIXES, *TABLE_SUFFIXES, "/"))
    if storage.is_local(name):
        path = storage.local_path(name)
        if path.is_file():
            return not lower.endswith((*CONTAINER_SUFFIXES, *TABLE_SUFFIXES))
        return is_image_name(path.name) and not path.exists() and not set("*?[{") & set(name)
    return is_image_name(lower) and not set("*?[{") & set(name)


def _named(items: Sequence[Any], first: int) -> Iterator[pa.RecordBatch]:
    """Single images as the batches of a source; `first` is the row number of the first."""
    given = (item if isinstance(item, str | bytes) else encode_image(item) for item in items)
    with contextlib.closing(fetch_images(given, Fetcher(["."], own=True), _FETCHED_BYTES)) as fetched:  # type: ignore[type-var]
        for start in range(0, len(items), _READ_AT_ONCE):
            part = items[start : start + _READ_AT_ONCE]
            found = list(itertools.islice(fetched, len(part)))
            rows = range(first + start, first + start + len(part))
            keys = [item if isinstance(item, str) else f"image {row}" for row, item in zip(rows, part, strict=True)]
            columns = {
                cf.ROW: list(rows),
                cf.KEY: keys,
                cf.UID: [row_uid(str(row), key) for row, key in zip(rows, keys, strict=True)],
                cf.IMAGE: [one.data for one in found],
                cf.CAPTIONS: [None] * len(part),
                cf.ERROR_CLASS: [one.error_class for one in found],
                cf.ERROR: [one.error for one in found],
                cf.SOURCE_JSON: [None] * len(part),
            }
            yield pa.RecordBatch.from_pydict(columns, schema=COLUMN_PREFIX)


def _dataset(
    item: Dataset,
    encoder: Encoder,
    decoder: ThreadDecoder,
    options: StreamOptions,
    told: Callable[[int], None],
    lost: list[dict[str, str]],
) -> Iterator[EmbeddedShard]:
    if item.source.has_captions is False:
        options = replace(options, text=False)
    for shard in item.source.iter_shards():
        reader = PatientReader(item.source, shard)
        try:
            found = _embed(reader, encoder, decoder, options, shard.id, item.source.schema, told)
        except ShardError as error:
            lost.append({"path": shard.path, "error": str(error)})
            continue
        if reader.stats.damaged:
            lost.append({"path": shard.path, "error": "damaged; only the rows before the damage were read"})
        yield replace(found, rows=_placed(found.rows, item.folder), failed=_placed(found.failed, item.folder))


def _embed(
    batches: Iterable[pa.RecordBatch],
    encoder: Encoder,
    decoder: ThreadDecoder,
    options: StreamOptions,
    shard: str,
    schema: pa.Schema,
    told: Callable[[int], None],
) -> EmbeddedShard:
    """As a run does it (docs/decisions/0002): shard by shard, in batches of one size."""
    size, ahead = encoder.preprocess.size, options.decode_ahead
    with decoded_ahead(batches, decoder, size, options.batch_size, StageTimes(), ahead) as decoded:
        return embed_rows(
            decoded, encoder, shard=shard, source_schema=schema, text=options.text, captions="first",
            times=StageTimes(), on_batch=told,
        )  # fmt: skip


def _stored(
    run: Run, encoder: Encoder, told: Callable[[int], None], lost: list[dict[str, str]]
) -> Iterator[EmbeddedShard]:
    lost += [{"path": item.shard.path, "error": item.error} for item in run.version.failed_shards]
    with run.directory:
        for commit in run.commits():
            stored = run.read(commit)
            if stored is None:
                rows = IDENTITY.empty_table()
                embeddings = embeddings_schema(encoder.dim, run.plan.text_column).empty_table()
            else:
                rows, embeddings = stored.rows, stored.embeddings
            told(rows.num_rows)
            yield EmbeddedShard(rows, embeddings, run.failed(commit), commit.captions_truncated, 0)


def _placed(table: pa.Table, folder: str) -> pa.Table:
    """The keys of an image folder as paths below what the user named."""
    if not folder:
        return table
    keys = pa.array([folder + key for key in table[cf.KEY].to_pylist()], pa.string())
    return table.set_column(table.schema.get_field_index(cf.KEY), cf.KEY, keys)
