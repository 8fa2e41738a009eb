"""The drift alarm: the index itself, its false alarms, what it sees, and the stored distributions it works on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import chi2

from clipfilter.nightly.drift import Distribution, compare, compare_nights, distributions, pooled, psi
from clipfilter.storage import Directory


def stored(folder: Path, values: np.ndarray, name: str = "x.parquet") -> Distribution:
    """The distribution of a column as a night records it."""
    column = pa.array(values.astype(np.float32), mask=np.isnan(values))
    pq.write_table(pa.table({"cf_score.r": column, "other": pa.nulls(len(values))}), folder / name)
    return distributions(Directory(str(folder)), [name])["cf_score.r"]


def test_the_index_is_the_fields_own() -> None:
    before, tonight = [500, 300, 200], [400, 300, 300]
    found = psi("decisions", before, tonight)
    p, q = np.array(before) / 1000, np.array(tonight) / 1000
    assert found.psi == pytest.approx(((q - p) * np.log(q / p)).sum(), abs=0.002)
    assert (found.n, found.m, found.bins) == (1000, 1000, 3)
    assert found.limit == 0.2
    small = psi("decisions", [50, 30, 20], [10, 20, 10])
    assert small.limit == pytest.approx((1 / 100 + 1 / 40) * chi2.ppf(0.999, 2))


def test_equal_and_empty_nights_are_quiet() -> None:
    assert psi("d", [10, 20, 30], [10, 20, 30]).psi == 0
    assert not psi("d", [], []).alarm
    assert not psi("d", [100], [7]).alarm
    assert not psi("d", [0, 50, 0], [0, 3, 0]).alarm
    assert not psi("d", [100, 100], [0, 0]).alarm


@pytest.mark.parametrize(("n", "m"), [(40, 40), (120, 40), (2000, 50), (2000, 2000), (100_000, 300)])
def test_chance_alone_rarely_alarms(n: int, m: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(n + m)
    alarms = 0
    nights = 600
    before = stored(tmp_path, rng.normal(0.2, 0.05, n))
    exponent = before["exponent"]
    for _ in range(nights):
        values = rng.normal(0.2, 0.05, m).astype(np.float32)
        # A night as it would be stored, without writing 600 files.
        index, counts = np.unique(np.floor(np.ldexp(values.astype(np.float64), -exponent)), return_counts=True)
        tonight = {"exponent": exponent, "index": index.astype(int).tolist(), "counts": counts.tolist(), "missing": 0}
        alarms += compare("r", before, tonight).alarm
    assert alarms <= 0.01 * nights, f"{alarms} false alarms in {nights} nights"


def test_a_shift_a_spread_and_missing_scores_are_seen(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    before = stored(tmp_path, rng.normal(0.2, 0.05, 5000))
    for values in (
        rng.normal(0.25, 0.05, 500),  # moved by one standard deviation
        rng.normal(0.2, 0.15, 500),  # wider
        np.full(500, 0.2),  # all the same
        np.where(rng.random(500) < 0.4, np.nan, rng.normal(0.2, 0.05, 500)),  # two fifths without a score
        rng.normal(40.0, 5.0, 500),  # other magnitudes, so other bin widths
    ):
        found = compare("r", before, stored(tmp_path, values))
        assert found.alarm, found
    assert not compare("r", before, stored(tmp_path, rng.normal(0.2, 0.05, 500))).alarm


def test_scores_that_never_vary_alarm_when_they_do(tmp_path: Path) -> None:
    constant = stored(tmp_path, np.full(400, 64.0))
    assert not compare("r", constant, stored(tmp_path, np.full(100, 64.0))).alarm
    assert compare("r", constant, stored(tmp_path, np.full(100, 16.0))).alarm
    assert compare("r", constant, stored(tmp_path, np.full(100, 640.0))).alarm
    nothing = stored(tmp_path, np.full(100, np.nan))
    assert compare("r", constant, nothing).alarm
    assert not compare("r", nothing, nothing).alarm


def test_nights_pool_as_one_large_night(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    parts = [rng.normal(0.2, 0.05, 900), rng.normal(0.3, 0.01, 500) * 100, np.array([np.nan, 0.1])]
    whole = stored(tmp_path, np.concatenate(parts))
    together = pooled([stored(tmp_path, part) for part in parts])
    assert (sum(together["counts"]), together["missing"]) == (1401, 1)
    tonight = stored(tmp_path, rng.normal(0.2, 0.05, 300))
    assert compare("r", together, tonight).psi == pytest.approx(compare("r", whole, tonight).psi, abs=0.05)


def test_a_record_stays_small(tmp_path: Path) -> None:
    spread = stored(tmp_path, np.random.default_rng(3).standard_normal(200_000))
    assert len(spread["index"]) <= 1024
    assert sum(spread["counts"]) == 200_000


def test_a_night_is_compared_in_decisions_and_in_every_score(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)

    def night(mean: float, reject: int) -> dict[str, Any]:
        scores = {"cf_score.r": stored(tmp_path, rng.normal(mean, 0.05, 400))}
        return {"counts": {"rows": 400, "keep": 400 - reject, "reject": reject}, "scores": scores}

    before = [night(0.2, 20), night(0.2, 24)]
    assert compare_nights([], night(0.2, 20)) == []
    assert [item.of for item in compare_nights(before, night(0.2, 22))] == ["decisions", "cf_score.r"]
    assert [item.alarm for item in compare_nights(before, night(0.2, 22))] == [False, False]
    assert [item.alarm for item in compare_nights(before, night(0.2, 200))] == [True, False]
    assert [item.alarm for item in compare_nights(before, night(0.3, 22))] == [False, True]
