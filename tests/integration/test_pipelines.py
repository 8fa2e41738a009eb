"""Every pipeline with its own config, on the sample photographs: the plan, the run, and the run again."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from clipfilter.operations.verify import verify_run
from tests.support.commands import command
from tests.support.edition import REVIEWED_BY_DEMO
from tests.support.engine import PHOTOS, REPO
from tests.support.web import web

pytestmark = pytest.mark.integration


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder like a checkout, with a few of the sample photographs."""
    (tmp_path / "samples" / "photos").mkdir(parents=True)
    # Something for the queue of `moderate` is among them.
    for path in [*sorted(PHOTOS.glob("c*.jp*"))[:9], PHOTOS / REVIEWED_BY_DEMO]:
        (tmp_path / "samples" / "photos" / path.name).symlink_to(path)
    (tmp_path / "samples" / "photos" / "captions.jsonl").symlink_to(PHOTOS / "captions.jsonl")
    return tmp_path


def pipeline(work: Path, name: str, *more: str, code: int = 0) -> dict[str, Any]:
    folder = REPO / "pipelines"
    done = command(str(folder / f"{name}.py"), str(folder / f"{name}.yaml"), "--json", *more, cwd=work, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return dict(json.loads(done.stdout)) if code != 2 else {"error": done.stderr}


@pytest.mark.parametrize("name", ["score", "moderate", "nightly"])
def test_plan_run_and_again(name: str, work: Path) -> None:
    plan = pipeline(work, name, "--dry-run")
    assert plan["estimate"]["images"] > 5
    assert plan["estimate"]["hours"] > 0
    assert not (work / "out").exists(), "a dry run writes nothing"
    first = pipeline(work, name)
    out = work / "out" / name
    assert first["totals"]["rows"] == plan["estimate"]["images"]
    assert verify_run(str(out)).problems == []
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")}
    again = pipeline(work, name)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*.parquet")} == stamps
    assert again["version"] == first["version"]
    if name == "moderate":
        with open(out / "queue.csv", newline="") as file:
            queue = list(csv.DictReader(file))
        assert len(queue) == first["totals"]["review"] > 0
        excess = [float(row["excess"]) for row in queue]
        assert excess == sorted(excess, reverse=True)


def test_ingest(work: Path) -> None:
    with web() as server:
        lines = [f"{server.base}/good/{n}.jpg,number {n}" for n in range(12)] + [f"{server.base}/404/1.jpg,gone"]
        (work / "urls.csv").write_text("url,caption\n" + "\n".join(lines) + "\n")
        config = (REPO / "pipelines" / "ingest.yaml").read_text() + "private: true\n"
        (work / "ingest.yaml").write_text(config)

        def run(*more: str) -> dict[str, Any]:
            pipeline = str(REPO / "pipelines" / "ingest.py")
            return dict(json.loads(command(pipeline, "ingest.yaml", "--json", *more, cwd=work).stdout))

        plan = run("--dry-run")
        assert (plan["to fetch"], plan["estimate"]["source_bytes"]) == (13, 1_300_000)
        assert sum(server.asked.values()) == 0
        assert run()["states"] == {"success": 12, "failed_to_download": 1}
        assert run()["fetched"] == {"failed_to_download": 1}
        assert server.asked["/good/3.jpg"] == 1


def test_a_misspelt_config_is_refused_with_exit_code_2(work: Path) -> None:
    (work / "bad.yaml").write_text("source: {url: samples/photos}\nuot: x\n")
    done = command(str(REPO / "pipelines" / "score.py"), "bad.yaml", cwd=work, check=False)
    assert done.returncode == 2
    assert done.stderr == "clipfilter: bad.yaml:2:1: unknown key 'uot'; did you mean 'out'?\n"
