"""Runs a policy's own tests: their images and captions go the way of every row of a job, and what comes out is compared."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from clipfilter import columns as cf
from clipfilter import defaults
from clipfilter.engine import (
    MAX_THREADS,
    StageTimes,
    ThreadDecoder,
    cpu_count,
    decode_batches,
    embed_rows,
)
from clipfilter.errors import MISSING_IMAGE, RefusedError
from clipfilter.images import DecodeSettings
from clipfilter.policies import BUILTINS, Expectation, Policy, RuleExpectation, compile_policy
from clipfilter.runs import annotate, decision_inputs
from clipfilter.sources import COLUMN_PREFIX, row_uid

if TYPE_CHECKING:
    from clipfilter.images import Mode
    from clipfilter.models import Encoder

_BATCH = 32
_GRAY = (128, 128, 128)


@dataclass
class RuleOutcome:
    """What a rule said: its band (keep, review, reject or missing) and score, None where it has none."""

    band: str
    score: float | None
    nearest: str | None = None
    contrast: str | None = None


@dataclass
class TestResult:
    """One test. decision: keep, review, reject, or failed where the image could not be used. problems: why it fails."""

    name: str
    image: str | None
    caption: str | None
    expected: str
    decision: str
    rules: dict[str, RuleOutcome] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems


@dataclass
class TestReport:
    """All tests of a policy with one model. notes: what the tests cannot say, in sentences."""

    policy: str
    version: int
    sha256: str
    model: str
    results: list[TestResult]
    notes: list[str]

    @property
    def failed(self) -> int:
        return sum(not result.passed for result in self.results)

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; `passed` of the whole and of every test."""
        value = asdict(self)
        notes, results = value.pop("notes"), value.pop("results")
        tests = [told | {"passed": result.passed} for told, result in zip(results, self.results, strict=True)]
        return {**value, "passed": self.failed == 0, "failed": self.failed, "notes": notes, "tests": tests}


def run_tests(policy: Policy, folder: str | Path, encoder: Encoder, *, decode: Mode = defaults.DECODE) -> TestReport:
    """Decide every test of the policy with this model.

    folder: what the tests' image paths are relative to. Rules that rank a dataset say nothing here.
    Raises RefusedError when the policy has no tests, or does not fit the model.
    """
    if not policy.tests:
        raise RefusedError(
            f"the policy {policy.name!r} has no tests; add `tests:` with images and what you expect of them."
        )
    compiled = compile_policy(policy, encoder, decode=decode)
    columns = _own_columns(policy)
    compiled.check_columns(pa.schema([*((name, pa.float64()) for name in columns), *decision_inputs()]))
    settings = DecodeSettings(encoder.preprocess, decode, defaults.MAX_PIXELS)
    batches = decode_batches(
        _batches(policy.tests, Path(folder), columns),
        ThreadDecoder(settings, min(MAX_THREADS, cpu_count())),
        encoder.preprocess.size,
        min(_BATCH, len(policy.tests)),
        StageTimes(),
    )
    embedded = embed_rows(
        batches, encoder, shard="tests", source_schema=pa.schema([(name, pa.float64()) for name in columns]),
        text=compiled.needs_text, captions="first", times=StageTimes(),
    )  # fmt: skip
    # No row lies beyond these: what a rank would say of single images means nothing.
    unranked: dict[str, float | None] = {
        entry.key: -math.inf if entry.tail == "top" else math.inf for entry in compiled.dataset_thresholds
    }
    table = annotate(embedded.rows, embedded.embeddings, encoder, compiled, unranked)
    rows = {row[cf.ROW]: row for row in table.to_pylist()}
    broken = {row[cf.ROW]: row for row in embedded.failed.to_pylist()}
    results = [
        _result(policy, test, place, rows.get(place), broken.get(place)) for place, test in enumerate(policy.tests)
    ]
    notes = list(compiled.warnings)
    if compiled.dataset_rules:
        notes.append(
            f"{', '.join(compiled.dataset_rules)}: ranks whole datasets, and says nothing in tests of single images"
        )
    return TestReport(policy.name, policy.version, policy.sha256, encoder.name, results, notes)


def _own_columns(policy: Policy) -> list[str]:
    """Columns of a source that the policy's metadata rules read."""
    named = [name for rule in policy.rules for name in rule.measure.numbers]
    given = [name for test in policy.tests for name in test.columns]
    return [name for name in dict.fromkeys([*named, *given]) if name not in BUILTINS and not name.startswith(cf.PREFIX)]


def _batches(tests: Sequence[Expectation], folder: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The tests as batches of a source."""
    for start in range(0, len(tests), _BATCH):
        part = list(enumerate(tests))[start : start + _BATCH]
        images = [_image(test, folder) for _, test in part]
        keys = [test.image or f"test {place + 1}" for place, test in part]
        yield pa.RecordBatch.from_pydict(
            {
                cf.ROW: [place for place, _ in part],
                cf.KEY: keys,
                cf.UID: [row_uid(str(place), key) for (place, _), key in zip(part, keys, strict=True)],
                cf.IMAGE: [image if isinstance(image, bytes) else None for image in images],
                cf.CAPTIONS: [[test.caption] if test.caption is not None else None for _, test in part],
                cf.ERROR_CLASS: [None if isinstance(image, bytes) else MISSING_IMAGE for image in images],
                cf.ERROR: [None if isinstance(image, bytes) else image for image in images],
                cf.SOURCE_JSON: [None] * len(part),
                **{name: [test.columns.get(name) for _, test in part] for name in columns},
            },
            schema=pa.schema([*COLUMN_PREFIX, *((name, pa.float64()) for name in columns)]),
        )


def _image(test: Expectation, folder: Path) -> bytes | str:
    """The encoded picture of a test, or why there is none."""
    if test.image is None:
        from PIL import Image

        assert test.size is not None
        buffer = io.BytesIO()
        Image.new("RGB", test.size, _GRAY).save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
    path = folder / test.image
    try:
        if not path.is_file():
            return f"there is no image {path}"
        return path.read_bytes()
    except (OSError, ValueError) as error:
        return f"the image {path} cannot be read: {error}"


def _result(
    policy: Policy, test: Expectation, place: int, row: dict[str, Any] | None, broken: dict[str, Any] | None
) -> TestResult:
    wanted: list[str] = [test.expect] if test.expect else []
    wanted += [f"{name}: {_wanted(rule)}" for name, rule in (test.rules or {}).items()]
    name = test.name or (Path(test.image).name if test.image else test.caption) or f"test {place + 1}"
    result = TestResult(name, test.image, test.caption, ", ".join(wanted), "failed")
    if row is None:
        result.problems.append(str(broken[cf.ERROR]) if broken else "the image gave no row")
        return result
    reasons = {reason["rule"]: reason for reason in row[cf.REASONS]}
    for rule in policy.rules:
        fired, score = reasons.get(rule.id, {}), row.get(cf.score(rule.id))
        result.rules[rule.id] = RuleOutcome(
            fired.get("band", "missing" if score is None else "keep"),
            score,
            fired.get("nearest"),
            fired.get("contrast"),
        )
    result.decision = row[cf.DECISION]
    if test.expect is not None and result.decision != test.expect:
        by = ", ".join(_said(reason) for reason in reasons.values())
        result.problems.append(f"{result.decision} instead of {test.expect}" + (f": {by}" if by else ""))
    for rule_id, expected in (test.rules or {}).items():
        found = result.rules[rule_id]
        if expected.band is not None and found.band != expected.band:
            said = f" (score {found.score:.3f})" if found.score is not None else ""
            result.problems.append(f"{rule_id} says {found.band} instead of {expected.band}{said}")
        for limit, holds in ((expected.above, "above"), (expected.below, "below")):
            if limit is None:
                continue
            if found.score is None:
                result.problems.append(f"{rule_id} has no score, which should be {holds} {limit:g}")
            elif not (found.score > limit if holds == "above" else found.score < limit):
                result.problems.append(f"{rule_id} has the score {found.score:.3f}, which is not {holds} {limit:g}")
    return result


def _said(reason: dict[str, Any]) -> str:
    score = f" {reason['score']:.3f}" if reason["score"] is not None else ""
    nearest = f", nearest to “{reason['nearest']}”" if reason["nearest"] else ""
    return f"{reason['rule']} says {reason['band']}{score and ' at'}{score}{nearest}"


def _wanted(rule: RuleExpectation) -> str:
    parts: list[str] = [rule.band] if rule.band else []
    parts += [f"{name} {value:g}" for name in ("above", "below") if (value := getattr(rule, name)) is not None]
    return " ".join(parts)
