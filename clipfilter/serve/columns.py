"""The columns of a run that sorting, filtering and moved thresholds need, as compact arrays: no text, no table."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter.decisions import DECISIONS, ESCALATE, LIMITS, MISSING, TIGHTEN
from clipfilter.report import RuleData, floats
from clipfilter.runs import RunVectors, VectorShard

#: What a rule did to a row: nothing, or the band of its reason; any band unknown here counts as a rejection.
BANDS = ("", *LIMITS, MISSING, ESCALATE, TIGHTEN)
SIMILARITY = "similarity"
_SEVERITY = {"": 0, "review": 1, "reject": 2, "escalate": 2, "tighten": 0}
_THREADS = 4
_BATCH = 65_536


class RunColumns:
    """One number or code per row of a run, in the order of its `RunVectors`: about 5 bytes per row and rule, and 8 more
    for a score once rows were sorted by it.

    decision: int8 [n], -1 where nothing was decided. band: int8 [rules, n], positions in BANDS. scores: float32 [n] by rule
    (and SIMILARITY), NaN where there is none. escalated: bool [n]. fixed: bool [n], rows whose decision is not the worst
    of their rules' (a human override): no threshold moves them.
    """

    def __init__(self, vectors: RunVectors, rules: Sequence[RuleData]) -> None:
        self.rows = vectors.rows
        self.rules = [rule.id for rule in rules]
        self.decision = np.full(self.rows, -1, np.int8)
        self.band = np.zeros((len(rules), self.rows), np.int8)
        names = {rule: cf.score(rule) for rule in self.rules} | {SIMILARITY: cf.SIMILARITY}
        self._names = {name: column for name, column in names.items() if column in vectors.schema.names}
        self.scores = {name: np.full(self.rows, np.nan, np.float32) for name in self._names}
        self.escalated = np.zeros(self.rows, bool)
        self.fixed = np.zeros(self.rows, bool)
        #: int8 [rules, bands]: how severe each band of each rule is (0 keep, 1 review, 2 reject).
        self.severity = np.array(
            [[_SEVERITY.get(band, _missing(rule)) for band in BANDS] for rule in rules], np.int8
        ).reshape(len(rules), len(BANDS))
        self._orders: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._lock = threading.Lock()
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(lambda shard: self._read(vectors, shard), vectors.shards))
        worst = np.zeros(self.rows, np.int8)
        for number in range(len(rules)):
            np.maximum(worst, self.severity[number][self.band[number]], out=worst)
        self.fixed |= (self.decision >= 0) & (worst != self.decision)

    def ascending(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(rows int32 [m], their scores float32 [m]) of the rows with this score, lowest first, equal ones by position."""
        with self._lock:
            if name not in self._orders:
                values = self.scores[name]
                order = np.argsort(values, kind="stable")[: int((~np.isnan(values)).sum())].astype(np.int32)
                self._orders[name] = order, values[order]
            return self._orders[name]

    def totals(self) -> dict[str, int]:
        """Rows by decision."""
        return {name: int((self.decision == code).sum()) for code, name in enumerate(DECISIONS)}

    def bands_of(self, rule: int) -> dict[str, int]:
        """Rows by band of one rule."""
        counts = np.bincount(self.band[rule], minlength=len(BANDS))
        return {name: int(counts[code]) for code, name in enumerate(BANDS) if name and counts[code]}

    def _read(self, vectors: RunVectors, shard: VectorShard) -> None:
        wanted = [*self._names.values()]
        if cf.DECISION in vectors.schema.names:
            wanted += [cf.DECISION, "cf_reasons.list.element.rule", "cf_reasons.list.element.band"]
        at = shard.start
        for batch in vectors.run.batches_of(shard.annotated, wanted, _BATCH):
            rows = slice(at, at + batch.num_rows)
            for name, column in self._names.items():
                self.scores[name][rows] = floats(batch.column(column))
            if cf.DECISION in batch.schema.names:
                codes = pc.index_in(batch.column(cf.DECISION), pa.array(DECISIONS))
                self.decision[rows] = np.asarray(codes.fill_null(-1), np.int8)
                self._reasons(batch.column(cf.REASONS), rows)
            at = rows.stop

    def _reasons(self, reasons: pa.ListArray, rows: slice) -> None:
        flat = reasons.flatten()
        row = np.asarray(pc.list_parent_indices(reasons))
        rule = np.asarray(pc.index_in(flat.field("rule"), pa.array(self.rules, pa.string())).fill_null(-1))
        found = pc.index_in(flat.field("band"), pa.array(BANDS)).fill_null(BANDS.index("reject"))
        band = np.asarray(found, np.int8)
        known = rule >= 0
        self.band[:, rows][rule[known], row[known]] = band[known]
        self.escalated[rows][row[band == BANDS.index("escalate")]] = True
        self.fixed[rows][row[~known]] = True


def _missing(rule: RuleData) -> int:
    return {"keep": 0, "reject": 2}.get(rule.spec.get("on_missing") or "review", 1)
