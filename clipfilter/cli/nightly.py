"""`nightly`: process what is new in a growing source, append it to its dataset, and say when something is wrong."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfilter.cli import jobs

if TYPE_CHECKING:
    from clipfilter.engine import MetricsOptions
    from clipfilter.nightly import NightRequest, NightResult


class Missing(enum.StrEnum):
    keep = "keep"
    drop = "drop"


def nightly(
    source: jobs.Source,
    out: jobs.Out,
    policy: Annotated[
        str | None, typer.Option("--policy", "-p", help="Policy file or pack; without one rows are only scored.")
    ] = None,
    missing: Annotated[
        Missing, typer.Option(help="What becomes of rows whose file is gone from the source.")
    ] = Missing.keep,
    refit: Annotated[
        bool, typer.Option("--refit", help="Compute dataset-level thresholds anew and decide all rows again.")
    ] = False,
    silence: Annotated[int, typer.Option(min=1, help="Nights without anything new that are an alert.")] = 2,
    window: Annotated[int, typer.Option(min=1, help="Earlier nights that tonight's rows are compared with.")] = 14,
    webhook: Annotated[
        str | None, typer.Option(envvar="CLIPFILTER_WEBHOOK", help="Address that alerts are posted to as JSON.")
    ] = None,
    model: jobs.Model = "nano",
    engine: jobs.EngineOption = jobs.Engine.auto,
    address: jobs.Address = None,
    workers: jobs.Workers = None,
    threads: jobs.Threads = None,
    device: jobs.Device = "auto",
    dtype: jobs.Dtype = None,
    batch_size: jobs.BatchSize = None,
    decode: jobs.DecodeOption = jobs.Decode.fast,
    captions: jobs.CaptionsOption = jobs.Captions.first,
    image_column: jobs.ImageColumn = None,
    caption_column: jobs.CaptionColumn = None,
    uid_column: jobs.UidColumn = None,
    copy: Annotated[
        bool, typer.Option("--copy/--no-copy", help="Write kept and review images beside the decisions.")
    ] = True,
    retry_failed: jobs.RetryFailed = False,
    max_failures: jobs.MaxFailures = 0.01,
    metrics_port: jobs.MetricsPort = None,
    metrics_host: jobs.MetricsHost = None,
    metrics_file: jobs.MetricsFile = None,
    dry_run: jobs.DryRun = False,
    as_json: jobs.Json = False,
    quiet: jobs.Quiet = False,
) -> None:
    """Process only what is new or changed since the last night, append it as a new version, alert on drift or failure."""
    from clipfilter.engine import LOOPBACK, JobRequest, MetricsOptions
    from clipfilter.nightly import NightRequest
    from clipfilter.sources import SourceOptions

    options = SourceOptions(
        image_column=image_column,
        caption_column=caption_column,
        uid_column=uid_column,
        captions="first" if captions == jobs.Captions.none else str(captions),  # type: ignore[arg-type]
    )
    job = JobRequest(
        "run" if policy else "score", source, out, policy=policy, model=model, engine=str(engine), address=address,
        workers=workers, threads=threads, device=device, dtype=str(dtype) if dtype else None,  # type: ignore[arg-type]
        batch_size=batch_size, decode=str(decode), captions=str(captions), source_options=options, copy=copy,
        retry_failed=retry_failed, max_failures=max_failures,
    )  # fmt: skip
    request = NightRequest(
        job, missing="drop" if missing == Missing.drop else "keep", refit=refit, silence_nights=silence,
        window=window, webhook=webhook,
    )  # fmt: skip
    if dry_run:
        from clipfilter.cli.pipeline_config import show_plan
        from clipfilter.nightly import night_overview

        show_plan(night_overview(request), None, as_json)
        return
    metrics = MetricsOptions(metrics_port, metrics_host or LOOPBACK, metrics_file)
    raise typer.Exit(run_and_show(request, as_json=as_json, quiet=quiet, metrics=metrics))


def run_and_show(request: NightRequest, *, as_json: bool, quiet: bool, metrics: MetricsOptions | None = None) -> int:
    """Run a night, print what it did; its exit code."""
    from clipfilter.cli import display
    from clipfilter.engine import MetricsOptions, published, together
    from clipfilter.nightly import run_night

    line = display.progress(enabled=not (quiet or as_json))
    watch = published(metrics or MetricsOptions(), "nightly")
    with contextlib.redirect_stdout(sys.stderr), watch as watched, line as shown:
        result = run_night(request, together(shown, watched))
        if watched is not None:
            watched.finish(result)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1))
    elif quiet:
        for alert in result.alerts:
            print(f"{alert.kind}: {alert.message}", file=sys.stderr)
    else:
        _print(result)
    return result.exit_code


def _print(result: NightResult) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()

    def line(text: Any, style: str = "") -> None:
        console.print(Text(text, style) if isinstance(text, str) else text, soft_wrap=True, highlight=False)

    counts, totals, shards = result.counts, result.totals, result.shards
    found = [f"{shards[name]:,} {name}" for name in ("new", "changed", "again", "failed", "vanished") if shards[name]]
    if shards["set_aside"]:
        found.append(f"{shards['set_aside']:,} set aside by a rollback")
    line(f"night {result.night}  {result.outcome}: {', '.join(found) or 'nothing new'}")
    if counts.get("rows"):
        parts = [f"{counts.get(name, 0):,} {name}" for name in ("keep", "review", "reject", "failed")]
        line(f"tonight  {counts['rows']:,} rows: {', '.join(parts)}")
    shown = [item for item in result.drift if item.alarm] or result.drift[:1]
    for item in shown:
        line(f"drift    {item.of}: PSI {item.psi:.3f}, limit {item.limit:.3f} ({item.m:,} against {item.n:,} rows)")
    held = f"{totals['rows']:,} rows in {totals['shards']:,} shard{'' if totals['shards'] == 1 else 's'}"
    line(f"dataset  {result.out} (version {int(result.version)}, {held})")
    for alert in result.alerts:
        line(f"ALERT    {alert.kind}: {alert.message}", "red")
    for message in result.messages:
        line(message, "yellow")


def add_to(app: typer.Typer) -> None:
    app.command("nightly")(nightly)
