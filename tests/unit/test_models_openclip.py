"""open_clip checkpoints and repositories: right numbers, right activation, right preprocessing, or one sentence."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.models import (  # isort: skip  (torchvision must be made importable first)
    TEXTS,
    clip_folder,
    edit_json,
    lively,
    pictures,
    quietly_created,
    register,
    save,
    sentencepiece_model,
    siglip_tokenizer_files,
    tiny_config,
    tiny_siglip_config,
    write_files,
)

import open_clip
import torch
from PIL import Image

from clipfilter.errors import RefusedError
from clipfilter.images.preprocess import prepare
from clipfilter.models import hub, load_encoder, openclip
from clipfilter.models.encoder import TorchEncoder

GELU, QUICK = "clipfilter-test-tiny", "clipfilter-test-tiny-quickgelu"
SIGLIP, XLM = "clipfilter-test-tiny-siglip", "clipfilter-test-tiny-xlm"
CAPTIONS = ["a photo of a dog", "two men play football in the rain", "A Red Car!", "", "word " * 200]


@pytest.fixture(scope="module", autouse=True)
def architectures(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("configs")
    register(GELU, tiny_config(False), folder)
    register(QUICK, tiny_config(True), folder)
    register(SIGLIP, tiny_siglip_config(), folder)
    xlm = tiny_config()
    xlm["text_cfg"] = {
        "hf_model_name": "xlm-roberta-base",
        "hf_tokenizer_name": "xlm-roberta-base",
        "hf_pooler_type": "mean_pooler",
    }
    register(XLM, xlm, folder)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """The tensors of the tiny CLIP."""
    return dict(lively(quietly_created(GELU)).state_dict())


@pytest.fixture
def checkpoint(state: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    return save(state, tmp_path / "weights.safetensors")


def prepared(encoder: Any) -> np.ndarray:
    return np.stack([prepare(picture, encoder.preprocess) for picture in pictures()])


def write_repository(folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], **preprocess: Any) -> Path:
    """A folder as open_clip's push to the hub writes it."""
    folder.mkdir(exist_ok=True)
    usual = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    content = {"model_cfg": config, "preprocess_cfg": {**usual, **preprocess}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save(state, folder / "open_clip_model.safetensors")
    return folder


def write_xlm_folder(folder: Path) -> Path:
    """Random weights of a tiny multilingual text tower with everything it needs beside them."""
    import transformers

    settings = transformers.XLMRobertaConfig(
        vocab_size=902, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
    )  # fmt: skip
    settings.save_pretrained(folder)
    sentencepiece_model(folder / "sentencepiece.bpe.model", "xlm-roberta")
    text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_pooler_type": "mean_pooler"}
    config = {**tiny_config(), "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = lively(quietly_created(f"local-dir:{folder}"))
    (folder / "open_clip_config.json").unlink()
    return save(dict(model.state_dict()), folder / "weights.safetensors")


# --- numbers


def test_a_siglip_equals_open_clips_own_forward(tmp_path: Path) -> None:
    write_files(siglip_tokenizer_files(), tmp_path)
    model = lively(quietly_created(SIGLIP))
    path = save(dict(model.state_dict()), tmp_path / "weights.safetensors")
    encoder = load_encoder(f"{SIGLIP}={path}")
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=64, clean="canonicalize")
    with torch.no_grad():
        texts = model.encode_text(tokenizer(list(TEXTS)), normalize=True).numpy()
    assert np.abs(encoder.encode_texts(TEXTS) - texts).max() <= 1e-5
    assert encoder.score_kind == "sigmoid"
    assert encoder.count_truncated(TEXTS) >= 1


def test_a_multilingual_tower_equals_open_clips_own_forward(tmp_path: Path) -> None:
    path = write_xlm_folder(tmp_path)
    encoder = load_encoder(f"{XLM}={path}")
    config = {**tiny_config(), "text_cfg": {"hf_model_name": str(tmp_path), "hf_pooler_type": "mean_pooler"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = quietly_created(f"local-dir:{tmp_path}")
    model.load_state_dict(load(path))
    tokenizer = open_clip.tokenizer.HFTokenizer(str(tmp_path))
    with torch.no_grad():
        texts = model.eval().encode_text(tokenizer(list(TEXTS)), normalize=True).numpy()
    # Cutting a batch to its longest text changes nothing: the tower masks its padding.
    assert np.abs(encoder.encode_texts(TEXTS) - texts).max() <= 1e-5
    half = load_encoder(f"{XLM}={path}", dtype="bf16")
    assert (half.encode_texts(TEXTS) * texts).sum(1).min() > 0.99


def load(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def test_a_copied_repository_brings_its_own_config(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "repo", tiny_config(), state)
    encoder = load_encoder(f"hf-hub:{folder}")
    assert isinstance(encoder, TorchEncoder)
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    rgb = pictures()[0]
    mine = encoder.normalise(prepare(rgb, encoder.preprocess)[None])
    assert torch.equal(mine[0], transform(Image.fromarray(rgb)))
    with torch.no_grad():
        theirs = model.eval().encode_image(mine, normalize=True).numpy()
    assert np.abs(encoder.encode_images(prepare(rgb, encoder.preprocess)[None]) - theirs).max() <= 1e-5
    assert encoder.preprocess.resize_mode == "squash"
    assert encoder.fingerprint["model"] == "hf-hub:repo"


# --- activation


def scripted(state: dict[str, torch.Tensor], path: Path, config: str = GELU) -> Path:
    """A TorchScript archive with the numbers that OpenAI's files carry."""
    model = quietly_created(config)
    model.load_state_dict(state)
    for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(number))

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, child in model.named_children():
                setattr(self, name, child)
            for name, parameter in model.named_parameters(recurse=False):
                self.register_parameter(name, parameter)
            for name, buffer in model.named_buffers(recurse=False):
                self.register_buffer(name, buffer)

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return self.visual(pixels)

    torch.jit.trace(Wrapped().eval(), torch.zeros(1, 3, 32, 32), check_trace=False).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_openais_archives_are_read_without_their_code_and_with_quickgelu(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    archive = scripted(state, tmp_path / "archive.pt")
    plain = save(state, tmp_path / "plain.safetensors")
    encoder = load_encoder(f"{GELU}={archive}")
    assert encoder.fingerprint["activation"] == "quick_gelu"
    quick, gelu = load_encoder(f"{QUICK}={plain}"), load_encoder(f"{GELU}={plain}")
    pixels = prepared(encoder)
    np.testing.assert_array_equal(encoder.encode_images(pixels), quick.encode_images(pixels))
    assert np.abs(encoder.encode_images(pixels) - gelu.encode_images(pixels)).max() > 1e-3


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_damaged_archive_is_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    import zipfile

    archive = scripted(state, tmp_path / "archive.pt")
    hostile = tmp_path / "hostile.pt"
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(hostile, "w") as target:
        for name in source.namelist():
            data = b"cos\nsystem\n(S'touch was-run'\ntR." if name.endswith("/data.pkl") else source.read(name)
            target.writestr(name, data)
    with pytest.raises(RefusedError, match=r"cannot be read without running its code .*os\.system.*save_file"):
        load_encoder(f"{GELU}={hostile}")
    assert not Path("was-run").exists()


def test_a_config_beside_the_checkpoint_decides_the_activation_and_preprocessing(
    state: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    folder = write_repository(tmp_path / "repo", tiny_config(quick_gelu=True), state)
    encoder = load_encoder(f"{GELU}={folder / 'open_clip_model.safetensors'}")
    assert encoder.fingerprint["activation"] == "quick_gelu"
    assert encoder.preprocess.std == (0.25, 0.25, 0.25)
    edit_json(folder / "open_clip_config.json", model_cfg__quick_gelu=False)
    with pytest.raises(RefusedError, match=f"was trained with GELU, not with QuickGELU: use {GELU}="):
        load_encoder(f"{QUICK}={folder / 'open_clip_model.safetensors'}")
    edit_json(folder / "open_clip_config.json", model_cfg__vision_cfg__image_size=64)
    with pytest.raises(RefusedError, match="describes another architecture"):
        load_encoder(f"{GELU}={folder / 'open_clip_model.safetensors'}")


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_config_that_contradicts_openais_file_is_refused(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    folder = write_repository(tmp_path / "repo", tiny_config(quick_gelu=False), state)
    (folder / "open_clip_model.safetensors").unlink()
    scripted(state, folder / "open_clip_pytorch_model.pt")
    with pytest.raises(RefusedError, match=r"trained with QuickGELU but its configuration says GELU"):
        load_encoder(f"hf-hub:{folder}")


def test_a_published_file_is_known_by_its_hash(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    url = f"https://github.com/mlfoundations/open_clip/releases/download/v0/tiny-{digest[:8]}.pt"
    record = {"url": url, "quick_gelu": True, "mean": (0.1, 0.2, 0.3)}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, GELU, {"one": record, "two": {"url": ""}})
    with caplog.at_level(logging.WARNING):
        encoder = load_encoder(f"{GELU}={checkpoint}")
    assert encoder.fingerprint["activation"] == "quick_gelu"
    assert encoder.preprocess.mean == (0.1, 0.2, 0.3)
    assert not caplog.messages


def test_doubts_about_a_bare_file_are_said(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tags = {"one": {"url": "", "quick_gelu": True}, "two": {"url": "", "mean": (0.5, 0.5, 0.5)}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, GELU, tags)
    with caplog.at_level(logging.WARNING):
        load_encoder(f"{GELU}={checkpoint}")
    assert len(caplog.messages) == 2
    assert "published weights" in caplog.messages[0]
    assert f"use {QUICK}={checkpoint}" in caplog.messages[1]
    # RN50, for one: all that was ever published is QuickGELU, and the plain name says GELU.
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, GELU, {"one": {"url": "", "quick_gelu": True}})
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_encoder(f"{GELU}={checkpoint}")
        load_encoder(f"{QUICK}={checkpoint}")
    assert ["are all QuickGELU" in message for message in caplog.messages] == [True]


def test_quickgelu_may_follow_any_architecture() -> None:
    assert "ViT-S-32-quickgelu" not in open_clip.list_models()
    config = openclip.architecture_config("ViT-S-32-quickgelu")
    assert config["quick_gelu"]
    assert not openclip.architecture_config("ViT-S-32").get("quick_gelu")


def test_the_tag_decides_over_the_architecture_and_silence_leaves_it() -> None:
    def activation(name: str) -> bool:
        architecture, _, tag = name.partition("/")
        config = openclip.architecture_config(architecture)
        record = open_clip.get_pretrained_cfg(architecture, tag)
        source = openclip.Source(name, architecture, config, Path("x"), {}, record.get("quick_gelu"), None)
        return openclip._activation(source, {}, "0" * 64)

    assert activation("ViT-B-32/openai")
    assert activation("ViT-B-32-quickgelu/openai")
    assert not activation("ViT-B-32/laion2b_s34b_b79k")
    assert activation("roberta-ViT-B-32/laion2b_s12b_b32k")  # its record is silent, its architecture is QuickGELU


# --- refusals


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_cfg__embed_dim": 12}, r"does not fit .*24.*12"),
        ({"model_cfg__vision_cfg__layers": 3}, "does not fit"),
        ({"model_cfg__vision_cfg__layres": 3}, r"cannot build .*layres"),
        ({"model_cfg__vision_cfg__image_size": 64}, "does not fit"),
        ({"model_cfg__vision_cfg__timm_model_name": "hf-hub:evil/model"}, "outside of timm"),
        ({"model_cfg": {}}, "describes no open_clip model"),
        ({"model_cfg__text_cfg": "clip"}, "describes no open_clip model"),
        ({"model_cfg__text_cfg__tokenizer_kwargs": {"vocab_file": "/etc/passwd"}}, "the option vocab_file"),
        ({"model_cfg__text_cfg__tokenizer_kwargs": {"clean": "rinse"}}, "clean='rinse'"),
        ({"auto_map": {}}, "auto_map"),
        ({"preprocess_cfg__size": [64, 64]}, r"\[64, 64\] pixels and its image tower takes 32"),
        ({"preprocess_cfg__interpolation": "nearest"}, "cannot be done exactly: interpolation"),
        ({"preprocess_cfg__resize_mode": "stretch"}, "cannot be done exactly: resize_mode"),
        ({"preprocess_cfg__mean": [0.5]}, "three numbers"),
        ({"preprocess_cfg__mode": "L"}, "must be RGB"),
        (
            {"model_cfg__text_cfg__hf_tokenizer_name": "some/tokenizer"},
            r"tokenizer\.json .*huggingface\.co/some/tokenizer",
        ),
    ],
)
def test_repositories_that_contradict_themselves_are_refused(
    changes: dict[str, Any], says: str, state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "fetch", offline)
    folder = write_repository(tmp_path / "repo", tiny_config(), state)
    edit_json(folder / "open_clip_config.json", **changes)
    with pytest.raises(RefusedError, match=says):
        load_encoder(f"hf-hub:{folder}")


def test_files_in_the_wrong_place_are_named(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=r"has no open_clip_config\.json"):
        load_encoder(f"hf-hub:{tmp_path}")
    with pytest.raises(RefusedError, match=f"is a folder: .*hf-hub:{tmp_path}"):
        load_encoder(f"{GELU}={tmp_path}")
    folder = write_repository(tmp_path / "repo", tiny_config(), state)
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(RefusedError, match=r"put open_clip_model\.safetensors there"):
        load_encoder(f"hf-hub:{folder}")


def test_another_layout_of_names_is_refused(tmp_path: Path) -> None:
    apples = {"image_encoder.model.patch_embed.0.rbr_conv.0.conv.weight": torch.zeros(1)}
    path = save(apples, tmp_path / "mobileclip.safetensors")
    with pytest.raises(RefusedError, match="does not fit the architecture"):
        load_encoder(f"{GELU}={path}")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pt")
    with pytest.raises(RefusedError, match="does not hold a state dict"):
        load_encoder(f"{GELU}={tmp_path / 'numbers.pt'}")


def test_a_transformers_checkpoint_says_how_it_is_loaded(tmp_path: Path) -> None:
    clip_folder(tmp_path / "hf")
    with pytest.raises(RefusedError, match=r"is a transformers model: use hf:"):
        load_encoder(f"{GELU}={tmp_path / 'hf' / 'model.safetensors'}")
    (tmp_path / "hf" / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_config()}))
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "hf" / "open_clip_model.safetensors")
    with pytest.raises(RefusedError, match=r"is a transformers model: use hf:"):
        load_encoder(f"hf-hub:{tmp_path / 'hf'}")


def test_a_tower_that_mixes_number_formats_is_refused_before_a_run(tmp_path: Path) -> None:
    config = tiny_config(context_length=76, embed_cls=True, output_tokens=True)
    config["vision_cfg"] |= {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    config["multimodal_cfg"] = {"context_length": 76, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    config["custom_text"] = True
    name = register("clipfilter-test-coca", config, tmp_path)
    path = save(dict(lively(quietly_created(name)).state_dict()), tmp_path / "weights.safetensors")
    assert np.isfinite(load_encoder(f"{name}={path}").encode_texts(CAPTIONS)).all()
    with pytest.raises(RefusedError, match=r"cannot compute in bf16 .*: use --dtype fp32"):
        load_encoder(f"{name}={path}", dtype="bf16")


# --- without a network


def offline(repo: str, file: str, revision: str | None = None) -> None:
    raise hub.Unavailable("it is not in the cache and the hub cannot be reached")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "ViT-B-32/openai",
            r"open_clip_model\.safetensors .*https://huggingface\.co/timm/vit_base_patch32_clip_224\.openai.*ViT-B-32=/path",
        ),
        (
            "ViT-B-16-SigLIP/webli",
            r"hub cannot be reached.*tokenizer\.json .*/timm/ViT-B-16-SigLIP, .*ViT-B-16-SigLIP=/path",
        ),
        (
            "hf-hub:laion/some-model",
            r"open_clip_config\.json and open_clip_model\.safetensors from https://huggingface\.co/laion/some-model",
        ),
        (
            "hf:openai/clip-vit-base-patch32",
            r"config\.json, .*model\.safetensors.* from https://huggingface\.co/openai/clip-vit-base-patch32",
        ),
    ],
)
def test_without_a_network_one_sentence_says_what_to_copy_and_soon(
    name: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A hub that answers nothing: packets to it are lost, as behind a firewall."""
    if name.startswith("hf:"):
        pytest.importorskip("transformers", reason="transformers (extra hf) is not installed")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "https://192.0.2.1")  # an address for documentation: never answers
    monkeypatch.setattr(hub, "_CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(hub, "getproxies", dict)
    began = time.monotonic()
    with pytest.raises(RefusedError, match=says) as refused:
        load_encoder(name)
    assert time.monotonic() - began < 5
    assert "\n" not in str(refused.value)


def test_names_without_weights_offer_the_tags() -> None:
    with pytest.raises(RefusedError, match=r"RN50 needs the name of its weights: use one of RN50/openai, "):
        load_encoder("RN50")
    with pytest.raises(RefusedError, match=r"use one of ViT-B-16-SigLIP2/webli"):
        load_encoder("ViT-B-16-SigLIP2")


# --- compiled


@pytest.mark.integration
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.soak)])
def test_compiled_towers_give_the_same_numbers(backend: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a backend that calls torch's own operators all but the C++ compiler's work is the same."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    plain, compiled = load_encoder(f"{GELU}={checkpoint}"), load_encoder(f"{GELU}={checkpoint}", compile=True)
    assert compiled.fingerprint == {**plain.fingerprint, "compiled": True}
    pixels = prepared(plain)
    assert np.abs(compiled.encode_images(pixels) - plain.encode_images(pixels)).max() <= 1e-5
    assert np.abs(compiled.encode_texts(CAPTIONS) - plain.encode_texts(CAPTIONS)).max() <= 1e-5
    assert np.abs(compiled.encode_images(pixels[:1]) - plain.encode_images(pixels[:1])).max() <= 1e-5


def test_without_a_compiler_compiling_is_refused(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(RefusedError, match=r"no C\+\+ compiler"):
        load_encoder(f"{GELU}={checkpoint}", compile=True)
