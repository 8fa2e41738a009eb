"""From a captioned dataset to a training set: embed, find duplicates, decide by a policy, export in shards.

    python pipelines/curate.py pipelines/curate.yaml [--dry-run] [--json]

Every step is a run of its own below `out` and resumes there: running it again computes nothing that is done. When the
source has grown, what follows the embeddings is made anew, in a folder of the new version.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

from pydantic import Field

from clipfilter.cli.display import progress
from clipfilter.cli.pipeline_config import Config, JobConfig, arguments, job_request, load_config, show_plan, start
from clipfilter.curation.dedup import DedupOptions, find_duplicates
from clipfilter.engine.job import run_job
from clipfilter.engine.overview import plan_overview
from clipfilter.operations.estimate import estimate_job
from clipfilter.operations.export import export_run
from clipfilter.policies import load_policy


class DedupConfig(Config):
    """near: bits of perceptual hashes; semantic: smallest cosine; null switches either off."""

    near: int | None = Field(default=4, ge=0, le=31)
    semantic: float | None = Field(default=None, gt=0, le=1)
    prefer: str | None = "pixels"


class ExportConfig(Config):
    """to: an empty folder of the training set; the version of the source is added to it."""

    to: str
    form: Literal["source", "clip-retrieval", "datacomp"] = "source"
    rows_per_shard: int | None = Field(default=None, ge=1)


class CurateConfig(JobConfig):
    """policy: decides, and can use the columns `cf_duplicate`, `cf_duplicate_cosine` and `cf_duplicate_bits`."""

    policy: str
    dedup: DedupConfig = DedupConfig()
    export: ExportConfig


def main() -> int:
    given = arguments(__doc__)
    config = load_config(given.config, CurateConfig)
    embed = replace(job_request(config, "embed"), out=f"{config.out}/embedded")
    policy = load_policy(config.policy)
    if given.dry_run:
        steps = {
            "then": [
                "find duplicates",
                f"decide by {policy.name} version {policy.version}",
                f"export to {config.export.to}",
            ]
        }
        show_plan(plan_overview(embed) | steps, estimate_job(embed, config.cost), given.as_json)
        return 0
    with progress(enabled=not given.as_json) as shown:
        embedded = run_job(embed, shown)
    if embedded.exit_code:
        print(*embedded.messages, sep="\n")
        return embedded.exit_code
    place = f"{config.out}/{embedded.version}"
    dedup = config.dedup
    options = DedupOptions(near=dedup.near, semantic=dedup.semantic, prefer=dedup.prefer)
    found = find_duplicates(embed.out, f"{place}/deduplicated", options)
    decide = replace(
        embed,
        job="filter",
        source=found.out,
        out=f"{place}/decided",
        policy=config.policy,
        model=None,
        max_failures=1.0,
    )
    with progress(enabled=not given.as_json) as shown:
        decided = run_job(decide, shown)
    exported = export_run(
        decided.out,
        f"{config.export.to}/{embedded.version}",
        form=config.export.form,
        rows_per_shard=config.export.rows_per_shard,
    )
    totals = decided.totals
    summary = {
        "rows": totals["rows"],
        "failed": totals["failed"],
        "duplicates": found.duplicates,
        "decisions": {name: totals[name] for name in ("keep", "review", "reject")},
        "exported": exported,
    }
    if given.as_json:
        print(json.dumps(summary, indent=1))
        return 0
    print(f"{totals['rows']:,} rows, {totals['failed']:,} failed; duplicates: {found.duplicates}")
    print(f"keep {totals['keep']:,}  review {totals['review']:,}  reject {totals['reject']:,}")
    print(f"{exported['rows']:,} rows exported to {exported['to']}")
    return 0


if __name__ == "__main__":
    start(main)
