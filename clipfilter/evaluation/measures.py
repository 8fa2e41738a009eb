"""The measures themselves: pure functions on embeddings, whatever they came from.

Embeddings are unit-norm rows in any float type (float16 as a run stores them, or float32), so dot products are cosines.
Cosines are computed in zero-padded float32 blocks of one fixed shape: equal vectors get equal cosines wherever they
stand, so ties are ties and not rounding, and memory does not grow with the number of pairs. Embeddings that are not
finite raise ValueError: nothing compares with NaN, and a broken model would look perfect.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clipfilter.policies import COSINE_BLOCK, cosine_blocks, padded_blocks


@dataclass(frozen=True)
class ZeroShot:
    """Zero-shot classification of `n` images. Shares are between 0 and 1.

    mean_per_class: top-1 per class, averaged over the classes that have images. per_class: (class index, images,
    top-1) of those classes, by index.
    """

    n: int
    top1: float
    top5: float
    mean_per_class: float
    per_class: list[tuple[int, int, float]]


@dataclass(frozen=True)
class Retrieval:
    """Recall among `images` and `texts`: the share of queries that find what belongs to them among the best k.

    image_to_text: {1, 5, 10} -> share of the images with texts that have any one of them among the best k texts.
    text_to_image: {1, 5, 10} -> share of the texts that have their image among the best k images.
    """

    images: int
    texts: int
    image_to_text: dict[int, float]
    text_to_image: dict[int, float]


RECALL_AT = (1, 5, 10)


def zero_shot(image_emb: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> ZeroShot:
    """Classify images by their nearest class vector.

    image_emb [n, dim], labels int [n] (rows of `classes`), classes [c, dim]. Of classes with equal cosines the lower
    index comes first. Raises ValueError for no images, labels out of range or embeddings that are not finite.
    """
    labels = np.asarray(labels)
    if not len(image_emb) or len(labels) != len(image_emb):
        raise ValueError(f"zero_shot needs a label for each image: {len(image_emb)} images, {len(labels)} labels")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels must be below the number of classes, {len(classes)}")
    _check_finite(image_emb, classes)
    own = _own(image_emb, classes, labels)
    rank = np.zeros(len(image_emb), np.int64)
    for rows, columns, cosines in cosine_blocks(image_emb, classes):
        rank[rows] += _ahead(cosines, own[rows], labels[rows], columns)
    n = np.bincount(labels, minlength=len(classes))
    right = np.bincount(labels[rank == 0], minlength=len(classes))
    per_class = [(int(c), int(n[c]), float(right[c] / n[c])) for c in np.flatnonzero(n)]
    return ZeroShot(
        n=len(image_emb),
        top1=float((rank == 0).mean()),
        top5=float((rank < 5).mean()),
        mean_per_class=float(np.mean([share for _, _, share in per_class])),
        per_class=per_class,
    )


def retrieval(image_emb: np.ndarray, text_emb: np.ndarray, text_image: np.ndarray) -> Retrieval:
    """Recall@1/5/10 in both directions, each among all images and all texts given.

    image_emb [n, dim], text_emb [m, dim], text_image int [m]: the image that each text belongs to. An image with several
    texts is found by any of them (Karpathy and Fei-Fei 2015). Images without a text are candidates but ask nothing. Of
    equal cosines the lower index comes first. Time grows with n * m, memory with n + m.

    Raises ValueError for no texts, indices out of range or embeddings that are not finite.
    """
    n, m = len(image_emb), len(text_emb)
    text_image = np.asarray(text_image)
    if not m or len(text_image) != m:
        raise ValueError(f"retrieval needs the image of each text: {m} texts, {len(text_image)} images")
    if text_image.min() < 0 or text_image.max() >= n:
        raise ValueError(f"text_image must be below the number of images, {n}")
    _check_finite(image_emb, text_emb)
    own = _own(text_emb, image_emb, text_image)
    # The first of the best texts of each image: by image, then falling cosine, then index.
    order = np.lexsort((np.arange(m), -own, text_image))
    asking, first = np.unique(text_image[order], return_index=True)
    best_text = np.zeros(n, np.int64)
    best_text[asking] = order[first]
    best = own[best_text]
    text_rank, image_rank = np.zeros(m, np.int64), np.zeros(n, np.int64)
    for rows, columns, cosines in cosine_blocks(text_emb, image_emb):
        text_rank[rows] += _ahead(cosines, own[rows], text_image[rows], columns)
        image_rank[columns] += _ahead(cosines.T, best[columns], best_text[columns], rows)
    return Retrieval(
        images=len(asking),
        texts=m,
        image_to_text={k: float((image_rank[asking] < k).mean()) for k in RECALL_AT},
        text_to_image={k: float((text_rank < k).mean()) for k in RECALL_AT},
    )


def caption_match_auc(image_emb: np.ndarray, text_emb: np.ndarray) -> float:
    """Probability that an image's cosine to its own text is above a cosine to a wrong one; ties count half.

    image_emb [n, dim], text_emb [n, dim], row i belongs to row i. Exact: the n own cosines against all n * (n - 1) wrong
    pairs (Mann-Whitney). Time grows with n squared, memory with n. Raises ValueError for fewer than two pairs or
    embeddings that are not finite.
    """
    n = _check_pairs(image_emb, text_emb)
    diagonal = np.arange(n)
    own = np.sort(_own(image_emb, text_emb, diagonal))
    wins = 0  # twice the number of (own, wrong) pairs in the right order; whole, so that the sum is exact
    for rows, columns, cosines in cosine_blocks(image_emb, text_emb):
        wrong = cosines[diagonal[rows, None] != diagonal[None, columns]]
        wrong.sort()
        below, up_to = np.searchsorted(wrong, own, "left"), np.searchsorted(wrong, own, "right")
        wins += int(below.sum()) + int(up_to.sum())
    return wins / (2 * n * n * (n - 1))


def shuffled_auc(image_emb: np.ndarray, text_emb: np.ndarray, seed: int) -> float:
    """The same probability against one wrong text per image, drawn by a seeded cycle through all of them.

    Cheap where all pairs are too many: time and memory grow with n. Raises ValueError as `caption_match_auc` does.
    """
    n = _check_pairs(image_emb, text_emb)
    order = np.random.default_rng(seed).permutation(n)
    wrong_text = np.empty(n, np.int64)
    wrong_text[order] = np.roll(order, 1)  # one cycle: no image keeps its text
    own, wrong = np.empty(n, np.float32), np.empty(n, np.float32)
    for start in range(0, n, COSINE_BLOCK):
        rows = slice(start, start + COSINE_BLOCK)
        images = image_emb[rows].astype(np.float32)
        own[rows] = np.vecdot(images, text_emb[rows].astype(np.float32))
        wrong[rows] = np.vecdot(images, text_emb[wrong_text[rows]].astype(np.float32))
    wrong.sort()
    below, up_to = np.searchsorted(wrong, own, "left"), np.searchsorted(wrong, own, "right")
    return (int(below.sum()) + int(up_to.sum())) / (2 * n * n)


def _own(rows_emb: np.ndarray, columns_emb: np.ndarray, partner: np.ndarray) -> np.ndarray:
    """The cosine of each row with its partner, float32 [rows], out of the very blocks that `cosine_blocks` gives."""
    own = np.empty(len(rows_emb), np.float32)
    for rows, left in padded_blocks(rows_emb):
        for columns, right in padded_blocks(columns_emb):
            wanted = partner[rows]
            inside = np.flatnonzero((wanted >= columns.start) & (wanted < columns.stop))
            if len(inside):
                own[rows.start + inside] = (left @ right.T)[inside, wanted[inside] - columns.start]
    return own


def _ahead(cosines: np.ndarray, own: np.ndarray, partner: np.ndarray, columns: slice) -> np.ndarray:
    """How many of these columns come before each row's partner: a higher cosine, or an equal one and a lower index."""
    higher = (cosines > own[:, None]).sum(axis=1)
    earlier = np.arange(columns.start, columns.stop)[None, :] < partner[:, None]
    return np.asarray(higher + ((cosines == own[:, None]) & earlier).sum(axis=1))


def _check_pairs(image_emb: np.ndarray, text_emb: np.ndarray) -> int:
    n = len(image_emb)
    if n < 2 or len(text_emb) != n:
        raise ValueError(f"caption matching needs two or more aligned pairs: {n} images, {len(text_emb)} texts")
    _check_finite(image_emb, text_emb)
    return n


def _check_finite(*embeddings: np.ndarray) -> None:
    for emb in embeddings:
        for start in range(0, len(emb), COSINE_BLOCK):
            if not np.isfinite(emb[start : start + COSINE_BLOCK]).all():
                raise ValueError("embeddings must be finite: the model gave NaN or infinity")
