"""A whole training of a tiny model: it learns, resumes exactly, refuses what would mix runs, and its result loads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clipfilter.errors import RefusedError
from clipfilter.models import load_encoder
from clipfilter.training import TrainSettings, train
from clipfilter.training.logs import read_rows
from clipfilter.training.loop import Shown
from tests.support.training import TINY, TINY_SIGMOID, tiny_weights, write_pairs

pytestmark = pytest.mark.integration  # whole trainings: half a minute together


class Killed(BaseException):
    pass


@pytest.fixture(scope="module")
def begin(tmp_path_factory: pytest.TempPathFactory) -> TrainSettings:
    """48 pairs, a tiny model and settings under which it learns something in a few steps."""
    folder = tmp_path_factory.mktemp("training")
    write_pairs(folder / "tars" / "0.tar", 48)
    return TrainSettings(
        source=str(folder / "tars"), model=tiny_weights(folder / "tiny.safetensors"), out="", train="all", epochs=4,
        batch_size=6, accumulate=2, lr=2e-3, where=("part=train",), dev_where=("part=dev",),
        zero_shot=str(folder / "tars"), label_column="name", checkpoint_every=2, threads=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(begin: TrainSettings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "out"
    train(replace(begin, out=str(out)), command=("clipfilter", "train", "a|b`c`"))
    return out


def losses(out: Path) -> list[float]:
    return [float(row["loss"]) for row in read_rows(out / "log.csv")]


def test_it_learns_and_logs_every_step(finished: Path) -> None:
    rows = read_rows(finished / "log.csv")
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    assert losses(finished)[-1] < losses(finished)[0] - 0.1
    dev = read_rows(finished / "dev.csv")
    assert [(row["step"], row["epoch"]) for row in dev] == [("0", "0"), ("3", "1"), ("6", "2"), ("9", "3"), ("12", "4")]


def test_the_result_says_what_was_chosen_and_what_is_reported(finished: Path, begin: TrainSettings) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert set(result["reported"]) == {"before", "after", "interpolated"}
    assert list(result["chosen_on"]["by_alpha"]) == [f"{i / 10:g}" for i in range(11)]
    assert result["chosen_on"]["pairs"] + result["reported_on"]["pairs"] == 12
    assert result["chosen_on"]["labelled"] + result["reported_on"]["labelled"] == 48
    by_alpha = {float(a): m for a, m in result["chosen_on"]["by_alpha"].items()}
    allowed = {a: m for a, m in by_alpha.items() if by_alpha[0.0]["zero_shot_top1"] - m["zero_shot_top1"] <= 0.01}
    assert result["alpha"] in allowed
    assert allowed[result["alpha"]]["recall_at_10"] == max(m["recall_at_10"] for m in allowed.values())
    assert not (finished / ".pairs").exists()
    card = (finished / "MODEL_CARD.md").read_text()
    for text in ("part=train", "zero-shot top-1", "| before | after | interpolated |", "a|b'c'"):
        assert text in card


def test_both_files_load_and_are_what_the_table_says(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    name, _, _ = result["load"].partition("=")
    assert name == TINY
    model, tuned = (
        load_encoder(f"{name}={finished / file}") for file in ("model.safetensors", "finetuned.safetensors")
    )
    assert model.dim == tuned.dim == 16
    assert model.fingerprint["weights_sha256"] != tuned.fingerprint["weights_sha256"] or result["alpha"] == 1


def test_a_finished_run_computes_nothing_again(finished: Path, begin: TrainSettings) -> None:
    result = train(replace(begin, out=str(finished)))
    assert not result.computed
    assert result.summary == json.loads((finished / "result.json").read_text())


@pytest.mark.parametrize("at", [1, 5, 12])
def test_a_run_stopped_anywhere_continues_to_the_same_losses(
    at: int, begin: TrainSettings, finished: Path, tmp_path: Path
) -> None:
    settings = replace(begin, out=str(tmp_path / "out"))

    def stop(step: Shown) -> None:
        if step.step == at:
            raise Killed

    with pytest.raises(Killed):
        train(settings, show=stop)
    assert not (tmp_path / "out" / "result.json").exists()
    train(settings)
    assert [row["step"] for row in read_rows(tmp_path / "out" / "log.csv")] == [str(n) for n in range(1, 13)]
    assert losses(tmp_path / "out") == pytest.approx(losses(finished), rel=1e-4)
    assert len(read_rows(tmp_path / "out" / "dev.csv")) == 5


def test_another_command_on_the_same_folder_is_refused(finished: Path, begin: TrainSettings, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"lr: 0.002 then, 0.001 now"):
        train(replace(begin, out=str(finished), lr=1e-3))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RefusedError, match="holds something else"):
        train(replace(begin, out=str(tmp_path)))


def test_training_stops_when_the_dev_measure_no_longer_rises(begin: TrainSettings, tmp_path: Path) -> None:
    settings = replace(
        begin, out=str(tmp_path / "out"), epochs=30, lr=1e-9, patience=2, zero_shot=None, train="heads", augment=False,
        dev_measure="recall@10",
    )  # fmt: skip
    result = train(settings)
    assert result.summary["epochs"] == 3
    assert result.summary["best_step"] == 3


def test_training_from_scratch_with_the_sigmoid_loss(begin: TrainSettings, tmp_path: Path) -> None:
    settings = replace(
        begin, out=str(tmp_path / "out"), model=TINY_SIGMOID, from_scratch=True, loss="siglip", zero_shot=None, dev_where=(),
        where=(), epochs=2,
    )  # fmt: skip
    result = train(settings)
    assert result.summary["alpha"] == 1
    assert losses(tmp_path / "out")[-1] < losses(tmp_path / "out")[0]
    encoder = load_encoder(result.summary["load"])
    assert encoder.score_kind == "sigmoid"


def test_tensorboard_gets_the_same_numbers(begin: TrainSettings, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    train(replace(begin, out=str(out), epochs=1, zero_shot=None, log=("csv", "tensorboard")))
    events: Any = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(out))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_size": 64}, "a step needs 128 pairs"),
        ({"loss": "siglip"}, "needs a model with a logit bias"),
        ({"train": "last-7-blocks"}, "has 3 blocks"),
        ({"zero_shot": None, "dev_where": ("part=nothing",)}, "has no row where part=nothing"),
        ({"label_column": "kind"}, "no column 'kind'"),
        ({"from_scratch": True}, "bare open_clip architecture"),
        ({"from_scratch": True, "model": "ViT-Z-1"}, "no architecture 'ViT-Z-1'"),
        ({"model": "ViT-B-32=/nowhere.safetensors"}, "does not exist"),
        ({"out": "s3://bucket/out"}, "local path"),
    ],
)
def test_what_cannot_be_done_is_refused(
    change: dict[str, Any], says: str, begin: TrainSettings, tmp_path: Path
) -> None:
    with pytest.raises(RefusedError, match=says):
        train(replace(begin, **{"out": str(tmp_path / "out"), **change}))


def test_two_trainings_never_share_a_folder(begin: TrainSettings, tmp_path: Path) -> None:
    settings = replace(begin, out=str(tmp_path / "out"), epochs=1, zero_shot=None)

    def again(step: Shown) -> None:
        with pytest.raises(RefusedError, match="another training"):
            train(settings)

    train(settings, show=again)
