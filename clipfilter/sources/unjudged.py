"""Pictures in columns that are not the image column: nobody judges them, so they are taken out of what is written."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.parse

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter.sources.contents import HEAD_BYTES, told_by_content
from clipfilter.sources.schema import is_binary, is_list, is_text

#: How the base64 of a picture, or a data: URL with one, begins: JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and HEIC.
_BASE64 = r"^\s*(?:data:image/|/9j/|iVBORw0KGgo|UklGR|R0lGODdh|R0lGODlh|Qk0|SUkq|TU0AK|AAAA[A-Z][GH]Z0eX)"
_BASE64_BEGIN = re.compile(_BASE64)
_SHORTEST = 64  # characters; less is a word that happens to begin so


def is_base64_picture(text: str) -> bool:
    """Whether a text is a picture in base64, or a data: URL of one."""
    return len(text) >= _SHORTEST and _BASE64_BEGIN.match(text) is not None


def from_data_url(url: str) -> bytes:
    """What a data: URL holds."""
    header, _, payload = url.partition(",")
    return from_base64(payload) if header.lower().endswith(";base64") else urllib.parse.unquote_to_bytes(payload)


def from_base64(text: str) -> bytes:
    """The bytes of base64 in either alphabet, with or without line breaks and padding; of anything else the text itself."""
    plain = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError):
        return text.encode("utf-8", "replace")


def without_pictures(column: pa.Array) -> tuple[pa.Array, int]:
    """The column with null in place of every picture (in bytes or base64, also inside lists and structs), and how many."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        values, count = without_pictures(column.dictionary)
        return (pa.DictionaryArray.from_arrays(column.indices, values), count) if count else (column, 0)
    if is_binary(kind) or is_text(kind):
        return _blanked(column)
    if pa.types.is_struct(kind):
        found = [without_pictures(child) for child in column.flatten()]
        if not any(count for _, count in found):
            return column, 0
        fields = [kind.field(number).with_nullable(True) for number in range(kind.num_fields)]
        made = pa.StructArray.from_arrays([child for child, _ in found], fields=fields, mask=column.is_null())
        return made, sum(count for _, count in found)
    if is_list(kind):
        values, count = without_pictures(pc.list_flatten(column))
        if not count:
            return column, 0
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
        made = pa.LargeListArray.from_arrays(offsets, values, mask=column.is_null())
        return (made if pa.types.is_fixed_size_list(kind) else made.cast(kind)), count
    return column, 0


def _blanked(column: pa.Array) -> tuple[pa.Array, int]:
    if is_text(column.type):
        begins = pc.match_substring_regex(column, _BASE64)
        found = pc.fill_null(pc.and_(begins, pc.greater_equal(pc.binary_length(column), _SHORTEST)), False)
        found = found.to_numpy(zero_copy_only=False)
    else:
        heads = pc.binary_slice(pc.cast(column, pa.large_binary()), 0, HEAD_BYTES).to_pylist()
        found = np.array([bool(head) and bool(told_by_content(head)) for head in heads], bool)
    count = int(found.sum())
    return (pc.if_else(pa.array(~found), column, pa.scalar(None, column.type)), count) if count else (column, 0)
