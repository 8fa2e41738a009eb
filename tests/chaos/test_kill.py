"""Processes killed with SIGKILL at random moments; run again, the result is byte-equal to an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.engine import (
    FRACTION_POLICY,
    POLICY,
    REPO,
    cli,
    commits,
    data_files,
    policy_file,
    stray_files,
    write_tars,
)
from tests.support.quick import BATCH_SIZE

pytestmark = [pytest.mark.chaos, pytest.mark.cores]

SHARDS = 6
SEED = int(os.environ.get("CLIPFILTER_CHAOS_SEED", "20261121"))
POLICIES = {"one-stage": POLICY, "two-stage": FRACTION_POLICY}
BATCH = ["--batch-size", str(BATCH_SIZE)]
COMMITS = {"one-stage": SHARDS, "two-stage": 2 * SHARDS}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("chaos") / "tars", SHARDS, 20)


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("policies")
    return {name: policy_file(folder, text, f"{name}.yaml") for name, text in POLICIES.items()}


@pytest.fixture(scope="module")
def undisturbed(
    source: Path, policies: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """The run directory of an undisturbed run, by stages and threads; made when first asked for."""
    made: dict[tuple[str, int], Path] = {}

    def get(stages: str, threads: int) -> Path:
        if (stages, threads) not in made:
            out = tmp_path_factory.mktemp("undisturbed") / "out"
            cli(
                "run",
                str(source),
                "--policy",
                policies[stages],
                "--out",
                str(out),
                "--threads",
                str(threads),
                "-q",
                *BATCH,
            )
            made[stages, threads] = out
        return made[stages, threads]

    return get


class Running:
    """A run under way in a session of its own, so that all its processes can be found and killed."""

    def __init__(self, arguments: list[str], out: Path, env: dict[str, str] | None = None) -> None:
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-m", "clipfilter", *arguments],
            cwd=REPO, env=os.environ | (env or {}), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def wait_for_commits(self, count: int) -> bool:
        """True once that many commits are there; False when the run ended before."""
        folder = self.out / "commits"
        while self.process.poll() is None:
            if count == 0 or (folder.is_dir() and len(list(folder.glob("*.json"))) >= count):
                return True
            time.sleep(0.01)
        return False

    def descendants(self, marker: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if marker in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def finish(self) -> int:
        _, errors = self.process.communicate(timeout=300)
        if self.process.returncode > 0:
            raise AssertionError(errors)
        return self.process.returncode


def kill_driver(run: Running) -> bool:
    os.kill(run.process.pid, signal.SIGKILL)
    return True


def kill_everything(run: Running) -> bool:
    os.killpg(run.process.pid, signal.SIGKILL)
    return True


def killer_of(marker: str) -> Callable[[Running], bool]:
    def kill(run: Running) -> bool:
        victims = run.descendants(marker)
        for victim in victims[:1]:
            victim.kill()
        return bool(victims)

    return kill


VICTIMS: dict[str, tuple[str, Callable[[Running], bool]]] = {
    "driver": ("local", kill_driver),
    "worker": ("local", killer_of("clipfilter.engine.executors.worker_process")),
    "everything": ("local", kill_everything),
    "ray-driver": ("ray", kill_driver),
    "ray-actor": ("ray", killer_of("ray::EncoderActor")),
}
# 19 kills here and one of a whole node below. `make test` has one of each kind, and both kinds of policies; the others are
# the same at other moments.
KILLS = {"driver": 6, "worker": 4, "everything": 2, "ray-driver": 3, "ray-actor": 4}
EVERY_TIME = {("driver", 1), ("worker", 0), ("everything", 1), ("ray-driver", 0), ("ray-actor", 1)}
CASES = [
    pytest.param(victim, number, marks=[] if (victim, number) in EVERY_TIME else pytest.mark.soak)
    for victim, count in KILLS.items()
    for number in range(count)
]


def assert_as_if_undisturbed(out: Path, want: Path) -> None:
    assert data_files(out) == data_files(want)
    assert commits(out) == commits(want)
    versions = sorted((out / "versions").iterdir())
    assert [path.name for path in versions] == ["000001.json"]
    assert json.loads(versions[0].read_text()) == json.loads((want / "versions" / "000001.json").read_text())
    assert stray_files(out) == []
    assert json.loads(cli("verify", str(out), "--json").stdout) | {"proved": 0} == {
        "ok": True, "notes": [], "problems": [], "proved": 0,
    }  # fmt: skip


@pytest.mark.parametrize(("victim", "number"), CASES)
def test_killed_at_a_random_moment_and_run_again(
    victim: str, number: int, source: Path, policies: dict[str, str], undisturbed: Any, tmp_path: Path
) -> None:
    draw = random.Random(f"{SEED}-{victim}-{number}")
    stages = "two-stage" if number % 2 else "one-stage"
    engine, kill = VICTIMS[victim]
    moment = draw.randrange(COMMITS[stages])
    out = tmp_path / "out"
    arguments = ["run", str(source), "--policy", policies[stages], "--out", str(out), "--engine", engine, "-q"]
    arguments += ["--threads", "2", *BATCH]
    run = Running(arguments, out)
    reached = run.wait_for_commits(moment)
    time.sleep(draw.uniform(0, 0.4) if moment else draw.uniform(0, 4))
    print(f"seed {SEED}: {stages}, killing the {victim} after {moment} commits (reached: {reached})")
    if run.process.poll() is None:
        kill(run)
    if run.finish() != 0:
        cli(*arguments)
    assert_as_if_undisturbed(out, undisturbed(stages, 2))


@pytest.fixture
def two_nodes() -> Iterator[Any]:
    """A Ray cluster of two nodes on this machine, each with one CPU."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "c" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
    before = {name: os.environ.get(name) for name in token}
    os.environ.update(token)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        yield cluster, cluster.add_node(num_cpus=1)
    finally:
        cluster.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def test_a_lost_node_costs_no_row(
    two_nodes: Any, source: Path, policies: dict[str, str], undisturbed: Any, tmp_path: Path
) -> None:
    cluster, node = two_nodes
    out = tmp_path / "out"
    arguments = ["run", str(source), "--policy", policies["two-stage"], "--out", str(out), "-q"]
    arguments += ["--address", cluster.address, "--workers", "2", "--threads", "1", *BATCH]
    run = Running(arguments, out)
    assert run.wait_for_commits(2)
    cluster.remove_node(node, allow_graceful=False)
    if run.finish() != 0:
        cli(*arguments)
    assert_as_if_undisturbed(out, undisturbed("two-stage", 1))
    assert "actor" in (out / "run.log").read_text()
