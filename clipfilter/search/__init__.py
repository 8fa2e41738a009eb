"""Search in the embeddings of a run: exact or approximate, by texts, images and rows, filtered by columns."""

from __future__ import annotations

import sys
import types
from collections.abc import Sequence
from typing import Any

from clipfilter.runs import RunVectors
from clipfilter.search.exact import top_k
from clipfilter.search.index import EXACT_ROWS, build_index, has_index
from clipfilter.search.query import query_vector
from clipfilter.search.search import RESULT_COLUMNS, Searcher, SearchResult, search_run
from clipfilter.search.where import parse_where


class _Callable(types.ModuleType):
    """`clipfilter.search` is this package and, as part of the Python API, a function (see `clipfilter.api.search`)."""

    def __call__(self, run: str, text: str | Sequence[str] = (), **options: Any) -> SearchResult:
        return search_run(str(run), text, **options)


sys.modules[__name__].__class__ = _Callable

__all__ = [
    "EXACT_ROWS",
    "RESULT_COLUMNS",
    "RunVectors",
    "SearchResult",
    "Searcher",
    "build_index",
    "has_index",
    "parse_where",
    "query_vector",
    "search_run",
    "top_k",
]
