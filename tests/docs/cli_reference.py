"""Writes docs/reference/cli.md's tables from the commands themselves: `python -m tests.docs.cli_reference`."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "cli.md"
BEGIN, END = "<!-- generated -->", "<!-- end of generated -->"


@dataclass(frozen=True)
class Parameter:
    """An argument or option as a command declares it."""

    names: tuple[str, ...]
    help: str
    default: Any
    kind: Any
    argument: bool

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def commands() -> Iterator[tuple[str, Callable[..., Any]]]:
    """(full name, function) of every command, in the order of the help."""
    from clipfilter.cli.main import add_commands

    app = typer.Typer()
    add_commands(app)

    def walk(group: typer.Typer, name: str) -> Iterator[tuple[str, Callable[..., Any]]]:
        for command in group.registered_commands:
            assert command.callback is not None
            yield f"{name} {command.name}", command.callback
        for inner in group.registered_groups:
            assert inner.typer_instance is not None
            yield from walk(inner.typer_instance, f"{name} {inner.name}")

    return walk(app, "clipfilter")


def parameters(function: Callable[..., Any]) -> Iterator[Parameter]:
    """What a command takes, in the order of its declaration."""
    hints = typing.get_type_hints(function, include_extras=True)
    for name, item in inspect.signature(function).parameters.items():
        kind, info = typing.get_args(hints[name])[:2]
        # In `Annotated`, typer takes a text given first for a name.
        given = [*([info.default] if isinstance(info.default, str) else []), *(info.param_decls or ())]
        argument = isinstance(info, typer.models.ArgumentInfo)
        names = (name.upper(),) if argument else tuple(given) or ("--" + name.replace("_", "-"),)
        yield Parameter(names, info.help, item.default, kind, argument)


def render() -> str:
    """One section per command: its sentence, its arguments and options with meaning and default."""
    parts = []
    for name, function in commands():
        found = list(parameters(function))
        words = [
            p.names[0] if p.argument else f"{p.names[0]} {p.names[0].strip('-').upper()}" for p in found if p.required
        ]
        more = ["[options]"] if any(not p.required for p in found) else []
        sentence = " ".join((function.__doc__ or "").split())
        rows = "".join(f"| {_names(p)} | {_meaning(p)} | {_default(p)} |\n" for p in found)
        table = f"| | meaning | default |\n| --- | --- | --- |\n{rows}" if rows else ""
        parts.append(f"## {name}\n\n`{' '.join([name, *words, *more])}`\n\n{sentence}\n\n{table}".rstrip() + "\n")
    return "\n".join(parts)


def _names(parameter: Parameter) -> str:
    return ", ".join(f"`{name}`" for both in parameter.names for name in both.split("/"))


def _meaning(parameter: Parameter) -> str:
    text = re.sub(r"\s*\[default: [^\]]*\]", "", parameter.help)
    if typing.get_origin(parameter.kind) is typing.Literal:
        text += " One of " + ", ".join(f"`{item}`" for item in typing.get_args(parameter.kind)) + "."
    return text


def _default(parameter: Parameter) -> str:
    if parameter.required:
        return "required"
    told = re.search(r"\[default: ([^\]]*)\]", parameter.help)
    if told:
        return told[1]
    if parameter.default is True:
        return f"`{parameter.names[0].split('/')[0]}`"
    if parameter.default is False:
        return "off"
    return "none" if parameter.default is None else f"`{parameter.default}`"


def update(page: str) -> str:
    """The page with its generated part renewed."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{render()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(update(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
