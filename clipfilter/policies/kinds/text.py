"""Texts: questions about the caption, or another text column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema, model_validator

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.policies import captions
from clipfilter.policies.kinds.base import Answer, Measure, Words, Written, numbers_answer
from clipfilter.policies.parts.attachments import Attachments, Listed, filed
from clipfilter.policies.parts.columns import column_type, is_text
from clipfilter.policies.parts.fields import TEXT_OR_TEXTS, TEXTS_OR_FILE, fail, shown, suggest, text


def _languages(value: Any) -> Any:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not given:
        fail(f"language is a code or a list of codes, for example [en, fr], not {shown(value)}")
    for place, name in enumerate(given):
        if not isinstance(name, str):
            fail(f'a language is a code in quotes, for example "no", not {shown(name)}', place)
        if name not in captions.LANGUAGES:
            fail(
                f"{shown(name)} is no language code (ISO 639-1, such as en)" + suggest(name, captions.LANGUAGES), place
            )
    return tuple(sorted(set(given)))


def _patterns(value: Any) -> Any:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not given:
        fail(f"matches is a regular expression or a list of them, not {shown(value)}")
    if len(given) > captions.MAX_PATTERNS:
        fail(f"there are {len(given)} patterns, more than the {captions.MAX_PATTERNS} allowed", captions.MAX_PATTERNS)
    for place, pattern in enumerate(given):
        if not isinstance(pattern, str) or not pattern:
            fail(f"a pattern must be text, not {shown(pattern)}; put it in quotes", place)
        if len(pattern) > captions.MAX_PATTERN_CHARS:
            fail(f"the pattern has more than the {captions.MAX_PATTERN_CHARS} characters allowed", place)
        try:
            captions.compile_pattern(pattern)
        except ValueError as error:
            fail(f"the pattern {shown(pattern)} is not one that RE2 takes: {error}", place)
    return tuple(given)


def _entries(value: Any, info: ValidationInfo) -> Any:
    if isinstance(value, list | tuple):
        for place, entry in enumerate(value):
            if not isinstance(entry, str) or not entry.strip():
                fail(f"an entry must be text, not {shown(entry)}; put it in quotes", place)
            if len(entry) > captions.MAX_ENTRY_CHARS:
                fail(f"an entry has more than the {captions.MAX_ENTRY_CHARS} characters allowed", place)
        if not value:
            fail("the block list is empty")
        return {"rows": tuple(" ".join(entry.split()) for entry in value)}
    return filed(value, info, captions.read_entries)


class Text(Measure):
    """A question about the caption (or another text column)."""

    kind = "text"
    about = "Language, patterns or listed words in the caption or another column."
    file_keys = ("block_list",)
    found_as = "found"

    language: Annotated[tuple[str, ...], BeforeValidator(_languages), WithJsonSchema(TEXT_OR_TEXTS)] | None = None
    language_column: Annotated[str, BeforeValidator(text("language_column", 200))] | None = None
    matches: Annotated[tuple[str, ...], BeforeValidator(_patterns), WithJsonSchema(TEXT_OR_TEXTS)] | None = None
    block_list: Annotated[Listed, BeforeValidator(_entries), WithJsonSchema(TEXTS_OR_FILE)] | None = None
    column: Annotated[str, BeforeValidator(text("column", 200))] | None = None

    @model_validator(mode="after")
    def _one_question(self) -> Text:
        asked = [name for name in ("language", "matches", "block_list") if getattr(self, name) is not None]
        if len(asked) != 1:
            fail(
                "a text rule asks for exactly one of language, matches and block_list", *asked[1:2], key=bool(asked[1:])
            )
        if self.language_column is not None:
            if self.language is None:
                fail("language_column belongs to language", "language_column", key=True)
            if self.column is not None:
                fail("a language is read from language_column or told from the text of column", "column", key=True)
        return self

    def check_columns(self, schema: pa.Schema) -> None:
        """Captions are never refused: where there are none, the rule's `on_missing` applies."""
        for name in (self.language_column, self.column):
            if name is not None:
                _check_text(name, schema)

    def answer(self, thresholds: Sequence[float], files: Attachments) -> Answer:
        if self.language_column is not None:
            return numbers_answer(_language_column(self.language_column, self.language or ()), thresholds)
        judge, labels = self._judge(files)
        column = self.column or cf.CAPTION

        def exact(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
            if column == cf.CAPTION and column not in table.column_names:
                return np.full(table.num_rows, np.nan), np.full(table.num_rows, -1, dtype=np.int32)
            return captions.judge_column(judge, _text_column(table, column))

        return Answer.of_columns(exact, thresholds, labels)

    def _judge(self, files: Attachments) -> tuple[captions.Judge, tuple[str, ...]]:
        """What answers the question for one text, and the languages, patterns or entries that it names by their position.

        Raises RefusedError where a package or file is missing.
        """
        if self.language is not None:
            return captions.language_judge(self.language), captions.LANGUAGES
        if self.matches is not None:
            return captions.pattern_judge(self.matches), self.matches
        assert self.block_list is not None
        entries = self.block_list.read(files, captions.read_entries)
        return captions.block_list_judge(entries), entries

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        where = ["the column ", Written(spec["column"])] if "column" in spec else ["the caption"]
        if "language" in spec:
            names = ", ".join(spec["language"])
            if "language_column" in spec:
                return ["Whether the column ", Written(spec["language_column"]), f" says {names}: 1 or 0."]
            return ["How sure it is that ", *where, f" is written in {names}; 0 where another language is likelier."]
        what = "patterns" if "matches" in spec else "words of the block list"
        return [f"How many {what} are found in ", *where, "."]

    @classmethod
    def measured(cls, spec: Any) -> Words:
        where = Written(spec.get("column") or "the caption", 60)
        if "language" in spec:
            wanted = " or ".join(spec["language"][:6]) + (" and others" if len(spec["language"]) > 6 else "")
            if "language_column" in spec:
                return [Written(spec["language_column"], 60), f" says {wanted}:"]
            return ["confidence that ", where, f" is in {wanted}:"]
        return [f"number of {'patterns' if 'matches' in spec else 'listed words'} in ", where, ":"]

    @classmethod
    def is_whole(cls, spec: Any) -> bool:
        return True


def _text_column(table: pa.Table, name: str) -> pa.ChunkedArray:
    _check_text(name, table.schema)
    return table.column(name)


def _language_column(name: str, wanted: tuple[str, ...]) -> Callable[[pa.Table], np.ndarray]:
    # "en-GB" and "EN" are English.
    def score(value: str | None) -> float:
        if not value:
            return np.nan
        return float(value.replace("_", "-").split("-")[0].strip().lower() in wanted)

    return lambda table: np.array([score(value) for value in _text_column(table, name).to_pylist()], dtype=np.float64)


def _check_text(name: str, schema: pa.Schema) -> None:
    def hint() -> str:
        texts = [field.name for field in schema if is_text(field.type)]
        return suggest(name, texts) or f" (texts here: {', '.join(texts)[:300]})"

    kind = column_type(name, schema, "the text rule", hint)
    if not is_text(kind):
        raise RefusedError(f"the column {name!r} holds {kind}, and a text rule reads texts")
