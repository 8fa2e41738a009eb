"""What a run writes, reduced to what must never change unnoticed; `python -m tests.golden.capture` writes the golden files anew.

Every file's sha256, every commit, the version, the plan and every row's decision, for runs over the sample photographs.
Left out is what a repetition may change: times, machines, the place of the source, and what is derived from these.
"""

from __future__ import annotations

import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet as pq
import torch

from clipfilter.storage import file_sha256
from tests.support.engine import PHOTOS, SHARED

FLICKR8K = SHARED / "data" / "flickr8k"
GOLDEN = Path(__file__).parent
DATA_FOLDERS = ("annotated", "embeddings", "failed", "kept", "review", "scored")

FRACTION = """
policy: golden-fraction
version: 1
rules:
  - id: animals
    concept:
      any_of: ["a cat", "a dog", "a bird"]
      but_not: ["a building", "a landscape"]
    review: {above: 0.40}
    reject: {above: 0.70}
  - id: match
    alignment: {}
    review: {below: 0.05}
  - id: dark
    pixels: dark
    review: {below: 60}
  - id: best
    fraction: {of: match}
    reject: {outside_top: 0.6}
"""
#: name of the golden file -> job, policy (a pack, or the text of a policy).
RUNS: dict[str, tuple[str, str | None]] = {
    "run-demo": ("run", "demo"),
    "run-fraction": ("run", FRACTION),
    "embed": ("embed", None),
    "score": ("score", "safety-concepts"),
    "flickr8k": ("run", "safety-concepts"),
}


def machine() -> dict[str, str]:
    """Where bytes of floating-point results may be expected to be equal."""
    lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    named = {name.strip(): value.strip() for name, _, value in lines}
    cpu = " ".join(named.get(name, "") for name in ("model name", "cpu family", "model"))
    return {
        "cpu": f"{platform.machine()} {cpu}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "numpy": numpy.__version__,
        "pyarrow": pyarrow.__version__,
        "torch": torch.__version__,
    }


def make(name: str, folder: Path) -> Path:
    """The golden run `name` in `folder`; returns its directory."""
    from clipfilter.engine import JobRequest, run_job

    job, policy = RUNS[name]
    if policy is not None and "\n" in policy:
        file = folder / f"{name}.yaml"
        file.write_text(policy)
        policy = str(file)
    out = folder / name
    many = name == "flickr8k"
    # Threads and batch size decide how a product is rounded.
    request = JobRequest(
        job,  # type: ignore[arg-type]
        str(FLICKR8K if many else PHOTOS), str(out),
        policy=policy, engine="local", threads=2, batch_size=64, max_failures=0.1, copy=not many,
    )  # fmt: skip
    run_job(request)
    return out


def capture(out: Path) -> dict[str, Any]:
    """Everything of a finished run that must not change: files, commits, version, plan, rows."""
    files = {
        path.relative_to(out).as_posix(): file_sha256(path)
        for folder in DATA_FOLDERS
        for path in sorted((out / folder).rglob("*"))
        if path.is_file()
    }
    plan = json.loads((out / "plan.json").read_text())
    assert plan.pop("sha256")
    plan["source"].pop("root"), plan["source"].pop("url")
    plan.pop("created_by")
    commits = {}
    for path in sorted((out / "commits").iterdir()):
        commit = json.loads(path.read_text())
        assert set(commit.pop("work")) >= {"started", "finished", "machine"}
        assert commit.pop("plan")
        commit["shard"].pop("etag")  # of the files' times
        commits[path.name] = commit
    versions = {}
    for path in sorted((out / "versions").iterdir()):
        version = json.loads(path.read_text())
        assert version.pop("plan")
        versions[path.name] = version
    content = {"files": files, "plan": plan, "commits": commits, "versions": versions}
    return content if out.name == "flickr8k" else {**content, "rows": rows(out)}


def rows(out: Path) -> list[dict[str, Any]]:
    """Every annotated row without nulls; numbers as the file holds them."""
    found = []
    for path in sorted((out / "annotated").iterdir()):
        for row in pq.read_table(path).to_pylist():
            found.append({key: value for key, value in row.items() if value is not None})
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]


def write() -> None:
    """Write all golden files. Every difference they then show is to be explained in the commit that brings it."""
    with tempfile.TemporaryDirectory() as folder:
        for name in RUNS if FLICKR8K.is_dir() else [name for name in RUNS if name != "flickr8k"]:
            content = {"machine": machine(), **capture(make(name, Path(folder)))}
            (GOLDEN / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write()
