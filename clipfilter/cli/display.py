"""What a person sees while a job runs and when it is done."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from clipfilter.engine import JobRequest, JobResult, Progress

_LINE_SECONDS = 10.0
_COLOURS = {"keep": "green", "review": "yellow", "reject": "red", "failed": "magenta"}
_STAGES = {"decided": "deciding", "embedded": "embedding", "scored": "embedding and scoring"}
_BAR = 28


@contextlib.contextmanager
def progress(*, enabled: bool) -> Iterator[Any]:
    """A live line on a terminal, a line every ten seconds elsewhere (on stderr), or nothing."""
    if not enabled:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    with Live(Text("starting ...", style="dim"), console=console, refresh_per_second=5, transient=True) as live:
        yield _Live(live)


class _Live:
    def __init__(self, live: Live) -> None:
        self._live = live

    def update(self, progress: Progress) -> None:
        self._live.update(_line(progress))


class _Lines:
    def __init__(self) -> None:
        self._last = time.monotonic()

    def update(self, progress: Progress) -> None:
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            print(_line(progress).plain, file=sys.stderr, flush=True)


def _line(p: Progress) -> Text:
    seconds = time.monotonic() - p.started
    rate = p.rows / seconds if seconds > 0 else 0.0
    total = f"{p.shards_total}" if p.shards_known else f"{p.shards_total}+"
    text = Text.assemble(
        (_STAGES.get(p.stage, p.stage), "bold"),
        f"  shards {p.shards_done}/{total}  {p.rows:,} rows  {rate:,.0f} images/s  ",
        (f"keep {p.keep:,} ", _COLOURS["keep"]),
        (f"review {p.review:,} ", _COLOURS["review"]),
        (f"reject {p.reject:,} ", _COLOURS["reject"]),
        (f"failed {p.failed:,}", _COLOURS["failed"]),
    )
    done = p.shards_done - p.shards_reused
    left = p.shards_total - p.shards_done
    if p.shards_known and left and done:
        text.append(f"  about {_duration(seconds / done * left)} left", "dim")
    if p.shards_reused:
        text.append(f"  ({p.shards_reused} shards were done before)", "dim")
    return text


def print_result(result: JobResult, report: str | None) -> None:
    """The table at the end of a job."""
    console = Console()
    totals = result.totals
    title = f"{totals['rows']:,} rows in {totals['shards']:,} shard{'' if totals['shards'] == 1 else 's'}"
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    rows = max(totals["rows"], 1)

    def add(name: str, count: int) -> None:
        colour = _COLOURS.get(name, "")
        bar = "█" * round(_BAR * count / rows) or ("▏" if count else "")
        table.add_row(Text(name, colour), f"{count:,}", f"{count / rows:.1%}", Text(bar, colour))

    if result.plan.job in ("run", "filter"):
        for name in ("keep", "review", "reject"):
            add(name, totals[name])
    else:
        add("embedded" if result.plan.job == "embed" else "scored", totals["embedded"])
    add("failed", totals["failed"])
    console.print()
    console.print(table)
    _print_details(console, totals)
    if result.rows_processed:
        working = max(result.seconds - result.startup_seconds, 1e-9)
        console.print(
            f"{result.rows_processed:,} rows in {_duration(working)} ({result.rows_processed / working:,.0f} images/s) "
            f"after {result.startup_seconds:.1f} s of start-up, {result.engine} engine, model {result.plan.model['model']}",
            style="dim",
            soft_wrap=True,
        )
    else:
        console.print("everything was already done; nothing was computed again", style="dim")
    console.print(f"dataset  {result.out} (version {int(result.version)})", soft_wrap=True, highlight=False)
    if report:
        console.print(f"report   {report}", soft_wrap=True, highlight=False)
    for message in result.messages:
        style = "yellow" if result.exit_code == 0 else "red"
        console.print(Text(message, style), soft_wrap=True)


def _print_details(console: Console, totals: dict[str, Any]) -> None:
    if totals["rules"]:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column("rule")
        # What only some policies have (lists of known pictures, modifiers, human decisions) gets a column where it occurs.
        seen = {band for bands in totals["rules"].values() for band in bands}
        names = ["review", "reject", "missing", *(name for name in ("escalate", "tighten", "keep") if name in seen)]
        for name in names:
            table.add_column(name, justify="right")
        for rule, bands in totals["rules"].items():
            table.add_row(rule, *(f"{bands[name]:,}" if bands.get(name) else "" for name in names))
        console.print()
        console.print(table)
    if totals.get("escalated"):
        console.print(Text(f"{totals['escalated']:,} escalated: among the rejected, never shown or copied", "red"))
    if totals["failed_by_class"]:
        failures = ", ".join(f"{count:,} {name}" for name, count in totals["failed_by_class"].items())
        console.print(Text(f"failed: {failures}", _COLOURS["failed"]))
    if totals["not_downloaded"]:
        console.print(
            f"{totals['not_downloaded']:,} rows of the source were never downloaded and are not counted", style="dim"
        )
    console.print()


def print_json(result: JobResult, report: str | None) -> None:
    print(json.dumps({**asdict(result), "report": report}, indent=1))


def print_plan(request: JobRequest, as_json: bool) -> None:
    """`--dry-run`: check the request, list the shards, print what would be done."""
    from clipfilter.engine import plan_overview

    overview = plan_overview(request)
    if as_json:
        print(json.dumps(overview, indent=1))
        return
    console = Console()
    warnings = overview.pop("warnings")
    for name, value in overview.items():
        shown = ", ".join(value) if isinstance(value, list) else value
        console.print(f"{name:<14} {shown}", soft_wrap=True, highlight=False, markup=False)
    for warning in warnings:
        console.print(f"warning: {warning}", style="yellow", soft_wrap=True, highlight=False, markup=False)
    console.print("nothing was done (--dry-run)", style="dim")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
