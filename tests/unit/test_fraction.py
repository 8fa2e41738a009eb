"""Exact fractions: the radix selection against a plain sort, however the scores are cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter.errors import RefusedError
from clipfilter.policies import parse_policy
from clipfilter.policies.fraction import (
    dataset_thresholds,
    float16_thresholds,
    fraction_threshold,
    fraction_thresholds,
    high_histogram,
    key_score,
    locate,
    low_histogram,
    quantiles,
    sort_keys,
    wanted_rank,
)


def datacomp(scores: np.ndarray, fraction: float) -> tuple[float, int]:
    """DataComp's lines (n = int(len * f); threshold = -np.sort(-scores)[n]; keep >=), but f = 1 keeps all."""
    scores = scores[~np.isnan(scores)]
    n = int(len(scores) * fraction)
    ordered = -np.sort(-scores)
    threshold = ordered[n] if n < len(ordered) else ordered[-1]
    return float(threshold), int((scores >= threshold).sum())


def check(scores: np.ndarray, fraction: float, cut: int) -> None:
    scores = scores.astype(np.float32)

    def chunks() -> list[np.ndarray]:
        return np.array_split(scores, cut)

    found = fraction_threshold(chunks, fraction)
    value, kept = datacomp(scores, fraction)
    assert found.value == value
    assert found.kept == kept
    assert found.ranked == int((~np.isnan(scores)).sum())
    mirrored = fraction_threshold(lambda: [-chunk for chunk in chunks()], fraction, "bottom")
    assert mirrored.value == -value
    assert mirrored.kept == kept


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.3, 0.5, 0.999, 1.0])
@pytest.mark.parametrize(
    "scores",
    [
        np.random.default_rng(0).normal(0.2, 0.1, 20_011),
        np.random.default_rng(1).normal(0.2, 0.1, 20_011).astype(np.float16),  # many ties, as DataComp's columns
        np.random.default_rng(2).choice([-0.0, 0.0, -1e-40, 1e-40, -1.5, 2.0], 5_000),
        np.full(1_000, 0.25),
        -np.random.default_rng(3).random(3_000) * 1e30,
        np.array([0.5]),
        np.where(np.random.default_rng(4).random(4_000) < 0.4, np.nan, np.random.default_rng(5).random(4_000)),
    ],
    ids=["normal", "float16", "zeros", "constant", "negative", "one", "missing"],
)
def test_equals_a_plain_sort(scores: np.ndarray, fraction: float) -> None:
    check(scores, fraction, 7)


@given(
    st.lists(st.floats(width=32, allow_nan=True, allow_infinity=True), min_size=1, max_size=60),
    st.floats(0.001, 1.0),
    st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_equals_a_plain_sort_for_any_floats(values: list[float], fraction: float, cut: int) -> None:
    scores = np.array(values, dtype=np.float32)
    if not np.isnan(scores).all():
        check(scores, fraction, cut)


def test_keys_keep_the_order_and_come_back() -> None:
    scores = np.array([-np.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 0.3, 1.0, np.inf], dtype=np.float32)
    keys = sort_keys(scores)
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert [key_score(int(key)) for key in keys] == scores.tolist()
    assert sort_keys(np.array([-0.0], np.float32)) == sort_keys(np.array([0.0], np.float32))
    assert len(sort_keys(np.array([np.nan], np.float32))) == 0


def test_partial_histograms_of_shards_add_up_in_any_order() -> None:
    rng = np.random.default_rng(6)
    shards = [rng.normal(0.2, 0.1, size).astype(np.float16).astype(np.float32) for size in (3_000, 1, 500, 7_777)]
    high = sum(high_histogram(shard) for shard in reversed(shards))
    bucket, inside = locate(high, wanted_rank(int(high.sum()), 0.3, "top"))
    low = sum(low_histogram(shard, bucket) for shard in shards)
    value = key_score(bucket << 16 | locate(low, inside)[0])
    assert value == datacomp(np.concatenate(shards), 0.3)[0]


def test_memory_does_not_grow_with_the_number_of_scores() -> None:
    import tracemalloc

    def chunks(count: int) -> object:
        return (np.random.default_rng(i).random(100_000, dtype=np.float32) for i in range(count))

    peaks = []
    for count in (2, 12):
        tracemalloc.start()
        fraction_threshold(lambda count=count: chunks(count), 0.3)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_several_fractions_read_the_scores_twice_only() -> None:
    scores = np.random.default_rng(7).random(1_000, dtype=np.float32)
    passes = []

    def chunks() -> list[np.ndarray]:
        passes.append(1)
        return [scores]

    found = fraction_thresholds(chunks, [(0.2, "top"), (0.5, "top"), (0.1, "bottom")])
    assert len(passes) == 2
    assert [threshold.kept for threshold in found] == [201, 501, 101]


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1, float("nan")])
def test_fractions_that_make_no_sense_are_refused(fraction: float) -> None:
    with pytest.raises(RefusedError, match="fraction"):
        fraction_threshold(lambda: [np.ones(3, np.float32)], fraction)


def test_scores_that_change_between_the_passes_are_noticed() -> None:
    turns = iter([[np.arange(10, dtype=np.float32)], [np.arange(5, dtype=np.float32)]])
    with pytest.raises(ValueError, match="changed"):
        fraction_threshold(lambda: next(turns), 0.3)


def test_no_scores_give_no_threshold() -> None:
    found = fraction_threshold(lambda: [np.full(3, np.nan, np.float32)], 0.3)
    assert found.value is None
    assert found.ranked == 0


def test_a_policy_gets_its_numbers_with_evidence() -> None:
    policy = parse_policy(
        "{policy: p, version: 1, rules: [{id: sim, alignment: {}}, "
        "{id: top, fraction: {of: sim}, review: {outside_top: 0.3}, reject: {outside_top: 0.5}}]}"
    )
    scores = {"sim": np.arange(100, dtype=np.float32)}
    numbers, evidence = dataset_thresholds(policy, lambda rule: [scores[rule]])
    assert numbers == {"top.review": 69.0, "top.reject": 49.0}
    assert evidence["top.reject"] == {
        "of": "sim", "value": 49.0, "fraction": 0.5, "tail": "top", "ranked": 100, "kept": 51,
    }  # fmt: skip


_BIG = """
import sys
from pathlib import Path
import numpy as np
from clipfilter.policies.fraction import fraction_thresholds

folder, kind = Path(sys.argv[1]), sys.argv[2]
files = sorted(folder.glob("*.npy"))

def chunks():
    return (np.load(path, allow_pickle=False) for path in files)

found = fraction_thresholds(chunks, [(0.3, "top"), (1.0, "top"), (0.05, "bottom")])
print([threshold.value for threshold in found], [threshold.kept for threshold in found])
# Not ru_maxrss, which a process inherits from the one that started it.
print(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)
"""


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_ten_million_scores_with_ties_stay_within_500_mb(tmp_path: object, kind: type) -> None:
    import subprocess
    import sys
    from pathlib import Path

    folder = Path(str(tmp_path))
    # A quarter of a million different values in ten million rows: about forty ties each.
    scores = (np.random.default_rng(8).integers(0, 250_000, 10_000_000, dtype=np.int32) / np.float32(250_000)).astype(
        kind
    )
    for number, part in enumerate(np.array_split(scores, 7)):
        np.save(folder / f"{number}.npy", part)
    done = subprocess.run(
        [sys.executable, "-c", _BIG, str(folder), str(kind)], capture_output=True, text=True, check=True
    )
    ordered = np.sort(scores.astype(np.float32))
    top, lowest, bottom = ordered[-3_000_001], ordered[0], ordered[500_000]
    kept = [int((scores >= top).sum()), 10_000_000, int((scores <= bottom).sum())]
    printed, memory = done.stdout.splitlines()
    assert printed == f"{[float(top), float(lowest), float(bottom)]} {kept}"
    assert int(memory) < 500e6, f"{int(memory):,} bytes"
    print(f"peak memory {int(memory):,} bytes")


def test_float16_scores_need_one_pass() -> None:
    scores = np.random.default_rng(9).normal(0.2, 0.1, 50_000).astype(np.float16)
    scores[::7] = np.nan
    scores[1::7] = -0.0
    passes = []

    def chunks() -> list[np.ndarray]:
        passes.append(1)
        return np.array_split(scores, 5)

    found = float16_thresholds(chunks(), [(0.3, "top"), (1.0, "top"), (0.2, "bottom")])
    assert passes == [1]
    assert found == fraction_thresholds(chunks, [(0.3, "top"), (1.0, "top"), (0.2, "bottom")])
    with pytest.raises(ValueError, match="float16"):
        float16_thresholds([np.array([0.1], np.float32)], [(0.5, "top")])


def test_quantiles_are_those_of_a_plain_sort() -> None:
    scores = np.random.default_rng(10).normal(0, 1, 9_999).astype(np.float32)
    wanted = [0.0, 0.001, 0.25, 0.5, 0.99, 1.0]
    found = quantiles(lambda: np.array_split(scores, 4), wanted)
    assert found == np.quantile(scores, wanted, method="lower").astype(float).tolist()
    assert quantiles(lambda: [np.full(3, np.nan, np.float32)], [0.5]) == [None]
