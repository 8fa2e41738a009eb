"""Hundreds of damaged policy files: each is refused with one sentence and a place, quickly, and none runs code."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from clipfilter.errors import RefusedError
from clipfilter.policies import load_policy
from tests.support.mutants import BASE, CANARY, mutants, write


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_every_damaged_policy_is_refused_with_one_sentence_and_a_place(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = mutants()
    assert len(made) >= 200
    made = made[::every]
    wrong = []
    for number, mutant in enumerate(made):
        folder = tmp_path / str(number)
        folder.mkdir()
        monkeypatch.chdir(folder)
        path = write(mutant, folder)
        began = time.perf_counter()
        try:
            load_policy(path)
            said = "loaded"
        except RefusedError as error:
            said = str(error)
        took = time.perf_counter() - began
        match = re.fullmatch(re.escape(str(tmp_path)) + r"/\d+/[\w.]+\.yaml:[1-9]\d*:[1-9]\d*: (\S.*)", said)
        one_sentence = match is not None and len(match[1]) < 500 and match[1].isprintable()
        if not one_sentence or "pydantic" in said or took > 10:
            wrong.append(f"{mutant.name} ({took:.1f} s): {said[:300]}")
    assert not wrong, f"{len(wrong)} of {len(made)}:\n" + "\n".join(wrong)
    assert not list(tmp_path.rglob(CANARY))


def test_devices_pipes_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "endless.yaml").symlink_to("/dev/zero")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    for name in ("pipe", "folder", "endless", "loop"):
        path = tmp_path / "p.yaml"
        path.write_bytes(BASE + f"extends: {name}.yaml\n".encode())
        with pytest.raises(RefusedError, match=r"p\.yaml:4:10: .*cannot be read"):
            load_policy(path)
        with pytest.raises(RefusedError, match="cannot be read"):
            load_policy(tmp_path / f"{name}.yaml")
