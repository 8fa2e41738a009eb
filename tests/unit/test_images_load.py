"""Preprocessing against open_clip's own transform, the facts, the loading door, and fast against exact embeddings."""

from __future__ import annotations

import hashlib
import io
import os
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipfilter.errors import RowError
from clipfilter.images.decode import decode
from clipfilter.images.facts import image_facts
from clipfilter.images.load import OVERSAMPLING, load_image
from clipfilter.images.preprocess import PreprocessConfig, prepare, prepare_fast
from tests.support.images import encode, scene

PHOTOS = Path(__file__).parents[2] / "samples" / "photos"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Where Debian's wallpaper packages put photographs; CLIPFILTER_WALLPAPERS names a folder where some were extracted. KDE's, in
# /usr/share/wallpapers, are drawn in smooth gradients, of which the promise does not hold (nano's card says so: 0.9993).
WALLPAPERS = tuple(
    Path(folder) for folder in (os.environ.get("CLIPFILTER_WALLPAPERS"), "/usr/share/backgrounds") if folder
)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, 97, 224])
def test_prepare_is_open_clips_transform_to_the_bit(size: int, interpolation: str, resize_mode: str) -> None:
    from clipfilter.models._torch import torch_with_torchvision

    torch_with_torchvision()
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    cfg = PreprocessConfig(size, MEAN, STD, interpolation, resize_mode, fill_color=7)
    theirs = image_transform_v2(
        PreprocessCfg(
            size=size, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=resize_mode, fill_color=7
        ),
        is_train=False,
    )
    mean, std = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (MEAN, STD))
    for width, height in ((451, 300), (300, 451), (224, 224), (225, 224), (640, 97), (31, 57), (97, 98), (1001, 333)):
        rgb = np.asarray(scene(width, height, seed=width))
        expected = theirs(Image.fromarray(rgb))
        ours = torch.from_numpy(prepare(rgb, cfg)).float().div(255).sub(mean).div(std)
        assert torch.equal(ours, expected), (width, height)


@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_fast_resizing_stays_within_two_levels(interpolation: str, resize_mode: str) -> None:
    cfg = PreprocessConfig(96, MEAN, STD, interpolation, resize_mode)
    for width, height in ((451, 300), (300, 451), (96, 96), (640, 97), (31, 57), (700, 20)):
        rgb = np.asarray(scene(width, height, seed=width))
        exact, fast = prepare(rgb, cfg).astype(int), prepare_fast(rgb, cfg)
        assert fast.shape == exact.shape == (3, 96, 96)
        assert fast.flags.c_contiguous
        assert np.abs(exact - fast).max() <= 2
        assert np.abs(exact - fast).mean() < 0.02


def test_extreme_strips_cost_neither_memory_nor_an_error() -> None:
    cfg = PreprocessConfig(224, MEAN, STD)  # resizing a whole 65 000 x 1 strip would take 10 GB
    for shape in ((1, 65_000, 3), (65_000, 1, 3)):
        rgb = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
        assert prepare(rgb, cfg).shape == (3, 224, 224)
        assert np.array_equal(prepare(rgb, cfg), prepare_fast(rgb, cfg))
    narrow = np.asarray(scene(3000, 3))
    assert prepare(narrow, PreprocessConfig(224, MEAN, STD, resize_mode="longest")).shape == (3, 224, 224)


def test_config_round_trip_and_validation() -> None:
    cfg = PreprocessConfig(336, MEAN, STD, "bilinear", "squash", 3)
    assert PreprocessConfig.from_json(cfg.to_json()) == cfg
    assert PreprocessConfig(224, MEAN, STD, "random").interpolation == "bicubic"
    with pytest.raises(ValueError, match="interpolation"):
        PreprocessConfig(224, MEAN, STD, "nearest")
    with pytest.raises(ValueError, match="resize_mode"):
        PreprocessConfig(224, MEAN, STD, resize_mode="crop")


def test_load_image_gives_everything_the_engine_stores() -> None:
    cfg = PreprocessConfig(224, MEAN, STD)
    data = (PHOTOS / "rotated.jpg").read_bytes()
    loaded = load_image(memoryview(data), cfg)
    assert loaded.pixels.shape == (3, 224, 224)
    assert loaded.pixels.dtype == np.uint8
    assert loaded.height > loaded.width  # upright
    assert loaded.sha256 == hashlib.sha256(data).hexdigest()
    assert loaded.format == "jpeg"
    exact = load_image(data, cfg, "exact")
    assert np.array_equal(exact.pixels, prepare(decode(data, mode="exact").rgb, cfg))
    with pytest.raises(RowError):
        load_image(data[:5000], cfg)


def test_facts_are_what_they_say() -> None:
    flat = image_facts(np.full((300, 200, 3), 77, dtype=np.uint8))
    assert (flat.brightness, flat.contrast, flat.blur, flat.entropy) == (77, 0, 0, 0)
    halves = np.zeros((100, 100, 3), dtype=np.uint8)
    halves[:, 50:] = 255
    facts = image_facts(halves)
    assert facts.brightness == pytest.approx(127.5)
    assert facts.contrast == pytest.approx(127.5)
    assert facts.entropy == pytest.approx(1.0)
    assert image_facts(np.zeros((1, 1, 3), dtype=np.uint8)).blur == 0

    def of(name: str) -> float:
        return image_facts(decode((PHOTOS / name).read_bytes()).rgb).blur

    assert of("blurred.jpg") < 0.05 * of("farm_sheep.jpg")
    assert image_facts(decode((PHOTOS / "dark.jpg").read_bytes()).rgb).brightness < 15


def test_facts_hardly_depend_on_the_decode_mode() -> None:
    cfg = PreprocessConfig(64, MEAN, STD)  # small, so that fast decoding scales even the samples
    for name in ("coffee.jpg", "bee.jpg", "colosseum.jpg", "camera.jpg", "hedgehog.jpg"):
        data = (PHOTOS / name).read_bytes()
        fast, exact = load_image(data, cfg, "fast").facts, load_image(data, cfg, "exact").facts
        assert fast.brightness == pytest.approx(exact.brightness, abs=0.5)
        assert fast.contrast == pytest.approx(exact.contrast, rel=0.02)
        assert fast.entropy == pytest.approx(exact.entropy, abs=0.05)
        assert fast.blur == pytest.approx(exact.blur, rel=0.1)
        assert (fast.phash ^ exact.phash).bit_count() <= 2


def _reference_phash(image: Image.Image) -> int:
    """ImageHash's `phash`, spelled out: Lanczos to 32 x 32, DCT-II, low 8 x 8 against their median."""
    pixels = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    frequency, sample = np.arange(32)[:, None], np.arange(32)[None, :]
    transform = np.cos(np.pi * frequency * (2 * sample + 1) / 64)
    low = (transform @ pixels @ transform.T)[:8, :8]
    return int("".join("1" if bit else "0" for bit in (low > np.median(low)).ravel()), 2)


def test_phash_is_comparable_with_imagehash_and_finds_near_duplicates() -> None:
    hashes = {}
    for path in sorted(PHOTOS.glob("*.jpg")):
        try:
            rgb = decode(path.read_bytes()).rgb
        except RowError:
            continue
        hashes[path.name] = image_facts(rgb).phash
        assert (hashes[path.name] ^ _reference_phash(Image.fromarray(rgb))).bit_count() <= 4, path.name
    for one, other in (("astronaut.jpg", "astronaut_copy.jpg"), ("coffee.jpg", "coffee_small.jpg")):
        assert (hashes[one] ^ hashes[other]).bit_count() <= 4
    assert (hashes["coffee.jpg"] ^ hashes["bee.jpg"]).bit_count() > 16


# --- fast against exact, with trained weights -----------------------------------------------------------------------


def _mosaic(width: int, height: int, seed: int) -> bytes:
    """A large JPEG of many real photographs, each at its own resolution, so that its detail is real."""
    rng = random.Random(seed)
    names = sorted(
        path for path in PHOTOS.glob("*.jpg") if path.name not in ("truncated.jpg", "not_found.jpg", "cmyk.jpg")
    )
    canvas = Image.new("RGB", (width, height))
    top = 0
    while top < height:
        left, row = 0, 400
        while left < width:
            with Image.open(rng.choice(names)) as photo:
                tile = photo.convert("RGB")
            canvas.paste(tile, (left, top))
            left, row = left + tile.width, min(row, tile.height)
        top += row
    return encode(canvas, "JPEG", quality=88)


def _cosines(encoder: object, images: list[bytes]) -> list[float]:
    cfg: PreprocessConfig = encoder.preprocess  # type: ignore[attr-defined]
    pixels = [load_image(data, cfg, mode).pixels for data in images for mode in ("exact", "fast")]
    embeddings = encoder.encode_images(np.stack(pixels))  # type: ignore[attr-defined]
    return [float(value) for value in (embeddings[0::2] * embeddings[1::2]).sum(axis=1)]


@pytest.fixture(scope="module")
def nano() -> object:
    from clipfilter import models

    return models.load_encoder("nano", threads=1)


def test_fast_embeddings_agree_with_exact_on_large_photographs(nano: object) -> None:
    sizes = [(1280, 960), (1600, 1200), (2300, 1700), (3200, 2880), (4000, 3200), (4800, 3600), (2881, 5200)]
    images = [_mosaic(width, height, seed) for seed, (width, height) in enumerate(sizes)]
    min_side = int(nano.preprocess.size * OVERSAMPLING)  # type: ignore[attr-defined]
    scaled = [decode(data, mode="fast", min_side=min_side).rgb.shape[1] for data in images]
    assert sum(width < size[0] for width, size in zip(scaled, sizes, strict=True)) >= 4, (
        "scaled decoding was not exercised"
    )
    cosines = _cosines(nano, images)
    assert min(cosines) >= 0.9995, cosines


def test_fast_embeddings_agree_with_exact_on_installed_wallpapers(nano: object) -> None:
    """Photographs of 1 to 4 and over 12 megapixels from Debian's wallpaper packages, where any is installed."""
    found = [path for root in WALLPAPERS for path in sorted(root.rglob("*.jp*g")) if path.is_file()]
    images: list[bytes] = []
    for path in found[:60]:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            megapixels = image.width * image.height / 1e6
        if (1 <= megapixels <= 4 or megapixels > 12) and len(images) < 8:
            images.append(data)
    if not images:
        pytest.skip("no JPEG photographs of 1-4 or over 12 megapixels in Debian's wallpaper folders")
    assert min(_cosines(nano, images)) >= 0.9995
