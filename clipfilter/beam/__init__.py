"""Re-deciding and counting on Apache Beam: the engine's own tasks, scheduled by any Beam runner (extra `beam`)."""

from __future__ import annotations
