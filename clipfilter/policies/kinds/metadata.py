"""Metadata: a number of the image, its caption, or a column of the source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pydantic import model_validator

from clipfilter.policies.kinds.base import Answer, Measure, Words, Written, numbers_answer
from clipfilter.policies.parts.attachments import Attachments
from clipfilter.policies.parts.columns import check_metadata, metadata_values
from clipfilter.policies.parts.fields import TEXT, text, written_as

_MEANINGS = {
    "width": "width in pixels",
    "height": "height in pixels",
    "min_side": "shorter side in pixels",
    "max_side": "longer side in pixels",
    "aspect_ratio": "longer side divided by shorter side",
    "pixels": "width times height",
    "caption_words": "words of the caption",
    "caption_chars": "characters of the caption",
    "brightness": "brightness of the picture",
    "contrast": "contrast of the picture",
    "blur": "sharpness measure of the picture",
    "entropy": "entropy of the picture’s grey levels",
    "colourfulness": "colourfulness of the picture",
}
_WHOLE = {"width", "height", "min_side", "max_side", "pixels", "caption_words", "caption_chars"}


class Metadata(Measure):
    """A number by its name: see `columns.BUILTINS`, or a numeric column of the source."""

    kind = "metadata"
    about = "A number of the row: min_side, aspect_ratio, caption_words, or a source column."

    model_config = written_as(lambda own: TEXT)

    name: str

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": text("metadata", 200)(value)}

    def plain(self) -> Any:
        return self.name

    def written(self) -> Any:
        return self.name

    @property
    def numbers(self) -> tuple[str, ...]:
        return (self.number(self.name),)

    def check_columns(self, schema: pa.Schema) -> None:
        check_metadata(self.number(self.name), schema)

    def answer(self, thresholds: Sequence[float], files: Attachments) -> Answer:
        return numbers_answer(lambda table: metadata_values(self.number(self.name), table), thresholds)

    @classmethod
    def number(cls, name: str) -> str:
        """The number that is compared."""
        return name

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        number = cls.number(spec)
        return ["A number of the image: ", Written(_MEANINGS.get(number, f"the column {number}")), "."]

    @classmethod
    def measured(cls, spec: Any) -> Words:
        return [cls.number(spec)]

    @classmethod
    def is_whole(cls, spec: Any) -> bool:
        return spec in _WHOLE

    @classmethod
    def reach(cls, threshold: float) -> float:
        return 0.0
