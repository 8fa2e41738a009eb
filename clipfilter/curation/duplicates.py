"""Duplicates by bytes, by perceptual hash and by embedding: greedy, in one canonical order, against kept rows only.

Every function takes rows in canonical order (`uids.canonical_order`: preference, then uid), so row 0 is kept and a row
is dropped only in favour of an earlier one. A row is compared with rows that are kept, never with dropped ones: in a
chain a~b~c, where a is not near c, b goes and c stays (unlike SemDeDup's published loop, which loses c).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np

_BLOCK = 1024
_COLUMNS = 8192  # kept rows per product
#: A float32 cosine this near to a limit is computed again in float64 from the float16 embeddings.
RECHECK = 1e-5
_HASH_BITS = 64


def exact_duplicates(digests: np.ndarray) -> np.ndarray:
    """int64 [n]: the row that each row is a copy of, -1 for rows that are kept.

    digests: uint64 [n, 2], equal for equal bytes; rows in canonical order.
    """
    first = _first_of_equals(digests[:, 0], digests[:, 1])
    return np.where(first == np.arange(len(first)), -1, first)


def near_duplicates(hashes: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """(keeper int64 [n], bits int8 [n]) of perceptual hashes (uint64 [n]), rows in canonical order.

    A row goes when a kept earlier one is within `distance` bits; the first such row is its keeper, and `bits` how far
    apart the two are. Both are -1 for rows that are kept. Memory: the pairs of different hashes within the distance.
    """
    n = len(hashes)
    if not 0 <= distance < 32:
        raise ValueError(f"a Hamming distance of {distance} is not between 0 and 31")
    first = _first_of_equals(hashes)
    starts = np.flatnonzero(first == np.arange(n))  # the rows whose hash was not there before, ascending
    rank = np.zeros(n, np.int64)
    rank[starts] = np.arange(len(starts))
    values = hashes[starts]
    later, earlier = near_pairs(values, distance)
    keeper = np.full(len(starts), -1, np.int64)
    # Pairs come sorted by the later row, then the earlier one: when a row is reached, all before it are settled.
    for row, other in zip(later.tolist(), earlier.tolist(), strict=True):
        if keeper[row] < 0 and keeper[other] < 0:
            keeper[row] = other
    # Rows with the same hash have the same neighbours, so they share the first one's fate.
    group = keeper[rank[first]]
    result = np.where(group >= 0, starts[group], first)
    result = np.where(result == np.arange(n), -1, result)
    bits = np.where(result >= 0, np.bitwise_count(hashes ^ hashes[result]), -1).astype(np.int8)
    return result, bits


def near_pairs(values: np.ndarray, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """(later, earlier) int64: all pairs of positions whose hashes differ in 1 to `distance` bits, in that order.

    values: uint64 [n], all different. By the pigeonhole principle: of m blocks of bits, two hashes within k bits agree in
    m - k whole ones, so only rows that agree in some choice of m - k blocks are compared. m grows with n, so that the
    rows that agree by chance stay few.
    """
    n = len(values)
    found: list[np.ndarray] = []
    if n > 1 and distance:
        for mask in _masks(n, distance):
            found.append(_pairs_under(values, np.uint64(mask), distance))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    codes = np.unique(np.concatenate(found))  # later * n + earlier
    return codes // n, codes % n


def _masks(n: int, distance: int) -> Iterator[int]:
    enough = np.log2(max(n, 2)) + 1
    blocks = distance + 1
    while blocks < 2 * distance + 2 and _HASH_BITS * (blocks - distance) / blocks < enough:
        blocks += 1
    edges = [round(_HASH_BITS * i / blocks) for i in range(blocks + 1)]
    parts = [((1 << (high - low)) - 1) << low for low, high in pairwise(edges)]
    for chosen in combinations(parts, blocks - distance):
        yield sum(chosen)


def _pairs_under(values: np.ndarray, mask: np.uint64, distance: int) -> np.ndarray:
    """Codes later * n + earlier of the near pairs among rows that agree under the mask."""
    n = len(values)
    masked = values & mask
    order = np.argsort(masked, kind="stable")  # positions ascend within a group
    sorted_keys = masked[order]
    alive = np.arange(n - 1)
    found: list[np.ndarray] = []
    step = 1
    while True:
        alive = alive[alive < n - step]
        alive = alive[sorted_keys[alive] == sorted_keys[alive + step]]
        if not len(alive):
            break
        a, b = order[alive], order[alive + step]
        near = np.bitwise_count(values[a] ^ values[b]) <= distance
        found.append(b[near] * n + a[near])
        step += 1
    return np.concatenate(found) if found else np.empty(0, np.int64)


def semantic_duplicates(vectors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(keeper int64 [m], cosine float32 [m]) of one cluster's embeddings, float16 [m, d], rows in canonical order.

    A row goes when its cosine with a kept earlier row is at least `threshold` (1 - eps of SemDeDup, Abbas et al. 2023);
    the nearest such row is its keeper, the earliest of equally near ones. -1 and NaN for rows that are kept. Memory: the
    cluster in float32.
    """
    m, dim = vectors.shape
    keeper = np.full(m, -1, np.int64)
    cosine = np.full(m, np.nan, np.float32)
    kept_vectors = np.empty((m, dim), np.float32)
    kept: list[int] = []
    for start in range(0, m, _BLOCK):
        block = vectors[start : start + _BLOCK].astype(np.float32)
        candidates = _close_to(block, kept_vectors[: len(kept)], threshold)
        inside = np.tril(block @ block.T, -1) if len(block) > 1 else np.zeros((len(block), 1), np.float32)
        pairs = inside >= threshold - RECHECK
        for i in range(len(block)):
            others = [kept[place] for place in candidates.get(i, ())]
            others += [start + j for j in np.flatnonzero(pairs[i]).tolist() if keeper[start + j] < 0]
            row = start + i
            if others:
                exact = np.vecdot(vectors[others].astype(np.float64), vectors[row].astype(np.float64))
                best = int(exact.argmax())
                if exact[best] >= threshold:
                    keeper[row], cosine[row] = others[best], exact[best]
            if keeper[row] < 0:
                kept_vectors[len(kept)] = block[i]
                kept.append(row)
    return keeper, cosine


def _close_to(block: np.ndarray, kept: np.ndarray, threshold: float) -> dict[int, list[int]]:
    """Row of the block -> places in `kept`, ascending, that may be nearest to it and within the threshold."""
    found: dict[int, list[int]] = {}
    best = np.full(len(block), -np.inf, np.float32)
    for first in range(0, len(kept), _COLUMNS):
        products = block @ kept[first : first + _COLUMNS].T
        best = np.maximum(best, products.max(axis=1))
        floor = np.maximum(best - 2 * RECHECK, threshold - RECHECK)
        rows, places = np.nonzero(products >= floor[:, None])
        for row, place in zip(rows.tolist(), (places + first).tolist(), strict=True):
            found.setdefault(row, []).append(place)
    return found


def follow(keeper: np.ndarray) -> np.ndarray:
    """Keepers with those that were dropped themselves replaced by theirs: int64 [n], all of them kept rows or -1.

    Kinds of duplicates are found one after the other, each among the rows that the kinds before kept; what a later kind
    drops takes along the rows that it was the keeper of.
    """
    result = keeper.copy()
    while True:
        above = np.where(result >= 0, keeper[result], -1)
        if not (above >= 0).any():
            return result
        result = np.where(above >= 0, above, result)


def _first_of_equals(*columns: np.ndarray) -> np.ndarray:
    """int64 [n]: the first position that holds the same values."""
    n = len(columns[0])
    order = np.lexsort((np.arange(n), *columns))
    new = np.ones(n, bool)
    for column in columns:
        values = column[order]
        if column is columns[0]:
            new[1:] = values[1:] != values[:-1]
        else:
            new[1:] |= values[1:] != values[:-1]
    first = np.empty(n, np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1] if n else order
    return first
