"""Pixel qualities: the number behind a word such as dark or blurry, with a threshold that fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import model_validator

from clipfilter.policies.kinds.metadata import Metadata
from clipfilter.policies.parts.bands import Band
from clipfilter.policies.parts.fields import fail, shown, suggest, written_as


@dataclass(frozen=True)
class Quality:
    """A pixel quality: the number it compares, on which side, where by default, and what that means."""

    metadata: str
    direction: Literal["above", "below"]
    threshold: float
    meaning: str


PIXELS = {
    "dark": Quality("brightness", "below", 25.0, "mean luma, 0 to 255"),
    "bright": Quality("brightness", "above", 235.0, "mean luma, 0 to 255"),
    "blurry": Quality("blur", "below", 10.0, "variance of the Laplacian"),
    "low_information": Quality("entropy", "below", 3.0, "entropy of the luma histogram in bits, 0 to 8"),
    "odd_aspect": Quality("aspect_ratio", "above", 3.0, "longer side by shorter side"),
    "grayscale": Quality("colourfulness", "below", 2.0, "colourfulness, 0 without any colour"),
}


class Pixels(Metadata):
    """One of the qualities by its name."""

    kind = "pixels"
    about = "A quality such as dark or blurry; without bands it rejects from its documented threshold on."

    model_config = written_as(lambda own: {"enum": list(PIXELS)})

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if value not in PIXELS:
            fail(f"{shown(value)} is no pixel quality (there are {', '.join(PIXELS)})" + suggest(value, PIXELS))
        return {"name": value}

    @classmethod
    def default_bands(cls, written: Any) -> dict[str, Any] | None:
        quality = PIXELS.get(written) if isinstance(written, str) else None
        return None if quality is None else {"reject": {quality.direction: quality.threshold}}

    @classmethod
    def number(cls, name: str) -> str:
        return PIXELS[name].metadata

    def check_band(self, band: Band, *at: str | int) -> None:
        direction = PIXELS[self.name].direction
        if band.direction != direction:
            fail(f"{self.name} lies {direction} its threshold, not {band.direction}", *at, band.direction, key=True)
