"""`clipfilter policy export-decisions`: every decision of a run as JSON Lines."""

from __future__ import annotations

import enum
import json
from typing import Annotated

import typer

from clipfilter.cli.jobs import Json
from clipfilter.cli.runs import Run


class Shape(enum.StrEnum):
    audit = "audit"
    openai = "openai"
    rekognition = "rekognition"
    safesearch = "safesearch"


def export(
    run: Run,
    out: Annotated[str, typer.Option("--out", "-o", help="New .jsonl file to write (path or URL).")],
    shape: Annotated[
        Shape,
        typer.Option("--as", help="audit: all there is to answer an appeal; or the shape of a service's answers."),
    ] = Shape.audit,
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

    found = export_decisions(run, out, kind=str(shape), mapping=mapping)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=1))
        return
    counts = ", ".join(f"{count:,} {name}" for name, count in sorted(found.decisions.items()))
    typer.echo(f"{found.rows:,} decisions ({counts}) in {found.out}")


def add_to(app: typer.Typer) -> None:
    app.command("export-decisions")(export)
