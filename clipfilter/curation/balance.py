"""MetaCLIP's balancing: captions matched with a list of entries, frequent entries thinned, by seeded draws.

Source: facebookresearch/MetaCLIP, substr_matching.py and balancing.py (Xu et al. 2023, arXiv 2309.16671).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from clipfilter.curation.uids import seeded_hash
from clipfilter.errors import RefusedError

_WRAPPED = (",", ".", ";", ":", "?", "!", "`")
_TO_SPACE = str.maketrans("\t\n\r", "   ")


class Entries:
    """The metadata: a list of entries, found in a caption where " entry " is a substring of its spaced text.

    Since a match begins and ends at a space, it is a run of the caption's words, and every run of words that begins like
    an entry is looked up: linear in the caption, whatever the number of entries.
    """

    def __init__(self, entries: Iterable[str]) -> None:
        self.names = list(dict.fromkeys(entries))
        if any(not name or name != name.strip(" ") for name in self.names):
            raise RefusedError("an entry of the list is empty or begins or ends with a space; one entry per line.")
        self._places: dict[tuple[str, ...], int] = {}
        self._lengths: dict[str, tuple[int, ...]] = {}
        for place, name in enumerate(self.names):
            words = tuple(name.split(" "))
            self._places[words] = place
            self._lengths[words[0]] = tuple(sorted({*self._lengths.get(words[0], ()), len(words)}))
        digest = hashlib.sha256("\n".join(self.names).encode("utf-8", "surrogatepass"))
        self.sha256 = digest.hexdigest()

    def match(self, caption: str | None) -> list[int]:
        """The entries in a caption, ascending."""
        if not caption:
            return []
        words = _spaced(caption).split(" ")
        found: set[int] = set()
        for start, word in enumerate(words):
            for length in self._lengths.get(word, ()):
                place = self._places.get(tuple(words[start : start + length]))
                if place is not None:
                    found.add(place)
        return sorted(found)


def count_entries(matches: Iterable[Sequence[int]], entries: int) -> np.ndarray:
    """int64 [entries]: in how many captions each entry is. Counts of parts of a dataset add up."""
    flat = [place for places in matches for place in places]
    return np.bincount(np.array(flat, np.int64), minlength=entries)


def balanced(
    matches: Sequence[Sequence[int]], keys: np.ndarray, counts: np.ndarray, names: Sequence[str], t: int, seed: int
) -> np.ndarray:
    """bool [n]: rows for which some matched entry draws true, each with p = min(1, t / count); false without a match.

    keys: uint64 [n, 2] of the uids; counts: int64, of the whole dataset. A draw is a hash of (seed, uid, entry), so a row
    is drawn the same in every attempt and in every shard.
    """
    probability = np.minimum(1.0, t / np.maximum(counts, 1))
    keep = np.zeros(len(matches), bool)
    owners = np.repeat(np.arange(len(matches)), [len(places) for places in matches])
    flat = np.array([place for places in matches for place in places], np.int64)
    if not len(flat):
        return keep
    order = np.argsort(flat, kind="stable")
    present, starts = np.unique(flat[order], return_index=True)
    for place, rows in zip(present.tolist(), np.split(owners[order], starts[1:]), strict=True):
        drawn = seeded_hash(keys[rows], seed, f"balance\0{names[place]}") / 2.0**64
        keep[rows[drawn < probability[place]]] = True
    return keep


def _spaced(text: str) -> str:
    spaced = f" {text} "
    for mark in _WRAPPED:
        spaced = spaced.replace(mark, f" {mark} ")
    return spaced.translate(_TO_SPACE)
