"""From s3:// to s3:// against a real HTTP endpoint: run, resume, verify, filter, report, export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from clipfilter.engine.job import JobRequest, run_job
from clipfilter.operations.export import export_run
from clipfilter.operations.verify import verify_run
from clipfilter.runs import ledger
from clipfilter.storage import Directory
from tests.support.engine import FRACTION_POLICY, cli, data_files, policy_file, samples
from tests.support.runs import commit_of
from tests.support.s3 import s3_server
from tests.support.sources import write_parquet

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def s3(dataset: Path) -> Iterator[Any]:
    with s3_server():
        fs = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        fs.mkdir("bucket")
        fs.put(str(dataset), "bucket/tars", recursive=True)
        yield fs


def remote_hashes(fs: Any, out: str, folder: str, local: Path) -> dict[str, str]:
    """The data files of a remote run, fetched and hashed."""
    fs.get(f"{out}/{folder}", str(local / folder), recursive=True)
    return {name: value for name, value in data_files(local).items() if name.startswith(folder)}


def test_a_run_between_buckets_equals_the_local_one(s3: Any, finished: Any, policy: str, tmp_path: Path) -> None:
    request = JobRequest("run", "s3://bucket/tars", "s3://bucket/out", policy=policy, engine="local")
    result = run_job(request)
    assert result.totals == finished.totals
    assert verify_run("s3://bucket/out").problems == []
    for folder in ("embeddings", "annotated"):
        local = {k: v for k, v in data_files(Path(finished.out)).items() if k.startswith(folder)}
        remote = remote_hashes(s3, "bucket/out", folder, tmp_path)
        # cf_shard hashes the path below the source, which is the same; nothing else may depend on the place.
        assert remote == local
    again = run_job(request)
    assert again.rows_processed == 0
    assert again.version == result.version
    summary = export_run("s3://bucket/out", "s3://bucket/kept")
    assert summary["rows"] == result.totals["keep"]
    assert s3.exists("bucket/kept/sizes.json")


def test_filter_report_and_the_command_line_on_s3(s3: Any, policy: str, tmp_path: Path) -> None:
    cli("embed", "s3://bucket/tars", "--out", "s3://bucket/emb", "--limit", "40", "-q")
    fraction = policy_file(tmp_path, FRACTION_POLICY)
    cli("filter", "s3://bucket/emb", "--policy", fraction, "--out", "s3://bucket/filtered", "-q")
    assert "ok" in cli("verify", "s3://bucket/filtered").stdout
    cli("report", "s3://bucket/filtered", "--thumbnails", "show")
    page = s3.cat("bucket/filtered/report.html").decode()
    assert "data:image/" in page
    assert s3.exists("bucket/filtered/run.log")


def test_parquet_on_s3(s3: Any, policy: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", samples(30), row_group_size=10)
    s3.put(str(tmp_path / "a.parquet"), "bucket/parquet/a.parquet")
    result = run_job(JobRequest("run", "s3://bucket/parquet", "s3://bucket/pout", policy=policy, engine="local"))
    assert result.totals["decided"] == 30
    assert verify_run("s3://bucket/pout").problems == []


def test_of_two_commits_the_first_wins_on_s3_too(s3: Any) -> None:
    directory = Directory("s3://bucket/ledger")
    first, second = commit_of("a" * 16, bytes_unread=1), commit_of("a" * 16, bytes_unread=2)
    assert ledger.write_commit(directory, first) == (first, True)
    assert ledger.write_commit(directory, second) == (first, False)


def test_uploads_that_were_never_finished_are_aborted(s3: Any) -> None:
    for key in ("up/annotated/a.parquet", "elsewhere/b.parquet"):
        s3.call_s3("create_multipart_upload", Bucket="bucket", Key=key)
    # This server says that every upload began in 2010.
    century = 100 * 365 * 24 * 3600.0
    assert Directory("s3://bucket/up").abort_stale_uploads(century) == 0, (
        "a fresh upload may belong to a living attempt"
    )
    assert Directory("s3://bucket/up").abort_stale_uploads() == 1
    left = s3.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", [])
    assert [upload["Key"] for upload in left] == ["elsewhere/b.parquet"]


def test_a_bucket_that_is_not_there_is_refused_in_a_sentence(s3: Any, policy: str) -> None:
    done = cli("run", "s3://no-such-bucket/x", "--policy", policy, "--out", "s3://bucket/never", check=False)
    assert done.returncode == 2
    assert "no-such-bucket" in done.stderr
    assert "Traceback" not in done.stderr
    assert not s3.exists("bucket/never/plan.json")
    done = cli("run", "s3://bucket/tars", "--policy", policy, "--out", "s3://no-such-bucket/out", check=False)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
