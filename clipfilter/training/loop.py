"""The training loop: one process, or one of several that train the same model together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from clipfilter.errors import ClipfilterError
from clipfilter.training.batches import Loader, MicroBatch
from clipfilter.training.checkpoints import Checkpoints, Position
from clipfilter.training.freezing import freeze, train_mode
from clipfilter.training.group import Group
from clipfilter.training.logs import CsvLog, TensorBoardLog
from clipfilter.training.losses import backward, contrast, make_loss
from clipfilter.training.model import Trainable
from clipfilter.training.schedule import learning_rate, make_optimizer
from clipfilter.training.settings import TrainSettings

STEP_COLUMNS = ("step", "epoch", "loss", "lr", "logit_scale", "gradient_norm", "seconds")
DEV_COLUMNS = ("step", "epoch", "recall_at_10", "image_to_text_at_10", "text_to_image_at_10", "auc", "loss")


@dataclass(frozen=True)
class Shown:
    """What a progress bar needs. best: the best dev measure so far."""

    step: int
    steps: int
    epoch: int
    loss: float
    best: float | None


@dataclass(eq=False)
class Training:
    """One worker's training: the model, what moves it, where it stands and what is written of it (by the first worker).

    image_features: of the images that the loader gives. measure: the dev measures of the model as it is; called on the
    first worker after each epoch. The result depends on the settings alone, not on how often the run was interrupted.
    """

    settings: TrainSettings
    model: Trainable
    loader: Loader
    image_features: Callable[[np.ndarray], Tensor]
    measure: Callable[[], dict[str, float]]
    group: Group
    show: Callable[[Shown], None] | None = None

    def __post_init__(self) -> None:
        settings, model = self.settings, self.model
        named = freeze(model.module, settings.train)
        self._parameters = [parameter for _, parameter in named]
        self._optimizer = make_optimizer(named, settings.lr, settings.weight_decay)
        self._scaler = torch.amp.GradScaler(model.device.type, enabled=settings.dtype == "fp16")
        self._loss = make_loss(settings.loss, self.group)
        self._total = settings.epochs * self.loader.steps_per_epoch
        self._warmup = settings.warmup if settings.warmup is not None else max(1, self._total // 10)
        out = Path(settings.out)
        self._checkpoints = Checkpoints(out / "checkpoints")
        self._position = self._resume()
        self._logs = _Logs(out, settings, self._position.step) if self.group.first else None

    def run(self) -> Position:
        """Train from the newest checkpoint (or from the start) to the end, or until the dev measure stops rising.

        Raises ClipfilterError when the loss is not finite.
        """
        position = self._position
        if position.step == 0:
            self._log_dev(self._measured())
        while not position.finished:
            self._epoch()
            position.epoch += 1
            dev = self._measured()
            score = -dev["loss"] if self.settings.dev_measure == "loss" else dev["recall_at_10"]
            if position.best is None or score > position.best:
                position.best, position.best_step, position.bad_epochs = score, position.step, 0
            else:
                position.bad_epochs += 1
            position.finished = position.epoch == self.settings.epochs or position.bad_epochs >= self.settings.patience
            self._log_dev(dev)
            self._save()
        return position

    def close(self) -> None:
        if self._logs is not None:
            self._logs.close()

    def _resume(self) -> Position:
        position = self._checkpoints.position() or Position()
        if position.step:
            self.model.load_trained(self._checkpoints.weights(position.step))
            saved = self._checkpoints.optimizer(position.step)
            self._optimizer.load_state_dict(saved["optimizer"])
            self._scaler.load_state_dict(saved["scaler"])
        return position

    def _epoch(self) -> None:
        """The steps of this epoch that are still to be done."""
        position, per_epoch = self._position, self.loader.steps_per_epoch
        train_mode(self.model.module)
        started = time.perf_counter()
        for micro_batches in self.loader.steps(position.epoch, position.step - position.epoch * per_epoch):
            row = self._step(micro_batches)
            if self._logs is not None:
                seconds, started = time.perf_counter() - started, time.perf_counter()
                self._logs.step({**row, "loss": round(row["loss"], 7), "seconds": round(seconds, 3)})
                if self.show is not None:
                    self.show(Shown(position.step, self._total, position.epoch, row["loss"], position.best))
            if position.step % per_epoch != 0 and position.step % self.settings.checkpoint_every == 0:
                self._save()

    def _step(self, micro_batches: list[MicroBatch]) -> dict[str, Any]:
        """One step of the optimiser; what log.csv says of it, the loss not rounded, without the seconds."""
        position = self._position
        rate = learning_rate(position.step, self._total, self._warmup, self.settings.lr)
        for parameter_group in self._optimizer.param_groups:
            parameter_group["lr"] = rate
        self._optimizer.zero_grad()
        value = self._gradients(micro_batches)
        self.group.mean_([value, *(p.grad for p in self._parameters if p.grad is not None)])
        self._scaler.unscale_(self._optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self.model.clamp_temperature()
        position.step += 1
        loss = float(value)
        if not math.isfinite(loss):
            raise ClipfilterError(
                f"the loss is {loss} at step {position.step}: start again elsewhere with a lower --lr or --dtype fp32."
            )
        return {
            "step": position.step,
            "epoch": position.epoch,
            "loss": loss,
            "lr": f"{rate:.6g}",
            "logit_scale": round(float(self.model.logit_scale.detach().exp()), 4),
            "gradient_norm": round(float(norm), 6),
        }

    def _gradients(self, micro_batches: list[MicroBatch]) -> Tensor:
        """Give the parameters the gradients of the whole step; the loss, detached."""
        settings, model = self.settings, self.model
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        mixed = settings.dtype != "fp32"

        def features(number: int) -> tuple[Tensor, Tensor]:
            # Dropout draws the same masks both times, and after a resume.
            place = (settings.seed, self._position.step, self.group.rank, number)
            torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))
            with torch.autocast(model.device.type, dtypes[settings.dtype], enabled=mixed):
                image = self.image_features(micro_batches[number].images)
                text = model.text_features(micro_batches[number].texts)
            return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

        def value(images: Tensor, texts: Tensor) -> Tensor:
            bias = model.logit_bias if settings.loss == "siglip" else None
            return contrast(self._loss, images, texts, model.logit_scale, bias)

        return backward(features, len(micro_batches), value, self._scaler.scale)

    def _measured(self) -> dict[str, float]:
        """The dev measures, as the first worker finds them, on every worker."""
        self.model.module.eval()
        found: dict[str, float] = self.group.tell(self.measure() if self.group.first else None)
        return found

    def _log_dev(self, dev: dict[str, float]) -> None:
        if self._logs is not None:
            self._logs.dev({"step": self._position.step, "epoch": self._position.epoch, **dev})

    def _save(self) -> None:
        if self._logs is not None:
            self._logs.sync()
            states = {"optimizer": self._optimizer.state_dict(), "scaler": self._scaler.state_dict()}
            self._checkpoints.write(self._position, self.model.trained_state(), states)


class _Logs:
    """log.csv (steps), dev.csv (epochs), and both in TensorBoard when it was asked for."""

    def __init__(self, out: Path, settings: TrainSettings, after_step: int) -> None:
        self._steps = CsvLog(out / "log.csv", STEP_COLUMNS)
        self._dev = CsvLog(out / "dev.csv", DEV_COLUMNS)
        for log in (self._steps, self._dev):
            log.continue_after(after_step if after_step else -1)
        self._board = TensorBoardLog(out / "tensorboard", after_step) if "tensorboard" in settings.log else None

    def step(self, row: dict[str, Any]) -> None:
        self._steps.write(row)
        if self._board is not None:
            self._board.write("train", row)

    def dev(self, row: dict[str, Any]) -> None:
        self._dev.write({name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()})
        if self._board is not None:
            self._board.write("dev", row)

    def sync(self) -> None:
        self._steps.sync()
        self._dev.sync()

    def close(self) -> None:
        for log in (self._steps, self._dev, self._board):
            if log is not None:
                log.close()
