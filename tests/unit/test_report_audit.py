"""Decisions as JSON Lines: every row once, all that an appeal needs, and answers in the shapes that other programs read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from clipfilter.cli.policies import policy_app
from clipfilter.errors import RefusedError
from clipfilter.report.audit import export_decisions
from tests.support.report import Built, build_run

REPO = Path(__file__).parents[2]
MAPPING = """\
policy: names
version: 1
rules:
  - {id: weapons, concept: {any_of: [a gun]}, reject: {above: 0.5}}
  - {id: small, metadata: min_side, reject: {below: 1}}
  - {id: off-caption, alignment: {}, reject: {below: 0.1}}
interchange:
  openai: {violence: [weapons], other: [small, off-caption]}
  rekognition: {Violence/Weapons: [weapons], Small Pictures: [small]}
  safesearch: {violence: [weapons], spoof: [off-caption]}
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_run(tmp_path_factory.mktemp("run"), damaged=True)


@pytest.fixture
def mapping(tmp_path: Path) -> str:
    (tmp_path / "names.yaml").write_text(MAPPING)
    return str(tmp_path / "names.yaml")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def failed_rows(built: Built) -> list[dict[str, Any]]:
    return [row for path in sorted(Path(built.url).glob("failed/*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_every_row_is_there_once_with_all_that_decided_it(built: Built, tmp_path: Path) -> None:
    out = tmp_path / "audit.jsonl"
    found = export_decisions(built.url, str(out))
    rows = lines(out)
    failed = failed_rows(built)
    assert found.rows == len(rows) == len(built.rows) + len(failed)
    by_uid = {row["uid"]: row for row in rows}
    assert len(by_uid) == len(rows)
    for stored in built.rows:
        row = by_uid[stored["cf_uid"]]
        assert (row["decision"], row["key"]) == (stored["cf_decision"], stored["cf_key"])
        assert row["image"]["sha256"] == stored["cf_sha256"]
        assert [reason["rule"] for reason in row["reasons"]] == [reason["rule"] for reason in stored["cf_reasons"]]
        for rule in row["rules"]:
            assert rule["score"] == stored[f"cf_score.{rule['id']}"]
        assert {said.split(":")[0] for said in row["said"]} >= {reason["rule"] for reason in row["reasons"]}
        assert re.fullmatch("[0-9a-f]{64}", row["policy"]["sha256"])
        assert row["model"]["weights_sha256"]
        assert (Path(built.url) / row["record"]["commit"]).is_file()
    broken = by_uid[failed[0]["cf_uid"]]
    assert (broken["decision"], broken["rules"], broken["image"]) == ("failed", [], None)
    assert broken["error"] == {"class": failed[0]["cf_error_class"], "message": failed[0]["cf_error"]}


def test_every_field_is_documented(built: Built, tmp_path: Path) -> None:
    export_decisions(built.url, str(tmp_path / "audit.jsonl"))
    row = next(row for row in lines(tmp_path / "audit.jsonl") if row["rules"])
    described = set(re.findall(r"`([^`\n]+)`", (REPO / "docs/reference/audit.md").read_text()))
    assert set(row) | set(row["rules"][0]) | set(row["record"]) | set(row["image"]) <= described


def test_the_shapes_of_other_services(built: Built, tmp_path: Path, mapping: str) -> None:
    stored = {row["cf_uid"]: row for row in built.rows}
    answers = {}
    for kind in ("openai", "rekognition", "safesearch"):
        export_decisions(built.url, str(tmp_path / kind), kind=kind, mapping=mapping)
        answers[kind] = {row["clipfilter"]["uid"]: row for row in lines(tmp_path / kind)}
        assert len(answers[kind]) == len(stored) + len(failed_rows(built))
    seen = set()
    for uid, row in stored.items():
        bands = {reason["rule"]: reason["band"] for reason in row["cf_reasons"]}
        flagged = bands.get("weapons") in ("review", "reject")
        openai = answers["openai"][uid]
        assert set(openai) == {"id", "model", "results", "clipfilter"}
        (result,) = openai["results"]
        assert result["categories"]["violence"] is flagged
        assert result["category_scores"]["violence"] == pytest.approx(row["cf_score.weapons"] or 0.0)
        assert result["flagged"] is any(result["categories"].values())
        assert set(result["category_applied_input_types"]) == {"violence", "other"}
        labels = {label["Name"]: label for label in answers["rekognition"][uid]["ModerationLabels"]}
        assert ("Weapons" in labels) is flagged
        if flagged:
            assert labels["Weapons"]["ParentName"] == "Violence"
            assert (labels["Violence"]["TaxonomyLevel"], labels["Weapons"]["TaxonomyLevel"]) == (1, 2)
            assert labels["Weapons"]["Confidence"] == pytest.approx(100 * row["cf_score.weapons"], abs=1e-3)
        likelihood = answers["safesearch"][uid]["safeSearchAnnotation"]
        assert set(likelihood) == {"adult", "spoof", "medical", "violence", "racy"}
        assert likelihood["adult"] == "UNKNOWN"
        wanted = {"reject": "VERY_LIKELY", "review": "POSSIBLE"}.get(bands.get("weapons", ""))
        assert likelihood["violence"] == wanted or (wanted is None and "LIKELY" in likelihood["violence"])
        assert (likelihood["spoof"] == "UNKNOWN") is (row["cf_score.off-caption"] is None)
        seen |= {flagged, likelihood["violence"]}
        assert openai["clipfilter"]["decision"] == row["cf_decision"]
    assert {True, False, "VERY_LIKELY"} <= seen
    broken = answers["openai"][failed_rows(built)[0]["cf_uid"]]
    assert set(broken) == {"error", "clipfilter"}


def test_refusals(built: Built, tmp_path: Path, mapping: str) -> None:
    with pytest.raises(RefusedError, match="is not a run directory"):
        export_decisions(str(tmp_path), str(tmp_path / "x.jsonl"))
    (tmp_path / "there.jsonl").write_text("mine")
    with pytest.raises(RefusedError, match="exists"):
        export_decisions(built.url, str(tmp_path / "there.jsonl"))
    assert (tmp_path / "there.jsonl").read_text() == "mine"
    with pytest.raises(RefusedError, match="--mapping"):
        export_decisions(built.url, str(tmp_path / "a.jsonl"), kind="openai")
    with pytest.raises(RefusedError, match="interchange"):
        export_decisions(built.url, str(tmp_path / "a.jsonl"), kind="openai", mapping="curate-basic")
    with pytest.raises(RefusedError, match="does not have: gambling, tobacco"):
        export_decisions(built.url, str(tmp_path / "a.jsonl"), kind="openai", mapping="marketplace-safety")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["names.yaml", "there.jsonl"]


def test_the_command(built: Built, tmp_path: Path) -> None:
    done = CliRunner().invoke(policy_app, ["export-decisions", built.url, "--out", str(tmp_path / "audit.jsonl")])
    assert done.exit_code == 0, done.output
    assert re.match(r"[\d,]+ decisions \(.*\d+ reject.*\) in ", done.output)
    assert len(lines(tmp_path / "audit.jsonl")) > 10


def test_object_stores(built: Built) -> None:
    import fsspec

    export_decisions(built.url, "memory://bucket/audit.jsonl")
    text = fsspec.filesystem("memory").cat("/bucket/audit.jsonl").decode()
    assert len(text.splitlines()) == len(built.rows) + len(failed_rows(built))
