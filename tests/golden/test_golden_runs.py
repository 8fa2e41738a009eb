"""Runs over the sample photographs write what they have always written: files, commits, versions, plans, rows.

On the processor and the library versions that the golden files name every byte is compared, elsewhere all but the bytes
of floating-point numbers. `python -m tests.golden.capture` makes the files anew; a commit that does so says why.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.golden.capture import GOLDEN, RUNS, capture, machine, make

#: How far a float32 score may lie from another processor's.
TOLERANCE = 2e-4


@pytest.mark.processes
@pytest.mark.cores
@pytest.mark.parametrize("name", RUNS)
def test_a_run_writes_what_it_always_wrote(name: str, tmp_path: Path) -> None:
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    found = capture(make(name, tmp_path))
    same_machine = golden.pop("machine") == machine()
    if not same_machine:
        golden, found = without_bytes(golden), without_bytes(found)
    differences = list(different(golden, found, 0.0 if same_machine else TOLERANCE))
    assert not differences, "\n".join(differences[:20])


def without_bytes(content: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on how a processor rounds: no hashes, sizes and content-hashed names of data files."""
    content = json.loads(json.dumps(content))
    for commit in content["commits"].values():
        for file in commit["files"].values():
            for item in file if isinstance(file, list) else [file]:
                for key in ("name", "sha256", "bytes"):
                    item.pop(key, None)
    content["files"] = sorted({name.split("/")[0] for name in content["files"]})
    return content  # type: ignore[no-any-return]


def different(old: Any, new: Any, tolerance: float, where: str = "") -> Any:
    """Sentences that tell where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        if list(old) != list(new):
            yield f"{where}: keys {sorted(set(old) ^ set(new)) or 'in another order'}"
        for key in [key for key in old if key in new]:
            yield from different(old[key], new[key], tolerance, f"{where}/{key}")
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{where}: {len(old)} items were, {len(new)} are"
        for place, (one, other) in enumerate(zip(old, new, strict=False)):
            yield from different(one, other, tolerance, f"{where}[{place}]")
    elif isinstance(old, float) and isinstance(new, float) and tolerance:
        if not math.isclose(old, new, rel_tol=1e-3, abs_tol=tolerance):
            yield f"{where}: {old!r} was, {new!r} is"
    elif old != new or type(old) is not type(new):
        yield f"{where}: {old!r} was, {new!r} is"


def test_the_comparison_sees_each_kind_of_difference() -> None:
    old = {"rows": [{"a": 1, "b": 0.5}], "n": 1}
    for new in (
        {"rows": [{"a": 1, "b": 0.6}], "n": 1},
        {"rows": [], "n": 1},
        {"n": 1, "rows": old["rows"]},
        {**old, "n": "1"},
    ):
        assert list(different(old, new, 0.01))
    assert not list(different(old, {"rows": [{"a": 1, "b": 0.5001}], "n": 1}, 0.01))
