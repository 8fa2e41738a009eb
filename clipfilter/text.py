"""Text for people: visible and short, without secrets; numbers, times and sizes as people read them."""

from __future__ import annotations

import math
import re
import unicodedata
from datetime import UTC, datetime

_SPACES = {ord(character): " " for character in "\t\n\r\x0b\x0c\u0085\u2028\u2029"}
#: Format characters that text in some scripts and emoji need; all others (bidirectional controls, tags) are replaced.
_JOINERS = "\u200c\u200d"
_CREDENTIALS = re.compile(r"://[^/\s@]{1,200}@")
_QUERY = re.compile(r"(://[^\s?#]{1,2000})[?#]\S{1,4000}")


def visible(text: object) -> str:
    """Text without what cannot be seen: control and direction-changing characters are U+FFFD, line breaks stay."""
    value = str(text)
    if value.isascii() and value.isprintable():  # long data, at once
        return value
    return "".join(c if c == "\n" or shown(c) else "\ufffd" for c in value)


def spreadsheet(value: object) -> object:
    """A value for a CSV file that people open: text of anybody's must not become a formula there."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r\n") else value


def clean(text: object, limit: int = 400) -> str:
    """One line of visible text, at most `limit` characters: line breaks and other white space become single spaces."""
    value = " ".join(visible(str(text)[: limit * 4].translate(_SPACES)).split())
    return value if len(value) <= limit else value[: limit - 1].rstrip() + "…"


def clean_block(text: str, limit: int) -> str:
    """Visible text of several lines, cut after `limit` characters."""
    return visible(text[:limit]) + ("\n… (cut)" if len(text) > limit else "")


def place(url: object) -> str:
    """A URL, path or message, its URLs without user name, password, query or fragment, which may hold secrets."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("://", clean(url, 2000)))


def shown(character: str) -> bool:
    """False for control, bidirectional and other invisible characters, unassigned ones and lone surrogates."""
    category = unicodedata.category(character)
    return category not in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp") or character in _JOINERS


def number(value: float) -> str:
    """A whole number, its thousands apart."""
    return f"{value:,.0f}"


def plural(count: int, word: str) -> str:
    """For example "1 shard" and "7 shards"."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def share(part: float, whole: float) -> str:
    """A percentage that never says 0 or 100 where that is not exact."""
    if not whole:
        return "–"
    value = part / whole
    if 0 < value < 0.0005:
        return "<0.1%"
    if 0.9995 <= value < 1:
        return ">99.9%"
    return f"{value:.1%}"


def score(value: float | None, beside: float | None = None) -> str:
    """A score with three decimals, or as many (up to six) as it takes to tell it from `beside`."""
    if value is None or math.isnan(value):
        return "none"
    if value == int(value) and abs(value) < 1e15 and (beside is None or beside == int(beside)) and abs(value) >= 2:
        return f"{value:,.0f}"
    if 0 < abs(value) < 0.0005 and (beside is None or abs(beside) >= 0.001):
        return "<0.001" if value > 0 else ">−0.001"
    for decimals in (3, 4, 5, 6):
        shown = f"{value:,.{decimals}f}" if abs(value) < 1e7 else f"{value:.4g}"
        if beside is None or value == beside or shown != f"{beside:,.{decimals}f}":
            break
    return shown.replace("-", "−")


def threshold(value: float) -> str:
    """A threshold as short as it can be said."""
    shown = f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"
    return shown.replace("-", "−")


def duration(seconds: float) -> str:
    if 0 < seconds < 0.05:
        return "<0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"


def size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def moment(unix: float | None) -> str:
    """A Unix time as "5 March 2026, 14:02 UTC"."""
    if unix is None:
        return "at an unknown time"
    return datetime.fromtimestamp(unix, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
