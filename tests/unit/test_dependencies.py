"""constraints.txt pins what users install, constraints-dev.txt what tests and linters add; nothing else, nothing twice."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support import pins as support
from tests.support.pins import REPO, declared, installed, needed, pins

RUNTIME, DEVELOPMENT = "constraints.txt", "constraints-dev.txt"


def test_every_pin_is_exact_and_stands_in_one_file() -> None:
    assert not pins(RUNTIME).keys() & pins(DEVELOPMENT).keys()
    assert "\n--constraint constraints.txt\n" in (REPO / DEVELOPMENT).read_text(encoding="utf-8")
    for file in (RUNTIME, DEVELOPMENT):
        names = list(pins(file))
        assert names == sorted(names), f"{file} is not sorted"


def test_the_reader_refuses_what_is_not_exact(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(support, "REPO", tmp_path)
    for text, says in (("six>=1\n", "is not NAME==VERSION"), ("a-b==1\nA_b==1\n", "twice"), ("six==1.*\n", "NAME==")):
        (support.REPO / "file.txt").write_text(text)
        with pytest.raises(ValueError, match=says):
            pins("file.txt")


def test_what_is_needed_is_pinned_in_its_file() -> None:
    own, dev = declared()
    runtime = needed(own)
    assert runtime - pins(RUNTIME).keys() == set(), f"missing in {RUNTIME}"
    assert needed(dev) - runtime - pins(DEVELOPMENT).keys() == set(), f"missing in {DEVELOPMENT}"
    assert pins(DEVELOPMENT).keys() - needed(dev) == set(), f"nothing needs these of {DEVELOPMENT}"
    # gs and az are not among the development requirements: whether their packages are needed is not known here.
    unneeded = {name for name in pins(RUNTIME).keys() - runtime if name in installed()}
    assert unneeded == set(), f"nothing needs these of {RUNTIME}"


def test_what_is_installed_is_what_is_pinned() -> None:
    """Local versions count as their public one: a CPU build of torch is `2.13.0+cpu`."""
    here = installed()
    wanted = pins(RUNTIME) | pins(DEVELOPMENT)
    differ = {name: here[name].version for name, version in wanted.items() if name in here}
    differ = {name: version for name, version in differ.items() if version.partition("+")[0] != wanted[name]}
    assert differ == {}


def test_the_pins_are_versions_that_pyproject_allows() -> None:
    own, dev = declared()
    wanted = pins(RUNTIME) | pins(DEVELOPMENT)
    for line in own + dev:
        requirement = Requirement(line)
        assert requirement.specifier.contains(wanted[canonicalize_name(requirement.name)]), line


def test_the_development_file_is_used_for_development_only() -> None:
    assert f"--constraint {DEVELOPMENT} " in (REPO / "Makefile").read_text(encoding="utf-8")
    for path in (REPO / "README.md", REPO / "infra/Dockerfile"):
        text = path.read_text(encoding="utf-8")
        assert f"--constraint {RUNTIME} " in text
        assert DEVELOPMENT not in text


def test_the_program_loads_nothing_of_development() -> None:
    """`clipfilter --help` and the API's face import no package that only tests need."""
    code = "import sys, clipfilter.cli.main, clipfilter.api; print(*{n.partition('.')[0] for n in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    here = installed()
    loaded = set(done.stdout.split())
    for name in pins(DEVELOPMENT).keys() & here.keys():
        modules = {str(f).partition("/")[0] for f in here[name].files or () if re.match(r"\w+/__init__\.py$", str(f))}
        assert not modules & loaded, name
