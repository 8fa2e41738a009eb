"""Beam decides as `clipfilter filter` does, in one process and in several, and its statistics are those of the rows."""

from __future__ import annotations

import json
import runpy
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("apache_beam", reason="the extra `beam` is not installed")

from clipfilter.beam import transforms
from clipfilter.beam.executor import BeamExecutor
from clipfilter.beam.options import BeamOptions
from clipfilter.beam.statistics import StatisticsRequest, dataset_statistics
from clipfilter.engine.job import JobRequest, JobResult, run_job
from clipfilter.errors import RefusedError
from clipfilter.operations.verify import verify_run
from tests.support.engine import (
    FRACTION_POLICY,
    REPO,
    commits,
    data_files,
    photos,
    policy_file,
    stray_files,
)

pytestmark = pytest.mark.integration
SEVERAL = BeamOptions(options={"direct_running_mode": "multi_processing", "direct_num_workers": 2})


def pairs() -> list[tuple[bytes, str]]:
    """Pictures and captions: the repo's sample photographs."""
    return [(data, caption) for _, data, caption in photos()]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> JobResult:
    """An embedded Parquet dataset of three shards, with addresses; the first picture is in each shard, under another uid."""
    folder = tmp_path_factory.mktemp("many")
    rows = pairs()
    (folder / "data").mkdir()
    for shard, part in enumerate(np.array_split(np.arange(1, len(rows)), 3)):
        numbers = [0, *part.tolist()]
        table = pa.table(
            {
                "image": pa.array([rows[i][0] for i in numbers], pa.binary()),
                "caption": [rows[i][1] for i in numbers],
                "url": [f"https://host{i % 5}.test/{i}.jpg" if i % 7 else None for i in numbers],
            }
        )
        pq.write_table(table, folder / "data" / f"{shard}.parquet")
    return run_job(JobRequest("embed", str(folder / "data"), str(folder / "run"), engine="local"))


@pytest.fixture(scope="module")
def filtered(many: JobResult, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What `clipfilter filter` makes of it with a policy that ranks the whole dataset, and that policy."""
    folder = tmp_path_factory.mktemp("filtered")
    policy = policy_file(folder, FRACTION_POLICY)
    run_job(JobRequest("filter", many.out, str(folder / "out"), policy=policy, engine="local"))
    return folder / "out", policy


@pytest.mark.parametrize(
    "options", [BeamOptions(), pytest.param(SEVERAL, marks=pytest.mark.soak)], ids=["one process", "two processes"]
)
def test_every_row_is_decided_as_filter_decides_it(
    many: JobResult, filtered: tuple[Path, str], options: BeamOptions, tmp_path: Path
) -> None:
    expected, policy = filtered
    request = JobRequest("filter", many.out, str(tmp_path / "out"), policy=policy)
    result = run_job(request, executor=BeamExecutor(options))
    assert (result.exit_code, result.engine, result.rows_processed) == (0, "beam", many.totals["rows"])
    assert min(result.totals[name] for name in ("keep", "reject")) > 5
    found = {row["cf_uid"]: row for row in rows_of(tmp_path / "out")}
    wanted = {row["cf_uid"]: row for row in rows_of(expected)}
    assert found == wanted
    # Not only the rows: every file, every commit, the thresholds and the version.
    assert data_files(tmp_path / "out") == data_files(expected)
    assert commits(tmp_path / "out") == commits(expected)
    for name in ("plan.json", "versions/000001.json", "thresholds/000001.json"):
        assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes()
    assert stray_files(tmp_path / "out") == []
    assert verify_run(str(tmp_path / "out")).problems == []


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(out.glob("annotated/*")) for row in pq.read_table(path).to_pylist()]


def test_a_rerun_resumes_and_a_shard_that_fails_costs_only_itself(
    many: JobResult, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transforms, "_RETRY_SECONDS", 0.0)
    request = JobRequest("filter", many.out, str(tmp_path / "out"), policy=policy)
    hidden = sorted(Path(many.out, "embeddings").iterdir())[0]
    hidden.rename(tmp_path / "away")
    try:
        broken = run_job(request, executor=BeamExecutor(BeamOptions(), tasks_per_pipeline=2))
    finally:
        (tmp_path / "away").rename(hidden)
    assert broken.exit_code == 3
    assert broken.totals["shards"] == 2
    assert [shard.attempts for shard in broken.failed_shards] == [1]
    assert "log of the Beam workers" in broken.failed_shards[0].error
    before = commits(tmp_path / "out")
    whole = run_job(request, executor=BeamExecutor(BeamOptions()))
    assert (whole.exit_code, whole.totals["shards"]) == (0, 3)
    assert 0 < whole.rows_processed < many.totals["rows"]
    assert {name: commits(tmp_path / "out")[name] for name in before} == before
    assert run_job(request, executor=BeamExecutor(BeamOptions())).rows_processed == 0


def test_statistics_are_those_of_the_rows(filtered: tuple[Path, str], tmp_path: Path) -> None:
    run, out = filtered[0], tmp_path / "statistics"
    wanted = (0.0, 0.1, 0.5, 0.999, 1.0)
    found = dataset_statistics(StatisticsRequest(str(run), str(out), "url", wanted), BeamOptions())
    assert found == json.loads((out / "statistics.json").read_text())
    rows = rows_of(run)
    assert {name: found[name] for name in ("keep", "review", "reject")} == {
        name: sum(row["cf_decision"] == name for row in rows) for name in ("keep", "review", "reject")
    }
    for name in ("cf_score.match", "cf_score.best", "cf_similarity"):
        scores = np.array([row[name] for row in rows], np.float32)
        assert found["scores"][name]["ranked"] == len(rows)
        exact = np.quantile(scores, wanted, method="lower").tolist()
        assert list(found["scores"][name]["quantiles"].values()) == exact
    hosts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        hosts[row["url"].split("/")[2] if row["url"] else ""][row["cf_decision"]] += 1
    domains = [row for file in found["domains"]["files"] for row in pq.read_table(out / file).to_pylist()]
    assert {row["domain"]: (row["keep"], row["review"], row["reject"]) for row in domains} == {
        host: (counts["keep"], counts["review"], counts["reject"]) for host, counts in hosts.items()
    }
    assert len(domains) == found["domains"]["rows"] == 6
    assert all(row["keep_rate"] == row["keep"] / row["rows"] for row in domains)
    copies = sorted(row["cf_uid"] for row in rows if row["cf_key"] and row["cf_row"] == 0)
    assert (found["duplicates"]["groups"], found["duplicates"]["rows"]) == (1, 2)
    named = [row for file in found["duplicates"]["files"] for row in pq.read_table(out / file).to_pylist()]
    assert [(row["cf_uid"], row["keeper_uid"]) for row in named] == [(uid, copies[0]) for uid in copies[1:]]
    with pytest.raises(RefusedError, match="no column 'adress'"):
        dataset_statistics(StatisticsRequest(str(run), str(out), "adress"), BeamOptions())
    with pytest.raises(RefusedError, match="between 0 and 1"):
        dataset_statistics(StatisticsRequest(str(run), str(out), None, (1.5,)), BeamOptions())


def test_the_page_runs_it_all_from_a_config(
    many: JobResult, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "beam.yaml"
    config.write_text(
        f"run: {many.out}\npolicy: {policy}\nout: {tmp_path / 'out'}\n"
        f"beam: {{options: {{direct_num_workers: 1}}}}\nstatistics: {{out: {tmp_path / 'stats'}, url_column: url}}\n"
    )

    def page(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["refilter_beam.py", str(config), *more])
        assert runpy.run_path(str(REPO / "pipelines/refilter_beam.py"))["main"]() == 0
        return capsys.readouterr().out

    assert "nothing was done" in page("--dry-run")
    assert not (tmp_path / "out").exists()
    shown = json.loads(page("--json"))
    assert shown["totals"]["decided"] == many.totals["rows"]
    assert shown["statistics"]["duplicates"]["rows"] == 2
    config.write_text(config.read_text().replace("direct_num_workers", "direct_workers"))
    with pytest.raises(RefusedError, match="no option 'direct_workers'"):
        page()
