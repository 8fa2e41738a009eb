"""Contrastive training: fine-tune a model on captions, and keep what it could do before."""

from __future__ import annotations

from clipfilter.training.card import table_rows
from clipfilter.training.job import TrainResult, train
from clipfilter.training.loop import Shown
from clipfilter.training.settings import TrainSettings

__all__ = [
    "Shown",
    "TrainResult",
    "TrainSettings",
    "table_rows",
    "train",
]
