"""Takes Markdown pages apart (blocks and their markers, commands, links, headings) and runs what they show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.commands import fork_server

REPO = Path(__file__).parents[2]
#: Pages between whose commands a person acts: the test that walks through them runs their blocks.
WALKED = {REPO / "docs/guide/look.md": "tests/integration/test_newcomer_walk.py"}
_LANGUAGES = ("console", "bash", "python")
_SECONDS = 300

_FENCE = re.compile(r"^```(\w*)\s*$")
_MARKER = re.compile(r"^<!--\s*(?P<name>[a-z-]+)(?::\s*(?P<value>.*?))?\s*-->$")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`[^`]*`")


@dataclass
class Block:
    """One fenced block.

    Markers are HTML comments on the line above the fence: `no-run: reason` exempts the block from being run, `exit: N`
    is the exit code of its last command (the others exit with 0), `file: NAME` writes a block into the page's folder,
    `varies: COLUMN` says that the numbers below a column's name depend on the machine.
    """

    page: Path
    line: int
    language: str
    text: str
    markers: dict[str, str] = field(default_factory=dict)

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPO)}:{self.line}"


@dataclass
class Command:
    """A line (or continued lines) after `$ `, and the lines of output that the page shows below it."""

    text: str
    output: list[str]


def pages() -> list[Path]:
    """README.md and every page below docs/, sorted."""
    return [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md"))]


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, top to bottom."""
    lines = page.read_text(encoding="utf-8").splitlines()
    index = 0
    markers: dict[str, str] = {}
    while index < len(lines):
        line = lines[index]
        marker, fence = _MARKER.match(line), _FENCE.match(line)
        if marker:
            markers[marker["name"]] = marker["value"] or ""
        elif fence:
            end = next(i for i in range(index + 1, len(lines)) if lines[i].rstrip() == "```")
            yield Block(page, index + 1, fence[1], "\n".join(lines[index + 1 : end]) + "\n", markers)
            markers, index = {}, end
        elif line.strip():
            markers = {}
        index += 1


def commands(block: Block) -> list[Command]:
    """The commands of a `console` block, each with its output; of a `bash` block, every line is a command."""
    found: list[Command] = []
    continued = False
    for line in block.text.splitlines():
        if continued:
            found[-1].text += "\n" + line
        elif block.language == "bash":
            if not line.strip() or line.startswith("#"):
                continue
            found.append(Command(line, []))
        elif line.startswith("$ "):
            found.append(Command(line[2:], []))
        else:
            assert found, f"{block.where}: output before the first command"
            found[-1].output.append(line)
            continue
        continued = line.endswith("\\")
    return found


def runs(page: Path) -> list[Block]:
    """The blocks of a page that are run, or written to files, in order."""
    return [b for b in blocks(page) if "no-run" not in b.markers and (b.language in _LANGUAGES or "file" in b.markers)]


def prepare(folder: Path) -> None:
    """Make a work folder as the pages assume it: like a checkout, with the sample photographs and the policies."""
    for name in ("samples", "policies", "pipelines"):
        shutil.copytree(REPO / name, folder / name)


def run(block: Block, folder: Path) -> list[tuple[Command, int, str]]:
    """Run a block in the page's folder: each command with its exit code and what it printed on both streams."""
    environment = os.environ | {
        "PATH": os.pathsep.join([str(fork_server().shims), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(REPO),
        "COLUMNS": "200",
    }
    if "file" in block.markers:
        (folder / block.markers["file"]).write_text(block.text, encoding="utf-8")
        return []
    if block.language == "python":
        todo = [(Command(block.text, []), [fork_server().python, "-c", block.text])]
    else:
        todo = [(c, ["bash", "-euo", "pipefail", "-c", c.text]) for c in commands(block)]
    results = []
    for command, arguments in todo:
        done = subprocess.run(
            arguments,
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
        )
        results.append((command, done.returncode, done.stdout))
    return results


#: What differs between machines, moments and folders, and what stands for it in a comparison.
_VARYING = (
    (r"\b[0-9a-f]{12,}\b", "HASH"),
    (r"/\S*/(?=[\w.-]+)", ""),
    (r"[█▏]+", ""),
    (r"\b\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d)?(?:\.\d+)?Z?)?", "DATE"),
    (r"\d[\d,.]*(?: \d{3})* ?(?:images|rows|pairs|img)(?:/s| per second| a second)\b", "SPEED"),
    (r"\d[\d,.]* ?(?:ms|s|seconds?|min|minutes?|h|hours?)\b", "TIME"),
    (r"\d[\d,.]* ?[kKMG]i?B\b", "SIZE"),
    (r"\b\d(?:\.\d+)?e-0[7-9]\b", "ROUNDING"),  # what float32 cannot tell from 0
)
_NUMBER = re.compile(r"(?<![A-Za-z_\d.])[-+]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-?\d+)?")


def _settled(line: str) -> str:
    for pattern, word in _VARYING:
        line = re.sub(pattern, word, line)
    return line


def shape(line: str) -> str:
    """A line of output without what may differ between machines: numbers, bars, hashes, the working folder, spacing."""
    line = re.sub(r"[-+]?\d[\d,.]*%?", "0", _settled(line))
    line = re.sub(r"(0\s+)+0\b", "0", line)
    return " ".join(line.split())


def shows(page: str, printed: str) -> bool:
    """Whether a page's line is what was printed: the same words, and the same numbers but for times, sizes and speeds.

    Whole numbers must be equal; of others the last digit may be off by one, as rounding differs between processors.
    """
    if shape(page) != shape(printed):
        return False
    ours, theirs = (_NUMBER.findall(_settled(line)) for line in (page, printed))
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def without(column: str, lines: list[str]) -> list[str]:
    """Lines of output without the numbers that end below the end of a column's name."""
    found, end = [], 0
    for line in lines:
        at = line.find(column)
        if at >= 0:
            end = at + len(column)
        elif end and line[end - 1 : end].isdigit():
            start = len(line[:end].rstrip("0123456789.,"))
            line = line[:start] + " " * (end - start) + line[end:]
        found.append(line)
    return found


def _same(one: str, other: str) -> bool:
    decimals = len(one.partition(".")[2])
    if "." not in one or "e" in one or decimals != len(other.partition(".")[2]):
        return one == other
    unit = 10.0**-decimals
    return abs(float(one.replace(",", "")) - float(other.replace(",", ""))) < 1.5 * unit


def links(page: Path) -> Iterator[tuple[int, str]]:
    """(line, target) of every link and image outside of code."""
    inside = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
        elif not inside:
            for match in _LINK.finditer(_CODE.sub(lambda m: "`" * len(m[0]), line)):
                yield number, match[1] or match[2]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    found: set[str] = set()
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = not inside
        elif not inside and (heading := re.match(r"#{1,6}\s+(.*)", line)):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).strip().lower()
            found.add(re.sub(r"[^\w\- ]", "", text).replace(" ", "-"))
    return found
