"""Everything a training run is told, checked before work begins, and how two commands are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from clipfilter import defaults
from clipfilter.errors import RefusedError

LOSSES = ("clip", "siglip")
DTYPES = ("fp32", "bf16", "fp16")
LOGS = ("csv", "tensorboard")
DEV_MEASURES = ("recall@10", "loss")

#: Where the work runs and what is shown of it: these may change when a run is continued.
_FREE = frozenset({"out", "engine", "address", "threads", "device", "log"})


@dataclass(frozen=True)
class TrainSettings:
    """One training run.

    source, dev, zero_shot: what `open_source` reads. where, dev_where: `column=value`; a row must have one of
    the values given for each column. train: the rule of `freezing.trainable_names`. A step contrasts batch_size *
    accumulate * workers pairs. warmup: steps (None: a tenth of all). clip_norm: the largest norm of the gradient.
    checkpoint_every: steps. patience: epochs without a better dev measure before training stops. max_zero_shot_loss:
    points of zero-shot top-1 that interpolation may lose.
    """

    source: str
    model: str
    out: str
    train: str = "last-2-blocks"
    from_scratch: bool = False
    epochs: int = 5
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 3e-5
    weight_decay: float = 0.1
    warmup: int | None = None
    clip_norm: float = 1.0
    dtype: defaults.Dtype = "fp32"
    device: str = "cpu"
    seed: int = 0
    loss: Literal["clip", "siglip"] = "clip"
    augment: bool = True
    where: tuple[str, ...] = ()
    limit: int | None = None
    image_column: str | None = None
    caption_column: str | None = None
    private: bool = False
    dev: str | None = None
    dev_where: tuple[str, ...] = ()
    dev_measure: Literal["recall@10", "loss"] = "recall@10"
    patience: int = 3
    zero_shot: str | None = None
    label_column: str = "label"
    max_zero_shot_loss: float = 1.0
    checkpoint_every: int = 200
    engine: Literal["local", "ray"] = "local"
    workers: int = 1
    address: str | None = None
    threads: int | None = None
    log: tuple[str, ...] = ("csv",)

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "patience", "checkpoint_every", "workers"):
            if getattr(self, name) < 1:
                raise RefusedError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        for name in ("lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise RefusedError(f"--{name.replace('_', '-')} must be above 0, not {getattr(self, name)}.")
        for name in ("weight_decay", "max_zero_shot_loss"):
            if not getattr(self, name) >= 0:
                raise RefusedError(f"--{name.replace('_', '-')} must not be negative, not {getattr(self, name)}.")
        for name, known in (("loss", LOSSES), ("dtype", DTYPES), ("dev_measure", DEV_MEASURES)):
            if getattr(self, name) not in known:
                raise RefusedError(f"--{name.replace('_', '-')} must be one of {', '.join(known)}.")
        if unknown := set(self.log) - set(LOGS):
            raise RefusedError(f"--log knows csv and tensorboard, not {sorted(unknown)[0]!r}.")
        if self.dtype == "fp16" and not self.device.startswith("cuda"):
            raise RefusedError("fp16 training needs a GPU: use --dtype bf16 or fp32.")
        if self.engine == "local" and self.workers > 1:
            raise RefusedError(f"{self.workers} workers need --engine ray.")
        for condition in (*self.where, *self.dev_where):
            if "=" not in condition:
                raise RefusedError(f"a condition has the form column=value, not {condition!r}.")
        if self.dev is not None and self.dev_where and self.dev == self.source:
            raise RefusedError("--dev names the training source: leave it out, --dev-where is enough.")

    @property
    def step_pairs(self) -> int:
        """Pairs that one optimiser step contrasts with each other, over all workers."""
        return self.batch_size * self.accumulate * self.workers

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TrainSettings:
        lists = {name: tuple(data[name]) for name in ("where", "dev_where", "log")}
        return cls(**{**data, **lists})

    def differences(self, earlier: Mapping[str, Any]) -> list[str]:
        """`name: then, now` for every setting in which a continued run would not be the one that was begun."""
        mine = TrainSettings.from_json(self.to_json()).to_json()
        theirs = TrainSettings.from_json(earlier).to_json()
        names = [item.name for item in fields(self) if item.name not in _FREE]
        return [f"{name}: {theirs[name]!r} then, {mine[name]!r} now" for name in names if mine[name] != theirs[name]]
