"""Sniffing, guarding and decoding: broken images fail with the right class, tricky ones look as a person sees them."""

from __future__ import annotations

import contextlib
import io
import struct
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

from clipfilter.errors import DECODE_ERROR, IMAGE_TOO_LARGE, UNSUPPORTED, RowError
from clipfilter.images.decode import Mode, decode, jpeg_scale
from clipfilter.images.header import read_header
from clipfilter.images.sniff import sniff
from tests.support.images import Tricky, broken_images, encode, png_chunk, png_with, quadrants, scene, tricky_images

PHOTOS = Path(__file__).parents[2] / "samples" / "photos"
BROKEN = broken_images()
TRICKY = tricky_images()
MODES = ("fast", "exact")
#: Our name of a format -> Pillow's.
FORMATS = {name: name for name in ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "ico", "tga", "jpeg2000")}
FORMATS["pnm"] = "ppm"


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
    ("data", "words", "error"),
    [
        (b"", "0 bytes", DECODE_ERROR),
        (b"<html><body>no</body></html>", "HTML page", DECODE_ERROR),
        (b"\xef\xbb\xbf  <!DOCTYPE HTML>", "HTML page", DECODE_ERROR),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG", UNSUPPORTED),
        (b"%PDF-1.7 ...", "PDF", UNSUPPORTED),
        (b"8BPS\0\1", "Photoshop", UNSUPPORTED),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL", UNSUPPORTED),
        (b"\0\0\2\0\1\0", "cursor", UNSUPPORTED),
        (b"P7\nWIDTH 2\n", "PAM", UNSUPPORTED),
        (b"RIFF\0\0\0\0AVI LIST", "AVI", UNSUPPORTED),
        (b"PK\x03\x04....", "ZIP", DECODE_ERROR),
        (b"version https://git-lfs.github.com/spec/v1", "Git LFS", DECODE_ERROR),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", r"clipfilter\[heic\]", UNSUPPORTED),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "video", UNSUPPORTED),
        ("P5 ist ein Bild: größer als erlaubt".encode(), "text file", DECODE_ERROR),
    ],
)
def test_what_is_not_read_is_named(data: bytes, words: str, error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys.modules["clipfilter.images.sniff"], "has_heic", lambda: False
    )  # its name is a function's too
    with pytest.raises(RowError, match=words) as caught:
        sniff(data)
    assert caught.value.error_class == error
    assert "damaged" not in caught.value.message


def test_formats_are_told_from_bytes_not_names() -> None:
    for format, pillow in FORMATS.items():
        data = encode(scene(), pillow)
        assert sniff(data) == format
        assert decode(memoryview(data), mode="exact").format == format
        header = read_header(data)
        assert (header.width, header.height) == (96, 64)


@pytest.mark.parametrize("format", FORMATS.values())
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


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "TIFF", "AVIF", "BMP", "ICO", "TGA", "PPM", "JPEG2000"])
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


def _scans(width: int, height: int, count: int) -> bytes:
    """A baseline JPEG of three components with `count` scans of one component each, all empty: a few bytes a scan."""
    data = encode(Image.new("RGB", (16, 16), (90, 120, 30)), "JPEG", subsampling=0)
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    head = data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 : scan]
    one = b"".join(b"\xff\xda\0\x08\1%c\0\0\x3f\0\0" % component for component in (1, 2, 3))
    return head + one * -(-count // 3) + b"\xff\xd9"


def test_a_jpeg_of_thousands_of_scans_is_refused() -> None:
    data = encode(scene(), "JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    for hostile in (data[:scan] + data[scan:-2] * 300 + b"\xff\xd9", _scans(4000, 4000, 60_000), _scans(16, 16, 600)):
        with pytest.raises(RowError, match="scans") as caught:
            read_header(hostile)
        assert caught.value.error_class == DECODE_ERROR
    assert read_header(_scans(16, 16, 450)).width == 16
    with pytest.raises(RowError, match="more than 64 scans"):
        read_header(_scans(13_000, 13_000, 70))
    # What stands behind the picture is none of it: the second picture of an MPO, a film.
    assert decode(encode(scene(), "JPEG") + b"\xff\xda\0\x02" * 1000).width == 96


def _tiff(entries: list[tuple[int, int, int, int]], big: bool = False) -> bytes:
    """A little-endian TIFF with a directory of (tag, type, count, value) and ten kilobytes behind it."""
    if big:
        table = b"".join(struct.pack("<HHQQ", *entry) for entry in entries)
        return b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, len(entries)) + table + bytes(10_000)
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(10_000)


SIZE = [(0x100, 4, 1, 8), (0x101, 4, 1, 8)]
HOSTILE = {
    "directory_beyond_everything.tiff": b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(100),
    "many_entries.tiff": b"II+\0\x08\0\0\0" + struct.pack("<QQ", 16, 1 << 63) + bytes(100),
    "shared_values.tiff": _tiff([*SIZE, *((0x8000 + tag, 7, 9000, 100) for tag in range(3000))]),
    "many_strips.tiff": _tiff([*SIZE, (0x111, 4, 1_000_000, 100)]),
    "many_tiles.tiff": _tiff([*SIZE, (0x142, 4, 1, 16), (0x143, 4, 1, 16), (0x144, 16, 1 << 40, 100)], big=True),
    "many_icons.ico": b"\0\0\1\0\xff\xff" + struct.pack("<BBBBHHII", 9, 9, 0, 0, 1, 32, 1 << 31, 1 << 31) * 65_535,
    "many_extensions.gif": b"GIF89a\1\0\1\0\0\0\0" + b"!\xfe\1x\0" * 30_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_work_is_bounded_by_the_header(name: str) -> None:
    with pytest.raises(RowError) as caught:
        decode(HOSTILE[name])
    assert caught.value.error_class == DECODE_ERROR


def test_a_tile_larger_than_its_picture_is_refused() -> None:
    with pytest.raises(RowError, match="tiles") as caught:
        decode(_tiff([*SIZE, (0x142, 4, 1, 60_000), (0x143, 4, 1, 60_000)]))
    assert caught.value.error_class == IMAGE_TOO_LARGE


def test_a_jpeg2000_of_millions_of_packets_is_refused() -> None:
    data = encode(scene(), "JPEG2000", no_jp2=True, precinct_size=(64, 64))
    style, layers = data.index(b"\xff\x52") + 4, data.index(b"\xff\x52") + 6
    assert decode(data).width == 96
    size = data[:8] + struct.pack(">II", 5000, 5000) + data[16:24] + struct.pack(">II", 5000, 5000) + data[32:]
    for hostile in (
        data[:layers] + b"\xff\xff" + data[layers + 2 : style + 10] + bytes(6) + data[style + 16 :],
        size[: style + 10] + bytes(6) + size[style + 16 :],
        size[:24] + struct.pack(">II", 1, 1) + size[32:],
    ):
        with pytest.raises(RowError) as caught:
            decode(hostile)
        assert caught.value.error_class == DECODE_ERROR


def test_comments_and_later_frames_of_a_gif_cost_nothing() -> None:
    """Pillow adds blocks of a comment to one another: without a guard this takes minutes."""
    data = encode(quadrants().quantize(8), "GIF")
    at = data.index(b",\0\0\0\0")
    comment = b"!\xfe" + (b"\xff" + b"x" * 255) * 60_000 + b"\0"
    assert np.array_equal(decode(data[:at] + comment + data[at:]).rgb, decode(data).rgb)
    assert np.array_equal(decode(data[:-1] + data[at:-1] * 9000 + b"\xff\xff").rgb, decode(data).rgb)


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
@given(st.sampled_from([name.upper() for name in FORMATS.values()]), st.randoms(use_true_random=False))
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
