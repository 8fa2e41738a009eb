"""What a person sees while a job runs and when it is done."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, TypeVar

from rich.console import Console
from rich.live import Live
from rich.text import Text

from clipfilter import text
from clipfilter.cli import printing
from clipfilter.cli.printing import COLOURS, bar, new_table, say
from clipfilter.decisions import DECISIONS, ESCALATE, LIMITS, MISSING, TIGHTEN
from clipfilter.engine import JobRequest, JobResult, MetricsOptions, Progress, published, together
from clipfilter.runs import Totals

T = TypeVar("T")
_LINE_SECONDS = 10.0
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


def watched(work: Callable[[Any], T], job: str, metrics: MetricsOptions, *, silent: bool) -> T:
    """Do a job's work with progress and published metrics. work: takes what is told of its progress, gives the result.

    What is printed meanwhile (Ray prints what its workers suffer) goes to stderr: stdout belongs to the result.
    """
    shown = progress(enabled=not silent)
    with contextlib.redirect_stdout(sys.stderr), published(metrics, job) as numbers, shown as line:
        result = work(together(line, numbers))
        if numbers is not None:
            numbers.finish(result)  # type: ignore[arg-type]
    return result


@contextlib.contextmanager
def row_progress() -> Iterator[Callable[[int], None] | None]:
    """How many rows are embedded, on a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    rows = 0
    with console.status("starting ...") as status:

        def count(more: int) -> None:
            nonlocal rows
            rows += more
            status.update(f"embedding: {rows:,} rows")

        yield count


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
    line = Text.assemble(
        (_STAGES.get(p.stage, p.stage), "bold"),
        f"  shards {p.shards_done}/{total}  {p.rows:,} rows  {rate:,.0f} images/s  ",
        (f"keep {p.keep:,} ", COLOURS["keep"]),
        (f"review {p.review:,} ", COLOURS["review"]),
        (f"reject {p.reject:,} ", COLOURS["reject"]),
        (f"failed {p.failed:,}", COLOURS["failed"]),
    )
    done = p.shards_done - p.shards_reused
    left = p.shards_total - p.shards_done
    if p.shards_known and left and done:
        line.append(f"  about {_duration(seconds / done * left)} left", "dim")
    if p.shards_reused:
        line.append(f"  ({p.shards_reused} shards were done before)", "dim")
    if p.waits_for:
        line.append(f"  waiting: {'; '.join(p.waits_for)}", "yellow")
    return line


def print_result(result: JobResult, report: str | None) -> None:
    """The table at the end of a job."""
    console = Console()
    totals = result.totals
    title = f"{totals.rows:,} rows in {text.plural(totals.shards, 'shard')}"
    rows = max(totals.rows, 1)
    if result.plan.job in ("run", "filter"):
        shown: dict[str, int] = {name: totals[name] for name in DECISIONS}
    else:
        shown = {"embedded" if result.plan.job == "embed" else "scored": totals.embedded}
    found = new_table("", ">", ">", "")
    found.title, found.title_justify, found.show_header = title, "left", False
    for name, count in {**shown, "failed": totals.failed}.items():
        colour = COLOURS.get(name, "")
        line = Text(bar(count / rows, _BAR) if count else "", colour)
        found.add_row(Text(name, colour), f"{count:,}", f"{count / rows:.1%}", line)
    console.print()
    console.print(found)
    _print_details(console, totals)
    for told in totals.seen.told() if totals.seen is not None else ():
        say(console, told, style="dim")
    if result.rows_processed:
        working = max(result.seconds - result.startup_seconds, 1e-9)
        say(
            console,
            f"{result.rows_processed:,} rows in {_duration(working)} ({result.rows_processed / working:,.0f} images/s) "
            f"after {result.startup_seconds:.1f} s of start-up, {result.engine} engine, model {result.plan.model['model']}",
            style="dim",
        )
    elif totals.rows:
        console.print("everything was already done; nothing was computed again", style="dim")
    say(console, f"dataset  {result.out} (version {int(result.version)})")
    if report:
        say(console, f"report   {report}")
    for message in result.messages:
        say(console, message, style="red" if result.exit_code else "yellow")


def _print_details(console: Console, totals: Totals) -> None:
    if totals.rules:
        # What only some policies have (lists of known pictures, modifiers, human decisions) gets a column where it occurs.
        seen = {band for bands in totals.rules.values() for band in bands}
        names = [*LIMITS, MISSING, *(name for name in (ESCALATE, TIGHTEN, "keep") if name in seen)]
        found = new_table("rule", *(f">{name}" for name in names))
        for rule, bands in totals.rules.items():
            found.add_row(rule, *(f"{bands[name]:,}" if bands.get(name) else "" for name in names))
        console.print()
        console.print(found)
    if totals.escalated:
        console.print(Text(f"{totals.escalated:,} escalated: among the rejected, never shown or copied", "red"))
    if totals.failed_by_class:
        failures = ", ".join(f"{count:,} {name}" for name, count in totals.failed_by_class.items())
        console.print(Text(f"failed: {failures}", COLOURS["failed"]))
    if totals.not_downloaded:
        console.print(
            f"{totals.not_downloaded:,} rows of the source were never downloaded and are not counted", style="dim"
        )
    console.print()


def print_json(result: JobResult, report: str | None) -> None:
    """The result of a job as JSON."""
    printing.print_json({**asdict(result), "report": report})


def print_plan(request: JobRequest, as_json: bool) -> None:
    """`--dry-run`: check the request, list the shards, print what would be done."""
    from clipfilter.engine import plan_overview

    overview = plan_overview(request)
    if as_json:
        printing.print_json(overview)
    else:
        printing.print_overview(overview)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
