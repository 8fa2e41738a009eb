"""`export`, `verify` and `report`: commands on a finished run."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from clipfilter import defaults
from clipfilter.cli.options import Json, Run
from clipfilter.cli.printing import print_json, say, stdout


def export(
    run: Run,
    to: Annotated[
        str, typer.Option("--to", help="Where to write (path or URL); empty or a started export of this run.")
    ],
    what: Annotated[Literal["kept", "review"], typer.Option(help="Which rows.")] = "kept",
    form: Annotated[
        Literal["source", "clip-retrieval", "datacomp"],
        typer.Option(
            "--as", help="source: the source's own format; clip-retrieval: npy and metadata; datacomp: uid subset."
        ),
    ] = "source",
    rows_per_shard: Annotated[
        int | None, typer.Option(min=1, help="Rows per file of the export [default: cut as the source is].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the kept (or review) rows of a run as a dataset: the source's own bytes, never re-encoded."""
    from clipfilter.operations import export_run

    summary = export_run(run, to, what=what, form=form, rows_per_shard=rows_per_shard)
    if as_json:
        print_json(summary)
    else:
        typer.echo(f"{summary['rows']:,} rows in {summary['files']:,} files at {summary['to']}")


def verify(run: Run, as_json: Json = False) -> None:
    """Prove from the files alone that every row is accounted for and every file is what its commit says."""
    from clipfilter.operations import verify_run

    proof = verify_run(run)
    if as_json:
        print_json(proof.to_json())
    else:
        console = stdout()
        for mark, colour, lines in (
            ("ok   ", "green", proof.proved), ("note ", "yellow", proof.notes), ("FAIL ", "red", proof.problems)
        ):  # fmt: skip
            for line in lines:
                say(console, (mark, colour), line)
    raise typer.Exit(1 if proof.problems else 0)


def report(
    run: Run,
    thumbnails: Annotated[
        defaults.Thumbnails, typer.Option(help="Thumbnails of review and rejected rows: none, blur or show.")
    ] = defaults.THUMBNAILS,
) -> None:
    """Write report.html into a run directory: one page to look at and to send on."""
    from clipfilter.report import write_report

    typer.echo(write_report(run, thumbnails=thumbnails))
