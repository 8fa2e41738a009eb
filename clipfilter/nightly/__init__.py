"""Jobs that run every night on a growing source: only what is new, one dataset, alerts, a history, a way back."""

from __future__ import annotations

from clipfilter.nightly.history import accept_night, history, roll_back
from clipfilter.nightly.night import NightRequest, NightResult, night_overview, run_night

__all__ = [
    "NightRequest",
    "NightResult",
    "accept_night",
    "history",
    "night_overview",
    "roll_back",
    "run_night",
]
