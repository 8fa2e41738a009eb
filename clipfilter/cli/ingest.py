"""`ingest`: fetch a list of URLs into webdataset shards."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from clipfilter import defaults
from clipfilter.cli import options as o
from clipfilter.cli.printing import new_table, print_json, say, stdout

if TYPE_CHECKING:
    from clipfilter.ingest import IngestRequest, IngestResult


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
    rows_per_shard: Annotated[int, typer.Option(min=1, help="URLs per shard.")] = defaults.ROWS_PER_SHARD,
    processes: Annotated[int, typer.Option(min=1, help="Processes, each with its threads.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Downloads at once in each process.")] = 64,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to wait for a server at any point.")] = 10.0,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds that one whole download may take.")] = 60.0,
    retry: Annotated[
        Literal["failed", "transient", "none"],
        typer.Option(help="Which rows of earlier runs to fetch again: failed, those that may pass, or none."),
    ] = "failed",
    private: o.Private = False,
    max_failures: Annotated[
        float, typer.Option(min=0, max=1, help="Share of all rows that may have failed before the exit code is 3.")
    ] = 0.9,
    dry_run: o.DryRun = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fetch a list of URLs into webdataset shards; run again, it fetches only what failed. Opt-outs are respected."""
    from clipfilter.ingest import IngestRequest, plan_ingest

    request = IngestRequest(
        urls, out, url_column, caption_column, image_size, rows_per_shard, processes, threads, timeout, deadline,
        retry, private, max_failures,
    )  # fmt: skip
    if dry_run:
        from clipfilter.cli.pipeline_config import show_plan

        show_plan(plan_ingest(request), None, as_json)
        return
    raise typer.Exit(run_and_show(request, as_json=as_json, quiet=quiet))


def run_and_show(request: IngestRequest, *, as_json: bool, quiet: bool) -> int:
    """Run an ingest, print what it did; its exit code."""
    from clipfilter.ingest import ingest as run

    with contextlib.redirect_stdout(sys.stderr):
        result = run(request, None if quiet or as_json else _progress)
    if as_json:
        print_json(result.to_json())
    elif not quiet:
        _print(result)
    elif result.exit_code:
        print(*result.messages, sep="\n", file=sys.stderr)
    return result.exit_code


def _progress(done: int, total: int, states: dict[str, int]) -> None:
    """A line per finished shard, on stderr."""
    parts = ", ".join(f"{count:,} {state}" for state, count in sorted(states.items()))
    print(f"fetched {done:,} of {total:,}: {parts}", file=sys.stderr, flush=True)


def _print(result: IngestResult) -> None:
    console = stdout()
    found = new_table("state", ">this run", ">in all")
    for state, count in result.states.items():
        now = result.fetched.get(state, 0)
        found.add_row(state, f"{now:,}" if now else "", f"{count:,}")
    console.print(found)
    repeats = f" ({result.duplicates:,} repeats left out)" if result.duplicates else ""
    say(console, f"list     {result.rows:,} rows{repeats}")
    say(console, f"shards   {result.shards:,} in {result.out}")
    say(console, f"status   {result.status}")
    for message in result.messages:
        say(console, message, style="red")
