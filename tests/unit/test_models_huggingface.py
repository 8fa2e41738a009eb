"""Models of transformers: the same numbers as transformers and as open_clip, and one sentence for what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers (extra hf) is not installed")

from tests.support.models import (  # isort: skip  (torchvision must be made importable first)
    ACTIVATIONS,
    TEXTS,
    clip_folder,
    clip_to_open_clip,
    copy,
    edit_json,
    pictures,
    register,
    save,
    siglip2_folder,
    siglip_folder,
    siglip_to_open_clip,
    siglip_tokenizer_files,
    spread,
    tiny_config,
    tiny_siglip_config,
    write_files,
)

import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, SiglipImageProcessor

from clipfilter.errors import RefusedError
from clipfilter.images.preprocess import prepare
from clipfilter.models import load_encoder
from clipfilter.models.encoder import TorchEncoder

CAPTIONS = ["a photo of a dog", "two men play football in the rain", "A Red Car!", "ein Hund", "", "word " * 200]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "clip"
    clip_folder(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "siglip"
    siglip_folder(folder)
    return folder


@pytest.fixture(scope="module", params=["right", "left"])
def siglip2(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "siglip2"
    siglip2_folder(folder, request.param)
    return folder


def scores(encoder: Any) -> np.ndarray:
    """Cosines [images, texts] of the sample photographs and the captions."""
    images = encoder.encode_images(np.stack([prepare(picture, encoder.preprocess) for picture in pictures()]))
    return images @ encoder.encode_texts(CAPTIONS).T


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_vectors_are_transformers_own(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    encoder = load_encoder(f"hf:{folder}")
    assert isinstance(encoder, TorchEncoder)
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(
        CAPTIONS, padding="max_length", truncation=True, max_length=encoder.context_length, return_tensors="pt"
    )
    pixels = np.stack([prepare(picture, encoder.preprocess) for picture in pictures()])
    with torch.no_grad():
        texts = model.get_text_features(input_ids=ids["input_ids"]).pooler_output
        images = model.get_image_features(pixel_values=encoder.normalise(pixels)).pooler_output
    for mine, theirs in ((encoder.encode_texts(CAPTIONS), texts), (encoder.encode_images(pixels), images)):
        theirs = torch.nn.functional.normalize(theirs, dim=-1).numpy()
        assert np.abs(mine - theirs).max() <= 1e-5
        assert 1 - (mine * theirs).sum(1).min() <= 1e-6
    assert encoder.score_kind == ("softmax" if kind == "clip" else "sigmoid")
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert encoder.dim == texts.shape[1]
    assert encoder.count_truncated(CAPTIONS) == 1


@pytest.mark.parametrize(("quick_gelu", "hidden_act"), ACTIVATIONS)
def test_a_clip_scores_the_same_through_open_clip(quick_gelu: bool, hidden_act: str, tmp_path: Path) -> None:
    model = clip_folder(tmp_path / "hf", hidden_act)
    name = register("clipfilter-test-clip", tiny_config(quick_gelu), tmp_path)
    path = save(clip_to_open_clip(model.state_dict()), tmp_path / "weights.safetensors")
    theirs, ours = load_encoder(f"hf:{tmp_path / 'hf'}"), load_encoder(f"{name}={path}")
    assert theirs.fingerprint["activation"] == ours.fingerprint["activation"] == hidden_act
    assert theirs.preprocess == ours.preprocess
    a, b = scores(theirs), scores(ours)
    assert np.abs(a - b).max() <= 0.01 * spread(a)
    # The bound can fail: the other activation is farther away than that.
    wrong = register("clipfilter-test-clip-wrong", tiny_config(not quick_gelu), tmp_path)
    assert np.abs(scores(load_encoder(f"{wrong}={path}")) - a).max() > 0.01 * spread(a)


def test_a_siglip_scores_the_same_through_open_clip(siglip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    name = register("clipfilter-test-siglip", tiny_siglip_config(), tmp_path)
    write_files(siglip_tokenizer_files(), tmp_path)
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash", "size": 32}
    config = {"model_cfg": tiny_siglip_config(), "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    path = save(siglip_to_open_clip(load_file(siglip / "model.safetensors")), tmp_path / "weights.safetensors")
    theirs, ours = load_encoder(f"hf:{siglip}"), load_encoder(f"{name}={path}")
    assert theirs.preprocess == ours.preprocess
    assert (theirs.logit_scale, theirs.logit_bias) == pytest.approx((ours.logit_scale, ours.logit_bias))
    a, b = scores(theirs), scores(ours)
    assert np.abs(a - b).max() <= 0.01 * spread(a)


def test_siglip_2_is_padded_on_the_side_that_its_tokenizer_says(siglip2: Path) -> None:
    from transformers import AutoModel

    encoder = load_encoder(f"hf:{siglip2}")
    tokenizer = AutoTokenizer.from_pretrained(siglip2)
    ids = tokenizer(list(TEXTS), padding="max_length", truncation=True, max_length=64, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(siglip2).eval().get_text_features(input_ids=ids).pooler_output
    theirs = torch.nn.functional.normalize(theirs, dim=-1).numpy()
    assert np.abs(encoder.encode_texts(TEXTS) - theirs).max() <= 1e-5
    assert encoder.count_truncated(TEXTS) >= 3


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_ids_are_transformers_own_and_odd_texts_do_no_harm(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    encoder = load_encoder(f"hf:{folder}")
    assert isinstance(encoder, TorchEncoder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = tokenizer(list(TEXTS), padding=False, truncation=False)["input_ids"]
    mine = encoder.tokenizer.encode(TEXTS)
    assert mine == whole
    length = encoder.context_length
    cut = tokenizer(list(TEXTS), padding="max_length", truncation=True, max_length=length)["input_ids"]
    padded = [ids + [encoder.tokenizer.pad_id] * (length - len(ids)) for ids in map(encoder.truncate, mine)]
    assert padded == cut
    assert encoder.count_truncated(TEXTS) == sum(len(ids) > length for ids in whole) >= 2
    vectors = encoder.encode_texts(TEXTS)
    assert np.isfinite(vectors).all()
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_images_are_prepared_as_transformers_does(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    encoder = load_encoder(f"hf:{folder}")
    assert isinstance(encoder, TorchEncoder)
    processor = (CLIPImageProcessor if kind == "clip" else SiglipImageProcessor).from_pretrained(folder)
    rgb = np.random.default_rng(0).integers(0, 256, (160, 192, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(rgb), return_tensors="np")["pixel_values"][0]
    mine = encoder.normalise(prepare(rgb, encoder.preprocess)[None])[0].numpy()
    # Its resizing works in 16-bit fixed point: single levels of 255 may differ.
    assert np.abs(mine - theirs).max() <= 1.01 / 255 / min(encoder.preprocess.std)


@pytest.mark.parametrize("surplus", range(9))
def test_only_the_documented_crops_differ_by_one_pixel(surplus: int, clip: Path) -> None:
    encoder = load_encoder(f"hf:{clip}")
    assert isinstance(encoder, TorchEncoder)
    rgb = np.random.default_rng(0).integers(0, 256, (32 + surplus, 32, 3), dtype=np.uint8)
    theirs = CLIPImageProcessor.from_pretrained(clip)(Image.fromarray(rgb), return_tensors="np")["pixel_values"][0]
    mine = encoder.normalise(prepare(rgb, encoder.preprocess)[None])[0].numpy()
    if surplus % 4 == 3:
        mine, theirs = mine[:, :-1], theirs[:, 1:]
    assert np.abs(mine - theirs).max() <= 1e-5


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_half_precision_is_the_same_model(kind: str, dtype: Any, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    full, half = load_encoder(f"hf:{folder}"), load_encoder(f"hf:{folder}", dtype=dtype)
    assert half.fingerprint == {**full.fingerprint, "dtype": dtype}
    assert half.logit_scale == full.logit_scale
    assert (half.encode_texts(CAPTIONS) * full.encode_texts(CAPTIONS)).sum(1).min() > 0.999


def test_sharded_and_pickled_weights_are_the_same_weights(clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(clip / "model.safetensors")
    whole = load_encoder(f"hf:{clip}")
    pickled, sharded = copy(clip, tmp_path / "pickled"), copy(clip, tmp_path / "sharded")
    for folder in (pickled, sharded):
        (folder / "model.safetensors").unlink()
    torch.save(state, pickled / "pytorch_model.bin")
    names = sorted(state)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save({name: state[name] for name in part}, sharded / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder in (pickled, sharded):
        np.testing.assert_array_equal(
            load_encoder(f"hf:{folder}").encode_texts(["a dog"]), whole.encode_texts(["a dog"])
        )
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"lacks model-00002-of-00002"):
        load_encoder(f"hf:{sharded}")


# --- refusals: each names what is wrong


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ("config.json", {"model_type": "blip"}, "'blip', which is no CLIP"),
        ("config.json", {"model_type": "siglip2"}, "NaFlex"),
        ("config.json", {"projection_dim": 12}, r"do not fit its config.json.*24.*12"),
        ("config.json", {"vision_config__num_hidden_layers": 3}, "do not fit its config.json"),
        ("config.json", {"vision_config__image_size": 64}, r"images of 32 pixels .* takes 64"),
        ("config.json", {"vision_config__hidden_act": "no-such"}, "transformers cannot build"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}, "auto_map"),
        ("preprocessor_config.json", {"size": {"shortest_edge": 64}}, "only equal sizes"),
        ("preprocessor_config.json", {"resample": 1}, "resample 1 is neither"),
        ("preprocessor_config.json", {"do_center_crop": False}, "not be square"),
        ("preprocessor_config.json", {"do_normalize": False}, "do_normalize is off"),
        ("preprocessor_config.json", {"rescale_factor": 1.0}, "multiplied by 1.0"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "three numbers"),
        ("preprocessor_config.json", {"rescale_factor": "a lot"}, "not what it should be"),
        ("preprocessor_config.json", {"size": {"shortest_edge": None}}, "not what it should be"),
        ("preprocessor_config.json", {"size": {"height": 32, "width": 48}}, "its size is"),
    ],
)
def test_what_contradicts_itself_is_refused(
    file: str, changes: dict[str, Any], says: str, clip: Path, tmp_path: Path
) -> None:
    folder = copy(clip, tmp_path / "copy")
    edit_json(folder / file, **changes)
    with pytest.raises(RefusedError, match=says):
        load_encoder(f"hf:{folder}")


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("config.json", r"has no config\.json"),
        ("model.safetensors", r"no weights: copy model\.safetensors"),
        ("preprocessor_config.json", r"copy preprocessor_config\.json"),
        ("vocab.json", r"has no tokenizer: put its tokenizer\.json"),
    ],
)
def test_a_missing_file_is_named(file: str, says: str, clip: Path, tmp_path: Path) -> None:
    folder = copy(clip, tmp_path / "copy")
    (folder / file).unlink()
    with pytest.raises(RefusedError, match=says):
        load_encoder(f"hf:{folder}")


def test_towers_that_do_not_meet_and_empty_names_are_refused(siglip: Path, tmp_path: Path) -> None:
    folder = copy(siglip, tmp_path / "copy")
    edit_json(folder / "config.json", vision_config__vision_use_head=False)
    with pytest.raises(RefusedError, match="do not meet in one space"):
        load_encoder(f"hf:{folder}")
    for name in ("hf:", "hf-hub:"):
        with pytest.raises(RefusedError, match="names no model"):
            load_encoder(name)


def test_truncated_weights_are_refused(clip: Path, tmp_path: Path) -> None:
    folder = copy(clip, tmp_path / "copy")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RefusedError, match="damaged"):
        load_encoder(f"hf:{folder}")


def test_two_configs_that_disagree_on_the_activation_are_refused(clip: Path, tmp_path: Path) -> None:
    folder = copy(clip, tmp_path / "copy")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_config(quick_gelu=False)}))
    with pytest.raises(RefusedError, match=r"disagrees with itself.*quick_gelu"):
        load_encoder(f"hf:{folder}")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_config(quick_gelu=True)}))
    assert load_encoder(f"hf:{folder}").fingerprint["activation"] == "quick_gelu"
