"""Models exported to ONNX (`onnx:DIR`): a folder that is checked, then run by ONNX Runtime behind a TorchEncoder."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipfilter.errors import RefusedError, reason
from clipfilter.images import PreprocessConfig
from clipfilter.models.tokenizer import TextTokenizer
from clipfilter.storage import file_sha256, local_path

if TYPE_CHECKING:
    import onnxruntime
    from torch import Tensor

    from clipfilter.models.encoder import TorchEncoder

log = logging.getLogger("clipfilter.models")

ONNX_PREFIX = "onnx:"
CONFIG, IMAGE, TEXT = "config.json", "image.onnx", "text.onnx"
#: Version of the folder's layout; a folder with a higher one is refused.
FORMAT = 1

Providers = Sequence[str | tuple[str, dict[str, str]]]
_CPU: Providers = ("CPUExecutionProvider",)
INSTALL = "pip install 'clipfilter[onnx]'"
#: Images per forward pass on a CPU: the activations of more fall out of its cache.
_CPU_IMAGE_CHUNK = 8


def load_onnx(name: str, *, device: str, dtype: str, threads: int | None) -> TorchEncoder:
    """`onnx:DIR`, a folder written by `clipfilter models export`, as an encoder on ONNX Runtime.

    device: "cpu", or "cuda" where onnxruntime-gpu is installed. dtype: "fp32"; an exported graph has its number format
    inside, int8 weights included. threads: of ONNX Runtime's operators; None takes every core this process may use.

    Raises RefusedError when the folder is missing, incomplete, damaged or of a newer format, or cannot run on `device`.
    """
    folder = local_path(name.removeprefix(ONNX_PREFIX))
    config = read_folder(folder)
    if dtype != "fp32":
        raise RefusedError(
            f"an exported model computes in the number format of its graph, not in {dtype}: use --dtype fp32"
        )
    if threads is not None and threads < 1:
        raise RefusedError(f"threads must be at least 1, not {threads}")
    providers = _providers(device)
    threads = threads or len(os.sched_getaffinity(0))

    import torch

    from clipfilter.models._torch import use_threads
    from clipfilter.models.encoder import TorchEncoder

    use_threads(threads)
    if note := loss_note(config):
        log.warning("%s: %s", name, note)
    ids = config["tokenizer"]
    on_cpu = providers == _CPU
    return TorchEncoder(
        name=name,
        dim=config["dim"],
        preprocess=PreprocessConfig.from_json(config["preprocess"]),
        logit_scale=config["logit_scale"],
        logit_bias=config["logit_bias"],
        fingerprint=config["fingerprint"]
        | {"model": f"onnx:{folder.name}", "backend": "onnxruntime-cpu" if on_cpu else "onnxruntime-cuda"},
        image_tower=_tower(folder / IMAGE, providers, threads),
        text_tower=_tower(folder / TEXT, providers, threads),
        tokenizer=TextTokenizer(
            load_tokenizer(folder, ids), config["context_length"], ids["pad_id"], ids["end_id"], ids["pad_left"]
        ),
        cut_to_longest=config["cut_to_longest"],
        device=torch.device("cpu"),  # where tensors are handed over; ONNX Runtime moves them to its own device
        dtype=torch.float32,
        image_chunk=_CPU_IMAGE_CHUNK if on_cpu else None,
    )


def read_folder(folder: Path) -> dict[str, Any]:
    """The config of an exported folder after every file was found to be what it says; RefusedError otherwise."""
    path = folder / CONFIG
    if not path.is_file():
        raise RefusedError(
            f"{folder} is not an exported model (it has no {CONFIG}): write one with `clipfilter models export`"
        )
    again = "export the model again"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        version, files = int(config["format"]), dict(config["files"])
    except (ValueError, KeyError, TypeError):
        raise RefusedError(f"{path} is damaged: {again}") from None
    if version > FORMAT:
        raise RefusedError(
            f"{folder} has format {version} and this clipfilter reads up to {FORMAT}: update clipfilter, or {again}"
        )
    for file in sorted({IMAGE, TEXT, *files}):
        if Path(file).name != file:
            raise RefusedError(f"{path} names a file outside of its folder ({file}): {again}")
        if not (folder / file).is_file():
            raise RefusedError(f"{folder} is incomplete ({file} is missing): {again}")
        if file_sha256(folder / file) != files.get(file):
            raise RefusedError(f"{folder / file} is not the file that was exported (its sha256 differs): {again}")
    missing = _FIELDS - set(config)
    if missing:
        raise RefusedError(f"{path} is damaged ({', '.join(sorted(missing))} missing): {again}")
    return dict(config)


_FIELDS = {
    "source", "fingerprint", "dim", "context_length", "logit_scale", "logit_bias", "preprocess", "tokenizer",
    "cut_to_longest", "parameters", "quantisation",
}  # fmt: skip


def folder_size(folder: Path) -> int:
    """Bytes of all files of an exported folder."""
    return sum(path.stat().st_size for path in folder.iterdir())


def loss_note(config: dict[str, Any]) -> str | None:
    """What int8 costs, as it was measured at export; None for a folder in float32."""
    if config["quantisation"] is None or config["quantisation"]["loss"] is None:
        return None
    loss = config["quantisation"]["loss"]
    towers = [name for name, kind in config["quantisation"]["towers"].items() if kind == "int8"]
    parts = [f"int8 {' and '.join(towers)} tower{'s' if len(towers) > 1 else ''}"]
    for kind in ("images", "texts"):
        if loss[kind] is not None:
            found = loss[kind]
            parts.append(f"cosine to float32 mean {found['mean']:.4f}, min {found['min']:.4f} on {found['n']:,} {kind}")
    if loss["policy"] is not None:
        policy = loss["policy"]
        parts.append(f"{policy['changed']:,} of {policy['rows']:,} decisions of the policy {policy['name']} change")
    return "; ".join(parts)


def load_tokenizer(folder: Path, tokenizer: dict[str, Any]) -> Callable[[Sequence[str]], list[list[int]]]:
    """texts -> untruncated token ids, special tokens included, from the files of an exported folder."""
    if tokenizer["kind"] not in ("clip-bpe", "tokenizers", "transformers"):
        raise RefusedError(
            f"{folder} needs a tokenizer of kind {tokenizer['kind']!r}: update clipfilter, or export the model again"
        )
    from clipfilter.models._torch import torch_with_torchvision

    torch_with_torchvision()
    from open_clip.tokenizer import SimpleTokenizer, get_clean_fn

    from clipfilter.models.tokenizer import encode_with, hf_tokenizer, tokenizer_from_folder

    cleaning = tokenizer["clean"]
    clean = get_clean_fn(cleaning) if cleaning else str
    if tokenizer["kind"] == "clip-bpe":
        return encode_with(SimpleTokenizer(bpe_path=str(folder / tokenizer["file"]), clean=cleaning))
    if tokenizer["kind"] == "transformers":
        slow = tokenizer_from_folder(folder, None, {})
        return hf_tokenizer(slow, 0, 0, clean=clean, zero_id=tokenizer["zero_id"]).encode
    from tokenizers import Tokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads are the engine's to give
    fast = Tokenizer.from_file(str(folder / tokenizer["file"]))
    fast.no_truncation()
    fast.no_padding()
    zero = tokenizer["zero_id"]  # the id that the model was trained to see as 0

    def encode(texts: Sequence[str]) -> list[list[int]]:
        found = [encoding.ids for encoding in fast.encode_batch([clean(text) for text in texts])]
        return [[0 if token == zero else token for token in ids] for ids in found] if zero is not None else found

    return encode


def open_session(path: Path, threads: int, providers: Providers = _CPU) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session with exactly `threads` threads, silent, whose idle threads sleep. Raises RefusedError."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # Two towers are two thread pools: one that spins takes the cores from the other, and from decoding.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # the runtime has a dozen classes; all mean that this file cannot be run here
        raise RefusedError(
            f"ONNX Runtime cannot load {path} ({reason(error)}): update onnxruntime, or export the model again"
        ) from None
    if providers != _CPU and session.get_providers() == list(_CPU):
        raise RefusedError("ONNX Runtime found no usable GPU (its CUDA libraries do not load): use --device cpu")
    return session


def _tower(path: Path, providers: Providers, threads: int) -> Callable[[Tensor], Tensor]:
    import torch

    session = open_session(path, threads, providers)
    entry = session.get_inputs()[0]
    integers = entry.type == "tensor(int32)"

    def tower(batch: Tensor) -> Tensor:
        values = (batch.to(torch.int32) if integers else batch).contiguous().numpy()
        return torch.from_numpy(session.run(None, {entry.name: values})[0])

    return tower


def _providers(device: str) -> Providers:
    """The execution providers for `device`, the wanted one first; RefusedError when it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise RefusedError(f"models in ONNX need ONNX Runtime: {INSTALL}") from None
    kind = device.split(":")[0]
    if kind == "cpu":
        return _CPU
    if kind != "cuda":
        raise RefusedError(f"unknown device {device!r}: use cpu, cuda or cuda:0")
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise RefusedError(
            f"device {device!r} was asked for but this ONNX Runtime runs on CPUs only: install onnxruntime-gpu "
            "in place of onnxruntime, or use --device cpu"
        )
    number = device.partition(":")[2] or "0"
    return [("CUDAExecutionProvider", {"device_id": number}), "CPUExecutionProvider"]
