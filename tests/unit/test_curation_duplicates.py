"""Duplicates against plain loops that follow the rule word by word; chains; independence of order and cutting."""

from __future__ import annotations

import numpy as np
import pytest

from clipfilter.curation.clusters import fit_centroids, nearest_centroids
from clipfilter.curation.duplicates import (
    exact_duplicates,
    follow,
    near_duplicates,
    near_pairs,
    semantic_duplicates,
)
from clipfilter.curation.uids import canonical_order, seeded_hash, uid_halves, uid_keys


def plain_near(hashes: np.ndarray, distance: int) -> list[int]:
    keeper: list[int] = []
    for i, value in enumerate(hashes.tolist()):
        near = [j for j in range(i) if keeper[j] < 0 and (value ^ int(hashes[j])).bit_count() <= distance]
        keeper.append(near[0] if near else -1)
    return keeper


def plain_semantic(vectors: np.ndarray, threshold: float) -> tuple[list[int], list[float]]:
    keeper: list[int] = []
    cosines: list[float] = []
    for i, row in enumerate(vectors.astype(np.float64)):
        best, at = -2.0, -1
        for j in range(i):
            if keeper[j] < 0 and (cosine := float(row @ vectors[j].astype(np.float64))) > best:
                best, at = cosine, j
        keeper.append(at if best >= threshold else -1)
        cosines.append(best if best >= threshold else float("nan"))
    return keeper, cosines


def flipped(value: int, bits: list[int]) -> int:
    for bit in bits:
        value ^= 1 << bit
    return value


@pytest.mark.parametrize("distance", [0, 1, 4, 8])
def test_near_duplicates_equal_a_plain_loop(distance: int) -> None:
    rng = np.random.default_rng(distance)
    originals = rng.integers(0, 2**63, 60, dtype=np.uint64).tolist()
    hashes = [flipped(int(rng.choice(originals)), rng.choice(64, rng.integers(0, 7)).tolist()) for _ in range(900)]
    values = np.array(hashes, np.uint64)
    keeper, bits = near_duplicates(values, distance)
    assert keeper.tolist() == plain_near(values, distance)
    dropped = keeper >= 0
    assert (bits[dropped] == np.bitwise_count(values[dropped] ^ values[keeper[dropped]])).all()
    assert (bits[~dropped] == -1).all()


def test_near_pairs_finds_every_pair_in_larger_sets() -> None:
    rng = np.random.default_rng(1)
    values = np.unique(rng.integers(0, 2**64 - 1, 3_000, dtype=np.uint64))
    extra = [flipped(int(v), rng.choice(64, 4, replace=False).tolist()) for v in values[:300]]
    values = np.unique(np.concatenate([values, np.array(extra, np.uint64)]))
    rng.shuffle(values)
    later, earlier = near_pairs(values, 4)
    distances = np.bitwise_count(values[:, None] ^ values[None, :])
    expected = np.argwhere(np.tril(distances <= 4, -1))
    assert np.array_equal(np.stack([later, earlier], 1), expected)
    assert len(expected) >= 300


@pytest.mark.parametrize("rows", [1, 40, 1500])
def test_semantic_duplicates_equal_a_plain_loop(rows: int) -> None:
    rng = np.random.default_rng(rows)
    centres = rng.standard_normal((max(1, rows // 6), 12))
    vectors = centres[rng.integers(0, len(centres), rows)] + 0.12 * rng.standard_normal((rows, 12))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    vectors[rows // 2] = vectors[0]
    keeper, cosine = semantic_duplicates(vectors, 0.97)
    expected, cosines = plain_semantic(vectors, 0.97)
    assert keeper.tolist() == expected
    assert np.array_equal(cosine, np.array(cosines, np.float32), equal_nan=True)
    if rows > 1:
        assert 0 < (keeper >= 0).sum() < rows


def test_a_chain_loses_its_middle_only() -> None:
    angles = np.radians([0.0, 10.0, 20.0, 30.0, 40.0])  # neighbours are within 12 degrees, the others are not
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float16)
    keeper, _ = semantic_duplicates(vectors, float(np.cos(np.radians(12))))
    assert keeper.tolist() == [-1, 0, -1, 2, -1]
    hashes = np.array([0b0, 0b11, 0b1111, 0b111111], np.uint64)
    assert near_duplicates(hashes, 2)[0].tolist() == [-1, 0, -1, 2]


def test_copies_of_a_copy_all_name_the_first() -> None:
    digests = np.array([[1, 1], [2, 1], [1, 1], [1, 2], [1, 1], [2, 1]], np.uint64)
    assert exact_duplicates(digests).tolist() == [-1, -1, 0, -1, 0, 1]
    assert exact_duplicates(np.empty((0, 2), np.uint64)).tolist() == []
    assert follow(np.array([-1, 0, 1, 2, -1])).tolist() == [-1, 0, 0, 0, -1]


def test_the_order_is_preference_then_uid_whatever_the_shards() -> None:
    uids = ["ff" * 16, "00" * 16, "0a" * 16, "not hex", "0b" * 16]
    preference = np.array([1.0, 1.0, 5.0, np.nan, np.nan])
    order = canonical_order(preference, uid_keys(uids))
    assert [uids[i] for i in order[:3]] == ["0a" * 16, "00" * 16, "ff" * 16]
    shuffled = [3, 1, 4, 0, 2]
    again = canonical_order(preference[shuffled], uid_keys([uids[i] for i in shuffled]))
    assert [shuffled[i] for i in again] == order.tolist()


def test_uid_keys_are_the_numbers_and_hashes_are_uniform() -> None:
    uids = [f"{n * 2**70 + n:032x}" for n in range(2000)]
    keys = uid_keys(uids)
    assert keys.tolist() == [[int(u[:16], 16), int(u[16:], 16)] for u in uids]
    assert uid_halves(uids).tolist() == [tuple(row) for row in keys.tolist()]
    drawn = seeded_hash(keys, 1, "draw") / 2**64
    assert abs(drawn.mean() - 0.5) < 0.03
    assert abs((drawn < 0.1).mean() - 0.1) < 0.03
    assert not np.array_equal(drawn, seeded_hash(keys, 2, "draw") / 2**64)
    mixed = uid_keys(["0g" * 16, *uids[:2], None])
    assert mixed[1:3].tolist() == keys[:2].tolist()
    assert mixed[0].any()


def test_assignment_does_not_depend_on_the_cut() -> None:
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((3000, 24)).astype(np.float16)
    centroids = fit_centroids(vectors[:800], 40)
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    centroids[7] = centroids[3]  # a tie goes to the first
    whole = nearest_centroids(vectors, centroids)
    parts = np.concatenate([nearest_centroids(vectors[a : a + 613], centroids) for a in range(0, 3000, 613)])
    assert np.array_equal(whole, parts)
    assert np.array_equal(whole, (vectors.astype(np.float64) @ centroids.T.astype(np.float64)).argmax(axis=1))
    assert 7 not in whole
