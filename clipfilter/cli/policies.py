"""`clipfilter policy`: check, show and calibrate policies."""

from __future__ import annotations

from collections.abc import Callable

import typer

from clipfilter.cli import audit, calibration, decisions, policy_schema, policy_show, policy_tests
from clipfilter.cli.options import Policy

policy_app = typer.Typer(no_args_is_help=True, help="Check, show and calibrate policies.", rich_markup_mode=None)


@policy_app.command("validate")
def validate(policy: Policy) -> None:
    """Check a policy; exit code 2 and one sentence with the line when something is wrong."""
    from clipfilter.policies import load_policy

    loaded = load_policy(policy)
    typer.echo(f"{loaded.name} version {loaded.version}: {len(loaded.rules)} rules, sha256 {loaded.sha256[:12]}")


policy_app.command("show")(policy_show.show)
policy_app.command("test")(policy_tests.check)


@policy_app.command("list")
def packs() -> None:
    """List the policy packs that come with clipfilter."""
    from clipfilter.policies import pack_names

    for name in pack_names():
        typer.echo(name)


_MORE: dict[str, Callable[..., None]] = {
    "explain": decisions.explain,
    "diff": decisions.diff,
    "sample": calibration.sample,
    "calibrate": calibration.calibrate,
    "export-decisions": audit.export,
    "schema": policy_schema.schema,
}
for name, command in _MORE.items():
    policy_app.command(name)(command)
