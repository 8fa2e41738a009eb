"""nano, the bundled model: a small dual encoder that needs no network."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from clipfilter.errors import RefusedError
from clipfilter.images.preprocess import PreprocessConfig
from clipfilter.models._torch import resolve_device, resolve_dtype, torch_with_torchvision, use_threads
from clipfilter.models.encoder import TorchEncoder

HERE = Path(__file__).parent
CONFIG, WEIGHTS, VOCABULARY = HERE / "nano.json", HERE / "nano.safetensors", HERE / "vocab.txt"


def load_nano(name: str, *, device: str, dtype: str, threads: int | None) -> TorchEncoder:
    """The bundled model (`nano`, or `nano@EDITION`); RefusedError for another edition or damaged weights."""
    torch_with_torchvision()
    from tokenizers import BertWordPieceTokenizer

    from clipfilter.models.checkpoint import file_sha256, read_state_dict
    from clipfilter.models.nano.network import Nano, unpack

    torch_device, torch_dtype = resolve_device(device), resolve_dtype(dtype)
    use_threads(threads)
    config = json.loads(CONFIG.read_text(encoding="utf-8"))
    edition = f"nano@{config['edition']}"
    if name not in ("nano", edition):
        raise RefusedError(f"this version of clipfilter bundles {edition}, not {name}: use nano or {edition}")
    network = Nano(config["network"])
    try:
        network.load_state_dict(unpack(read_state_dict(WEIGHTS)), strict=True)
    except RuntimeError as error:
        raise RefusedError(f"the bundled weights {WEIGHTS} do not fit: reinstall clipfilter ({error})") from None
    network.place(torch_device, torch_dtype)
    preprocess = PreprocessConfig.from_json(config["preprocess"])

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads are the engine's to give
    tokenizer = BertWordPieceTokenizer(str(VOCABULARY), lowercase=True)

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]

    return TorchEncoder(
        name=name,
        dim=network.dim,
        preprocess=preprocess,
        logit_scale=float(config["logit_scale"]),
        logit_bias=None,
        fingerprint={
            "model": edition,
            "architecture": config["architecture"],
            "weights_sha256": file_sha256(WEIGHTS),
            "preprocess": preprocess.to_json(),
            "dtype": dtype,
            "backend": f"torch-{torch_device.type}",
        },
        image_tower=network.encode_image,
        text_tower=network.encode_text,
        tokenize=tokenize,
        context_length=int(config["context_length"]),
        pad_id=0,
        end_id=tokenizer.token_to_id("[SEP]"),
        cut_to_longest=True,
        device=torch_device,
        dtype=torch_dtype,
        image_chunk=4,
    )
