"""Sentences about rules: plain words, and what people wrote, which every reader of it shows in its own safe way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_SHOWN = 8


@dataclass(frozen=True)
class Written:
    """A text from a policy: at most `limit` characters of it are shown. isolated: it may run in another direction."""

    text: str
    limit: int = 400
    isolated: bool = False


#: A sentence in parts; plain parts hold nothing that HTML would read.
Words = Sequence[str | Written]


def joined(words: Words, show: Callable[[Written], str]) -> str:
    """The sentence, what was written shown by `show`."""
    return "".join(show(part) if isinstance(part, Written) else part for part in words)


def phrase_list(phrases: Sequence[str]) -> list[str | Written]:
    """The first phrases, each in quotation marks."""
    parts: list[str | Written] = []
    for place, phrase in enumerate(phrases[:_SHOWN]):
        parts += [", “" if place else "“", Written(phrase, 120, isolated=True), "”"]
    return parts + ([f" and {len(phrases) - _SHOWN} more"] if len(phrases) > _SHOWN else [])
