"""Training's parts: losses, freezing, order, schedule, checkpoints, logs, prefix, interpolation."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clipfilter.errors import RefusedError
from clipfilter.models._torch import torch_with_torchvision

torch_with_torchvision()

import open_clip  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from clipfilter.images.preprocess import PreprocessConfig  # noqa: E402
from clipfilter.models.nano import NANO_CONFIG  # noqa: E402
from clipfilter.models.nano.network import Nano  # noqa: E402
from clipfilter.training.batches import CROP_AREA, Loader, epoch_order, random_crop  # noqa: E402
from clipfilter.training.checkpoints import Checkpoints, Position  # noqa: E402
from clipfilter.training.freezing import blocks_of, freeze, train_mode, trainable_names  # noqa: E402
from clipfilter.training.group import Group  # noqa: E402
from clipfilter.training.logs import CsvLog, read_rows  # noqa: E402
from clipfilter.training.losses import backward, contrast, make_loss  # noqa: E402
from clipfilter.training.model import Trainable, load_trainable  # noqa: E402
from clipfilter.training.pairs import PairRequest, Pairs, collect_pairs  # noqa: E402
from clipfilter.training.prefix import Prefix, PrefixStore  # noqa: E402
from clipfilter.training.schedule import learning_rate, make_optimizer  # noqa: E402
from clipfilter.training.settings import TrainSettings  # noqa: E402
from clipfilter.training.wiseft import Point, choose, interpolate  # noqa: E402
from tests.support.engine import PHOTOS  # noqa: E402
from tests.support.sources import write_webdataset  # noqa: E402
from tests.support.training import TINY_SIGMOID, tiny_weights, write_pairs  # noqa: E402

CLIP = PreprocessConfig(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    folder = tmp_path_factory.mktemp("pairs")
    write_pairs(folder / "tars" / "0.tar", 40)
    collect_pairs(PairRequest(str(folder / "tars")), folder / "train.arrow", 1)
    return Pairs(folder / "train.arrow")


@pytest.fixture
def tiny(tmp_path: Path) -> Trainable:
    return load_trainable(tiny_weights(tmp_path / "tiny.safetensors"))


@pytest.fixture
def sigmoid(tmp_path: Path) -> Trainable:
    return load_trainable(tiny_weights(tmp_path / "sigmoid.safetensors", TINY_SIGMOID))


# --- losses -----------------------------------------------------------------------------------------------------------


def gradients(model: Trainable, loader: Loader, kind: str) -> tuple[float, dict[str, Tensor]]:
    model.module.zero_grad()
    batches = next(iter(loader.steps(0)))
    loss = make_loss(kind, Group())

    def features(number: int) -> tuple[Tensor, Tensor]:
        image = model.image_features(batches[number].images)
        text = model.text_features(batches[number].texts)
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def value(images: Tensor, texts: Tensor) -> Tensor:
        return contrast(loss, images, texts, model.logit_scale, model.logit_bias)

    found = backward(features, len(batches), value, lambda loss: loss)
    return float(found), {n: p.grad.clone() for n, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_accumulated_micro_batches_have_the_gradients_of_one_batch(
    kind: str, tiny: Trainable, sigmoid: Trainable, pairs: Pairs
) -> None:
    model = sigmoid if kind == "siglip" else tiny
    names = {name for name, _ in freeze(model.module, "all")}
    whole_loss, whole = gradients(model, Loader(pairs, CLIP, 0, 32, 1, True, 1), kind)
    parts_loss, parts = gradients(model, Loader(pairs, CLIP, 0, 8, 4, True, 1), kind)
    assert parts_loss == pytest.approx(whole_loss, rel=1e-5)
    assert set(parts) == set(whole) == names
    for name in names:
        scale = float(whole[name].abs().max()) + 1e-6
        assert float((parts[name] - whole[name]).abs().max()) < 2e-3 * scale, name
    assert float(whole["logit_scale"].abs()) > 1e-5  # counted once, not once per micro-batch


# --- freezing ---------------------------------------------------------------------------------------------------------


def nano() -> Nano:
    return Nano(json.loads(NANO_CONFIG.read_text())["network"])


def prefixes(names: set[str], depth: int) -> set[str]:
    return {".".join(name.split(".")[:depth]) for name in names}


def test_heads_of_an_open_clip_model(tiny: Trainable) -> None:
    assert trainable_names(tiny.module, "heads") == {"visual.proj", "text_projection", "logit_scale"}


def test_last_blocks_are_the_last_and_all_behind_them(tiny: Trainable) -> None:
    names = trainable_names(tiny.module, "last-2-blocks")
    blocks = {name for name in names if "resblocks" in name}
    assert prefixes({n for n in blocks if n.startswith("visual")}, 4) == {
        "visual.transformer.resblocks.1",
        "visual.transformer.resblocks.2",
    }
    assert prefixes({n for n in blocks if not n.startswith("visual")}, 3) == {
        "transformer.resblocks.1",
        "transformer.resblocks.2",
    }
    assert names - blocks == {
        "visual.proj", "visual.ln_post.weight", "visual.ln_post.bias", "ln_final.weight", "ln_final.bias",
        "text_projection", "logit_scale",
    }  # fmt: skip


def test_one_tower_alone(tiny: Trainable) -> None:
    names = trainable_names(tiny.module, "image:last-1-block")
    assert all(name.startswith("visual.") or name == "logit_scale" for name in names)
    both = trainable_names(tiny.module, "image:last-1-block,text:heads")
    assert both - names == {"text_projection"}


def test_blocks_of_nano_are_those_of_its_bodies() -> None:
    network = nano()
    image = blocks_of(network, "image")
    assert len(image) == 21
    assert image[0] == "image_body.blocks.0.0"
    assert image[-1] == "image_body.blocks.6.0"
    assert blocks_of(network, "text") == [f"text_body.blocks.{i}" for i in range(6)]
    names = trainable_names(network, "last-2-blocks")
    assert prefixes({n for n in names if n.startswith("image_body.blocks")}, 4) == set(image[-2:])
    assert {n for n in names if n.startswith("text_body")} == {
        n for n in names if n.startswith(("text_body.blocks.4.", "text_body.blocks.5."))
    }
    assert {n for n, _ in network.named_parameters() if n.startswith(("image_head.", "text_head."))} <= names
    assert "image_body.conv_head.weight" in names
    assert "image_body.conv_stem.weight" not in names


@pytest.mark.parametrize("architecture", ["RN50", "convnext_base", "ViT-B-32"])
def test_blocks_of_published_architectures_are_found(architecture: str) -> None:
    with torch.device("meta"):
        model = open_clip.create_model(architecture, device="meta", pretrained_text=False, load_weights=False)
    count = {"RN50": 16, "convnext_base": 36, "ViT-B-32": 12}[architecture]
    assert len(blocks_of(model, "image")) == count
    assert len(blocks_of(model, "text")) == 12
    last = trainable_names(model, "last-1-block")
    assert 0 < len(last) < len(trainable_names(model, "last-2-blocks")) < len(trainable_names(model, "all"))
    assert not any("conv1" in name and ".layer" not in name for name in last)


@pytest.mark.parametrize("rule", ["head", "last-0-blocks", "last-9-blocks", "", "image:nothing"])
def test_other_rules_are_refused(rule: str, tiny: Trainable) -> None:
    with pytest.raises(RefusedError):
        trainable_names(tiny.module, rule)


def test_frozen_batch_norms_and_frozen_dropout_stay_as_at_inference() -> None:
    def part() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = part(), part()

    model = Model()
    model.first.requires_grad_(False)
    train_mode(model)
    assert not any(module.training for module in model.first.modules())
    assert all(module.training for module in model.last.modules())
    before = model.first[1].running_mean.clone()
    model.last(model.first(torch.randn(8, 4)))
    assert torch.equal(model.first[1].running_mean, before)
    assert not torch.equal(model.last[1].running_mean, before)


def test_the_frozen_prefix_leaves_nothing_for_the_backward_pass(tiny: Trainable) -> None:
    freeze(tiny.module, "last-1-block")
    blocks = tiny.module.visual.transformer.resblocks
    seen: dict[int, bool] = {}
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda m, i, output, number=number: seen.update({number: output.requires_grad}))
    tiny.image_features(np.zeros((2, 3, 32, 32), np.uint8))
    assert seen == {0: False, 1: False, 2: True}


# --- the frozen prefix ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "nano"])
def test_replayed_prefixes_give_the_same_features_and_gradients(kind: str, tiny: Trainable, pairs: Pairs) -> None:
    model = tiny if kind == "tiny" else load_trainable("nano", threads=1)
    freeze(model.module, "image:last-1-block" if kind == "tiny" else "heads")
    size = model.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, size, size), np.uint8)
    prefix = Prefix(model)
    assert prefix.blocks == (2 if kind == "tiny" else 21)
    recorded = prefix.record(pixels)
    found, gradient = [], []
    for features in (model.image_features(pixels), prefix.features(recorded)):
        model.module.zero_grad()
        features.square().sum().backward()
        found.append(features.detach())
        gradient.append([p.grad.clone() for p in model.module.parameters() if p.grad is not None])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    for one, two in zip(*gradient, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_nothing_is_replayed_when_the_stem_trains(tiny: Trainable) -> None:
    freeze(tiny.module, "all")
    assert Prefix(tiny).blocks == 0


def test_a_store_answers_for_subsets(tiny: Trainable, pairs: Pairs) -> None:
    freeze(tiny.module, "last-1-block")
    store = PrefixStore(Prefix(tiny), 1)
    some = pairs.subset(np.array([7, 3, 30]))
    assert store.embed(some) is None
    store.collect(pairs, tiny.preprocess)
    from clipfilter.training.measuring import embed_images

    np.testing.assert_allclose(store.embed(some), embed_images(tiny.encoder, some, 1), atol=1e-5)


# --- data -------------------------------------------------------------------------------------------------------------


def test_unusable_rows_are_counted_and_left_out(tmp_path: Path) -> None:
    with open(PHOTOS / "coffee.jpg", "rb") as handle:
        good = handle.read()
    rows = [
        {"__key__": "0", "jpg": good, "txt": "coffee", "json": {"part": "train"}},
        {"__key__": "1", "jpg": good[: len(good) // 2], "txt": "half a cup", "json": {"part": "train"}},
        {"__key__": "2", "jpg": good, "txt": "  ", "json": {"part": "train"}},
        {"__key__": "3", "jpg": good, "txt": "other", "json": {"part": "dev"}},
        {"__key__": "4", "jpg": b"<html>", "txt": "page", "json": {"part": "train"}},
    ]
    write_webdataset(tmp_path / "tars" / "0.tar", rows)
    request = PairRequest(str(tmp_path / "tars"), where=("part=train",))
    counts = collect_pairs(request, tmp_path / "pairs.arrow", 2)
    assert (counts.rows, counts.used, counts.without_caption, counts.failed) == (4, 1, 1, {"decode_error": 2})
    found = Pairs(tmp_path / "pairs.arrow")
    assert found.captions(0) == ["coffee"]
    assert bytes(found.image(0)) == good
    both = collect_pairs(PairRequest(request.url, ("part=train", "part=dev")), tmp_path / "both.arrow", 1)
    assert both.rows == 5
    with pytest.raises(RefusedError, match="no column 'split'"):
        collect_pairs(PairRequest(request.url, ("split=train",)), tmp_path / "none.arrow", 1)
    with pytest.raises(RefusedError, match="has no row where part=test"):
        collect_pairs(PairRequest(request.url, ("part=test",)), tmp_path / "none.arrow", 1)
    assert not list(tmp_path.glob("none*"))


def test_halves_and_held_out_parts_are_disjoint_and_stable(pairs: Pairs) -> None:
    one, two = pairs.halves()
    assert sorted([*one.rows, *two.rows]) == list(range(40))
    assert min(len(one), len(two)) > 10
    again, _ = pairs.halves()
    assert list(again.rows) == list(one.rows)
    rest, held = pairs.hold_out(0.25)
    assert len(rest) + len(held) == 40
    assert not set(rest.rows) & set(held.rows)


def contents(steps: Iterator[list]) -> list[list[tuple[np.ndarray, list[str]]]]:  # type: ignore[type-arg]
    return [[(batch.images, batch.texts) for batch in step] for step in steps]


def test_two_workers_see_together_what_one_sees(pairs: Pairs) -> None:
    one = contents(Loader(pairs, CLIP, 5, 8, 2, True, 1).steps(1))
    left, right = (contents(Loader(pairs, CLIP, 5, 8, 1, True, 1, None, r, 2).steps(1)) for r in (0, 1))
    assert len(one) == len(left) == 2
    for step, a, b in zip(one, left, right, strict=True):
        for (images, texts), (worker_images, worker_texts) in zip(step, [*a, *b], strict=True):
            assert texts == worker_texts
            assert np.array_equal(images, worker_images)


def test_an_epoch_can_be_entered_at_any_step(pairs: Pairs) -> None:
    loader = Loader(pairs, CLIP, 5, 8, 1, True, 2)
    whole, rest = contents(loader.steps(0)), contents(loader.steps(0, 3))
    assert len(whole) == 5
    assert [texts for step in rest for _, texts in step] == [texts for step in whole[3:] for _, texts in step]
    assert all(np.array_equal(a[0][0], b[0][0]) for a, b in zip(rest, whole[3:], strict=True))


def test_epochs_differ_in_order_caption_and_crop_and_seeds_too(pairs: Pairs) -> None:
    assert list(epoch_order(0, 0, 40)) != list(epoch_order(0, 1, 40)) != list(epoch_order(1, 0, 40))
    loader = Loader(pairs, CLIP, 0, 8, 1, True, 1)
    drawn = [loader._row(epoch, 0) for epoch in range(12)]
    assert len({text for _, text in drawn}) == 2
    assert len({image.tobytes() for image, _ in drawn}) > 8
    plain = Loader(pairs, CLIP, 0, 8, 1, False, 1)
    assert len({plain._row(epoch, 0)[0].tobytes() for epoch in range(12)}) == 1


@pytest.mark.parametrize(("width", "height"), [(640, 480), (100, 1000), (900, 40), (1, 1)])
def test_crops_are_inside_and_of_the_size_asked_for(width: int, height: int) -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        left, top, w, h = random_crop(width, height, generator)
        assert left >= 0
        assert top >= 0
        assert 0 < w <= width - left
        assert 0 < h <= height - top
        if (width, height) == (640, 480):
            assert CROP_AREA[0] - 0.01 <= w * h / (width * height) <= 1
            assert 0.74 < w / h < 1.34


# --- schedule, checkpoints, logs --------------------------------------------------------------------------------------


def test_the_rate_rises_to_its_peak_and_falls_to_zero() -> None:
    rates = [learning_rate(step, 100, 10, 1e-3) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[9] == pytest.approx(1e-3)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 1e-6
    assert learning_rate(55, 100, 10, 1e-3) == pytest.approx(1e-3 * (1 + math.cos(math.pi / 2)) / 2)


def test_gains_biases_and_temperature_are_not_decayed(tiny: Trainable) -> None:
    named = freeze(tiny.module, "all")
    optimizer = make_optimizer(named, 1e-3, 0.1)
    names = {id(p): name for name, p in named}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert set(groups) == {0.0, 0.1}
    assert {
        "logit_scale",
        "ln_final.weight",
        "visual.ln_post.bias",
        "transformer.resblocks.0.attn.in_proj_bias",
    } <= groups[0.0]
    assert {"visual.proj", "text_projection", "visual.conv1.weight"} <= groups[0.1]
    assert len(groups[0.0]) + len(groups[0.1]) == len(named)


def test_old_checkpoints_go_but_the_best_stays(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (10, 20, 30, 40):
        checkpoints.write(Position(step=step, best_step=10), {"w": torch.full((2,), float(step))}, {"optimizer": {}})
    assert checkpoints.steps() == [10, 30, 40]
    assert checkpoints.position() == Position(step=40, best_step=10)
    assert checkpoints.weights(10)["w"].tolist() == [10, 10]
    (tmp_path / ".step-00000050.part").mkdir()  # a kill while writing
    assert checkpoints.steps()[-1] == 40
    checkpoints.write(Position(step=50, best_step=50), {"w": torch.ones(2)}, {"optimizer": {}})
    assert checkpoints.steps() == [40, 50]


def test_a_log_is_continued_where_the_checkpoint_stands(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    log = CsvLog(path, ("step", "loss"))
    log.continue_after(-1)
    for step in range(1, 6):
        log.write({"step": step, "loss": step / 10})
    log.close()
    with open(path, "a") as handle:
        handle.write("6,0.")  # cut short
    log = CsvLog(path, ("step", "loss"))
    log.continue_after(3)
    log.write({"step": 4, "loss": 9})
    log.close()
    assert [row["step"] for row in read_rows(path)] == ["1", "2", "3", "4"]
    assert read_rows(path)[-1]["loss"] == "9"


# --- interpolation ----------------------------------------------------------------------------------------------------


def test_interpolation_goes_from_before_to_after() -> None:
    before = {"w": torch.zeros(3), "n": torch.tensor(1)}
    after = {"w": torch.full((3,), 2.0), "n": torch.tensor(5)}
    assert interpolate(before, after, 0.0)["w"].tolist() == [0, 0, 0]
    assert interpolate(before, after, 0.25)["w"].tolist() == [0.5, 0.5, 0.5]
    assert interpolate(before, after, 1.0)["w"].tolist() == [2, 2, 2]
    assert int(interpolate(before, after, 0.5)["n"]) == 5


def test_the_best_dev_measure_within_the_allowed_loss_is_chosen() -> None:
    points = [Point(0.0, 0.50, 0.600), Point(0.3, 0.60, 0.595), Point(0.5, 0.65, 0.590), Point(1.0, 0.70, 0.500)]
    assert choose(points, 1.0).alpha == 0.5
    assert choose(points, 0.6).alpha == 0.3
    assert choose(points, 0.0).alpha == 0.0
    assert choose(points, 10.0).alpha == 1.0
    assert choose([Point(p.alpha, p.dev, None) for p in points], 1.0).alpha == 1.0
    assert choose([Point(0.0, 0.5, 0.6), Point(0.1, 0.5, 0.6)], 1.0).alpha == 0.0


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"lr": 0.0}, "--lr must be above 0"),
        ({"lr": math.nan}, "--lr must be above 0"),
        ({"dtype": "fp16"}, "needs a GPU"),
        ({"workers": 2}, "--engine ray"),
        ({"where": ("split",)}, "column=value"),
        ({"log": ("csv", "wandb")}, "wandb"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object], says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        TrainSettings("source", "nano", "out", **wrong)  # type: ignore[arg-type]


def test_only_what_changes_the_result_makes_another_run() -> None:
    begun = TrainSettings("source", "nano", "out", lr=1e-4)
    stored = json.loads(json.dumps(begun.to_json()))
    assert (
        TrainSettings("source", "nano", "elsewhere", lr=1e-4, threads=3, log=("csv", "tensorboard")).differences(stored)
        == []
    )
    assert TrainSettings("source", "nano", "out", lr=2e-4, where=("a=b",)).differences(stored) == [
        "lr: 0.0001 then, 0.0002 now",
        "where: () then, ('a=b',) now",
    ]
