"""Small inputs for commands that are disturbed: six pictures in two tars and in a folder, and runs over them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clipfilter import columns as cf
from tests.support.engine import FRACTION_POLICY, policy_file, samples, write_tars
from tests.support.faults import clipfilter

#: Each of the three decisions is met, and both tars have rows to copy.
POLICY = """
policy: faults
version: 1
rules:
  - id: animals
    concept:
      any_of: ["a cat", "a dog", "a bird"]
      but_not: ["a building", "a landscape"]
    review: {above: 0.35}
    reject: {above: 0.95}
"""
OPTIONS = ["--threads", "1", "--batch-size", "8", "-q"]


@dataclass(frozen=True)
class Inputs:
    """Where they are: sources, policies, an embedded run of the tars and a decided one, and the uid of a row that it kept."""

    tars: Path
    pictures: Path
    policy: str
    fraction: str
    embedded: Path
    decided: Path
    uids: Path


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("faults")
    tars = write_tars(folder / "tars", 2, 3)
    pictures = folder / "pictures"
    pictures.mkdir()
    for sample in samples(6):
        (pictures / f"{sample['__key__']}.jpg").write_bytes(sample["jpg"])
    lines = [f'{sample["__key__"]}.jpg,"{sample["txt"]}"' for sample in samples(6)]
    (pictures / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]) + "\n")
    made = Inputs(
        tars,
        pictures,
        policy_file(folder, POLICY),
        policy_file(folder, FRACTION_POLICY, "fraction.yaml"),
        folder / "embedded",
        folder / "decided",
        folder / "uids.txt",
    )
    assert clipfilter("embed", tars, "--out", made.embedded, *OPTIONS).returncode == 0
    assert clipfilter("run", tars, "--policy", made.policy, "--out", made.decided, *OPTIONS).returncode == 0
    rows = [row for path in (made.decided / "annotated").iterdir() for row in pq.read_table(path).to_pylist()]
    made.uids.write_text(next(row[cf.UID] for row in rows if row[cf.DECISION] == "keep") + "\n")
    return made
