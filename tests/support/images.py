"""Encoded images for tests: broken ones with their error class, tricky ones with the colours they must show."""

from __future__ import annotations

import io
import struct
import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

from clipfilter.errors import DECODE_ERROR, IMAGE_TOO_LARGE, UNSUPPORTED

Colour = tuple[int, int, int]
WHITE, BLACK, RED, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 128, 0), (0, 0, 255)


class Tricky(NamedTuple):
    """data: encoded. size: (width, height) as displayed. pixels: (x, y) as displayed -> RGB, within `tolerance`."""

    data: bytes
    size: tuple[int, int]
    pixels: dict[tuple[int, int], Colour]
    tolerance: int = 0


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    if format.upper() == "ICO":
        options = {"sizes": [image.size]} | options  # else of sizes that icons have
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_with(image: Image.Image, *chunks: bytes) -> bytes:
    """A PNG of `image` with `chunks` right after its IHDR."""
    data = encode(image, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def scene(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A picture with real detail (smooth colour and noise), so that cut files lose something."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.linspace(0, 50, height)[:, None, None]
    noise = rng.integers(0, 50, (height, width, 3))
    return Image.fromarray((ramp * [1.0, 0.7, 0.4] + noise).clip(0, 255).astype(np.uint8))


def quadrants(width: int = 64, height: int = 48) -> Image.Image:
    """Red top left, green top right, blue bottom left, black bottom right."""
    image = Image.new("RGB", (width, height), BLACK)
    image.paste(RED, (0, 0, width // 2, height // 2))
    image.paste(GREEN, (width // 2, 0, width, height // 2))
    image.paste(BLUE, (0, height // 2, width // 2, height))
    return image


def broken_images() -> dict[str, tuple[bytes, str]]:
    """name -> (bytes, the error class of the failed row)."""
    picture = scene()
    jpeg, png = encode(picture, "JPEG", quality=90), encode(picture, "PNG")
    progressive = encode(picture, "JPEG", quality=90, progressive=True)
    webp, tiff = encode(picture, "WEBP", quality=80), encode(picture, "TIFF", compression="tiff_lzw")
    gif, bmp, avif = encode(picture.quantize(32), "GIF"), encode(picture, "BMP"), encode(picture, "AVIF")
    end = len(png) - 12  # IEND is the last 12 bytes
    idat = png.index(b"IDAT")
    huge_jpeg = bytearray(jpeg)
    frame = jpeg.index(b"\xff\xc0")
    huge_jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    huge_webp = bytearray(encode(scene(32, 32), "WEBP", lossless=True))
    huge_webp[21:25] = struct.pack("<I", 0x3FFF | 0x3FFF << 14)
    huge_tiff = encode(Image.new("1", (8, 8)), "TIFF")
    huge_tiff = _set_tiff_tag(_set_tiff_tag(huge_tiff, 0x0100, 60000), 0x0101, 60000)
    huge_avif = bytearray(avif)
    ispe, payload = avif.index(b"ispe"), avif.index(b"mdat") + 4
    huge_avif[ispe + 8 : ispe + 16] = struct.pack(">II", 50000, 50000)
    return {
        "zero_byte.jpg": (b"", DECODE_ERROR),
        "only_zeros.jpg": (bytes(4096), DECODE_ERROR),
        "html_as_jpg.jpg": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", DECODE_ERROR),
        "text.png": (b"This is not the picture you are looking for.\n" * 20, DECODE_ERROR),
        "json.webp": (b'{"error": "access denied"}', DECODE_ERROR),
        "unknown_bytes.jpg": (bytes(range(1, 256)) * 8, DECODE_ERROR),
        "bmw_text.bmp": (b"BMW is a car maker from Munich." * 9, DECODE_ERROR),
        "truncated.jpg": (jpeg[: len(jpeg) * 6 // 10], DECODE_ERROR),
        "truncated_progressive.jpg": (progressive[: len(progressive) * 6 // 10], DECODE_ERROR),
        "header_only.jpg": (jpeg[:40], DECODE_ERROR),
        "no_scan.jpg": (jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9", DECODE_ERROR),
        "truncated.png": (png[: len(png) // 2], DECODE_ERROR),
        "no_end.png": (png[:end], DECODE_ERROR),
        "bad_crc.png": (png[: end - 4] + b"\0\0\0\0" + png[end:], DECODE_ERROR),
        "corrupt_idat.png": (png[: idat + 40] + b"\xff" * 30 + png[idat + 70 :], DECODE_ERROR),
        "missing_rows.png": (_png(96, 64, zlib.compress(bytes(1000))), DECODE_ERROR),
        "zero_width.png": (_png(0, 64, zlib.compress(b"")), DECODE_ERROR),
        "truncated.webp": (webp[: len(webp) * 6 // 10], DECODE_ERROR),
        "garbage.webp": (webp[:20] + bytes(reversed(webp[20:])), DECODE_ERROR),
        "truncated.gif": (gif[: len(gif) // 2], DECODE_ERROR),
        "no_frames.gif": (gif[:13] + b"\0" * (3 << (gif[10] & 7) + 1) + b";", DECODE_ERROR),
        "truncated.bmp": (bmp[: len(bmp) // 2], DECODE_ERROR),
        "truncated.tiff": (tiff[: len(tiff) // 2], DECODE_ERROR),
        "garbage.avif": (avif[:payload] + b"\xff" * (len(avif) - payload), DECODE_ERROR),
        "truncated.avif": (avif[: len(avif) // 2], DECODE_ERROR),
        "bomb.png": (_png(50000, 50000, zlib.compress(bytes(1 << 20))), IMAGE_TOO_LARGE),
        "thin_bomb.png": (_png(1 << 30, 1, zlib.compress(bytes(100))), IMAGE_TOO_LARGE),
        "long_strip.png": (_png(70000, 1, zlib.compress(bytes(1 + 3 * 70000))), IMAGE_TOO_LARGE),
        "bomb.jpg": (bytes(huge_jpeg), IMAGE_TOO_LARGE),
        "bomb.gif": (gif[:6] + struct.pack("<HH", 65000, 65000) + gif[10:], IMAGE_TOO_LARGE),
        "bomb.bmp": (bmp[:18] + struct.pack("<ii", 60000, -60000) + bmp[26:], IMAGE_TOO_LARGE),
        "bomb.webp": (bytes(huge_webp), IMAGE_TOO_LARGE),
        "bomb.tiff": (huge_tiff, IMAGE_TOO_LARGE),
        "bomb.avif": (bytes(huge_avif), IMAGE_TOO_LARGE),
        **_broken_others(picture),
        **unsupported_images(jpeg, bmp, tiff),
    }


def _broken_others(picture: Image.Image) -> dict[str, tuple[bytes, str]]:
    """Formats that came later, cut or with sizes that nobody can hold."""
    ppm, tga, j2k = encode(picture, "PPM"), encode(picture, "TGA"), encode(picture, "JPEG2000")
    icon = encode(picture, "ICO", sizes=[(96, 64)], bitmap_format="bmp")
    siz, dib = j2k.index(b"\xff\x4f\xff\x51") + 8, 22
    runs = struct.pack("<IiiHHIIiiII", 40, 65_000, 2000, 1, 8, 1, 0, 0, 0, 0, 0) + bytes(1024) + b"\1\0\0\0" * 99
    return {
        "truncated.ppm": (ppm[: len(ppm) // 2], DECODE_ERROR),
        "short_words.ppm": (b"P3 10 10 255\n" + b"1 2 3 " * 99, DECODE_ERROR),
        "no_maximum.ppm": (b"P6 10 10 0\n" + bytes(300), DECODE_ERROR),
        "letters.pgm": (b"P2 10 10 255\n" + b"1 two " * 99, DECODE_ERROR),
        "truncated.tga": (tga[: len(tga) // 2], DECODE_ERROR),
        "truncated.jp2": (j2k[: len(j2k) // 8], DECODE_ERROR),
        "truncated.ico": (icon[: len(icon) // 2], DECODE_ERROR),
        "nothing.ico": (b"\0\0\1\0\2\0" + bytes(32), DECODE_ERROR),
        "bomb.ppm": (b"P6 60000 60000 255\n" + bytes(100), IMAGE_TOO_LARGE),
        "bomb.tga": (tga[:12] + struct.pack("<HH", 60_000, 60_000) + tga[16:], IMAGE_TOO_LARGE),
        "bomb.jp2": (j2k[:siz] + struct.pack(">II", 60_000, 60_000) + j2k[siz + 8 :], IMAGE_TOO_LARGE),
        "bomb.ico": (icon[: dib + 4] + struct.pack("<ii", 60_000, 60_000) + icon[dib + 12 :], IMAGE_TOO_LARGE),
        # Whose decoder takes a step of Python for each pixel.
        "runs.bmp": (b"BM" + struct.pack("<IHHI", 14 + len(runs), 0, 0, 1078) + runs, IMAGE_TOO_LARGE),
    }


def unsupported_images(jpeg: bytes, bmp: bytes, tiff: bytes) -> dict[str, tuple[bytes, str]]:
    """Pictures of formats that we read, in a kind that we do not."""
    frame = jpeg.index(b"\xff\xc0")
    return {
        "twelve_bits.jpg": (jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :], UNSUPPORTED),
        "lossless.jpg": (jpeg[: frame + 1] + b"\xc3" + jpeg[frame + 2 :], UNSUPPORTED),
        "two_components.jpg": (jpeg[: frame + 9] + b"\x02" + jpeg[frame + 10 :], UNSUPPORTED),
        "jpeg_inside.bmp": (bmp[:30] + b"\4" + bmp[31:], UNSUPPORTED),
        "compression.tiff": (_set_tiff_tag(tiff, 0x0103, 34_712), UNSUPPORTED),
    }


def tricky_images() -> dict[str, Tricky]:
    """name -> an image that a careless decoder shows wrongly."""
    images: dict[str, Tricky] = {}
    upright, corners = quadrants(), {(8, 6): RED, (56, 6): GREEN, (8, 42): BLUE, (56, 42): BLACK}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = _undo(upright, orientation)
        for format, options, tolerance in (
            ("JPEG", {"quality": 95, "subsampling": 0}, 6),
            ("PNG", {}, 0),
            ("WEBP", {"lossless": True}, 0),
            ("TIFF", {}, 0),
            ("AVIF", {"quality": 100, "subsampling": "4:4:4"}, 6),
        ):
            data = encode(stored, format, exif=exif, **options)
            images[f"exif{orientation}.{format.lower()}"] = Tricky(data, upright.size, corners, tolerance)

    half = {(8, 20): RED, (56, 20): WHITE}
    alpha = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    alpha.paste((255, 0, 0, 255), (0, 0, 32, 48))
    images["alpha.png"] = Tricky(encode(alpha, "PNG"), (64, 48), half)
    images["alpha.webp"] = Tricky(encode(alpha, "WEBP", lossless=True), (64, 48), half)
    images["alpha.tiff"] = Tricky(encode(alpha, "TIFF"), (64, 48), half)
    images["alpha.gif"] = Tricky(encode(alpha, "GIF"), (64, 48), half)
    images["half_alpha.png"] = Tricky(
        encode(Image.new("RGBA", (20, 20), (255, 0, 0, 128)), "PNG"), (20, 20), {(5, 5): (255, 127, 127)}, 1
    )
    images["palette_alpha.png"] = Tricky(encode(alpha.quantize(4), "PNG"), (64, 48), half)
    key = Image.new("RGB", (64, 48), (1, 2, 3))
    key.paste(RED, (0, 0, 32, 48))
    images["colour_key.png"] = Tricky(encode(key, "PNG", transparency=(1, 2, 3)), (64, 48), half)
    images["palette.png"] = Tricky(encode(upright.quantize(4), "PNG"), (64, 48), corners)
    images["palette.bmp"] = Tricky(encode(upright.quantize(4), "BMP"), (64, 48), corners)
    gray_alpha = Image.new("LA", (64, 48), (0, 0))
    gray_alpha.paste((100, 255), (0, 0, 32, 48))
    images["gray_alpha.png"] = Tricky(encode(gray_alpha, "PNG"), (64, 48), {(8, 8): (100,) * 3, (56, 8): WHITE})

    bits = Image.new("1", (64, 48), 1)
    bits.paste(0, (0, 0, 32, 48))
    two = {(8, 8): BLACK, (56, 8): WHITE}
    images["bits.png"] = Tricky(encode(bits, "PNG"), (64, 48), two)
    images["bits.tiff"] = Tricky(encode(bits, "TIFF", compression="group4"), (64, 48), two)

    deep = np.zeros((48, 64), dtype=np.uint16)
    deep[:, 32:] = 200 * 256 + 77
    two = {(8, 8): BLACK, (56, 8): (200,) * 3}
    images["gray16.png"] = Tricky(encode(Image.fromarray(deep), "PNG"), (64, 48), two)
    images["gray16.tiff"] = Tricky(encode(Image.fromarray(deep), "TIFF"), (64, 48), two)
    key16 = png_chunk(b"tRNS", struct.pack(">H", 200 * 256 + 77))
    images["gray16_key.png"] = Tricky(
        _png_with_before_data(encode(Image.fromarray(deep), "PNG"), key16), (64, 48), {(8, 8): BLACK, (56, 8): WHITE}
    )
    images["rgb16.png"] = Tricky(_rgb16_png(), (64, 48), {(8, 8): (255, 0, 16), (56, 8): (0, 128, 255)})
    images["int32.tiff"] = Tricky(encode(Image.fromarray(deep.astype(np.int32)), "TIFF"), (64, 48), two, 1)
    images["float.tiff"] = Tricky(
        encode(Image.fromarray((deep > 0).astype(np.float32)), "TIFF"), (64, 48), {(8, 8): BLACK, (56, 8): WHITE}
    )

    cmyk = {(8, 6): RED, (56, 6): GREEN, (8, 42): BLUE, (56, 42): BLACK}
    images["cmyk.jpg"] = Tricky(encode(upright.convert("CMYK"), "JPEG", quality=95), (64, 48), cmyk, 12)
    images["cmyk.tiff"] = Tricky(encode(upright.convert("CMYK"), "TIFF"), (64, 48), cmyk, 2)
    images["ycck.jpg"] = Tricky(_ycck_jpeg(upright), (64, 48), cmyk, 12)
    images["gray.jpg"] = Tricky(
        encode(Image.new("L", (40, 30), 90), "JPEG", quality=95), (40, 30), {(20, 15): (90, 90, 90)}, 1
    )
    images["rgb.jpg"] = Tricky(encode(upright, "JPEG", quality=95, keep_rgb=True), (64, 48), corners, 6)
    images["progressive.jpg"] = Tricky(
        encode(upright, "JPEG", quality=95, subsampling=0, progressive=True), (64, 48), corners, 6
    )
    images["trailing_bytes.jpg"] = Tricky(
        encode(upright, "JPEG", quality=95, subsampling=0) + b"\0" * 5000, (64, 48), corners, 6
    )
    jpeg = encode(upright, "JPEG", quality=95, subsampling=0)
    scan = jpeg.index(b"\xff\xda")
    stray = jpeg[:scan] + b"\x00\x00\x00" + jpeg[scan:]  # a warning of libjpeg, not an error
    images["stray_bytes.jpg"] = Tricky(stray, (64, 48), corners, 6)

    frames = [upright, Image.new("RGB", (64, 48), WHITE), Image.new("RGB", (64, 48), RED)]
    more = {"save_all": True, "append_images": frames[1:], "duration": 100}
    images["animated.gif"] = Tricky(encode(frames[0], "GIF", **more), (64, 48), corners)
    images["animated.webp"] = Tricky(encode(frames[0], "WEBP", lossless=True, **more), (64, 48), corners)
    images["animated.png"] = Tricky(encode(frames[0], "PNG", **more), (64, 48), corners)
    images["animated.avif"] = Tricky(encode(frames[0], "AVIF", quality=100, **more), (64, 48), corners, 12)
    images["pages.tiff"] = Tricky(encode(frames[0], "TIFF", save_all=True, append_images=frames[1:]), (64, 48), corners)
    images["small_frame.gif"] = Tricky(_small_frame_gif(), (64, 48), {(8, 20): RED, (56, 20): WHITE})
    images["text_bomb.png"] = Tricky(
        png_with(
            upright,
            png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 << 20), 1)),
            png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(50 << 20), 1)),
        ),
        (64, 48),
        corners,
    )
    images["first_of_two.mpo"] = Tricky(
        encode(upright, "MPO", save_all=True, append_images=frames[1:], quality=95, subsampling=0), (64, 48), corners, 6
    )
    small = upright.resize((16, 16), Image.Resampling.NEAREST)
    icon = {"sizes": [(16, 16), (64, 48)], "append_images": [small]}
    images["largest.ico"] = Tricky(encode(alpha, "ICO", **icon), (64, 48), half)
    images["bitmap.ico"] = Tricky(encode(alpha, "ICO", bitmap_format="bmp", **icon), (64, 48), half)
    images["mask.ico"] = Tricky(_masked_icon(upright.crop((0, 0, 32, 24))), (32, 24), {(4, 4): RED, (28, 4): WHITE})
    for name, picture, options in (
        ("plain", upright, {}), ("runs", upright, {"compression": "tga_rle"}), ("turned", upright, {"orientation": 1}),
        ("palette", upright.quantize(4), {}), ("palette_runs", upright.quantize(4), {"compression": "tga_rle"}),
    ):  # fmt: skip
        images[f"{name}.tga"] = Tricky(encode(picture, "TGA", **options), (64, 48), corners)
        images[f"{name}_footless.tga"] = Tricky(images[f"{name}.tga"].data[:-26], (64, 48), corners)
    images["alpha.tga"] = Tricky(encode(alpha, "TGA"), (64, 48), half)
    images["lossless.jp2"] = Tricky(encode(upright, "JPEG2000"), (64, 48), corners)
    images["lossy.j2k"] = Tricky(encode(upright, "JPEG2000", no_jp2=True, irreversible=True), (64, 48), corners, 12)
    images["alpha.jp2"] = Tricky(encode(alpha, "JPEG2000"), (64, 48), half)
    images |= _netpbm(upright, corners)
    unused = upright.convert("RGBA")
    unused.putalpha(0)  # that nobody filled in
    images["unused_alpha.bmp"] = Tricky(_bmp_with_alpha(unused), (64, 48), corners)
    images["used_alpha.bmp"] = Tricky(_bmp_with_alpha(alpha), (64, 48), half)
    images["unused_alpha.tga"] = Tricky(encode(unused, "TGA"), (64, 48), corners)
    for depth in (1, 2, 4):
        level = 255 // ((1 << depth) - 1)
        images[f"gray{depth}_one_key.png"] = Tricky(
            _png(16, 4, zlib.compress((b"\0" + bytes([_bits(1, depth)] * depth) + bytes(depth)) * 4), depth, 0,
                 png_chunk(b"tRNS", b"\0\0")),
            (16, 4), {(2, 1): (level,) * 3, (14, 1): WHITE},
        )  # fmt: skip
        images[f"gray{depth}_other_key.png"] = Tricky(
            _png(16, 4, zlib.compress((b"\0" + bytes([_bits(1, depth)] * depth) + bytes(depth)) * 4), depth, 0,
                 png_chunk(b"tRNS", b"\0\1")),
            (16, 4), {(2, 1): WHITE, (14, 1): BLACK},
        )  # fmt: skip
    images["bmp_top_down.bmp"] = Tricky(_top_down_bmp(upright), (64, 48), corners)
    images["one_pixel.png"] = Tricky(encode(Image.new("RGB", (1, 1), RED), "PNG"), (1, 1), {(0, 0): RED})
    return images


def _undo(image: Image.Image, orientation: int) -> Image.Image:
    """What must be stored so that EXIF `orientation` shows `image`."""
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }.get(orientation)
    return image if inverse is None else image.transpose(inverse)


def _bits(value: int, depth: int) -> int:
    """A byte full of samples of `depth` bits."""
    return sum(value << shift for shift in range(0, 8, depth))


def _netpbm(image: Image.Image, corners: dict[tuple[int, int], Colour]) -> dict[str, Tricky]:
    """All six kinds, with comments, odd largest values and 16 bits."""
    width, height = image.size
    rgb = np.asarray(image).astype(int)
    gray = np.asarray(image.convert("L")).astype(int)
    dark = (gray < 50).astype(np.uint8)
    shown = {at: (int(gray[at[1], at[0]]),) * 3 for at in corners}
    ink = {at: BLACK if gray[at[1], at[0]] < 50 else WHITE for at in corners}

    def words(values: np.ndarray) -> bytes:
        return b"\n".join(b" ".join(b"%d" % value for value in row) for row in values.reshape(height, -1))

    size = b"%d %d\n" % (width, height)
    deep = np.rint(rgb * 1023 / 255).astype(int)
    made = {
        "bits.pbm": (b"P4\n# a comment\n" + size + np.packbits(dark, axis=1).tobytes(), ink, 0),
        "digits.pbm": (b"P1 " + size + words(dark).replace(b" ", b""), ink, 0),
        "gray.pgm": (b"P5\n" + size + b"255\n" + gray.astype(np.uint8).tobytes(), shown, 0),
        "gray16.pgm": (b"P5\n" + size + b"65535\n" + (gray * 257).astype(">u2").tobytes(), shown, 0),
        "words.pgm": (b"P2\n" + size + b"255\n# between\n" + words(gray), shown, 0),
        "colour.ppm": (b"P6 " + size + b"255\n" + rgb.astype(np.uint8).tobytes(), corners, 0),
        "deep.ppm": (b"P6 " + size + b"1023\n" + deep.astype(">u2").tobytes(), corners, 1),
        "words.ppm": (b"P3\n" + size + b"1023 # ten bits\n" + words(deep), corners, 1),
    }
    return {name: Tricky(data, image.size, pixels, tolerance) for name, (data, pixels, tolerance) in made.items()}


def _masked_icon(image: Image.Image) -> bytes:
    """An ICO of 24 bits, the right half of which its mask takes away."""
    width, height = image.size
    rows = np.asarray(image)[::-1, :, ::-1].tobytes()  # BGR from below; the width is a multiple of four
    mask = np.zeros((height, 32), np.uint8)
    mask[:, width // 2 : width] = 1
    bitmap = (
        struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 24, 0, 0, 0, 0, 0, 0)
        + rows
        + np.packbits(mask, 1).tobytes()
    )
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, width, height, 0, 0, 1, 24, len(bitmap), 22) + bitmap


def _bmp_with_alpha(image: Image.Image) -> bytes:
    """A BMP of 32 bits whose header (version 5) names a mask for alpha."""
    pixels = np.asarray(image)[::-1, :, [2, 1, 0, 3]].tobytes()
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    header = struct.pack("<IiiHHIIiiII", 124, *image.size, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks
    header += b"BGRs" + bytes(124 - len(header) - 4)
    return b"BM" + struct.pack("<IHHI", 14 + 124 + len(pixels), 0, 0, 14 + 124) + header + pixels


def _png(width: int, height: int, idat: bytes, depth: int = 8, colour: int = 2, before: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", idat) + png_chunk(b"IEND", b"")
    )


def _png_with_before_data(png: bytes, chunk: bytes) -> bytes:
    at = png.index(b"IDAT") - 4
    return png[:at] + chunk + png[at:]


def _rgb16_png() -> bytes:
    row = struct.pack(">3H", 0xFFFF, 0x00FF, 0x10AB) * 32 + struct.pack(">3H", 0x0001, 0x80FE, 0xFF00) * 32
    return _png(64, 48, zlib.compress((b"\0" + row) * 48), depth=16)


def _ycck_jpeg(image: Image.Image) -> bytes:
    """An Adobe YCCK JPEG of `image`, made from a CMYK one of Pillow's by declaring (and storing) YCCK: transform 2.

    Adobe stores inverted ink; libjpeg takes YCC -> RGB -> 255 - RGB as that ink, so YCC is that of the inverted image.
    """
    black = Image.new("L", image.size, 255)
    ycc = Image.eval(image, lambda value: 255 - value).convert("YCbCr").split()
    # Pillow inverts when it saves CMYK; inverting here first leaves the planes as they are.
    planes = [Image.eval(plane, lambda value: 255 - value) for plane in (*ycc, black)]
    data = bytearray(encode(Image.merge("CMYK", planes), "JPEG", quality=95))
    adobe = data.index(b"Adobe")
    data[adobe + 11] = 2
    return bytes(data)


def _small_frame_gif() -> bytes:
    """A 64 x 48 GIF whose only frame is a red 32 x 48 rectangle at the left."""
    frame = encode(Image.new("P", (32, 48), 0), "GIF")
    red = Image.new("P", (32, 48), 0)
    red.putpalette([255, 0, 0, 0, 0, 255])
    frame = encode(red, "GIF")
    return frame[:6] + struct.pack("<HH", 64, 48) + frame[10:]


def _top_down_bmp(image: Image.Image) -> bytes:
    data = bytearray(encode(image.transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP"))
    data[22:26] = struct.pack("<i", -image.height)
    return bytes(data)


def _set_tiff_tag(data: bytes, tag: int, value: int) -> bytes:
    """Little-endian TIFF with the value of one tag of its first directory replaced (as a LONG)."""
    changed = bytearray(data)
    (offset,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, offset)
    for entry in range(offset + 2, offset + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<HHII", changed, entry, tag, 4, 1, value)
    return bytes(changed)
