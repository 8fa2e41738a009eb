"""`clipfilter train` as a person uses it, its result in a run, and two Ray workers that equal one."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from safetensors.torch import load_file

from clipfilter.errors import RefusedError
from clipfilter.training import TrainSettings, train
from clipfilter.training.logs import read_rows
from tests.support.engine import cli
from tests.support.training import arguments, write_pairs

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("train") / "tars" / "0.tar", 40).parent


@pytest.fixture(scope="module")
def tuned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A fine-tuned nano, and what the command printed."""
    out = tmp_path_factory.mktemp("tuned") / "out"
    more = [
        "--train",
        "last-2-blocks",
        "--lr",
        "1e-3",
        "--no-augment",
        "--where",
        "part=train",
        "--dev-where",
        "part=dev",
    ]
    done = cli(*arguments("nano", source, out, *more, "--epochs", "1"))
    return out, done.stdout + done.stderr


def test_the_command_says_what_it_trains_and_prints_the_table(tuned: tuple[Path, str]) -> None:
    out, printed = tuned
    assert "train: 30 of 30 rows" in printed
    assert "trains (last-2-blocks): image tower" in printed
    assert "before" in printed
    assert "interpolated" in printed
    assert f"--model nano={out}/model.safetensors" in printed


def test_the_result_is_a_model_for_a_run(tuned: tuple[Path, str], source: Path, tmp_path: Path) -> None:
    model = f"nano={tuned[0] / 'model.safetensors'}"
    done = cli("run", str(source), "--policy", "demo", "--model", model, "--out", str(tmp_path / "run"), "--json")
    result = json.loads(done.stdout)
    assert result["totals"]["rows"] == 40
    assert result["plan"]["model"]["model"] == "nano=model.safetensors"


def test_a_changed_command_is_refused_with_exit_code_2(tuned: tuple[Path, str], source: Path) -> None:
    done = cli(*arguments("nano", source, tuned[0], "--seed", "1"), check=False)
    assert done.returncode == 2
    assert "seed: 0 then, 1 now" in done.stderr


@pytest.mark.cores
def test_two_ray_workers_train_as_one_with_twice_the_batch(source: Path, tmp_path: Path) -> None:
    def settings(name: str, batch_size: int, **more: object) -> TrainSettings:
        return TrainSettings(
            str(source), "nano", str(tmp_path / name), train="heads", epochs=2, batch_size=batch_size, lr=1e-3,
            augment=False, where=("part=train",), dev_where=("part=dev",), threads=1, **more,
        )  # fmt: skip

    one, two = settings("one", 12), settings("two", 6, engine="ray", workers=2)
    train(one)
    # In a process of its own: Ray takes the cluster's token once in a process, and another test's may be in this one.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        pool.submit(train, two).result()
    logs = [read_rows(tmp_path / name / "log.csv") for name in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 4
    for column in ("loss", "logit_scale", "gradient_norm"):
        assert [float(row[column]) for row in logs[1]] == pytest.approx(
            [float(row[column]) for row in logs[0]], rel=2e-3
        )
    weights = [load_file(tmp_path / name / "checkpoints/step-00000004/weights.safetensors") for name in ("one", "two")]
    start = load_file(tmp_path / "one/checkpoints/step-00000002/weights.safetensors")
    moved = sum(float((weights[0][n] - start[n]).norm()) for n in start)
    apart = sum(float((weights[0][n] - weights[1][n]).norm()) for n in start)
    assert apart < 0.05 * moved
    assert not (tmp_path / "two" / ".ray").exists()


def test_a_cluster_that_does_not_answer_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="no Ray cluster answers"):
        train(
            TrainSettings(
                str(source),
                "nano",
                str(tmp_path / "out"),
                train="heads",
                batch_size=6,
                engine="ray",
                address="127.0.0.1:1",
                threads=1,
            )
        )
