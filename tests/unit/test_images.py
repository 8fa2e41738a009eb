"""Sniffing, guarding and decoding: broken images fail with the right class, tricky ones look as a person sees them."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from clipfilter.errors import DECODE_ERROR, IMAGE_TOO_LARGE, RowError
from clipfilter.images.decode import Mode, decode, jpeg_scale
from clipfilter.images.header import read_header
from clipfilter.images.sniff import sniff
from tests.support.images import Tricky, broken_images, encode, png_chunk, png_with, quadrants, scene, tricky_images

PHOTOS = Path(__file__).parents[2] / "samples" / "photos"
BROKEN = broken_images()
TRICKY = tricky_images()
MODES = ("fast", "exact")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_images_fail_with_their_class(name: str, mode: Mode) -> None:
    data, expected = BROKEN[name]
    with pytest.raises(RowError) as caught:
        decode(data, mode=mode, min_side=16)
    assert caught.value.error_class == expected
    assert str(caught.value)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", TRICKY)
def test_tricky_images_look_as_a_person_sees_them(name: str, mode: Mode) -> None:
    tricky: Tricky = TRICKY[name]
    decoded = decode(tricky.data, mode=mode, min_side=16)
    assert (decoded.width, decoded.height) == tricky.size
    assert decoded.rgb.dtype == np.uint8
    assert decoded.rgb.flags.c_contiguous
    height, width = decoded.rgb.shape[:2]
    for (x, y), colour in tricky.pixels.items():
        shown = decoded.rgb[y * height // tricky.size[1], x * width // tricky.size[0]].astype(int)
        assert np.abs(shown - colour).max() <= tricky.tolerance + (3 if width != tricky.size[0] else 0), (x, y, shown)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (b"<html><body>no</body></html>", "HTML page"),
        (b"\xef\xbb\xbf  <!DOCTYPE HTML>", "HTML page"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%PDF-1.7 ...", "PDF"),
        (b"PK\x03\x04....", "ZIP"),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "video"),
        ("Bild fehlt: größer als erlaubt".encode(), "text file"),
    ],
)
def test_what_is_no_image_is_named(data: bytes, words: str) -> None:
    with pytest.raises(RowError, match=words):
        sniff(data)


def test_formats_are_told_from_bytes_not_names() -> None:
    for format in ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif"):
        data = encode(scene(), format)
        assert sniff(data) == format
        assert decode(memoryview(data), mode="exact").format == format
        header = read_header(data)
        assert (header.width, header.height) == (96, 64)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "gif", "bmp", "tiff", "avif"])
def test_pixel_limit_holds_for_every_format(format: str) -> None:
    data = encode(scene(), format)
    assert decode(data, max_pixels=96 * 64).width == 96
    with pytest.raises(RowError) as caught:
        decode(data, max_pixels=96 * 64 - 1)
    assert caught.value.error_class == IMAGE_TOO_LARGE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_an_error(mode: Mode, progressive: bool) -> None:
    with Image.open(PHOTOS / "coffee.jpg") as image:
        data = encode(image, "JPEG", quality=85, progressive=progressive)
    for cut in [1, 2, 3, 10, 100, *range(500, len(data), len(data) // 25)]:
        with pytest.raises(RowError) as caught:
            decode(data[:-cut], mode=mode, min_side=50)
        assert caught.value.error_class == DECODE_ERROR, cut


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "TIFF", "AVIF", "BMP"])
def test_other_formats_cut_anywhere_are_errors(format: str) -> None:
    picture = scene(160, 120)
    options = {"compression": "tiff_deflate"} if format == "TIFF" else {}
    data = encode(picture.quantize(64) if format == "GIF" else picture, format, **options)
    ends = [len(data) * part // 12 for part in range(12)]
    for end in ends:
        with pytest.raises(RowError) as caught:
            decode(data[:end])
        assert caught.value.error_class == DECODE_ERROR, end


def test_exact_jpeg_is_pillows_to_the_bit() -> None:
    for name in ("coffee.jpg", "bee.jpg", "camera.jpg"):
        data = (PHOTOS / name).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(decode(data, mode="exact").rgb, np.asarray(image.convert("RGB"))), name


def test_fast_mode_scales_and_keeps_the_display_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(quadrants(1000, 700), "JPEG", quality=90, exif=exif)
    decoded = decode(data, mode="fast", min_side=170)
    assert decoded.rgb.shape == (250, 175, 3)  # 1/4, upright
    assert (decoded.width, decoded.height) == (700, 1000)
    assert decode(data, mode="exact", min_side=170).rgb.shape == (1000, 700, 3)
    assert decode(data, mode="fast").rgb.shape == (1000, 700, 3)


def test_scaled_decoding_uses_simd_sizes_only() -> None:
    assert jpeg_scale(4000, 3000, None) == 1
    assert [jpeg_scale(4000, 3000, side) for side in (375, 376, 750, 751, 1500, 1501)] == [8, 4, 4, 2, 2, 1]


def test_embedded_cmyk_profile_is_used_and_a_damaged_one_ignored() -> None:
    picture = quadrants().convert("CMYK")
    plain = decode(encode(picture, "JPEG", quality=95)).rgb
    damaged = decode(encode(picture, "JPEG", quality=95, icc_profile=b"no profile" * 20)).rgb
    assert np.array_equal(plain, damaged)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()  # of the wrong colour space
    assert np.array_equal(plain, decode(encode(picture, "JPEG", quality=95, icc_profile=srgb)).rgb)


def test_png_orientation_after_the_data_counts() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(quadrants(), "PNG")
    block = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    late = data[:-12] + block + data[-12:]
    assert decode(late).rgb.shape == (64, 48, 3)
    assert decode(png_with(quadrants(), block)).rgb.shape == (64, 48, 3)


def test_a_progressive_jpeg_with_thousands_of_scans_is_refused() -> None:
    data = encode(scene(), "JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    with pytest.raises(RowError, match="scans"):
        decode(data[:scan] + data[scan:-2] * 300 + b"\xff\xd9")


def test_hostile_headers_stay_small_in_memory(tmp_path: Path) -> None:
    """In a process of its own, as only a peak can show an allocation that was freed again."""
    for name in ("text_bomb.png",):
        (tmp_path / name).write_bytes(TRICKY[name].data)
    for name, (data, error) in BROKEN.items():
        if error == IMAGE_TOO_LARGE:
            (tmp_path / name).write_bytes(data)
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from clipfilter.errors import RowError
        from clipfilter.images.decode import decode
        # Not ru_maxrss, which a process inherits from the one that started it.
        peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
        before = peak()
        for path in sorted(Path(sys.argv[1]).iterdir()):
            try:
                decode(path.read_bytes())
            except RowError:
                pass
        print(peak() - before)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert int(done.stdout) < 32_000  # kB; the text chunks alone inflate to 250 MB


def test_threads_get_the_same_pixels() -> None:
    items = [(name, tricky.data) for name, tricky in TRICKY.items() if name != "text_bomb.png"]
    expected = {name: decode(data).rgb.tobytes() for name, data in items}
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(lambda item: (item[0], decode(item[1]).rgb.tobytes()), items * 5)
        for name, pixels in results:
            assert pixels == expected[name], name


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"]), st.randoms(use_true_random=False))
def test_damaged_bytes_never_raise_anything_else(format: str, random: object) -> None:
    data = bytearray(encode(scene(48, 32), format))
    for _ in range(random.randint(1, 12)):  # type: ignore[attr-defined]
        data[random.randrange(len(data))] = random.randrange(256)  # type: ignore[attr-defined]
    with contextlib.suppress(RowError):  # and nothing else
        decoded = decode(bytes(data), max_pixels=1_000_000)
        assert decoded.rgb.shape == (decoded.height, decoded.width, 3)


def test_the_sample_pictures_do_what_their_readme_says() -> None:
    expected = {"truncated.jpg": DECODE_ERROR, "not_found.jpg": DECODE_ERROR, "huge.png": IMAGE_TOO_LARGE}
    for path in sorted(PHOTOS.iterdir()):
        if path.suffix == ".jsonl":
            continue
        if path.name in expected:
            with pytest.raises(RowError) as caught:
                decode(path.read_bytes())
            assert caught.value.error_class == expected[path.name]
        else:
            decode(path.read_bytes())
    parrot, cmyk = (decode((PHOTOS / name).read_bytes()).rgb.astype(int) for name in ("scarlet_macaw.jpg", "cmyk.jpg"))
    assert np.abs(parrot - cmyk).mean() < 6
    statue, rotated = (
        decode((PHOTOS / n).read_bytes()).rgb.astype(int) for n in ("statue_of_liberty.jpg", "rotated.jpg")
    )
    assert np.abs(statue - rotated).mean() < 6
