"""`clipfilter policy show`: a policy with everything resolved, and how each of its concepts sees its contrast."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from clipfilter.cli.jobs import Model

if TYPE_CHECKING:
    from rich.console import Console

    from clipfilter.evaluation import Contrast
    from clipfilter.policies import Policy

PolicyArgument = Annotated[str, typer.Argument(metavar="POLICY", help="Policy file, or the name of a pack.")]
_STYLES = {"review": "yellow", "reject": "red"}


def show(
    policy: PolicyArgument,
    model: Model = "nano",
    contrast: Annotated[bool, typer.Option(help="Ask the model how near negatives are to positives.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the canonical form, of which the hash is taken.")
    ] = False,
) -> None:
    """Show a policy with all it extends: its rules and bands, and what a model makes of each concept's contrast."""
    from clipfilter.policies import load_policy

    loaded = load_policy(policy)
    if as_json:
        typer.echo(json.dumps(loaded.canonical(), indent=2, ensure_ascii=False))
        return
    from rich.console import Console

    console = Console()
    _print_policy(console, loaded)
    if contrast and any(rule.measure.compared is not None for rule in loaded.rules):
        from clipfilter.evaluation import contrasts
        from clipfilter.models import load_encoder

        encoder = load_encoder(model)
        _print_contrasts(console, contrasts(loaded, encoder), encoder.name)


def _print_policy(console: Console, policy: Policy) -> None:
    from rich.table import Table
    from rich.text import Text

    def say(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True, highlight=False)

    say((policy.name, "bold"), f" version {policy.version}", (f"  sha256 {policy.sha256}", "dim"))
    if policy.description:
        say(policy.description)
    if policy.card is not None:
        for name, text in policy.card.model_dump(exclude_none=True).items():
            say((f"{name.replace('_', ' ') + ':':<14}", "dim"), text)
    console.print()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("rule", "kind", "what", "review", "reject", "missing"):
        table.add_column(name, overflow="fold")
    for rule in policy.rules:
        bands = [
            Text(f"{band.direction} {band.value:g}" if band is not None else "", _STYLES[name])
            for name, band in (("review", rule.review), ("reject", rule.reject))
        ]
        table.add_row(
            rule.id,
            rule.kind,
            rule.measure.summary(rule.when is not None),
            *bands,
            rule.on_missing or policy.on_missing,
        )
    console.print(table)
    for entry in policy.calibrations:
        say((f"calibrated for {entry.model} (weights {entry.weights_sha256[:12]}): {', '.join(entry.rules)}", "dim"))
    if policy.tests:
        say((f"{len(policy.tests)} tests; run them with `clipfilter policy test`", "dim"))


def _print_contrasts(console: Console, found: list[Contrast], model: str) -> None:
    from rich.table import Table
    from rich.text import Text

    for contrast in found:
        console.print()
        console.print(Text.assemble((contrast.rule, "bold"), (f"  as {model} reads its phrases (cosines)", "dim")))
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in ("positive", "most alike positive", "nearest negatives"):
            table.add_column(name, overflow="fold")
        for positive in contrast.positives:
            alike = f"{positive.alike} {positive.alike_cosine:.2f}" if positive.alike is not None else ""
            near = Text(", ").join(
                Text(
                    f"{negative.phrase} {negative.cosine:.2f}",
                    "yellow" if negative in positive.crowded else "dim" if negative.generic else "",
                )
                for negative in positive.nearest
            )
            table.add_row(positive.phrase, alike, near)
        console.print(table)
        for warning in contrast.warnings:
            console.print(Text(warning, "yellow"), soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    app.command("show")(show)
