"""negCLIPLoss, NormSim and MetaCLIP's balancing against naive float64 code."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter.curation.balance import Entries, balanced, count_entries
from clipfilter.curation.scores import NormSim, negclip_scores, smallest
from clipfilter.curation.uids import uid_keys
from clipfilter.errors import RefusedError
from tests.support.policies import embeddings

BANK = [3, 17, 18, 40, 599, 600]


def naive_negclip(image: np.ndarray, text: np.ndarray, i: int, bank: list[int], t: float) -> float:
    f, g = image.astype(np.float64), text.astype(np.float64)
    members = [j for j in bank if j != i] + [i]
    a = math.log(sum(math.exp(f[i] @ g[j] / t) for j in members))
    b = math.log(sum(math.exp(f[j] @ g[i] / t) for j in members))
    return float(f[i] @ g[i] - t / 2 * (a + b))


@pytest.mark.parametrize("t", [0.01, 0.07])
def test_negclip_equals_its_formula_and_the_own_pair_counts_once(t: float) -> None:
    image, text = embeddings(700, 16, 0), embeddings(700, 16, 1)
    text[:300] = (0.7 * image[:300].astype(np.float32) + 0.3 * text[:300].astype(np.float32)).astype(np.float16)
    place = np.full(700, -1)
    place[BANK] = np.arange(len(BANK))
    found = negclip_scores(image, text, image[BANK], text[BANK], place, t)
    assert found.dtype == np.float32
    for i in [0, 3, 5, 17, 299, 511, 512, 599, 699]:
        assert found[i] == pytest.approx(naive_negclip(image, text, i, BANK, t), abs=2e-5)
    # Whether a pair is in the bank changes the others' scores, not its own.
    without = [j for j in BANK if j != 17]
    place = np.full(700, -1)
    place[without] = np.arange(len(without))
    again = negclip_scores(image, text, image[without], text[without], place, t)
    assert again[17] == pytest.approx(found[17], abs=1e-6)


def test_negclip_does_not_depend_on_how_rows_are_cut() -> None:
    image, text = embeddings(600, 16, 2), embeddings(600, 16, 3)
    none = np.full(600, -1)
    whole = negclip_scores(image, text, image[:50], text[:50], none)
    parts = [negclip_scores(image[a:b], text[a:b], image[:50], text[:50], none[a:b]) for a, b in ((0, 77), (77, 600))]
    assert np.allclose(whole, np.concatenate(parts), atol=1e-6)


def test_normsim_is_the_norm_of_the_similarities() -> None:
    image, target = embeddings(1100, 16, 4), embeddings(9000, 16, 5)
    similarities = image.astype(np.float64) @ target.astype(np.float64).T
    assert np.allclose(NormSim(target, 2).scores(image), np.linalg.norm(similarities, axis=1), rtol=1e-6)
    assert np.allclose(NormSim(target, np.inf).scores(image), similarities.max(axis=1), atol=1e-6)
    with pytest.raises(ValueError, match="p is 1"):
        NormSim(target, 1)


def test_the_smallest_hashes_are_chosen() -> None:
    hashes = np.random.default_rng(0).integers(0, 50, 200).astype(np.uint64)
    assert smallest(hashes, 30).tolist() == np.argsort(hashes, kind="stable")[:30].tolist()
    assert smallest(hashes[:5], 30).tolist() == np.argsort(hashes[:5], kind="stable").tolist()


def spaced(text: str) -> str:
    """`spacing` of MetaCLIP, as its authors describe it: punctuation stands alone, all white space is a space."""
    text = f" {text} "
    for mark in (",", ".", ";", ":", "?", "!", "`"):
        text = text.replace(mark, f" {mark} ")
    for character in "\t\n\r":
        text = text.replace(character, " ")
    return text


@given(
    st.lists(st.text("ab .!\n", min_size=1, max_size=6), min_size=1, max_size=8),
    st.text("ab .!\t\n", max_size=40),
)
@settings(max_examples=400, deadline=None)
def test_matching_equals_substring_search(entries: list[str], caption: str) -> None:
    entries = [entry for entry in dict.fromkeys(entries) if entry.strip(" ") == entry and entry]
    found = Entries(entries).match(caption)
    assert found == [i for i, entry in enumerate(entries) if f" {entry} " in spaced(caption)]


def test_balancing_thins_frequent_entries_and_draws_the_same_each_time() -> None:
    entries = Entries(["dog", "red dog", "zebra"])
    captions = ["a dog, running"] * 4000 + ["a red dog."] * 100 + ["zebra"] * 5 + ["nothing here", None]
    matches = [entries.match(caption) for caption in captions]
    assert matches[0] == [0]
    assert matches[4050] == [0, 1]
    counts = count_entries(matches, 3)
    assert counts.tolist() == [4100, 100, 5]
    keys = uid_keys([f"{n:032x}" for n in range(len(captions))])
    keep = balanced(matches, keys, counts, entries.names, 200, seed=0)
    assert keep[4000:4105].all()  # rare entries are all kept
    assert not keep[4105:].any()
    assert abs(keep[:4000].sum() - 4000 * 200 / 4100) < 50
    order = np.random.default_rng(0).permutation(len(captions))
    shuffled = balanced([matches[i] for i in order], keys[order], counts, entries.names, 200, seed=0)
    assert np.array_equal(shuffled, keep[order])
    assert not np.array_equal(keep, balanced(matches, keys, counts, entries.names, 200, seed=1))
    assert not balanced([[], []], keys[:2], counts, entries.names, 200, seed=0).any()
    with pytest.raises(RefusedError, match="space"):
        Entries(["dog", " cat"])
