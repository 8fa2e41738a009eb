"""Contrastive training: fine-tune a model on captions, and keep what it could do before."""

from __future__ import annotations

from clipfilter.training.job import TrainResult, train
from clipfilter.training.settings import TrainSettings

__all__ = ["TrainResult", "TrainSettings", "train"]
