"""Rules that read columns instead of embeddings: numbers, texts, and hashes of known pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.policies import captions, columns
from clipfilter.policies.hashes import DigestTable, PerceptualIndex, phash_values, sha256_digests
from clipfilter.policies.language.attachments import Attachments
from clipfilter.policies.language.conditions import check_condition, is_text
from clipfilter.policies.language.fields import suggest
from clipfilter.policies.language.schema import Rule

_CAPTION = cf.CAPTION
_Answer = Callable[[pa.Table], tuple[np.ndarray, np.ndarray | None]]


@dataclass(frozen=True)
class ColumnRule:
    """One such rule, ready. labels: what its reasons can name; `first` is where they begin among the policy's labels."""

    labels: tuple[str, ...]
    first: int
    answer: _Answer

    def scores(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray | None]:
        """Scores float64 [n], NaN where the row has no value, and labels int32 [n] (-1 for none), None for numbers."""
        values, found = self.answer(table)
        if found is not None:
            found = np.where(found >= 0, found + np.int32(self.first), np.int32(-1)).astype(np.int32)
        return values, found

    @classmethod
    def of(cls, rule: Rule, files: Attachments, first: int) -> ColumnRule | None:
        """The rule compiled, None where it does not read columns. Raises RefusedError."""
        number = rule.number
        if number is not None:
            return cls((), first, lambda table: (columns.metadata_values(number, table), None))
        if rule.text is not None and rule.text.language_column is not None:
            return cls((), first, _language_column(rule.text.language_column, rule.text.language or ()))
        if rule.text is not None:
            judge, column = rule.text.judge(files), rule.text.column or _CAPTION
            return cls(rule.text.labels(files), first, lambda table: _texts(judge, column, table))
        if rule.known is not None:
            return cls((), first, _known(rule, files))
        return None


def _texts(judge: captions.Judge, column: str, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    if column == _CAPTION and column not in table.column_names:
        return np.full(table.num_rows, np.nan), np.full(table.num_rows, -1, dtype=np.int32)
    return captions.judge_column(judge, _column(table, column))


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    _check_text(name, table.schema)
    return table.column(name)


def _language_column(name: str, wanted: tuple[str, ...]) -> _Answer:
    def answer(table: pa.Table) -> tuple[np.ndarray, None]:
        # "en-GB" and "EN" are English.
        def score(value: str | None) -> float:
            if not value:
                return np.nan
            return float(value.replace("_", "-").split("-")[0].strip().lower() in wanted)

        return np.array([score(value) for value in _column(table, name).to_pylist()], dtype=np.float64), None

    return answer


def _known(rule: Rule, files: Attachments) -> _Answer:
    assert rule.known is not None
    hashes = rule.known.hashes(files)
    if rule.known.kind == "sha256":
        digests = DigestTable.of(sha256_digests(hashes))

        def same(table: pa.Table) -> tuple[np.ndarray, None]:
            given = _hash_column(table, cf.SHA256).to_pylist()
            found = (digests.find(sha256_digests(given)) >= 0).astype(np.float64)
            found[[value is None for value in given]] = np.nan
            return found, None

        return same
    index = PerceptualIndex.of(phash_values(hashes), rule.known.distance or 0)

    def alike(table: pa.Table) -> tuple[np.ndarray, None]:
        column = _hash_column(table, cf.PHASH)
        bits = index.nearest(np.asarray(column.fill_null(0).to_numpy(), dtype=np.uint64))
        return np.where(np.asarray(column.is_valid()), 1.0 - bits / 64.0, np.nan), None

    return alike


def _hash_column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise RefusedError(f"a list of known pictures needs the column {name!r}, which this data does not have")
    return table.column(name)


def check_columns(rule: Rule, schema: pa.Schema) -> None:
    """Refuse a rule whose columns data with this schema does not have. Captions are never refused: where there are none,
    the rule's `on_missing` applies."""
    if rule.number is not None:
        columns.check_metadata(rule.number, schema)
    if rule.text is not None:
        for name in (rule.text.language_column, rule.text.column):
            if name is not None:
                _check_text(name, schema)
    if rule.when is not None:
        check_condition(rule.when, schema)


def _check_text(name: str, schema: pa.Schema) -> None:
    index = schema.get_field_index(name)
    if index < 0:
        texts = [field.name for field in schema if is_text(field.type)]
        raise RefusedError(
            f"the text rule needs the column {name!r}, which this data does not have"
            + (suggest(name, texts) or f" (texts here: {', '.join(texts)[:300]})")
        )
    if not is_text(schema.field(index).type):
        raise RefusedError(f"the column {name!r} holds {schema.field(index).type}, and a text rule reads texts")
