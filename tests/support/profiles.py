"""ICC profiles of displays, made from their primaries: what cameras, phones and editors embed in pictures."""

from __future__ import annotations

import struct
from typing import NamedTuple

from PIL import Image, ImageCms

XYZ = tuple[float, float, float]
_WHITE: XYZ = (0.9642, 1.0, 0.8249)  # D50, the white of all profiles


class Space(NamedTuple):
    """primaries: X, Y and Z of red, green and blue, adapted to D50. gamma: None is sRGB's curve."""

    primaries: tuple[XYZ, XYZ, XYZ]
    gamma: float | None


SPACES = {
    "sRGB": Space(((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.7141)), None),
    "Adobe RGB": Space(
        ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)), 2.19921875
    ),
    "Display P3": Space(((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407)), None),
    "ProPhoto": Space(((0.79767, 0.28804, 0.0), (0.13519, 0.71188, 0.0), (0.03134, 0.00009, 0.82491)), 1.8),
}


def profile(name: str) -> bytes:
    """A version 4 profile of matrix and curves."""
    space = SPACES[name]
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round((space.gamma or 0) * 256)) + b"\0\0"
    if space.gamma is None:
        values = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
        curve = b"para\0\0\0\0\0\3\0\0" + b"".join(_fixed(value) for value in values)
    colours = {tag: _xyz(xyz) for tag, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), space.primaries, strict=True)}
    return _profile(b"RGB ", name, {b"wtpt": _xyz(_WHITE), **colours, b"rTRC": curve, b"gTRC": curve, b"bTRC": curve})


def gray_profile(gamma: float) -> bytes:
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    return _profile(b"GRAY", f"gamma {gamma}", {b"wtpt": _xyz(_WHITE), b"kTRC": curve})


def converted(image: Image.Image, space: bytes) -> Image.Image:
    """An sRGB picture with the numbers that the profile `space` gives the same colours."""
    return ImageCms.profileToProfile(  # type: ignore[return-value]
        image, ImageCms.createProfile("sRGB"), ImageCms.ImageCmsProfile(_file(space)), outputMode=image.mode
    )


def _file(data: bytes):  # type: ignore[no-untyped-def]
    import io

    return io.BytesIO(data)


def _profile(space: bytes, name: str, tags: dict[bytes, bytes]) -> bytes:
    text = name.encode("utf-16-be")
    words = b"mluc\0\0\0\0" + struct.pack(">II", 1, 12) + b"enUS" + struct.pack(">II", len(text), 28) + text
    tags = {b"desc": words, b"cprt": words, **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", start + len(body), 0x04200000, b"mntr", space, b"XYZ ", b"acsp")
    head += bytes(28) + b"".join(_fixed(value) for value in _WHITE)
    return head.ljust(128, b"\0") + table + body


def _xyz(values: XYZ) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in values)


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65_536))
