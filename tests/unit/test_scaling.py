"""The scaling page shows what its arithmetic gives, and the arithmetic is right."""

from __future__ import annotations

import runpy

import pytest

from tests.support.engine import REPO

SCALING = runpy.run_path(str(REPO / "benchmarks/scaling.py"))
PAGE = (REPO / "docs/guide/scaling.md").read_text()


def test_the_page_shows_the_tables_of_the_script() -> None:
    shown = [line for line in PAGE.splitlines() if line.startswith("|")]
    computed = [line for line in SCALING["tables"]().splitlines() if line]
    assert sorted(shown) == sorted(computed), "run `python benchmarks/scaling.py`"


def test_costs_by_hand() -> None:
    cost = SCALING["cost"](5_000_000_000, "ViT-L-14")
    assert cost.gpu_hours == pytest.approx(5e9 / 312 / 3600)
    assert cost.shards == 500_000
    assert cost.embedding_bytes == 5_000_000_000 * (2 * 2 * 768 + 98)
    assert (cost.reads, cost.writes) == (
        16 * 500_000,
        500_000 * (5 + 5),
    )  # 180 MB kept per shard: four parts and two more, one PUT less
    small = SCALING["cost"](100_000_000, "ViT-B-32", captions=False, kept_bytes=0)
    assert small.embedding_bytes == 100_000_000 * (2 * 512 + 98)
    assert small.writes == 10_000 * 5
    assert SCALING["cost"](1, "ViT-B-32", "2 megapixels").decode_cores_per_gpu == pytest.approx(2_500 / 122)
    assert SCALING["cost"](10_001, "ViT-B-32").shards == 2


def test_sentences_with_numbers_follow_from_the_constants() -> None:
    rate = SCALING["PEER_GPU_IMAGES_PER_SECOND"]
    five = SCALING["cost"](5_000_000_000, "ViT-L-14")
    stored = (five.embedding_bytes + five.annotated_bytes) / 1e12
    for sentence in (
        f"{five.gpu_hours:,.0f} GPU hours, and from".replace(",", " ", 1),
        f"{five.gpu_hours / 10 / 24:.0f} days on 10",
        f"{five.decide_core_hours:.0f} core hours and {stored:.0f} TB",
        f"64 GPUs read {64 * rate['ViT-L-14'] * 60_000 / 1e9:.1f} GB/s",
        f"would read {64 * rate['ViT-B-32'] * 60_000 / 1e9:.1f} GB/s",
        f"rows take {SCALING['ANNOTATED_BYTES']} bytes",
        f"plus {SCALING['FACTS_BYTES']} bytes",
    ):
        assert sentence in " ".join(PAGE.split()), sentence


def test_the_measured_numbers_are_those_of_the_benchmarks() -> None:
    benchmarks = (REPO / "benchmarks/README.md").read_text()
    for rate in SCALING["CPU_PAIRS_PER_SECOND"].values():
        assert f"{rate}/s" in benchmarks
    for size, rate in SCALING["DECODE_PER_CORE"].items():
        assert f"| {size} | {rate} |" in benchmarks
