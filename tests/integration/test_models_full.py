"""Every family's full architecture, randomly initialised, saved, loaded by `ARCH=/path` and held against open_clip."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers (extra hf) is not installed")

from tests.support.models import (  # isort: skip  (torchvision must be made importable first)
    pictures,
    quietly_created,
    save,
    sentencepiece_model,
    siglip_tokenizer_files,
    write_files,
)

import open_clip
import torch
from PIL import Image

from clipfilter.images.preprocess import prepare
from clipfilter.models import load_encoder
from clipfilter.models.encoder import TorchEncoder

pytestmark = pytest.mark.integration

TEXTS = ["a photo of a dog on the beach", "two men play football"]
#: Architecture -> (dtype of the file, tokenizer). Tokenizers are trained on the spot: the real ones are on the hub.
FAMILIES = {
    "RN50": (torch.float32, "clip"),
    "ViT-B-32": (torch.float32, "clip"),
    "ViT-B-16": (torch.float16, "clip"),
    "ViT-L-14": (torch.float16, "clip"),
    "ViT-L-14-336": (torch.float16, "clip"),
    "ViT-B-16-SigLIP": (torch.float32, "siglip"),
    "ViT-B-32-SigLIP2-256": (torch.bfloat16, "siglip2"),
    "MobileCLIP-S1": (torch.float32, "clip"),
    "MobileCLIP2-S0": (torch.float32, "clip"),
    "xlm-roberta-base-ViT-B-32": (torch.float16, "xlm-roberta"),
}
#: Those that `make test` has time for: no small model of the unit tests has their image towers.
EVERY_TIME = ("RN50", "MobileCLIP2-S0")


def write_tokenizer(folder: Path, family: str) -> None:
    if family == "siglip":
        write_files(siglip_tokenizer_files(), folder)
    elif family == "siglip2":
        sentencepiece_model(folder / "tokenizer.model", "gemma")
    elif family == "xlm-roberta":
        sentencepiece_model(folder / "sentencepiece.bpe.model", "xlm-roberta")


def write_text_tower_config(folder: Path) -> None:
    """xlm-roberta-base's published sizes."""
    from transformers import XLMRobertaConfig

    XLMRobertaConfig(
        vocab_size=250002, hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
    ).save_pretrained(folder)  # fmt: skip


def create(architecture: str, family: str, folder: Path) -> Any:
    """open_clip's own model, and its own inference transform, for this architecture."""
    torch.manual_seed(0)
    if family != "xlm-roberta":
        return quietly_created(architecture)
    write_text_tower_config(folder)
    config = open_clip.get_model_config(architecture)
    config["text_cfg"]["hf_model_name"] = str(folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    model = quietly_created(f"local-dir:{folder}")
    (folder / "open_clip_config.json").unlink()
    return model


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[] if name in EVERY_TIME else pytest.mark.soak) for name in FAMILIES]
)
def test_a_full_architecture_gives_open_clips_vectors(architecture: str, tmp_path: Path) -> None:
    dtype, family = FAMILIES[architecture]
    write_tokenizer(tmp_path, family)
    model = create(architecture, family, tmp_path).eval()
    path = tmp_path / "weights.safetensors"
    floating = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    try:
        save(floating, path)
        # The file's own numbers: those of the half-precision files are rounded.
        model.load_state_dict({name: tensor.to(model.state_dict()[name].dtype) for name, tensor in floating.items()})
        del floating
        encoder = load_encoder(f"{architecture}={path}")
    finally:
        path.unlink(missing_ok=True)
    assert isinstance(encoder, TorchEncoder)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    record = open_clip.get_pretrained_cfg(architecture, tags[0])
    options = {key: record[key] for key in ("mean", "std", "interpolation", "resize_mode")}
    transform = open_clip.transform.image_transform_v2(
        open_clip.transform.PreprocessCfg(size=model.visual.image_size, **options), is_train=False
    )
    chosen = pictures()[:2]
    pixels = torch.stack([transform(Image.fromarray(picture)) for picture in chosen])
    with torch.no_grad():
        images = model.encode_image(pixels, normalize=True).numpy()
        texts = model.encode_text(torch.from_numpy(ids(encoder)), normalize=True).numpy()
    mine = encoder.encode_images(np.stack([prepare(picture, encoder.preprocess) for picture in chosen]))
    assert mine.shape == (2, open_clip.get_model_config(architecture)["embed_dim"])
    for ours, theirs in ((mine, images), (encoder.encode_texts(TEXTS), texts)):
        assert np.abs(ours - theirs).max() <= 1e-5
        assert 1 - (ours * theirs).sum(1).min() <= 1e-6
    del model, encoder
    gc.collect()


def ids(encoder: TorchEncoder) -> np.ndarray:
    """TEXTS as open_clip pads them: to the whole context (tests/unit/test_models_tokenizers.py compares the ids)."""
    batch = np.full((len(TEXTS), encoder.context_length), encoder.tokenizer.pad_id, np.int64)
    for row, tokens in zip(batch, encoder.tokenizer.encode(TEXTS), strict=True):
        row[: len(tokens)] = tokens
    return batch
