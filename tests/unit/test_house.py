"""One place for each word: names of columns, lists of decisions and the largest image are written once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from clipfilter import columns, decisions, defaults
from tests.docs.pages import REPO

PACKAGE = REPO / "clipfilter"
NAMES = {value: name for name, value in vars(columns).items() if name.isupper()}


def literals(path: Path) -> Iterator[ast.AST]:
    """The nodes of a module, without docstrings and other sentences that stand alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return (node for node in ast.walk(tree) if id(node) not in alone)


def module(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.fixture(scope="module")
def sources() -> dict[str, list[ast.AST]]:
    return {module(path): list(literals(path)) for path in sorted(PACKAGE.rglob("*.py"))}


def test_names_of_columns_are_written_in_one_place(sources: dict[str, list[ast.AST]]) -> None:
    found = [
        f"{name}:{node.lineno}: write cf.{NAMES[node.value]} for {node.value!r}"
        for name, nodes in sources.items()
        if name != "columns.py"
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES
    ]
    assert not found, "\n".join(found)


def test_lists_of_decisions_are_written_in_one_place(sources: dict[str, list[ast.AST]]) -> None:
    found = []
    for name, nodes in sources.items():
        for node in nodes:
            if name != "decisions.py" and isinstance(node, ast.List | ast.Tuple | ast.Set):
                listed = {item.value for item in node.elts if isinstance(item, ast.Constant)}
                if len(listed & set(decisions.DECISIONS)) > 1:
                    found.append(f"{name}:{node.lineno}: take {ast.unparse(node)} from clipfilter.decisions")
    assert not found, "\n".join(found)


def test_the_largest_image_is_written_in_one_place(sources: dict[str, list[ast.AST]]) -> None:
    places = {
        name
        for name, nodes in sources.items()
        for node in nodes
        if isinstance(node, ast.Constant) and node.value == defaults.MAX_PIXELS
    }
    assert places == {"defaults.py"}


def test_names_are_what_they_say() -> None:
    assert all(value.startswith(columns.PREFIX) for value in NAMES)
    assert columns.score("blood") == "cf_score.blood"
    assert decisions.DECISIONS == ("keep", "review", "reject")
    assert decisions.DECISIONS[1:] == decisions.LIMITS
