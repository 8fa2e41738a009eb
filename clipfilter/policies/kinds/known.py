"""Known pictures: whether a row is on a list of hashes, and what happens to it then."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema, model_validator

from clipfilter import columns as cf
from clipfilter.decisions import ESCALATE, LIMITS
from clipfilter.policies.hashes import (
    MAX_DISTANCE,
    DigestTable,
    PerceptualIndex,
    bad_hash,
    phash_values,
    read_hashes,
    sha256_digests,
)
from clipfilter.policies.kinds.base import Answer, Measure, Words, numbers_answer
from clipfilter.policies.parts.attachments import Attachments, Listed, filed
from clipfilter.policies.parts.bands import Band
from clipfilter.policies.parts.columns import column_type
from clipfilter.policies.parts.fields import TEXTS_OR_FILE, Whole, fail, shown, suggest


def _hashes(kind: str) -> Any:
    def check(value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, list | tuple):
            if not value:
                fail("the list of hashes is empty")
            for place, word in enumerate(value):
                problem = bad_hash(word.lower(), kind) if isinstance(word, str) else f"{shown(word)} is not text"
                if problem:
                    fail(f"{problem}; put it in quotes", place)
            return {"rows": tuple(word.lower() for word in value)}
        return filed(value, info, lambda path, sha256: read_hashes(path, kind, sha256))

    return check


class Known(Measure):
    """A list of hashes: of files (sha256), or perceptual ones (as `cf_phash`) within a Hamming distance."""

    kind = "known"
    about = "Whether the picture is on a list of hashes; its action says what happens then."
    measures = False
    actions = (ESCALATE, *reversed(LIMITS))
    own_actions = {  # noqa: RUF012
        ESCALATE: "escalate belongs to known rules: only a picture on a list of hashes is escalated, never one that "
        "resembles words"
    }
    file_keys = ("sha256", "phash")

    sha256: Annotated[Listed, BeforeValidator(_hashes("sha256")), WithJsonSchema(TEXTS_OR_FILE)] | None = None
    phash: Annotated[Listed, BeforeValidator(_hashes("phash")), WithJsonSchema(TEXTS_OR_FILE)] | None = None
    distance: Whole | None = None

    @model_validator(mode="after")
    def _one_list(self) -> Known:
        if (self.sha256 is None) == (self.phash is None):
            fail("a known rule has exactly one list: sha256 or phash")
        if self.sha256 is not None and self.distance is not None:
            fail("distance belongs to phash; a sha256 is the same or it is not", "distance", key=True)
        if self.phash is not None and self.distance is None:
            fail(f"phash needs a distance, the bits that may differ (0 to {MAX_DISTANCE})", "phash", key=True)
        if self.distance is not None and self.distance > MAX_DISTANCE:
            fail(
                f"distance is {self.distance}, but beyond {MAX_DISTANCE} of 64 bits unrelated pictures match",
                "distance",
            )
        return self

    @property
    def hashed(self) -> str:
        """What the hashes are of."""
        return "sha256" if self.sha256 is not None else "phash"

    @property
    def listed(self) -> Listed:
        """The list."""
        found = self.sha256 or self.phash
        assert found is not None
        return found

    def check_rule(self, rule: Any) -> None:
        if rule.action is not None and rule.action not in self.actions:
            fail(
                f"the action of a known rule is one of {', '.join(self.actions)}, not {shown(rule.action)}"
                + suggest(rule.action, self.actions),
                "action",
            )

    def check_place(self, rule: Any, earlier: Mapping[str, Any], all_ids: set[str], decides: bool) -> None:
        if decides and rule.action is None:
            fail(f"the known rule {rule.id!r} needs an action: {', '.join(self.actions)}", self.kind, key=True)

    def check_band(self, band: Band, *at: str | int) -> None:
        fail(f"a known rule has no bands; its action is one of {', '.join(self.actions)}", *at, key=True)

    def answer(self, thresholds: Sequence[float], files: Attachments) -> Answer:
        hashes = self.listed.read(files, lambda path, sha256: read_hashes(path, self.hashed, sha256))
        return numbers_answer(
            _same(hashes) if self.hashed == "sha256" else _alike(hashes, self.distance or 0), thresholds
        )

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        if "sha256" in spec:
            return ["Whether the very file is on a list of known ones: 1 or 0."]
        return [
            f"Whether the picture resembles one on a list of known ones: at most {spec['distance']} of 64 bits of their "
            "perceptual hashes differ. The score is the share of bits that agree, 0 beyond."
        ]

    @classmethod
    def measured(cls, spec: Any) -> Words:
        return [f"known {'sha256' if 'sha256' in spec else 'phash'}"]

    @classmethod
    def verdict(cls, measured: str, score: float, result: str) -> str | None:
        if score == 0.0:
            return "is on no list of this rule"
        bits = round((1.0 - score) * 64)
        how = "the very file" if "sha256" in measured else f"{bits} of 64 bits differ"
        does = {ESCALATE: "is escalated", "reject": "is rejected", "review": "goes to review"}
        return f"is on the list of known pictures ({how}), so it {does.get(result, 'is on record')}"


def _same(hashes: Sequence[str]) -> Callable[[pa.Table], np.ndarray]:
    """1 for files whose sha256 is listed, else 0."""
    digests = DigestTable.of(sha256_digests(hashes))

    def scores(table: pa.Table) -> np.ndarray:
        given = _hash_column(table, cf.SHA256).to_pylist()
        found = (digests.find(sha256_digests(given)) >= 0).astype(np.float64)
        found[[value is None for value in given]] = np.nan
        return found

    return scores


def _alike(hashes: Sequence[str], distance: int) -> Callable[[pa.Table], np.ndarray]:
    """The share of bits that agree with the nearest listed hash, 0 beyond `distance`."""
    index = PerceptualIndex.of(phash_values(hashes), distance)

    def scores(table: pa.Table) -> np.ndarray:
        column = _hash_column(table, cf.PHASH)
        bits = index.nearest(np.asarray(column.fill_null(0).to_numpy(), dtype=np.uint64))
        return np.where(np.asarray(column.is_valid()), 1.0 - bits / 64.0, np.nan)

    return scores


def _hash_column(table: pa.Table, name: str) -> pa.ChunkedArray:
    column_type(name, table.schema, "a list of known pictures")
    return table.column(name)
