"""Groups of options, and how commands print."""

from __future__ import annotations

import inspect
import io
from dataclasses import dataclass
from typing import Annotated

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from clipfilter.cli.jobs import embed, filter_, run, score
from clipfilter.cli.options import Columns, Group, grouped
from clipfilter.cli.printing import bar, new_table, print_json, say


@dataclass(frozen=True)
class Size(Group):
    width: Annotated[int, typer.Option(help="Pixels.")] = 3
    height: int = 4


GIVEN: list[object] = []


@grouped
def command(name: str, *, size: Size, loud: bool = False) -> None:
    """Do it."""
    GIVEN.append((name, size, loud))


def test_a_group_is_its_options() -> None:
    assert list(inspect.signature(command).parameters) == ["name", "width", "height", "loud"]
    assert command.__doc__ == "Do it."
    app = typer.Typer()
    app.command()(command)
    assert CliRunner().invoke(app, ["a", "--height", "9", "--loud"]).exit_code == 0
    command("b", width=1)
    assert GIVEN[-2:] == [("a", Size(3, 9), True), ("b", Size(1, 4), False)]
    with pytest.raises(TypeError, match="depth"):
        command("c", depth=1)


def test_the_commands_of_jobs_share_their_options() -> None:
    names = {each.__name__: set(inspect.signature(each).parameters) for each in (run, embed, score, filter_)}
    assert names["run"] - names["embed"] == {"policy", "copy", "thumbnails"}
    assert names["embed"] < names["run"]
    assert names["score"] - names["embed"] == {"heads", "concepts", "policy"}
    assert names["filter_"] - names["run"] == {"run"}


def test_a_source_gives_captions_also_where_the_job_ignores_them() -> None:
    assert Columns("none", uid_column="id").request()["source_options"].captions == "first"
    options = Columns("mean", "picture", "text", "id").request()["source_options"]
    assert (options.captions, options.image_column, options.caption_column, options.uid_column) == (
        "mean", "picture", "text", "id",
    )  # fmt: skip


def test_printing(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"name": "ä"}, indent=None)
    print_json(["ä"], ascii_only=False)
    assert capsys.readouterr().out == '{"name": "\\u00e4"}\n[\n "ä"\n]\n'
    assert (bar(0.5, 4), bar(0.0, 4)) == ("██", "▏")
    out = io.StringIO()
    console = Console(file=out, width=20)
    say(console, "[bold]a line ", ("longer than the console", "dim"), style="red")
    table = new_table("name", ">rows", pad_edge=False)
    table.add_row("one", "1")
    table.add_row("three", "30,000")
    console.print(table)
    assert out.getvalue().splitlines() == [
        "[bold]a line longer than the console", "name     rows", "one         1", "three  30,000",
    ]  # fmt: skip
