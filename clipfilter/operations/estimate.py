"""What a job will cost before it is started: images, hours, bytes and requests, each with where its number is from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from pydantic import BaseModel, Field

from clipfilter import defaults, text
from clipfilter.errors import ShardError

if TYPE_CHECKING:
    from clipfilter.engine import JobRequest
    from clipfilter.models import Encoder
    from clipfilter.sources import Shard, Source

#: Compressed bytes of one annotated row besides its source columns, and of one row of `embeddings/` besides its vectors.
_ROW_BYTES, _FACT_BYTES = 300, 100
#: Files a shard may write: annotated, failed, embeddings, kept, review, and its commit.
_FILES_PER_SHARD = 6
_SAMPLED_TARS, _SAMPLE_BYTES = 4, 4 << 20
_MEASURE_SECONDS = 1.0


@dataclass(frozen=True)
class Estimate:
    """What a job will take.

    images: exact for Parquet and folders; for tars from the sizes of the first ones (`images_exact` says which).
    rate: images per second of one worker, `rate_from` where that number is from: given, or measured here with the model
    alone, reading and decoding not counted. hours: of one worker; wall_hours: with all of them at work. storage_bytes: an
    upper bound, reached when every image is kept and copied. writes, reads: requests, where the places are object
    stores. price (once) and price_month: None where no price is known.
    """

    shards: int
    images: int
    images_exact: bool
    source_bytes: int
    rate: float
    rate_from: str
    hours: float
    wall_hours: float
    storage_bytes: int
    writes: int
    reads: int
    price: float | None
    price_month: float | None


def estimate_job(request: JobRequest, cost: CostConfig, shards: Sequence[Shard] | None = None) -> Estimate:
    """The cost of an image job (run, embed, score) over these shards, or over all of its source. Writes nothing.

    Raises RefusedError where the source or the model cannot be had.
    """
    from clipfilter.models import load_encoder
    from clipfilter.sources import open_source

    source = open_source(request.source, request.source_options)
    listed = list(source.iter_shards()) if shards is None else list(shards)
    images, exact = count_images(source, listed)
    size = sum({shard.path: shard.size for shard in listed}.values())
    device = "cpu" if request.device == "auto" else request.device
    encoder = load_encoder(request.model or defaults.MODEL, device=device)
    if cost.images_per_second is not None:
        rate, rate_from = cost.images_per_second, "given"
    else:
        batch = min(request.batch_size or 256, 16 if device == "cpu" else 256)
        rate, rate_from = measured_rate(encoder, batch), f"the model alone on this machine's {device}"
    hours = images / rate / 3600
    vectors = 2 * encoder.dim * (1 + (request.captions != "none" and source.has_captions is not False))
    storage = images * (vectors + _FACT_BYTES + _ROW_BYTES) + (size if request.job == "run" and request.copy else 0)
    writes, reads = _FILES_PER_SHARD * len(listed), 2 * len(listed)
    once, month = price(cost, hours, storage, writes, reads)
    return Estimate(
        shards=len(listed), images=images, images_exact=exact, source_bytes=size, rate=rate, rate_from=rate_from,
        hours=hours, wall_hours=hours / cost.workers, storage_bytes=storage, writes=writes, reads=reads, price=once,
        price_month=month,
    )  # fmt: skip


def count_images(source: Source, shards: Sequence[Shard]) -> tuple[int, bool]:
    """(images, whether that is exact). Tars are counted by size, at the bytes per image of the first ones' beginnings."""
    known = sum(shard.stop - shard.start for shard in shards if shard.stop is not None)
    tars = [shard for shard in shards if shard.stop is None]
    if not tars:
        return known, True
    rows, read = _sample_tars(source, tars[:_SAMPLED_TARS])
    return known + (round(sum(shard.size for shard in tars) * rows / read) if read else 0), False


def _sample_tars(source: Source, tars: Sequence[Shard]) -> tuple[int, int]:
    """(rows, bytes that hold them) in the beginnings of some tars, or in whole archives and tables of other kinds."""
    from clipfilter.sources import TAR_SUFFIXES, Location, Wanted, index_tar, read_prefix

    plan = source.to_plan()
    location = Location(plan["root"], plan["pattern"])
    rows = read = 0
    for tar in tars:
        try:
            if not tar.path.lower().endswith(TAR_SUFFIXES):
                rows += sum(batch.num_rows for batch in source.read(tar, images=False))
                read += tar.size
                continue
            data = read_prefix(location.url(tar.path), _SAMPLE_BYTES)
        except (OSError, ShardError):
            continue
        wanted = Wanted(plan["format"]["image_extension"], source.options.pictures)
        rows += len(index_tar(partial(_slice, data), len(data), wanted))
        read += len(data)
    return rows, read


def _slice(data: bytes, size: int, offset: int) -> bytes:
    return data[offset : offset + size]


def measured_rate(encoder: Encoder, batch_size: int) -> float:
    """Images per second of the model's forward pass on noise, after one pass to warm up."""
    side = encoder.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (batch_size, 3, side, side), dtype=np.uint8)
    encoder.encode_images(pixels)
    started, done = time.perf_counter(), 0
    while time.perf_counter() - started < _MEASURE_SECONDS:
        encoder.encode_images(pixels)
        done += batch_size
    return done / (time.perf_counter() - started)


def price(
    cost: CostConfig, hours: float, storage_bytes: int, writes: int, reads: int
) -> tuple[float | None, float | None]:
    """(once, per month) in the currency of the given prices; None where none is given for any part."""
    parts = [(cost.hour, hours), (cost.thousand_writes, writes / 1000), (cost.thousand_reads, reads / 1000)]
    known = [each * count for each, count in parts if each is not None]
    return (sum(known) if known else None), (cost.gb_month * storage_bytes / 1e9 if cost.gb_month is not None else None)


def estimate_lines(e: Estimate) -> list[str]:
    """The estimate for people."""
    shards = text.plural(e.shards, "shard")
    hours = f", {e.wall_hours:,.2f} with all workers" if e.wall_hours != e.hours else ""
    lines = [
        f"{'images':<14} {'' if e.images_exact else 'about '}{e.images:,} in {shards} ({amount(e.source_bytes)})",
        f"{'worker hours':<14} {e.hours:,.2f} at {e.rate:,.0f} images/s ({e.rate_from}){hours}",
        f"{'storage':<14} at most {amount(e.storage_bytes)}",
        f"{'requests':<14} at most {e.writes:,} writes, about {e.reads:,} reads",
    ]
    if e.price is not None:
        lines.append(f"{'price':<14} {e.price:,.2f} once")
    if e.price_month is not None:
        lines.append(f"{'storage price':<14} {e.price_month:,.2f} a month")
    return lines


def amount(size: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            break
        size /= 1000
    return f"{size:,.0f} {unit}" if unit == "bytes" or size >= 100 else f"{size:,.1f} {unit}"


class CostConfig(BaseModel, extra="forbid", frozen=True, strict=True):
    """What an estimate may take as given.

    images_per_second: of one worker (one GPU); without it the rate is measured here with the model. Prices are per hour
    of one worker, per GB (10^9 bytes) and month, and per 1 000 requests that write or read, in any one currency.
    """

    images_per_second: float | None = Field(default=None, gt=0)
    workers: int = Field(default=1, ge=1)
    hour: float | None = Field(default=None, ge=0)
    gb_month: float | None = Field(default=None, ge=0)
    thousand_writes: float | None = Field(default=None, ge=0)
    thousand_reads: float | None = Field(default=None, ge=0)
