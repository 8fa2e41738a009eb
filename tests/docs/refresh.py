"""Renews the numbers in the output that the pages show: `python -m tests.docs.refresh [PAGE...]`, by running them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.docs.pages import pages, prepare, run, runs, shape

#: What stands for the folder of the person who follows the page.
HOME = "/home/me"


def refresh(page: Path) -> list[str]:
    """Replace each line of output by the printed line of the same shape; the lines for which there is none."""
    unknown = []
    lines = page.read_text(encoding="utf-8").splitlines()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        prepare(folder)
        for block in runs(page):
            at = block.line
            if block.language != "console":
                run(block, folder)
                continue
            for command, _, output in run(block, folder):
                printed: dict[str, list[str]] = {}
                for line in output.replace(str(folder), HOME).splitlines():
                    printed.setdefault(shape(line), []).append(line.rstrip())
                at = next(i for i in range(at, len(lines)) if lines[i] == "$ " + command.text.splitlines()[0]) + 1
                at += command.text.count("\n")
                for number in range(at, at + len(command.output)):
                    old = lines[number]
                    if old.strip() in ("", "..."):
                        continue
                    same = printed.get(shape(old))
                    if same:
                        lines[number] = same.pop(0) if len(same) > 1 else same[0]
                    else:
                        unknown.append(f"{block.where}: {old}\n{output}")
    page.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return unknown


if __name__ == "__main__":
    for chosen in [Path(p).resolve() for p in sys.argv[1:]] or pages():
        for problem in refresh(chosen):
            print(problem)
