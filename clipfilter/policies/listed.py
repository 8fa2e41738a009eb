"""Kinds of rules that read lists: questions about captions, and known pictures."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo, model_serializer, model_validator

from clipfilter.errors import RefusedError
from clipfilter.policies import captions
from clipfilter.policies import hashes as known
from clipfilter.policies.language.attachments import Attachment, Attachments, attach
from clipfilter.policies.language.fields import Model, fail, shown, suggest, text
from clipfilter.policies.language.values import Whole

# ---------------------------------------------------------------- captions


def _names(value: Any) -> Any:
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


class Listed(Model):
    """A list written in the policy, or in a file beside it."""

    rows: tuple[str, ...] | None = None
    source: Attachment | None = None

    @model_serializer
    def _plain(self) -> Any:
        return list(self.rows) if self.rows is not None else {"sha256": self.source.sha256 if self.source else None}


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
    return _filed(value, info, lambda path, sha256: captions.read_entries(path, sha256))


def _hashes(kind: str) -> Any:
    def check(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list | tuple):
            if not value:
                fail("the list of hashes is empty")
            for place, word in enumerate(value):
                problem = known.bad_hash(word.lower(), kind) if isinstance(word, str) else f"{shown(word)} is not text"
                if problem:
                    fail(f"{problem}; put it in quotes", place)
            return {"rows": tuple(word.lower() for word in value)}
        return _filed(value, info, lambda path, sha256: known.read_hashes(path, kind, sha256))

    return check


def _filed(value: Any, info: ValidationInfo, read: Any) -> Any:
    """The file's hash, after its content was found good where the file is here."""
    source = attach(value, info)
    if isinstance(value, str) or "file" in value:
        attachment = Attachment.model_validate(source)
        try:
            read(Attachments().path(attachment), attachment.sha256)
        except RefusedError as error:
            fail(str(error))
    return {"source": source}


class Text(Model):
    """A question about the caption (or another text column)."""

    language: Annotated[tuple[str, ...], BeforeValidator(_names)] | None = None
    language_column: Annotated[str, BeforeValidator(text("language_column", 200))] | None = None
    matches: Annotated[tuple[str, ...], BeforeValidator(_patterns)] | None = None
    block_list: Annotated[Listed, BeforeValidator(_entries)] | None = None
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

    @property
    def question(self) -> str:
        return next(name for name in ("language", "matches", "block_list") if getattr(self, name) is not None)

    def labels(self, files: Attachments) -> tuple[str, ...]:
        """What can be shown as the reason: languages, patterns or entries, by the positions that its judge gives."""
        if self.language is not None:
            return captions.LANGUAGES
        if self.matches is not None:
            return self.matches
        return self._entries_of(files)

    def judge(self, files: Attachments) -> captions.Judge:
        """What answers the question for one text. Raises RefusedError where a package or file is missing."""
        if self.language is not None:
            return captions.language_judge(self.language)
        if self.matches is not None:
            return captions.pattern_judge(self.matches)
        return captions.block_list_judge(self._entries_of(files))

    def _entries_of(self, files: Attachments) -> tuple[str, ...]:
        assert self.block_list is not None
        if self.block_list.rows is not None:
            return self.block_list.rows
        assert self.block_list.source is not None
        return captions.read_entries(files.path(self.block_list.source), self.block_list.source.sha256)


# ---------------------------------------------------------------- known pictures


class Known(Model):
    """A list of hashes: of files (sha256), or perceptual ones (as `cf_phash`) within a Hamming distance."""

    sha256: Annotated[Listed, BeforeValidator(_hashes("sha256"))] | None = None
    phash: Annotated[Listed, BeforeValidator(_hashes("phash"))] | None = None
    distance: Whole | None = None

    @model_validator(mode="after")
    def _one_list(self) -> Known:
        if (self.sha256 is None) == (self.phash is None):
            fail("a known rule has exactly one list: sha256 or phash")
        if self.sha256 is not None and self.distance is not None:
            fail("distance belongs to phash; a sha256 is the same or it is not", "distance", key=True)
        if self.phash is not None and self.distance is None:
            fail(f"phash needs a distance, the bits that may differ (0 to {known.MAX_DISTANCE})", "phash", key=True)
        if self.distance is not None and self.distance > known.MAX_DISTANCE:
            fail(
                f"distance is {self.distance}, but beyond {known.MAX_DISTANCE} of 64 bits unrelated pictures match",
                "distance",
            )
        return self

    @property
    def kind(self) -> str:
        return "sha256" if self.sha256 is not None else "phash"

    @property
    def listed(self) -> Listed:
        """The list."""
        found = self.sha256 or self.phash
        assert found is not None
        return found

    def hashes(self, files: Attachments) -> tuple[str, ...]:
        """Its hashes in hex. Raises RefusedError."""
        if self.listed.rows is not None:
            return self.listed.rows
        assert self.listed.source is not None
        return known.read_hashes(files.path(self.listed.source), self.kind, self.listed.source.sha256)
