"""Images per second and core from encoded bytes to model input, and how close fast decoding stays to exact.

    python benchmarks/decode.py                       # speed, one thread
    python benchmarks/decode.py --cosines FOLDER      # embedding cosines on large JPEG photographs found under FOLDER

The speed pictures are mosaics of the sample photographs (large ones) and single samples (small ones). Beside ours:
Pillow with open_clip's own transform (what clip-retrieval and most loaders do), and the same with Pillow's draft mode.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from clipfilter.images.decode import decode
from clipfilter.images.facts import image_facts
from clipfilter.images.load import OVERSAMPLING, load_image
from clipfilter.images.preprocess import PreprocessConfig, crop, prepare, prepare_fast, resized

PHOTOS = Path(__file__).parents[1] / "samples" / "photos"
BROKEN = ("truncated.jpg", "not_found.jpg", "cmyk.jpg")
CLIP = PreprocessConfig(
    224, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), "bicubic", "shortest"
)
SIZES = {"470x390": (470, 390), "224x224": (224, 224), "2 megapixels": (1632, 1224), "12 megapixels": (4000, 3000)}


def mosaic(width: int, height: int, seed: int) -> bytes:
    """A JPEG (quality 85) of real photographs side by side, none of them enlarged."""
    rng = random.Random(seed)
    paths = sorted(path for path in PHOTOS.glob("*.jpg") if path.name not in BROKEN)
    canvas = Image.new("RGB", (width, height))
    top = 0
    while top < height:
        left, row = 0, height
        while left < width:
            with Image.open(rng.choice(paths)) as photo:
                tile = photo.convert("RGB")
            canvas.paste(tile, (left, top))
            left, row = left + tile.width, min(row, tile.height)
        top += row
    return jpeg(canvas)


def jpeg(image: Image.Image, quality: int = 85) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def pictures(size: tuple[int, int], count: int) -> list[bytes]:
    if max(size) > 500:
        return [mosaic(*size, seed) for seed in range(count)]
    paths = sorted(path for path in PHOTOS.glob("*.jpg") if path.name not in BROKEN)
    made = []
    for path in paths[:count]:
        with Image.open(path) as image:
            made.append(jpeg(image.convert("RGB").resize(size, Image.Resampling.LANCZOS)))
    return made


def pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return prepare(np.asarray(image.convert("RGB")), CLIP)


def pillow_draft(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (CLIP.size, CLIP.size))
        return prepare(np.asarray(image.convert("RGB")), CLIP)


def seconds_each(function: Callable[[bytes], object], items: list[bytes], seconds: float) -> float:
    """Median CPU seconds of one call (everything runs on this thread), so that a busy machine disturbs it less."""
    function(items[0])
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < len(items):
        for item in items:
            start = time.thread_time()
            function(item)
            times.append(time.thread_time() - start)
    return statistics.median(times)


def speed(seconds: float) -> dict[str, dict[str, float]]:
    min_side = int(CLIP.size * OVERSAMPLING)
    contenders: dict[str, Callable[[bytes], object]] = {
        "load_image fast (hash and facts too)": lambda data: load_image(data, CLIP, "fast"),
        "decode + prepare, fast": lambda data: prepare_fast(decode(data, min_side=min_side).rgb, CLIP),
        "load_image exact (hash and facts too)": lambda data: load_image(data, CLIP, "exact"),
        "Pillow + open_clip's transform": pillow,
        "Pillow draft + open_clip's transform": pillow_draft,
    }
    results: dict[str, dict[str, float]] = {}
    for label, size in SIZES.items():
        items = pictures(size, 4 if max(size) > 500 else 24)
        print(f"\n{label} ({sum(map(len, items)) // len(items) // 1024} kB each)")
        results[label] = {}
        for name, function in contenders.items():
            each = seconds_each(function, items, seconds)
            results[label][name] = round(1 / each, 1)
            print(f"  {1 / each:8.0f} images/s per core   {each * 1e3:7.2f} ms   {name}")
        rgb = [decode(data, min_side=min_side).rgb for data in items]
        planes = [resized(array, CLIP, exact=False) for array in rgb]
        parts = {
            "decode": seconds_each(lambda data: decode(data, min_side=min_side), items, seconds / 3),
            "resize": seconds_each(lambda array: resized(array, CLIP, exact=False), rgb, seconds / 3),  # type: ignore[arg-type]
            "crop": seconds_each(lambda array: crop(array, CLIP), planes, seconds / 3),  # type: ignore[arg-type]
            "facts": seconds_each(lambda array: image_facts(array.transpose(1, 2, 0)), planes, seconds / 3),  # type: ignore[arg-type,attr-defined]
            "sha256": seconds_each(lambda data: hashlib.sha256(data).hexdigest(), items, seconds / 3),
        }
        print("  of which, ms: " + ", ".join(f"{name} {each * 1e3:.3f}" for name, each in parts.items()))
    return results


def cosines(folder: Path, model: str) -> dict[str, dict[str, float]]:
    """Worst, 10th percentile and median cosine of fast to exact embeddings, by how far the JPEG was scaled."""
    from clipfilter.models import load_encoder

    encoder = load_encoder(model, threads=1)
    cfg = encoder.preprocess
    by_scale: dict[str, list[tuple[float, str]]] = {}
    for path in sorted(folder.rglob("*.jp*g")):
        with Image.open(path) as original:
            picture = original.convert("RGB")
        for shorter in (866, 1000, 1224, 1500, 1732, 2000, 2400, 3000, 3464, min(picture.size)):
            if min(picture.size) < shorter:
                continue
            factor = shorter / min(picture.size)
            size = (round(picture.width * factor), round(picture.height * factor))
            data = jpeg(picture.resize(size, Image.Resampling.LANCZOS), 88) if factor < 1 else path.read_bytes()
            pixels, names = (
                [load_image(data, cfg, "exact").pixels, load_image(data, cfg, "fast").pixels],
                ["as shipped"],
            )
            for divisor in (2, 4, 8):
                if shorter >= divisor * cfg.size:
                    pixels.append(prepare_fast(decode(data, min_side=shorter // divisor).rgb, cfg))
                    names.append(
                        f"1/{divisor}, {np.floor(shorter / divisor / cfg.size * 2) / 2:.1f} x the model's size or more"
                    )
            vectors = encoder.encode_images(np.stack(pixels))
            for name, vector in zip(names, vectors[1:], strict=True):
                by_scale.setdefault(name, []).append((float(vector @ vectors[0]), path.name))
    results: dict[str, dict[str, float]] = {}
    for name, found in sorted(by_scale.items()):
        values = np.array([value for value, _ in found])
        results[name] = {
            "images": len(values),
            "worst": round(float(values.min()), 5),
            "p10": round(float(np.quantile(values, 0.1)), 5),
            "median": round(float(np.median(values)), 5),
        }
        print(f"{name:42s} {results[name]}   worst: {min(found)[1]}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each measurement")
    parser.add_argument("--cosines", type=Path, help="measure agreement on the JPEGs under this folder instead")
    parser.add_argument("--model", default="nano")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    results = cosines(arguments.cosines, arguments.model) if arguments.cosines else speed(arguments.seconds)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
