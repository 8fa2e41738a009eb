"""Decide the stored embeddings of a run again on Apache Beam, and count what came out. Reads no image.

    python pipelines/refilter_beam.py CONFIG [--dry-run] [--json]

The result in `out` is that of `clipfilter filter`, byte for byte: a run directory that reports, exports and verifies like
any other, and that resumes when the command is repeated. docs/guide/beam.md explains the config and the runners.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from pydantic import Field

from clipfilter.beam.executor import BeamExecutor
from clipfilter.beam.options import DIRECT, BeamOptions, Value
from clipfilter.beam.statistics import QUANTILES, StatisticsRequest, dataset_statistics
from clipfilter.cli.pipeline_config import Config, arguments, load_config, show_plan, start
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.engine.overview import plan_overview


class BeamConfig(Config):
    """runner: Beam's name of it. options: Beam's own, by their names without dashes."""

    runner: str = DIRECT
    options: dict[str, Value] = Field(default_factory=dict)


class StatisticsConfig(Config):
    """out: where statistics.json and its tables go. url_column: source column, for keep rates per domain."""

    out: str
    url_column: str | None = None
    quantiles: tuple[float, ...] = Field(QUANTILES, min_length=1)


class RefilterConfig(Config):
    """run: a finished run. model: where its model is, if it was a local one. statistics: left out, none are counted."""

    run: str
    policy: str
    out: str
    model: str | None = None
    beam: BeamConfig = BeamConfig()
    statistics: StatisticsConfig | None = None


def main() -> int:
    _quiet()
    given = arguments(__doc__)
    config = load_config(given.config, RefilterConfig)
    options = BeamOptions(config.beam.runner, dict(config.beam.options))
    request = JobRequest("filter", config.run, config.out, policy=config.policy, model=config.model)
    if given.dry_run:
        options.pipeline()  # refuses a runner or an option that Beam does not have
        show_plan(
            plan_overview(request) | {"runner": config.beam.runner, "beam options": options.flags()},
            None,
            given.as_json,
        )
        return 0
    result = run_job(request, executor=BeamExecutor(options))
    statistics: dict[str, Any] = {}
    if config.statistics is not None:
        wanted = config.statistics
        statistics = dataset_statistics(
            StatisticsRequest(config.out, wanted.out, wanted.url_column, wanted.quantiles), options
        )
    _show(result.totals, statistics, given.as_json, result.out, result.version)
    for message in result.messages:
        print(message, file=sys.stderr)
    return result.exit_code


def _quiet() -> None:
    """Warnings on stderr, without Beam's about packages for Google Cloud that other runners do without."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.addFilter(lambda record: "apitools not found" not in record.getMessage())
    logging.basicConfig(handlers=[handler])


def _show(totals: dict[str, Any], statistics: dict[str, Any], as_json: bool, out: str, version: str) -> None:
    if as_json:
        print(json.dumps({"out": out, "version": version, "totals": totals, "statistics": statistics}, indent=1))
        return
    for name in ("rows", "keep", "review", "reject", "failed"):
        print(f"{name:<14} {totals[name]:,}")
    for score, found in statistics.get("scores", {}).items():
        some = ", ".join(f"{q}: {value:.4g}" for q, value in found["quantiles"].items() if value is not None)
        print(f"{score}  {found['ranked']:,} rows; quantiles {some}")
    if statistics:
        print(
            f"{'duplicates':<14} {statistics['duplicates']['rows']:,} in {statistics['duplicates']['groups']:,} groups"
        )
        if statistics["domains"]["rows"]:
            print(f"{'domains':<14} {statistics['domains']['rows']:,}")
    print(f"dataset        {out} (version {int(version)})")


if __name__ == "__main__":
    start(main)
