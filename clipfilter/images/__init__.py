"""From encoded bytes to what a model and a rule need: pixels, display size, hashes and cheap facts."""

from __future__ import annotations
