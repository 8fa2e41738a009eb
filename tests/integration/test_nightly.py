"""A week of nights on a growing source: the dataset is what it should be every morning, alerts come when they should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clipfilter.engine.executors.inline import InlineExecutor
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.errors import RefusedError
from clipfilter.nightly import NightRequest, NightResult, history, roll_back, run_night
from clipfilter.operations.export import export_run
from clipfilter.operations.verify import verify_run
from tests.support.commands import fork_server
from tests.support.engine import REPO, cli, policy_file
from tests.support.nights import (
    FRACTION_POLICY,
    POLICY,
    arrive,
    dataset,
    odd_samples,
    photo_samples,
    webhook,
)

pytestmark = pytest.mark.integration

ROWS = 40


class Week:
    """A source, its dataset, and the alerts that were posted.

    One thread everywhere: another number of threads may move the last bit of a score.
    """

    def __init__(self, folder: Path, policy: str, hook: tuple[str, list[dict[str, Any]]]) -> None:
        self.source, self.out, self.policy = folder / "arrivals", folder / "out", policy
        self.address, self.posted = hook
        self.folder = folder
        self.source.mkdir()
        self.fresh_runs = 0

    def night(self, **more: Any) -> NightResult:
        """One night with the local engine."""
        del self.posted[:]
        job = JobRequest("run", str(self.source), str(self.out), policy=self.policy, engine="local", threads=1)
        return run_night(NightRequest(job, silence_nights=1, webhook=self.address, **more))

    def command(self, *more: str) -> list[str]:
        return [
            "nightly", str(self.source), "--policy", self.policy, "--out", str(self.out), "--engine", "local",
            "--threads", "1", "--silence", "1", "--webhook", self.address, "--json", *more,
        ]  # fmt: skip

    def kinds(self) -> list[str]:
        """What the webhook was told tonight."""
        assert len(self.posted) <= 1, "one post per night"
        return [alert["kind"] for post in self.posted for alert in post["alerts"]]

    def fresh(self, source: Path | None = None) -> list[dict[str, Any]]:
        """The rows of a fresh run over the source as it is (or over another folder), by another directory."""
        self.fresh_runs += 1
        out = self.folder / f"fresh{self.fresh_runs}"
        run_job(
            JobRequest("run", str(source or self.source), str(out), policy=self.policy, copy=False),
            executor=InlineExecutor(threads=1),
        )
        return dataset(out)


@pytest.fixture
def week(tmp_path: Path) -> Iterator[Week]:
    with webhook() as hook:
        yield Week(tmp_path, policy_file(tmp_path, POLICY), hook)


def test_seven_nights(week: Week) -> None:
    # Night 1: the first two files.
    arrive(week.source, "a.tar", photo_samples(ROWS, 1))
    arrive(week.source, "b.tar", photo_samples(ROWS, 2))
    first = week.night()
    assert (first.exit_code, first.outcome, first.version, week.kinds()) == (0, "done", "000001", [])
    assert first.shards["new"] == 2
    assert dataset(week.out) == week.fresh()

    # Night 2: one more; only it is processed.
    arrive(week.source, "c.tar", photo_samples(ROWS, 3))
    old = {path: path.stat().st_mtime_ns for path in week.out.glob("annotated/*")}
    second = week.night()
    assert (second.exit_code, second.version, week.kinds()) == (0, "000002", [])
    assert second.counts["rows"] == ROWS
    assert {path: path.stat().st_mtime_ns for path in old} == old
    before = dataset(week.out)
    assert before == week.fresh()

    # Night 3: nothing arrives.
    third = week.night()
    assert (third.exit_code, third.outcome, third.version, week.kinds()) == (3, "unchanged", "000002", ["silence"])
    assert dataset(week.out) == before

    # Night 4: a file has changed, another is new, and the job is killed in the middle.
    arrive(week.source, "b.tar", photo_samples(ROWS, 4))
    arrive(week.source, "d.tar", photo_samples(ROWS, 5))
    commits = set(week.out.glob("commits/*"))
    del week.posted[:]
    process = subprocess.Popen(
        [sys.executable, "-m", "clipfilter", *week.command()], cwd=REPO, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and len(set(week.out.glob("commits/*")) - commits) < 1:
        time.sleep(0.005)
    assert process.poll() is None, "it should have been killed in the middle"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert dataset(week.out) == before, "a killed night changes nothing"
    assert week.posted == []

    # ... and is run again: it resumes, and says that the one before was killed.
    done = {path.name: path.stat().st_mtime_ns for path in set(week.out.glob("commits/*")) - commits}
    assert done, "one shard was committed before the kill"
    fourth = week.night()
    assert (fourth.exit_code, fourth.night, fourth.version, week.kinds()) == (3, 5, "000003", ["failure"])
    assert "night 4 never finished" in fourth.alerts[0].message
    assert (fourth.shards["new"], fourth.shards["changed"]) == (1, 1)
    assert {name: (week.out / "commits" / name).stat().st_mtime_ns for name in done} == done
    good = dataset(week.out)
    assert good == week.fresh()

    # Night 6: a file full of something else.
    arrive(week.source, "e.tar", odd_samples(ROWS, 6))
    sixth = week.night()
    assert (sixth.exit_code, sixth.version, week.kinds()) == (3, "000004", ["drift"])
    assert {item.of for item in sixth.drift if item.alarm} >= {"cf_score.animals", "cf_score.small", "decisions"}
    assert dataset(week.out) == week.fresh()

    # In the morning it is taken back: everything reads the earlier version.
    assert "version 5 is version 3 again" in cli("history", str(week.out), "--rollback", "000003").stdout
    assert dataset(week.out) == good
    assert verify_run(str(week.out)).problems == []
    filtered = run_job(
        JobRequest("filter", str(week.out), str(week.folder / "filtered"), policy=week.policy),
        executor=InlineExecutor(threads=1),
    )
    assert filtered.totals["rows"] == len(good)
    kept = sum(row["cf_decision"] == "keep" for row in good)
    (week.source / "a.tar").rename(week.folder / "a.tar")  # its rows are in the run's own copies
    assert export_run(str(week.out), str(week.folder / "exported"))["rows"] == kept
    (week.folder / "a.tar").rename(week.source / "a.tar")

    # Night 8: the bad file still lies there and stays out; a good one is added, and is not compared with the bad night.
    arrive(week.source, "f.tar", photo_samples(ROWS, 7))
    eighth = week.night()
    assert (eighth.exit_code, eighth.version, week.kinds()) == (0, "000006", [])
    assert (eighth.shards["new"], eighth.shards["set_aside"]) == (1, 1)
    (week.source / "e.tar").rename(week.folder / "e.tar")
    assert dataset(week.out) == week.fresh()
    (week.folder / "e.tar").rename(week.source / "e.tar")

    # Night 9: the supplier sends that file again, repaired.
    arrive(week.source, "e.tar", photo_samples(ROWS, 8))
    ninth = week.night()
    assert (ninth.exit_code, ninth.version, week.kinds()) == (0, "000007", [])
    assert dataset(week.out) == week.fresh()
    assert verify_run(str(week.out)).problems == []

    past = json.loads(cli("history", str(week.out), "--json").stdout)
    assert [(night["night"], night["outcome"]) for night in past["nights"]] == [
        (1, "done"), (2, "done"), (3, "unchanged"), (4, "unfinished"), (5, "done"), (6, "done"), (7, "rollback"),
        (8, "done"), (9, "done"),
    ]  # fmt: skip
    assert [v["rows"] for v in past["versions"]] == [rows * ROWS for rows in (2, 3, 4, 5, 4, 5, 6)]
    table = cli("history", str(week.out)).stdout
    assert "rollback to 3" in table
    assert "done: drift" in table


def test_two_overlapping_nights_share_the_work(week: Week) -> None:
    arrive(week.source, "a.tar", photo_samples(8, 1))
    week.night()
    for name, seed in (("b.tar", 2), ("c.tar", 3), ("d.tar", 4), ("e.tar", 5)):
        arrive(week.source, name, photo_samples(8, seed))
    pair = [
        subprocess.Popen(
            [fork_server().python, "-m", "clipfilter", *week.command()], cwd=REPO, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    results = [process.communicate(timeout=300) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], results
    assert week.posted == []
    told = [json.loads(out) for out, _ in results]
    assert sorted(item["night"] for item in told) == [2, 3]
    assert sum(item["counts"].get("rows", 0) for item in told) == 32, "a row is counted by one of the nights only"
    rows = dataset(week.out)
    assert len({(row["cf_shard"], row["cf_row"]) for row in rows}) == len(rows) == 40
    assert rows == week.fresh()
    assert verify_run(str(week.out)).problems == []
    names = sorted(path.name for path in week.out.glob("versions/*"))
    assert names == [f"{n:06d}.json" for n in range(1, len(names) + 1)]


def test_thresholds_stay_frozen_until_a_refit(week: Week) -> None:
    week.policy = policy_file(week.folder, FRACTION_POLICY, "fraction.yaml")
    arrive(week.source, "a.tar", photo_samples(30, 1))
    first = week.night()
    frozen = json.loads((week.out / "versions" / "000001.json").read_text())["thresholds"]
    arrive(week.source, "b.tar", photo_samples(30, 2))
    week.night()
    version = json.loads((week.out / "versions" / "000002.json").read_text())
    assert version["thresholds"] == frozen
    limit = frozen["best.reject"]
    assert all((row["cf_decision"] == "reject") == (row["cf_score.match"] < limit) for row in dataset(week.out))
    refit = week.night(refit=True)
    assert refit.exit_code == 3, "nothing new came"
    assert week.kinds() == ["silence"]
    version = json.loads((week.out / "versions" / "000003.json").read_text())
    assert version["thresholds"] != frozen
    assert dataset(week.out) == week.fresh(), "after a refit all rows are decided as in a fresh run"
    assert verify_run(str(week.out)).problems == []
    # The way back has the old numbers, and so have the rows that come after it.
    roll_back(str(week.out), "2")
    arrive(week.source, "c.tar", photo_samples(30, 3))
    week.night()
    rows = dataset(week.out)
    assert len(rows) == 90
    assert all((row["cf_decision"] == "reject") == (row["cf_score.match"] < limit) for row in rows)
    assert first.totals["rows"] == 30
    assert [n["outcome"] for n in history(str(week.out))["nights"]] == ["done", "done", "done", "rollback", "done"]


def test_a_source_that_goes_away(week: Week) -> None:
    arrive(week.source, "a.tar", photo_samples(4, 1))
    arrive(week.source, "b.tar", photo_samples(4, 2))
    week.night()
    whole = dataset(week.out)
    (week.source / "a.tar").rename(week.folder / "a.tar")
    kept = week.night()
    assert (kept.version, kept.shards["vanished"], week.kinds()) == ("000001", 1, ["silence"])
    assert dataset(week.out) == whole
    dropped = week.night(missing="drop")
    assert (dropped.version, dropped.outcome, dropped.totals["rows"]) == ("000002", "done", 4)
    assert dataset(week.out) == [row for row in whole if row["cf_shard"] == dataset(week.out)[0]["cf_shard"]]
    assert verify_run(str(week.out)).problems == []
    # An empty listing is more likely a broken mount than an empty dataset.
    (week.source / "b.tar").rename(week.folder / "b.tar")
    emptied = week.night(missing="drop")
    assert (emptied.version, week.kinds()) == ("000002", ["failure", "silence"])
    week.source.rename(week.folder / "away")
    with pytest.raises(Exception, match="arrivals"):
        week.night()
    assert week.kinds() == ["failure"]
    assert history(str(week.out))["nights"][-1]["outcome"] == "failed"
    # What is refused before the night begins is told as well.
    (week.folder / "away").rename(week.source)
    week.policy = policy_file(week.folder, FRACTION_POLICY, "other.yaml")
    with pytest.raises(RefusedError, match="another plan"):
        week.night()
    assert week.kinds() == ["failure"]
    assert len(history(str(week.out))["nights"]) == 5
