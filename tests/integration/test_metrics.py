"""Metrics are scraped over HTTP while a real run goes on, and are its commits' numbers when it is done."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import tarfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from clipfilter.engine.driver import Progress
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.engine.metrics import MetricsOptions, RunMetrics, published, together
from clipfilter.errors import RefusedError
from clipfilter.runs import ledger
from clipfilter.storage import Directory
from tests.support.commands import fork_server
from tests.support.engine import FRACTION_POLICY, REPO, cli, policy_file, write_tars

pytestmark = pytest.mark.integration


def parse(text: str) -> dict[tuple[str, str, str], float]:
    """{(sample name, stage or "", the last label's value): value}."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            labels.pop("job_kind")
            stage = labels.pop("stage", "")
            found[sample.name, stage, next(iter(labels.values()), "")] = sample.value
    return found


def scrape(url: str) -> dict[tuple[str, str, str], float]:
    with urllib.request.urlopen(url, timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        return parse(answer.read().decode())


@pytest.mark.processes
def test_an_endpoint_is_scraped_during_a_run_and_agrees_with_its_commits(
    dataset: Path, policy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "data"
    broken.mkdir()
    for tar in dataset.iterdir():
        shutil.copy(tar, broken / tar.name)
    spoil(broken / "00001.tar")
    scraped: list[dict[tuple[str, str, str], float]] = []
    stop = threading.Event()
    with published(MetricsOptions(port=0), "run") as metrics:
        assert metrics is not None
        url = re.search(r"http://127\.0\.0\.1:\d+/metrics", capsys.readouterr().err)
        assert url
        assert url[0].startswith("http://127.0.0.1:"), "loopback unless told otherwise"

        def watch() -> None:
            while not stop.wait(0.1):
                scraped.append(scrape(url[0]))

        thread = threading.Thread(target=watch)
        thread.start()
        result = run_job(
            JobRequest("run", str(broken), str(tmp_path / "out"), policy=policy, engine="local", max_failures=0.5),
            together(metrics),
        )
        metrics.finish(result)
        stop.set()
        thread.join()
        last = scrape(url[0])
    with pytest.raises(urllib.error.URLError, match="refused"):
        scrape(url[0])

    out = Directory(str(tmp_path / "out"))
    commits = list(ledger.commits(out))
    counts = {name: sum(c.counts[name] for c in commits) for name in ("embedded", "failed", "keep", "review", "reject")}
    assert counts["failed"] > 0
    for name in ("keep", "review", "reject"):
        assert last["clipfilter_decisions_total", "decided", name] == counts[name]
        assert last["clipfilter_dataset_rows", "", name] == result.totals[name]
    for name in ("embedded", "failed"):
        assert last["clipfilter_rows_total", "decided", name] == counts[name]
    assert last["clipfilter_failed_rows_total", "decided", "decode_error"] == counts["failed"]
    assert last["clipfilter_shards_total", "decided", "done"] == 3
    steps = {name for commit in commits for name in commit.work.of_worker.seconds}
    for step in steps:
        seconds = sum(commit.work.of_worker.seconds.get(step, 0) for commit in commits)
        assert last["clipfilter_worker_seconds_total", "decided", step] == pytest.approx(seconds)
    waited = sum(commit.work.of_worker.encoder_waited for commit in commits)
    assert waited > 0
    assert last["clipfilter_encoder_wait_seconds_total", "decided", "no_batch"] == pytest.approx(waited)
    assert last["clipfilter_exit_code", "", ""] == 0
    assert abs(last["clipfilter_finished_timestamp_seconds", "", ""] - time.time()) < 60
    assert last["clipfilter_queue_depth", "", "running"] == 0

    # While it ran: shards in work, a worker, counters that only rise.
    assert max(s.get(("clipfilter_queue_depth", "", "running"), 0) for s in scraped) > 0
    assert max(s.get(("clipfilter_workers", "", ""), 0) for s in scraped) > 0
    assert max(s.get(("clipfilter_images_per_second", "", ""), 0) for s in scraped) > 0
    done = [s.get(("clipfilter_shards_total", "decided", "done"), 0) for s in scraped]
    assert done == sorted(done)
    assert len(set(done)) > 1
    assert "clipfilter_exit_code" not in {name for name, _, _ in scraped[0]}


def spoil(tar: Path) -> None:
    """Zero the bytes of one picture in a tar."""
    data = bytearray(tar.read_bytes())
    with tarfile.open(tar) as archive:
        member = next(m for m in archive if m.name.endswith("jpg"))
    data[member.offset_data : member.offset_data + member.size] = bytes(member.size)
    tar.write_bytes(data)


def test_a_rerun_counts_what_it_reuses_apart_and_both_stages_have_their_own(tmp_path: Path) -> None:
    dataset = write_tars(tmp_path / "tars", 3, 8)
    policy = policy_file(tmp_path, FRACTION_POLICY)
    request = JobRequest("run", str(dataset), str(tmp_path / "out"), policy=policy, engine="local", copy=False)
    seen = []
    for _ in range(2):
        metrics = RunMetrics("run")
        metrics.finish(run_job(request, metrics))
        seen.append(parse(generate_latest(metrics).decode()))
    first, second = seen
    for stage in ("scored", "decided"):
        assert first["clipfilter_shards_total", stage, "done"] == 3
        assert first["clipfilter_shards_total", stage, "reused"] == 0
        assert second["clipfilter_shards_total", stage, "done"] == 0
        assert second["clipfilter_shards_total", stage, "reused"] == 3
        assert second["clipfilter_decisions_total", stage, "keep"] == 0
    assert first["clipfilter_decisions_total", "decided", "keep"] > 0
    assert second["clipfilter_dataset_rows", "", "keep"] == first["clipfilter_dataset_rows", "", "keep"] > 0


def test_the_command_serves_and_writes_a_file(policy: str, tmp_path: Path) -> None:
    dataset = write_tars(tmp_path / "tars", 1, 16)
    file = tmp_path / "clipfilter.prom"
    process = subprocess.Popen(
        [fork_server().python, "-m", "clipfilter", "run", str(dataset), "--policy", policy, "--out", str(tmp_path / "out"), "-q",
         "--engine", "local", "--metrics-port", "0", "--metrics-file", str(file)],
        stderr=subprocess.PIPE, text=True, cwd=REPO,
    )  # fmt: skip
    assert process.stderr is not None
    address = re.search(r"http://127\.0\.0\.1:\d+/metrics", process.stderr.readline())
    assert address
    during = scrape(address[0])
    assert ("clipfilter_workers", "", "") in during
    assert process.wait(timeout=120) == 0
    process.stderr.close()
    version = json.loads((tmp_path / "out/versions/000001.json").read_text())
    last = parse(file.read_text())
    assert last["clipfilter_exit_code", "", ""] == 0
    for name in ("keep", "review", "reject"):
        assert last["clipfilter_decisions_total", "decided", name] == version["totals"][name]
    assert last["clipfilter_rows_total", "decided", "embedded"] == version["totals"]["embedded"]


def test_a_night_has_metrics_too(policy: str, tmp_path: Path) -> None:
    dataset, file = write_tars(tmp_path / "tars", 1, 12), tmp_path / "clipfilter.prom"
    cli(
        "nightly",
        str(dataset),
        "-p",
        policy,
        "-o",
        str(tmp_path / "out"),
        "-q",
        "--engine",
        "local",
        "--metrics-file",
        str(file),
    )
    assert 'job_kind="nightly"' in file.read_text()
    last = parse(file.read_text())
    totals = json.loads((tmp_path / "out/versions/000001.json").read_text())["totals"]
    assert last["clipfilter_dataset_rows", "", "rows"] == totals["rows"] == 12
    for name in ("keep", "review", "reject"):
        assert last["clipfilter_decisions_total", "decided", name] == totals[name]


def test_a_taken_port_and_a_bad_file_are_refused_before_work(dataset: Path, policy: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = cli(
            "run", str(dataset), "-p", policy, "-o", str(tmp_path / "out"), "--metrics-port", str(port), check=False
        )
    assert done.returncode == 2
    assert "choose another --metrics-port" in done.stderr
    assert not (tmp_path / "out").exists()
    missing = MetricsOptions(file=str(tmp_path / "none" / "x.prom"))
    with pytest.raises(RefusedError, match="--metrics-file"), published(missing, "run"):
        pass


def test_a_file_that_cannot_be_written_any_more_does_not_end_the_job(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    with published(MetricsOptions(file=str(folder / "x.prom")), "run") as metrics:
        assert metrics is not None
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        metrics.update(Progress(stage="decided"))
    assert not folder.exists()


def test_updates_cost_next_to_nothing() -> None:
    """The driver updates about five times a second."""
    metrics, progress = RunMetrics("run"), Progress(stage="decided")
    progress.seconds.update({f"step{n}": 1.0 for n in range(6)})
    began = time.process_time()
    for _ in range(1_000):
        metrics.update(progress)
    assert time.process_time() - began < 1.0
