"""Add CLIP similarity, heads and named concepts to every row of a corpus, as columns; no decisions.

    python pipelines/score.py pipelines/score.yaml [--dry-run] [--json]

Running it again computes nothing that is done. The rows are in OUT/annotated/, the embeddings beside them.
"""

from __future__ import annotations

from clipfilter.cli.display import print_json, print_result, progress
from clipfilter.cli.pipeline_config import JobConfig, arguments, job_request, load_config, show_plan, start
from clipfilter.engine.job import run_job
from clipfilter.engine.overview import plan_overview
from clipfilter.operations.estimate import estimate_job


class ScoreConfig(JobConfig):
    """columns: a policy whose rules' scores become columns (`cf_score.<rule>`), besides `cf_similarity`."""

    columns: str | None = None
    retry_failed: bool = False


def main() -> int:
    given = arguments(__doc__)
    config = load_config(given.config, ScoreConfig)
    request = job_request(config, "score", policy=config.columns, retry_failed=config.retry_failed)
    if given.dry_run:
        show_plan(plan_overview(request), estimate_job(request, config.cost), given.as_json)
        return 0
    with progress(enabled=not given.as_json) as shown:
        result = run_job(request, shown)
    print_json(result, None) if given.as_json else print_result(result, None)
    return result.exit_code


if __name__ == "__main__":
    start(main)
