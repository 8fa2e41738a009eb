"""Read sizes and orientation from the header alone, so that nothing is allocated for an image that is refused."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from clipfilter import defaults
from clipfilter.errors import DECODE_ERROR, IMAGE_TOO_LARGE, UNSUPPORTED, RowError, reason
from clipfilter.images.sniff import PNM, sniff

MAX_SIDE = 65_535  # JPEG's; a longer side in any format is a broken or hostile header
_MAX_PARTS = 20_000  # segments, chunks or boxes walked before a header counts as hostile
# Scans of a JPEG, each of which walks over the whole picture; real ones have about 10. 500 is the bound of libjpeg-turbo's
# own fuzzers, and 2**33 pixels of all scans together are about 10 seconds of empty ones; 64 are allowed at any size.
_MAX_SCANS = 500
_FEW_SCANS = 64
_MAX_SCANNED = 1 << 33
# Where a decoder is slow: nanoseconds a pixel are 500 for the run lengths of a BMP (in Python), 200 for a JPEG 2000.
_MAX_RUN_PIXELS = 1 << 23
_MAX_SLOW_PIXELS = 1 << 25
_MAX_PRECINCTS = 1_000_000  # of a JPEG 2000, for each of which memory is reserved
_MAX_PACKETS = 10_000_000  # the same in all layers


@dataclass(frozen=True, slots=True)
class Header:
    """What the header says. width, height: stored pixels, before orientation. orientation: EXIF's 1 to 8."""

    format: str
    width: int
    height: int
    orientation: int = 1
    channels: int = 0  # of a JPEG: 1 gray, 3 colour, 4 CMYK or YCCK
    depth: int = 8  # of a PNG: bits per sample
    profile: bytes = b""  # the embedded ICC profile, of a JPEG

    @property
    def display_size(self) -> tuple[int, int]:
        """(width, height) as a person sees it."""
        if self.orientation >= 5:
            return self.height, self.width
        return self.width, self.height


def read_header(data: bytes, max_pixels: int = defaults.MAX_PIXELS) -> Header:
    """The header of an encoded image; no pixel is decoded and no memory allocated for one.

    Raises RowError: decode_error for anything that is no readable image, unsupported_format for pictures that we do not
    read, image_too_large above `max_pixels` pixels or `MAX_SIDE` on one side.
    """
    kind = sniff(data)
    try:
        header = _READERS[kind](data)
    except (struct.error, IndexError) as error:
        raise RowError(DECODE_ERROR, f"truncated {kind.upper()}: the header is incomplete") from error
    except RowError:
        raise
    except Exception as error:  # an offset that no file can have, say; whatever it is, it is the file's
        raise RowError(DECODE_ERROR, f"damaged {kind.upper()}: the header makes no sense ({reason(error)})") from error
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


def _limit_slow(kind: str, width: int, height: int, limit: int = _MAX_SLOW_PIXELS) -> None:
    if width * height > limit:
        raise RowError(IMAGE_TOO_LARGE, f"{width} x {height} pixels is above the limit of {limit} for {kind}")


# --- JPEG: ITU T.81, annex B ----------------------------------------------------------------------------------------

_SOF = frozenset((0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF))
_DECODABLE = frozenset((0xC0, 0xC1, 0xC2, 0xC9, 0xCA))  # not the lossless and the hierarchical processes
_STANDALONE = frozenset((0x01, *range(0xD0, 0xD8)))
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither stuffing nor a restart


def _jpeg(data: bytes) -> Header:
    width = height = channels = 0
    orientation = 1
    profile: dict[int, bytes] = {}
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
            precision, height, width, channels = struct.unpack_from(">BHHB", data, position + 2)
            if marker not in _DECODABLE or precision != 8 or channels == 2 or channels > 4:
                process = "a lossless or hierarchical JPEG" if marker not in _DECODABLE else "a JPEG"
                what = f"{process} of {channels} components of {precision} bits"
                raise RowError(UNSUPPORTED, f"{what}, which is not supported")
        elif marker == 0xE1 and data[position + 2 : position + 8] == b"Exif\0\0":
            orientation = exif_orientation(data[position + 8 : position + length])
        elif marker == 0xE2 and data[position + 2 : position + 14] == b"ICC_PROFILE\0":
            profile[data[position + 14]] = data[position + 16 : position + length]
        elif marker == 0xDA:
            if not channels:
                raise _damaged("JPEG without a frame header")
            scans = max(_FEW_SCANS, min(_MAX_SCANS, _MAX_SCANNED // max(width * height, 1)))
            if data.count(b"\xff\xda") > scans and _more_scans(data, position + length, scans):
                raise _damaged(f"JPEG of {width} x {height} pixels with more than {scans} scans")
            icc = b"".join(profile[part] for part in sorted(profile))
            return Header("jpeg", width, height, orientation, channels, profile=icc)
        position += length
    raise _damaged(f"JPEG with more than {_MAX_PARTS} segments")


def _more_scans(data: bytes, position: int, scans: int) -> bool:
    """Whether more than `scans` scans stand before the end of the picture, the first of which ends its header at `position`.

    Behind the end there may be others: pictures of an MPO, a film.
    """
    found = 1
    while found <= scans:
        marker = _MARKER.search(data, position)
        if marker is None or marker[0] == b"\xff\xd9" or marker.end() + 2 > len(data):
            return False
        found += marker[0] == b"\xff\xda"
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return True


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

#: Bytes of an ICC profile; those of cameras and screens have a few thousand.
MAX_PROFILE = 4 << 20
# All that shapes the picture. Text, ICC profiles and animation are left out before Pillow sees the file: they can
# inflate to gigabytes, and a frame that is never shown need not be decoded.
_PNG_KEEP = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"))


def _png(data: bytes) -> Header:
    if data[12:16] != b"IHDR":
        raise _damaged("PNG without IHDR")
    width, height, depth = struct.unpack_from(">IIB", data, 16)
    return Header("png", width, height, depth=depth)


def png_chunks(data: bytes) -> tuple[bytes, int, bytes]:
    """(the PNG with only the chunks that make up the picture, orientation from its eXIf chunk, its ICC profile or b"").

    Raises RowError when the file is cut off, has no end, or a chunk of the picture fails its CRC: Pillow would show
    whatever came before.
    """
    parts: list[bytes | memoryview] = [memoryview(data)[:8]]
    view = memoryview(data)
    orientation, profile = 1, b""
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
            elif kind == b"iCCP":
                profile = _inflated(data[position + 8 : end - 4])
        if kind == b"IEND":
            if not has_data:
                raise _damaged("PNG without image data")
            return (b"".join(parts) if removed else data), orientation, profile
        position = end
    raise _damaged("PNG with too many chunks")


def _inflated(chunk: bytes) -> bytes:
    """The profile of an iCCP chunk: a name, two zero bytes, and at most `MAX_PROFILE` bytes compressed."""
    _, _, packed = chunk.partition(b"\0")
    try:
        return zlib.decompressobj().decompress(packed[1:], MAX_PROFILE)
    except zlib.error:
        return packed  # as damaged as it is


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
    width, height = struct.unpack_from("<HH", data, 6)
    _, _, frame = _gif_parts(data)
    # The first frame may reach beyond the screen, and decoders then enlarge the canvas.
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, frame + 1)
    return Header("gif", max(width, left + frame_width), max(height, top + frame_height))


def _gif_parts(data: bytes) -> tuple[int, bytes, int]:
    """(where the screen's header ends, the control block of the first frame or b"", where that frame begins)."""
    flags = data[10]
    position = start = 13 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0)
    control = b""
    for _ in range(_MAX_PARTS):
        if data[position] == 0x2C:
            return start, control, position
        if data[position] != 0x21:
            raise _damaged("GIF without a frame")
        begin = position
        position += 2
        while data[position]:
            position += 1 + data[position]
        position += 1
        if data[begin + 1] == 0xF9:
            control = data[begin:position]
    raise _damaged(f"GIF with more than {_MAX_PARTS} extensions before its first frame")


def gif_first_frame(data: bytes) -> bytes:
    """The GIF with its first frame alone: comments, which decoders gather in quadratic time, and later frames are left out."""
    start, control, frame = _gif_parts(data)
    flags = data[frame + 9]
    position = frame + 10 + (3 << ((flags & 7) + 1) if flags & 0x80 else 0) + 1
    while position < len(data) and data[position]:
        position += 1 + data[position]
    return data[:start] + control + data[frame : position + 1] + b";"


def _bmp(data: bytes) -> Header:
    return Header("bmp", *_dib(data, 14))


def _dib(data: bytes, at: int) -> tuple[int, int]:
    """(width, height) of the bitmap header at `at`."""
    (size,) = struct.unpack_from("<I", data, at)
    if size == 12:
        width, height = struct.unpack_from("<HH", data, at + 4)
    else:
        width, height = struct.unpack_from("<ii", data, at + 4)  # a negative height means top-down
        if int.from_bytes(data[at + 16 : at + 20], "little") in (1, 2):
            _limit_slow("a BMP of run lengths", abs(width), abs(height), _MAX_RUN_PIXELS)
    return abs(width), abs(height)


def largest_icon(data: bytes) -> bytes:
    """The largest picture of an ICO, a PNG or a bitmap without its file header."""
    (count,) = struct.unpack_from("<H", data, 4)
    entries = [struct.unpack_from("<BBBBHHII", data, 6 + 16 * index) for index in range(count)]
    # 0 stands for 256. Of equal sizes the one of most colours.
    _, _, _, _, _, _, size, offset = max(entries, key=lambda e: ((e[0] or 256) * (e[1] or 256), e[5], -e[7]))
    icon = data[offset : offset + size]
    if len(icon) < size or size < 40:
        raise _damaged("truncated ICO: the picture that its directory names is not there")
    return icon


def _ico(data: bytes) -> Header:
    icon = largest_icon(data)
    if icon.startswith(b"\x89PNG"):
        header = _png(icon)
        return Header("ico", header.width, header.height, depth=header.depth)
    width, height = _dib(icon, 0)
    return Header("ico", width, height // 2)  # its mask stands below


def _pnm(data: bytes) -> Header:
    found = PNM.match(data)
    assert found is not None  # it was sniffed by this
    bitmap, width, height, kind, wide, high, _ = found.groups()
    header = Header("pnm", int(width or wide), int(height or high))
    if (bitmap or kind) in (b"1", b"2", b"3"):
        _limit_slow("a Netpbm image in digits", header.width, header.height)
    return header


def _tga(data: bytes) -> Header:
    width, height = struct.unpack_from("<HH", data, 12)
    return Header("tga", width, height)


# Tags of a directory: width, height, compression, strips and their rows, samples, tiles. Bytes of a value by its type.
_TIFF_TAGS = frozenset((0x100, 0x101, 0x111, 0x112, 0x115, 0x116, 0x142, 0x143, 0x144))
_TIFF_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}
_TIFF_SIZES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)


def _tiff(data: bytes) -> Header:
    order = "<" if data[:2] == b"II" else ">"
    big = 43 in (data[2], data[3])
    (offset,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, offset)
    if count > _MAX_PARTS:
        raise _damaged(f"TIFF with a directory of {count} entries")
    first, step, value_at = (offset + 8, 20, 12) if big else (offset + 2, 12, 8)
    tags: dict[int, int] = {}
    counts: dict[int, int] = {}
    stored = 0
    for index in range(count):
        entry = first + index * step
        tag, kind, values = struct.unpack_from(order + ("HHQ" if big else "HHI"), data, entry)
        stored += values * (_TIFF_SIZES[kind] if kind < len(_TIFF_SIZES) else 0)
        if tag in _TIFF_TAGS:
            counts[tag] = values
            if kind in _TIFF_TYPES:
                (tags[tag],) = struct.unpack_from(order + _TIFF_TYPES[kind], data, entry + value_at)
    if 0x0100 not in tags or 0x0101 not in tags:
        raise _damaged("TIFF without image dimensions")
    # Decoders read all values; entries that share bytes would make gigabytes of them.
    if stored > 2 * len(data) + 65_536 and stored > 1 << 24:
        raise _damaged(f"TIFF whose directory names {stored} bytes of values")
    width, height = tags[0x0100], tags[0x0101]
    # A tile is allocated whole, however small the picture in it.
    tile_width, tile_height = tags.get(0x0142, 0), tags.get(0x0143, 0)
    if max(tile_width, tile_height) > MAX_SIDE or tile_width * tile_height > max(_MAX_SLOW_PIXELS, width * height):
        raise RowError(IMAGE_TOO_LARGE, f"TIFF with tiles of {tile_width} x {tile_height} pixels")
    across = -(-width // tile_width) if tile_width else 1
    parts = across * -(-height // max(1, tile_height or tags.get(0x0116, height))) * max(1, tags.get(0x0115, 1))
    named = max(counts.get(0x0111, 0), counts.get(0x0144, 0))
    if named > 2 * parts + 16:  # each costs a step, even where they all lie outside the picture
        raise _damaged(f"TIFF of {named} strips or tiles, where {parts} make the picture")
    orientation = tags.get(0x0112, 1)
    return Header("tiff", width, height, orientation if 1 <= orientation <= 8 else 1)


def _jpeg2000(data: bytes) -> Header:
    """ITU T.800: sizes from the code stream (annex A), which is what is decoded, and the picture's header (annex I)."""
    width = height = 0
    start = 0
    if data[:4] != b"\xff\x4f\xff\x51":
        position = 0
        for _ in range(_MAX_PARTS):
            length, kind = struct.unpack_from(">I4s", data, position)
            body = position + 8
            if length == 1:
                (length,) = struct.unpack_from(">Q", data, body)
                body += 8
            if kind == b"jp2h" and data[body + 4 : body + 8] == b"ihdr":
                height, width = struct.unpack_from(">II", data, body + 8)
            if kind == b"jp2c":
                start = body
                break
            if length < 8:
                raise _damaged("JPEG 2000 without a code stream")
            position += length
        else:
            raise _damaged(f"JPEG 2000 with more than {_MAX_PARTS} boxes")
    right, bottom, left, top, tile_width, tile_height = struct.unpack_from(">6I", data, start + 8)
    (components,) = struct.unpack_from(">H", data, start + 40)
    width, height = max(width, right - left), max(height, bottom - top)
    _limit_slow("JPEG 2000", width, height)
    if components > 4:
        raise RowError(UNSUPPORTED, f"a JPEG 2000 image of {components} components, which is not supported")
    tiles = -(-right // max(tile_width, 1)) * -(-bottom // max(tile_height, 1))
    if tiles > _MAX_PARTS:
        raise _damaged(f"JPEG 2000 of {tiles} tiles")
    _limit_packets(data, start, max(width, 1), max(height, 1), tiles, components)
    return Header("jpeg2000", width, height)


def _limit_packets(data: bytes, start: int, width: int, height: int, tiles: int, components: int) -> None:
    """Refuse a code stream of more packets than real ones have: memory is reserved for each, whatever the file's length."""
    position = start + 2
    while data[position] == 0xFF and data[position + 1] != 0x90:  # up to the first tile
        marker = data[position + 1]
        (length,) = struct.unpack_from(">H", data, position + 2)
        if marker == 0x52:  # COD: style, progression, layers, transform, levels, block, precincts of each level
            style, layers, levels = data[position + 4], *struct.unpack_from(">HxB", data, position + 6)
            packets = 0
            for level in range(levels + 1):
                size = data[position + 14 + level] if style & 1 else 0xFF
                scale = 1 << min(levels - level, 32)
                across, down = -(-width // scale) >> (size & 15), -(-height // scale) >> (size >> 4)
                packets += (across + 1) * (down + 1)
            if packets * components > _MAX_PRECINCTS or (packets * components + tiles) * layers > _MAX_PACKETS:
                raise _damaged("JPEG 2000 of millions of packets")
        position += 2 + length


def _heif(data: bytes) -> Header:
    # ISO/IEC 23008-12: meta/iprp/ipco/ispe. The largest one, as grids and thumbnails have their own. The plugins tell the
    # orientation (irot, imir) when they open the file.
    kind = sniff(data)
    sizes: list[tuple[int, int]] = []
    _walk_boxes(data, 0, len(data), sizes, 0)
    if not sizes:
        raise _damaged(f"{kind.upper()} without image dimensions")
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    return Header(kind, width, height)


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
            raise _damaged("truncated file: a box reaches beyond the end of the file")
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
    "avif": _heif,
    "heic": _heif,
    "ico": _ico,
    "pnm": _pnm,
    "tga": _tga,
    "jpeg2000": _jpeg2000,
}
