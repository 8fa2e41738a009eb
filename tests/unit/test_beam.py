"""The Beam side without a runner: columns that are counted, coders of everything that travels, options, refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("apache_beam", reason="the extra `beam` is not installed")

from apache_beam.coders import coders, registry
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.pipeline import AppliedPTransform, Pipeline, PipelineVisitor

from clipfilter.beam import executor, statistics, tasks
from clipfilter.beam.columns import count_by_host, exact_duplicates, hash_buckets, hosts, quantile_buckets, quantiles
from clipfilter.beam.options import BeamOptions
from clipfilter.beam.transforms import HistogramCoder, SumCounts, SumHistograms
from clipfilter.engine.worker import Inputs, JobSpec, Task
from clipfilter.errors import RefusedError
from clipfilter.policies import fraction
from clipfilter.policies.fraction import high_histogram, low_histogram
from clipfilter.runs import DataFile, Totals
from tests.docs.pages import REPO, blocks
from tests.support.runs import commit_of, version_of


def test_hosts_are_those_of_the_address_and_of_nothing_else() -> None:
    cases = {
        "https://Example.COM/a/b.jpg?x=http://other.org": "example.com",
        "http://user:secret@images.example.org:8080/1.png": "images.example.org",
        "https://example.com.:443/": "example.com",
        "HTTP://[2001:db8::1]:80/x": "[2001:db8::1]",
        "https://example.com#@evil.test/": "example.com",
        "https://example.com\\@evil.test/": "example.com",
        "ftp://example.com/x": "",
        "flickr8k://1.jpg": "",
        "example.com/x": "",
        "": "",
        None: "",
    }
    assert hosts(pa.array(list(cases), pa.string())).to_pylist() == list(cases.values())


def test_rows_per_host_add_up() -> None:
    urls = ["http://a.test/1", "https://A.test/2", "http://b.test/", None, "http://a.test/3"]
    found = count_by_host(pa.array(urls), pa.array(["keep", "reject", "review", "keep", "keep"]))
    assert found == {"a.test": (2, 0, 1), "b.test": (0, 1, 0), "": (1, 0, 0)}


def test_hashes_are_spread_evenly_and_equal_ones_meet() -> None:
    rng = np.random.default_rng(0)
    hexes = [rng.bytes(32).hex() for _ in range(4_000)]
    parts = hash_buckets(pa.chunked_array([hexes[:7], hexes[7:]]), 16)
    assert parts.tolist() == [int(value[:8], 16) % 16 for value in hexes]
    assert np.bincount(parts, minlength=16).min() > 150


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["aa", "bb", "cc", None]), st.integers(0, 9)), max_size=25), st.randoms())
def test_duplicates_are_all_but_the_first_uid_of_each_hash_in_any_order(rows: list, random: object) -> None:
    def table(items: list) -> pa.Table:
        return pa.table(
            {
                "cf_sha256": pa.array([i[1][0] for i in items], pa.string()),
                "cf_uid": pa.array([f"u{i[1][1]}" for i in items], pa.string()),
                "cf_shard": pa.array([f"s{i[0]:02d}" for i in items], pa.string()),
                "cf_row": pa.array([i[0] for i in items], pa.int64()),
            }
        )

    items = list(enumerate(rows))
    found = exact_duplicates(table(items))
    expected = []
    for value in ("aa", "bb", "cc"):
        group = sorted((f"u{uid}", f"s{n:02d}", n) for n, (sha, uid) in items if sha == value)
        expected += [(value, *row, group[0][0]) for row in group[1:]]
    assert [tuple(row.values()) for row in found.to_pylist()] == expected
    random.shuffle(items)  # type: ignore[attr-defined]
    assert exact_duplicates(table(items)).equals(found)


@pytest.mark.parametrize("ties", [False, True])
def test_quantiles_are_exact(ties: bool) -> None:
    scores = np.random.default_rng(5).normal(0.2, 0.1, 10_007).astype(np.float16 if ties else np.float32)
    scores = scores.astype(np.float32)
    scores[::13] = np.nan
    wanted = [0.0, 0.01, 0.3, 0.5, 0.99, 1.0]
    parts = np.array_split(scores, 9)
    high = sum(high_histogram(part) for part in parts)
    lows = {b: sum(low_histogram(part, b) for part in parts) for b in quantile_buckets(high, wanted)}
    ranked = scores[~np.isnan(scores)]
    assert quantiles(high, lows, wanted) == np.quantile(ranked, wanted, method="lower").tolist()
    assert quantiles(high, lows, wanted) == fraction.quantiles(lambda: parts, wanted)
    nothing = high_histogram(np.array([np.nan], np.float32))
    assert quantiles(nothing, {}, wanted) == [None] * 6


def test_histograms_and_counts_survive_their_coders_and_merging() -> None:
    scores = np.random.default_rng(1).normal(size=1_000).astype(np.float32)
    combine = SumHistograms()
    whole = combine.add_input(combine.create_accumulator(), scores.tobytes())
    halves = [combine.add_input(combine.create_accumulator(), part.tobytes()) for part in np.split(scores, 2)]
    coder = combine.get_accumulator_coder()
    merged = combine.merge_accumulators([coder.decode(coder.encode(half)) for half in halves])
    assert np.array_equal(merged, whole)
    assert np.array_equal(HistogramCoder().decode(combine.extract_output(whole)), high_histogram(scores))
    assert SumCounts().merge_accumulators([(1, 2, 3), (10, 20, 30)]) == (11, 22, 33)
    assert SumCounts().get_accumulator_coder().encode((1, 2, 3))


class _Coders(PipelineVisitor):
    """Collects the coder that every collection of a pipeline gets, and those of its combiners."""

    def __init__(self) -> None:
        self.found: dict[str, coders.Coder] = {}

    def visit_transform(self, node: AppliedPTransform) -> None:
        for name, collection in node.outputs.items():
            self.found[f"{node.full_label}/{name}"] = registry.get_coder(collection.element_type)
        if hasattr(node.transform, "fn") and hasattr(node.transform.fn, "get_accumulator_coder"):
            self.found[f"{node.full_label}/accumulator"] = node.transform.fn.get_accumulator_coder()


def _parts(coder: coders.Coder) -> list[coders.Coder]:
    inner = [part for child in coder._get_component_coders() or [] for part in _parts(child)]
    return [coder, *inner]


def _coders(pipeline: Pipeline) -> dict[str, coders.Coder]:
    visitor = _Coders()
    pipeline.visit(visitor)
    return visitor.found


def _spec() -> JobSpec:
    return JobSpec("filter", "/out", {"run": "/run"}, {}, "nano", "cpu", "fp32", False, 1, {}, True)


def _tasks(count: int) -> list[Task]:
    files = {"annotated": DataFile("x" * 500, 10_000, 1, "s")}
    commits = [commit_of(f"{n:016x}", counts={"rows": 10_000}, files=files) for n in range(count)]
    return [Task("decide", each.shard, 1, "p" * 64, inputs=Inputs("/run", each)) for each in commits]


def test_nothing_that_travels_is_pickled() -> None:
    """Every collection has a coder made of bytes, text, numbers and tuples; Beam's fallback would pickle."""
    decide = BeamOptions().pipeline()
    executor.build(decide, _spec(), _tasks(3))
    count = BeamOptions().pipeline()
    totals = Totals(decided=3_000_000, keep=1, review=1, reject=1)
    request = statistics.StatisticsRequest("/run", "/stats", url_column="url")
    statistics.build(count, request, "/run", replace(version_of([]), totals=totals, commits=["commits/a.json"]))
    plain = (
        coders.BytesCoder, coders.StrUtf8Coder, coders.VarIntCoder, coders.TupleCoder, coders.IterableCoder, HistogramCoder,
    )  # fmt: skip
    found = {**_coders(decide), **_coders(count)}
    assert len(found) > 25
    for name, coder in found.items():
        if name.startswith("Spread/") or "/MaybeReshuffle/" in name:
            continue  # inner steps of Beam's own Reshuffle, of text only
        for part in _parts(coder):
            assert isinstance(part, plain), f"{name}: {part}"
    fallback = registry.get_coder(object)
    assert not isinstance(fallback, plain), "the test would pass for anything"


def test_a_pipeline_holds_references_not_commits() -> None:
    reference = tasks.reference_to(_tasks(1)[0])
    assert len(reference) < 120
    assert set(json.loads(reference)) == {"commit", "generation", "attempt"}
    assert executor.TASKS_PER_PIPELINE * len(reference) < 8e6, "Dataflow refuses graphs above 10 MB"


def test_options_become_the_flags_of_beam() -> None:
    options = BeamOptions(
        "FlinkRunner", {"parallelism": 4, "streaming": False, "save_main_session": True, "experiments": ["a", "b"]}
    )
    assert options.flags() == ["--parallelism=4", "--save_main_session", "--experiments=a", "--experiments=b"]
    for bad in ("--runner", "runner", "a b", ""):
        with pytest.raises(RefusedError, match="not the name"):
            BeamOptions(options={bad: 1}).flags()
    with pytest.raises(RefusedError, match="no option 'direct_workers'"):
        BeamOptions(options={"direct_workers": 2}).pipeline()
    with pytest.raises(RefusedError, match="SparkleRunner"):
        BeamOptions("SparkleRunner").pipeline()


def test_the_options_in_the_guide_are_beams() -> None:
    known = PipelineOptions([]).get_all_options()
    shown = [yaml.safe_load(b.text) for b in blocks(REPO / "docs/guide/beam.md") if b.language == "yaml"]
    runners = [block["beam"] for block in shown if "beam" in block]
    assert {r.get("runner", "DirectRunner") for r in runners} == {
        "DirectRunner",
        "DataflowRunner",
        "FlinkRunner",
        "SparkRunner",
    }
    for runner in runners:
        assert set(runner["options"]) <= set(known)
        BeamOptions(runner.get("runner", "DirectRunner"), runner["options"]).flags()


def test_a_path_of_this_machine_is_refused_for_other_machines() -> None:
    remote = BeamOptions("DataflowRunner")
    with pytest.raises(RefusedError, match="path of this machine"):
        remote.refuse_unshared("out", "--out")
    for shared in ("s3://bucket/out", "file:///mnt/shared/out"):
        remote.refuse_unshared(shared, "--out")
    BeamOptions().refuse_unshared("out", "--out")
    with pytest.raises(RefusedError, match="stored embeddings"):
        executor.BeamExecutor(BeamOptions()).start(JobSpec(**(_spec().to_json() | {"job": "run"})))
