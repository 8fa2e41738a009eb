"""How tests save time where processes are not their subject: a worker in this process, a cached nano, small batches.

`install` changes this process only. Tests about nano itself have the marker `fresh`, tests about worker processes the
marker `processes`; these, and every command that `tests.support.engine.cli` starts with `processes=True`, get what a
user gets.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clipfilter.engine import job
from clipfilter.engine.executors.inline import InlineExecutor
from clipfilter.engine.executors.local import LocalExecutor
from clipfilter.models import load

#: Images per forward pass in tests: the padding of a shard's last batch costs as much as images do.
BATCH_SIZE = 8
#: The environment variable with the folder where the vectors of this run of the tests are kept.
MEMORY = "CLIPFILTER_TEST_VECTORS"

#: Whether jobs of the local engine run in worker processes, as they do for users.
processes = False
#: Whether every load of nano reads its file and every batch is computed: for the tests of models.
fresh = False
_installed = False
_loaded: dict[tuple[str, ...], tuple[Any, str]] = {}
_choose_executor, _load = job.choose_executor, load._load


def install() -> None:
    """Make jobs of this process quick; once is enough."""
    global _installed
    if not _installed:
        _installed = True
        job.choose_executor = _quick_executor
        load._load = _load_once
        job.DEFAULT_BATCH_SIZE["cpu"] = BATCH_SIZE


def _quick_executor(request: job.JobRequest) -> Any:
    """What `choose_executor` chooses, refusals too; in place of one worker process the same worker in this process."""
    executor = _choose_executor(request)
    if processes or not isinstance(executor, LocalExecutor) or (request.workers or 1) > 1:
        return executor
    resources = executor.resources()
    inline = InlineExecutor(resources.threads, resources.device)
    inline.name = executor.name  # which reports and metrics show
    return inline


def _load_once(name: str, device: str, dtype: str, threads: int | None) -> Any:
    """`load_encoder`'s work; the bundled nano is loaded once, and each caller gets an encoder of its own around it."""
    from clipfilter.models._torch import use_threads

    if fresh or name.partition("@")[0] != "nano" or _is_trained():
        return _load(name, device, dtype, threads)
    key = (name, device, dtype)
    if key not in _loaded:
        encoder = _load(name, device, dtype, threads)
        _loaded[key] = encoder, _digest(encoder)
    use_threads(threads)
    own = copy.copy(_loaded[key][0])
    own.fingerprint = dict(own.fingerprint)
    folder = os.environ.get(MEMORY)
    if folder:
        _remember(own, Path(folder))
    return own


def _remember(encoder: Any, folder: Path) -> None:
    """Keep the vectors of every batch that the encoder sees; the same batch on as many threads gets the same bits."""
    import torch

    towers = encoder.image_tower, encoder.text_tower
    images, texts = encoder.encode_images, encoder.encode_texts
    prefix = f"{encoder.fingerprint['weights_sha256']} {encoder.device} {encoder.dtype}"

    def remembered(what: str, content: bytes, compute: Callable[[], np.ndarray]) -> np.ndarray:
        if (encoder.image_tower, encoder.text_tower) != towers:
            return compute()  # compiled since
        key = hashlib.sha256(f"{prefix} {torch.get_num_threads()} {what} ".encode() + content)
        path = folder / f"{key.hexdigest()}.npy"
        if path.exists():
            return np.load(path)
        vectors = compute()
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            np.save(file, vectors)
        os.replace(file.name, path)
        return vectors

    def encode_images(pixels: np.ndarray) -> np.ndarray:
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
            return images(pixels)
        return remembered(f"images {pixels.shape}", pixels.tobytes(), lambda: images(pixels))

    def encode_texts(given: Sequence[str]) -> np.ndarray:
        return remembered("texts", json.dumps(list(given)).encode(), lambda: texts(given))

    encoder.encode_images, encoder.encode_texts = encode_images, encode_texts


def remember_exports() -> None:
    """Let each tower of the bundled nano go through torch's exporter, which takes long, once in a run of the tests."""
    from clipfilter.models import onnx_export

    export = onnx_export._export_tower

    def export_once(encoder: Any, name: str, tower: Any, path: Path) -> None:
        folder = os.environ.get(MEMORY)
        if fresh or not folder or encoder.name.partition("@")[0] != "nano":
            export(encoder, name, tower, path)
            return
        kept = Path(folder) / f"{encoder.fingerprint['weights_sha256']}-{name}.onnx"
        if not kept.exists():
            export(encoder, name, tower, path)
            shutil.copy(path, f"{kept}.{os.getpid()}")
            os.replace(f"{kept}.{os.getpid()}", kept)
        shutil.copy(kept, path)

    onnx_export._export_tower = export_once


def _is_trained() -> bool:
    """Whether the caller will change the weights."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__", "").startswith("clipfilter.training"):
            return True
    return False


def changed_encoders() -> list[str]:
    """The shared encoders whose weights are no longer what was loaded: a test has spoiled them for the others."""
    return [" ".join(key) for key, (encoder, digest) in _loaded.items() if _digest(encoder) != digest]


def _digest(encoder: Any) -> str:
    # Summed by NumPy: the sums of torch depend on how many threads it has at the moment.
    weights = {name: value.double().numpy() for name, value in encoder.image_tower.__self__.state_dict().items()}
    return repr([(name, float(value.sum()), float((value * value).sum())) for name, value in weights.items()])
