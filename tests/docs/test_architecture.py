"""docs/architecture.md names files and functions: they are there, and CONTRIBUTING.md's table of packages is the linter's."""

from __future__ import annotations

import ast
import re

from tests.docs.claims import prose
from tests.docs.pages import REPO
from tests.support.imports import layers

PAGE = REPO / "docs/architecture.md"


def defined(path: str) -> set[str]:
    """Functions, methods and classes of a file below clipfilter/, by their own names."""
    tree = ast.parse((REPO / "clipfilter" / path).read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(tree) if isinstance(node, kinds)}


def test_every_file_and_function_of_the_walks_is_there() -> None:
    gone, file, seen = [], None, 0
    for name in re.findall(r"`([^`\n]+)`", prose(PAGE)):
        if name.startswith("tests/"):
            assert (REPO / name).exists(), name
        elif name.endswith(".py"):
            file = name
            if not (REPO / "clipfilter" / name).is_file():
                gone.append(name)
        elif name.endswith("()") or re.fullmatch(r"[A-Z][a-z]+[A-Za-z]*", name):
            seen += 1
            if file is None or file in gone or name.removesuffix("()") not in defined(file):
                gone.append(f"{file}: {name}")
    assert gone == []
    assert seen > 20


def test_the_table_of_packages_is_that_of_the_linter() -> None:
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("| package |")[1].split("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[2:]]
    named = [[name.removesuffix(".py") for name in re.findall(r"`([\w.]+)`", cell)] for cell in cells]
    rows = {name: number for number, row in enumerate(named) for name in row}
    assert rows.keys() == set(layers())
    # Packages of one row do not import each other upwards either; their order in the row is free.
    assert [rows[name] for name in layers()] == sorted(rows.values())
