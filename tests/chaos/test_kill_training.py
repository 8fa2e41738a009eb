"""A training killed with SIGKILL at random moments, run again: the same loss curve as undisturbed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from clipfilter.training.logs import read_rows
from tests.support.engine import REPO
from tests.support.training import arguments, command, environment, tiny_weights, write_pairs

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("CLIPFILTER_CHAOS_SEED", "20261121"))


def begin(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(*arguments), cwd=REPO, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_a_killed_training_continues_to_the_same_losses(kills: int, tmp_path: Path) -> None:
    random_moment = random.Random(SEED)
    source = write_pairs(tmp_path / "tars" / "0.tar", 48).parent
    model = tiny_weights(tmp_path / "tiny.safetensors")
    more = ["--train", "all", "--lr", "1e-3", "--epochs", "15", "--checkpoint-every", "2", "--patience", "100"]
    finish(begin(arguments(model, source, tmp_path / "whole", *more)))
    killed = 0
    for _ in range(kills):
        process = begin(arguments(model, source, tmp_path / "killed", *more))
        # The moment is drawn in steps, so that it falls into training on a machine of any speed.
        before = len(read_rows(tmp_path / "killed" / "log.csv"))
        target = before + random_moment.randint(1, 15)
        while process.poll() is None and len(read_rows(tmp_path / "killed" / "log.csv")) < target:
            time.sleep(0.002)
        time.sleep(random_moment.uniform(0, 0.05))
        killed += process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()  # type: ignore[union-attr]
    assert killed == kills, "the training was over before it could be killed"
    finish(begin(arguments(model, source, tmp_path / "killed", *more)))
    whole, again = (read_rows(tmp_path / name / "log.csv") for name in ("whole", "killed"))
    assert [row["step"] for row in again] == [row["step"] for row in whole] == [str(n + 1) for n in range(len(whole))]
    assert [float(row["loss"]) for row in again] == pytest.approx([float(row["loss"]) for row in whole], rel=1e-3)
    dev = [[row["step"] for row in read_rows(tmp_path / name / "dev.csv")] for name in ("whole", "killed")]
    assert dev[0] == dev[1]
    assert (tmp_path / "killed" / "result.json").exists()
