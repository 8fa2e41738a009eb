"""`clipfilter policy explain`: what a policy did to the rows of a run."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from clipfilter.cli.jobs import Json
from clipfilter.cli.runs import Run

if TYPE_CHECKING:
    from rich.console import Console

    from clipfilter.report.explain import Explanation

_STYLES = {"keep": "green", "review": "yellow", "reject": "red", "failed": "red", "missing": "yellow"}


def explain(
    run: Run,
    row: Annotated[str, typer.Argument(metavar="UID", help="The row's cf_uid, or its cf_key.")],
    as_json: Json = False,
) -> None:
    """Say why one row was decided as it was: every rule's score and threshold, the policy and the model."""
    from clipfilter.report.explain import explain_row

    explanation = explain_row(run, row)
    if as_json:
        typer.echo(json.dumps(explanation.to_json(), indent=1, ensure_ascii=False))
        return
    from rich.console import Console

    _print_explanation(Console(), explanation)


def _print_explanation(console: Console, found: Explanation) -> None:
    from rich.text import Text

    from clipfilter.report import text
    from clipfilter.report.explain import sentence

    def line(*parts: str | tuple[str, str]) -> None:
        console.print(Text.assemble(*parts), soft_wrap=True, highlight=False)

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
    if found.rules:
        console.print()
        width = max(len(rule.id) for rule in found.rules)
        for rule in sorted(found.rules, key=lambda item: ("reject", "review", "missing", "keep").index(item.result)):
            uncalibrated = " (uncalibrated)" if rule.calibrated is False and rule.result != "keep" else ""
            line((f"{rule.result:<8}", _STYLES[rule.result]), f"{rule.id:<{width}}  {sentence(rule)}{uncalibrated}")
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


def add_to(app: typer.Typer) -> None:
    app.command("explain")(explain)
