"""Decode any supported image to RGB as a person would see it."""

from __future__ import annotations

import io
import re
import struct
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    IcoImagePlugin,
    Image,
    ImageCms,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TgaImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from clipfilter import defaults
from clipfilter.errors import DECODE_ERROR, IMAGE_TOO_LARGE, UNSUPPORTED, RowError
from clipfilter.images.header import Header, exif_orientation, gif_first_frame, largest_icon, png_chunks, read_header
from clipfilter.images.sniff import PNM

Mode = defaults.Decode

# The plugin classes rather than Image.open: only the format that was sniffed can be tried, and our own limit, not a
# process-wide one, decides what is too large.
_PLUGINS = {
    "jpeg": JpegImagePlugin.JpegImageFile,
    "png": PngImagePlugin.PngImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
    "gif": GifImagePlugin.GifImageFile,
    "bmp": BmpImagePlugin.BmpImageFile,
    "tiff": TiffImagePlugin.TiffImageFile,
    "avif": AvifImagePlugin.AvifImageFile,
    "ico": IcoImagePlugin.IcoImageFile,
    "tga": TgaImagePlugin.TgaImageFile,
    "jpeg2000": Jpeg2KImagePlugin.Jpeg2KImageFile,
}
# What plugins say of files that are whole, but of a kind they do not know.
_UNKNOWN_KIND = re.compile(
    r"unsupported|not supported|unknown (pixel|tga|tiff|data|planar)|no decoder|cannot handle", re.IGNORECASE
)
_UNUSED_ALPHA = ("bmp", "tga", "ico")  # formats whose writers leave zeros where alpha would be
_ALPHA_MODES = ("RGBA", "LA", "PA", "RGBa", "La")
_WHITE = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Decoded:
    """rgb: uint8 [h, w, 3], contiguous; smaller than the image after scaled decoding. width, height: the whole image in
    pixels as displayed (after EXIF orientation). profile: the ICC profile that came with the pixels and was not applied."""

    rgb: np.ndarray
    width: int
    height: int
    format: str
    profile: bytes = b""


def decode(
    data: bytes | memoryview,
    *,
    mode: Mode = defaults.DECODE,
    min_side: int | None = None,
    max_pixels: int = defaults.MAX_PIXELS,
) -> Decoded:
    """Decode `data`; EXIF orientation applied, alpha on white, first frame of an animation.

    mode "exact" decodes every pixel. "fast" may decode a JPEG at 1/2, 1/4 or 1/8 of its size (in the DCT domain), as
    long as its shorter side keeps at least `min_side` pixels; None switches that off. Colour profiles are applied to
    CMYK only; others are handed on.

    Raises RowError and nothing else: decode_error, unsupported_format or image_too_large.
    """
    data = bytes(data)  # no copy when it is bytes already
    header = read_header(data, max_pixels)
    try:
        if header.format == "jpeg" and header.channels in (1, 3):
            rgb = _jpeg(data, header, min_side if mode == "fast" else None, max_pixels)
            orientation, profile = header.orientation, header.profile
        elif header.format == "pnm":
            rgb, orientation, profile = _pnm(data), 1, b""
        else:
            rgb, orientation, profile = _pillow(data, header, max_pixels)
        rgb = _orient(rgb, orientation)
    except RowError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise RowError(IMAGE_TOO_LARGE, f"{header.format.upper()}: {error or 'not enough memory'}") from error
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged files; it costs only this row
        text = str(error) or type(error).__name__
        if header.format == "tiff" and error.args and isinstance(error.args[0], KeyError):  # Pillow looks the method up
            text = f"unsupported compression {text}"
        if _UNKNOWN_KIND.search(text):
            raise RowError(UNSUPPORTED, f"{header.format.upper()} of a kind that is not supported: {text}") from error
        raise RowError(DECODE_ERROR, f"damaged {header.format.upper()}: {text}") from error
    if header.format == "jpeg":  # which may have been decoded smaller
        width, height = header.display_size
    else:
        height, width = rgb.shape[:2]
    return Decoded(rgb, width, height, header.format, profile)


def jpeg_scale(width: int, height: int, min_side: int | None) -> int:
    """The divisor for scaled JPEG decoding: the largest of 1, 2, 4, 8 that keeps the shorter side >= `min_side`.

    The divisors in between exist, but have no SIMD code and decode slower than 1/1.
    """
    if min_side is None:
        return 1
    shorter = min(width, height)
    for divisor in (8, 4, 2):
        if shorter >= divisor * min_side:
            return divisor
    return 1


def _jpeg(data: bytes, header: Header, min_side: int | None, max_pixels: int) -> np.ndarray:
    divisor = jpeg_scale(header.width, header.height, min_side)
    try:
        if divisor == 1:
            rgb: np.ndarray = simplejpeg.decode_jpeg(data)
        else:
            height, width = -(-header.height // divisor), -(-header.width // divisor)
            rgb = simplejpeg.decode_jpeg(data, min_height=height, min_width=width)
        return rgb
    except ValueError:
        # An error or a mere warning of libjpeg-turbo. Pillow tells them apart: it accepts what can be shown whole and
        # refuses what is cut off.
        return _pillow(data, header, max_pixels)[0]


def _pillow(data: bytes, header: Header, max_pixels: int) -> tuple[np.ndarray, int, bytes]:
    """(uint8 [h, w, 3] at full size, the orientation that is still to be applied, the profile that is not applied)."""
    orientation, profile, kind = header.orientation, b"", header.format
    if kind == "ico":
        data = largest_icon(data)
        kind = "png" if data.startswith(b"\x89PNG") else "ico"
    if kind == "png":
        data, orientation, profile = png_chunks(data)
    elif kind == "gif":
        data = gif_first_frame(data)
    elif kind == "ico":  # alone in its file, with the number of bits that it says itself
        width, height, bits = data[4], data[8] // 2, struct.unpack_from("<H", data, 14)[0]
        data = struct.pack("<HHHBBBBHHII", 0, 1, 1, width, height, 0, 0, 1, bits, len(data), 22) + data
    image: Image.Image = _heic(data) if kind == "heic" else _PLUGINS[kind](io.BytesIO(data))
    if image.width * image.height > max_pixels:  # where Pillow reads the header differently from us
        raise RowError(IMAGE_TOO_LARGE, f"{image.width} x {image.height} pixels is above the limit of {max_pixels}")
    if kind in (
        "avif",
        "heic",
    ):  # the plugins express the format's own rotation and mirror boxes as EXIF (or have done it)
        orientation = exif_orientation((image.info.get("exif") or b"").removeprefix(b"Exif\0\0"))
    frame = image.tile[0].extents if isinstance(image, GifImagePlugin.GifImageFile) else None
    image.load()
    if kind == "tiff":  # Pillow has applied it while loading
        orientation = 1
    if image.mode != "CMYK":  # whose profile is applied at once
        profile = profile or image.info.get("icc_profile") or b""
    return _to_rgb(image, header, frame), orientation, profile


def _heic(data: bytes) -> Image.Image:
    from pi_heif.as_plugin import HeifImageFile  # the extra; its `HeifImagePlugin` would register it with Pillow

    image: Image.Image = HeifImageFile(io.BytesIO(data))
    return image


def _pnm(data: bytes) -> np.ndarray:
    """Netpbm's P1 to P6 as uint8 [h, w, 3] or a view that repeats gray. Raises ValueError where pixels are missing.

    Pillow decodes most of these in Python, a pixel at a time.
    """
    found = PNM.match(data)
    assert found is not None  # it was sniffed by this
    bitmap, *sides, kind, wide, high, largest = found.groups()
    width, height = (int(side) for side in (sides if bitmap else (wide, high)))
    top = 1 if bitmap else int(largest)
    bands = 3 if kind in (b"3", b"6") else 1
    if not 0 < top < 65_536:
        raise ValueError(f"the largest value is {top}")
    body = memoryview(data)[found.end() :]
    count = width * height * bands
    values: np.ndarray
    if (bitmap or kind) in (b"1", b"2", b"3"):  # in digits
        text = re.sub(rb"#[^\r\n]*", b" ", body)
        if bitmap:  # which need no space between them
            values = np.frombuffer(text.translate(None, b" \t\r\n\v\f")[:count], np.uint8) - ord("0")
        else:
            values = np.fromstring(text.decode("latin-1"), np.int64, sep=" ")[:count]
    elif bitmap:
        rows = np.frombuffer(body, np.uint8, height * -(-width // 8)).reshape(height, -1)
        values = np.unpackbits(rows, axis=1, count=width).ravel()
    else:
        values = np.frombuffer(body, np.uint8 if top < 256 else np.dtype(">u2"), count)
    if len(values) < count or values.min(initial=0) < 0 or (bitmap and values.max(initial=0) > 1):
        raise ValueError("the file ends before its last pixel")
    if bitmap:
        values = 1 - values  # 1 is black
    if top == 65_535:
        levels = (values >> 8).astype(np.uint8)  # as with other formats of 16 bits
    elif top == 255:
        levels = values.astype(np.uint8)
    else:
        levels = np.rint(np.minimum(values, top) * (255.0 / top)).astype(np.uint8)
    return np.broadcast_to(levels.reshape(height, width, bands), (height, width, 3))


def _to_rgb(image: Image.Image, header: Header, frame: tuple[int, int, int, int] | None) -> np.ndarray:
    """A loaded Pillow image of any mode as uint8 [h, w, 3]; `frame` is the part of the canvas that a GIF draws."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_gray(np.asarray(image), image.mode, image.info.get("transparency"))
    if image.mode == "CMYK":
        return np.asarray(_cmyk(image))
    key = image.info.get("transparency")
    if header.depth == 16 and isinstance(key, tuple):  # Pillow keeps the high bytes of the pixels, but not of the key
        image.info["transparency"] = tuple(value >> 8 for value in key)
    elif isinstance(key, int) and image.mode == "L":  # of which the lowest bits count, at the scale of the pixels
        largest = (1 << header.depth) - 1
        image.info["transparency"] = (key & largest) * 255 // largest
    partial = frame is not None and frame != (0, 0, *image.size)
    if key is None and not partial and image.mode not in _ALPHA_MODES:
        return np.asarray(image.convert("RGB"))
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    if frame is not None and partial:  # the canvas around a smaller first frame is empty
        drawn = Image.new("L", image.size, 0)
        drawn.paste(alpha.crop(frame), frame)
        alpha = drawn
    lowest, highest = alpha.getextrema()
    if lowest == 255 or (highest == 0 and header.format in _UNUSED_ALPHA):
        return np.asarray(rgba.convert("RGB"))
    canvas = Image.new("RGB", image.size, _WHITE)
    canvas.paste(rgba, mask=alpha)
    return np.asarray(canvas)


def _deep_gray(values: np.ndarray, mode: str, transparent: object) -> np.ndarray:
    """Gray of 16 or 32 bits, or floating point, as uint8 [h, w, 3].

    16 bits keep their high byte, as Pillow does for 16-bit colour. 32-bit and float files do not say what white is:
    values within 0..1 (float), 0..255 or 0..65535 are taken at that scale, others stretched from minimum to maximum.
    """
    if mode.startswith("I;16"):
        gray = (values >> 8).astype(np.uint8)
    else:
        finite = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        low, high = float(finite.min()), float(finite.max())
        if low < 0 or high > 65535:
            finite = (finite - low) * (255.0 / max(high - low, 1e-30))
        elif high > 255:
            finite = finite / 257.0
        elif mode == "F" and high <= 1:
            finite = finite * 255.0
        gray = np.clip(np.rint(finite), 0, 255).astype(np.uint8)
    if isinstance(transparent, int):
        gray = np.where(values == transparent, np.uint8(255), gray)
    return np.repeat(gray[:, :, None], 3, axis=2)


def _cmyk(image: Image.Image) -> Image.Image:
    """CMYK to sRGB, by the embedded profile where there is a usable one (Pillow has undone Adobe's inversion)."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image,
                ImageCms.ImageCmsProfile(io.BytesIO(profile)),
                ImageCms.createProfile("sRGB"),
                renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                outputMode="RGB",
                flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
            )
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a damaged or foreign profile: the plain conversion is closer than no image
    return image.convert("RGB")


def _orient(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """Apply EXIF orientation 1 to 8 to [h, w, 3]; the result is contiguous."""
    if orientation in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)
