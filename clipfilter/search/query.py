"""The query as one unit vector: texts, images and rows added up, what is not wanted taken away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clipfilter import defaults
from clipfilter.errors import RefusedError, RowError
from clipfilter.models import Encoder

#: How much of an unwanted text is taken away (docs/guide/search.md shows what it does).
MINUS_WEIGHT = 0.5


def query_vector(
    encoder: Encoder | None,
    text: Sequence[str] = (),
    image: Sequence[str | bytes] = (),
    minus: Sequence[str] = (),
    *,
    vectors: np.ndarray | None = None,
    minus_weight: float = MINUS_WEIGHT,
    decode: str = defaults.DECODE,
    color: str = defaults.COLOR,
) -> np.ndarray:
    """float32 [dim], unit norm: the sum of the unit vectors of all texts, images and `vectors`, less `minus_weight` times
    those of `minus`.

    encoder: the model of the run; None is enough for `vectors` alone. image: encoded bytes, or paths and URLs.
    vectors: [n, dim], embeddings of rows. decode, color: those of the run.
    Raises RefusedError for an empty query, an image that cannot be read, or parts that cancel out.
    """
    if not (len(text) or len(image) or (vectors is not None and len(vectors))):
        raise RefusedError("there is nothing to search for; give a text, an image or a row's uid.")
    if any(not phrase.strip() for phrase in (*text, *minus)):
        raise RefusedError("a text to search for is empty; write what the pictures should show.")
    parts: list[np.ndarray] = []
    weights: list[float] = []
    if vectors is not None and len(vectors):
        parts.append(_unit(np.asarray(vectors, np.float32)))
        weights += [1.0] * len(vectors)
    if len(image):
        pixels = _pixels(_needed(encoder), image, decode, color)
        parts.append(_needed(encoder).encode_images(pixels))
        weights += [1.0] * len(image)
    phrases = [*text, *minus]
    if phrases:
        parts.append(_needed(encoder).encode_texts(phrases))
        weights += [1.0] * len(text) + [-minus_weight] * len(minus)
    total = np.concatenate(parts).astype(np.float64).T @ np.asarray(weights)
    norm = float(np.linalg.norm(total))
    if norm < 1e-3:
        raise RefusedError("the parts of the query cancel out; leave out a minus, or word it differently.")
    return np.asarray(total / norm, np.float32)


def _needed(encoder: Encoder | None) -> Encoder:
    if encoder is None:
        raise ValueError("texts and images need an encoder")
    return encoder


def _pixels(encoder: Encoder, images: Sequence[str | bytes], decode: str, color: str) -> np.ndarray:
    """uint8 [n, 3, size, size]."""
    from clipfilter.images import load_image
    from clipfilter.sources import read_url

    pixels = []
    for item in images:
        name = "the image" if isinstance(item, bytes) else item
        try:
            data = item if isinstance(item, bytes) else read_url(item)
            mode: defaults.Decode = "exact" if decode == "exact" else "fast"
            shade: defaults.Color = "managed" if color == "managed" else "ignore"
            pixels.append(load_image(data, encoder.preprocess, mode, defaults.MAX_PIXELS, shade).pixels)
        except RowError as error:
            raise RefusedError(f"{name} cannot be searched for: {error.message}.") from error
    return np.stack(pixels)


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
    return unit
