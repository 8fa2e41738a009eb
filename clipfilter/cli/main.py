"""`clipfilter`: the command line's entry point, and how errors become one sentence and an exit code."""

from __future__ import annotations

import logging
import signal
import sys
from types import FrameType
from typing import Annotated

import click
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


class Terminated(BaseException):
    """SIGTERM arrived: leave at once, everything committed stays."""


def _version(value: bool) -> None:
    if value:
        from clipfilter import __version__

        typer.echo(f"clipfilter {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; always ends in SystemExit with one of the codes of DESIGN.md section 8."""
    from clipfilter.cli import jobs, policies, runs

    jobs.add_to(app)
    runs.add_to(app)
    policies.add_to(app)

    def terminate(signum: int, frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except click.exceptions.Abort:
        _stop("interrupted; run the same command again to resume.", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except KeyboardInterrupt:
        _stop("interrupted; run the same command again to resume.", 130)
    except Terminated:
        _stop("terminated; run the same command again to resume.", 143)
    except RefusedError as error:
        _stop(str(error), 2)
    except ClipfilterError as error:
        _stop(str(error), 1)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        logging.getLogger("clipfilter").exception("crash")
        _stop(f"crashed: {type(error).__name__}: {error} (this is a bug, or a full disk or lost store; see above)", 1)


def _stop(sentence: str, code: int) -> None:
    print(f"clipfilter: {sentence}", file=sys.stderr)
    sys.exit(code)
