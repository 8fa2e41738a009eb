"""`policy explain`: the chain of one decision, for every kind of row, from the files alone."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from clipfilter.cli.policies import policy_app
from clipfilter.errors import RefusedError
from clipfilter.report.explain import explain_row, sentence
from tests.support import report as build
from tests.support.report import Built, build_run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_run(tmp_path_factory.mktemp("run"), damaged=True)


def test_every_row_is_explained_as_it_was_decided(built: Built) -> None:
    for row in built.rows[::5]:
        found = explain_row(built.url, row["cf_uid"])
        assert (found.uid, found.key, found.decision) == (row["cf_uid"], row["cf_key"], row["cf_decision"])
        fired = {reason["rule"]: reason["band"] for reason in row["cf_reasons"] or []}
        for rule in found.rules:
            assert rule.score == pytest.approx(row[f"cf_score.{rule.id}"], nan_ok=True)
            expected = fired.get(rule.id, "missing" if rule.score is None else "keep")
            assert rule.result == expected, rule.id
        results = {rule.result for rule in found.rules}
        assert (found.decision == "keep") == results.isdisjoint(
            {"review", "reject"} | ({"missing"} & set(fired.values()))
        )


def test_thresholds_are_those_that_decided(built: Built) -> None:
    rules = {rule.id: rule for rule in explain_row(built.url, built.rows[0]["cf_uid"]).rules}
    limits = {
        (rule.id, item["band"]): (item["threshold"], item["from"])
        for rule in rules.values()
        for item in rule.thresholds
    }
    assert limits == {
        ("weapons", "review"): (build.WEAPONS_REVIEW, "written"),
        ("weapons", "reject"): (build.WEAPONS_REJECT, "calibrated"),
        ("off-caption", "reject"): (build.OFF_CAPTION, "written"),
        ("small", "review"): (build.SMALL, "written"),
        ("best", "reject"): (build.BEST, "dataset"),
    }
    evidence = next(item for item in rules["weapons"].thresholds if item["band"] == "reject")
    assert (evidence["n"], evidence["target"]) == (400, "precision>=0.95")
    assert (rules["weapons"].calibrated, rules["off-caption"].calibrated, rules["small"].calibrated) == (
        True,
        False,
        None,
    )


def test_sentences_name_score_threshold_and_what_was_told_apart(built: Built) -> None:
    row = next(
        r for r in built.rows if any(x["rule"] == "weapons" and x["band"] == "reject" for x in r["cf_reasons"] or [])
    )
    rule = next(rule for rule in explain_row(built.url, row["cf_uid"]).rules if rule.id == "weapons")
    reason = next(x for x in row["cf_reasons"] if x["rule"] == "weapons")
    said = sentence(rule)
    assert said.startswith("probability 0.") or said.startswith("probability 1.")
    assert "is above 0.8" in said
    assert "calibrated" in said
    assert reason["nearest"].split("<")[0][:5] in said
    silent = next(r for r in built.rows if r["cf_score.off-caption"] is None)
    missing = next(rule for rule in explain_row(built.url, silent["cf_uid"]).rules if rule.id == "off-caption")
    assert sentence(missing) == "could not be evaluated, which sends the row to review"


def test_failed_rows_and_keys_and_refusals(built: Built, tmp_path: Path) -> None:
    failed = sorted(Path(built.url).glob("failed/*.parquet"))[0]

    row = pq.read_table(failed).to_pylist()[0]
    found = explain_row(built.url, row["cf_uid"])
    assert (found.decision, found.rules, found.policy is None) == ("failed", [], False)
    assert found.error == {"class": row["cf_error_class"], "message": row["cf_error"]}
    by_key = explain_row(built.url, built.rows[3]["cf_key"])
    assert by_key.uid == built.rows[3]["cf_uid"]
    with pytest.raises(RefusedError, match=r"no row whose cf_uid or cf_key is 'nobody'"):
        explain_row(built.url, "nobody")
    with pytest.raises(RefusedError, match="is not a run directory"):
        explain_row(str(tmp_path), "x")


def test_an_embedding_run_has_no_rules(tmp_path: Path) -> None:
    built = build_run(tmp_path, count=16, job="embed")
    found = explain_row(built.url, built.rows[0]["cf_uid"])
    assert (found.decision, found.rules, found.policy) == ("none", [], None)


def test_the_terminal_shows_no_control_characters_and_json_shows_all(built: Built) -> None:
    row = next(row for row in built.rows if row["cf_caption"] == build.RTL)
    shown = CliRunner().invoke(policy_app, ["explain", built.url, row["cf_uid"]])
    assert shown.exit_code == 0
    assert not set("\x07\x1b\u202e") & set(shown.stdout)
    assert row["cf_decision"] in shown.stdout
    whole = CliRunner().invoke(policy_app, ["explain", built.url, row["cf_uid"], "--json"])
    assert json.loads(whole.stdout)["caption"] == row["cf_caption"]
