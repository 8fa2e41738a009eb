"""Two-layer open_clip models with random weights, as local checkpoints: real towers, small enough for a unit test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clipfilter.models._torch import torch_with_torchvision

_VISION = {"image_size": 64, "layers": 2, "width": 128, "head_width": 32, "patch_size": 16}
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    # A causal text tower that reads its answer at the end token: texts of any length.
    "tiny-clip": {"embed_dim": 48, "quick_gelu": True, "vision_cfg": _VISION, "text_cfg": _TEXT},
    # As SigLIP: a sigmoid loss with a bias, texts attended both ways and read at their last position, biased projections.
    "tiny-sigmoid": {
        "embed_dim": 48,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": _VISION | {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": False},
        "text_cfg": _TEXT | {"context_length": 16, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
    },
}


def tiny_checkpoint(architecture: str, folder: Path) -> str:
    """Write the model's weights (the same for the same name) and return its name for `load_encoder`."""
    torch_with_torchvision()
    import open_clip
    import torch
    from safetensors.torch import save_file

    (folder / f"{architecture}.json").write_text(json.dumps(CONFIGS[architecture]))
    open_clip.add_model_config(folder / f"{architecture}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(architecture, pretrained_text=False)
    for name, tensor in model.named_parameters():
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_post.weight", "ln_final.weight")):
            tensor.data[::17] *= 8  # channels far above the others, as trained transformers have them
    path = folder / f"{architecture}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return f"{architecture}={path}"
