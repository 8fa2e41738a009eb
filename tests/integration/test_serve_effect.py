"""A threshold moved onto a score itself: the page's count is still the one of `policy diff`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clipfilter.engine.job import JobResult
from clipfilter.operations.compare import compare_policies
from clipfilter.policies import load_policy
from clipfilter.serve.export import changed_text, find_text
from clipfilter.serve.run import ServedRun

pytestmark = pytest.mark.integration


@pytest.fixture
def run(finished: JobResult) -> Iterator[ServedRun]:
    opened = ServedRun(finished.out)
    yield opened
    opened.close()


@pytest.mark.parametrize(
    ("rule", "band", "least", "nudge", "close"),
    [
        ("animals", "reject", 0.45, 0.0, True),
        ("animals", "reject", 0.45, 2e-7, True),
        ("off-caption", "reject", -1.0, -2e-7, True),
        ("small", "reject", 0.0, 0.0, False),  # whole numbers: nothing to score again
        ("small", "reject", 0.0, 1e-7, True),
    ],
)
def test_close_scores_are_scored_again(
    run: ServedRun, policy: str, tmp_path: Path, rule: str, band: str, least: float, nudge: float, close: bool
) -> None:
    scores = run.columns.ascending(rule)[1]
    scores = scores[scores > least]
    changes = {rule: {band: float(scores[len(scores) // 2]) + nudge}}
    quick = run.effects.of(changes, exact=False)
    assert (quick.doubtful > 0) is close
    found = run.effects.of(changes, exact=True)
    assert found.doubtful == 0

    changed = tmp_path / "changed.yaml"
    changed.write_bytes(changed_text(find_text(run.plan, policy), run.plan, changes))
    expected = compare_policies(load_policy(policy), load_policy(str(changed)), run.url, examples=200)
    assert len(found.rows) == expected.flipped
    assert found.changes == expected.changes
    uids = run.vectors.rows_at(found.rows, ["cf_uid"])["cf_uid"].to_pylist()
    assert set(uids) == {flip.uid for flip in expected.flips}
    assert np.array_equal(np.sort(found.rows), found.rows)
