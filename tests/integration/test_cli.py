"""The command line as a person meets it: exit codes, sentences, signals, JSON, nothing heavy at the start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.edition import KEPT_BY_DEMO, LEAST_KEPT_BY_DEMO, NOT_KEPT_BY_DEMO
from tests.support.engine import PHOTOS, REPO, cli, samples, stray_files
from tests.support.sources import write_webdataset

pytestmark = pytest.mark.integration


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv = ['clipfilter', '--help']\n"
        "from clipfilter.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'pyarrow', 'open_clip', 'numpy', 'PIL', 'fsspec', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=REPO, check=True)
    for command in ("run", "embed", "filter", "score", "export", "verify", "report", "policy"):
        assert command in done.stdout


def test_the_sample_photographs_by_the_demo_policy(tmp_path: Path) -> None:
    """What `make demo` does, on the local engine: planted trouble is found, and only that."""
    out = tmp_path / "out"
    done = cli(
        "run", str(PHOTOS), "--policy", "demo", "--out", str(out), "--max-failures", "0.1", "--json"
    )  # fmt: skip
    result = json.loads(done.stdout)
    assert result["exit_code"] == 0
    totals = result["totals"]
    assert totals["failed_by_class"] == {"decode_error": 2, "image_too_large": 1}
    assert totals["keep"] > LEAST_KEPT_BY_DEMO
    assert Path(result["report"]).stat().st_size > 100_000
    assert stray_files(out) == []
    decisions = _decisions(out)
    for name in NOT_KEPT_BY_DEMO:
        assert decisions[name] != "keep", name
    for name in KEPT_BY_DEMO:
        if name in decisions:
            assert decisions[name] == "keep", name


def _decisions(out: Path) -> dict[str, str]:
    import pyarrow.parquet as pq

    tables = [pq.read_table(path, columns=["cf_key", "cf_decision"]) for path in (out / "annotated").iterdir()]
    return {row["cf_key"]: row["cf_decision"] for table in tables for row in table.to_pylist()}


def test_failures_above_the_limit_have_their_own_exit_code(tmp_path: Path) -> None:
    made = samples(20)
    made[3]["jpg"] = b"<html>"
    write_webdataset(tmp_path / "tars" / "0.tar", made)
    arguments = ["run", str(tmp_path / "tars"), "--policy", "caption-match", "--out", str(tmp_path / "out")]
    done = cli(*arguments, check=False)
    assert done.returncode == 3
    assert "1 of 20 rows failed" in " ".join(done.stdout.split())
    assert cli(*arguments, "--max-failures", "0.06").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "/nowhere", "--policy", "demo", "--out", "/tmp/x"], "/nowhere"),
        (["run", str(PHOTOS), "--policy", "demoo", "--out", "/tmp/x"], "demo"),
        (["run", str(PHOTOS), "--out", "/tmp/x"], "--policy"),
        (["run", str(PHOTOS), "--policy", "demo", "--out", "/tmp/x", "--decode", "quick"], "decode"),
        (["verify", "/nowhere"], "is not a run directory"),
        (["export", "/nowhere", "--to", "/tmp/x"], "is not a run directory"),
        (["report", "/nowhere"], "is not a run directory"),
        (["policy", "validate", "/nowhere.yaml"], "/nowhere.yaml"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_wrong_requests_get_one_sentence_and_exit_code_2(arguments: list[str], sentence: str) -> None:
    done = cli(*arguments, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "engine"),
    [
        (signal.SIGTERM, 143, "local"),
        (signal.SIGINT, 130, "local"),
        pytest.param(signal.SIGTERM, 143, "ray", marks=pytest.mark.soak),
    ],
)
def test_signals_stop_at_once_leave_nothing_behind_and_say_how_to_resume(
    number: signal.Signals, code: int, engine: str, tmp_path: Path
) -> None:
    for shard in range(6):
        write_webdataset(tmp_path / "tars" / f"{shard}.tar", samples(24, shard * 24))
    out = tmp_path / "out"
    arguments = ["run", str(tmp_path / "tars"), "--policy", "caption-match", "--out", str(out), "-q"]
    arguments += ["--batch-size", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "clipfilter", *arguments, "--engine", engine], stderr=subprocess.PIPE, text=True, cwd=REPO
    )  # fmt: skip
    while process.poll() is None and not list(out.glob("commits/*.json")):
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "run the same command again to resume" in errors
    assert "Traceback" not in errors
    assert not (out / "versions").exists()
    cli(*arguments)
    assert "ok" in cli("verify", str(out)).stdout
    assert stray_files(out) == []


def test_policy_commands(tmp_path: Path) -> None:
    names = cli("policy", "list").stdout.split()
    assert {"demo", "caption-match", "curate-basic", "marketplace-safety"} <= set(names)
    for name in names:
        assert name in cli("policy", "validate", name).stdout
    assert json.loads(cli("policy", "show", "demo", "--json").stdout)["policy"] == "demo"
    bad = tmp_path / "bad.yaml"
    bad.write_text("policy: x\nversion: 1\nrules:\n  - id: a\n    concpt: {any_of: [cat]}\n    reject: {above: 0.5}\n")
    done = cli("policy", "validate", str(bad), check=False)
    assert done.returncode == 2
    assert "bad.yaml:5" in done.stderr
    assert "concept" in done.stderr


def test_a_full_disk_stops_with_a_sentence_and_the_run_resumes(tmp_path: Path) -> None:
    """A tiny file system as OUT: the run cannot finish there; with room it does."""
    write_webdataset(tmp_path / "tars" / "0.tar", samples(40))
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    arguments = ["run", str(tmp_path / "tars"), "--policy", "caption-match", "--out", str(disk / "out"), "-q"]
    try:
        done = cli(*arguments, check=False)
        assert done.returncode in (1, 3)
        assert "No space left" in done.stderr + done.stdout + (disk / "out" / "run.log").read_text()
        assert not list(disk.glob("out/commits/*.json"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
        assert cli(*arguments).returncode == 0
        assert "ok" in cli("verify", str(disk / "out")).stdout
    finally:
        subprocess.run(["umount", str(disk)], check=False)
