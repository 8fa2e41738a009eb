"""Read sizes and orientation from the header alone, so that nothing is allocated for an image that is refused."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from clipfilter import defaults
from clipfilter.errors import DECODE_ERROR, IMAGE_TOO_LARGE, RowError
from clipfilter.images.sniff import sniff

MAX_SIDE = 65_535  # JPEG's; a longer side in any format is a broken or hostile header
_MAX_PARTS = 20_000  # segments, chunks or boxes walked before a header counts as hostile
_MAX_SCANS = 500  # of a progressive JPEG; real ones have about 10 (libjpeg-turbo's fuzzers use the same bound)


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says. width, height: stored pixels, before orientation. orientation: EXIF's 1 to 8."""

    format: str
    width: int
    height: int
    orientation: int = 1
    channels: int = 0  # of a JPEG: 1 gray, 3 colour, 4 CMYK or YCCK
    depth: int = 8  # of a PNG: bits per sample

    @property
    def display_size(self) -> tuple[int, int]:
        """(width, height) as a person sees it."""
        if self.orientation >= 5:
            return self.height, self.width
        return self.width, self.height


def read_header(data: bytes, max_pixels: int = defaults.MAX_PIXELS) -> Header:
    """The header of an encoded image; no pixel is decoded and no memory allocated for one.

    Raises RowError: decode_error for anything that is no readable image, image_too_large above `max_pixels` pixels or
    `MAX_SIDE` on one side.
    """
    kind = sniff(data)
    try:
        header = _READERS[kind](data)
    except (struct.error, IndexError) as error:
        raise RowError(DECODE_ERROR, f"truncated {kind.upper()}: the header is incomplete") from error
    if header.width < 1 or header.height < 1:
        raise RowError(DECODE_ERROR, f"{kind.upper()} header gives {header.width} x {header.height} pixels")
    if header.width * header.height > max_pixels:
        raise RowError(
            IMAGE_TOO_LARGE,
            f"{header.width} x {header.height} pixels is above the limit of {max_pixels} pixels",
        )
    if max(header.width, header.height) > MAX_SIDE:
        raise RowError(IMAGE_TOO_LARGE, f"{header.width} x {header.height}: a side is above {MAX_SIDE} pixels")
    return header


def _damaged(message: str) -> RowError:
    return RowError(DECODE_ERROR, message)


# --- JPEG: ITU T.81, annex B ----------------------------------------------------------------------------------------

_SOF = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD8)))


def _jpeg(data: bytes) -> Header:
    width = height = channels = 0
    orientation = 1
    position = 2
    for _ in range(_MAX_PARTS):
        while data[position] != 0xFF:  # stray bytes between segments: decoders skip them with a warning
            position = data.find(b"\xff", position)
            if position < 0:
                raise _damaged("truncated JPEG: no image data")
        while data[position] == 0xFF:
            position += 1
        marker = data[position]
        position += 1
        if marker in _STANDALONE or marker == 0:
            continue
        if marker == 0xD9:
            raise _damaged("JPEG without image data")
        (length,) = struct.unpack_from(">H", data, position)
        if marker in _SOF:
            height, width, channels = struct.unpack_from(">HHB", data, position + 3)
            if marker in (0xC2, 0xC6, 0xCA, 0xCE) and data.count(b"\xff\xda") > _MAX_SCANS:
                raise _damaged(f"progressive JPEG with more than {_MAX_SCANS} scans")
        elif marker == 0xE1 and data[position + 2 : position + 8] == b"Exif\0\0":
            orientation = exif_orientation(data[position + 8 : position + length])
        elif marker == 0xDA:
            if not channels:
                raise _damaged("JPEG without a frame header")
            return Header("jpeg", width, height, orientation, channels)
        position += length
    raise _damaged(f"JPEG with more than {_MAX_PARTS} segments")


def exif_orientation(tiff: bytes) -> int:
    """Orientation (1 to 8) from a TIFF structure as EXIF embeds it; 1 where it is absent or makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (offset,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, offset)
        for entry in range(offset + 2, offset + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == 0x0112:
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), tiff, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # damaged metadata does not make the picture unreadable
    return 1


# --- PNG: W3C PNG, third edition --------------------------------------------------------------------------------------

# All that shapes the picture. Text, ICC profiles and animation are left out before Pillow sees the file: they can
# inflate to gigabytes, and a frame that is never shown need not be decoded.
_PNG_KEEP = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))


def _png(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise _damaged("PNG without IHDR")
    width, height, depth = struct.unpack_from(">IIB", data, 16)
    return Header("png", width, height, depth=depth)


def png_chunks(data: bytes) -> tuple[bytes, int]:
    """(the PNG with only the chunks that make up the picture, orientation from its eXIf chunk).

    Raises RowError when the file is cut off, has no end, or a chunk of the picture fails its CRC: Pillow would show
    whatever came before.
    """
    parts: list[bytes | memoryview] = [memoryview(data)[:8]]
    view = memoryview(data)
    orientation = 1
    position, removed, has_data = 8, False, False
    for _ in range(_MAX_PARTS * 10):
        if position + 12 > len(data):
            raise _damaged("truncated PNG: the file ends before its IEND chunk")
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            raise _damaged("truncated PNG: the file ends inside a chunk")
        if kind in _PNG_KEEP:
            if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
                raise _damaged(f"corrupt PNG: chunk {kind.decode()} fails its checksum")
            parts.append(view[position:end])
            has_data = has_data or kind == b"IDAT"
        else:
            removed = True
            if kind == b"eXIf":
                orientation = exif_orientation(data[position + 8 : end - 4])
        if kind == b"IEND":
            if not has_data:
                raise _damaged("PNG without image data")
            return (b"".join(parts) if removed else data), orientation
        position = end
    raise _damaged("PNG with too many chunks")


# --- the others -------------------------------------------------------------------------------------------------------


def _webp(data: bytes) -> Header:
    # RFC 9649. Only the canvas matters: every frame must fit in it.
    (size,) = struct.unpack_from("<I", data, 4)
    if size + 8 > len(data) + 1:  # writers disagree about the padding byte
        raise _damaged("truncated WebP: the file is shorter than its header says")
    kind = data[12:16]
    if kind == b"VP8X":
        width = 1 + int.from_bytes(data[24:27], "little")
        height = 1 + int.from_bytes(data[27:30], "little")
        return Header("webp", width, height, _webp_orientation(data) if data[20] & 8 else 1)
    if kind == b"VP8 ":
        if data[23:26] != b"\x9d\x01\x2a":
            raise _damaged("WebP with a damaged VP8 frame header")
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", width & 0x3FFF, height & 0x3FFF)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("webp", (bits & 0x3FFF) + 1, ((bits >> 14) & 0x3FFF) + 1)
    raise _damaged("WebP without an image")


def _webp_orientation(data: bytes) -> int:
    position = 12
    for _ in range(_MAX_PARTS):
        if position + 8 > len(data):
            break
        (length,) = struct.unpack_from("<I", data, position + 4)
        if data[position : position + 4] == b"EXIF":
            exif = data[position + 8 : position + 8 + length]
            return exif_orientation(exif.removeprefix(b"Exif\0\0"))
        position += 8 + length + (length & 1)
    return 1


def _gif(data: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    position = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    for _ in range(_MAX_PARTS):
        block = data[position]
        if block == 0x2C:  # the first frame may reach beyond the screen, and decoders then enlarge the canvas
            left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, position + 1)
            return Header("gif", max(width, left + frame_width), max(height, top + frame_height))
        if block != 0x21:
            raise _damaged("GIF without a frame")
        position += 2
        while data[position]:
            position += 1 + data[position]
        position += 1
    raise _damaged(f"GIF with more than {_MAX_PARTS} extensions before its first frame")


def _bmp(data: bytes) -> Header:
    (size,) = struct.unpack_from("<I", data, 14)
    if size in (12, 16):
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)  # a negative height means top-down
    return Header("bmp", abs(width), abs(height))


_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}


def _tiff(data: bytes) -> Header:
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in (data[2], data[3])
    (offset,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, offset)
    first, step, value_at = (offset + 8, 20, 12) if big else (offset + 2, 12, 8)
    tags: dict[int, int] = {}
    for index in range(min(count, _MAX_PARTS)):
        entry = first + index * step
        tag, kind = struct.unpack_from(order + "HH", data, entry)
        if tag in (0x0100, 0x0101, 0x0112, 0x0142, 0x0143) and kind in _TIFF_TYPES:
            (tags[tag],) = struct.unpack_from(order + _TIFF_TYPES[kind], data, entry + value_at)
    if 0x0100 not in tags or 0x0101 not in tags:
        raise _damaged("TIFF without image dimensions")
    # A tile is allocated whole, however small the picture in it.
    for tag in (0x0142, 0x0143):
        if tags.get(tag, 0) > MAX_SIDE:
            raise RowError(IMAGE_TOO_LARGE, f"TIFF tile with a side of {tags[tag]} pixels")
    orientation = tags.get(0x0112, 1)
    return Header("tiff", tags[0x0100], tags[0x0101], orientation if 1 <= orientation <= 8 else 1)


def _avif(data: bytes) -> Header:
    # ISO/IEC 23008-12: meta/iprp/ipco/ispe. The largest one, as grids and thumbnails have their own. Pillow reports the
    # orientation (irot, imir) when it opens the file.
    sizes: list[tuple[int, int]] = []
    _walk_boxes(data, 0, len(data), sizes, 0)
    if not sizes:
        raise _damaged("AVIF without image dimensions")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return Header("avif", width, height)


def _walk_boxes(data: bytes, start: int, stop: int, sizes: list[tuple[int, int]], depth: int) -> None:
    position = start
    for _ in range(_MAX_PARTS):
        if position + 8 > stop:
            return
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        body = position + 8
        if length == 1:
            (length,) = struct.unpack_from(">Q", data, body)
            body += 8
        end = stop if length == 0 else position + length
        if end < body or end > stop:
            raise _damaged("truncated AVIF: a box reaches beyond the end of the file")
        if kind == b"ispe":
            width, height = struct.unpack_from(">II", data, body + 4)
            sizes.append((width, height))
        elif kind in (b"meta", b"iprp", b"ipco") and depth < 4:
            _walk_boxes(data, body + 4 if kind == b"meta" else body, end, sizes, depth + 1)
        elif kind == b"tkhd" and end - body >= 84:  # an image sequence has tracks: 16.16 width and height at the end
            width, height = struct.unpack_from(">II", data, end - 8)
            sizes.append((width >> 16, height >> 16))
        elif kind in (b"moov", b"trak") and depth < 4:
            _walk_boxes(data, body, end, sizes, depth + 1)
        position = end


_READERS = {
    "jpeg": _jpeg,
    "png": _png,
    "webp": _webp,
    "gif": _gif,
    "bmp": _bmp,
    "tiff": _tiff,
    "avif": _avif,
}
