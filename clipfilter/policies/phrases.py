"""Phrases as vectors: each one the mean of its prompts' vectors, of unit length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipfilter.errors import RefusedError
from clipfilter.policies.encoder import TextEncoder
from clipfilter.policies.prompts import fill
from clipfilter.policies.text_cache import cached_texts

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
