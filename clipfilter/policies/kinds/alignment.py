"""Alignment: how well the caption fits the picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import model_validator

from clipfilter.policies.arithmetic import Recheck
from clipfilter.policies.kinds.base import Answer, Measure, Rows, Words, check_cosine
from clipfilter.policies.parts.attachments import Attachments
from clipfilter.policies.parts.bands import Band
from clipfilter.policies.parts.fields import fail


class Alignment(Measure):
    """Cosine of image and caption."""

    kind = "alignment"
    about = "Cosine of image and caption; write alignment: {}."
    needs_model = True
    needs_text = True

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, value: Any) -> Any:
        """The value of `alignment: {}`."""
        if not isinstance(value, dict):
            fail("alignment takes no value; write `alignment: {}`")
        return value

    def check_band(self, band: Band, *at: str | int) -> None:
        check_cosine(band, *at)

    def answer(self, thresholds: Sequence[float], files: Attachments) -> Answer:
        recheck = Recheck.of([thresholds])

        def score(rows: Rows) -> tuple[np.ndarray, None]:
            """The cosines, those close to a threshold in float64 where there are captions' embeddings."""
            values = rows.similarity.copy()

            def exact(picked: np.ndarray) -> np.ndarray:
                if rows.texts is None:
                    return values[None, picked].astype(np.float64)
                images, texts = rows.images, rows.texts
                return np.array([[images[row].astype(np.float64) @ texts[row].astype(np.float64) for row in picked]])

            recheck.settle(values[None], exact)
            return values, None

        return Answer(score)

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        return [
            "How well the caption fits the picture. The score is the cosine of both embeddings; higher fits better."
        ]

    @classmethod
    def measured(cls, spec: Any) -> Words:
        return ["similarity to the caption"]

    def summary(self, conditional: bool) -> str:
        return "cosine of image and caption"
