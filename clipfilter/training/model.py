"""A model to train: its towers as one module, and the way back to a file that loads as a model again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from clipfilter.errors import RefusedError
from clipfilter.models import TorchEncoder, load_encoder
from clipfilter.storage import local_path, replacing

if TYPE_CHECKING:
    from clipfilter.images import PreprocessConfig

#: The largest factor of the cosines (Radford et al. 2021, section 2.5).
MAX_LOGIT_SCALE = 100.0


class Trainable:
    """An encoder whose weights can be trained.

    module: both towers, in float32; its parameters include `logit_scale` (the logarithm) and, for sigmoid models,
    `logit_bias`. encoder: the same weights as an `Encoder`. load_as: what stands before `=` when a file of these weights
    is loaded.
    """

    def __init__(self, encoder: TorchEncoder, module: nn.Module, kind: Literal["open_clip", "nano"]) -> None:
        self.encoder = encoder
        self.module = module
        self.kind = kind
        self.device = encoder.device
        if kind == "nano":
            scale = torch.tensor(math.log(encoder.logit_scale), device=self.device)
            module.register_parameter("logit_scale", nn.Parameter(scale))
        self.load_as = "nano" if kind == "nano" else _architecture(encoder)

    @property
    def preprocess(self) -> PreprocessConfig:
        return self.encoder.preprocess

    @property
    def logit_scale(self) -> nn.Parameter:
        return cast(nn.Parameter, self.module.logit_scale)

    @property
    def logit_bias(self) -> nn.Parameter | None:
        return cast("nn.Parameter | None", getattr(self.module, "logit_bias", None))

    def image_features(self, pixels: np.ndarray) -> Tensor:
        """uint8 [n, 3, S, S] -> [n, dim], of any norm."""
        return self.encoder.image_tower(self.encoder.normalise(pixels))

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """n texts -> [n, dim], of any norm."""
        return self.encoder.text_tower(self.token_ids(texts))

    def token_ids(self, texts: Sequence[str]) -> Tensor:
        """int64 [n, length] on the device, truncated and padded as the text tower expects."""
        return self.encoder.pad(self.encoder.tokens(texts)).to(self.device)

    def clamp_temperature(self) -> None:
        self.logit_scale.data.clamp_(0, math.log(MAX_LOGIT_SCALE))

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, by name: the parameters that train, and all buffers (running statistics)."""
        state = {name: p.detach() for name, p in self.module.named_parameters() if p.requires_grad}
        return state | {name: b.detach() for name, b in self.module.named_buffers() if name in self.module.state_dict()}

    def load_trained(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `trained_state` gave."""
        mine = self.trained_state()
        if set(mine) != set(state):
            raise ValueError("the checkpoint holds other tensors than those that train")
        for name, tensor in mine.items():
            tensor.copy_(state[name])

    def config(self) -> dict[str, Any] | None:
        """What open_clip_config.json beside the weights must say of activation and preprocessing; None for nano, whose
        files carry their own configuration."""
        if self.kind == "nano":
            return None
        import open_clip

        quick = self.encoder.fingerprint["activation"] == "quick_gelu"
        preprocess = self.preprocess.to_json()
        return {
            "model_cfg": {**open_clip.get_model_config(self.load_as), "quick_gelu": quick},
            "preprocess_cfg": {name: value for name, value in preprocess.items() if name != "size"},
        }

    def write(self, path: Path) -> None:
        """Write all weights to a safetensors file; whole or not at all. Beside `config` it loads as `{load_as}={path}`."""
        from safetensors.torch import save_file

        # Each tensor a copy of its own: safetensors refuses tensors that share memory.
        state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.module.state_dict().items()}
        metadata = {"format": "pt"}
        if self.kind == "nano":
            from clipfilter.models import NANO_CONFIG, nano_config_text, pack_nano

            local = self.encoder.name.partition("=")[2]
            start = local_path(local) if local else None
            metadata[NANO_CONFIG.name] = nano_config_text(start, float(state.pop("logit_scale").exp()))
            state = pack_nano(state)
        with replacing(path) as unfinished:
            save_file(state, unfinished, metadata=metadata)


def load_trainable(name: str, *, device: str = "cpu", threads: int | None = None) -> Trainable:
    """The model `name` (an open_clip model, or nano) in float32, nothing of it trainable yet.

    Raises RefusedError where `load_encoder` does, and for models that cannot be trained.
    """
    if name.startswith("hf-hub:"):
        raise RefusedError(f"{name} cannot be trained as a repository: use ARCH=/path/to/its/weights.")
    encoder = load_encoder(name, device=device, dtype="fp32", threads=threads)
    module = getattr(getattr(encoder, "image_tower", None), "__self__", None)
    if not isinstance(encoder, TorchEncoder) or not isinstance(module, nn.Module):
        raise RefusedError(f"{name} cannot be trained: use nano or an open_clip model (ViT-B-32/openai, ARCH=/path).")
    from open_clip import CLIP, CustomTextCLIP

    from clipfilter.models import Nano

    if isinstance(module, Nano):
        return Trainable(encoder, module, "nano")
    if isinstance(module, CLIP | CustomTextCLIP):
        return Trainable(encoder, module, "open_clip")
    raise RefusedError(f"{name} cannot be trained: use nano or an open_clip model (ViT-B-32/openai, ARCH=/path).")


def write_random(architecture: str, path: Path, seed: int) -> None:
    """Write randomly initialised weights of an open_clip architecture to `path`, unless they are there already.

    Raises RefusedError for an architecture that open_clip does not have.
    """
    from clipfilter.models import torch_with_torchvision

    torch_with_torchvision()
    import open_clip
    from safetensors.torch import save_file

    if open_clip.get_model_config(architecture) is None:
        raise RefusedError(
            f"open_clip has no architecture {architecture!r}; --from-scratch takes a bare one (ViT-S-32)."
        )
    if path.exists():
        return
    torch.manual_seed(seed)
    model = open_clip.create_model(architecture, load_weights=False, pretrained_text=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as unfinished:
        save_file({name: tensor.contiguous().clone() for name, tensor in model.state_dict().items()}, unfinished)


def _architecture(encoder: TorchEncoder) -> str:
    """The bare name of an encoder's architecture, from which it can be built again."""
    import open_clip

    name = str(encoder.fingerprint["architecture"])
    if name not in open_clip.list_models():
        raise RefusedError(
            f"{encoder.name} has no architecture that open_clip knows by name: train its checkpoint as ARCH=/path/to/it."
        )
    return name
