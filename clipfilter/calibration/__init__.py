"""Calibration: rows to label from a run, thresholds with guarantees from the labels, written into the policy."""

from __future__ import annotations

from clipfilter.calibration.calibrate import Calibrated, Target, calibrate
from clipfilter.calibration.labels import Label, read_labels
from clipfilter.calibration.plot import plot_svg
from clipfilter.calibration.sampling import SAMPLE_COLUMNS, Design, Sample, draw, write_sample
from clipfilter.calibration.scores import find_rule, open_scored, refuse_other_scores
from clipfilter.calibration.write import calibrated_text, policy_path, write_policy

__all__ = [
    "SAMPLE_COLUMNS",
    "Calibrated",
    "Design",
    "Label",
    "Sample",
    "Target",
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
