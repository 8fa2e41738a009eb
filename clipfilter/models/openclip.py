"""open_clip models: by name and weights tag, or from a local checkpoint."""

from __future__ import annotations

import difflib
import logging
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

from clipfilter.errors import RefusedError
from clipfilter.images.preprocess import PreprocessConfig
from clipfilter.models._torch import resolve_device, resolve_dtype, torch_with_torchvision, use_threads
from clipfilter.models.checkpoint import file_sha256, read_state_dict
from clipfilter.models.encoder import TorchEncoder
from clipfilter.storage import local_path

if TYPE_CHECKING:
    from torch import Tensor, nn

# CLIP's tokenizer is plain Python and quadratic in the length of a word. Nothing beyond these bounds can reach
# a context of 77 tokens as words do, so they change no embedding of a caption that a person wrote.
_MAX_CHARACTERS = 20_000
_LONG_RUN = re.compile(r"(\S{1000})(?=\S)")
_MAX_CACHED_WORDS = 200_000


def load_openclip(name: str, *, device: str, dtype: str, threads: int | None) -> TorchEncoder:
    """`ARCH/TAG` or `ARCH=/path/to/checkpoint` as an encoder; RefusedError as in `models.load_encoder`."""
    torch_with_torchvision()
    import open_clip

    torch_device, torch_dtype = resolve_device(device), resolve_dtype(dtype)
    use_threads(threads)
    architecture, _, local = name.partition("=")
    architecture, _, tag = architecture.partition("/") if not local else (architecture, "", "")
    config = open_clip.get_model_config(architecture)
    if config is None:
        close = difflib.get_close_matches(architecture, open_clip.list_models(), n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else "`nano` works everywhere."
        raise RefusedError(f"open_clip has no architecture {architecture!r}; {hint}")
    text_config = config["text_cfg"]
    if text_config.get("hf_tokenizer_name") or text_config.get("hf_model_name") or "siglip" in architecture.lower():
        raise RefusedError(f"{architecture} has a tokenizer other than CLIP's, which is not supported yet")

    if local:
        path = local_path(local)
        quick_gelu = bool(config.get("quick_gelu", False))
        preprocessing = _usual_preprocessing(architecture)
        shown = f"{architecture}={path.name}"
    else:
        tag_config = _tag_config(architecture, tag)
        path = _download(architecture, tag, tag_config)
        # open_clip only warns when the tag's activation is not the architecture's; the weights decide.
        quick_gelu = bool(tag_config.get("quick_gelu", False))
        preprocessing = tag_config
        shown = f"{architecture}/{tag}"

    state = read_state_dict(path)
    with _quiet():
        model = open_clip.create_model(
            architecture, precision=dtype, load_weights=False, pretrained_text=False, quick_gelu=quick_gelu
        )
    _load_strictly(model, state, architecture, path)
    model = model.to(torch_device).eval().requires_grad_(False)
    preprocess = _preprocess_config(preprocessing, model.visual.image_size)
    tokenizer = open_clip.get_tokenizer(architecture)
    text_tower = _causal_text_tower(model)
    logit_bias = getattr(model, "logit_bias", None)
    return TorchEncoder(
        name=name,
        dim=int(config["embed_dim"]),
        preprocess=preprocess,
        logit_scale=float(model.logit_scale.detach().float().exp()),
        logit_bias=None if logit_bias is None else float(logit_bias.detach()),
        fingerprint={
            "model": shown,
            "architecture": architecture,
            "weights_sha256": file_sha256(path),
            "activation": "quick_gelu" if quick_gelu else "gelu",
            "preprocess": preprocess.to_json(),
            "dtype": dtype,
            "backend": f"torch-{torch_device.type}",
        },
        image_tower=model.encode_image,
        text_tower=text_tower or model.encode_text,
        tokenize=_tokenize_with(tokenizer),
        context_length=int(tokenizer.context_length),
        pad_id=0,
        end_id=tokenizer.eot_token_id,
        cut_to_longest=text_tower is not None,
        device=torch_device,
        dtype=torch_dtype,
    )


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


def _download(architecture: str, tag: str, tag_config: dict[str, Any]) -> Path:
    """The local file of these weights, from open_clip's cache or the network, or RefusedError."""
    from open_clip.pretrained import download_pretrained

    try:
        with _quiet(), _hub_offline_if_unreachable():
            return Path(download_pretrained(tag_config))
    except Exception as error:  # every client library has its own; all mean that the file could not be had
        hub = str(tag_config.get("hf_hub", "")).strip("/")
        source = f"https://huggingface.co/{hub}" if hub else tag_config.get("url", "its publisher")
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise RefusedError(
            f"the weights of {architecture}/{tag} are not in the cache and cannot be downloaded ({reason}). "
            f"On a machine with a network, download the .safetensors (or .bin, .pt) file from {source}, copy it "
            f"here and use --model {architecture}=/path/to/that/file"
        ) from None


def _usual_preprocessing(architecture: str) -> dict[str, Any]:
    """What all published weights of this architecture agree on; {} (CLIP's own) where there is no such thing."""
    import open_clip

    keys = ("mean", "std", "interpolation", "resize_mode")
    found = []
    for tag in open_clip.list_pretrained_tags_by_model(architecture):
        config = open_clip.get_pretrained_cfg(architecture, tag)
        found.append({key: config[key] for key in keys if config.get(key) is not None})
    return found[0] if found and all(config == found[0] for config in found) else {}


def _preprocess_config(overrides: dict[str, Any], image_size: int | tuple[int, int]) -> PreprocessConfig:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged = merge_preprocess_dict(PreprocessCfg(), overrides)
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height != width:
        raise RefusedError(f"models with inputs that are not square ({height} x {width}) are not supported")
    return PreprocessConfig(
        size=height,
        mean=tuple(merged["mean"]),
        std=tuple(merged["std"]),
        interpolation=merged["interpolation"],
        resize_mode=merged["resize_mode"],
        fill_color=merged["fill_color"],
    )


def _load_strictly(model: nn.Module, state: dict[str, Tensor], architecture: str, path: Path) -> None:
    """Copy `state` into `model`, every tensor of the same name and shape; RefusedError otherwise.

    open_clip's own loader would silently interpolate position embeddings of another image size.
    """
    from open_clip.factory import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for name in (
        "input_resolution",
        "context_length",
        "vocab_size",
    ):  # OpenAI's own files carry these numbers
        state.pop(name, None)
    for name in ("logit_scale", "logit_bias"):  # written as a scalar or as one element
        mine = getattr(model, name, None)
        if name in state and mine is not None and state[name].numel() == mine.numel():
            state[name] = state[name].reshape(mine.shape)
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        details = [line.strip() for line in str(error).splitlines()[1:]]
        reason = details[0][:200] if details else str(error)[:200]
        raise RefusedError(f"the checkpoint {path} does not fit the architecture {architecture}: {reason}") from None


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


def _tokenize_with(tokenizer: Any) -> Callable[[Sequence[str]], list[list[int]]]:
    """CLIP's byte-pair tokenizer without truncation, with bounds on what one text can cost."""
    specials = dict(tokenizer.cache)

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        if len(tokenizer.cache) > _MAX_CACHED_WORDS:  # it never forgets; millions of captions would fill the memory
            tokenizer.cache = dict(specials)
        return [[tokenizer.sot_token_id, *tokenizer.encode(_bounded(text)), tokenizer.eot_token_id] for text in texts]

    return tokenize


def _bounded(text: str) -> str:
    return _LONG_RUN.sub(r"\1 ", text[:_MAX_CHARACTERS])


@contextmanager
def _hub_offline_if_unreachable() -> Iterator[None]:
    """Ask only the cache where the hub cannot be reached; its client would retry every file for most of a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    hub = urlsplit(constants.ENDPOINT)
    if not getproxies():
        try:
            socket.create_connection((hub.hostname or "", hub.port or 443), timeout=10).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip from warning on the root logger about weights that are loaded a moment later."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
