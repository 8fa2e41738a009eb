"""Calibration: rows to label from a run, thresholds with guarantees from the labels, written into the policy."""

from __future__ import annotations

from clipfilter.policies.calibration.calibrate import Calibrated, Expected, Target, Threshold, calibrate
from clipfilter.policies.calibration.labels import Label, read_labels
from clipfilter.policies.calibration.plot import plot_svg
from clipfilter.policies.calibration.sampling import Design, Sample, draw, write_sample
from clipfilter.policies.calibration.scores import ScoredRun, find_rule, open_scored, refuse_other_scores
from clipfilter.policies.calibration.write import calibrated_text, policy_path, write_policy

__all__ = [
    "Calibrated",
    "Design",
    "Expected",
    "Label",
    "Sample",
    "ScoredRun",
    "Target",
    "Threshold",
    "calibrate",
    "calibrated_text",
    "draw",
    "find_rule",
    "open_scored",
    "plot_svg",
    "policy_path",
    "read_labels",
    "refuse_other_scores",
    "write_policy",
    "write_sample",
]
