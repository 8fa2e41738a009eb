"""Search of real runs by the command line: texts, photographs, rows, conditions, contact sheets, and an object store."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from clipfilter.cli.main import add_commands, app
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.report.sheet import SIDE, contact_sheet
from clipfilter.search import Searcher, build_index, search_run
from clipfilter.storage import Directory
from tests.support.engine import photos
from tests.support.s3 import s3_server

pytestmark = pytest.mark.integration

_GAP, _LINES = 16, 44


@pytest.fixture(scope="module", autouse=True)
def _commands() -> None:
    if not app.registered_commands:
        add_commands(app)


def cli(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def cells(png: bytes, count: int) -> list[np.ndarray]:
    """The pictures of a contact sheet, uint8 [SIDE, SIDE, 3] each."""
    sheet = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    found = []
    for place in range(count):
        left, top = _GAP + place % 5 * (SIDE + _GAP), _GAP + place // 5 * (SIDE + _LINES + _GAP)
        found.append(sheet[top : top + SIDE, left : left + SIDE])
    return found


def detail(cell: np.ndarray) -> float:
    """How much neighbouring pixels differ: near 0 for a blurred picture."""
    return float(np.abs(np.diff(cell.astype(int), axis=1)).mean())


def test_a_photograph_is_found_by_its_text_its_picture_and_its_row(finished: Any, tmp_path: Path) -> None:
    name, data, _ = next(photo for photo in photos() if photo[0] == "chelsea")  # a cat
    (tmp_path / "query.jpg").write_bytes(data)
    by_text = json.loads(cli("search", finished.out, "a", "cat", "-k", "4", "--json"))
    assert by_text["method"] == "exact"
    assert by_text["rows"] == by_text["matching"] == finished.totals["decided"]
    by_image = json.loads(cli("search", finished.out, "--image", str(tmp_path / "query.jpg"), "-k", "1", "--json"))
    (hit,) = by_image["hits"]
    assert hit["cosine"] > 0.999
    rows = pq.read_table(Path(finished.out) / "annotated", columns=["cf_uid", "name"]).to_pylist()
    names = {row["cf_uid"]: row["name"] for row in rows}
    assert names[hit["uid"]] == name
    by_row = json.loads(cli("search", finished.out, "--uid", hit["uid"], "-k", "30", "--json"))
    assert hit["uid"] not in [other["uid"] for other in by_row["hits"]]
    copies = sum(other == name for other in names.values()) - 1
    assert [names[other["uid"]] for other in by_row["hits"][:copies]] == [name] * copies


def test_conditions_and_arithmetic_change_what_is_found(finished: Any) -> None:
    kept = search_run(finished.out, "an animal", k=200, where="cf_decision = 'keep' and cf_width >= 200")
    assert set(kept.hits["cf_decision"].to_pylist()) == {"keep"}
    assert kept.matching == len(kept.hits) <= finished.totals["keep"]
    plain = search_run(finished.out, "a person", k=10)
    without = search_run(finished.out, "a person", minus=["a horse"], k=10)
    assert plain.hits["cf_uid"].to_pylist() != without.hits["cf_uid"].to_pylist()
    table = cli("search", finished.out, "a person", "--not", "a horse", "--where", "cf_decision = 'keep'", "-k", "3")
    assert "of 120 rows" in table
    assert "keep" in table


def test_a_filter_is_searched_with_its_own_decisions(finished: Any, tmp_path: Path) -> None:
    out = tmp_path / "filtered"
    run_job(JobRequest("filter", finished.out, str(out), policy="curate-basic", engine="local", max_failures=1.0))
    mine = search_run(str(out), "a bird", k=20, where="cf_score.too-small >= 150")
    base = search_run(finished.out, "a bird", k=120)
    cosines = dict(zip(base.hits["cf_uid"].to_pylist(), base.hits["cosine"].to_pylist(), strict=True))
    assert len(mine.hits) > 0
    assert all(cosines[row["cf_uid"]] == row["cosine"] for row in mine.hits.to_pylist())
    build_index(finished.out, str(tmp_path / "index"))  # one index for the run and all its filters
    with Searcher(str(out), index=str(tmp_path / "index")) as searcher:
        assert searcher.notes == []
        assert searcher.search(["a bird"], k=3).hits["cosine"].to_pylist() == base.hits["cosine"].to_pylist()[:3]


def test_the_sheet_blurs_what_was_not_kept_and_leaves_out_what_was_escalated(
    finished: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Searcher(finished.out) as searcher:
        found = searcher.search(["a cat"], k=100)
        blurred, problem = contact_sheet(searcher.vectors, found)
        clear, _ = contact_sheet(searcher.vectors, found, "show")
        assert problem is None
        decisions = found.hits["cf_decision"].to_pylist()
        assert {"keep", "reject"} <= set(decisions)
        first, second = cells(blurred, 100), cells(clear, 100)
        shares = []
        for decision, hidden, shown in zip(decisions, first, second, strict=True):
            if decision == "keep":
                np.testing.assert_array_equal(hidden, shown)
            else:
                shares.append(detail(hidden) / detail(shown))
        assert max(shares) < 0.7
        assert np.median(shares) < 0.3
        escalated = decisions.index("keep")
        rows_at = searcher.vectors.rows_at

        def with_escalation(*arguments: Any) -> pa.Table:
            """The rows as they are, but one of them escalated."""
            table = rows_at(*arguments)
            reasons = table["cf_reasons"].to_pylist()
            reasons[escalated] = [{"rule": "known", "band": "escalate"}]
            place = table.column_names.index("cf_reasons")
            return table.set_column(place, "cf_reasons", pa.array(reasons, table.schema.field(place).type))

        monkeypatch.setattr(searcher.vectors, "rows_at", with_escalation)
        for mode in ("blur", "show"):
            found_cells = cells(contact_sheet(searcher.vectors, found, mode)[0], 100)
            assert (found_cells[escalated][: SIDE // 3] == found_cells[escalated][0, 0]).all(), "an empty cell"
            others = [i for i, decision in enumerate(decisions) if decision == "keep" and i != escalated]
            assert all(np.array_equal(found_cells[i], first[i]) for i in others)


def test_the_sheet_outlives_its_source(finished: Any, dataset: Path) -> None:
    moved = dataset.rename(dataset.with_name("moved"))
    try:
        with Searcher(finished.out) as searcher:
            png, problem = contact_sheet(searcher.vectors, searcher.search(["a cat"], k=3))
    finally:
        moved.rename(dataset)
    assert problem is not None
    assert Image.open(io.BytesIO(png)).size == (16 + 3 * 240, 16 + SIDE + _LINES + _GAP)


def test_run_and_index_on_an_object_store(finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = search_run(finished.out, "a cat", k=10)
    with s3_server():
        fs = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        fs.mkdir("bucket")
        fs.put(finished.out, "bucket/run", recursive=True)
        exact = search_run("s3://bucket/run", "a cat", k=10)
        assert exact.positions.tolist() == local.positions.tolist()
        printed = cli("index", "s3://bucket/run", "--approximate")
        assert "shards: 3, new: 3" in printed
        assert "shards: 3, new: 0" in cli("index", "s3://bucket/run")
        found = search_run("s3://bucket/run", "a cat", k=10)
        assert (found.method, found.notes) == ("approximate", [])
        both = np.intersect1d(found.positions, exact.positions)
        assert len(both) >= 8
        known = dict(zip(exact.positions.tolist(), exact.hits["cosine"].to_pylist(), strict=True))
        for position, cosine in zip(found.positions.tolist(), found.hits["cosine"].to_pylist(), strict=True):
            assert position not in known or abs(known[position] - cosine) < 0.01
        # The copy in the cache is not believed either.
        copy = next((tmp_path / "cache").rglob("*.arrow"))
        copy.write_bytes(copy.read_bytes()[:-9])
        with Searcher("s3://bucket/run") as searcher:
            assert "is not what its manifest says" in searcher.notes[0]
        with Searcher("s3://bucket/run") as searcher:
            assert searcher.notes == [], "the damaged copy was replaced"
        beside = build_index(finished.out, "s3://bucket/elsewhere")
        assert Directory(beside.to).exists("manifests/000001.json")
