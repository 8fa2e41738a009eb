"""Numbers in the prose of the pages: which are found, which are no claims, and what constants and defaults of the code are."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.docs import cli_reference
from tests.docs.pages import REPO

_NUMBER = re.compile(r"(?<![\w.@/^_-])\d+(?:[ ,]\d{3}(?!\d))*(?:\.\d+)?(?:e-?\d+)?(?![\w@]*\d|\w)")
#: Numbers that say nothing about clipfilter, wherever they stand.
_NO_CLAIM = (
    r"`[^`\n]*`",  # code: names, values of options, examples
    r"(?<=\])\([^)]*\)",  # where a link leads
    r"https?://\S+",
    r"<!--.*?-->",
    r"^\s*\d+\. ",  # an item of a list
    r"Python \d\.\d+(?: to \d\.\d+)?",
    r"\b\d+\.\d+\.\d+\b",  # a version
    r"(?:arXiv:)\d{4}\.\d+",
    r"\b(?:19|20)\d\d\b",  # a year
    r"[Ee]xit codes? (?:is |would be )?\d+(?:(?:,| and| or) \d+)*",
    r"(?:HTTP )?\b[45]xx\b",
    r"-?\b[01] to 1\b",  # a probability, a cosine
    r"SigLIP 2|MobileCLIP 2|JPEG 2000|DataComp-?\d*|Decision \d{4}|Flickr8k|Caltech101|Apache-2\.0|YAML 1\.2",
    r"(?<![\d.])\b[01]\b(?! ?%|[ ,]\d{3}|\.\d)",  # none and one, true and false
)
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Number:
    """A number in a page's prose: its text, its place in the page's text, and its line."""

    text: str
    start: int
    line: int


def prose(page: Path) -> str:
    """The page's text without its fenced blocks; every other character stays in its place."""
    text = page.read_text(encoding="utf-8")
    return _FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)


def numbers(text: str) -> Iterator[Number]:
    """The numbers of a prose that could be claims, in order."""
    for pattern in _NO_CLAIM:
        text = re.sub(pattern, lambda match: re.sub(r"[^\n]", "~", match[0]), text, flags=re.MULTILINE)
    for match in _NUMBER.finditer(text):
        yield Number(match[0], match.start(), text.count("\n", 0, match.start()) + 1)


def values(fragment: str) -> list[float]:
    """Every number of a fragment of prose, also those that `numbers` passes over, as `numbers` reads them."""
    return [value(match[0]) for match in _NUMBER.finditer(fragment)]


def value(text: str) -> float:
    return float(re.sub(r"[ ,]", "", text))


def places(text: str, fragment: str) -> list[tuple[int, int]]:
    """Where a fragment stands in a text, whatever its line breaks."""
    pattern = r"\s+".join(re.escape(word) for word in fragment.split())
    return [match.span() for match in re.finditer(rf"(?<![\w.]){pattern}(?!\w)", text)]


def constants() -> dict[str, Any]:
    """{PLACE.NAME: value} of the numbers assigned to a name in modules (PLACE is the file's own name) and classes (theirs)."""
    found: dict[str, Any] = {}
    for path in sorted((REPO / "clipfilter").rglob("*.py")):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        places = [(path.stem, body), *((node.name, node.body) for node in body if isinstance(node, ast.ClassDef))]
        for place, statements in places:
            for name, given in _assigned(statements):
                try:
                    found[f"{place}.{name}"] = calculated(given, {})
                except ValueError:
                    continue
    return found


def _assigned(statements: list[ast.stmt]) -> Iterator[tuple[str, ast.expr]]:
    for node in statements:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            targets: list[tuple[ast.expr, ast.expr]] = [(node.target, node.value)]
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple)
        ):
            targets = list(zip(node.targets[0].elts, node.value.elts, strict=True))
        elif isinstance(node, ast.Assign):
            targets = [(node.targets[0], node.value)]
        else:
            continue
        yield from ((target.id, given) for target, given in targets if isinstance(target, ast.Name))


def options() -> dict[str, Any]:
    """{"run --max-failures": default} of every option that has one."""
    return {
        f"{command.removeprefix('clipfilter ')} {name}": parameter.default
        for command, function in cli_reference.commands()
        for parameter in cli_reference.parameters(function)
        for names in parameter.names
        for name in names.split("/")
    }


_OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.LShift: lambda a, b: a << b,
}


def calculated(node: ast.expr, names: dict[str, Any]) -> float:
    """The value of arithmetic on numbers and on `module.NAME`; ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](calculated(node.left, names), calculated(node.right, names))
    if isinstance(node, ast.Attribute) and ast.unparse(node) in names:
        return names[ast.unparse(node)]
    raise ValueError(f"{ast.unparse(node)} is no number here")
