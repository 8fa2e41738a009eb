"""The measures against their definitions, written out slowly, on embeddings whose products are exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter.errors import RefusedError
from clipfilter.evaluation.measures import caption_match_auc, retrieval, shuffled_auc, zero_shot
from clipfilter.policies.prompts import TEMPLATES
from clipfilter.policies.texts import class_vectors


def grid(seed: int, rows: int, dim: int = 3) -> np.ndarray:
    """Small multiples of 1/4: their products are exact in float32, and many are equal."""
    return (np.random.default_rng(seed).integers(-2, 3, (rows, dim)) / 4).astype(np.float32)


def unit(seed: int, rows: int, dim: int = 64) -> np.ndarray:
    emb = np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)
    return np.asarray(emb / np.linalg.norm(emb, axis=1, keepdims=True))


def ranking(scores: Sequence[float]) -> list[int]:
    """Candidates from best to worst; of equal scores the lower index first."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 12))
def test_zero_shot_is_what_sorting_gives(seed: int, n: int, c: int) -> None:
    images, classes = grid(seed, n), grid(seed + 1, c)
    labels = np.random.default_rng(seed).integers(0, c, n)
    places = [ranking(list(image @ classes.T)).index(label) for image, label in zip(images, labels, strict=True)]
    found = zero_shot(images, labels, classes)
    assert found.n == n
    assert found.top1 == pytest.approx(np.mean([p < 1 for p in places]))
    assert found.top5 == pytest.approx(np.mean([p < 5 for p in places]))
    assert [index for index, _, _ in found.per_class] == sorted(set(labels.tolist()))
    for index, count, share in found.per_class:
        own = [p < 1 for p, label in zip(places, labels, strict=True) if label == index]
        assert count == len(own)
        assert share == pytest.approx(np.mean(own))
    assert found.mean_per_class == pytest.approx(np.mean([share for _, _, share in found.per_class]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 25), st.integers(1, 40))
def test_retrieval_is_what_sorting_gives(seed: int, n: int, m: int) -> None:
    images, texts = grid(seed, n), grid(seed + 1, m)
    owner = np.random.default_rng(seed).integers(0, n, m)
    scores = images @ texts.T
    text_places = [ranking(list(scores[:, t])).index(owner[t]) for t in range(m)]
    image_places = [
        min(ranking(list(scores[i])).index(t) for t in range(m) if owner[t] == i) for i in sorted(set(owner))
    ]
    found = retrieval(images, texts, owner)
    assert (found.images, found.texts) == (len(set(owner)), m)
    for k in (1, 5, 10):
        assert found.text_to_image[k] == pytest.approx(np.mean([p < k for p in text_places]))
        assert found.image_to_text[k] == pytest.approx(np.mean([p < k for p in image_places]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 20))
def test_caption_auc_is_the_share_of_pairs_in_the_right_order(seed: int, n: int) -> None:
    images, texts = grid(seed, n), grid(seed + 1, n)
    scores = images @ texts.T
    wins = [
        (scores[i, i] > scores[a, b]) + (scores[i, i] == scores[a, b]) / 2
        for i in range(n)
        for a in range(n)
        for b in range(n)
        if a != b
    ]
    assert caption_match_auc(images, texts) == pytest.approx(np.mean(wins))


def test_more_rows_than_a_block_in_any_order() -> None:
    """Several blocks, a remainder in both directions, texts not in the images' order: still the plain definition."""
    images, texts = unit(0, 1100), unit(1, 2300)
    owner = np.random.default_rng(2).integers(0, 1100, 2300)
    texts += 0.5 * images[owner]
    scores = images.astype(np.float64) @ texts.astype(np.float64).T
    own = scores[owner, np.arange(2300)]
    rank = (scores > own).sum(axis=0)
    best = np.full(1100, -np.inf)
    np.maximum.at(best, owner, own)
    asks = np.isfinite(best)
    image_rank = (scores > best[:, None]).sum(axis=1)[asks]
    found = retrieval(images, texts, owner)
    assert found.images == asks.sum()
    for k in (1, 5, 10):
        assert found.text_to_image[k] == pytest.approx((rank < k).mean(), abs=1e-12)
        assert found.image_to_text[k] == pytest.approx((image_rank < k).mean(), abs=1e-12)
    pairs = texts[:1100]
    matrix = images.astype(np.float64) @ pairs.astype(np.float64).T
    wrong = np.sort(matrix[~np.eye(1100, dtype=bool)])
    expected = np.searchsorted(wrong, matrix.diagonal()).mean() / len(wrong)
    assert caption_match_auc(images, pairs) == pytest.approx(expected, abs=1e-7)


def test_copies_of_a_vector_tie_wherever_they_stand() -> None:
    """The same image 1 025 times is one answer 1 025 times: only the first place counts, in every block."""
    one = unit(3, 1, dim=67)
    images = np.repeat(one, 1025, axis=0)
    texts = np.repeat(unit(4, 1, dim=67), 1025, axis=0)
    found = retrieval(images, texts, np.arange(1025))
    assert found.text_to_image == {k: pytest.approx(k / 1025) for k in (1, 5, 10)}
    assert found.image_to_text == {k: pytest.approx(k / 1025) for k in (1, 5, 10)}
    assert caption_match_auc(images, texts) == 0.5
    assert shuffled_auc(images, texts, 0) == 0.5
    assert zero_shot(images, np.full(1025, 6), np.repeat(one, 7, axis=0)).top5 == 0.0


def test_stored_float16_is_read_as_it_is() -> None:
    images, texts = unit(5, 40).astype(np.float16), unit(6, 40).astype(np.float16)
    wide = images.astype(np.float32), texts.astype(np.float32)
    owner = np.arange(40)
    assert retrieval(images, texts, owner) == retrieval(*wide, owner)
    assert caption_match_auc(images, texts) == caption_match_auc(*wide)
    assert shuffled_auc(images, texts, 1) == shuffled_auc(*wide, 1)


@pytest.mark.parametrize("n", [2, 3, 50])
def test_the_shuffle_is_seeded_and_leaves_no_image_its_own_text(n: int) -> None:
    images = np.eye(n, dtype=np.float32)  # own pair 1, any wrong one 0: a fixed point would tie with its own
    assert shuffled_auc(images, images, 0) == 1.0
    noisy = unit(7, n), unit(8, n)
    assert shuffled_auc(*noisy, 5) == shuffled_auc(*noisy, 5)
    if n == 50:
        assert len({shuffled_auc(*noisy, seed) for seed in range(5)}) > 1


@pytest.mark.parametrize(
    "call",
    [
        lambda bad, good: zero_shot(bad, np.zeros(4, int), good),
        lambda bad, good: retrieval(good, bad, np.arange(4)),
        lambda bad, good: caption_match_auc(bad, good),
        lambda bad, good: shuffled_auc(good, bad, 0),
    ],
)
def test_a_broken_model_does_not_look_perfect(call: Any) -> None:
    good = unit(9, 4)
    bad = good.copy()
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="finite"):
        call(bad, good)


@pytest.mark.parametrize(
    "call",
    [
        lambda e: zero_shot(e[:0], np.zeros(0, int), e),
        lambda e: zero_shot(e, np.zeros(3, int), e),
        lambda e: zero_shot(e, np.array([0, 1, 2, 4]), e),
        lambda e: zero_shot(e, np.array([0, 1, 2, -1]), e),
        lambda e: retrieval(e, e[:0], np.zeros(0, int)),
        lambda e: retrieval(e, e, np.array([0, 1, 2, 4])),
        lambda e: caption_match_auc(e[:1], e[:1]),
        lambda e: shuffled_auc(e, e[:3], 0),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(call: Any) -> None:
    with pytest.raises(ValueError, match=r"need|below"):
        call(unit(10, 4))


class Letters:
    """A text encoder one can compute in the head: counts of five letters, of unit norm."""

    name = "letters"
    dim = 5

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.count(letter) for letter in "aotch"] for text in texts], np.float64)
        norms = np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-12)
        return np.asarray(counts / norms, np.float32)


def test_class_vectors_are_the_mean_of_the_prompts_renormalised() -> None:
    encoder: Any = Letters()
    labels, templates = ["cat", "{0.name} hat"], TEMPLATES["photo"]
    found = class_vectors(encoder, labels, templates)
    assert found.shape == (2, 5)
    assert found.dtype == np.float32
    for row, label in zip(found, labels, strict=True):
        prompts = [label, f"a photo of {label}", f"a picture showing {label}", f"a close-up photo of {label}"]
        mean = encoder.encode_texts(prompts).astype(np.float64).mean(0)
        np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_a_class_without_a_vector_is_refused_by_name() -> None:
    encoder: Any = Letters()
    with pytest.raises(RefusedError, match="'xyz'"):
        class_vectors(encoder, ["cat", "xyz"], ["{}"])
