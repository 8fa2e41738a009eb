"""What one worker of a training run does: load the data and the model that were prepared, and train."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipfilter.engine import MAX_THREADS, cpu_count
from clipfilter.training.batches import Loader
from clipfilter.training.freezing import freeze
from clipfilter.training.group import Group
from clipfilter.training.loop import Shown, Training
from clipfilter.training.measuring import embed_images, measure_pairs
from clipfilter.training.model import Trainable, load_trainable
from clipfilter.training.pairs import Pairs
from clipfilter.training.prefix import Prefix, PrefixStore
from clipfilter.training.settings import TrainSettings

PAIRS = ".pairs"
INITIAL = "initial.safetensors"
#: Without --dev and --dev-where pairs are held out, by a hash of their uids: this share, of small sets about so many
#: pairs, but never more than a quarter.
HELD_OUT, HELD_OUT_PAIRS, HELD_OUT_MOST = 0.05, 400, 0.25


@dataclass(frozen=True)
class Data:
    """The data of a run as it lies in OUT/.pairs. `choose` steers training and interpolation, `report` never does."""

    train: Pairs
    choose: Pairs
    report: Pairs


def open_data(settings: TrainSettings) -> Data:
    """The prepared pairs of a run."""
    folder = Path(settings.out) / PAIRS
    train = Pairs(folder / "train.arrow")
    if settings.dev is None and not settings.dev_where:
        train, dev = train.hold_out(min(HELD_OUT_MOST, max(HELD_OUT, HELD_OUT_PAIRS / len(train))))
    else:
        dev = Pairs(folder / "dev.arrow")
    return Data(train, *dev.halves())


@dataclass(frozen=True)
class Start:
    """The model that training starts from, frozen but for what trains, and the recorded activations of what is frozen."""

    model: Trainable
    store: PrefixStore
    threads: int

    @classmethod
    def of(cls, settings: TrainSettings) -> Start:
        """Load it. Raises RefusedError for a model that cannot be trained, or not by this rule."""
        name = settings.model
        if settings.from_scratch:
            name = f"{name}={Path(settings.out).absolute() / INITIAL}"
        threads = threads_of(settings)
        model = load_trainable(name, device=settings.device, threads=threads)
        freeze(model.module, settings.train)
        return cls(model, PrefixStore(Prefix(model), threads), threads)

    def embed(self, pairs: Pairs) -> np.ndarray:
        """float32 [n, dim], unit rows, of the images of `pairs` by the model as it is."""
        recorded = self.store.embed(pairs)
        return embed_images(self.model.encoder, pairs, self.threads) if recorded is None else recorded


def threads_of(settings: TrainSettings) -> int:
    return settings.threads or max(1, min(MAX_THREADS, cpu_count() // settings.workers))


def work(settings: TrainSettings, group: Group, show: Callable[[Shown], None] | None = None) -> None:
    """Train as worker `group.rank`; checkpoints and logs go to OUT."""
    data, start = open_data(settings), Start.of(settings)
    model = start.model
    recorded = None if settings.augment else start.store.recorded(data.train)
    loader = Loader(
        data.train, model.preprocess, settings.seed, settings.batch_size, settings.accumulate, settings.augment,
        start.threads, recorded, group.rank, group.size,
    )  # fmt: skip

    def measure() -> dict[str, float]:
        scale = float(model.logit_scale.detach().exp())
        return measure_pairs(model.encoder, start.embed(data.choose), data.choose, scale)

    image_features = model.image_features if recorded is None else start.store.prefix.features
    with contextlib.closing(Training(settings, model, loader, image_features, measure, group, show)) as training:
        training.run()
