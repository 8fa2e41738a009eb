"""Scores that need more than one row: negCLIPLoss against a fixed bank, and NormSim against a target set."""

from __future__ import annotations

import numpy as np

#: Temperature and size of the bank in the paper (Wang et al. 2024, arXiv 2405.19547).
TEMPERATURE = 0.01
BANK_SIZE = 32_768
_ROWS = 512


def negclip_scores(
    image: np.ndarray,
    text: np.ndarray,
    bank_image: np.ndarray,
    bank_text: np.ndarray,
    in_bank: np.ndarray,
    temperature: float = TEMPERATURE,
) -> np.ndarray:
    """float32 [n]: negCLIPLoss of each pair; higher is better.

    s_i = f_i.g_i - T/2 [log sum_{j in B_i} exp(f_i.g_j / T) + log sum_{j in B_i} exp(f_j.g_i / T)], where B_i is the bank
    without pair i, plus pair i: the own pair counts exactly once, whether it is in the bank or not. One bank for the whole
    dataset, so that a score depends on no batch.

    image, text: float [n, d], unit norm; bank_image, bank_text: float [b, d]; in_bank: int64 [n], the row's place in the
    bank or -1. Products and logsumexp are float32, in blocks of one shape.
    """
    n, dim = image.shape
    result = np.empty(n, np.float32)
    bank_f, bank_g = (np.ascontiguousarray(part, np.float32) for part in (bank_image, bank_text))
    f, g = np.zeros((2, _ROWS, dim), np.float32)
    t = np.float32(temperature)
    for start in range(0, n, _ROWS):
        size = min(_ROWS, n - start)
        for block, values in ((f, image), (g, text)):
            block[:size] = values[start : start + size]
            block[size:] = 0.0
        own = np.vecdot(f, g)
        rows = np.flatnonzero(in_bank[start : start + size] >= 0)
        places = in_bank[start : start + size][rows]
        total = np.zeros(_ROWS, np.float32)
        for products in (f @ bank_g.T, g @ bank_f.T):
            products[rows, places] = -np.inf
            products /= t
            highest = np.maximum(products.max(axis=1, initial=-np.inf), own / t)
            sums = np.exp(products - highest[:, None]).sum(axis=1) + np.exp(own / t - highest)
            total += highest + np.log(sums)
        result[start : start + size] = (own - t / 2 * total)[:size]
    return result


class NormSim:
    """NormSim_p of image embeddings: ||F_target f||_p for p = 2, the highest similarity to a target for p = infinity.

    target: float [t, d], unit norm. For p = 2 only F^T F is kept, d x d numbers in float64, whatever t is.
    """

    def __init__(self, target: np.ndarray, p: float) -> None:
        if p not in (2, np.inf):
            raise ValueError(f"p is {p}, and NormSim is defined here for 2 and infinity")
        self._gram = None
        self._target = np.ascontiguousarray(target, np.float32)
        if p == 2:
            exact = target.astype(np.float64)
            self._gram = exact.T @ exact

    def scores(self, image: np.ndarray) -> np.ndarray:
        """float32 [n] of float [n, d]."""
        result = np.empty(len(image), np.float32)
        for start in range(0, len(image), _ROWS):
            block = image[start : start + _ROWS]
            if self._gram is not None:
                exact = block.astype(np.float64)
                result[start : start + _ROWS] = np.sqrt(np.maximum(np.vecdot(exact @ self._gram, exact), 0.0))
            else:
                highest = np.full(len(block), -np.inf, np.float32)
                single = block.astype(np.float32)
                for first in range(0, len(self._target), 8192):
                    highest = np.maximum(highest, (single @ self._target[first : first + 8192].T).max(axis=1))
                result[start : start + _ROWS] = highest
        return result


def smallest(hashes: np.ndarray, count: int) -> np.ndarray:
    """int64: positions of the `count` smallest hashes, by hash; ties by position."""
    if len(hashes) > count:
        limit = np.partition(hashes, count - 1)[count - 1]
        places = np.flatnonzero(hashes <= limit)
    else:
        places = np.arange(len(hashes))
    return places[np.argsort(hashes[places], kind="stable")][:count]
