"""Text vectors on disk: the prompts of a policy are embedded once per model, and found again by their hash.

What is kept is the answer to one whole call, since a text's vector can differ in its last bits with the texts beside it:
a warm cache gives the very numbers that a cold one computes. Anything wrong with a file, and the texts are embedded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clipfilter.policies.encoder import TextEncoder
from clipfilter.storage import replacing

#: A folder to keep vectors in, or "off".
VARIABLE = "CLIPFILTER_TEXT_CACHE"
#: A model without these in its fingerprint is somebody's stand-in, which no hash identifies.
_IDENTIFYING = ("weights_sha256", "architecture", "backend")
_MAX_BYTES = 256 * 1024 * 1024


def cache_folder() -> Path | None:
    """`$CLIPFILTER_TEXT_CACHE`, else `$XDG_CACHE_HOME/clipfilter/texts` (by default below `~/.cache`); None when off."""
    given = os.environ.get(VARIABLE, "")
    if given.lower() in ("off", "0", "no"):
        return None
    if given:
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "clipfilter" / "texts"


def cached_texts(texts: Sequence[str], encoder: TextEncoder) -> np.ndarray:
    """`encoder.encode_texts(texts)`, from the cache where it is there: float32 [n, dim]."""
    folder = cache_folder()
    if folder is None or any(name not in encoder.fingerprint for name in _IDENTIFYING):
        return encoder.encode_texts(texts)
    path = folder / f"{_key(texts, encoder)}.npy"
    kept = _read(path, (len(texts), encoder.dim))
    if kept is not None:
        return kept
    found = np.asarray(encoder.encode_texts(texts))
    if found.dtype == np.float32:
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs the time
            _write(path, found)
    return found


def _key(texts: Sequence[str], encoder: TextEncoder) -> str:
    """Everything that decides the vectors: the model with its tokenizer and number format, the library that computes."""
    versions = [
        str(getattr(sys.modules.get(name), "__version__", "")) for name in ("torch", "onnxruntime", "transformers")
    ]
    value = [encoder.fingerprint, getattr(encoder, "context_length", None), versions, list(texts)]
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        values = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if not isinstance(values, np.ndarray) or values.dtype != np.float32 or values.shape != shape:
        return None
    return values if np.isfinite(values).all() else None


def _write(path: Path, values: np.ndarray) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as unfinished, open(unfinished, "wb") as file:
        np.save(file, values, allow_pickle=False)
