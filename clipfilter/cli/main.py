"""`clipfilter`: the command line's entry point."""

from __future__ import annotations

import inspect
from typing import Annotated

import typer

from clipfilter.cli.guard import guard

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

    for module in (
        jobs,
        runs,
        curation,
        ingest,
        nightly,
        history,
        classify,
        search,
        rank,
        serve,
        evaluate,
        train,
        policies,
        models,
    ):
        module.add_to(to)
    for command in to.registered_commands:  # the whole sentence in the list; click would cut it off
        command.short_help = inspect.getdoc(command.callback)


def main() -> None:
    """Run the command line; always ends in SystemExit with one of the codes of docs/guide/troubleshooting.md."""
    add_commands(app)
    guard(app)
