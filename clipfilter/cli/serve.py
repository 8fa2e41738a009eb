"""`clipfilter serve`: a local page over a run."""

from __future__ import annotations

from typing import Annotated

import typer

from clipfilter import defaults
from clipfilter.cli.options import ModelOfRun, Run


def serve(
    run: Run,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8642,
    host: Annotated[
        str, typer.Option(help="Address to listen on; another than this machine's own lets others ask too.")
    ] = defaults.LOOPBACK,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    labels: Annotated[
        str | None, typer.Option(help="CSV file that labels are written to [default: NAME-OF-RUN-labels.csv here].")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            "--policy", "-p", help="The file the run's policy came from, so that an export keeps its comments."
        ),
    ] = None,
    model: ModelOfRun = None,
) -> None:
    """Look at a run in the browser: search it, move thresholds, label examples; Ctrl-C ends it."""
    from clipfilter.serve import is_loopback
    from clipfilter.serve import serve as serve_run

    def ready(address: str, file: str) -> None:
        typer.echo(f"page     {address}")
        typer.echo(f"labels   {file}")
        if not is_loopback(host):
            typer.echo("warning: other machines can reach this page, and the token travels unencrypted", err=True)
        typer.echo("Ctrl-C ends it")
        if open_browser:
            typer.launch(address)

    serve_run(run, host=host, port=port, labels=labels, policy=policy, model=model, ready=ready)
    typer.echo("stopped")
