"""`export`, `verify` and `report`: commands on a finished run."""

from __future__ import annotations

import enum
import json
from typing import Annotated

import typer

from clipfilter.cli.jobs import Json, Thumbnails

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run directory (path or URL).")]


class What(enum.StrEnum):
    kept = "kept"
    review = "review"


class Form(enum.StrEnum):
    source = "source"
    clip_retrieval = "clip-retrieval"
    datacomp = "datacomp"


def export(
    run: Run,
    to: Annotated[
        str, typer.Option("--to", help="Where to write (path or URL); empty or a started export of this run.")
    ],
    what: Annotated[What, typer.Option(help="Which rows.")] = What.kept,
    form: Annotated[
        Form,
        typer.Option(
            "--as", help="source: the source's own format; clip-retrieval: npy and metadata; datacomp: uid subset."
        ),
    ] = Form.source,
    rows_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Rows per file of the export [default: cut as the source is].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the kept (or review) rows of a run as a dataset: the source's own bytes, never re-encoded."""
    from clipfilter.operations import export_run

    summary = export_run(run, to, what=str(what), form=str(form), rows_per_shard=rows_per_shard)  # type: ignore[arg-type]
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
    else:
        typer.echo(f"{summary['rows']:,} rows in {summary['files']:,} files at {summary['to']}")


def verify(
    run: Run,
    as_json: Json = False,
) -> None:
    """Prove from the files alone that every row is accounted for and every file is what its commit says."""
    from rich.console import Console
    from rich.text import Text

    from clipfilter.operations import verify_run

    proof = verify_run(run)
    if as_json:
        typer.echo(json.dumps(proof.to_json(), indent=1))
    else:
        console = Console()
        for line in proof.proved:
            console.print(Text.assemble(("ok   ", "green"), line), soft_wrap=True, highlight=False)
        for line in proof.notes:
            console.print(Text.assemble(("note ", "yellow"), line), soft_wrap=True, highlight=False)
        for line in proof.problems:
            console.print(Text.assemble(("FAIL ", "red"), line), soft_wrap=True, highlight=False)
    raise typer.Exit(1 if proof.problems else 0)


def report(
    run: Run,
    thumbnails: Annotated[
        Thumbnails, typer.Option(help="Thumbnails of review and rejected rows: none, blur or show.")
    ] = Thumbnails.blur,
) -> None:
    """Write report.html into a run directory: one page to look at and to send on."""
    from clipfilter.report import write_report

    typer.echo(write_report(run, thumbnails=str(thumbnails)))


def add_to(app: typer.Typer) -> None:
    app.command("export")(export)
    app.command("report")(report)
    app.command("verify")(verify)
