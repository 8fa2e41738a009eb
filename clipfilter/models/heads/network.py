"""What heads compute: layers on an embedding, the Stable Diffusion safety checker, and inputs read as words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

Activation = Literal["none", "relu", "tanh"]
Final = Literal["none", "sigmoid"]

#: Key of "-0.000000", which is a word of its own beside "0.000000".
NEGATIVE_ZERO = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Vocabulary:
    """An input that the network reads as a word: "%f" of the number, looked up in a list; 0 for unknown words.

    AutoKeras takes a column of numbers for categories where its training data had few different ones. Words are
    kept as whole millionths, which is what "%f" writes.
    """

    keys: np.ndarray  # int64 [m], sorted
    values: np.ndarray  # float64 [m]

    def __call__(self, column: np.ndarray) -> np.ndarray:
        """float16, float32 or float64 [n] -> float64 [n]."""
        if column.dtype == np.float16:
            return np.asarray(self._of_half[column.view(np.uint16)])
        return self._look_up(column)

    @cached_property
    def _of_half(self) -> np.ndarray:
        """The value of each of the 65 536 numbers that a float16 can be, by its bits: stored embeddings are float16, and
        looking them up here is several times as fast as searching for their words."""
        return self._look_up(np.arange(2**16, dtype=np.uint16).view(np.float16))

    def _look_up(self, column: np.ndarray) -> np.ndarray:
        """Any float [n] -> float64 [n].

        A float16 or float32 number times a million is exact in float64, and rint rounds half to even as "%f" does.
        """
        if not len(self.keys):
            return np.zeros(len(column))
        with np.errstate(invalid="ignore"):  # nobody reads the value of what is not finite
            scaled = np.rint(column.astype(np.float64) * 1e6)
            words = np.where((scaled == 0) & np.signbit(scaled), NEGATIVE_ZERO, scaled.astype(np.int64))
        at = np.minimum(np.searchsorted(self.keys, words), len(self.keys) - 1)
        return np.where(self.keys[at] == words, self.values[at], 0.0)


@dataclass(frozen=True)
class Layers:
    """Affine layers, an activation between them, a final function; inputs are standardised first where mean and
    scale are given: (x - mean) / scale."""

    weights: tuple[np.ndarray, ...]  # float64 [out, in] each; the last has one output
    biases: tuple[np.ndarray, ...]  # float64 [out]
    activation: Activation
    final: Final
    mean: np.ndarray | None  # float64 [d]
    scale: np.ndarray | None  # float64 [d]
    vocabularies: dict[int, Vocabulary]  # by position of the input

    @property
    def dim(self) -> int:
        return int(self.weights[0].shape[1])

    @cached_property
    def first(self) -> tuple[np.ndarray, np.ndarray]:
        """The first layer as one affine map of the embedding, (float64 [h, d], float64 [h]): standardised within, and
        blind to the inputs that are read as words."""
        weight, bias = self.weights[0], self.biases[0]
        if self.mean is not None and self.scale is not None:
            weight = weight / self.scale
            bias = bias - weight @ self.mean
        if self.vocabularies:
            weight = weight.copy()
            weight[:, list(self.vocabularies)] = 0.0
        return weight, bias

    @cached_property
    def _word_weight(self) -> np.ndarray:
        """The first layer's weights of the inputs that are read as words, float64 [h, words]."""
        positions = list(self.vocabularies)
        weight = self.weights[0][:, positions]
        return np.asarray(weight if self.scale is None else weight / self.scale[positions])

    def words(self, embeddings: np.ndarray) -> np.ndarray:
        """What the inputs that are read as words add to the first layer: any float [n, d] -> float64 [n, h]."""
        if not self.vocabularies:
            return np.zeros((len(embeddings), len(self.weights[0])))
        values = np.array([vocabulary(embeddings[:, position]) for position, vocabulary in self.vocabularies.items()])
        # Unit by unit in memory, which is how the product of the first layer lies that this is added to.
        return np.asarray((self._word_weight @ values).T)

    def rest(self, hidden: np.ndarray) -> np.ndarray:
        """Scores float64 [n] from the first layer's sums, float64 [n, h]."""
        x = hidden
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            x = _activate(x, self.activation) @ weight.T + bias
        score = x[:, 0]
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(score, -700, 700))) if self.final == "sigmoid" else score)

    @cached_property
    def steepest(self) -> float:
        """A Lipschitz bound of `rest`: spectral norms multiplied; no activation here is steeper than 1, the final sigmoid
        1/4."""
        norms = [float(np.linalg.norm(weight, 2)) for weight in self.weights[1:]]
        return math.prod(norms) * (0.25 if self.final == "sigmoid" else 1.0)

    def exact(self, embeddings: np.ndarray) -> np.ndarray:
        """Any float [n, d] -> float64 [n]."""
        weight, bias = self.first
        return self.rest(embeddings.astype(np.float64) @ weight.T + bias + self.words(embeddings))

    def folded(self) -> tuple[np.ndarray, float] | None:
        """The whole as one affine map, (float64 [d], bias), where nothing in it is curved; else None."""
        if self.vocabularies or self.final != "none" or (self.activation != "none" and len(self.weights) > 1):
            return None
        weight, bias = self.weights[-1], self.biases[-1]
        for inner, shift in zip(self.weights[-2::-1], self.biases[-2::-1], strict=True):
            bias = bias + weight @ shift
            weight = weight @ inner
        if self.mean is not None and self.scale is not None:
            weight = weight / self.scale
            bias = bias - weight @ self.mean
        return np.asarray(weight[0]), float(bias[0])


def _activate(x: np.ndarray, activation: Activation) -> np.ndarray:
    if activation == "relu":
        return np.asarray(np.maximum(x, 0.0))
    return np.tanh(x) if activation == "tanh" else x


@dataclass(frozen=True)
class SafetyChecker:
    """The structure of Stable Diffusion's safety checker: concepts with thresholds of their own, and special-care
    concepts that lower all thresholds by 0.01.

    Formula: `a = 0.01 if any(cos(x, s_k) - t_k > 0) else 0`; the score is `max_j(cos(x, c_j) - t_j + a)`, and the
    picture is flagged where that is above 0. The published code rounds each term to thousandths first.
    """

    concepts: np.ndarray  # float64 [m, d], unit rows
    thresholds: np.ndarray  # float64 [m]
    special: np.ndarray  # float64 [k, d], unit rows
    special_thresholds: np.ndarray  # float64 [k]

    @property
    def dim(self) -> int:
        return int(self.concepts.shape[1])

    def exact(self, embeddings: np.ndarray) -> np.ndarray:
        """float64 [n, d] -> float64 [n]."""
        norms = np.linalg.norm(embeddings, axis=1, keepdims=True)
        unit = embeddings / np.maximum(norms, 1e-12)
        care = (unit @ self.special.T - self.special_thresholds > 0).any(axis=1)
        return np.asarray((unit @ self.concepts.T - self.thresholds).max(axis=1) + np.where(care, 0.01, 0.0))

    def folded(self) -> None:
        """Never one affine map."""
        return
