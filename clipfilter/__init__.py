"""clipfilter: decide, for millions of images, what stays in a dataset and what goes.

The Python API (`clipfilter.embed`, `classify`, `search`, `rank`, `Policy`, `open_run`, ...) is `clipfilter.api`; it is
loaded when one of its names is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clipfilter.version import __version__

if TYPE_CHECKING:
    from clipfilter.api import (
        Best,
        Embeddings,
        Policy,
        Ranker,
        RefusedError,
        Run,
        best_of,
        classify,
        embed,
        load_encoder,
        open_run,
        rank,
        search,
    )

__all__ = [
    "Best",
    "Embeddings",
    "Policy",
    "Ranker",
    "RefusedError",
    "Run",
    "__version__",
    "best_of",
    "classify",
    "embed",
    "load_encoder",
    "open_run",
    "rank",
    "search",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "search":  # the package of that name is called like a function
        return importlib.import_module("clipfilter.search")
    if name in __all__:
        return getattr(importlib.import_module("clipfilter.api"), name)
    raise AttributeError(f"module 'clipfilter' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
