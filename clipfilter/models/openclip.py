"""open_clip models: by name and weights tag, from a hub repository or its copy, or from a local checkpoint."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from clipfilter.errors import RefusedError, reason
from clipfilter.images import PreprocessConfig
from clipfilter.models import hub
from clipfilter.models._torch import resolve_dtype, set_up_torch
from clipfilter.models.checkpoint import load_strictly, read_state_dict
from clipfilter.models.encoder import TorchEncoder
from clipfilter.models.tokenizer import TextTokenizer, open_clip_tokenizer, refuse_remote_code
from clipfilter.storage import file_sha256, local_path

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("clipfilter.models")

HUB_PREFIX = "hf-hub:"
CONFIG = "open_clip_config.json"
#: Names of weights in a repository or its copy, in the order in which they are taken.
WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pt", "open_clip_pytorch_model.pth",
)  # fmt: skip
_QUICK = "-quickgelu"
#: Numbers that only OpenAI's own files carry among their tensors; those models were trained with QuickGELU.
_OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")


@dataclass
class Source:
    """What is known of a model before its weights are read.

    architecture: for messages and the fingerprint. config: open_clip's (`embed_dim`, `vision_cfg`, `text_cfg`).
    preprocessing: open_clip's `preprocess_cfg`, {} for CLIP's own. quick_gelu: the activation as the publisher of these
    weights states it, None where nobody does. folder: where files beside the weights are looked for. bare: whether there
    is nothing but a file and the name of an architecture.
    """

    shown: str
    architecture: str
    config: dict[str, Any]
    weights: Path
    preprocessing: dict[str, Any]
    quick_gelu: bool | None
    folder: Path | None
    bare: bool = False


def load_openclip(name: str, *, device: str, dtype: str, threads: int | None) -> TorchEncoder:
    """`ARCH/TAG`, `ARCH=/path/to/checkpoint` or `hf-hub:ORG/NAME` (or `hf-hub:/folder`, a copy of such a repository).

    Raises RefusedError as `models.load_encoder` says.
    """
    torch_device, torch_dtype = set_up_torch(device, dtype, threads)
    from open_clip.hf_model import HFTextEncoder

    source = find_source(name)
    tokenizer = open_clip_tokenizer(source.config["text_cfg"], source.folder)
    state = read_state_dict(source.weights)
    sha256 = file_sha256(source.weights)
    quick_gelu = _activation(source, state, sha256)
    model = _build(source, quick_gelu, dtype)
    preprocess = _preprocess_config(source, model.visual.image_size)
    _load_weights(model, state, source)
    model = model.to(torch_device).eval().requires_grad_(False)
    text_tower = _causal_text_tower(model)
    masks_padding = isinstance(getattr(model, "text", None), HFTextEncoder)
    logit_bias = getattr(model, "logit_bias", None)
    encoder = TorchEncoder(
        name=name,
        dim=int(source.config["embed_dim"]),
        preprocess=preprocess,
        logit_scale=float(model.logit_scale.detach().float().exp()),
        logit_bias=None if logit_bias is None else float(logit_bias.detach()),
        fingerprint={
            "model": source.shown,
            "architecture": source.architecture,
            "weights_sha256": sha256,
            **_further_facts(source, tokenizer),
            "activation": "quick_gelu" if quick_gelu else "gelu",
            "preprocess": preprocess.to_json(),
            "dtype": dtype,
            "backend": f"torch-{torch_device.type}",
        },
        image_tower=model.encode_image,
        text_tower=text_tower or model.encode_text,
        tokenizer=tokenizer,
        cut_to_longest=text_tower is not None or masks_padding,
        device=torch_device,
        dtype=torch_dtype,
    )
    if dtype != "fp32":
        _refuse_unless_it_computes(encoder, dtype)
    return encoder


def _refuse_unless_it_computes(encoder: TorchEncoder, dtype: str) -> None:
    """Some of open_clip's towers (CoCa's) mix number formats in half precision; found here, not in the middle of a run."""
    size = encoder.preprocess.size
    try:
        encoder.encode_images(np.zeros((1, 3, size, size), np.uint8))
        encoder.encode_texts(["a photo"])
    except RuntimeError as error:
        raise RefusedError(f"{encoder.name} cannot compute in {dtype} ({reason(error)}): use --dtype fp32") from None


def _further_facts(source: Source, tokenizer: TextTokenizer) -> dict[str, str]:
    """What else decides the numbers where it is not open_clip's own: a repository's config, a tower's, a tokenizer."""
    facts = {}
    configs = [source.config] if source.architecture.startswith(HUB_PREFIX) else []
    if source.config["text_cfg"].get("hf_model_name"):
        configs.append(text_tower_config(source))
    if configs:
        facts["config_sha256"] = hashlib.sha256(json.dumps(configs, sort_keys=True).encode()).hexdigest()
    if tokenizer.sha256 is not None:
        facts["tokenizer_sha256"] = tokenizer.sha256
    return facts


# --- which model ------------------------------------------------------------------------------------------------------


def find_source(name: str) -> Source:
    """Where this model's weights are (downloaded unless cached) and what is known of them; RefusedError."""
    if name.startswith(HUB_PREFIX):
        return _find_repository(name.removeprefix(HUB_PREFIX))
    architecture, _, local = name.partition("=")
    if local:
        return _find_checkpoint(architecture, local_path(local))
    architecture, _, tag = architecture.partition("/")
    config = architecture_config(architecture)
    tag_config = _tag_config(architecture, tag)
    path = _download(architecture, tag, tag_config)
    return Source(
        f"{architecture}/{tag}", architecture, config, path, tag_config,
        # open_clip only warns when the tag's activation is not the architecture's; the weights decide.
        quick_gelu=tag_config.get("quick_gelu"), folder=None,
    )  # fmt: skip


def architecture_config(architecture: str) -> dict[str, Any]:
    """open_clip's config of an architecture; `-quickgelu` may follow any of them. RefusedError for unknown ones."""
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None and architecture.endswith(_QUICK):
        config = open_clip.get_model_config(architecture.removesuffix(_QUICK))
        config = config and {**config, "quick_gelu": True}
    if config is None:
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else "`nano` works everywhere."
        raise RefusedError(f"open_clip has no architecture {architecture!r}; {hint}")
    return dict(config)


def _find_checkpoint(architecture: str, path: Path) -> Source:
    """A local file, with what is known of it: from an open_clip_config.json beside it, or from its published hash."""
    config = architecture_config(architecture)
    if path.is_dir():
        raise RefusedError(
            f"{path} is a folder: name the checkpoint in it, or load the whole folder with hf-hub:{path} (open_clip's) "
            f"or hf:{path} (transformers')"
        )
    if not path.is_file():
        raise RefusedError(f"the checkpoint {path} does not exist")
    shown = f"{architecture}={path.name}"
    beside = refuse_remote_code(path.parent / CONFIG)
    if isinstance(beside.get("model_cfg"), dict):
        stated = beside["model_cfg"]
        sides = [
            (c.get("embed_dim"), _image_size(c), c.get("text_cfg", {}).get("context_length")) for c in (config, stated)
        ]
        if sides[0] != sides[1]:
            raise RefusedError(
                f"{path.parent / CONFIG} describes another architecture than {architecture}: use hf-hub:{path.parent} to load "
                "what it describes, or move the checkpoint to a folder of its own"
            )
        preprocessing = dict(beside.get("preprocess_cfg") or {})
        return Source(
            shown, architecture, config, path, preprocessing, bool(stated.get("quick_gelu", False)), path.parent
        )
    return Source(
        shown, architecture, config, path, _usual_preprocessing(architecture) or {}, None, path.parent, bare=True
    )


def _find_repository(place: str) -> Source:
    """A repository in open_clip's layout, on the hub or copied to a folder."""
    if not place:
        raise RefusedError(f"{HUB_PREFIX} names no model: use {HUB_PREFIX}ORG/NAME or {HUB_PREFIX}/folder")
    folder, local = local_path(place), hub.is_folder(place)
    if local:
        if not (folder / CONFIG).is_file():
            raise RefusedError(
                f"{folder} has no {CONFIG}: copy the repository's {CONFIG} and {WEIGHTS[0]} there, or use hf:{folder} for a "
                "transformers model"
            )
        weights = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
        config_path = folder / CONFIG
    else:
        config_path, weights = fetch_repository(place)
        folder = config_path.parent
    if weights is None:
        raise RefusedError(f"{folder if local else place} has none of open_clip's weights: put {WEIGHTS[0]} there")
    content = refuse_remote_code(config_path)
    config = content.get("model_cfg")
    if not isinstance(config, dict) or not (
        all(isinstance(config.get(key), dict) for key in ("vision_cfg", "text_cfg"))
        and isinstance(config.get("embed_dim"), int)
    ):
        raise RefusedError(
            f"{config_path} describes no open_clip model (model_cfg with embed_dim, vision_cfg and text_cfg)"
        )
    preprocessing = dict(content.get("preprocess_cfg") or {})
    shown = HUB_PREFIX + (folder.name if local else place)
    stated = config.get("quick_gelu")
    return Source(shown, shown, config, weights, preprocessing, None if stated is None else bool(stated), folder)


def fetch_repository(repo: str) -> tuple[Path, Path | None]:
    """(config, weights) of a hub repository in open_clip's layout, downloaded unless cached; RefusedError."""
    try:
        config = hub.fetch(repo, CONFIG)
        if config is None:
            raise RefusedError(f"https://huggingface.co/{repo} has no {CONFIG}: use hf:{repo} for a transformers model")
        weights = hub.fetch_first(repo, WEIGHTS, config.parent.name)  # the folder of a snapshot is named by its commit
    except hub.Unavailable as error:
        raise RefusedError(
            f"{HUB_PREFIX}{repo} cannot be had ({error}): on a machine with a network, download {CONFIG} and {WEIGHTS[0]} "
            f"from https://huggingface.co/{repo} into a folder, copy it here and use --model {HUB_PREFIX}/path/to/that/folder"
        ) from None
    return config, weights


def _image_size(config: dict[str, Any]) -> Any:
    size = config.get("vision_cfg", {}).get("image_size", 224)
    return tuple(size) if isinstance(size, list) else (size, size)


def _tag_config(architecture: str, tag: str) -> dict[str, Any]:
    """open_clip's record of the weights called `tag`: where they are, their activation and preprocessing."""
    import open_clip

    config = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if config:
        return dict(config)
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    wrong = f"{architecture} has no weights called {tag!r}" if tag else f"{architecture} needs the name of its weights"
    choice = f"one of {', '.join(f'{architecture}/{t}' for t in tags)}, or " if tags else ""
    raise RefusedError(f"{wrong}: use {choice}{architecture}=/path/to/checkpoint.safetensors")


def cached_weights(tag_config: dict[str, Any]) -> Path | None:
    """The file of these weights in open_clip's caches, or None; asks no network."""
    repo, _, file = str(tag_config.get("hf_hub", "")).rpartition("/")
    if repo:
        files: tuple[str, ...] = (file,) if file else WEIGHTS
        if file.endswith((".bin", ".pt", ".pth")):
            files = (file.rpartition(".")[0] + ".safetensors", file)
        return next((path for name in files if (path := hub.cached(repo, name)) is not None), None)
    url = str(tag_config.get("url", ""))
    path = Path("~/.cache/clip").expanduser() / url.rpartition("/")[2]
    return path if url and path.is_file() else None


def _download(architecture: str, tag: str, tag_config: dict[str, Any]) -> Path:
    """The local file of these weights, from open_clip's cache or the network, or RefusedError."""
    from open_clip.pretrained import download_pretrained

    found = cached_weights(tag_config)
    if found is not None:
        return found
    try:
        with quiet(), hub.offline_if_unreachable():
            return Path(download_pretrained(tag_config))
    except Exception as error:  # every client library has its own; all mean that the file could not be had
        why = reason(error)
        if isinstance(error, FileNotFoundError) and not hub.is_reachable():
            why = "the hub cannot be reached"
        repo, _, file = str(tag_config.get("hf_hub", "")).rpartition("/")
        source = f"https://huggingface.co/{repo}" if repo else tag_config.get("url", "its publisher")
        files = f"{file or f'{WEIGHTS[0]} and {CONFIG}'} from {source}" if repo else f"the file {source}"
        tokenizer = architecture_config(architecture)["text_cfg"].get("hf_tokenizer_name")
        if tokenizer:
            files += f", and tokenizer.json and tokenizer_config.json from https://huggingface.co/{tokenizer}"
        raise RefusedError(
            f"the weights of {architecture}/{tag} are not in the cache and cannot be downloaded ({why}). On a machine "
            f"with a network, download {files}, copy them here into one folder and use --model "
            f"{architecture}=/path/to/{file or WEIGHTS[0] if repo else 'that file'}"
        ) from None


def _usual_preprocessing(architecture: str) -> dict[str, Any] | None:
    """What all published weights of this architecture agree on, {} where there are none; None if they disagree."""
    import open_clip

    keys = ("mean", "std", "interpolation", "resize_mode")
    found: list[dict[str, Any]] = []
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        config = open_clip.get_pretrained_cfg(architecture, tag)
        found.append({key: config[key] for key in keys if config.get(key) is not None})
    if not found:
        return {}
    return found[0] if all(config == found[0] for config in found) else None


# --- activation -------------------------------------------------------------------------------------------------------


def _published_activations(architecture: str) -> set[bool]:
    """The activations (QuickGELU or not) that published weights of this architecture were trained with."""
    import open_clip

    plain = architecture.removesuffix(_QUICK)
    found = set()
    for name in (plain, plain + _QUICK):
        usual = (open_clip.get_model_config(name) or {}).get("quick_gelu", False)
        for tag in open_clip.list_pretrained_tags_by_model(name):
            found.add(bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", usual)))
    return found


def _published(sha256: str) -> dict[str, Any] | None:
    """open_clip's record of the published file with this hash; its URLs carry hashes, whole or their beginning."""
    import open_clip

    for architecture, tag in open_clip.list_pretrained():
        config = open_clip.get_pretrained_cfg(architecture, tag)
        parts = str(config.get("url", "")).split("/")
        if "openaipublic" in config.get("url", ""):
            beginning = parts[-2]
        elif "mlfoundations" in config.get("url", ""):
            beginning = parts[-1].rpartition(".")[0].rpartition("-")[2]
        else:
            continue
        if len(beginning) >= 8 and sha256.startswith(beginning):
            return dict(config)
    return None


def _activation(source: Source, state: dict[str, Tensor], sha256: str) -> bool:
    """Whether these weights want QuickGELU. RefusedError where what is known contradicts what was asked for.

    Of a bare file that can be recognised the preprocessing is filled in too; of another one, doubts are logged.
    """
    published = _published(sha256)
    proven: bool | None = None
    if all(name in state for name in _OPENAI_NUMBERS):
        proven = True
    elif published is not None:
        proven = bool(published.get("quick_gelu", False))
    if source.bare and proven is not None:
        source.preprocessing = published or {}
    elif source.bare:
        _log_doubts(source)
    stated = source.quick_gelu
    if proven is not None and stated is not None and proven != stated:
        names = {True: "QuickGELU", False: "GELU"}
        raise RefusedError(
            f"{source.weights} was trained with {names[proven]} but its configuration says {names[stated]}: correct "
            f'"quick_gelu" in {CONFIG}'
        )
    asked = bool(source.config.get("quick_gelu", False))
    known = proven if stated is None else stated
    if known is None:
        return asked
    if asked and not known:
        plain = source.architecture.removesuffix(_QUICK)
        raise RefusedError(f"{source.weights} was trained with GELU, not with QuickGELU: use {plain}={source.weights}")
    return known


def _log_doubts(source: Source) -> None:
    """Say what a bare file leaves open, where published weights of its architecture differ."""
    architecture, path = source.architecture, source.weights
    if _usual_preprocessing(architecture) is None:
        log.warning(
            "nothing says how %s wants its images, and published weights of %s differ: it is read with CLIP's own "
            "preprocessing; put its %s beside it to be sure", path.name, architecture, CONFIG,
        )  # fmt: skip
    published = _published_activations(architecture)
    asked = bool(source.config.get("quick_gelu", False))
    if published and published != {asked}:
        plain = architecture.removesuffix(_QUICK)
        other = plain if architecture.endswith(_QUICK) else plain + _QUICK
        kinds = "come in both kinds" if len(published) > 1 else f"are all {'GELU' if asked else 'QuickGELU'}"
        log.warning(
            "nothing in %s says whether it was trained with GELU or QuickGELU, and published weights of %s %s: it is read as "
            "%s says; use %s=%s if that is wrong, or put its %s beside it",
            path.name, plain, kinds, architecture, other, path, CONFIG,
        )  # fmt: skip


# --- the network ------------------------------------------------------------------------------------------------------


def _build(source: Source, quick_gelu: bool, dtype: str) -> Any:
    """The randomly initialised network of this config, in `dtype`; RefusedError where open_clip cannot build it."""
    import open_clip
    from open_clip.hf_model import HFTextEncoder

    config = deepcopy(source.config) | {"quick_gelu": quick_gelu}
    text_config = config["text_cfg"]
    if ":" in str(config["vision_cfg"].get("timm_model_name") or ""):
        raise RefusedError(f"{source.shown} names an image tower outside of timm, which is not supported")
    with tempfile.TemporaryDirectory(prefix="clipfilter-model-") as folder:
        if text_config.get("hf_model_name"):
            tower = Path(folder) / "text"
            tower.mkdir()
            (tower / "config.json").write_text(json.dumps(text_tower_config(source)), encoding="utf-8")
            text_config["hf_model_name"] = str(tower)
        # open_clip has no public way to build a model from a config but to read it from a folder.
        content = {"model_cfg": config, "preprocess_cfg": {}}
        (Path(folder) / CONFIG).write_text(json.dumps(content), encoding="utf-8")
        try:
            with quiet():
                model = open_clip.create_model(
                    f"local-dir:{folder}", precision=dtype, load_weights=False, pretrained_text=False
                )
        except (TypeError, ValueError, KeyError, AttributeError, AssertionError, RuntimeError, ImportError) as error:
            raise RefusedError(
                f"open_clip cannot build {source.shown} ({reason(error)}): is its config complete?"
            ) from None
    if dtype != "fp32" and isinstance(getattr(model, "text", None), HFTextEncoder):
        # open_clip leaves parts of transformers' towers in float32, which only autocast would bridge.
        model.text.to(resolve_dtype(dtype))
    return model


def text_tower_config(source: Source) -> dict[str, Any]:
    """The transformers config of the text tower: from beside the weights, the hub's cache, or the hub; RefusedError."""
    repo = str(source.config["text_cfg"]["hf_model_name"])
    from open_clip.hf_configs import arch_dict

    found = source.folder and source.folder / "config.json"
    content = refuse_remote_code(found) if found else {}
    if content.get("model_type") not in arch_dict:
        try:
            fetched = hub.fetch(repo, "config.json")
        except hub.Unavailable as error:
            where = f"into {source.folder}, beside the checkpoint" if source.folder else "beside the checkpoint"
            raise RefusedError(
                f"the text tower of {source.shown} needs the config of {repo}, which cannot be had ({error}): download "
                f"config.json and the tokenizer's files from https://huggingface.co/{repo} and put them {where}"
            ) from None
        content = refuse_remote_code(fetched) if fetched else {}
    if content.get("model_type") not in arch_dict:
        raise RefusedError(f"{repo} is no text tower that open_clip knows: use one of {', '.join(arch_dict)}")
    return content


def _preprocess_config(source: Source, image_size: int | tuple[int, int]) -> PreprocessConfig:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged = merge_preprocess_dict(PreprocessCfg(), source.preprocessing)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height != width:
        raise RefusedError(f"models with inputs that are not square ({height} x {width}) are not supported")
    size = source.preprocessing.get("size")
    if size is not None and set(size if isinstance(size, list | tuple) else [size]) != {height}:
        raise RefusedError(
            f"the preprocessing of {source.shown} makes images of {size} pixels and its image tower takes {height}: correct "
            f"the size in preprocess_cfg of {CONFIG}"
        )
    try:
        if merged["mode"] != "RGB":
            raise ValueError(f"images must be RGB, not {merged['mode']}")
        return PreprocessConfig(
            size=height,
            mean=tuple(merged["mean"]),
            std=tuple(merged["std"]),
            interpolation=merged["interpolation"],
            resize_mode=merged["resize_mode"],
            fill_color=merged["fill_color"],
        )
    except (ValueError, TypeError) as error:
        raise RefusedError(f"the preprocessing of {source.shown} cannot be done exactly: {error}") from None


def _load_weights(model: nn.Module, state: dict[str, Tensor], source: Source) -> None:
    """Copy `state` into `model`, every tensor of the same name and shape; RefusedError otherwise.

    open_clip's own loader would silently interpolate position embeddings of another image size.
    """
    from open_clip.factory import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    path = source.weights
    refusal = f"the checkpoint {path} does not fit the architecture {source.architecture}"
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        raise RefusedError(
            f"the checkpoint {path} is a transformers model: use hf:{path.parent}, with its config.json beside it"
        )
    try:
        state = convert_state_dict(model, state)  # Apple's own MobileCLIP files
    except (KeyError, AttributeError, RuntimeError, ValueError) as error:
        raise RefusedError(f"{refusal}: {reason(error)}") from None
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    expected = model.state_dict()
    for name in [*_OPENAI_NUMBERS, "text.transformer.embeddings.position_ids"]:
        if name not in expected:
            state.pop(name, None)
    for name in [name for name in state if name.endswith("attn_mask") and name not in expected]:
        del state[name]  # a scripted model keeps its causal mask among its tensors
    load_strictly(model, state, refusal)


def _causal_text_tower(model: Any) -> Callable[[Tensor], Tensor] | None:
    """The text forward for ids of any length up to the context, or None where cutting changes the result.

    In a causal tower that reads its answer at the end token nothing after that token can matter, so a batch is
    as long as its longest text. Towers that attend both ways, append a class token or pool the last position
    differ.
    """
    import torch
    from open_clip.transformer import TextTransformer, text_global_pool

    text = getattr(model, "text", model)
    if text is not model and not isinstance(text, TextTransformer):
        return None
    pool = text.text_pool_type if text is model else text.pool_type
    end_id = text.text_eos_id if text is model else text.eos_id
    if text.attn_mask is None or getattr(text, "cls_emb", None) is not None or pool not in ("argmax", "eos"):
        return None

    def forward(ids: Tensor) -> Tensor:
        length = ids.shape[1]
        dtype = text.transformer.get_cast_dtype()
        x = text.token_embedding(ids).to(dtype) + text.positional_embedding[:length].to(dtype)
        x = text.transformer(x, attn_mask=text.attn_mask[:length, :length])
        x = text_global_pool(text.ln_final(x), ids, pool, eos_token_id=end_id)
        projection = text.text_projection
        if projection is not None:
            x = projection(x) if isinstance(projection, torch.nn.Linear) else x @ projection
        return cast("Tensor", x)

    return forward


@contextmanager
def quiet() -> Iterator[None]:
    """Keep open_clip from warning on the root logger about weights that are loaded a moment later."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
