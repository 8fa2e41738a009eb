"""How every command prints: JSON, lines and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

#: Colours of what can become of a row, and of a rule's band.
COLOURS = {
    "keep": "green", "review": "yellow", "reject": "red", "failed": "magenta", "missing": "yellow", "escalate": "red",
}  # fmt: skip


def print_json(value: Any, *, indent: int | None = 1, ascii_only: bool = True, **how: Any) -> None:
    """Print a result as JSON. how: further arguments of json.dumps."""
    typer.echo(json.dumps(value, indent=indent, ensure_ascii=ascii_only, **how))


def stdout(width: int | None = None) -> Console:
    """Where results are printed for people. width: of a line [default: the terminal's]."""
    from rich.console import Console

    return Console(width=width)


def say(console: Console, *parts: str | tuple[str, str], style: str = "") -> None:
    """Print a line of plain or styled parts as it is: nothing in it is markup, and it is not broken."""
    from rich.text import Text

    console.print(Text.assemble(*parts, style=style), soft_wrap=True)


def print_overview(overview: dict[str, Any], more: Iterable[str] = ()) -> None:
    """Print what `--dry-run` shows people: what would be done by name, warnings, and `more` lines."""
    console = stdout()
    for name, value in overview.items():
        if name not in ("warnings", "account", "uncounted", "first_rows"):
            say(console, f"{name:<14} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    if "account" in overview:
        _print_what_is_there(console, overview)
    for warning in overview.get("warnings", ()):
        say(console, f"warning: {warning}", style="yellow")
    for line in more:
        say(console, line)
    say(console, "nothing was done (--dry-run)", style="dim")


def _print_what_is_there(console: Console, overview: dict[str, Any]) -> None:
    from rich.text import Text

    from clipfilter import text
    from clipfilter.sources import Seen

    for line in Seen.from_json(overview["account"]).told():
        say(console, line)
    if overview["uncounted"]:
        say(
            console,
            f"and the rows of {text.plural(overview['uncounted'], 'shard')}, which are counted when they are read",
        )
    found = new_table("key", ">size", "caption", fold=True)
    for row in overview["first_rows"]:
        pixels = f"{row['width']} x {row['height']}" if row.get("width") else ""
        size = ", ".join(filter(None, (pixels, text.size(row["bytes"]) if "bytes" in row else "")))
        said = text.clean(row.get("error") or row.get("caption") or "", 80)
        found.add_row(Text(text.clean(row["key"], 60)), size, Text(said))
    console.print(found)


def bar(share: float, width: int) -> str:
    """A share of 0 to 1 as a bar, never without anything to see."""
    return "█" * round(width * share) or "▏"


def new_table(*titles: str, fold: bool = False, pad_edge: bool = True) -> Table:
    """An empty table without lines. A title that begins with `>` is that of a column of numbers, aligned to the right.

    fold: cells that are too long are continued below instead of being cut off. pad_edge: whether cells keep their two
    spaces at the right end; without, columns stand two spaces apart and the table ends with its cells.
    """
    from rich.table import Table

    found = Table(box=None, header_style="dim", pad_edge=pad_edge, padding=(0, 2, 0, 0) if pad_edge else (0, 1))
    for title in titles:
        justify, overflow = "right" if title[:1] == ">" else "left", "fold" if fold else "ellipsis"
        found.add_column(title.removeprefix(">"), justify=justify, overflow=overflow)  # type: ignore[arg-type]
    return found
