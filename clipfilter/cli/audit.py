"""`clipfilter policy export-decisions`: every decision of a run as JSON Lines."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from clipfilter.cli.options import Json, Run
from clipfilter.cli.printing import print_json


def export(
    run: Run,
    out: Annotated[str, typer.Option("--out", "-o", help="New .jsonl file to write (path or URL).")],
    shape: Annotated[
        Literal["audit", "openai", "rekognition", "safesearch"],
        typer.Option("--as", help="audit: all there is to answer an appeal; or the shape of a service's answers."),
    ] = "audit",
    mapping: Annotated[
        str | None,
        typer.Option(
            help="Policy whose `interchange` maps rules to categories [default: the pack of the policy's name]."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write every decision of a run as JSON Lines: for appeals and audits, or as OpenAI, Rekognition or SafeSearch say it."""
    from dataclasses import asdict

    from clipfilter.report import export_decisions

    found = export_decisions(run, out, kind=shape, mapping=mapping)
    if as_json:
        print_json(asdict(found))
        return
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(found.decisions.items()))
    typer.echo(f"{found.rows:,} decisions ({counts}) in {found.out}")
