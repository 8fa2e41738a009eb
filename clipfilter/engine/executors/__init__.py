"""Where tasks run: worker processes on this machine, or Ray actors. An executor only schedules."""

from __future__ import annotations
