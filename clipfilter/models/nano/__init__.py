"""nano, the bundled model: a small dual encoder that needs no network."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipfilter.errors import RefusedError
from clipfilter.images import PreprocessConfig
from clipfilter.models._torch import set_up_torch
from clipfilter.models.checkpoint import read_state_dict
from clipfilter.models.encoder import TorchEncoder
from clipfilter.models.tokenizer import TextTokenizer
from clipfilter.storage import file_sha256, local_path

if TYPE_CHECKING:
    from torch import Tensor

    from clipfilter.models.nano.network import Nano

HERE = Path(__file__).parent
NANO_CONFIG, WEIGHTS, VOCABULARY = HERE / "nano.json", HERE / "nano.safetensors", HERE / "vocab.txt"


def load_nano(name: str, *, device: str, dtype: str, threads: int | None) -> TorchEncoder:
    """The bundled model (`nano`, or `nano@EDITION`), or a file of its kind (`nano=/path/to/weights.safetensors`).

    A file brings its configuration: in its metadata, as `clipfilter train` writes it, or in a `nano.json` beside it;
    without one it is read like the bundled weights. Raises RefusedError for another edition, and for files that do not
    fit.
    """
    torch_device, torch_dtype = set_up_torch(device, dtype, threads)
    local = name.partition("=")[2]
    weights = local_path(local) if local else WEIGHTS
    state = read_state_dict(weights)
    config = _config_of(weights) if local else bundled_config()
    if not local:
        check_edition(name)
    network = _network(config, state, weights, "is it one of nano's?" if local else "reinstall clipfilter")
    network.place(torch_device, torch_dtype)
    preprocess = PreprocessConfig.from_json(config["preprocess"])
    return TorchEncoder(
        name=name,
        dim=network.dim,
        preprocess=preprocess,
        logit_scale=float(config["logit_scale"]),
        logit_bias=None,
        fingerprint={
            "model": f"nano={weights.name}" if local else f"nano@{config['edition']}",
            "architecture": config["architecture"],
            "weights_sha256": file_sha256(weights),
            "preprocess": preprocess.to_json(),
            "dtype": dtype,
            "backend": f"torch-{torch_device.type}",
        },
        image_tower=network.encode_image,
        text_tower=network.encode_text,
        tokenizer=_tokenizer(int(config["context_length"])),
        cut_to_longest=True,
        device=torch_device,
        dtype=torch_dtype,
        image_chunk=4,
    )


def _network(config: dict[str, Any], state: dict[str, Tensor], weights: Path, fix: str) -> Nano:
    from clipfilter.models.nano.network import Nano, unpack

    network = Nano(config["network"])
    try:
        network.load_state_dict(unpack(state), strict=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:200]
        raise RefusedError(f"the weights {weights} do not fit nano's network: {fix} ({reason})") from None
    return network


def _tokenizer(context_length: int) -> TextTokenizer:
    from tokenizers import BertWordPieceTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads are the engine's to give
    tokenizer = BertWordPieceTokenizer(str(VOCABULARY), lowercase=True)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]

    return TextTokenizer(encode, context_length, pad_id=0, end_id=tokenizer.token_to_id("[SEP]"))


def bundled_config() -> dict[str, Any]:
    """nano.json of the bundled weights."""
    return dict(json.loads(NANO_CONFIG.read_text(encoding="utf-8")))


def check_edition(name: str) -> None:
    """Raise RefusedError unless `name` (`nano` or `nano@EDITION`) is the bundled edition."""
    edition = f"nano@{bundled_config()['edition']}"
    if name not in ("nano", edition):
        raise RefusedError(f"this version of clipfilter bundles {edition}, not {name}: use nano or {edition}")


def nano_config_text(weights: Path | None, logit_scale: float) -> str:
    """nano.json of these weights (None: the bundled ones) with another logit scale, as a file's metadata carries it."""
    config = bundled_config() if weights is None else _config_of(weights)
    return json.dumps({**config, "logit_scale": logit_scale})


def _config_of(weights: Path) -> dict[str, Any]:
    """The configuration of a file: from its metadata, from nano.json beside it, or the bundled one."""
    from safetensors import safe_open

    beside, text = weights.with_name(NANO_CONFIG.name), None
    if weights.suffix == ".safetensors":
        with safe_open(weights, "pt") as file:
            text = (file.metadata() or {}).get(NANO_CONFIG.name)
    if text is None:
        text = (beside if beside.is_file() else NANO_CONFIG).read_text(encoding="utf-8")
    try:
        config: dict[str, Any] = json.loads(text)
        PreprocessConfig.from_json(config["preprocess"])
        if not {"edition", "network", "logit_scale", "context_length", "architecture"} <= set(config):
            raise KeyError("a field is missing")
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"the configuration of {weights} is not nano's ({error}): use its own nano.json") from None
    return config
