"""Texts as vectors of a model: kept on disk from call to call, and as unit vectors of phrases and of classes.

The cache keeps the answer to one whole call, since a text's vector can differ in its last bits with the texts beside it:
a warm cache gives the very numbers that a cold one computes. Anything wrong with a file, and the texts are embedded.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from clipfilter.errors import RefusedError
from clipfilter.policies.prompts import fill
from clipfilter.storage import replacing


class TextEncoder(Protocol):
    """A model that turns texts into vectors."""

    name: str
    dim: int
    logit_scale: float
    logit_bias: float | None
    score_kind: Literal["softmax", "sigmoid"]
    fingerprint: dict[str, Any]

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray: ...

    def count_truncated(self, texts: Sequence[str]) -> int: ...


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


_TEXT_BATCH = 1024

Phrase = tuple[str, tuple[str, ...]]  # a phrase and its templates


def unit_vectors(phrases: Sequence[Phrase], encoder: TextEncoder) -> tuple[np.ndarray, list[str]]:
    """float32 [n, dim] unit vectors of phrases, and the prompts that were embedded, each once.

    Raises RefusedError where the model gives a phrase no usable vector.
    """
    prompts = {fill(template, phrase): None for phrase, templates in phrases for template in templates}
    position = {prompt: index for index, prompt in enumerate(prompts)}
    vectors = _embed(list(prompts), encoder)
    weights = np.empty((len(phrases), encoder.dim), dtype=np.float32)
    for index, (phrase, templates) in enumerate(phrases):
        mean = vectors[[position[fill(template, phrase)] for template in templates]].mean(axis=0)
        norm = float(np.linalg.norm(mean))
        if not norm > 1e-6:
            raise RefusedError(f"the model {encoder.name} gives no usable vector for the phrase {phrase!r}")
        weights[index] = mean / norm
    return weights, list(prompts)


def _embed(prompts: list[str], encoder: TextEncoder) -> np.ndarray:
    """Unit-norm float64 [n, dim]."""
    parts = [
        np.asarray(cached_texts(prompts[start : start + _TEXT_BATCH], encoder), dtype=np.float64)
        for start in range(0, len(prompts), _TEXT_BATCH)
    ]
    vectors = np.concatenate(parts) if parts else np.zeros((0, encoder.dim))
    if vectors.shape != (len(prompts), encoder.dim) or not np.isfinite(vectors).all():
        raise RefusedError(f"the model {encoder.name} did not give finite text vectors of {encoder.dim} numbers")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, 1e-12))


#: Side of a block of cosines, 4 MiB in float32.
COSINE_BLOCK = 1024


def class_vectors(encoder: TextEncoder, labels: Sequence[str], templates: Sequence[str]) -> np.ndarray:
    """One vector per class: float32 [classes, dim], unit norm; w_c = norm(mean_t norm(text(template_t(c)))).

    templates: each with one `{}` for the label (`policies.prompts.TEMPLATES` has named ensembles). The prompt ensemble
    of Radford et al. 2021, section 3.1.4, the mean in float64.

    Raises RefusedError where the model gives no finite vector, or templates that cancel out.
    """
    if not labels or not templates:
        raise ValueError("class vectors need at least one label and one template")
    prompts = [fill(template, label) for label in labels for template in templates]
    parts = [encoder.encode_texts(prompts[at : at + _TEXT_BATCH]) for at in range(0, len(prompts), _TEXT_BATCH)]
    texts = np.concatenate(parts).astype(np.float64).reshape(len(labels), len(templates), -1)
    texts /= np.maximum(np.linalg.norm(texts, axis=2, keepdims=True), 1e-12)
    means = texts.mean(axis=1)
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    usable = norms[:, 0] > 1e-6
    if not usable.all():
        raise RefusedError(
            f"the model {encoder.name} gives no usable vector for the class {labels[int(np.argmin(usable))]!r}; "
            "give other templates, or another model."
        )
    return np.asarray(means / norms, dtype=np.float32)


def cosine_blocks(rows_emb: np.ndarray, columns_emb: np.ndarray) -> Iterator[tuple[slice, slice, np.ndarray]]:
    """Every block of the cosines of all rows with all columns: (rows, columns, float32 [rows, columns])."""
    for rows, left in padded_blocks(rows_emb):
        for columns, right in padded_blocks(columns_emb):
            yield rows, columns, (left @ right.T)[: rows.stop - rows.start, : columns.stop - columns.start]


def padded_blocks(emb: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    block = np.empty((COSINE_BLOCK, emb.shape[1]), np.float32)
    for start in range(0, len(emb), COSINE_BLOCK):
        stop = min(start + COSINE_BLOCK, len(emb))
        block[: stop - start] = emb[start:stop]
        block[stop - start :] = 0
        yield slice(start, stop), block
