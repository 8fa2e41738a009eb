"""The pinned versions of constraints*.txt, and what the declared dependencies need of what is installed."""

from __future__ import annotations

import re
import sysconfig
import tomllib
from collections.abc import Iterable
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).parents[2]
_PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.!+]+)")


def pins(file: str) -> dict[str, str]:
    """{canonical name: exact version} of a constraints file; ValueError for a line that pins nothing exactly."""
    found: dict[str, str] = {}
    for number, line in enumerate((REPO / file).read_text(encoding="utf-8").splitlines(), 1):
        if not line or line.startswith(("#", "--constraint ")):
            continue
        pin = _PIN.fullmatch(line)
        if pin is None:
            raise ValueError(f"{file}:{number}: {line!r} is not NAME==VERSION")
        name = canonicalize_name(pin["name"])
        if name in found:
            raise ValueError(f"{file}:{number}: {name} stands there twice")
        found[name] = pin["version"]
    return found


def declared() -> tuple[list[str], list[str]]:
    """(what a user's installation may need: the dependencies and every extra but `dev`; what `dev` adds) as requirements."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    own = [line for name, lines in extras.items() if name != "dev" for line in lines]
    return project["dependencies"] + own, [line for line in extras["dev"] if Requirement(line).name != "clipfilter"]


def installed() -> dict[str, Distribution]:
    """{canonical name: distribution} of this environment; not what setuptools carries and puts on the path when imported."""
    places = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    return {canonicalize_name(d.metadata["Name"]): d for d in distributions(path=places)}


def needed(requirements: Iterable[str]) -> set[str]:
    """The installed packages that the requirements reach on this machine, by canonical name."""
    here = installed()
    todo = [Requirement(line) for line in requirements]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        wanted = todo.pop()
        key = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if key in seen or key[0] not in here:
            continue
        seen.add(key)
        for line in here[key[0]].requires or ():
            inner = Requirement(line)
            extras = ("", *wanted.extras)
            if inner.marker is None or any(inner.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(inner)
    return {name for name, _ in seen}
