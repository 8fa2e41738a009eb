"""`clipfilter`: the command line's entry point."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated

import typer

from clipfilter.cli import (
    classify,
    curation,
    evaluate,
    history,
    ingest,
    jobs,
    models,
    nightly,
    policies,
    rank,
    runs,
    search,
    serve,
    train,
)
from clipfilter.cli.guard import guard

#: In the order of the help.
_COMMANDS: dict[str, Callable[..., None]] = {
    "run": jobs.run,
    "embed": jobs.embed,
    "filter": jobs.filter_,
    "score": jobs.score,
    "export": runs.export,
    "report": runs.report,
    "verify": runs.verify,
    "import": curation.import_,
    "forget": curation.forget,
    "ingest": ingest.ingest,
    "nightly": nightly.nightly,
    "history": history.history,
    "classify": classify.classify,
    "index": search.index,
    "search": search.search,
    "rank": rank.rank,
    "serve": serve.serve,
    "evaluate": evaluate.evaluate,
    "train": train.train,
}
_GROUPS = {"curate": curation.curate_app, "policy": policies.policy_app, "models": models.models_app}

app = typer.Typer(
    name="clipfilter",
    help="Decide, for millions of images, what stays in a dataset and what goes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(value: bool) -> None:
    if value:
        from clipfilter.version import __version__

        typer.echo(f"clipfilter {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def add_commands(to: typer.Typer) -> None:
    """Register every command, in the order of the help."""
    for name, command in _COMMANDS.items():
        # The whole sentence in the list; click would cut it off.
        to.command(name, short_help=inspect.getdoc(command))(command)
    for name, group in _GROUPS.items():
        to.add_typer(group, name=name)


def main() -> None:
    """Run the command line; always ends in SystemExit with one of the codes of docs/guide/troubleshooting.md."""
    add_commands(app)
    guard(app)
