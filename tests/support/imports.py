"""Who imports what in the product, read from its sources: imports for types and inside functions count like all others."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPO = Path(__file__).parents[2]
PRODUCT = "clipfilter"
#: What may be imported beside the packages' faces: an inner package, and the program that `python -m clipfilter` starts.
INNER_FACES = frozenset({"clipfilter.models.heads", "clipfilter.cli.main"})


@dataclass(frozen=True)
class Import:
    """One imported name: `from module import name` (name is empty for `import module`) in the module `importer`."""

    importer: str
    module: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line}: {self.module} {self.name}".rstrip()


def modules(root: Path = REPO) -> dict[str, Path]:
    """{dotted name: file} of the product; a package goes by its own name, not by `__init__`."""
    found = {}
    for path in sorted((root / PRODUCT).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(importer: str, path: Path) -> Iterator[Import]:
    """The imports of the product in one file, wherever they stand in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}:{node.lineno}: a relative import"
            names = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        else:
            continue
        for module, name in names:
            if module.split(".")[0] == PRODUCT:
                yield Import(importer, module, name, node.lineno)


def package(module: str) -> str:
    """The layer that a module belongs to: the second part of its name, empty for the product's own face."""
    return module.split(".")[1] if "." in module else ""


def graph(files: Mapping[str, Path]) -> dict[str, set[str]]:
    """{module: the modules it imports}; a submodule named in `from package import submodule` counts, not the package."""
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        targets = {full if (full := f"{i.module}.{i.name}") in files else i.module for i in imports(module, path)}
        found[module] = (targets & files.keys()) - {module}
    return found


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Groups of modules that reach one another (Tarjan's strongly connected components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in sorted(arrows[module]):
            if other not in index:
                visit(other)
                low[module] = min(low[module], low[other])
            elif other in stack:
                low[module] = min(low[module], index[other])
        if low[module] == index[module]:
            at = stack.index(module)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for module in arrows:
        if module not in index:
            visit(module)
    return found


def contract(name: str) -> dict[str, Any]:
    """A contract of pyproject.toml's import linter by its id."""
    settings = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    return next(c for c in settings["contracts"] if c["id"] == name)


def layers() -> list[str]:
    """The product's packages and top modules, lowest first, as the import linter has them."""
    return list(reversed(contract("layers")["layers"]))
