"""The parts of `clipfilter serve` without a browser: columns, moved thresholds, changed policies, labels, rows."""

from __future__ import annotations

import asyncio
import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from aiohttp.test_utils import TestClient, TestServer

from clipfilter.calibration import draw, open_scored, read_labels
from clipfilter.errors import RefusedError
from clipfilter.policies import parse_policy
from clipfilter.policies.deciding import REASONS
from clipfilter.report.data import rules_of
from clipfilter.runs.plan import Plan
from clipfilter.serve import answers
from clipfilter.serve.app import Server
from clipfilter.serve.columns import BANDS, DECISIONS
from clipfilter.serve.effect import Effects
from clipfilter.serve.export import PolicyText, changed_policy, changed_text, find_text
from clipfilter.serve.guard import Guard, is_loopback
from clipfilter.serve.labels import BY_HAND, LabelFile
from clipfilter.serve.query import Queries, RowsRequest
from clipfilter.serve.run import ServedRun
from tests.support.report import BEST, OFF_CAPTION, POLICY, SMALL, WEAPONS_REJECT, WEAPONS_REVIEW, Built
from tests.support.serve import embedded_run


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return embedded_run(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def run(built: Built) -> Any:
    opened = ServedRun(built.url)
    yield opened
    opened.close()


def decide(row: dict[str, Any], **moved: float) -> int:
    """The decision of a row of `build_run` with other thresholds, written down a second time."""
    t = {"review": WEAPONS_REVIEW, "reject": WEAPONS_REJECT, "off": OFF_CAPTION, "small": SMALL, "best": BEST} | moved
    weapons, cosine, small = row["cf_score.weapons"], row["cf_similarity"], row["cf_score.small"]
    worst = 2 if weapons > np.float32(t["reject"]) else 1 if weapons > np.float32(t["review"]) else 0
    if cosine is None:
        worst = max(worst, 1)  # off-caption cannot be evaluated: review; best keeps
    else:
        worst = max(worst, 2 if cosine < np.float32(t["off"]) or cosine < np.float32(t["best"]) else 0)
    return max(worst, 1 if small < np.float32(t["small"]) else 0)


def test_columns_are_what_the_files_say(built: Built, run: ServedRun) -> None:
    assert [DECISIONS[code] for code in run.columns.decision] == [row["cf_decision"] for row in built.rows]
    for number, rule in enumerate(run.columns.rules):
        found = [BANDS[code] for code in run.columns.band[number]]
        assert found == [
            next((reason["band"] for reason in row["cf_reasons"] if reason["rule"] == rule), "") for row in built.rows
        ]
        scores = [row[f"cf_score.{rule}"] for row in built.rows]
        np.testing.assert_array_equal(run.columns.scores[rule], np.array(scores, np.float32))
    assert not run.columns.fixed.any()
    order, scores = run.columns.ascending("off-caption")
    assert (np.diff(scores) >= 0).all()
    assert len(order) == sum(row["cf_similarity"] is not None for row in built.rows)


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"weapons": {"reject": 0.6}}, {"reject": 0.6}),
        ({"weapons": {"reject": 0.9, "review": 0.7}}, {"reject": 0.9, "review": 0.7}),
        ({"off-caption": {"reject": 0.4}}, {"off": 0.4}),
        ({"small": {"review": 250.0}}, {"small": 250.0}),
        ({"weapons": {"reject": 0.95}, "off-caption": {"reject": -0.05}}, {"reject": 0.95, "off": -0.05}),
    ],
)
def test_moved_thresholds_change_what_deciding_again_changes(
    built: Built, run: ServedRun, changes: dict[str, dict[str, float]], moved: dict[str, float]
) -> None:
    before = [decide(row) for row in built.rows]
    assert before == run.columns.decision.tolist()
    after = [decide(row, **moved) for row in built.rows]
    found = run.effects.of(changes, exact=False)
    expected = {place: new for place, (old, new) in enumerate(zip(before, after, strict=True)) if old != new}
    assert dict(zip(found.rows.tolist(), found.after.tolist(), strict=True)) == expected
    assert sum(found.changes.values()) == len(expected) > 0
    assert found.doubtful == 0


def test_a_fraction_moves_to_the_threshold_that_the_dataset_gives(built: Built, run: ServedRun) -> None:
    ranked = sorted((row["cf_similarity"] for row in built.rows if row["cf_similarity"] is not None), reverse=True)
    threshold = ranked[int(len(ranked) * 0.25)]
    found = run.effects.of({"best": {"reject": 0.25}}, exact=False)
    assert found.thresholds == {"best": {"reject": threshold}}
    after = [decide(row, best=threshold) for row in built.rows]
    assert len(found.rows) == sum(a != b for a, b in zip(after, run.columns.decision.tolist(), strict=True)) > 0


def test_rows_that_a_person_overrode_stay(run: ServedRun) -> None:
    found = run.effects.of({"weapons": {"reject": 0.55}}, exact=False)
    kept = run.columns.fixed.copy()
    try:
        run.columns.fixed[found.rows[0]] = True
        again = run.effects.of({"weapons": {"reject": 0.5500001}}, exact=False)
        assert found.rows[0] not in again.rows
    finally:
        run.columns.fixed[:] = kept


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nothing": {"reject": 0.5}}, "no reject band"),
        ({"small": {"reject": 10.0}}, "no reject band"),
        ({"weapons": {"reject": 0.2}}, "never applies"),
        ({"weapons": {"reject": 1.5}}, "between 0 and 1"),
        ({"best": {"reject": 0.0}}, "fraction"),
    ],
)
def test_what_no_policy_can_say_is_refused(run: ServedRun, changes: dict[str, dict[str, float]], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        answers.effect(run, changes, exact=False)


TEXT = """\
# a policy that somebody keeps
policy: trial   # its name
version: 3
rules:
  - id: dark      # too dark to see
    metadata: brightness
    review: {below: 25}     # chosen by eye
    reject: {below: 5.5}
  - id: match
    alignment: {}
    reject:
      below: 0.135   # see the wiki
calibrations:
  - model: nano@1
    weights_sha256: "WEIGHTS"
    prompts_sha256: "PROMPTS"
    rules:
      match:
        reject: {below: 0.2, n: 400, target: precision>=0.95, guarantee: true}   # measured
""".replace("WEIGHTS", "ab" * 32).replace("PROMPTS", "cd" * 32)


def plan_of(text: str, weights: str) -> Plan:
    policy = parse_policy(text)
    return Plan("run", {}, policy.canonical(), policy.sha256, {"weights_sha256": weights}, {}, True)


def test_a_changed_policy_differs_in_its_numbers_alone() -> None:
    plan = plan_of(TEXT, "ef" * 32)
    changes = {"dark": {"review": 30.5}, "match": {"reject": 0.1875}}
    changed = changed_text(PolicyText(TEXT.encode(), "trial.yaml", True), plan, changes).decode()
    assert changed == TEXT.replace("{below: 25}", "{below: 30.5}").replace("below: 0.135 ", "below: 0.1875 ")
    assert parse_policy(changed).canonical() == changed_policy(plan, changes).canonical()


def test_a_calibrated_threshold_that_is_moved_loses_its_evidence() -> None:
    plan = plan_of(TEXT, "ab" * 32)
    changed = changed_text(PolicyText(TEXT.encode(), "trial.yaml", True), plan, {"match": {"reject": 0.25}}).decode()
    old = "{below: 0.2, n: 400, target: precision>=0.95, guarantee: true}   # measured"
    assert changed == TEXT.replace(old, "{below: 0.25, target: moved by hand, guarantee: false}   # measured")
    assert "below: 0.135   # see the wiki" in changed


def test_a_threshold_that_stands_elsewhere_is_not_changed_here() -> None:
    text = TEXT.replace("{below: 25}", '{below: "${dim}"}').replace("rules:\n", "variables: {dim: 25}\nrules:\n", 1)
    plan = plan_of(text, "ef" * 32)
    with pytest.raises(RefusedError, match="dark"):
        changed_text(PolicyText(text.encode(), "trial.yaml", True), plan, {"dark": {"review": 30.5}})


def test_without_its_file_a_policy_is_written_anew(run: ServedRun) -> None:
    text = find_text(run.plan, None)
    assert not text.original
    changed = changed_text(text, run.plan, {"small": {"review": 150.0}})
    assert parse_policy(changed).canonical() == changed_policy(run.plan, {"small": {"review": 150.0}}).canonical()
    assert changed_policy(run.plan, {}).canonical()["rules"][2]["review"] == {"below": 100.0}


def test_another_policys_file_is_refused(run: ServedRun, tmp_path: Path) -> None:
    (tmp_path / "other.yaml").write_text(TEXT)
    with pytest.raises(RefusedError, match="not the policy that decided"):
        find_text(run.plan, str(tmp_path / "other.yaml"))


# ---------------------------------------------------------------- rows


def found(run: ServedRun, labels: LabelFile, **request: Any) -> list[int]:
    return Queries(run, labels).find(RowsRequest(**request)).positions.tolist()


@pytest.fixture
def labels(tmp_path: Path) -> Any:
    opened = LabelFile(str(tmp_path / "labels.csv"))
    yield opened
    opened.close()


def test_filters_and_orders_are_those_of_the_rows(built: Built, run: ServedRun, labels: LabelFile) -> None:
    rows = built.rows
    assert found(run, labels) == list(range(len(rows)))
    assert found(run, labels, decision="reject") == [i for i, row in enumerate(rows) if row["cf_decision"] == "reject"]
    review = [
        i for i, r in enumerate(rows) if {"weapons", "review"} in [{x["rule"], x["band"]} for x in r["cf_reasons"]]
    ]
    assert found(run, labels, rule="weapons", band="review") == review
    small = found(run, labels, where="cf_similarity < 0.2 and cf_decision != 'keep'")
    assert small == [i for i, r in enumerate(rows) if (r["cf_similarity"] or 9) < 0.2 and r["cf_decision"] != "keep"]
    down = found(run, labels, sort="off-caption", descending=True)
    scores = [rows[i]["cf_similarity"] for i in down]
    known = [score for score in scores if score is not None]
    assert known == sorted(known, reverse=True)
    assert scores[len(known) :] == [None] * (len(rows) - len(known))
    changes = {"weapons": {"reject": 0.6}}
    flips = found(run, labels, changes=changes, flips=True)
    assert flips == run.effects.of(changes, exact=False).rows.tolist()
    nearest = Queries(run, labels).find(RowsRequest(like=5, decision="reject"))
    assert set(nearest.positions.tolist()) == set(found(run, labels, decision="reject"))
    assert (np.diff(nearest.cosines) <= 0).all()  # type: ignore[arg-type]
    for bad in ({"rule": "x"}, {"sort": "x"}, {"where": "nothing = 1"}, {"where": "cf_row ="}, {"like": 999}):
        with pytest.raises(RefusedError):
            found(run, labels, **bad)


def test_a_page_tells_what_the_files_hold(built: Built, run: ServedRun, labels: LabelFile) -> None:
    request = RowsRequest(offset=10, limit=7, sort="weapons", label_rule="weapons")
    page = answers.page_of(run, labels, request, Queries(run, labels).find(request))
    assert (page["total"], page["offset"], len(page["rows"])) == (len(built.rows), 10, 7)
    for row in page["rows"]:
        stored = built.rows[row["position"]]
        assert (row["uid"], row["decision"]) == (stored["cf_uid"], stored["cf_decision"])
        assert row["score"] == pytest.approx(stored["cf_score.weapons"])
        assert [r["rule"] for r in row["reasons"]] == [
            rule for rule in run.columns.rules if rule in {reason["rule"] for reason in stored["cf_reasons"]}
        ]
    why = answers.row_explained(run, 3)
    assert why["decision"] == built.rows[3]["cf_decision"]
    assert {item["id"] for item in why["rules"]} == {rule["id"] for rule in POLICY["rules"]}


def test_a_run_that_decided_nothing_can_be_looked_at(tmp_path: Path) -> None:
    built = embedded_run(tmp_path, job="embed")
    run, labels = ServedRun(built.url), LabelFile(str(tmp_path / "labels.csv"))
    about = answers.about(run, labels)
    assert (about["policy"], about["rules"], about["rows"]) == (None, [], len(built.rows))
    assert (
        found(run, labels, sort="similarity")[0]
        == min(
            (row["cf_similarity"], place) for place, row in enumerate(built.rows) if row["cf_similarity"] is not None
        )[1]
    )
    labels.close()
    run.close()


# ---------------------------------------------------------------- labels


def test_labels_are_a_file_that_calibrate_reads(run: ServedRun, labels: LabelFile) -> None:
    for position, label in ((0, True), (5, False), (7, True)):
        labels.set(answers.labelled_row(run, position, "weapons"), "weapons", label)
    labels.set(answers.labelled_row(run, 5, "weapons"), "weapons", None)
    stored = read_labels(str(labels.path))
    assert [(label.true, label.rule, label.design) for label in stored] == [(True, "weapons", BY_HAND)] * 2
    path = labels.path
    labels.close()
    again = LabelFile(str(path))
    assert len(again.labelled("weapons")) == 2
    again.set(answers.labelled_row(run, 0, "weapons"), "weapons", None)
    again.set(answers.labelled_row(run, 7, "weapons"), "weapons", None)
    assert path.read_text().count("\n") == 1
    again.close()
    labels.__init__(str(path))  # type: ignore[misc]
    assert labels.labelled("weapons") == {}
    assert not [p for p in path.parent.iterdir() if p.name.endswith(".csv") and p != path]


def test_rows_picked_by_hand_never_mix_with_a_sample(run: ServedRun, labels: LabelFile) -> None:
    scored = open_scored(run.url)
    rule = scored.policy.rules[0]
    sample = draw(scored, scored.policy, rule, n=12, design="uniform", cut=None, seed=0)
    drawn = sample.rows["cf_uid"].to_pylist()
    inside = run.positions_of(drawn)[0]
    outside = next(p for p in range(run.columns.rows) if p not in run.positions_of(drawn))
    for position in (inside, outside):
        labels.set(answers.labelled_row(run, position, "weapons"), "weapons", True)
    labels.start_sample(sample)
    assert labels.sample("weapons") == drawn
    assert labels.get(drawn[0], "weapons") is True
    labels.set(answers.labelled_row(run, run.positions_of(drawn)[1], "weapons"), "weapons", False)
    with open(labels.path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["sample_design"] for row in rows} == {"uniform seed 0"}
    assert [row["cf_uid"] for row in rows] == drawn
    assert [row["label"] for row in rows[:3]] == ["1", "0", ""]
    assert [label.design for label in read_labels(str(labels.by_hand_path))] == [BY_HAND]
    more = draw(scored, scored.policy, rule, n=20, design="uniform", cut=None, seed=0)
    labels.start_sample(more)
    assert len(read_labels(str(labels.path))) == 20
    assert sum(label.true is not None for label in read_labels(str(labels.path))) >= 2


def test_one_file_has_one_writer(labels: LabelFile) -> None:
    with pytest.raises(RefusedError, match="another `clipfilter serve`"):
        LabelFile(str(labels.path))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("labels.txt", None, ".csv"),
        ("no/labels.csv", None, "no folder"),
        ("labels.csv", "cf_uid,label\nabc,1\n", "policy sample"),
        ("labels.csv", "a,b\n", "label"),
        ("labels.csv", "cf_uid,label\nabc,perhaps\n", "no label"),
    ],
)
def test_other_files_are_not_overwritten(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(RefusedError, match=said):
        LabelFile(str(tmp_path / name))
    assert text is None or (tmp_path / name).read_text() == text
    assert not list(tmp_path.glob(".*.lock"))


def test_rows_without_a_score_and_other_rules_take_no_labels(built: Built, run: ServedRun) -> None:
    silent = next(i for i, row in enumerate(built.rows) if row["cf_similarity"] is None)
    with pytest.raises(RefusedError, match="no score"):
        answers.labelled_row(run, silent, "off-caption")
    with pytest.raises(RefusedError, match="metadata rule"):
        answers.labelled_row(run, 0, "small")


# ---------------------------------------------------------------- pictures


def pictures(built: Built, tmp_path: Path, paths: list[str], *, known: bool = True) -> list[tuple[int, bytes]]:
    """(status, body) of each of these paths, asked with the token or, by who does not know it, without."""
    run, labels = ServedRun(built.url), LabelFile(str(tmp_path / "labels.csv"))

    async def asked() -> list[tuple[int, bytes]]:
        server = Server(run, labels, None, "127.0.0.1")
        async with TestClient(TestServer(server.application)) as client:
            server.guard.port = client.port or 0
            cookies = {server.guard.cookie: server.guard.token} if known else {}
            answers = [await client.get(path, cookies=cookies) for path in paths]
            return [(answer.status, await answer.read()) for answer in answers]

    try:
        return asyncio.run(asked())
    finally:
        labels.close()
        run.close()


def test_without_the_token_nothing_is_answered(tmp_path: Path) -> None:
    paths = ["/", "/api/run", "/api/picture/0", "/static/app.js"]
    found = pictures(embedded_run(tmp_path / "run"), tmp_path, paths, known=False)
    assert [status for status, _ in found] == [403] * len(paths)


def test_pictures_are_encoded_anew_and_escalated_ones_never_shown(tmp_path: Path) -> None:
    built = embedded_run(tmp_path / "run")
    uid = built.rows[0]["cf_uid"]
    first = next(
        p for p in Path(built.url).glob("annotated/*.parquet") if uid in pq.read_table(p)["cf_uid"].to_pylist()
    )
    table = pq.read_table(first)
    reasons = table["cf_reasons"].to_pylist()
    place = next(i for i, row in enumerate(built.rows) if row["cf_reasons"])
    reasons[place][0]["band"] = "escalate"
    column = table.schema.get_field_index("cf_reasons")
    pq.write_table(table.set_column(column, "cf_reasons", pa.array(reasons, REASONS)), first)
    kept = next(i for i, row in enumerate(built.rows) if row["cf_decision"] == "keep")
    source = {path.read_bytes() for path in built.source.glob("*.jpg")}
    hidden = [f"/api/picture/{place}", f"/api/picture/{place}?clear=1", f"/api/picture/{place}?size=large&clear=1"]
    found = pictures(built, tmp_path, [*hidden, f"/api/picture/{kept}", "/api/picture/100000", "/api/picture/x"])
    assert [status for status, _ in found] == [403, 403, 403, 200, 404, 404]
    assert found[3][1].startswith(b"\xff\xd8")
    assert found[3][1] not in source
    # A file that was replaced since is not the picture that was decided.
    for path in built.source.glob("*.jpg"):
        path.write_bytes(path.read_bytes() + b"0")
    assert pictures(built, tmp_path, [f"/api/picture/{kept}"])[0][0] == 404


# ---------------------------------------------------------------- the guard


@pytest.mark.parametrize(
    ("listening", "host", "fine"),
    [
        ("127.0.0.1", "127.0.0.1:80", True),
        ("127.0.0.1", "localhost:80", True),
        ("127.0.0.1", "localhost:81", False),
        ("127.0.0.1", "[::1]:80", True),
        ("127.0.0.1", "evil.example:80", False),
        ("127.0.0.1", "192.168.1.5:80", False),
        ("127.0.0.1", "localhost.evil.example:80", False),
        ("127.0.0.1", "user@localhost:80", False),
        ("127.0.0.1", "", False),
        ("0.0.0.0", "192.168.1.5:80", True),
        ("0.0.0.0", "evil.example:80", False),
    ],
)
def test_only_its_own_names_are_answered(listening: str, host: str, fine: bool) -> None:
    guard = Guard(listening)
    guard.port = 80
    assert guard._own_host(host) is fine
    assert is_loopback(listening) is (listening != "0.0.0.0")


def test_rules_of_a_policy_that_is_more_than_its_scores_stay(run: ServedRun) -> None:
    modifier, rule = rules_of(run.plan, run.run.version)[:2]
    modifier.spec = {**modifier.spec, "tighten": {"above": 0.5, "by": 0.1, "rules": [rule.id]}}
    effects = Effects(run.columns, [modifier, rule], None)
    assert "tighten" in str(effects.movable(modifier))
    assert "policy diff" in str(effects.movable(rule))
