"""CLIP and SigLIP models of transformers (`hf:`): a repository's files, read strictly and without its code."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clipfilter.errors import RefusedError, reason
from clipfilter.images import PreprocessConfig
from clipfilter.models import hub
from clipfilter.models._torch import set_up_torch
from clipfilter.models.checkpoint import load_strictly, read_state_dict
from clipfilter.models.encoder import TorchEncoder
from clipfilter.models.tokenizer import (
    COMPANIONS,
    fetch_tokenizer,
    quiet_transformers,
    refuse_remote_code,
    transformers_tokenizer,
)
from clipfilter.storage import file_sha256, local_path

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PREFIX = "hf:"
CONFIG = "config.json"
PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_MODELS = {"clip": "CLIPModel", "siglip": "SiglipModel"}
_RESAMPLE = {2: "bilinear", 3: "bicubic"}
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def load_huggingface(name: str, *, device: str, dtype: str, threads: int | None) -> TorchEncoder:
    """`hf:ORG/NAME`, or `hf:/folder` with a copy of such a repository, as an encoder.

    Takes CLIPModel, and SiglipModel with fixed resolution (SigLIP 2's fixed-resolution checkpoints are SiglipModels).
    Raises RefusedError as `models.load_encoder` says.
    """
    torch_device, torch_dtype = set_up_torch(device, dtype, threads)
    folder, shown = _find_folder(name)
    config = _read_config(folder, shown)
    kind = str(config["model_type"])
    activation = _activation(config, folder, shown)
    files = weight_files(folder)
    if not files:
        raise RefusedError(f"{folder} has no weights: copy {WEIGHTS[0]} there from the repository")
    settings, model = _build(config, folder)
    text, vision = settings.text_config, settings.vision_config
    preprocess = _preprocess_config(folder, kind, int(vision.image_size))
    tokenizer = transformers_tokenizer(folder, int(text.max_position_embeddings), int(text.vocab_size), shown)
    _load_weights(model, files, kind, folder)
    # Read before the model is cast: half precision rounds them.
    logit_scale = float(model.logit_scale.detach().float().exp())
    logit_bias = float(model.logit_bias.detach().float()) if kind == "siglip" else None
    model = model.to(device=torch_device, dtype=torch_dtype).eval().requires_grad_(False)
    image_tower, text_tower = _towers(model, kind)
    return TorchEncoder(
        name=name,
        dim=int(settings.projection_dim if kind == "clip" else vision.hidden_size),
        preprocess=preprocess,
        logit_scale=logit_scale,
        logit_bias=logit_bias,
        fingerprint={
            "model": shown,
            "architecture": f"{_MODELS[kind]} {vision.hidden_size}x{vision.num_hidden_layers}/{vision.patch_size}",
            "weights_sha256": file_sha256(files[0]) if len(files) == 1 else _sha256_of(files),
            "config_sha256": _sha256_of_config(config),
            "tokenizer_sha256": tokenizer.sha256,
            "activation": activation,
            "preprocess": preprocess.to_json(),
            "dtype": dtype,
            "backend": f"transformers-{torch_device.type}",
        },
        image_tower=image_tower,
        text_tower=text_tower,
        tokenizer=tokenizer,
        # CLIP's text tower is causal and read at the end token; SigLIP's attends to its padding, as it was trained.
        cut_to_longest=kind == "clip" and not tokenizer.pad_left,
        device=torch_device,
        dtype=torch_dtype,
    )


def _build(config: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """(transformers' settings, the network they describe, its weights random); RefusedError where there is none."""
    import transformers

    kind = config["model_type"]
    with quiet_transformers():
        try:
            settings = getattr(transformers, _MODELS[kind].replace("Model", "Config")).from_dict(config)
            model = getattr(transformers, _MODELS[kind])(settings)
        except Exception as error:  # a config of the wrong types fails anywhere inside
            raise RefusedError(
                f"transformers cannot build the model that {folder / CONFIG} describes: {reason(error)}"
            ) from None
    text, vision = settings.text_config, settings.vision_config
    if kind == "siglip" and not (vision.vision_use_head and text.projection_size == vision.hidden_size):
        raise RefusedError(
            f"the towers that {folder / CONFIG} describes do not meet in one space: use a complete SiglipModel"
        )
    return settings, model


def _towers(model: Any, kind: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    def image(pixels: Tensor) -> Tensor:
        pooled = model.vision_model(pixel_values=pixels).pooler_output
        return cast("Tensor", model.visual_projection(pooled) if kind == "clip" else pooled)

    def text(ids: Tensor) -> Tensor:
        pooled = model.text_model(input_ids=ids).pooler_output
        return cast("Tensor", model.text_projection(pooled) if kind == "clip" else pooled)

    return image, text


# --- files ------------------------------------------------------------------------------------------------------------


def _find_folder(name: str) -> tuple[Path, str]:
    """(the folder with the model's files, downloaded unless cached; how the model is called); RefusedError."""
    if importlib.util.find_spec("transformers") is None:
        raise RefusedError(f"{name} needs the package transformers: {hub.INSTALL}")
    place = name.removeprefix(PREFIX)
    if not place:
        raise RefusedError(f"{name} names no model: use {PREFIX}ORG/NAME or {PREFIX}/folder")
    if hub.is_folder(place):
        folder = local_path(place)
        return folder, PREFIX + folder.name
    return fetch_repository(place), PREFIX + place


def fetch_repository(repo: str) -> Path:
    """The local snapshot of a hub repository with everything this module reads; RefusedError where it cannot be had."""
    try:
        config = hub.fetch(repo, CONFIG)
        if config is None:
            raise RefusedError(
                f"https://huggingface.co/{repo} has no {CONFIG}: use hf-hub:{repo} for an open_clip model"
            )
        revision = config.parent.name  # the folder of a snapshot is named by its commit
        hub.fetch_first(repo, PREPROCESSING, revision)
        fetch_tokenizer(repo, None, revision)
        # SigLIP's class reads the sentencepiece model even where there is a tokenizer.json, CLIP's may read these two.
        for file in ("spiece.model", "vocab.json"):
            hub.fetch_optional(repo, file, revision)
        weights = hub.fetch_first(repo, WEIGHTS, revision)
        for part in _parts(weights) if weights is not None and weights.suffix == ".json" else ():
            hub.fetch(repo, part, revision)
    except hub.Unavailable as error:
        raise RefusedError(
            f"{PREFIX}{repo} cannot be had ({error}): on a machine with a network, download {CONFIG}, {PREPROCESSING[0]}, "
            f"{WEIGHTS[0]}, tokenizer.json and {COMPANIONS[0]} (SigLIP: spiece.model too) from https://huggingface.co/{repo} "
            f"into a folder, copy it here and use --model {PREFIX}/path/to/that/folder"
        ) from None
    return config.parent


def weight_files(folder: Path) -> list[Path]:
    """The weights in a folder, safetensors before pickles, whole or in parts; empty where there are none."""
    found = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
    if found is None:
        return []
    if found.suffix != ".json":
        return [found]
    parts = [folder / part for part in _parts(found)]
    missing = [part.name for part in parts if not part.is_file()]
    if missing:
        raise RefusedError(f"{folder} lacks {', '.join(missing)}, which {found.name} lists: download the missing files")
    return parts


def _parts(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RefusedError(f"{index} is damaged: download it again") from None
    if not names or any(Path(name).name != name for name in names):
        raise RefusedError(f"{index} names files outside of its folder: download it again")
    return names


def _sha256_of_config(config: dict[str, Any]) -> str:
    """Names what weights alone leave open: heads, epsilons, activations."""
    parts = [config.get(key) for key in ("model_type", "projection_dim", "text_config", "vision_config")]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sha256_of(files: list[Path]) -> str:
    return hashlib.sha256("".join(f"{path.name} {file_sha256(path)}\n" for path in files).encode()).hexdigest()


def _read_config(folder: Path, shown: str) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise RefusedError(
            f"{folder} has no {CONFIG}: copy the repository's files there, or use hf-hub:{folder} for open_clip's"
        )
    config = refuse_remote_code(folder / CONFIG)
    kind = config.get("model_type")
    if kind == "siglip2":
        raise RefusedError(
            f"{shown} is a SigLIP 2 model for images of any resolution (NaFlex), which is not supported: use one with a "
            "fixed resolution (google/siglip2-base-patch16-224)"
        )
    if kind not in _MODELS:
        raise RefusedError(
            f"{shown} is of the kind {kind!r}, which is no CLIP that clipfilter knows: use a CLIPModel or a SiglipModel"
        )
    return config


def _activation(config: dict[str, Any], folder: Path, shown: str) -> str:
    """The activation of both towers as config.json states it; RefusedError when an open_clip config beside it differs."""
    usual = "quick_gelu" if config["model_type"] == "clip" else "gelu_pytorch_tanh"
    found = {part: (config.get(f"{part}_config") or {}).get("hidden_act", usual) for part in ("vision", "text")}
    # Repositories for both libraries carry both configs, and both must mean the same network.
    other = refuse_remote_code(folder / "open_clip_config.json").get("model_cfg")
    if (
        config["model_type"] == "clip"
        and isinstance(other, dict)
        and "timm_model_name" not in other.get("vision_cfg", {})
    ):
        quick = bool(other.get("quick_gelu", False))
        if quick != (found["vision"] == "quick_gelu"):
            raise RefusedError(
                f"{shown} disagrees with itself: {CONFIG} says hidden_act {found['vision']} and open_clip_config.json says "
                f"quick_gelu {str(quick).lower()}; correct the one that is wrong"
            )
    return found["vision"] if found["vision"] == found["text"] else f"{found['vision']}, text {found['text']}"


def _load_weights(model: Any, files: list[Path], kind: str, folder: Path) -> None:
    state: dict[str, Tensor] = {}
    for path in files:
        state |= read_state_dict(path)
    if any(name.startswith("visual.") for name in state):
        raise RefusedError(
            f"{files[0]} is an open_clip model: use hf-hub:{folder}, with its open_clip_config.json beside it"
        )
    for name in [name for name in state if name.endswith(".position_ids")]:  # older versions saved these constants
        del state[name]
    load_strictly(model, state, f"the weights in {folder} do not fit its {CONFIG} ({_MODELS[kind]})")


# --- preprocessing ----------------------------------------------------------------------------------------------------


def _preprocess_config(folder: Path, kind: str, image_size: int) -> PreprocessConfig:
    """What the repository's image processor does, as a PreprocessConfig; RefusedError where that is not the same.

    transformers crops `floor` of half the surplus, torchvision (and so PreprocessConfig) rounds it: where the longer side
    has 3 pixels more than a multiple of 4 too many, the crop lies one pixel further.
    """
    path = next((folder / file for file in PREPROCESSING if (folder / file).is_file()), None)
    if path is None:
        raise RefusedError(f"{folder} does not say how its images are prepared: copy {PREPROCESSING[0]} there")
    try:
        content = refuse_remote_code(path)
        return _exactly(path, content.get("image_processor", content), kind == "clip", image_size)
    except _InexactError as error:
        raise RefusedError(f"the preprocessing in {path} cannot be done exactly: {error}") from None
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise RefusedError(f"the preprocessing in {folder} is not what it should be ({reason(error)})") from None


class _InexactError(Exception):
    """A step that PreprocessConfig does not have."""


def _exactly(path: Path, content: dict[str, Any], clip: bool, image_size: int) -> PreprocessConfig:
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if not content.get(step, True):
            raise _InexactError(f"{step} is off")
    if content.get("do_pad"):
        raise _InexactError("it pads images")
    if abs(float(content.get("rescale_factor", 1 / 255)) - 1 / 255) > 1e-9:
        raise _InexactError(f"pixels are multiplied by {content['rescale_factor']}, not by 1/255")
    resample = content.get("resample", 3)
    if resample not in _RESAMPLE:
        raise _InexactError(f"resample {resample} is neither 2 (bilinear) nor 3 (bicubic)")
    mode, resized = _resizing(content, clip, image_size)
    if resized != image_size:
        raise RefusedError(
            f"{path} makes images of {resized} pixels and the model in {path.parent / CONFIG} takes {image_size}: "
            "correct the size"
        )
    usual = (_CLIP_MEAN, _CLIP_STD) if clip else ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    try:
        return PreprocessConfig(
            size=resized,
            mean=tuple(content.get("image_mean") or usual[0]),
            std=tuple(content.get("image_std") or usual[1]),
            interpolation=_RESAMPLE[resample],
            resize_mode=mode,
        )
    except (ValueError, TypeError) as error:
        raise _InexactError(str(error)) from None


def _resizing(content: dict[str, Any], clip: bool, image_size: int) -> tuple[str, int]:
    """(resize mode, side in pixels) of the processor's images."""
    size = content.get("size", 224)
    if isinstance(size, int):
        size = {"shortest_edge": size} if clip else {"height": size, "width": size}
    crop = _crop_size(content, image_size) if content.get("do_center_crop", clip) else None
    if set(size) == {"shortest_edge"}:
        resized = int(size["shortest_edge"])
        if crop is None:
            raise _InexactError("without a centre crop images would not be square")
        if crop != (resized, resized):
            raise _InexactError(
                f"it resizes to {resized} and crops to {crop[0]} x {crop[1]}, and only equal sizes are supported"
            )
        return "shortest", resized
    if set(size) == {"height", "width"} and size["height"] == size["width"]:
        resized = int(size["height"])
        if crop is not None and crop != (resized, resized):
            raise _InexactError("it crops after resizing to a fixed size")
        return "squash", resized
    raise _InexactError(f"its size is {size}, not a shortest_edge or a square of height and width")


def _crop_size(content: dict[str, Any], image_size: int) -> tuple[int, int]:
    crop = content.get("crop_size", image_size)
    if isinstance(crop, dict):
        return int(crop.get("height", 0)), int(crop.get("width", 0))
    return int(crop), int(crop)
