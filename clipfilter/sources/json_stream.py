"""A JSON document of any size, value by value: its items, or what stands under the keys of its object."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

_PIECE = 1 << 16  # characters read at least
_LONGEST = 16 << 20  # characters of one value
_BLANK = re.compile(r"[\s,]*")
_DECODER = json.JSONDecoder()


class Part(NamedTuple):
    """One value. section: "" for an item of the list that the document is, else the key of the object it stands under.

    raw: its text; inside: whether it is an item of a list of objects, which are handed out one by one.
    """

    section: str
    raw: str
    value: Any
    inside: bool


def parts(handle: TextIO) -> Iterator[Part]:
    """The values of a document in its order; memory for the largest of them. Raises ValueError where it is no JSON."""
    text = _Window(handle)
    opening = text.peek()
    if opening == "[":
        text.skip()
        yield from _items(text, "")
    elif opening == "{":
        text.skip()
        while text.peek() != "}":
            _, key = text.value()
            if not isinstance(key, str) or text.peek() != ":":
                raise ValueError("a key is missing")
            text.skip()
            if text.peek() == "[" and text.objects():
                text.skip()
                yield from _items(text, key)
            else:
                raw, value = text.value()
                yield Part(key, raw, value, False)
        text.skip()
    else:
        raise ValueError("it is neither a list nor an object")
    if text.peek():
        raise ValueError("something stands behind its end")


def _items(text: _Window, section: str) -> Iterator[Part]:
    while text.peek() != "]":
        yield Part(section, *text.value(), True)
    text.skip()


class _Window:
    """The part of a text that is being decoded."""

    def __init__(self, handle: TextIO) -> None:
        self._handle, self._text, self._at = handle, "", 0

    def peek(self) -> str:
        """The next character that is neither white space nor a comma, "" at the end."""
        while True:
            self._at = _BLANK.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def skip(self) -> None:
        self._at += 1

    def objects(self) -> bool:
        """Whether the list that begins here has an object first."""
        while True:
            first = _BLANK.match(self._text, self._at + 1)
            if first is not None and first.end() < len(self._text):
                return self._text[first.end()] == "{"
            if not self._more():
                return False

    def value(self) -> tuple[str, Any]:
        """The text of the value that begins here, and the value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except ValueError:
                if len(self._text) - self._at > _LONGEST or not self._more():
                    raise
                continue
            except RecursionError as error:
                raise ValueError("it is nested too deeply") from error
            if end == len(self._text) and self._more():  # a number may go on
                continue
            raw, self._at = self._text[self._at : end], end
            return raw, value

    def _more(self) -> bool:
        """Read as much again as is held, so that a long value is not decoded again and again."""
        held = self._text[self._at :]
        piece = self._handle.read(max(_PIECE, len(held)))
        self._text, self._at = held + piece, 0
        return bool(piece)
