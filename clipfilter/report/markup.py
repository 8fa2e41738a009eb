"""The few HTML building blocks that several sections use. Arguments are HTML already escaped, unless said otherwise."""

from __future__ import annotations

from collections.abc import Sequence

from clipfilter.report import text


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str = "", attributes: str = "") -> str:
    """A table whose first column heads its rows. A column title that begins with "#" holds numbers, with "~" a bar."""
    classes = [{"#": ' class="num"', "~": ' class="wide"'}.get(title[:1], "") for title in columns]
    head = "".join(
        f'<th scope="col"{look}>{title.lstrip("#~")}</th>' for title, look in zip(columns, classes, strict=True)
    )
    body = ""
    for row in rows:
        cells = "".join(f"<td{look}>{cell}</td>" for cell, look in zip(row[1:], classes[1:], strict=True))
        body += f'<tr><th scope="row">{row[0]}</th>{cells}</tr>\n'
    title = f'<caption class="note">{caption}</caption>' if caption else ""
    head = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    return f'<div class="scroll"><table{attributes}>{title}{head}<tbody>\n{body}</tbody></table></div>'


def dot(name: str) -> str:
    """The coloured dot of a legend."""
    circle = f'<circle class="{name}" cx="5" cy="5" r="5"/>'
    return f'<svg class="dot" width="10" height="10" aria-hidden="true">{circle}</svg>'


def note(said: str) -> str:
    return f'<p class="note">{said}</p>' if said else ""


def items(found: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{item}</li>' for item in found)}</ul>" if found else ""


def place_of(key: str, path: str) -> str:
    """Key and shard of an image (plain text), for people; the root of a folder needs no name."""
    return " · ".join(f"<bdi>{text.esc(part, 120)}</bdi>" for part in (key, path) if part not in ("", "."))


def plural(count: int, word: str) -> str:
    """For example "1 shard" and "7 shards"."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
