"""The order of training and what each pair shows: pure functions of the seed, the epoch and the row."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from clipfilter.engine import prefetch
from clipfilter.images import OVERSAMPLING, PreprocessConfig, decode, prepare_fast, resize
from clipfilter.training.pairs import Pairs

#: open_clip's training augmentation (open_clip.transform.AugmentationCfg): area and aspect ratio of the crop.
CROP_AREA = (0.9, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class MicroBatch:
    """images: uint8 pixels [n, 3, S, S], or float32 activations as `prefix` recorded them. texts: n captions."""

    images: np.ndarray
    texts: list[str]


def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count]: the permutation of this epoch."""
    return np.random.default_rng((seed, epoch, 1)).permutation(count)


def row_generator(seed: int, epoch: int, position: int) -> np.random.Generator:
    """The random numbers of one row in one epoch; the same whoever prepares it, and whenever."""
    return np.random.default_rng((seed, epoch, 2, position))


def random_crop(width: int, height: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, width, height) in pixels, as torchvision's RandomResizedCrop draws it with open_clip's scale."""
    area = width * height
    for _ in range(10):
        target = area * generator.uniform(*CROP_AREA)
        ratio = math.exp(generator.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.integers(0, width - w + 1), generator.integers(0, height - h + 1)
            return int(left), int(top), w, h
    if width / height < CROP_RATIO[0]:
        w, h = width, min(height, round(width / CROP_RATIO[0]))
    elif width / height > CROP_RATIO[1]:
        w, h = min(width, round(height * CROP_RATIO[1])), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def prepare_row(data: memoryview, config: PreprocessConfig, generator: np.random.Generator | None) -> np.ndarray:
    """uint8 [3, S, S]: a random resized crop, or without a generator what the model sees at inference."""
    rgb = decode(data, min_side=math.ceil(config.size * OVERSAMPLING)).rgb
    if generator is None:
        return prepare_fast(rgb, config)
    left, top, width, height = random_crop(rgb.shape[1], rgb.shape[0], generator)
    cropped = np.ascontiguousarray(rgb[top : top + height, left : left + width])
    return resize(cropped, (config.size, config.size), config.interpolation)


def pixel_batches(pairs: Pairs, config: PreprocessConfig, size: int, threads: int) -> Iterator[np.ndarray]:
    """uint8 [n, 3, S, S], n up to `size`: all images in order, as the model sees them at inference, one batch ahead."""

    def make() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
            for start in range(0, len(pairs), size):
                rows = range(start, min(start + size, len(pairs)))
                yield np.stack(list(pool.map(lambda row: prepare_row(pairs.image(row), config, None), rows)))

    return prefetch(make(), 1)


@dataclass(frozen=True)
class Loader:
    """Prepares the micro-batches of training steps, one step ahead, for one of `workers` workers.

    Step s of an epoch takes the rows s * step .. (s + 1) * step of the epoch's order, step = workers * accumulate *
    batch_size; worker r takes its r-th part of them. An incomplete last step is left out.
    """

    pairs: Pairs
    config: PreprocessConfig
    seed: int
    batch_size: int
    accumulate: int
    augment: bool
    threads: int
    recorded: np.ndarray | None = None  # the prefix's activations of the pairs' whole file, instead of pixels
    rank: int = 0
    workers: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return len(self.pairs) // (self.batch_size * self.accumulate * self.workers)

    def steps(self, epoch: int, start: int = 0) -> Iterator[list[MicroBatch]]:
        """`accumulate` micro-batches for each step of the epoch from `start` on."""
        order = epoch_order(self.seed, epoch, len(self.pairs))
        mine = self.batch_size * self.accumulate
        with ThreadPoolExecutor(self.threads, thread_name_prefix="decode") as pool:

            def make() -> Iterator[list[MicroBatch]]:
                for step in range(start, self.steps_per_epoch):
                    begin = (step * self.workers + self.rank) * mine
                    rows = order[begin : begin + mine]
                    drawn = list(pool.map(lambda row: self._row(epoch, int(row)), rows))
                    parts = (drawn[at : at + self.batch_size] for at in range(0, mine, self.batch_size))
                    yield [MicroBatch(np.stack([p for p, _ in part]), [t for _, t in part]) for part in parts]

            yield from prefetch(make(), 1)

    def _row(self, epoch: int, position: int) -> tuple[np.ndarray, str]:
        generator = row_generator(self.seed, epoch, position)
        captions = self.pairs.captions(position)
        caption = captions[int(generator.integers(len(captions)))]
        if self.recorded is not None:
            return self.recorded[self.pairs.rows[position]], caption
        return prepare_row(self.pairs.image(position), self.config, generator if self.augment else None), caption
