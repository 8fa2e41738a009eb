"""Plants one fault at a time in a copy of the checkout and asks the tests; what they miss is printed, exit code 1.

    python tools/faults/plant.py [--out table.md] [NAME ...]

Each fault of faults.py replaces one piece of code that stands exactly once. Its tests are the cheapest of `make test`
that ought to see it; a fault that they miss is either told to more tests, or there is a test to write.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from faults import FAULTS, Fault

REPO = Path(__file__).parents[2]
SECONDS = 900


def plant(fault: Fault, checkout: Path) -> str:
    """Put the fault into the copy; the text of the file before. Raises ValueError where its place is not there once."""
    path = checkout / fault.file
    before = path.read_text(encoding="utf-8")
    if before.count(fault.old) != 1:
        raise ValueError(f"{fault.name}: {fault.file} has {before.count(fault.old)} times\n{fault.old}")
    path.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
    return before


def ask(fault: Fault, checkout: Path) -> str | None:
    """The first test that fails with the fault planted, None where all pass."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *fault.tests]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if done.returncode not in (0, 1):
        raise RuntimeError(
            f"{fault.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return failed[1] if failed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="faults to plant [default: all]")
    parser.add_argument("--out", type=Path, help="write the table here as Markdown")
    options = parser.parse_args()
    chosen = [fault for fault in FAULTS if not options.names or fault.name in options.names]
    rows, missed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        skipped = shutil.ignore_patterns(".venv", ".git", "__pycache__", ".*_cache", "demo-out")
        shutil.copytree(REPO, checkout, ignore=skipped)
        for fault in chosen:
            began = time.monotonic()
            before = plant(fault, checkout)
            caught = ask(fault, checkout)
            (checkout / fault.file).write_text(before, encoding="utf-8")
            missed += caught is None
            rows.append(f"| {fault.name} | `{fault.file}` | {f'`{caught}`' if caught else 'NOTHING'} |")
            print(f"{rows[-1]}  {time.monotonic() - began:.0f} s", flush=True)
    if options.out:
        options.out.write_text("| fault | in | caught by |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n")
    print(f"{len(chosen) - missed} of {len(chosen)} faults were caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
