"""ONNX at full size: ViT-B-32 (random weights) and nano against torch on photographs, in float32 and int8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipfilter.evaluation.agreement import Sample, agreement, read_sample
from clipfilter.models import load_encoder
from clipfilter.models._torch import torch_with_torchvision
from clipfilter.models.onnx import load_onnx
from clipfilter.sources import open_source
from tests.support.edition import INT8_IMAGES, INT8_TEXTS
from tests.support.engine import PHOTOS

for package in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(package, reason="the onnx extra is not installed")

from clipfilter.models.onnx_export import Calibration, export_onnx  # noqa: E402

pytestmark = [pytest.mark.integration, pytest.mark.fresh]


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch_with_torchvision()
    import open_clip
    import torch
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("weights") / "vit-b-32.safetensors"
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", pretrained_text=False)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return load_encoder(f"ViT-B-32={path}")


def halves(encoder: Any, rows: int) -> tuple[Sample, Sample]:
    return read_sample(open_source(str(PHOTOS)), encoder.preprocess, rows).split(1)


def exported(encoder: Any, out: Path, **options: Any) -> Any:
    export_onnx(encoder, out, **options)
    return load_onnx(f"onnx:{out}", device="cpu", dtype="fp32", threads=None)


@pytest.mark.soak("test_nano_keeps_its_image_tower_and_a_trained_text_tower_survives_int8")
def test_vit_b_32_in_float32_and_int8(vit: Any, tmp_path: Path) -> None:
    chosen, measured = halves(vit, 64)
    other = exported(vit, tmp_path / "fp32")
    for name, values in (("images", measured.pixels()), ("texts", measured.captions())):
        ours, theirs = (getattr(one, f"encode_{name}")(values).astype(np.float64) for one in (vit, other))
        assert 1 - (ours * theirs).sum(1).min() < 1e-4, name
        alone = np.concatenate([getattr(other, f"encode_{name}")(values[i : i + 1]) for i in range(3)])
        assert np.abs(alone - theirs[:3]).max() < 1e-5, name

    calibration = Calibration(chosen.pixels(), chosen.captions())
    small = exported(
        vit, tmp_path / "int8", int8=True, calibration=calibration, judge=lambda a, b: agreement(a, b, measured)
    )
    loss = json.loads((tmp_path / "int8" / "config.json").read_text())["quantisation"]["loss"]
    assert loss["images"]["mean"] > 0.999
    assert loss["texts"]["mean"] > 0.997
    again = agreement(vit, small, measured)
    assert again["images"]["min"] == pytest.approx(loss["images"]["min"], abs=1e-5)
    sizes = [(tmp_path / kind / "image.onnx").stat().st_size for kind in ("fp32", "int8")]
    assert sizes[1] < sizes[0] / 3.5


def test_nano_keeps_its_image_tower_and_a_trained_text_tower_survives_int8(tmp_path: Path) -> None:
    nano: Any = load_encoder("nano")
    chosen, measured = halves(nano, 94)
    calibration = Calibration(chosen.pixels(), chosen.captions())
    exported(nano, tmp_path / "int8", int8=True, calibration=calibration, judge=lambda a, b: agreement(a, b, measured))
    config = json.loads((tmp_path / "int8" / "config.json").read_text())
    assert max(config["parity"].values()) < 1e-5
    assert config["quantisation"]["towers"] == {"image": "float32", "text": "int8"}
    assert config["quantisation"]["loss"]["images"]["min"] > INT8_IMAGES
    assert config["quantisation"]["loss"]["texts"]["mean"] > INT8_TEXTS


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_models_of_transformers(kind: str, tmp_path: Path) -> None:
    """Tiny ones with random weights: what differs from open_clip's is the shape of the graph and the tokenizer."""
    pytest.importorskip("transformers", reason="the hf extra is not installed")
    from tests.support import models

    source = tmp_path / kind
    source.mkdir()
    getattr(models, f"{kind}_folder")(source)
    encoder: Any = load_encoder(f"hf:{source}")
    other = exported(encoder, tmp_path / "out")
    chosen, _ = halves(encoder, 32)
    texts = ["a dog", "", "two men ride a horse through the rain", "DOG's dog", "word " * 100]
    assert 1 - (encoder.encode_images(chosen.pixels()) * other.encode_images(chosen.pixels())).sum(1).min() < 1e-4
    assert 1 - (encoder.encode_texts(texts) * other.encode_texts(texts)).sum(1).min() < 1e-4
    assert other.score_kind == ("softmax" if kind == "clip" else "sigmoid")
