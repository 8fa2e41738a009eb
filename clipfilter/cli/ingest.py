"""`ingest`: fetch a list of URLs into webdataset shards."""

from __future__ import annotations

import contextlib
import enum
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfilter.cli.jobs import DryRun, Json, Quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from clipfilter.ingest import IngestRequest, IngestResult


class Retry(enum.StrEnum):
    failed = "failed"
    transient = "transient"
    none = "none"


def ingest(
    urls: Annotated[
        str, typer.Argument(metavar="URLS", help="List of URLs: txt, csv, tsv, jsonl (or .gz of these) or Parquet.")
    ],
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder of shards to write (path or URL); continued when it exists.")
    ],
    url_column: Annotated[str | None, typer.Option(help="Column with URLs [default: url].")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column with captions [default: caption or text].")] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Scale images down to this shorter side [default: bytes as they come].")
    ] = None,
    rows_per_shard: Annotated[int, typer.Option(min=1, help="URLs per shard.")] = 10_000,
    processes: Annotated[int, typer.Option(min=1, help="Processes, each with its threads.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Downloads at once in each process.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a server at any point.")] = 10.0,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds that one whole download may take.")] = 60.0,
    retry: Annotated[
        Retry, typer.Option(help="Which rows of earlier runs to fetch again: failed, those that may pass, or none.")
    ] = Retry.failed,
    private: Annotated[
        bool,
        typer.Option("--private", help="Also fetch from private addresses, and through the environment's proxies."),
    ] = False,
    max_failures: Annotated[
        float, typer.Option(min=0, max=1, help="Share of all rows that may have failed before the exit code is 3.")
    ] = 0.9,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch a list of URLs into webdataset shards; run again, it fetches only what failed. Opt-outs are respected."""
    from clipfilter.ingest import IngestRequest, plan_ingest

    request = IngestRequest(
        urls, out, url_column, caption_column, image_size, rows_per_shard, processes, threads, timeout, deadline,
        "failed" if retry == Retry.failed else "transient" if retry == Retry.transient else "none", private, max_failures,
    )  # fmt: skip
    if dry_run:
        from clipfilter.cli.pipeline_config import show_plan

        show_plan(plan_ingest(request), None, as_json)
        return
    raise typer.Exit(run_and_show(request, as_json=as_json, quiet=quiet))


def run_and_show(request: IngestRequest, *, as_json: bool, quiet: bool) -> int:
    """Run an ingest, print what it did; its exit code."""
    from clipfilter.ingest import ingest as run

    with contextlib.redirect_stdout(sys.stderr), _progress(not (quiet or as_json)) as shown:
        result = run(request, shown)
    if as_json:
        typer.echo(json.dumps(result.to_json(), indent=1))
    elif not quiet:
        _print(result)
    elif result.exit_code:
        print(*result.messages, sep="\n", file=sys.stderr)
    return result.exit_code


@contextlib.contextmanager
def _progress(enabled: bool) -> Iterator[Callable[[int, int, dict[str, int]], None] | None]:
    """A line per finished shard, on stderr."""
    if not enabled:
        yield None
        return

    def show(done: int, total: int, states: dict[str, int]) -> None:
        parts = ", ".join(f"{count:,} {state}" for state, count in sorted(states.items()))
        print(f"fetched {done:,} of {total:,}: {parts}", file=sys.stderr, flush=True)

    yield show


def _print(result: IngestResult) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("state")
    table.add_column("this run", justify="right")
    table.add_column("in all", justify="right")
    cells: list[Any] = [(state, result.fetched.get(state, 0), count) for state, count in result.states.items()]
    for state, now, count in cells:
        table.add_row(state, f"{now:,}" if now else "", f"{count:,}")
    console.print(table)
    repeats = f" ({result.duplicates:,} repeats left out)" if result.duplicates else ""
    console.print(f"list     {result.rows:,} rows{repeats}", highlight=False, soft_wrap=True)
    console.print(f"shards   {result.shards:,} in {result.out}", highlight=False, soft_wrap=True)
    console.print(f"status   {result.status}", highlight=False, soft_wrap=True)
    for message in result.messages:
        console.print(message, style="red", soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    app.command("ingest")(ingest)
