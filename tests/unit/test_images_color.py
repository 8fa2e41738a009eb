"""Colour profiles: ignored or applied after resizing, by littlecms; damaged ones cost nothing but a count."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from clipfilter.engine import JobRequest, run_job
from clipfilter.images import LoadedImage, PreprocessConfig, load_image
from clipfilter.images.color import to_srgb
from clipfilter.runs import Run
from tests.support.images import encode, png_chunk, png_with, scene
from tests.support.profiles import SPACES, converted, gray_profile, profile

PHOTOS = Path(__file__).parents[2] / "samples" / "photos"
CFG = PreprocessConfig(224, (0.5,) * 3, (0.5,) * 3)


def load(data: bytes, color: str) -> LoadedImage:
    return load_image(data, CFG, "fast", color=color)  # type: ignore[arg-type]


def difference(one: LoadedImage, other: LoadedImage) -> float:
    return float(np.abs(one.pixels.astype(int) - other.pixels).mean())


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    with Image.open(PHOTOS / "coffee.jpg") as image:
        return image.convert("RGB").resize((400, 300))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("space", ["Adobe RGB", "Display P3", "ProPhoto"])
def test_managed_shows_what_was_meant(format: str, space: str, photo: Image.Image) -> None:
    options = {"PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}.get(format, {"quality": 97, "subsampling": "4:4:4"})
    icc = profile(space)
    meant = load(encode(photo, format, **options), "ignore")
    data = encode(converted(photo, icc), format, icc_profile=icc, **options)
    managed, ignored = load(data, "managed"), load(data, "ignore")
    assert difference(managed, meant) < 2.5
    assert difference(ignored, meant) > 3 * difference(managed, meant)
    assert abs(managed.facts.colourfulness - meant.facts.colourfulness) < 2
    assert abs(ignored.facts.colourfulness - meant.facts.colourfulness) > 2
    assert not managed.profile_ignored


def test_converting_after_resizing_is_converting_before(photo: Image.Image) -> None:
    icc = profile("Adobe RGB")
    stored = converted(photo, icc)
    before = ImageCms.profileToProfile(
        stored, ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB"), renderingIntent=1
    )
    assert before is not None
    after = load(encode(stored, "PNG", icc_profile=icc), "managed")
    assert difference(after, load(encode(before, "PNG"), "ignore")) < 0.5


def test_srgb_under_any_name_changes_no_bit(photo: Image.Image) -> None:
    lcms = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (profile("sRGB"), lcms):
        data = encode(photo, "JPEG", icc_profile=icc)
        assert np.array_equal(load(data, "managed").pixels, load(data, "ignore").pixels)


def test_gray_profiles_are_applied_to_gray_only(photo: Image.Image) -> None:
    icc = gray_profile(1.0)
    gray = photo.convert("L")
    managed = load(encode(gray, "JPEG", icc_profile=icc), "managed")
    assert managed.facts.brightness > load(encode(gray, "JPEG"), "ignore").facts.brightness + 20
    assert load(encode(photo, "JPEG", icc_profile=icc), "managed").profile_ignored


@pytest.mark.parametrize("size", [(40, 30), (600, 900), (3000, 4)])
def test_small_and_extreme_pictures_are_measured_as_they_are_shown(size: tuple[int, int]) -> None:
    icc = profile("ProPhoto")
    picture = scene(*size)
    managed = load(encode(converted(picture, icc), "PNG", icc_profile=icc), "managed")
    meant = load(encode(picture, "PNG"), "managed")
    assert managed.facts.brightness == pytest.approx(meant.facts.brightness, abs=2)
    assert (managed.width, managed.height) == size


def test_unusable_profiles_are_ignored_and_counted(photo: Image.Image) -> None:
    plain = encode(photo, "JPEG", quality=95)
    cmyk_space = profile("Adobe RGB").replace(b"RGB ", b"CMYK", 1)
    for icc in (b"no profile" * 20, profile("Adobe RGB")[:300], cmyk_space):
        found = load(encode(photo, "JPEG", quality=95, icc_profile=icc), "managed")
        assert found.profile_ignored
        assert np.array_equal(found.pixels, load(plain, "managed").pixels)
        assert not load(encode(photo, "JPEG", quality=95, icc_profile=icc), "ignore").profile_ignored
    broken = png_with(photo, png_chunk(b"iCCP", b"name\0\0not zlib"))
    assert load(broken, "managed").profile_ignored
    assert not load(plain, "managed").profile_ignored


def test_any_bytes_are_a_profile_or_none() -> None:
    """Profiles with damaged places: the transform may be another, but there is always an answer."""
    planes = np.asarray(scene(16, 16)).transpose(2, 0, 1)
    rng = np.random.default_rng(0)
    for name in SPACES:
        for _ in range(60):
            icc = bytearray(profile(name))
            for at in rng.integers(0, len(icc), 4):
                icc[at] = rng.integers(256)
            found = to_srgb(planes, bytes(icc))
            assert found is None or found.shape == planes.shape


def test_a_run_says_what_it_did_with_profiles(photo: Image.Image, tmp_path: Path) -> None:
    icc = profile("Display P3")
    (tmp_path / "in").mkdir()
    for name, options in {
        "plain": {},
        "p3": {"icc_profile": icc},
        "broken": {"icc_profile": b"no profile" * 20},
    }.items():
        (tmp_path / "in" / f"{name}.jpg").write_bytes(encode(photo, "JPEG", quality=95, **options))
    request = {"source": str(tmp_path / "in"), "captions": "none", "engine": "local"}
    ignoring = run_job(JobRequest("embed", out=str(tmp_path / "ignoring"), **request))  # type: ignore[arg-type]
    managing = run_job(JobRequest("embed", out=str(tmp_path / "managing"), color="managed", **request))  # type: ignore[arg-type]
    assert "color" not in ignoring.plan.options
    assert managing.plan.options["color"] == "managed"
    assert "profiles_ignored" not in ignoring.totals
    assert managing.totals.profiles_ignored == 1
    assert [said for said in managing.messages if "1 images have a colour profile" in said]
    colours = []
    for out in (ignoring.out, managing.out):
        (shard,) = Run(out).shards()
        colours.append(
            dict(zip(shard.rows["cf_key"].to_pylist(), shard.embeddings["cf_colourfulness"].to_pylist(), strict=True))
        )
    assert colours[0]["plain.jpg"] == colours[1]["plain.jpg"] == colours[1]["broken.jpg"]
    assert colours[0]["p3.jpg"] < colours[1]["p3.jpg"]
