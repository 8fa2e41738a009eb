"""What a model can do on the dev pairs and on the zero-shot set, by the measures of `clipfilter evaluate`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from clipfilter.evaluation import caption_match_auc, name_classes, retrieval, zero_shot
from clipfilter.models import Encoder
from clipfilter.policies import DEFAULT_TEMPLATES, TEMPLATES, class_vectors
from clipfilter.training.batches import pixel_batches
from clipfilter.training.pairs import Pairs

_BATCH = 64
_LOSS_BATCH = 256


def embed_images(encoder: Encoder, pairs: Pairs, threads: int) -> np.ndarray:
    """float32 [n, dim], unit rows, of the images as the model sees them at inference."""
    batches = pixel_batches(pairs, encoder.preprocess, _BATCH, threads)
    return np.concatenate([encoder.encode_images(pixels) for pixels in batches])


def measure_pairs(encoder: Encoder, images: np.ndarray, pairs: Pairs, logit_scale: float) -> dict[str, float]:
    """Retrieval among the pairs, all captions counting, and how well captions match. images: their embeddings.

    image_to_text_at_10, text_to_image_at_10: shares; recall_at_10: their mean. auc: of first captions. loss: ClipLoss of
    first captions under `logit_scale` (a factor), in batches of 256.
    """
    captions = [pairs.captions(row) for row in range(len(pairs))]
    texts = encoder.encode_texts([caption for some in captions for caption in some])
    text_image = np.repeat(np.arange(len(captions)), [len(some) for some in captions])
    found = retrieval(images, texts, text_image)
    first = texts[np.flatnonzero(np.diff(text_image, prepend=-1))]
    return {
        "recall_at_10": (found.image_to_text[10] + found.text_to_image[10]) / 2,
        "image_to_text_at_10": found.image_to_text[10],
        "text_to_image_at_10": found.text_to_image[10],
        "auc": caption_match_auc(images, first),
        "loss": _clip_loss(images, first, logit_scale),
    }


def measure_zero_shot(encoder: Encoder, images: np.ndarray, pairs: Pairs, labels: Sequence[str]) -> float:
    """Top-1, a share, of images (their embeddings) among `labels`, all of the set's, sorted.

    Default templates; labels are named as words ("grand_piano" is "grand piano").
    """
    classes, number = name_classes(labels, None, "words")
    truth = dict(zip(labels, number, strict=True))
    chosen = np.array([truth[pairs.label(row)] for row in range(len(pairs))])
    vectors = class_vectors(encoder, classes, TEMPLATES[DEFAULT_TEMPLATES])
    return zero_shot(images, chosen, vectors).top1


def _clip_loss(images: np.ndarray, texts: np.ndarray, logit_scale: float) -> float:
    total = 0.0
    for start in range(0, len(images), _LOSS_BATCH):
        part = slice(start, start + _LOSS_BATCH)
        logits = logit_scale * torch.from_numpy(images[part]) @ torch.from_numpy(texts[part]).T
        truth = torch.arange(len(logits))
        both = torch.nn.functional.cross_entropy(logits, truth) + torch.nn.functional.cross_entropy(logits.T, truth)
        total += float(both) / 2 * len(logits)
    return total / len(images)
