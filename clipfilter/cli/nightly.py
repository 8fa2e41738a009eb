"""`nightly`: process what is new in a growing source, append it to its dataset, and say when something is wrong."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clipfilter import defaults, text
from clipfilter.cli import options as o
from clipfilter.cli.jobs import job_request
from clipfilter.cli.printing import print_json, say, stdout
from clipfilter.decisions import DECISIONS

if TYPE_CHECKING:
    from clipfilter.engine import MetricsOptions
    from clipfilter.nightly import NightRequest, NightResult


@o.grouped
def nightly(
    source: o.Source,
    out: o.Out,
    policy: Annotated[
        str | None, typer.Option("--policy", "-p", help="Policy file or pack; without one rows are only scored.")
    ] = None,
    missing: Annotated[
        Literal["keep", "drop"], typer.Option(help="What becomes of rows whose file is gone from the source.")
    ] = "keep",
    refit: Annotated[
        bool, typer.Option("--refit", help="Compute dataset-level thresholds anew and decide all rows again.")
    ] = False,
    silence: Annotated[int, typer.Option(min=1, help="Nights without anything new that are an alert.")] = 2,
    window: Annotated[int, typer.Option(min=1, help="Earlier nights that tonight's rows are compared with.")] = 14,
    webhook: Annotated[
        str | None, typer.Option(envvar="CLIPFILTER_WEBHOOK", help="Address that alerts are posted to as JSON.")
    ] = None,
    model: o.Model = defaults.MODEL,
    *,
    placing: o.Placing,
    batches: o.Batches,
    columns: o.Columns,
    copy: o.Copy = True,
    retry_failed: o.RetryFailed = False,
    telling: o.Telling,
) -> None:
    """Process only what is new or changed since the last night, append it as a new version, alert on drift or failure."""
    from clipfilter.nightly import NightRequest

    options = {"policy": policy, "model": model, "copy": copy, "retry_failed": retry_failed}
    job = job_request("run" if policy else "score", source, out, placing, batches, columns, telling, **options)
    request = NightRequest(job, missing=missing, refit=refit, silence_nights=silence, window=window, webhook=webhook)
    if telling.dry_run:
        from clipfilter.cli.pipeline_config import show_plan
        from clipfilter.nightly import night_overview

        show_plan(night_overview(request), None, telling.as_json)
        return
    done = run_and_show(request, as_json=telling.as_json, quiet=telling.quiet, metrics=telling.metrics())
    raise typer.Exit(done)


def run_and_show(request: NightRequest, *, as_json: bool, quiet: bool, metrics: MetricsOptions | None = None) -> int:
    """Run a night, print what it did; its exit code."""
    from clipfilter.cli.display import watched
    from clipfilter.engine import MetricsOptions
    from clipfilter.nightly import run_night

    metrics = metrics or MetricsOptions()
    result = watched(lambda line: run_night(request, line), "nightly", metrics, silent=quiet or as_json)
    if as_json:
        print_json(result.to_json())
    elif quiet:
        for alert in result.alerts:
            print(f"{alert.kind}: {alert.message}", file=sys.stderr)
    else:
        _print(result)
    return result.exit_code


def _print(result: NightResult) -> None:
    console = stdout()
    counts, totals, shards = result.counts, result.totals, result.shards
    found = [f"{shards[name]:,} {name}" for name in ("new", "changed", "again", "failed", "vanished") if shards[name]]
    if shards["set_aside"]:
        found.append(f"{shards['set_aside']:,} set aside by a rollback")
    say(console, f"night {result.night}  {result.outcome}: {', '.join(found) or 'nothing new'}")
    if counts.get("rows"):
        parts = [f"{counts.get(name, 0):,} {name}" for name in (*DECISIONS, "failed")]
        say(console, f"tonight  {counts['rows']:,} rows: {', '.join(parts)}")
    shown = [item for item in result.drift if item.alarm] or result.drift[:1]
    for item in shown:
        say(
            console,
            f"drift    {item.of}: PSI {item.psi:.3f}, limit {item.limit:.3f} ({item.m:,} against {item.n:,} rows)",
        )
    held = f"{totals.rows:,} rows in {text.plural(totals.shards, 'shard')}"
    say(console, f"dataset  {result.out} (version {int(result.version)}, {held})")
    for told in totals.seen.told() if totals.seen is not None and result.outcome != "unchanged" else ():
        say(console, told, style="dim")
    for alert in result.alerts:
        say(console, f"ALERT    {alert.kind}: {alert.message}", style="red")
    for message in result.messages:
        say(console, message, style="yellow")
