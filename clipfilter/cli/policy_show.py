"""`clipfilter policy show`: a policy with everything resolved, and how each of its concepts sees its contrast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from clipfilter import defaults
from clipfilter.cli import options as o
from clipfilter.cli.printing import COLOURS, new_table, print_json, say, stdout
from clipfilter.decisions import LIMITS

if TYPE_CHECKING:
    from rich.console import Console

    from clipfilter.evaluation import Contrast
    from clipfilter.policies import Policy


def show(
    policy: o.Policy,
    model: o.Model = defaults.MODEL,
    contrast: Annotated[bool, typer.Option(help="Ask the model how near negatives are to positives.")] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the canonical form, of which the hash is taken.")
    ] = False,
) -> None:
    """Show a policy with all it extends: its rules and bands, and what a model makes of each concept's contrast."""
    from clipfilter.policies import load_policy

    loaded = load_policy(policy)
    if as_json:
        print_json(loaded.canonical(), indent=2, ascii_only=False)
        return
    console = stdout()
    _print_policy(console, loaded)
    if contrast and any(rule.measure.compared is not None for rule in loaded.rules):
        from clipfilter.evaluation import contrasts
        from clipfilter.models import load_encoder

        encoder = load_encoder(model)
        _print_contrasts(console, contrasts(loaded, encoder), encoder.name)


def _print_policy(console: Console, policy: Policy) -> None:
    from rich.text import Text

    say(console, (policy.name, "bold"), f" version {policy.version}", (f"  sha256 {policy.sha256}", "dim"))
    if policy.description:
        say(console, policy.description)
    if policy.card is not None:
        for name, text in policy.card.model_dump(exclude_none=True).items():
            say(console, (f"{name.replace('_', ' ') + ':':<14}", "dim"), text)
    console.print()
    rules = new_table("rule", "kind", "what", *LIMITS, "missing", fold=True, pad_edge=False)
    for rule in policy.rules:
        bands = [
            Text(f"{band.direction} {band.value:g}" if band is not None else "", COLOURS[name])
            for name, band in (("review", rule.review), ("reject", rule.reject))
        ]
        said = rule.measure.summary(rule.when is not None)
        rules.add_row(rule.id, rule.kind, said, *bands, rule.on_missing or policy.on_missing)
    console.print(rules)
    for entry in policy.calibrations:
        say(
            console,
            (f"calibrated for {entry.model} (weights {entry.weights_sha256[:12]}): {', '.join(entry.rules)}", "dim"),
        )
    if policy.tests:
        say(console, (f"{len(policy.tests)} tests; run them with `clipfilter policy test`", "dim"))


def _print_contrasts(console: Console, found: list[Contrast], model: str) -> None:
    from rich.text import Text

    for contrast in found:
        console.print()
        say(console, (contrast.rule, "bold"), (f"  as {model} reads its phrases (cosines)", "dim"))
        phrases = new_table("positive", "most alike positive", "nearest negatives", fold=True, pad_edge=False)
        for positive in contrast.positives:
            alike = f"{positive.alike} {positive.alike_cosine:.2f}" if positive.alike is not None else ""
            near = Text(", ").join(
                Text(
                    f"{negative.phrase} {negative.cosine:.2f}",
                    "yellow" if negative in positive.crowded else "dim" if negative.generic else "",
                )
                for negative in positive.nearest
            )
            phrases.add_row(positive.phrase, alike, near)
        console.print(phrases)
        for warning in contrast.warnings:
            say(console, warning, style="yellow")
