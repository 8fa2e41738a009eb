"""What a file or member is by its first bytes, where its name does not say."""

from __future__ import annotations

from typing import Literal

from clipfilter.errors import UNSUPPORTED, RowError

#: How many first bytes are looked at.
HEAD_BYTES = 512


def told_by_content(head: bytes, *, text: bool = False) -> Literal["picture", "unsupported", ""]:
    """Whether these first bytes are those of a picture, or of a picture, drawing or film that is not read.

    text: the name says that it is text, so what could be read as text (a drawing in SVG among it) is taken for that.
    """
    if (
        not head or (text and head.isascii() and b"\0" not in head) or head[8:12] == b"WAVE"
    ):  # sound may go with pictures
        return ""
    from clipfilter.images import sniff

    try:
        sniff(head)
    except RowError as error:
        return "unsupported" if error.error_class == UNSUPPORTED else ""
    return "picture"
