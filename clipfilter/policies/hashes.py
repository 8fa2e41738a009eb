"""Lists of known hashes: sha256 of files and perceptual hashes within a Hamming distance, for whole columns at once."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path

import numpy as np

from clipfilter.errors import RefusedError

#: Bits that may differ. Beyond, unrelated pictures begin to match.
MAX_DISTANCE = 16
DIGITS = {"sha256": 64, "phash": 16}

_WORDS = 4  # a perceptual hash is cut into four words of 16 bits
_FEW = 512  # lists up to this length are compared whole,
_WIDEST = 2  # and so are longer ones where more bits of a word may differ: there is too much to look up
_IN_CACHE = 1 << 17
_AT_ONCE = 1 << 21


@lru_cache(maxsize=8)
def read_hashes(path: Path, kind: str, sha256: str) -> tuple[str, ...]:
    """Lower-case hex hashes of a text file: one per line, what follows a space or comma and lines with # are left out.

    sha256: of the file, so that a changed file is read again. Raises RefusedError with the line.
    """
    found = []
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                word = re.split(r"[\s,;]", line.strip(), maxsplit=1)[0].lower()
                if not word or word.startswith("#"):
                    continue
                problem = bad_hash(word, kind)
                if problem:
                    raise RefusedError(f"{path}:{number}: {problem}")
                found.append(word)
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"the list of hashes {path} cannot be read: {error}") from None
    if not found:
        raise RefusedError(f"the list of hashes {path} is empty")
    return tuple(found)


def bad_hash(word: str, kind: str) -> str | None:
    """Why this is no hash of the kind ("sha256" or "phash"), or None."""
    digits = DIGITS[kind]
    if re.fullmatch(rf"[0-9a-f]{{{digits}}}", word):
        return None
    return f"{word[:80]!r} is not a {kind} ({digits} hex digits)"


@dataclass(frozen=True)
class DigestTable:
    """Digests of 128 bits, sorted; looked up for whole columns."""

    high: np.ndarray  # uint64 [n]
    low: np.ndarray  # uint64 [n]
    place: np.ndarray  # intp [n], of each in the order given

    @classmethod
    def of(cls, digests: np.ndarray) -> DigestTable:
        """digests: uint8 [n, 16]."""
        high, low = _halves(digests)
        order = np.lexsort((low, high))
        return cls(high[order], low[order], order)

    def find(self, digests: np.ndarray) -> np.ndarray:
        """intp [m], the place of each digest (uint8 [m, 16]) in the list, -1 where it is not in it."""
        high, low = _halves(digests)
        first = np.searchsorted(self.high, high, "left")
        last = np.searchsorted(self.high, high, "right")
        result = np.full(len(high), -1, dtype=np.intp)
        for step in range(int((last - first).max(initial=0))):
            at = np.minimum(first + step, last - 1)
            hit = (first + step < last) & (self.low[at] == low)
            result[hit] = self.place[at[hit]]
        return result


def _halves(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    words = np.ascontiguousarray(digests, dtype=np.uint8).reshape(-1, 16).view(np.uint64)
    return words[:, 0].copy(), words[:, 1].copy()


def sha256_digests(hashes: Sequence[str | None]) -> np.ndarray:
    """The first 128 bits of sha256 hex digests, uint8 [n, 16]; zeros for None."""
    joined = "".join((value or "0" * 64)[:32] for value in hashes)
    return np.frombuffer(bytes.fromhex(joined), dtype=np.uint8).reshape(-1, 16)


def name_digests(names: Iterable[str | None]) -> np.ndarray:
    """128-bit digests (BLAKE2b) of any texts, uint8 [n, 16]."""
    joined = b"".join(hashlib.blake2b((name or "").encode(), digest_size=16).digest() for name in names)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, 16)


@dataclass(frozen=True)
class PerceptualIndex:
    """64-bit hashes that are searched within a Hamming distance.

    Multi-index hashing (Norouzi, Punjani, Fleet 2012): of two hashes that differ in at most D bits, one of four 16-bit
    words differs in at most D // 4, so a row is compared only with the hashes that share such a word.
    """

    hashes: np.ndarray  # uint64 [n]
    distance: int
    order: tuple[np.ndarray, ...]  # of each word: the hashes sorted by it, intp [n]
    starts: tuple[np.ndarray, ...]  # of each word: where its values begin in that order, intp [65537]

    @classmethod
    def of(cls, hashes: np.ndarray, distance: int) -> PerceptualIndex:
        """hashes: uint64 [n], at least one; distance: largest number of bits that may differ."""
        hashes = np.unique(np.asarray(hashes, dtype=np.uint64))
        order, starts = [], []
        for word in _words(hashes):
            order.append(np.argsort(word, kind="stable"))
            starts.append(np.searchsorted(word[order[-1]], np.arange((1 << 16) + 1)))
        return cls(hashes, distance, tuple(order), tuple(starts))

    def nearest(self, hashes: np.ndarray) -> np.ndarray:
        """Bits by which each hash (uint64 [m]) differs from its nearest in the list, int64 [m]; 64 beyond `distance`."""
        best = np.full(len(hashes), 64, dtype=np.int64)
        if len(self.hashes) <= _FEW or self.distance // _WORDS > _WIDEST:
            step = max(1, _IN_CACHE // len(self.hashes))
            for start in range(0, len(hashes), step):
                part = hashes[start : start + step]
                best[start : start + step] = np.bitwise_count(part[:, None] ^ self.hashes[None]).min(axis=1)
        else:
            self._search(np.asarray(hashes, dtype=np.uint64), best)
        best[best > self.distance] = 64
        return best

    def _search(self, hashes: np.ndarray, best: np.ndarray) -> None:
        probes = _masks(self.distance // _WORDS)
        for word, order, starts in zip(_words(hashes), self.order, self.starts, strict=True):
            for mask in probes:
                value = word ^ mask
                first = starts[value]
                count = starts[value.astype(np.int64) + 1] - first
                rows = np.flatnonzero(count)
                for part in _parts(rows, count[rows]):
                    counts = count[part]
                    inside = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
                    listed = self.hashes[order[np.repeat(first[part], counts) + inside]]
                    bits = np.bitwise_count(np.repeat(hashes[part], counts) ^ listed).astype(np.int64)
                    ends = np.cumsum(counts) - counts
                    best[part] = np.minimum(best[part], np.minimum.reduceat(bits, ends))


def _parts(rows: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """`rows` cut so that their candidates together stay small; one row's candidates are never cut."""
    if not len(rows):
        return []
    total = np.cumsum(counts)
    return np.split(rows, np.flatnonzero(np.diff(total // _AT_ONCE)) + 1)


def _words(hashes: np.ndarray) -> list[np.ndarray]:
    """The four 16-bit words of each hash, uint16 [n] each."""
    return [((hashes >> np.uint64(16 * place)) & np.uint64(0xFFFF)).astype(np.uint16) for place in range(_WORDS)]


def _masks(radius: int) -> list[np.uint16]:
    """All 16-bit masks with at most `radius` bits."""
    chosen = [bits for size in range(radius + 1) for bits in combinations(range(16), size)]
    return [np.uint16(sum(1 << bit for bit in bits)) for bits in chosen]


def phash_values(hashes: Iterable[str]) -> np.ndarray:
    """Perceptual hashes from 16 hex digits, uint64 [n]."""
    return np.array([int(value, 16) for value in hashes], dtype=np.uint64)
