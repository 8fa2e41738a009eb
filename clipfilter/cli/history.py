"""`history`: what a run directory has been through, and the way back to an earlier version."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from clipfilter.cli.options import Json, Run
from clipfilter.cli.printing import new_table, print_json, say, stdout
from clipfilter.decisions import DECISIONS

_STYLES = {"failed": "red", "unfinished": "red", "running": "cyan", "rollback": "yellow", "unchanged": "dim"}


def history(
    run: Run,
    rollback: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Make this version the dataset again, as a new version.")
    ] = None,
    accept: Annotated[
        int | None,
        typer.Option(metavar="NIGHT", help="Take this night as the new normal that later nights are compared with."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show every night and version of a run; go back to a version, or accept a night that drifted."""
    from clipfilter.errors import RefusedError
    from clipfilter.nightly import accept_night, roll_back
    from clipfilter.nightly import history as read_history

    if rollback is not None and accept is not None:
        raise RefusedError("--rollback and --accept are two steps; give one of them.")
    if rollback is not None:
        made = roll_back(run, rollback)
        back, totals = made.rolled_back_to, made.totals
        if as_json:
            print_json({"version": made.name, "rolled_back_to": back, "totals": totals}, indent=None)
        else:
            typer.echo(f"version {made.number} is version {back} again: {totals.rows:,} rows")
        return
    if accept is not None:
        accept_night(run, accept)
        if as_json:
            print_json({"accepted": accept}, indent=None)
        else:
            typer.echo(f"night {accept} is the new normal")
        return
    found = read_history(run)
    if as_json:
        print_json(found, ascii_only=False)
    else:
        _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.text import Text

    console = stdout()
    if not console.is_terminal:
        console = stdout(width=160)  # a file has no width: nothing is cut off
    numbers = ("version", "new", "rows", *DECISIONS, "failed", "dataset", "drift", "seconds")
    nights = new_table("night", "date", *(f">{name}" for name in numbers), "outcome")
    for night in found["nights"]:
        nights.add_row(*_cells(night))
    of_nights = {night.get("version") for night in found["nights"]}
    for version in found["versions"]:
        if version["version"] not in of_nights:  # made by `run` or `filter`
            parts = [f"{version[name]:,}" for name in (*DECISIONS, "failed")]
            nights.add_row(
                "", "", str(int(version["version"])), "", "", *parts, f"{version['rows']:,}", "", "", Text("done")
            )
    console.print(nights)
    for night in found["nights"]:
        for alert in night["alerts"]:
            say(console, f"night {night['night']}: {alert['kind']}: {alert['message']}", style="red")


def _cells(night: dict[str, Any]) -> list[Any]:
    counts, shards = night.get("counts", {}), night.get("shards", {})
    rows = [f"{counts[name]:,}" if counts.get(name) else "" for name in ("rows", *DECISIONS, "failed")]
    new = shards.get("new", 0) + shards.get("changed", 0)
    worst = max((item["psi"] for item in night.get("drift", ())), default=None)
    total = night.get("totals", {}).get("rows")
    return [
        str(night["night"]),
        night["started"][:16].replace("T", " "),
        str(int(night["version"])) if night.get("version") else "",
        f"{new:,}" if new else "",
        *rows,
        f"{total:,}" if total is not None else "",
        f"{worst:.2f}" if worst is not None else "",
        f"{night['seconds']:.0f}" if "seconds" in night else "",
        _outcome(night),
    ]


def _outcome(night: dict[str, Any]) -> Any:
    from rich.text import Text

    outcome = night["outcome"]
    told = outcome if outcome != "rollback" else f"rollback to {night['to']}"
    if night["alerts"] and outcome in ("done", "unchanged"):
        kinds = ", ".join(dict.fromkeys(alert["kind"] for alert in night["alerts"]))
        return Text(f"{told}: {kinds}", "red")
    return Text(told, _STYLES.get(outcome, "green"))
