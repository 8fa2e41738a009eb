"""Fetch a list of URLs into webdataset shards, ready for every other pipeline; run again, it fetches only what failed.

    python pipelines/ingest.py pipelines/ingest.yaml [--dry-run] [--json]

Owners who opt out (X-Robots-Tag: noai, noimageai, noindex, noimageindex) are respected. OUT/_ingest/status.parquet has one
row per row of the list with its one state.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from clipfilter.cli.ingest import run_and_show
from clipfilter.cli.pipeline_config import Config, arguments, load_config, show_plan, start
from clipfilter.ingest import IngestRequest, plan_ingest
from clipfilter.operations.estimate import CostConfig, Estimate, price


class IngestConfig(Config):
    """The options of `clipfilter ingest`; bytes_per_image is for the estimate."""

    urls: str
    out: str
    url_column: str | None = None
    caption_column: str | None = None
    image_size: int | None = Field(default=None, ge=1)
    rows_per_shard: int = Field(default=10_000, ge=1)
    processes: int = Field(default=1, ge=1)
    threads: int = Field(default=64, ge=1)
    retry: Literal["failed", "transient", "none"] = "failed"
    private: bool = False
    bytes_per_image: int = Field(default=100_000, ge=1)
    cost: CostConfig = CostConfig()


def main() -> int:
    given = arguments(__doc__)
    config = load_config(given.config, IngestConfig)
    options = config.model_dump(exclude={"cost", "bytes_per_image"})
    request = IngestRequest(**options)
    if given.dry_run:
        plan = plan_ingest(request)
        show_plan(plan, estimate(config, plan), given.as_json)
        return 0
    return run_and_show(request, as_json=given.as_json, quiet=False)


def estimate(config: IngestConfig, plan: dict[str, Any]) -> Estimate | None:
    """The cost of fetching; None where no rate is given, since it cannot be measured without fetching."""
    rate = config.cost.images_per_second
    if rate is None:
        return None
    images, shards = plan["to fetch"], plan["shards"]
    size = images * config.bytes_per_image
    hours, writes = images / rate / 3600, 4 * shards  # outcomes, sidecar, stats, tar
    once, month = price(config.cost, hours, size, writes, 0)
    return Estimate(
        shards=shards, images=images, images_exact=True, source_bytes=size, rate=rate, rate_from="given", hours=hours,
        wall_hours=hours / config.cost.workers, storage_bytes=size, writes=writes, reads=0, price=once, price_month=month,
    )  # fmt: skip


if __name__ == "__main__":
    start(main)
