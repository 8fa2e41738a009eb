"""Moderate uploads: decide every image by a policy, write the review queue and a page to look at.

    python pipelines/moderate.py pipelines/moderate.yaml [--dry-run] [--json]

OUT/kept/ and OUT/review/ hold the images' own bytes; OUT/annotated/ says for every row which rule decided it and why;
OUT/queue.csv is the review queue, worst first, for whoever looks at it. Running it again computes nothing that is done.
"""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from clipfilter.cli.display import print_json, print_result, progress
from clipfilter.cli.pipeline_config import JobConfig, arguments, job_request, load_config, show_plan, start
from clipfilter.engine.job import run_job
from clipfilter.engine.overview import plan_overview
from clipfilter.operations.estimate import estimate_job
from clipfilter.report import write_report
from clipfilter.runs import Run
from clipfilter.storage import Directory

_FIELDS = ("uid", "key", "rule", "score", "threshold", "nearest", "excess")


class ModerateConfig(JobConfig):
    """policy: a file or the name of a pack. queue: how many rows reviewers can look at; the worst are listed."""

    policy: str
    copy_images: bool = True
    queue: int = 1000


def main() -> int:
    given = arguments(__doc__)
    config = load_config(given.config, ModerateConfig)
    request = job_request(config, "run", policy=config.policy, copy_images=config.copy_images)
    if given.dry_run:
        show_plan(plan_overview(request), estimate_job(request, config.cost), given.as_json)
        return 0
    with progress(enabled=not given.as_json) as shown:
        result = run_job(request, shown)
    write_queue(Directory(result.out), config.queue)
    report = write_report(result.out, thumbnails="blur")
    print_json(result, report) if given.as_json else print_result(result, report)
    return result.exit_code


def write_queue(directory: Directory, size: int) -> None:
    """OUT/queue.csv: the rows under review, the farthest beyond their threshold first."""
    worst = heapq.nlargest(size, review_rows(directory.url), key=lambda row: (row["excess"], row["uid"]))
    text = io.StringIO()
    writer = csv.DictWriter(text, _FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _harmless(value) for name, value in row.items()} for row in worst)
    directory.replace("queue.csv", text.getvalue().encode())
    directory.clean_scratch(stale_only=False)


def review_rows(out: str) -> Iterator[dict[str, Any]]:
    """Each row under review with the reason that is farthest beyond its threshold; a missing input counts as farthest."""
    for _, batch in Run.open(out).batches("annotated", ["cf_uid", "cf_key", "cf_decision", "cf_reasons"]):
        for row in batch.filter(pc.equal(batch["cf_decision"], "review")).to_pylist():
            reasons = [{**reason, "excess": _excess(reason)} for reason in row["cf_reasons"]]
            top = max(reasons, key=lambda reason: reason["excess"])
            facts = {name: top[name] for name in ("rule", "score", "threshold", "nearest", "excess")}
            yield {"uid": row["cf_uid"], "key": row["cf_key"], **facts}


def _excess(reason: dict[str, Any]) -> float:
    if reason["score"] is None or reason["threshold"] is None:
        return 1.0
    return abs(float(reason["score"]) - float(reason["threshold"]))


def _harmless(value: Any) -> Any:
    """A key that begins like a formula must not be one in a spreadsheet."""
    return "'" + value if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


if __name__ == "__main__":
    start(main)
