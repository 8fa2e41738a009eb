"""nano's network: EfficientNet-Lite with class-probability features for images, MiniLM for texts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

_STORED_AS_INT8 = re.compile(r"text_body\.(word|blocks\.\d+\.(up|down))\.weight")
_SCALE = ".scale"  # suffix of the per-row scales of a tensor stored as int8


class Nano(nn.Module):
    """Both towers. A vector is two blocks side by side; the cosine of an image and a text is their weighted sum:

    - the class block: for images the mean of learned class vectors under the classifier's probabilities (as ConSE,
      Norouzi et al. 2014, arXiv:1312.5650), for texts a projection that learned from WordNet and a thesaurus of looks
      which of those classes a photo of a thing lights up;
    - the caption block: projections of the image features and of the MiniLM embedding, learned from captions.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.dim = int(config["caption_dim"]) + class_dim(config)
        self.image_body: Any = fold_batch_norm(timm.create_model(config["image_body"], pretrained=False).eval())
        self.image_head = ImageHead(config)
        self.text_body = TextBody(config)
        self.text_head = TextHead(config)

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to `device` for inference, the bodies in `dtype`; the small heads stay in float32."""
        self.eval().requires_grad_(False).to(device)
        self.image_body.to(dtype=dtype, memory_format=torch.channels_last)
        self.text_body.to(dtype=dtype)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [n, 3, S, S] -> [n, dim], float32."""
        body = self.image_body
        features = body.forward_features(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        vectors: Tensor = self.image_head(features.float(), body.classifier(features).float())
        return vectors

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids [n, length], 0 is padding -> [n, dim], float32."""
        vectors: Tensor = self.text_head(self.text_body(ids).float())
        return vectors


def class_dim(config: Mapping[str, Any]) -> int:
    """Numbers in the class block; edition 1 had as many as MiniLM."""
    return int(config.get("class_dim", config["text_width"]))


class ImageHead(nn.Module):
    """Pooled features [n, features] and class logits [n, 1000] -> [n, dim]."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.caption_weight = float(config["caption_weight"])
        self.temperature = float(config["class_temperature"])
        self.class_vectors = nn.Parameter(torch.zeros(1000, class_dim(config)))
        self.caption = Projection(config["image_features"], config["hidden"], config["caption_dim"])

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        classes = (logits / self.temperature).softmax(-1) @ self.class_vectors
        return two_blocks(self.caption(features), classes, self.caption_weight)


class TextHead(nn.Module):
    """Pooled MiniLM embeddings [n, width] -> [n, dim]."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.caption_weight = float(config["caption_weight"])
        self.caption = Projection(config["text_width"], config["hidden"], config["caption_dim"])
        self.classes = Projection(config["text_width"], config["class_hidden"], class_dim(config))

    def forward(self, pooled: Tensor) -> Tensor:
        pooled = F.normalize(pooled, dim=-1)
        return two_blocks(self.caption(pooled), self.classes(pooled), self.caption_weight)


class Projection(nn.Module):
    """A linear map plus a small perceptron: [n, inputs] -> [n, outputs]. `dropout` matters in training only."""

    def __init__(self, inputs: int, hidden: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.up = nn.Linear(inputs, hidden)
        self.down = nn.Linear(hidden, outputs)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, self.dropout, self.training)
        hidden = F.dropout(F.gelu(self.up(x)), self.dropout, self.training)
        result: Tensor = self.linear(x) + self.down(hidden)
        return result


def two_blocks(caption: Tensor, classes: Tensor, weight: float | Tensor) -> Tensor:
    """Unit rows whose dot products are weight * cos(caption blocks) + (1 - weight) * cos(class blocks)."""
    caption, classes = F.normalize(caption, dim=-1), F.normalize(classes, dim=-1)
    return torch.cat([caption * weight**0.5, classes * (1 - weight) ** 0.5], dim=-1)


class TextBody(nn.Module):
    """BERT's encoder (post-norm, both ways, padding masked), mean-pooled: ids [n, length] -> [n, width]."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        width = int(config["text_width"])
        self.word = nn.Embedding(config["vocabulary"], width)
        self.position = nn.Parameter(torch.zeros(config["positions"], width))  # token type 0 is added in
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.blocks = nn.ModuleList(TextBlock(width, config["text_heads"]) for _ in range(config["text_layers"]))

    def forward(self, ids: Tensor) -> Tensor:
        real = ids != 0
        x: Tensor = self.norm(self.word(ids) + self.position[: ids.shape[1]])
        for block in self.blocks:
            x = block(x, real[:, None, None, :])
        weights = real[..., None].to(x.dtype)
        return (x * weights).sum(1) / weights.sum(1)


class TextBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(n, length, width)
        x = self.norm1(x + self.out(attended))
        result: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))
        return result


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Fold every batch norm of a timm EfficientNet into its convolution: same outputs, less memory traffic."""
    for module in list(model.modules()):
        children: dict[str, Any] = dict(module.named_children())
        pairs = [("conv_stem", "bn1"), ("conv_head", "bn2")]
        if "conv_pwl" in children:
            pairs = [("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")]
        elif "conv_dw" in children:
            pairs = [("conv_dw", "bn1"), ("conv_pw", "bn2")]
        for conv, norm in pairs:
            if conv in children and norm in children:
                setattr(module, conv, fuse_conv_bn_eval(children[conv], children[norm]))
                setattr(module, norm, children[norm].act)
    return model


def pack_nano(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as they lie in the file: float16, the largest matrices int8 with a float32 scale per row."""
    packed = {}
    for name, tensor in state.items():
        if _STORED_AS_INT8.fullmatch(name):
            scale = tensor.abs().amax(1).clamp_min(1e-12) / 127
            packed[name] = (tensor / scale[:, None]).round().to(torch.int8)
            packed[name + _SCALE] = scale.float()
        else:
            packed[name] = tensor.half().contiguous()
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The float32 state dict of what `pack` wrote."""
    state = {}
    for name, tensor in packed.items():
        if name.endswith(_SCALE):
            continue
        state[name] = tensor.float()
        if name + _SCALE in packed:
            state[name] *= packed[name + _SCALE][:, None]
    return state
