"""`policy diff`: its counts are those of two real filters, its sample is uniform and the same every time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from clipfilter.engine.job import JobRequest, JobResult, run_job
from clipfilter.errors import RefusedError
from clipfilter.operations.compare import compare_policies
from clipfilter.policies import load_policy
from clipfilter.report.diff import diff_page
from tests.support.engine import FRACTION_POLICY, cli, policy_file

pytestmark = pytest.mark.integration


def decisions(out: Path) -> dict[str, str]:
    return {
        row["cf_uid"]: row["cf_decision"]
        for path in out.glob("annotated/*.parquet")
        for row in pq.read_table(path, columns=["cf_uid", "cf_decision"]).to_pylist()
    }


def test_a_diff_is_what_two_filters_decide_and_writes_nothing(finished: JobResult, policy: str, tmp_path: Path) -> None:
    other = policy_file(tmp_path, FRACTION_POLICY, "other.yaml")
    before_files = sorted(str(path) for path in Path(finished.out).rglob("*"))
    found = compare_policies(load_policy(policy), load_policy(other), finished.out, examples=3)
    assert sorted(str(path) for path in Path(finished.out).rglob("*")) == before_files
    both = []
    for name, chosen in (("a", policy), ("b", other)):
        run_job(JobRequest("filter", finished.out, str(tmp_path / name), policy=chosen, engine="local"))
        both.append(decisions(tmp_path / name))
    assert found.rows == len(both[0]) == len(both[1])
    expected = Counter((both[0][uid], both[1][uid]) for uid in both[0] if both[0][uid] != both[1][uid])
    assert found.changes == dict(expected)
    assert found.flipped > 5
    assert found.before.decisions == Counter(both[0].values())
    assert found.after.decisions == Counter(both[1].values())
    for flip in found.flips:
        assert (both[0][flip.uid], both[1][flip.uid]) == (flip.before, flip.after)
        assert flip.reasons_before or flip.before == "keep"
        assert flip.reasons_after or flip.after == "keep"
    assert max(Counter((flip.before, flip.after) for flip in found.flips).values()) == 3
    again = compare_policies(load_policy(policy), load_policy(other), finished.out, examples=3)
    assert [flip.uid for flip in again.flips] == [flip.uid for flip in found.flips]


def test_the_same_policy_changes_nothing_and_another_model_is_refused(finished: JobResult, policy: str) -> None:
    same = compare_policies(load_policy(policy), load_policy(policy), finished.out)
    assert (same.flipped, same.flips) == (0, [])
    assert "No image changes" in diff_page(same, "none")
    with pytest.raises(RefusedError, match="open_clip"):
        compare_policies(load_policy(policy), load_policy(policy), finished.out, model="nanno-1")


def test_the_command_prints_counts_and_writes_a_page(finished: JobResult, policy: str, tmp_path: Path) -> None:
    other = policy_file(tmp_path, FRACTION_POLICY, "other.yaml")
    done = cli("policy", "diff", policy, other, "--on", finished.out, "--report", str(tmp_path / "d" / "page.html"))
    assert "rows" in done.stdout
    assert str(tmp_path / "d" / "page.html") in done.stdout
    page = (tmp_path / "d" / "page.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") > 3
    assert "Blurred picture" in page
    assert 'alt="Picture' not in page
    shown = json.loads(cli("policy", "diff", policy, other, "--on", finished.out, "--json").stdout)
    assert sum(change["rows"] for change in shown["changes"]) == shown["flipped"]
    assert f"{shown['flipped']:,} of {shown['rows']:,} rows" in done.stdout
