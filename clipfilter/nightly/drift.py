"""Are tonight's rows like those of the nights before? Population stability index, with an alarm that knows sample sizes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter.charts import Histogram
from clipfilter.decisions import DECISIONS
from clipfilter.storage import Directory

#: What a night may lie away from the others without any alarm, however many rows there are.
FLOOR = 0.2
#: How often a night like all others may alarm when only chance moves it.
FALSE_ALARM = 0.001
BINS = 10
OUTCOMES = (*DECISIONS, "failed")

_ROWS_PER_BIN = 5
_STORED_BINS = 1024
_BATCH = 16_384


@dataclass(frozen=True)
class Drift:
    """One comparison: `psi` of m rows tonight against n rows of earlier nights in `bins` bins; alarm above `limit`."""

    of: str
    psi: float
    limit: float
    n: int
    m: int
    bins: int

    @property
    def alarm(self) -> bool:
        return self.psi > self.limit


Distribution = dict[str, Any]  # {"exponent", "index", "counts", "missing"}: bins of width 2**exponent


def distributions(directory: Directory, files: Iterable[str]) -> dict[str, Distribution]:
    """The distribution of every score column over these annotated files, read one piece at a time."""
    found: dict[str, Histogram] = {}
    missing: Counter[str] = Counter()
    for name in files:
        with directory.open(name) as handle:
            file = pq.ParquetFile(handle)
            wanted = [c for c in file.schema_arrow.names if c == cf.SIMILARITY or c.startswith(cf.SCORE)]
            for batch in file.iter_batches(_BATCH, columns=wanted):
                for column in wanted:
                    values = np.asarray(batch.column(column).to_numpy(zero_copy_only=False), np.float64)
                    found.setdefault(column, Histogram()).add(values)
                    missing[column] += int((~np.isfinite(values)).sum())
    return {column: _stored(found[column], missing[column]) for column in sorted(found)}


def _stored(histogram: Histogram, missing: int) -> Distribution:
    edges, width, counts = histogram.bins()
    exponent = round(math.log2(width))
    index = np.ldexp(edges, -exponent).astype(np.int64)
    while len(index) > _STORED_BINS:
        exponent += 1
        index, counts = _grouped(index >> 1, counts)
    return {"exponent": exponent, "index": index.tolist(), "counts": counts.tolist(), "missing": missing}


def _grouped(index: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, inverse = np.unique(index, return_inverse=True)
    return unique, np.bincount(inverse, weights=counts, minlength=len(unique)).astype(np.int64)


def pooled(parts: Sequence[Distribution]) -> Distribution:
    """Several distributions as one, in the coarsest of their bins."""
    exponent = max(part["exponent"] for part in parts if part["index"]) if any(p["index"] for p in parts) else 0
    index = [_shifted(part, exponent) for part in parts]
    counts = [np.asarray(part["counts"], np.int64) for part in parts]
    all_index, all_counts = _grouped(np.concatenate(index), np.concatenate(counts))
    missing = sum(part["missing"] for part in parts)
    return {"exponent": exponent, "index": all_index.tolist(), "counts": all_counts.tolist(), "missing": missing}


def _shifted(part: Distribution, exponent: int) -> np.ndarray:
    index = np.asarray(part["index"], np.int64)
    return index >> min(exponent - part["exponent"], 62) if len(index) else index


def compare(of: str, before: Distribution, tonight: Distribution) -> Drift:
    """Compare one score: bins are deciles of the earlier rows; rows without the score are a bin of their own."""
    exponent = max([part["exponent"] for part in (before, tonight) if part["index"]], default=0)
    (index, counts), (index_now, counts_now) = (
        _grouped(_shifted(part, exponent), np.asarray(part["counts"], np.int64)) for part in (before, tonight)
    )
    n = int(counts.sum())
    wanted = min(BINS, max(2, n // _ROWS_PER_BIN))
    if n:
        positions = np.searchsorted(np.cumsum(counts), n * np.arange(1, wanted) / wanted)
        uppers = index[np.minimum(positions, len(index) - 1)]
        # A value that many rows share (all images of one size) is a bin of its own, with what is below it apart.
        uppers = np.unique(np.concatenate([uppers, index[counts >= n / wanted] - 1]))
    else:
        uppers = np.empty(0, np.int64)
    sides = [
        np.bincount(np.searchsorted(uppers, i), weights=c, minlength=len(uppers) + 1)
        for i, c in ((index, counts), (index_now, counts_now))
    ]
    return psi(
        of,
        [*sides[0].astype(int).tolist(), before["missing"]],
        [*sides[1].astype(int).tolist(), tonight["missing"]],
    )


def psi(of: str, before: Sequence[int], tonight: Sequence[int]) -> Drift:
    """Population stability index of two rows of counts, sum of (q - p) ln(q / p), half a row added to each bin.

    Bins that both lack are left out. When both come from one distribution it is about (1/n + 1/m) times a chi-squared
    variable with bins - 1 degrees of freedom; the alarm is above its 99.9 % quantile, and above 0.2 in any case.
    """
    from scipy.special import chdtri  # type: ignore[import-untyped]

    pairs = np.array([(a, b) for a, b in zip(before, tonight, strict=True) if a or b], np.float64).reshape(-1, 2)
    n, m = (int(total) for total in pairs.sum(axis=0))
    bins = len(pairs)
    if not n or not m or bins < 2:
        return Drift(of, 0.0, FLOOR, n, m, bins)
    p, q = ((pairs + 0.5) / (np.array([n, m]) + bins / 2)).T
    value = float(((q - p) * np.log(q / p)).sum())
    limit = max(FLOOR, (1 / n + 1 / m) * float(chdtri(bins - 1, FALSE_ALARM)))
    return Drift(of, value, limit, n, m, bins)


def compare_nights(before: Sequence[Mapping[str, Any]], tonight: Mapping[str, Any]) -> list[Drift]:
    """All comparisons of a night's record with earlier ones: the decisions' shares, then every score.

    Records hold `counts` (rows by decision) and `scores` (distributions). Nothing is compared before the second night.
    """
    if not before or not tonight["counts"].get("rows"):
        return []
    found = []
    totals = [sum(record["counts"].get(name, 0) for record in before) for name in OUTCOMES]
    mine = [tonight["counts"].get(name, 0) for name in OUTCOMES]
    if sum(totals[:3]):
        found.append(psi("decisions", totals, mine))
    for column, distribution in tonight["scores"].items():
        parts = [record["scores"][column] for record in before if column in record["scores"]]
        if parts:
            found.append(compare(column, pooled(parts), distribution))
    return found
