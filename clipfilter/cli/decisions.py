"""`clipfilter policy explain` and `diff`: what a policy did to the rows of a run, and what another one would do."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Annotated

import typer

from clipfilter import defaults
from clipfilter.cli.options import Json, ModelOfRun, Run
from clipfilter.cli.printing import COLOURS, new_table, print_json, say, stdout
from clipfilter.decisions import DECISIONS, ESCALATE, LIMITS, MISSING

if TYPE_CHECKING:
    from rich.console import Console

    from clipfilter.operations import Comparison
    from clipfilter.report import Explanation

_RESULTS = (ESCALATE, *reversed(LIMITS), MISSING, "keep", "skipped")
_STYLES = COLOURS | {"failed": "red"}


def explain(
    run: Run,
    row: Annotated[str, typer.Argument(metavar="UID", help="The row's cf_uid, or its cf_key.")],
    as_json: Json = False,
) -> None:
    """Say why one row was decided as it was: every rule's score and threshold, the policy and the model."""
    from clipfilter.report import explain_row

    explanation = explain_row(run, row)
    if as_json:
        print_json(explanation.to_json(), ascii_only=False)
        return
    _print_explanation(stdout(), explanation)


def diff(
    before: Annotated[str, typer.Argument(metavar="A", help="The policy as it is: a file, or the name of a pack.")],
    after: Annotated[str, typer.Argument(metavar="B", help="The policy as it would be.")],
    on: Annotated[str, typer.Option("--on", help="Run, embed or score directory whose rows both decide.")],
    report: Annotated[str | None, typer.Option(help="Write a page with sampled pictures of every change here.")] = None,
    thumbnails: Annotated[
        defaults.Thumbnails, typer.Option(help="Pictures on that page: none, blur or show.")
    ] = defaults.THUMBNAILS,
    examples: Annotated[int, typer.Option(min=0, max=200, help="Sampled rows per kind of change.")] = 12,
    model: ModelOfRun = None,
    as_json: Json = False,
) -> None:
    """Compare two policies on the stored rows of a run: what would be decided differently, and which rules do it."""
    from pathlib import Path

    from clipfilter.operations import compare_policies
    from clipfilter.policies import load_policy

    found = compare_policies(load_policy(before), load_policy(after), on, model=model, examples=examples)
    if report is not None:
        from clipfilter.report import diff_page

        path = Path(report)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(diff_page(found, thumbnails), encoding="utf-8")
    if as_json:
        print_json(found.to_json(), ascii_only=False)
        return
    console = stdout()
    _print_comparison(console, found)
    if report is not None:
        say(console, str(Path(report).absolute()))


def _print_comparison(console: Console, found: Comparison) -> None:
    from rich.text import Text

    from clipfilter import text

    sides = (found.before, found.after)
    table = new_table("rows", *(f">{side.name} {side.version}" for side in sides), ">change", pad_edge=False)
    for decision in DECISIONS:
        counts = [side.decisions[decision] for side in sides]
        table.add_row(Text(decision, _STYLES[decision]), *(f"{n:,}" for n in counts), f"{counts[1] - counts[0]:+,}")
    for rule in dict.fromkeys([*found.before.rules, *found.after.rules]):
        counts = [sum(side.rules.get(rule, {}).values()) for side in sides]
        table.add_row(Text(f"by {rule}", "dim"), *(f"{n:,}" for n in counts), f"{counts[1] - counts[0]:+,}")
    console.print(table)
    console.print()
    share = text.share(found.flipped, found.rows)
    console.print(f"{found.flipped:,} of {found.rows:,} rows ({share}) change", highlight=False)
    for (a, b), count in sorted(found.changes.items(), key=lambda item: -item[1]):
        keys = [text.clean(flip.key, 40) for flip in found.flips if (flip.before, flip.after) == (a, b)]
        shown = ", ".join(keys[:3]) + (", ..." if count > 3 else "")
        say(console, f"{count:>8,}  {a} to ", (b, _STYLES[b]), f"  {shown}")


def _print_explanation(console: Console, found: Explanation) -> None:
    from clipfilter import text
    from clipfilter.report import sentence

    line = functools.partial(say, console)

    line((found.decision, f"bold {_STYLES.get(found.decision, 'default')}"), f"  {text.clean(found.key)}")
    if found.caption is not None:
        line(f"“{text.clean(found.caption)}”")
    size = (
        f"{found.image['width']} x {found.image['height']} {found.image['format']}, " if "width" in found.image else ""
    )
    path = "" if found.shard["path"] == "." else f" of {text.clean(found.shard['path'])}"
    line((f"{size}row {found.row}{path}, uid {found.uid}", "dim"))
    if found.error is not None:
        line((found.error["class"], "red"), f": {text.clean(found.error['message'])}")
    if found.override is not None:
        who = " ".join(text.clean(found.override[name], 80) for name in ("by", "date") if name in found.override)
        said = f" ({who})" if who else ""
        said += f": {text.clean(found.override['note'])}" if "note" in found.override else ""
        line(
            (found.override["decision"], _STYLES[found.override["decision"]]),
            f"  by a person{said}",
        )
    if found.rules:
        console.print()
        width = max(len(rule.id) for rule in found.rules)
        for rule in sorted(found.rules, key=lambda item: _RESULTS.index(item.result)):
            uncalibrated = " (uncalibrated)" if rule.calibrated is False and rule.result != "keep" else ""
            line(
                (f"{rule.result:<8}", _STYLES.get(rule.result, "dim")),
                f"{rule.id:<{width}}  {sentence(rule)}{uncalibrated}",
            )
    console.print()
    if found.policy is not None:
        line(
            (
                f"policy   {found.policy['name']} version {found.policy['version']}, sha256 {found.policy['sha256']}",
                "dim",
            )
        )
    line((f"model    {found.model.get('model')}, weights sha256 {found.model.get('weights_sha256')}", "dim"))
    line((f"record   {text.place(found.run)}, version {found.version}, {found.commit}", "dim"))
    for note in found.notes:
        line((f"note     {note}", "dim"))
