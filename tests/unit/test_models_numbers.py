"""An embedding belongs to its image or text alone: batch size and neighbours move it within the documented bounds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers (extra hf) is not installed")

from tests.support.models import (  # isort: skip  (torchvision must be made importable first)
    clip_folder,
    lively,
    pictures,
    quietly_created,
    register,
    save,
    siglip_tokenizer_files,
    tiny_config,
    tiny_siglip_config,
    write_files,
)

from clipfilter.images.preprocess import prepare
from clipfilter.models import Encoder, load_encoder

#: dtype -> (largest 1 - cosine, largest difference of one number) between two batches, as docs/reference/models.md says.
BOUNDS = {"fp32": (1e-6, 1e-5), "bf16": (1e-3, 0.03), "fp16": (1e-5, 4e-3)}
#: dtype -> largest 1 - cosine to the same model in fp32.
TO_FP32 = {"bf16": 1e-2, "fp16": 1e-4}
pytestmark = pytest.mark.fresh
CAPTIONS = [
    "a dog",
    "a much longer sentence about a man who rides a bicycle through the rain " * 3,
    "x",
    "😀",
    "日本語",
    "",
]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A two-layer CLIP, a SigLIP and a transformers CLIP by what load_encoder takes."""
    folder = tmp_path_factory.mktemp("numbers")
    found = {"transformers": f"hf:{folder / 'hf'}"}
    clip_folder(folder / "hf")
    write_files(siglip_tokenizer_files(), folder)
    for kind, config in (("clip", tiny_config()), ("siglip", tiny_siglip_config())):
        architecture = register(f"clipfilter-test-numbers-{kind}", config, folder)
        path = save(dict(lively(quietly_created(architecture)).state_dict()), folder / f"{kind}.safetensors")
        found[kind] = f"{architecture}={path}"
    return found


def distance(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(largest 1 - cosine, largest absolute difference) of two sets of unit vectors, computed in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float((1 - cosines).max()), float(np.abs(a - b).max())


def in_batches(encoder: Encoder, pixels: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([encoder.encode_images(pixels[i : i + size]) for i in range(0, len(pixels), size)])


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", ["clip", "siglip", "transformers"])
def test_embeddings_do_not_depend_on_the_batch(kind: str, dtype: Any, names: dict[str, str]) -> None:
    encoder, full = load_encoder(names[kind], dtype=dtype), load_encoder(names[kind])
    pixels = np.stack([prepare(picture, encoder.preprocess) for picture in pictures()[:24]])
    together = encoder.encode_images(pixels)
    for size in (1, 5):
        found = distance(together, in_batches(encoder, pixels, size))
        assert found[0] <= BOUNDS[dtype][0], f"batches of {size} move embeddings by {found}"
        assert found[1] <= BOUNDS[dtype][1]
    beside = np.concatenate([encoder.encode_images(np.stack([row, 255 - row]))[:1] for row in pixels])
    texts, alone = encoder.encode_texts(CAPTIONS), np.concatenate([encoder.encode_texts([text]) for text in CAPTIONS])
    for found in (distance(together, beside), distance(texts, alone)):
        assert found[0] <= BOUNDS[dtype][0]
        assert found[1] <= BOUNDS[dtype][1]
    if dtype != "fp32":
        assert distance(together, full.encode_images(pixels))[0] <= TO_FP32[dtype]
        assert distance(texts, full.encode_texts(CAPTIONS))[0] <= TO_FP32[dtype]
    # Different pictures are much farther apart than that, or the bounds would prove nothing.
    assert distance(together[:-1], together[1:])[0] > 10 * BOUNDS[dtype][0]


def test_the_documented_bounds_are_the_tested_ones() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/models.md").read_text(encoding="utf-8")
    rows = {cells[0].strip("` "): [cell.strip() for cell in cells[1:]] for cells in table_rows(page)}
    for dtype, (cosine, number) in BOUNDS.items():
        assert float(rows[dtype][0]) == cosine
        assert float(rows[dtype][1]) == number
    for dtype, cosine in TO_FP32.items():
        assert float(rows[dtype][2]) == cosine


def table_rows(page: str) -> list[list[str]]:
    return [line.strip("|").split("|") for line in page.splitlines() if re.match(r"\| `(fp32|bf16|fp16)` \|", line)]
