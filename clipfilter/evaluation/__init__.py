"""How good a model is on data with answers: zero-shot classification, retrieval and caption matching."""

from __future__ import annotations

from clipfilter.evaluation.agreement import agreement, read_sample
from clipfilter.evaluation.contrast import Contrast, contrasts
from clipfilter.evaluation.dataset import DataRequest
from clipfilter.evaluation.evaluate import EvaluateRequest, Evaluation, evaluate
from clipfilter.evaluation.labels import name_classes, read_labels, read_templates
from clipfilter.evaluation.measures import caption_match_auc, retrieval, zero_shot

__all__ = [
    "Contrast",
    "DataRequest",
    "EvaluateRequest",
    "Evaluation",
    "agreement",
    "caption_match_auc",
    "contrasts",
    "evaluate",
    "name_classes",
    "read_labels",
    "read_sample",
    "read_templates",
    "retrieval",
    "zero_shot",
]
