"""clipfilter: decide, for millions of images, what stays in a dataset and what goes."""

from __future__ import annotations

__version__ = "0.1.0"
