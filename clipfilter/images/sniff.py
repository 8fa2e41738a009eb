"""Tell the image format from the first bytes (file extensions lie), or say what the bytes are instead."""

from __future__ import annotations

from typing import Final

from clipfilter.errors import DECODE_ERROR, RowError

FORMATS: Final = ("jpeg", "png", "webp", "gif", "bmp", "tiff", "avif")

_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # the DIB header sizes that exist
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")

# What else people store under an image's name, with the words for the failure record.
_OTHERS = (
    (b"%PDF-", "a PDF document"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip-compressed data"),
    (b"Rar!", "a RAR archive"),
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image, which is not supported"),
    (b"\xff\x0a", "a JPEG XL image, which is not supported"),
    (b"\x00\x00\x00\x0cjP  ", "a JPEG 2000 image, which is not supported"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image, which is not supported"),
    (b"8BPS", "a Photoshop document, which is not supported"),
    (b"\x00\x00\x01\x00", "a Windows icon, which is not supported"),
    (b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
    (b"version https://git-lfs", "a Git LFS pointer, not the image it points to"),
)


def sniff(data: bytes | memoryview) -> str:
    """The format of an encoded image, one of `FORMATS`.

    Raises RowError (decode_error) with a sentence on what the bytes are when they are no supported image.
    """
    head = bytes(data[:64])
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head.startswith(_PNG):
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if head[:4] in _TIFF:
        return "tiff"
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "bmp"
    if head[4:8] == b"ftyp":
        return _iso_media(data)
    raise RowError(DECODE_ERROR, _describe(data))


def _iso_media(data: bytes | memoryview) -> str:
    size = min(int.from_bytes(data[:4], "big"), 256)
    brands = [bytes(data[8:12])] + [bytes(data[i : i + 4]) for i in range(16, size - 3, 4)]
    if any(brand in _AVIF_BRANDS for brand in brands):
        return "avif"
    if any(brand in _HEIC_BRANDS for brand in brands):
        raise RowError(DECODE_ERROR, "a HEIC image, which is not supported")
    raise RowError(DECODE_ERROR, "a video (MP4 or QuickTime), not an image")


def _describe(data: bytes | memoryview) -> str:
    if len(data) == 0:
        return "empty file (0 bytes)"
    head = bytes(data[:512])
    for magic, words in _OTHERS:
        if head.startswith(magic):
            return words if "support" in words else f"{words}, not an image"
    if not head.strip(b"\0"):
        return "the file is only zero bytes"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body", b"<script")) or b"<html" in text:
        return "an HTML page, not an image"
    if text.startswith(b"<svg") or (text.startswith((b"<?xml", b"<!--", b"<!doctype svg")) and b"<svg" in text):
        return "an SVG drawing, which is not supported"
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
