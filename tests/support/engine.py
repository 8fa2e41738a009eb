"""Small real datasets for engine tests, and what two runs must have in common."""

from __future__ import annotations

import io
import json
import os
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from clipfilter.runs import FILE_KINDS
from clipfilter.storage import file_sha256
from tests.support.commands import command
from tests.support.sources import write_webdataset

REPO = Path(__file__).parents[2]
PHOTOS = REPO / "samples" / "photos"
SHARED = Path(os.environ.get("CLIPFILTER_SHARED", REPO.parent / "shared"))

POLICY = """
policy: engine-test
version: 1
rules:
  - id: animals
    concept:
      any_of: ["a cat", "a dog", "a bird"]
      but_not: ["a building", "a landscape"]
    review: {above: 0.40}
    reject: {above: 0.70}
  - id: off-caption
    alignment: {}
    reject: {below: 0.05}
  - id: small
    metadata: min_side
    reject: {below: 60}
"""
FRACTION_POLICY = """
policy: engine-test-fraction
version: 1
rules:
  - id: match
    alignment: {}
    review: {below: 0.05}
  - id: best
    fraction: {of: match}
    reject: {outside_top: 0.6}
"""


@cache
def photos(size: int = 240) -> list[tuple[str, bytes, str]]:
    """(name, JPEG bytes, caption) of the repo's sample photographs that are not trouble on purpose, made small."""
    found = []
    for line in (PHOTOS / "captions.jsonl").read_text().splitlines():
        row = json.loads(line)
        path = PHOTOS / row["file_name"]
        try:
            with Image.open(path) as image:
                if image.mode != "RGB" or image.format != "JPEG" or min(image.size) < 150:
                    continue
                image.thumbnail((size, size))
                buffer = io.BytesIO()
                image.save(buffer, "JPEG", quality=85)
        except (OSError, Image.DecompressionBombError):
            continue
        found.append((path.stem, buffer.getvalue(), row["caption"]))
    return found


def samples(count: int, start: int = 0) -> list[dict[str, Any]]:
    """webdataset samples `__key__`, jpg, txt, json from the photographs, used again from the start when they run out."""
    some = photos()
    made = []
    for number in range(start, start + count):
        name, data, caption = some[number % len(some)]
        # A byte after the end of a JPEG changes its hash, not its picture.
        data += number.to_bytes(4, "big")
        made.append({"__key__": f"{number:06d}", "jpg": data, "txt": caption, "json": {"name": name, "number": number}})
    return made


def write_tars(folder: Path, shards: int, per_shard: int) -> Path:
    """A webdataset of real photographs: `folder/00000.tar`, ..."""
    for shard in range(shards):
        write_webdataset(folder / f"{shard:05d}.tar", samples(per_shard, shard * per_shard))
    return folder


def policy_file(folder: Path, text: str = POLICY, name: str = "policy.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def data_files(out: Path) -> dict[str, str]:
    """Every data file of a run, with its sha256: what must be byte-equal between two runs."""
    names = [p for folder in FILE_KINDS for p in sorted((out / folder).glob("*"))]
    return {path.relative_to(out).as_posix(): file_sha256(path) for path in names}


def commits(out: Path) -> dict[str, dict[str, Any]]:
    """Every commit without what may differ between attempts: times, machine, attempt numbers."""
    return {
        path.name: {key: value for key, value in json.loads(path.read_text()).items() if key != "work"}
        for path in sorted((out / "commits").iterdir())
    }


def stray_files(out: Path) -> list[str]:
    """Files in a run directory that have no business there."""
    known = {
        "plan.json",
        "run.json",
        "run.log",
        "report.html",
        *FILE_KINDS,
        "commits",
        "versions",
        "thresholds",
        "derived",
    }
    return sorted(path.name for path in out.iterdir() if path.name not in known)


def cli(
    *arguments: str, env: dict[str, str] | None = None, check: bool = True, processes: bool = False
) -> subprocess.CompletedProcess[str]:
    """The command line, from the fork server; with `processes` in a process of its own, with worker processes."""
    return command("-m", "clipfilter", *arguments, env=env, check=check, processes=processes)
