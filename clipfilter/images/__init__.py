"""From encoded bytes to what a model and a rule need: pixels, display size, hashes and cheap facts."""

from __future__ import annotations

from clipfilter.images import apart
from clipfilter.images.decode import Mode, decode
from clipfilter.images.facts import ImageFacts
from clipfilter.images.guarded import DecodeSettings, Image, load_guarded
from clipfilter.images.header import read_header
from clipfilter.images.load import OVERSAMPLING, LoadedImage, load_image
from clipfilter.images.preprocess import PreprocessConfig, prepare_fast
from clipfilter.images.resize import resize
from clipfilter.images.sniff import sniff

__all__ = [
    "OVERSAMPLING",
    "DecodeSettings",
    "Image",
    "ImageFacts",
    "LoadedImage",
    "Mode",
    "PreprocessConfig",
    "apart",
    "decode",
    "load_guarded",
    "load_image",
    "prepare_fast",
    "read_header",
    "resize",
    "sniff",
]
