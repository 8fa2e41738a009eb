"""Class vectors of zero-shot labels (Radford et al. 2021), and cosines in blocks of one fixed shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from clipfilter.errors import RefusedError
from clipfilter.models import Encoder
from clipfilter.policies.prompts import fill

#: Side of a block of cosines, 4 MiB in float32.
COSINE_BLOCK = 1024


_TEXT_BATCH = 1024


def class_vectors(encoder: Encoder, labels: Sequence[str], templates: Sequence[str]) -> np.ndarray:
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
