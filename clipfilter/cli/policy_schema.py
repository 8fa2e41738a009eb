"""`clipfilter policy schema`: the policy language as a JSON Schema."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def schema(
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Write it to this file instead of printing it.")
    ] = None,
) -> None:
    """Print the JSON Schema of policy files, for editors that complete keys and mark mistakes."""
    from pathlib import Path

    from clipfilter.errors import RefusedError
    from clipfilter.policies import policy_schema

    text = json.dumps(policy_schema(), indent=1, ensure_ascii=False) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    if not Path(out).absolute().parent.is_dir():
        raise RefusedError(f"there is no folder for --out {out}.")
    Path(out).write_text(text, encoding="utf-8")
