"""Tiny CLIPs in every layout that clipfilter reads, with real tokenizers trained on the spot, and real images."""

from __future__ import annotations

import io
import json
import logging
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from clipfilter.models._torch import torch_with_torchvision

torch_with_torchvision()

import open_clip  # noqa: E402
import sentencepiece  # noqa: E402
import torch  # noqa: E402
from open_clip.tokenizer import SimpleTokenizer  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from tests.support.engine import photos  # noqa: E402

#: What people write, and what they should not.
TEXTS = (
    "a photo of a dog", "A Dog! (running; fast)", "", " ", "😀🎉 ÇA VA?", "日本語のテキスト、猫の写真",
    "Ein Hund läuft über die Straße",
    "собака на пляже", "<b>&amp; don't</b>", "l'été  \t\n  naïve", "word " * 300, "x" * 10_000, "語" * 10_000, "\x00\ufffd",
)  # fmt: skip
#: (quick_gelu, hidden_act) of the two activations a CLIP can have.
ACTIVATIONS = ((False, "gelu"), (True, "quick_gelu"))
SIZE = 32


def register(name: str, config: dict[str, Any], folder: Path) -> str:
    """Make open_clip know an architecture in this process."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    open_clip.factory._MODEL_CONFIG_PATHS.remove(path)  # so that a later scan does not look for the deleted file
    return name


def tiny_config(quick_gelu: bool = False, **text: Any) -> dict[str, Any]:
    """A two-layer ViT and a two-layer causal text tower in open_clip's terms."""
    return {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **text},
    }


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with weights large enough that different inputs give clearly different embeddings."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("logit"):
                noise = torch.randn(parameter.shape, generator=generator)
                norm = parameter.ndim == 1 and name.endswith("weight")
                parameter.copy_(1 + 0.1 * noise if norm else 0.2 * noise)
    return model.eval()


def save(state: dict[str, Tensor], path: Path) -> Path:
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def quietly_created(name: str, **options: Any) -> Any:
    logging.disable(logging.WARNING)
    try:
        return open_clip.create_model(name, pretrained_text=False, load_weights=False, **options)
    finally:
        logging.disable(logging.NOTSET)


@cache
def pictures() -> tuple[np.ndarray, ...]:
    """RGB arrays uint8 [h, w, 3] of the sample photographs."""
    return tuple(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for _, data, _ in photos())


def spread(scores: np.ndarray) -> float:
    """How much scores [images, texts] differ between images: the mean over texts of their standard deviation."""
    return float(scores.std(axis=0).mean())


# --- tokenizers -------------------------------------------------------------------------------------------------------


@cache
def corpus() -> str:
    repository = Path(__file__).parents[2]
    pages = [page.read_text(encoding="utf-8") for page in sorted((repository / "docs").rglob("*.md"))]
    return "\n".join([*pages, *(text for text in TEXTS if len(text) < 200)])


def sentencepiece_model(path: Path, family: str) -> Path:
    """A small vocabulary with the special tokens of its family where that family has them (t5, xlm-roberta, gemma)."""
    layouts: dict[str, dict[str, Any]] = {
        "t5": {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
        "xlm-roberta": {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2},
        "gemma": {
            "model_type": "bpe", "pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "byte_fallback": True,
            "eos_piece": "<eos>", "bos_piece": "<bos>", "normalization_rule_name": "identity", "add_dummy_prefix": False,
            "remove_extra_whitespaces": False, "user_defined_symbols": ["<mask>"],
        },
    }  # fmt: skip
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus().splitlines()), model_writer=buffer, vocab_size=900, minloglevel=2,
        character_coverage=0.98, num_threads=1, **layouts[family],
    )  # fmt: skip
    path.write_bytes(buffer.getvalue())
    return path


def clip_tokenizer_files(folder: Path) -> None:
    """CLIP's real vocabulary (49 408 tokens) as transformers stores it."""
    simple = SimpleTokenizer()
    rename = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {rename.get(token, token): number for token, number in simple.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    merges = sorted(simple.bpe_ranks, key=lambda pair: simple.bpe_ranks[pair])
    text = "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)])
    (folder / "merges.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )


@cache
def siglip_tokenizer_files() -> dict[str, bytes]:
    """The files of a SigLIP repository's tokenizer (T5's class, padded with the end token), by name."""
    import tempfile

    import transformers

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        sentencepiece_model(folder / "spiece.model", "t5")
        tokenizer = transformers.T5Tokenizer.from_pretrained(work, extra_ids=0, pad_token="</s>")
        tokenizer.save_pretrained(work)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def write_files(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)


# --- transformers -----------------------------------------------------------------------------------------------------


def clip_folder(folder: Path, hidden_act: str = "quick_gelu", size: int = SIZE) -> Any:
    """A transformers CLIPModel saved with its processor and CLIP's own tokenizer; returns the model."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    shared = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407, "bos_token_id": 49406}
    config = CLIPConfig(
        text_config={**shared, **text, "hidden_act": hidden_act, "projection_dim": 24},
        vision_config={**shared, "image_size": SIZE, "patch_size": 16, "hidden_act": hidden_act, "projection_dim": 24},
        projection_dim=24,
    )
    model = lively(CLIPModel(config))
    model.save_pretrained(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor.save_pretrained(folder)
    clip_tokenizer_files(folder)
    return model


def siglip_folder(folder: Path) -> Any:
    """A transformers SiglipModel saved with its processor and a sentencepiece tokenizer; returns the model."""
    from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

    shared = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SiglipConfig(
        text_config={**shared, "vocab_size": 900, "max_position_embeddings": 64, "projection_size": 32},
        vision_config={**shared, "image_size": SIZE, "patch_size": 16},
    )
    model = lively(SiglipModel(config))
    with torch.no_grad():
        model.logit_scale.fill_(4.7)
        model.logit_bias.fill_(-16.5)
    model.save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(folder)
    write_files({"spiece.model": siglip_tokenizer_files()["spiece.model"]}, folder)
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "SiglipTokenizer", "model_max_length": 64})
    )
    return model


def siglip2_folder(folder: Path, padding_side: str = "right") -> Any:
    """SigLIP 2 with fixed resolution: a SiglipModel with Gemma's kind of tokenizer; returns the model."""
    import transformers

    model = siglip_folder(folder)
    (folder / "spiece.model").unlink()
    sentencepiece_model(folder / "tokenizer.model", "gemma")
    options = {"padding_side": padding_side, "add_bos_token": False, "add_eos_token": True, "model_max_length": 64}
    transformers.GemmaTokenizer.from_pretrained(str(folder), **options).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    return model


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; "a.b" is b inside a, and None removes a key."""
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *outer, last = key.split("__")
        place = content
        for name in outer:
            place = place[name]
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


# --- the same network in two libraries --------------------------------------------------------------------------------


def clip_to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers CLIPModel's tensors under open_clip's names."""
    found = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",
        "visual.ln_post": "vision_model.post_layernorm",
    }
    for ours, theirs in norms.items():
        for kind in ("weight", "bias"):
            found[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
    for ours, theirs in (("transformer", "text_model"), ("visual.transformer", "vision_model")):
        found |= blocks_to_open_clip(state, theirs, ours)
    return found


def blocks_to_open_clip(state: dict[str, Tensor], theirs: str, ours: str) -> dict[str, Tensor]:
    """The layers of one tower under open_clip's names."""
    found = {}
    parts = {
        "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }  # fmt: skip
    layer = 0
    while f"{theirs}.encoder.layers.{layer}.layer_norm1.weight" in state:
        source, target = f"{theirs}.encoder.layers.{layer}", f"{ours}.resblocks.{layer}"
        for kind in ("weight", "bias"):
            qkv = [state[f"{source}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            found[f"{target}.attn.in_proj_{kind}"] = torch.cat(qkv)
            for mine, other in parts.items():
                found[f"{target}.{mine}.{kind}"] = state[f"{source}.{other}.{kind}"]
        layer += 1
    return found


def siglip_to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers SiglipModel's tensors under open_clip's names (its image tower is timm's)."""
    found = {
        "logit_scale": state["logit_scale"].reshape(()),
        "logit_bias": state["logit_bias"].reshape(()),
        "text.token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "text.positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "visual.trunk.pos_embed": state["vision_model.embeddings.position_embedding.weight"][None],
        "visual.trunk.attn_pool.latent": state["vision_model.head.probe"],
    }
    pool = "vision_model.head.attention."
    for kind in ("weight", "bias"):
        q, k, v = state[f"{pool}in_proj_{kind}"].chunk(3)
        found[f"visual.trunk.attn_pool.q.{kind}"] = q
        found[f"visual.trunk.attn_pool.kv.{kind}"] = torch.cat([k, v])
        renamed = {
            "text.text_projection": "text_model.head", "text.ln_final": "text_model.final_layer_norm",
            "visual.trunk.patch_embed.proj": "vision_model.embeddings.patch_embedding",
            "visual.trunk.norm": "vision_model.post_layernorm", "visual.trunk.attn_pool.proj": f"{pool}out_proj",
            "visual.trunk.attn_pool.norm": "vision_model.head.layernorm",
            "visual.trunk.attn_pool.mlp.fc1": "vision_model.head.mlp.fc1",
            "visual.trunk.attn_pool.mlp.fc2": "vision_model.head.mlp.fc2",
        }  # fmt: skip
        for ours, theirs in renamed.items():
            found[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
    found |= blocks_to_open_clip(state, "text_model", "text.transformer")
    timm = {
        "ln_1": "norm1",
        "ln_2": "norm2",
        "attn.out_proj": "attn.proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    for name, tensor in blocks_to_open_clip(state, "vision_model", "visual.trunk").items():
        name = name.replace("resblocks", "blocks").replace("attn.in_proj_", "attn.qkv.")
        for ours, theirs in timm.items():
            name = name.replace(ours, theirs)
        found[name] = tensor
    return found


def register_tiny_timm() -> str:
    """A two-layer SigLIP image tower under timm's name for it."""
    from timm.models import is_model, register_model
    from timm.models.vision_transformer import VisionTransformer

    name = "vit_clipfilter_tiny_siglip"
    if not is_model(name):

        def vit_clipfilter_tiny_siglip(pretrained: bool = False, **options: Any) -> VisionTransformer:
            options = {key: value for key, value in options.items() if key in ("num_classes", "global_pool")}
            from functools import partial

            return VisionTransformer(
                img_size=SIZE, patch_size=16, embed_dim=32, depth=2, num_heads=2, class_token=False,
                act_layer=partial(nn.GELU, approximate="tanh"), norm_layer=partial(nn.LayerNorm, eps=1e-6), **options,
            )  # fmt: skip

        register_model(vit_clipfilter_tiny_siglip)
    return name


def tiny_siglip_config() -> dict[str, Any]:
    return {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": SIZE, "timm_model_name": register_tiny_timm(), "timm_model_pretrained": False, "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 64, "vocab_size": 900, "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
            "tokenizer_kwargs": {"clean": "canonicalize"}, "width": 32, "heads": 2, "layers": 2, "no_causal_mask": True,
            "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}, "act_kwargs": {"approximate": "tanh"},
        },
    }  # fmt: skip
