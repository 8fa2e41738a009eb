"""Tell the image format from the first bytes (file extensions lie), or say what the bytes are instead."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from typing import Final

from clipfilter.errors import DECODE_ERROR, UNSUPPORTED, RowError

FORMATS: Final = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif", "ico", "pnm", "tga", "jpeg2000", "heic")

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_JPEG2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")
_ICO, _CURSOR = b"\0\0\1\0", b"\0\0\2\0"
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # the DIB header sizes that exist
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")
_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
#: Netpbm's header up to the one white byte before the pixels: kind, width, height and, but for bitmaps, the largest value.
PNM: Final = re.compile(
    rb"P(?:([14])%b(\d{1,9})%b(\d{1,9})|([2356])%b(\d{1,9})%b(\d{1,9})%b(\d{1,5}))\s" % ((_GAP,) * 5)
)
_HEADER_BYTES = 8192  # of which a Netpbm header, comments included, may take at most so many
_TGA_FOOTER = b"TRUEVISION-XFILE.\0"
_TGA_KINDS = {(1, 8), (3, 8), (3, 16), (2, 16), (2, 24), (2, 32)}  # (type without its RLE bit, bits of a pixel)

# What else people store under an image's name, with the words for the failure record: pictures that we do not read, ...
_UNSUPPORTED = (
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"II\xbc\x01", "a JPEG XR image"),
    (b"8BPS", "a Photoshop document"),
    (b"gimp xcf", "a GIMP document"),
    (b"%PDF-", "a PDF document"),
    (b"%!PS", "a PostScript document"),
    (b"AT&TFORM", "a DjVu document"),
    (b"\xd7\xcd\xc6\x9a", "a Windows metafile"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (b"#?RADIANCE", "a Radiance HDR image"),
    (b"DDS ", "a DirectDraw surface"),
    (b"qoif", "a QOI image"),
    (b"BPG\xfb", "a BPG image"),
    (b"icns", "an Apple icon"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file"),
    (b"P7\n", "a PAM image"),
    (b"Pf\n", "a PFM image"),
    (b"PF\n", "a PFM image"),
    (b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
    (b"\0\0\1\xba", "a video (MPEG)"),
    (b"\0\0\1\xb3", "a video (MPEG)"),
    (b"FLV\1", "a video (Flash)"),
    (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "a video (Windows Media)"),
    (b"OggS", "a video or sound (Ogg)"),
)
# ... and what is none.
_OTHERS = (
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"Rar!", "a RAR archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the image it points to"),
)


def sniff(data: bytes | memoryview) -> str:
    """The format of an encoded image, one of `FORMATS`.

    Raises RowError with a sentence on what the bytes are: unsupported_format where they are a picture, drawing or video
    that is not read, decode_error where they are none.
    """
    head = bytes(data[:64])
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(_PNG):
        return "png"
    if head[:4] == b"RIFF":
        if head[8:12] == b"WEBP":
            return "webp"
        raise _unsupported("a video (AVI)" if head[8:12] == b"AVI " else "a sound or video (RIFF)")
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if head[:4] in _TIFF:
        return "tiff"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if head.startswith(_JPEG2000):
        return "jpeg2000"
    if head[4:8] == b"ftyp":
        return _iso_media(data)
    if head[4:8] in (b"moov", b"mdat", b"wide", b"skip") and head[:2] == b"\0\0":
        raise _unsupported("a video (QuickTime)")
    if head[:4] == _ICO and head[4:6] != b"\0\0":
        return "ico"
    if head[:4] == _CURSOR and head[4:6] != b"\0\0":
        raise _unsupported("a Windows cursor")
    if head[:1] == b"P" and PNM.match(bytes(data[:_HEADER_BYTES])):
        return "pnm"
    words = _describe(data)
    if words.startswith("unknown") and _is_tga(data):
        return "tga"
    raise RowError(DECODE_ERROR, words)


def _unsupported(words: str) -> RowError:
    return RowError(UNSUPPORTED, f"{words}, which is not supported")


@cache
def has_heic() -> bool:
    """Whether the extra that decodes HEIC is installed."""
    return importlib.util.find_spec("pi_heif") is not None


def _iso_media(data: bytes | memoryview) -> str:
    size = min(int.from_bytes(data[:4], "big"), 256)
    brands = [bytes(data[8:12])] + [bytes(data[i : i + 4]) for i in range(16, size - 3, 4)]
    if any(brand in _AVIF_BRANDS for brand in brands):
        return "avif"
    if any(brand in _HEIC_BRANDS for brand in brands):
        if has_heic():
            return "heic"
        raise RowError(UNSUPPORTED, 'a HEIC image: install "clipfilter[heic]" to read it')
    raise _unsupported("a camera's raw file" if brands[0] == b"crx " else "a video (MP4 or QuickTime)")


def _is_tga(data: bytes | memoryview) -> bool:
    """TGA has no magic number: the newer ones have a footer, of the others every field of the header must make sense."""
    if len(data) < 18:
        return False
    if bytes(data[-18:]) == _TGA_FOOTER:
        return True
    mapped, kind, entry, bits, flags = data[1], data[2], data[7], data[16], data[17]
    if (kind & ~8, bits) not in _TGA_KINDS or flags & 0xC0 or flags & 15 not in (0, 1, 8):
        return False
    if mapped != (kind & ~8 == 1) or (entry not in (16, 24, 32) if mapped else any(data[3:8])):
        return False
    pixels = int.from_bytes(data[12:14], "little") * int.from_bytes(data[14:16], "little")
    colours = int.from_bytes(data[5:7], "little") * entry // 8
    size = pixels * bits // 8 if kind < 8 else pixels // 128 * (1 + bits // 8)  # a run has 128 pixels at most
    return pixels > 0 and len(data) >= 18 + data[0] + colours + size


def _describe(data: bytes | memoryview) -> str:
    """What the bytes are, none of `FORMATS`; begins with "unknown" where nothing fits. Raises as `sniff`."""
    if len(data) == 0:
        return "empty file (0 bytes)"
    head = bytes(data[:512])
    for magic, words in _UNSUPPORTED:
        if head.startswith(magic):
            raise _unsupported(words)
    for magic, words in _OTHERS:
        if head.startswith(magic):
            return words if "not the image" in words else f"{words}, not an image"
    if not head.strip(b"\0"):
        return "the file is only zero bytes"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")) or b"<html" in text:
        return "an HTML page, not an image"
    if text.startswith(b"<svg") or (text.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text):
        raise _unsupported("an SVG drawing")
    if text.startswith(b"<?xml"):
        return "an XML document, not an image"
    if text.startswith((b"{", b"[")):
        return "a JSON document, not an image"
    try:
        head[:500].decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head[:500]) - 4:  # a character cut at the end of the sample is still text
            return f"unknown format (starts with {head[:8].hex(' ')})"
    if any(byte < 9 or 13 < byte < 32 for byte in head):
        return f"unknown format (starts with {head[:8].hex(' ')})"
    return "a text file, not an image"
