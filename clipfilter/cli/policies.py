"""`clipfilter policy`: check, show and calibrate policies."""

from __future__ import annotations

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


policy_show.add_to(policy_app)
policy_tests.add_to(policy_app)


@policy_app.command("list")
def packs() -> None:
    """List the policy packs that come with clipfilter."""
    from clipfilter.policies import pack_names

    for name in pack_names():
        typer.echo(name)


decisions.add_to(policy_app)
calibration.add_to(policy_app)
audit.add_to(policy_app)
policy_schema.add_to(policy_app)


def add_to(app: typer.Typer) -> None:
    app.add_typer(policy_app, name="policy")
