"""The training loop: one process, or one of several that train the same model together."""

from __future__ import annotations

import contextlib
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


def fit(
    settings: TrainSettings,
    model: Trainable,
    loader: Loader,
    image_features: Callable[[np.ndarray], Tensor],
    measure: Callable[[], dict[str, float]],
    group: Group,
    show: Callable[[Shown], None] | None = None,
) -> Position:
    """Train from the newest checkpoint of the run (or from the start) to the end, or until the dev measure stops rising.

    image_features: of the images that the loader gives. measure: the dev measures of the model as it is; called on the
    first worker after each epoch. The result depends on the settings alone, not on how often the run was interrupted.
    Raises ClipfilterError when the loss is not finite.
    """
    out = Path(settings.out)
    named = freeze(model.module, settings.train)
    parameters = [parameter for _, parameter in named]
    optimizer = make_optimizer(named, settings.lr, settings.weight_decay)
    scaler = torch.amp.GradScaler(model.device.type, enabled=settings.dtype == "fp16")
    loss = make_loss(settings.loss, group)
    per_epoch = loader.steps_per_epoch
    total = settings.epochs * per_epoch
    warmup = settings.warmup if settings.warmup is not None else max(1, total // 10)

    checkpoints = Checkpoints(out / "checkpoints")
    position = checkpoints.position() or Position()
    if position.step:
        model.load_trained(checkpoints.weights(position.step))
        saved = checkpoints.optimizer(position.step)
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
    with contextlib.ExitStack() as stack:
        logs = _Logs(out, settings, position.step) if group.first else None
        if logs is not None:
            stack.callback(logs.close)
        if position.step == 0:
            dev = _measure(model, measure, group)
            if logs is not None:
                logs.dev({"step": 0, "epoch": 0, **dev})
        while not position.finished:
            train_mode(model.module)
            started = time.perf_counter()
            for micro_batches in loader.steps(position.epoch, position.step - position.epoch * per_epoch):
                rate = learning_rate(position.step, total, warmup, settings.lr)
                for parameter_group in optimizer.param_groups:
                    parameter_group["lr"] = rate
                optimizer.zero_grad()
                value = _gradients(settings, model, image_features, loss, micro_batches, position.step, group, scaler)
                group.mean_([value, *(p.grad for p in parameters if p.grad is not None)])
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                model.clamp_temperature()
                position.step += 1
                shown = float(value)
                if not math.isfinite(shown):
                    raise ClipfilterError(
                        f"the loss is {shown} at step {position.step}: start again elsewhere with a lower --lr or --dtype fp32."
                    )
                if logs is not None:
                    seconds, started = time.perf_counter() - started, time.perf_counter()
                    logs.step(
                        {
                            "step": position.step,
                            "epoch": position.epoch,
                            "loss": round(shown, 7),
                            "lr": f"{rate:.6g}",
                            "logit_scale": round(float(model.logit_scale.detach().exp()), 4),
                            "gradient_norm": round(float(norm), 6),
                            "seconds": round(seconds, 3),
                        }
                    )
                    if show is not None:
                        show(Shown(position.step, total, position.epoch, shown, position.best))
                inside = position.step % per_epoch != 0
                if group.first and inside and position.step % settings.checkpoint_every == 0:
                    _save(checkpoints, position, model, optimizer, scaler, logs)
            position.epoch += 1
            dev = _measure(model, measure, group)
            score = _score(dev, settings)
            if position.best is None or score > position.best:
                position.best, position.best_step, position.bad_epochs = score, position.step, 0
            else:
                position.bad_epochs += 1
            position.finished = position.epoch == settings.epochs or position.bad_epochs >= settings.patience
            if logs is not None:
                logs.dev({"step": position.step, "epoch": position.epoch, **dev})
                _save(checkpoints, position, model, optimizer, scaler, logs)
    return position


def _gradients(
    settings: TrainSettings,
    model: Trainable,
    image_features: Callable[[np.ndarray], Tensor],
    loss: torch.nn.Module,
    micro_batches: list[MicroBatch],
    step: int,
    group: Group,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    mixed = settings.dtype != "fp32"

    def features(number: int) -> tuple[Tensor, Tensor]:
        # Dropout draws the same masks both times, and after a resume.
        seed = np.random.SeedSequence((settings.seed, step, group.rank, number)).generate_state(1)[0]
        torch.manual_seed(int(seed))
        with torch.autocast(model.device.type, dtypes[settings.dtype], enabled=mixed):
            image = image_features(micro_batches[number].images)
            text = model.text_features(micro_batches[number].texts)
        return F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)

    def value(images: Tensor, texts: Tensor) -> Tensor:
        bias = model.logit_bias if settings.loss == "siglip" else None
        return contrast(loss, images, texts, model.logit_scale, bias)

    return backward(features, len(micro_batches), value, scaler.scale)


def _measure(model: Trainable, measure: Callable[[], dict[str, float]], group: Group) -> dict[str, float]:
    model.module.eval()
    found: dict[str, float] = group.tell(measure() if group.first else None)
    return found


def _score(dev: dict[str, float], settings: TrainSettings) -> float:
    return -dev["loss"] if settings.dev_measure == "loss" else dev["recall_at_10"]


def _save(
    checkpoints: Checkpoints,
    position: Position,
    model: Trainable,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    logs: _Logs | None,
) -> None:
    if logs is not None:
        logs.sync()
    states = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    checkpoints.write(position, model.trained_state(), states)


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
