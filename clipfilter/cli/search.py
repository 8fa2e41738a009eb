"""`clipfilter index` and `search`: find rows of a run by text, image, row and column."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from clipfilter import columns as cf
from clipfilter import defaults
from clipfilter.cli.options import Json, ModelOfRun, Run
from clipfilter.cli.printing import COLOURS, new_table, print_json, say, stdout

if TYPE_CHECKING:
    from clipfilter.search import Searcher, SearchResult

IndexAt = Annotated[
    str | None, typer.Option("--index", help="Directory of the index (path or URL) [default: index/ in the run].")
]


def index(
    run: Run,
    at: IndexAt = None,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Make one even below a million rows, where exact search needs none.")
    ] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Make it anew instead of adding what is new.")] = False,
    as_json: Json = False,
) -> None:
    """Make or update the approximate index of a run of a million rows or more; smaller ones are searched exactly."""
    from dataclasses import asdict

    from clipfilter import text
    from clipfilter.search import EXACT_ROWS, RunVectors, build_index, has_index

    with RunVectors.open(run) as vectors:
        rows = vectors.rows
        needed = approximate or rows >= EXACT_ROWS or has_index(vectors.url, at)
    if not needed:
        if as_json:
            print_json({"rows": rows, "manifest": None})
        else:
            typer.echo(f"{rows:,} rows are searched exactly, which needs no index (--approximate makes one anyway)")
        return
    with _progress(enabled=not as_json) as on_rows:
        made = build_index(run, at, rebuild=rebuild, on_rows=on_rows)
    if as_json:
        print_json(asdict(made))
        return
    dropped = f", superseded and left out: {made.segments_dropped:,}" if made.segments_dropped else ""
    typer.echo(
        f"{made.rows:,} rows in {made.lists:,} lists, {text.size(made.bytes)}; "
        f"shards: {made.segments:,}, new: {made.segments_new:,}{dropped}"
    )
    typer.echo(f"index    {made.to} (number {made.manifest})")


@contextlib.contextmanager
def _progress(*, enabled: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not (enabled and console.is_terminal)) as shown:
        task = shown.add_task("making lists")
        yield lambda done, total: shown.update(task, description="encoding rows", completed=done, total=total)


def search(
    run: Run,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]", help="What the pictures should show, quoted or not.")
    ] = None,
    plus: Annotated[list[str] | None, typer.Option(help="A further text that is added to it; may be repeated.")] = None,
    minus: Annotated[
        list[str] | None,
        typer.Option("--minus", "--not", help="A text that is taken away from it; may be repeated."),
    ] = None,
    minus_weight: Annotated[float, typer.Option(min=0, max=10, help="How much of each --minus is taken away.")] = 0.5,
    image: Annotated[
        list[str] | None, typer.Option(help="An image to search by (file or URL); may be repeated.")
    ] = None,
    uid: Annotated[
        list[str] | None, typer.Option(help="A row of the run to search by, by its cf_uid; may be repeated.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, max=10_000, help="How many rows.")] = 10,
    where: Annotated[
        str | None, typer.Option(help="Only rows for which this holds, e.g. \"cf_decision = 'keep' and width > 300\".")
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns to show instead of key, caption and decision, with commas between.")
    ] = None,
    sheet: Annotated[str | None, typer.Option(help="Write a contact sheet (PNG) of the hits here.")] = None,
    thumbnails: Annotated[
        defaults.Thumbnails, typer.Option(help="Pictures on the sheet of rows that were not kept: blur or show.")
    ] = defaults.THUMBNAILS,
    at: IndexAt = None,
    exact: Annotated[bool, typer.Option("--exact", help="Look at every row, also where there is an index.")] = False,
    model: ModelOfRun = None,
    as_json: Json = False,
) -> None:
    """Find the rows nearest to a text, an image, a row, or a sum of them."""
    from clipfilter.errors import RefusedError
    from clipfilter.search import RESULT_COLUMNS, Searcher

    if sheet is not None and thumbnails == "none":
        raise RefusedError("a contact sheet is its pictures; leave out --sheet, or --thumbnails none.")
    chosen = [name.strip() for name in columns.split(",") if name.strip()] if columns else []
    text = [" ".join(words)] if words else []
    with Searcher(run, model=model, index=at, exact=exact) as searcher:
        found = searcher.search(
            [*text, *(plus or [])], image or [], uid or [], minus or [],
            k=k, where=where, minus_weight=minus_weight, columns=list(dict.fromkeys([*RESULT_COLUMNS, *chosen])),
        )  # fmt: skip
        problem = None if sheet is None else _write_sheet(sheet, searcher, found, thumbnails)
    if as_json:
        print_json(found.to_json() | {"sheet": sheet}, ascii_only=False, default=str)
        return
    _print(found, chosen, sheet, problem)


def _write_sheet(sheet: str, searcher: Searcher, found: SearchResult, thumbnails: defaults.Thumbnails) -> str | None:
    """Write the hits' pictures; what is to be said about them."""
    from pathlib import Path

    from clipfilter.report import contact_sheet

    png, problem = contact_sheet(searcher.vectors, found, thumbnails)
    Path(sheet).parent.mkdir(parents=True, exist_ok=True)
    Path(sheet).write_bytes(png)
    return problem


def _print(found: SearchResult, chosen: list[str], sheet: str | None, problem: str | None) -> None:
    from rich.text import Text

    console = stdout()
    rows = found.hits.to_pylist()
    decided = any(row[cf.DECISION] for row in rows)
    names = chosen or [cf.KEY, cf.CAPTION, *([cf.DECISION] if decided else [])]
    hits = new_table(">", ">cosine", *(name.removeprefix(cf.PREFIX) for name in names))
    for name, column in zip(names, hits.columns[2:], strict=True):
        column.no_wrap = name == cf.KEY
    for row in rows:
        cells = [Text(_shown(row[name])) for name in names]
        for name, cell in zip(names, cells, strict=True):
            cell.style = COLOURS.get(row[name], "") if name == cf.DECISION else ""
        hits.add_row(str(row["rank"]), f"{row['cosine']:.3f}", *cells)
    console.print(hits)
    if not rows:
        console.print("no row is left by the condition", style="yellow")
    among = f"{found.matching:,} of {found.rows:,} rows" if found.matching < found.rows else f"{found.rows:,} rows"
    say(console, f"{found.method} search of {among}, model {found.model}", style="dim")
    if sheet is not None:
        typer.echo(f"sheet    {sheet}")
    for note in filter(None, (*found.notes, problem)):
        typer.echo(f"note     {note}", err=True)


def _shown(value: object) -> str:
    from clipfilter import text

    if isinstance(value, float):
        return text.score(value)
    return "" if value is None else text.clean(value, 120)
