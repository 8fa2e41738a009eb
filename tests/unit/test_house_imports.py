"""The house keeps its rules of imports: what the linter cannot say, and that the linter is set up to see everything."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from clipfilter.models import torch_with_torchvision
from tests.support.imports import INNER_FACES, REPO, Import, circles, contract, graph, imports, layers, modules, package


@pytest.fixture(scope="module")
def everything() -> list[Import]:
    return [found for importer, path in modules().items() for found in imports(importer, path)]


def faces() -> list[str]:
    return [name for name, path in modules().items() if path.name == "__init__.py"]


def test_the_linter_finds_nothing() -> None:
    """What `make check` runs: layers, and circles between modules and between packages."""
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([str(program), "--no-logo", "--no-cache"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_sees_every_package() -> None:
    folder = REPO / "clipfilter"
    there = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    assert set(layers()) == there - {"__init__"}
    assert contract("layers")["exhaustive"]
    assert "ignore_imports" not in contract("layers").keys() | contract("circles").keys()


def test_no_module_imports_itself_around_a_corner() -> None:
    """Faces count here: a module that imports its own package's face imports itself."""
    assert circles(graph(modules())) == []


def test_circles_are_seen_in_functions_and_for_types(tmp_path: Path) -> None:
    folder = tmp_path / "clipfilter"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "one.py").write_text("def f():\n    from clipfilter import two\n")
    (folder / "two.py").write_text("if TYPE_CHECKING:\n    from clipfilter.three import T\n")
    (folder / "three.py").write_text("import clipfilter.one\n")
    arrows = graph(modules(tmp_path))
    assert circles(arrows) == [["clipfilter.one", "clipfilter.three", "clipfilter.two"]]
    del arrows["clipfilter.one"], arrows["clipfilter"]
    assert circles(arrows | {"clipfilter.one": set()}) == []


def test_packages_are_imported_through_their_faces(everything: list[Import]) -> None:
    deep = [
        str(found)
        for found in everything
        if package(found.importer) != package(found.module)
        and found.module.count(".") > 1
        and found.module not in INNER_FACES
    ]
    assert deep == []


@pytest.mark.parametrize("face", faces())
def test_what_is_imported_from_a_face_is_in_its_list(face: str, everything: list[Import]) -> None:
    """No name reaches another package by accident, and each name of the list is there, also those loaded late."""
    offered = set(getattr(importlib.import_module(face), "__all__", ()))
    used = {f.name: str(f) for f in everything if f.module == face and package(f.importer) != package(face)}
    inside = {name.rsplit(".", 1)[1] for name in modules() if name.rpartition(".")[0] == face}
    # `from clipfilter import storage` and `from clipfilter.models import heads` name faces, too.
    offered |= {name for name in inside if face == "clipfilter" or f"{face}.{name}" in INNER_FACES}
    assert set(used) <= offered | {""}, [used[name] for name in sorted(set(used) - offered)]
    torch_with_torchvision()
    for name in sorted(offered - inside):
        assert getattr(importlib.import_module(face), name) is not None
