"""`clipfilter`: the command line's entry point, and how errors become one sentence and an exit code."""

from __future__ import annotations

import inspect
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import Annotated

import typer

from clipfilter.errors import ClipfilterError, RefusedError

app = typer.Typer(
    name="clipfilter",
    help="Decide, for millions of images, what stays in a dataset and what goes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived: leave at once; everything committed stays."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


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


def guard(call: Callable[[], object]) -> None:
    """Call it; what it raises becomes one sentence and an exit code. SIGTERM and SIGINT stop it at once."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise Interrupted(signum)

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)
    try:
        call()
    except Interrupted as stop:
        _stop("stopped; what is committed stays, run the same command again to resume.", 128 + stop.signum)
    except RefusedError as error:
        _stop(str(error), 2)
    except ClipfilterError as error:
        _stop(str(error), 1)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:
        _stop(f"stopped by the system: {error}; run the same command again to resume.", 1)
    except Exception as error:
        traceback.print_exc()
        _stop(f"crashed: {type(error).__name__}: {error} (a bug: please report it with the lines above)", 1)


def _stop(sentence: str, code: int) -> None:
    print(f"clipfilter: {sentence}", file=sys.stderr)
    sys.exit(code)
