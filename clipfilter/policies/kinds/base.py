"""What every kind of rule is made of: its keys and checks, what it needs, its scores, and its words in reports.

A kind is a subclass of `Measure`: a pydantic model of what a policy writes under the kind's name, with the answers to
every question that the rest of clipfilter asks about a kind. Most have an answer here that fits a kind without anything
special. A kind scores in one of two ways: `plan` gives columns of the policy's one matrix, for all rules of the kind
together, or `answer` reads columns of the data and scores of earlier rules, for one rule.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa

from clipfilter.errors import RefusedError
from clipfilter.policies.arithmetic import RECHECK, settle
from clipfilter.policies.parts.attachments import Attachment, Attachments, Listed
from clipfilter.policies.parts.bands import Band, CalibratedRule, moved
from clipfilter.policies.parts.fields import Model, fail
from clipfilter.policies.texts import TextEncoder

# ---------------------------------------------------------------- words


#: How many phrases a sentence names.
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


# ---------------------------------------------------------------- a kind


class Measure(Model):
    """What a rule measures, and everything that is particular to its kind. `spec`: as `plain` gives it, JSON data."""

    #: The kind's name: the key of a rule, and what reports call it.
    kind: ClassVar[str]
    #: What an editor says about the key.
    about: ClassVar[str]
    #: Whether the score depends on the model, and so its thresholds.
    needs_model: ClassVar[bool] = False
    #: What of the rule decides its score besides the model, in a refusal.
    judged_by: ClassVar[str] = "prompts"
    #: Whether prompt templates are for this kind first of all.
    takes_templates: ClassVar[bool] = False
    #: Whether the score is made from captions' embeddings.
    needs_text: ClassVar[bool] = False
    #: Whether the rule measures something itself, so that its score can be weighed and its thresholds can move.
    measures: ClassVar[bool] = True
    #: Whether the rule ranks the whole dataset, so that its thresholds are fixed when all rows have scores.
    ranks: ClassVar[bool] = False
    #: What rows may be told to do by rules that have no bands and act by themselves; empty for kinds with bands.
    actions: ClassVar[tuple[str, ...]] = ()
    #: Actions that are this kind's alone, and why.
    own_actions: ClassVar[Mapping[str, str]] = {}
    #: The keys whose values name files.
    file_keys: ClassVar[tuple[str, ...]] = ()
    #: Whether an extending policy changes single keys of it, instead of all.
    merges: ClassVar[bool] = False
    #: How a reason names what was found.
    found_as: ClassVar[str] = "nearest to"

    # ------------------------------------------------------------ the language

    @classmethod
    def default_bands(cls, written: Any) -> dict[str, Any] | None:
        """The bands of a rule that writes none; `written` was not checked yet."""
        return None

    def plain(self) -> Any:
        """The canonical form: JSON data that is itself a valid value."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def prompted(self) -> bool:
        """Whether prompt templates make a difference."""
        return self.takes_templates

    @property
    def phrases(self) -> int:
        """How many phrases the rule names itself."""
        return 0

    @property
    def uses(self) -> tuple[str, ...]:
        """The earlier rules whose scores it reads."""
        return () if self.of_rule is None else (self.of_rule,)

    @property
    def of_rule(self) -> str | None:
        """The rule whose very score it has."""
        return None

    @property
    def attachments(self) -> Iterator[Attachment]:
        """The files that belong to it."""
        for value in (getattr(self, key) for key in self.file_keys):
            source = value.source if isinstance(value, Listed) else value
            if source is not None:
                yield source

    def check_rule(self, rule: Any) -> None:
        """Refuse other keys of the rule (see `language.rule.Rule`) that cannot stand beside this kind."""

    def check_place(self, rule: Any, earlier: Mapping[str, Any], all_ids: set[str], decides: bool) -> None:
        """Refuse the rule at its place in the policy. earlier: rules by id; decides: whether rules need bands."""

    def check_band(self, band: Band, *at: str | int) -> None:
        """Refuse a band whose direction or threshold cannot belong to this kind; `at` is its place."""

    # ------------------------------------------------------------ what it needs

    def identity(self, templates: Sequence[str]) -> Any:
        """JSON data of all that decides the score besides the model, None where nothing does."""
        return None

    @property
    def numbers(self) -> tuple[str, ...]:
        """The numeric columns it reads by name."""
        return ()

    def check_columns(self, schema: pa.Schema) -> None:
        """Refuse data whose columns can never answer. Raises RefusedError."""

    # ------------------------------------------------------------ scoring

    def curve(self, calibrated: CalibratedRule | None, rule: str, model: str) -> tuple[float, float] | None:
        """Platt's curve (a, b) of a rule whose score is its calibrated probability. Raises RefusedError."""
        return None

    @classmethod
    def plan(cls, rules: Sequence[CompiledRule], encoder: TextEncoder, files: Attachments) -> Plan | None:
        """All rules of this kind as columns of the policy's matrix, None where they are none. Raises RefusedError."""
        return None

    def answer(self, thresholds: Sequence[float], files: Attachments) -> Answer | None:
        """What scores one rule from columns and earlier scores, None where `plan` does. Raises RefusedError."""
        return None

    # ------------------------------------------------------------ words

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        """What the score says, in a sentence."""
        raise NotImplementedError

    @classmethod
    def measured(cls, spec: Any) -> Words:
        """What the score is, in a word or two."""
        raise NotImplementedError

    @classmethod
    def verdict(cls, measured: str, score: float, result: str) -> str | None:
        """The rule's part in a decision, where it is no matter of thresholds."""
        return None

    def written(self) -> Any:
        """What a policy would write, as short as it can be: JSON data."""
        return self.model_dump(mode="json", exclude_none=True, exclude_defaults=True)

    def summary(self, conditional: bool) -> str:
        """What the rule looks at, in a line. conditional: whether it applies to some rows only."""
        written = self.written()
        said = written if isinstance(written, str) else json.dumps(written, ensure_ascii=False)
        return (said if len(said) <= 80 else said[:77] + "...") + (" (when a condition holds)" if conditional else "")

    @property
    def compared(self) -> tuple[Sequence[str], Sequence[str], Sequence[str]] | None:
        """Phrases whose contrast can be looked at: positives, near misses, generic negatives."""
        return None

    @classmethod
    def is_probability(cls, spec: Any) -> bool:
        """Whether the score is a probability, calibrated or not."""
        return False

    @classmethod
    def is_calibrated(cls, spec: Any) -> bool:
        """Whether the score is bent by Platt's curve of the policy's calibration."""
        return False

    @classmethod
    def fills_unit(cls, spec: Any) -> bool:
        """Whether scores spread over 0 to 1, so that a chart shows all of it."""
        return False

    @classmethod
    def is_whole(cls, spec: Any) -> bool:
        """Whether scores are whole numbers, which float32 tells apart from any threshold."""
        return False

    @classmethod
    def reach(cls, threshold: float) -> float:
        """How far from a threshold a stored score may be and its exact one still lie beyond it; generous."""
        return 2 * RECHECK

    @property
    def has_probability(self) -> bool:
        """`is_probability` of this rule."""
        return self.is_probability(self.plain())


# ---------------------------------------------------------------- compiled


@dataclass(frozen=True)
class CompiledRule:
    """One rule ready to be decided. Thresholds are exact float64 here and float32 where they meet scores."""

    id: str
    measure: Measure
    templates: tuple[str, ...]
    direction: str | None
    review: float | None
    reject: float | None
    on_missing: str
    ranked: bool  # whether another rule ranks its scores
    calibrated: bool | None  # None: its threshold depends on no model
    when: dict[str, Any] | None = None
    severity: int | None = None
    action: str | None = None
    tighten: float | None = None  # beyond it, the thresholds of `tightens` move by `tighten_by`
    tighten_by: float = 0.0
    tightens: tuple[str, ...] = ()
    moved_by: tuple[float, ...] = ()  # how far others may move its thresholds
    curve: tuple[float, float] | None = None  # of a calibrated score

    @property
    def kind(self) -> str:
        return self.measure.kind

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Every threshold that a score may be compared with."""
        written = [value for value in (self.review, self.reject) if value is not None]
        found = [*written, *([self.tighten] if self.tighten is not None else [])]
        return tuple(found + [moved(str(self.direction), value, by) for by in self.moved_by for value in written])


@dataclass(frozen=True)
class Block:
    """Up to 1024 rows of images. half: float16 [m, d]; wide: float32 [1024, d], zero beyond m; valid: bool [m], which
    rows hold an embedding."""

    half: np.ndarray
    wide: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True)
class Found:
    """What a plan finds for m rows and its R rules: values float32 [R, m], NaN where there is no score; nearest and
    contrast int32 [R, m], positions among the plan's labels or -1; None where the plan names nothing."""

    values: np.ndarray
    nearest: np.ndarray | None = None
    contrast: np.ndarray | None = None

    @classmethod
    def empty(cls, rules: int, rows: int, names: int) -> Found:
        """Nothing found yet; names: 0, 1 (nearest) or 2 (contrast too)."""
        labels = [np.full((rules, rows), -1, dtype=np.int32) for _ in range(names)]
        return cls(np.full((rules, rows), np.nan, dtype=np.float32), *labels)

    def part(self, rows: slice) -> Found:
        """Views of some rows."""
        nearest, contrast = (None if own is None else own[:, rows] for own in (self.nearest, self.contrast))
        return Found(self.values[:, rows], nearest, contrast)


class Plan(Protocol):
    """Rules of one kind that score images by columns of the policy's matrix."""

    @property
    def rules(self) -> tuple[str, ...]: ...

    @property
    def weights(self) -> np.ndarray:
        """float32 [columns, dim]."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What reasons can name."""

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts that were embedded."""

    @property
    def names(self) -> int:
        """How many labels a reason has: 0, 1 (nearest) or 2 (contrast too)."""

    def score(self, block: Block, products: np.ndarray, out: Found) -> None:
        """One block into `out`. products: float32 [columns, 1024] of `weights` and the block's images."""


@dataclass(frozen=True)
class Rows:
    """What a rule can read besides the matrix: n rows of columns, captions' cosines and embeddings, the scores (float32
    [n]) of earlier rules, and where those do not apply (bool [n])."""

    columns: pa.Table
    similarity: np.ndarray
    images: np.ndarray
    texts: np.ndarray | None
    values: Mapping[str, np.ndarray]
    skipped: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Answer:
    """Scores float32 [n] of one rule, NaN where there is none, and positions int32 [n] among its own `labels` (-1 for none;
    None for a rule that names nothing)."""

    score: Callable[[Rows], tuple[np.ndarray, np.ndarray | None]]
    labels: tuple[str, ...] = ()

    @classmethod
    def of_columns(
        cls,
        exact: Callable[[pa.Table], tuple[np.ndarray, np.ndarray | None]],
        thresholds: Sequence[float],
        labels: tuple[str, ...] = (),
    ) -> Answer:
        """An answer that is float64 from the start. exact: from the columns of n rows, scores float64 [n] and labels."""

        def score(rows: Rows) -> tuple[np.ndarray, np.ndarray | None]:
            values, found = exact(rows.columns)
            return settle(values, thresholds), found

        return cls(score, labels)


def numbers_answer(read: Callable[[pa.Table], np.ndarray], thresholds: Sequence[float]) -> Answer:
    """An answer without names. read: from the columns of n rows, scores float64 [n]."""
    return Answer.of_columns(lambda table: (read(table), None), thresholds)


@contextmanager
def naming(rule: str) -> Iterator[None]:
    """Say in a refusal which rule it is about."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(f"rule {rule!r}: {error}") from None


# ---------------------------------------------------------------- checks of bands that several kinds share


def check_probability(band: Band, *at: str | int) -> None:
    """Refuse a threshold of a probability that is none; `at` is the band's place."""
    if not 0.0 < band.value < 1.0:
        hint = f"; did you mean {band.value / 100:g}?" if 1.0 < band.value < 100.0 else ""
        fail(
            f"{band.direction} is {band.value:g}, but a probability threshold is between 0 and 1{hint}",
            *at, band.direction,
        )  # fmt: skip


def check_cosine(band: Band, *at: str | int, what: str = "cosine", limit: float = 1.0) -> None:
    """Refuse a threshold that no cosine, or no difference of cosines, reaches."""
    if abs(band.value) >= limit:
        fail(
            f"{band.direction} is {band.value:g}, but a {what} threshold is between {-limit:g} and {limit:g}",
            *at, band.direction,
        )  # fmt: skip
