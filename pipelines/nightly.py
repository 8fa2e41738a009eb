"""Run every night on a source that grows: only what is new, one dataset, alerts on drift, failure and silence.

    python pipelines/nightly.py pipelines/nightly.yaml [--dry-run] [--json]

For a scheduler: exit code 0 when all is well, 3 when the dataset is there but somebody should look (also posted as JSON to
the address in the environment variable CLIPFILTER_WEBHOOK). After a crash, run it again. `clipfilter history OUT` shows
what has been.
"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import Field

from clipfilter.cli.nightly import run_and_show
from clipfilter.cli.pipeline_config import JobConfig, arguments, job_request, load_config, show_plan, start
from clipfilter.engine.overview import plan_overview
from clipfilter.nightly import NightRequest
from clipfilter.nightly.night import arrivals_overview
from clipfilter.operations.estimate import estimate_job


class NightlyConfig(JobConfig):
    """policy: without one rows are only scored. The others are the options of `clipfilter nightly`."""

    policy: str | None = None
    copy_images: bool = True
    missing: Literal["keep", "drop"] = "keep"
    silence_nights: int = Field(default=2, ge=1)
    window: int = Field(default=14, ge=1)
    retry_failed: bool = True


def main() -> int:
    given = arguments(__doc__)
    config = load_config(given.config, NightlyConfig)
    job = job_request(
        config,
        "run" if config.policy else "score",
        policy=config.policy,
        copy_images=config.copy_images,
        retry_failed=config.retry_failed,
    )
    request = NightRequest(
        job,
        missing=config.missing,
        silence_nights=config.silence_nights,
        window=config.window,
        webhook=os.environ.get("CLIPFILTER_WEBHOOK"),
    )
    if given.dry_run:
        found, arrivals = arrivals_overview(request)
        estimate = estimate_job(job, config.cost, [unit.shard for unit in arrivals.units])
        show_plan({**plan_overview(job), **found}, estimate, given.as_json)
        return 0
    return run_and_show(request, as_json=given.as_json, quiet=False)


if __name__ == "__main__":
    start(main)
