"""The contact sheet: thumbnails of the hits on one PNG, each with its rank and cosine."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from clipfilter import columns as cf
from clipfilter import defaults, text
from clipfilter.policies import escalated
from clipfilter.report.examples import Example, Examples
from clipfilter.report.thumbnails import add_thumbnails
from clipfilter.runs import RunVectors
from clipfilter.search import SearchResult

#: Pixels of a cell's picture, of the lines below it, and between cells; cells in a row.
SIDE = 224
_LINES = 44
_GAP = 16
_COLUMNS = 5
_BACKGROUND, _EMPTY, _INK, _DIM = (255, 255, 255), (236, 238, 241), (24, 28, 33), (104, 112, 122)
_DECISIONS = {"keep": (26, 127, 55), "review": (154, 103, 0), "reject": (207, 34, 46)}
#: Annotated columns that the sheet needs of each hit.
_NEEDED = (cf.ROW, cf.KEY, cf.SHA256, cf.DECISION, cf.REASONS)


def contact_sheet(
    vectors: RunVectors, result: SearchResult, mode: str = defaults.THUMBNAILS
) -> tuple[bytes, str | None]:
    """(PNG, a sentence about pictures that could not be had) of a search's hits, read again from the source.

    mode: "blur" blurs rows that a policy did not keep, in the pixels themselves; "show" shows them clearly. Rows that a
    policy escalated (band "escalate") are never read and never shown.
    """
    table = vectors.rows_at(result.positions, _NEEDED)
    hidden = escalated(table[cf.REASONS]).tolist()
    rows = table.drop_columns([cf.REASONS]).to_pylist()
    cosines = result.hits["cosine"].to_pylist()
    numbers, _ = vectors.locate(result.positions)
    examples = Examples()
    shown: list[Example | None] = []
    for row, cosine, number, never in zip(rows, cosines, numbers.tolist(), hidden, strict=True):
        if never:
            shown.append(None)
            continue
        shard = vectors.shards[number]
        examples.shards[shard.name] = shard.shard
        shown.append(
            Example(
                commit=shard.name,
                path=shard.shard.path,
                row=row[cf.ROW],
                key=row[cf.KEY] or "",
                caption=None,
                sha256=row[cf.SHA256],
                decision=row[cf.DECISION] or "keep",  # nothing was decided, so nothing is hidden
                score=cosine,
                reasons=[],
            )
        )
    examples.by_bucket["", "hits"] = [example for example in shown if example is not None]
    problem = add_thumbnails(examples, vectors.plan.dataset, mode)
    return _draw(rows, cosines, shown), problem


def _draw(rows: list[dict[str, Any]], cosines: list[float], shown: list[Example | None]) -> bytes:
    columns = max(1, min(_COLUMNS, len(rows)))
    lines = max(1, -(-len(rows) // columns))
    size = (columns * (SIDE + _GAP) + _GAP, lines * (SIDE + _LINES + _GAP) + _GAP)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(12)
    for place, (row, cosine, example) in enumerate(zip(rows, cosines, shown, strict=True)):
        left = _GAP + place % columns * (SIDE + _GAP)
        top = _GAP + place // columns * (SIDE + _LINES + _GAP)
        draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=_EMPTY)
        if example is not None and example.image is not None:
            with Image.open(
                io.BytesIO(base64.b64decode(example.image.partition(",")[2])), formats=("JPEG",)
            ) as picture:
                offset = ((SIDE - picture.width) // 2, (SIDE - picture.height) // 2)
                sheet.paste(picture, (left + offset[0], top + offset[1]))
        else:
            sentence = "escalated: not shown" if example is None else "not available"
            draw.text((left + SIDE // 2, top + SIDE // 2), sentence, _DIM, plain, anchor="mm")
        base = top + SIDE + 6
        draw.text((left, base), f"{place + 1}", _INK, bold)
        draw.text((left + SIDE, base), f"{cosine:.3f}", _INK, bold, anchor="ra")
        decision = row[cf.DECISION]
        if decision:
            draw.text((left + SIDE // 2, base), decision, _DECISIONS.get(decision, _DIM), bold, anchor="ma")
        draw.text((left, base + 21), _fitted(draw, text.clean(row[cf.KEY] or "", 80), plain), _DIM, plain)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _fitted(draw: ImageDraw.ImageDraw, words: str, font: Any) -> str:
    """Cut to the width of a cell."""
    while words and draw.textlength(words, font) > SIDE:
        words = words[:-2].rstrip("…") + "…" if len(words) > 2 else ""
    return words
