"""Sampling and calibrating on runs: what labels are worth, what is refused, what is written into the policy."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats
from typer.testing import CliRunner

from clipfilter import calibration as c
from clipfilter.calibration.sampling import SAMPLE_COLUMNS, draw_number
from clipfilter.cli.policies import policy_app
from clipfilter.errors import RefusedError
from clipfilter.policies import compile_policy, load_policy, parse_policy
from clipfilter.runs import DataFile, Plan, ledger
from clipfilter.sources import Shard
from clipfilter.storage import Directory
from tests.support.policies import FakeEncoder
from tests.support.runs import commit_of, version_of

POLICY = """\
# Weapons, for the test.
policy: shop
version: 2
rules:
  - id: weapons      # a comment that stays
    concept:
      any_of: ["a handgun", "a rifle"]
      but_not: ["a toy water gun",
                "a camera"]
    review: {above: 0.50}
    reject: {above: 0.85}   # set by hand
  - id: off-caption
    alignment: {}
    reject: {below: 0.2}
  - {id: small, metadata: min_side, reject: {below: 200}}
on_missing: review
"""
ROWS = 6000
TODAY = "2026-01-31"


def truth(rows: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    """(weapons scores in 0 to 1, whether each row is a weapon): 30 % are, and most score high."""
    rng = np.random.default_rng(5)
    true = rng.random(rows) < 0.3
    return (1 / (1 + np.exp(-(np.where(true, 3.0, -3.0) + 1.5 * rng.normal(size=rows))))).astype(np.float32), true


def uid(row: int) -> str:
    return f"{row:032x}"


def write_run(
    folder: Path, policy: str = POLICY, *, shards: int = 3, job: str = "run", rows: int = ROWS, **model: Any
) -> str:
    """A finished run with these scores, in the files that a run has."""
    encoder = FakeEncoder()
    parsed = parse_policy(policy)
    plan = Plan(
        job=job,  # type: ignore[arg-type]
        source={"url": "somewhere"},
        policy=parsed.canonical() if job == "run" else None,
        policy_sha256=parsed.sha256,
        model=encoder.fingerprint | model,
        options={"decode": "fast"},
        text_column=True,
    )
    for name in ("commits", "versions", "annotated"):
        (folder / name).mkdir(parents=True)
    (folder / "plan.json").write_bytes(plan.to_bytes())
    scores, _ = truth(rows)
    alignment = (0.3 - 0.2 * scores).astype(np.float32)
    missing = np.zeros(rows, bool)
    missing[7] = rows == ROWS
    commits = []
    for shard, part in enumerate(np.array_split(np.arange(rows), shards)):
        names = pa.array([uid(row) for row in part])
        table = pa.table(
            {
                "cf_shard": pa.array([f"{shard:016x}"] * len(part)),
                "cf_row": pa.array(part - part[0]),
                "cf_key": pa.array([f"k{row}" for row in part]),
                "cf_uid": names,
                "cf_caption": pa.array([f"=cmd {row}" if row % 2 else None for row in part]),
                "cf_score.weapons": pa.array(scores[part], mask=missing[part]),
                "cf_score.off-caption": pa.array(alignment[part]),
                "cf_score.small": pa.array(np.full(len(part), 300, np.float32)),
            }
        )
        pq.write_table(table, folder / f"annotated/{shard}.parquet", row_group_size=500)
        file = DataFile(f"annotated/{shard}.parquet", len(part), 0, "")
        found = Shard(f"{shard:016x}", f"tars/{shard}.tar", "tar")
        commits.append(
            commit_of(found, "decided", counts={"rows": len(part), "decided": len(part)}, files={"annotated": file})
        )
        ledger.write_commit(Directory(str(folder)), commits[-1])
    ledger.write_version(Directory(str(folder)), version_of(commits))
    return str(folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_run(tmp_path_factory.mktemp("runs") / "run")


def sampled(run: str, n: int = 400, design: Any = "uniform", rule: str = "weapons", **options: Any) -> c.Sample:
    scored = c.open_scored(run)
    options = {"cut": None, "seed": 0} | options
    return c.draw(scored, scored.policy, c.find_rule(scored.policy, rule), n=n, design=design, **options)


def labelled(sample: c.Sample, judge: Callable[[int], Any] | None = None) -> list[c.Label]:
    """The rows of a sample with their true labels; `judge` may answer for a row (None: left empty)."""
    _, true = truth()
    judge = judge or (lambda row: bool(true[row]))
    rows = [int(name, 16) for name in sample.rows["cf_uid"].to_pylist()]
    return [
        c.Label(uid(row), f"k{row}", judge(row), sample.rule, str(sample.design), chance, line)
        for line, (row, chance) in enumerate(
            zip(rows, sample.rows["inclusion_probability"].to_pylist(), strict=True), 2
        )
    ]


def calibrated(run: str, labels: list[c.Label], *targets: str, policy: str = POLICY, **options: Any) -> c.Calibrated:
    wanted = [c.Target.parse(text, options.pop("band", None)) for text in targets or ("precision=0.95",)]
    return c.calibrate(parse_policy(policy), c.open_scored(run), labels, wanted, **options)


# ------------------------------------------------------------------ sampling


def test_a_uniform_sample_says_what_it_is(run: str) -> None:
    sample = sampled(run)
    assert sample.rows.column_names == list(SAMPLE_COLUMNS)
    assert (sample.rows.num_rows, sample.population, sample.unscored) == (400, ROWS - 1, 1)
    row = sample.rows.slice(0, 1).to_pylist()[0]
    number = int(row["cf_uid"], 16)
    scores, _ = truth()
    assert row["score"] == scores[number]
    assert row["path"] == f"tars/{number // 2000}.tar"
    assert row["cf_row"] == number % 2000
    band = "reject" if row["score"] > 0.85 else "review" if row["score"] > 0.5 else "keep"
    assert (row["band"], row["label"], row["rule"], row["sample_design"]) == (band, "", "weapons", "uniform seed 0")
    assert row["inclusion_probability"] == 400 / (ROWS - 1)


def test_samples_depend_on_seed_and_uid_only_and_grow_at_the_end(run: str, tmp_path: Path) -> None:
    names = sampled(run).rows["cf_uid"].to_pylist()
    one_shard = sampled(write_run(tmp_path / "one", shards=1)).rows["cf_uid"].to_pylist()
    assert names == one_shard
    assert sampled(run, n=900).rows["cf_uid"].to_pylist()[:400] == names
    assert len(set(names)) == 400
    assert len(set(names) & set(sampled(run, seed=1).rows["cf_uid"].to_pylist())) < 60
    by_number = sorted((row for row in range(ROWS) if row != 7), key=lambda row: draw_number(0, uid(row)))
    assert names == [uid(row) for row in by_number[:400]]


def test_every_row_has_the_same_chance(tmp_path: Path) -> None:
    run = write_run(tmp_path / "small", rows=50)
    drawn = Counter(name for seed in range(300) for name in sampled(run, n=10, seed=seed).rows["cf_uid"].to_pylist())
    assert stats.chisquare([drawn[uid(row)] for row in range(50)]).pvalue > 1e-4


def test_flagged_rows_lie_beyond_the_cut_and_have_their_chance(run: str) -> None:
    scores, _ = truth()
    sample = sampled(run, design="flagged")
    assert str(sample.design) == "flagged above 0.5 seed 0"
    assert min(sample.rows["score"].to_pylist()) > 0.5
    assert sample.population == (np.delete(scores, 7) > 0.5).sum()
    assert sample.rows["inclusion_probability"][0].as_py() == 400 / sample.population
    below = sampled(run, design="flagged", rule="off-caption", cut=0.15)
    assert str(below.design) == "flagged below 0.15 seed 0"
    assert max(below.rows["score"].to_pylist()) < np.float32(0.15)


def test_uncertain_rows_are_the_nearest_to_a_threshold(run: str) -> None:
    scores, _ = truth()
    sample = sampled(run, design="uncertain", n=50, cut=0.7)
    wanted = np.argsort(np.abs(np.delete(scores, 7) - np.float32(0.7)), kind="stable")[:50]
    np.testing.assert_allclose(
        np.sort(np.abs(np.array(sample.rows["score"]) - 0.7)),
        np.sort(np.abs(np.delete(scores, 7)[wanted] - 0.7)),
        atol=1e-6,
    )
    assert str(sample.design) == "uncertain above 0.7"


def test_bands_are_sampled_alike_and_small_ones_are_taken_whole(run: str) -> None:
    scores, _ = truth()
    sample = sampled(run, design="per-band", n=1500)
    sizes = Counter(
        "reject" if score > 0.85 else "review" if score > 0.5 else "keep" for score in np.delete(scores, 7).tolist()
    )
    drawn = Counter(sample.rows["band"].to_pylist())
    assert drawn["review"] == sizes["review"] < 500
    assert drawn["keep"] + drawn["reject"] == 1500 - sizes["review"]
    assert abs(drawn["keep"] - drawn["reject"]) <= 2
    for row in sample.rows.to_pylist():
        assert row["inclusion_probability"] == drawn[row["band"]] / sizes[row["band"]]


def test_a_sample_file_is_safe_to_open_and_never_overwritten(run: str, tmp_path: Path) -> None:
    sample = sampled(run, n=20)
    for name in ("labels.csv", "labels.jsonl", "labels.parquet"):
        c.write_sample(sample, str(tmp_path / name))
        labels = c.read_labels(str(tmp_path / name))
        assert [label.uid for label in labels] == sample.rows["cf_uid"].to_pylist()
        assert {(label.true, label.rule, label.design) for label in labels} == {(None, "weapons", "uniform seed 0")}
        assert {label.probability for label in labels} == {20 / (ROWS - 1)}
        with pytest.raises(RefusedError, match="exists, and may hold labels"):
            c.write_sample(sample, str(tmp_path / name))
    with open(tmp_path / "labels.csv", newline="") as file:
        captions = {row["caption"] for row in csv.DictReader(file)}
    assert not any(caption.startswith("=") for caption in captions)
    assert any(caption.startswith("'=cmd") for caption in captions)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"rule": "weapon"}, "no rule 'weapon'.*did you mean 'weapons'"),
        ({"rule": None}, "say which rule with --rule.*weapons, off-caption"),
        ({"rule": "small"}, "depends on no model"),
        ({"cut": 0.5}, "--cut belongs to the designs flagged and uncertain"),
        ({"design": "flagged", "cut": 1.5}, "no row .* has a score of 'weapons' above 1.5"),
    ],
)
def test_samples_that_cannot_be_drawn_are_refused(run: str, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence):
        sampled(run, **options)


# ------------------------------------------------------------------ labels


def test_labels_in_every_spelling(tmp_path: Path) -> None:
    words = ["1", "0", "yes", "No", "TRUE", "false", "1.0", "", " 0 "]
    wanted = [True, False, True, False, True, False, True, None, False]
    csv_text = "\ufeffcf_uid;label\r\n" + "".join(f"u{i};{word}\r\n" for i, word in enumerate(words))
    (tmp_path / "l.csv").write_text(csv_text, encoding="utf-8")
    values: list[Any] = [1, 0, "yes", "no", True, False, 1.0, None, "0"]
    rows = [{"cf_uid": f"u{i}", "label": value} for i, value in enumerate(values)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("l.csv", "l.jsonl"):
        assert [label.true for label in c.read_labels(str(tmp_path / name))] == wanted
    pq.write_table(pa.table({"cf_key": ["a", "b"], "label": pa.array([True, None])}), tmp_path / "l.parquet")
    assert [(label.key, label.true) for label in c.read_labels(str(tmp_path / "l.parquet"))] == [
        ("a", True),
        ("b", None),
    ]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("l.csv", "cf_uid,label\na,1\nb,maybe\n", r"l\.csv:3: 'maybe' is no label"),
        ("l.csv", "cf_uid,label\na,2\n", r"l\.csv:2: '2' is no label"),
        ("l.csv", "cf_uid,verdict\na,1\n", r"l\.csv:2: there is no column 'label'"),
        ("l.csv", "name,label\na,1\n", r"l\.csv:2: .*neither cf_uid nor cf_key"),
        ("l.csv", "cf_uid,label\na,1\na,0\n", r"l\.csv:3: .*another label in line 2"),
        ("l.csv", "cf_uid,label\na,1,x\n", r"l\.csv:2: .*more cells"),
        ("l.csv", 'cf_uid,label\na,"1\n', r"l\.csv:2: this is not valid CSV"),
        ("l.csv", "cf_uid,label,inclusion_probability\na,1,2\n", r"l\.csv:2: the inclusion_probability '2'"),
        ("l.csv", "cf_uid,label\n", "holds no rows"),
        ("l.csv", b"cf_uid,label\n\xff,1\n", "not UTF-8"),
        ("l.jsonl", '{"cf_uid": "a", "label": 1}\n{"cf_uid": "b"\n', r"l\.jsonl:2: this is not JSON"),
        ("l.jsonl", "[1]\n", r"l\.jsonl:1: a line must be an object"),
        ("l.parquet", b"PAR1", "not a readable Parquet file"),
        ("l.txt", "", "must be a .csv, .jsonl or .parquet"),
    ],
)
def test_what_is_no_label_is_refused_with_its_line(tmp_path: Path, name: str, text: str | bytes, sentence: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RefusedError, match=sentence):
        c.read_labels(str(tmp_path / name))


# ------------------------------------------------------------------ calibrating


def test_a_precision_target(run: str) -> None:
    scores, true = truth()
    found = calibrated(run, labelled(sampled(run)))
    threshold = found.thresholds[0]
    flagged = scores > np.float32(threshold.value)
    assert true[flagged].mean() >= 0.95
    assert flagged[true].mean() > 0.6
    assert (threshold.band, threshold.direction, threshold.guarantee) == ("reject", "above", True)
    drawn = [int(label.uid or "", 16) for label in labelled(sampled(run))]
    assert threshold.n == 400
    assert threshold.m == flagged[drawn].sum()
    assert threshold.k == (flagged & true)[drawn].sum()
    assert threshold.bound is not None
    assert threshold.bound >= 0.95
    expected = {row.band: row for row in found.expected}
    assert sum(row.rows for row in found.expected) == ROWS - 1
    assert expected["reject"].rows == np.delete(flagged, 7).sum()
    assert expected["reject"].recall == pytest.approx((flagged & true)[drawn].sum() / true[drawn].sum())
    assert expected["reject"].low is not None
    assert expected["reject"].low < true[flagged].mean() <= 1
    assert found.fitted is not None
    assert found.fitted.brier["platt"] < 0.06
    assert any("1 rows of the run have no score" in note for note in found.notes)


def test_labels_of_flagged_rows_earn_the_guarantee_but_tell_no_recall(run: str) -> None:
    found = calibrated(run, labelled(sampled(run, design="flagged")))
    assert found.thresholds[0].guarantee
    assert found.thresholds[0].value > 0.5
    assert {row.recall for row in found.expected} == {None}
    assert {row.band: row.precision for row in found.expected}["keep"] is None
    assert found.prevalence is None
    assert not calibrated(run, labelled(sampled(run, design="flagged")), "miss-rate=0.1").thresholds[0].guarantee
    shifted = calibrated(run, labelled(sampled(run, design="flagged")), prevalence=0.3)
    assert not shifted.thresholds[0].guarantee


def test_a_miss_rate_and_a_rule_that_points_below(run: str) -> None:
    scores, true = truth()
    alignment = 0.3 - 0.2 * scores
    sample = sampled(run, rule="off-caption", n=600)
    found = calibrated(run, labelled(sample), "precision=0.9", rule="off-caption")
    value = found.thresholds[0].value
    assert found.thresholds[0].direction == "below"
    flagged = alignment < np.float32(value)
    assert true[flagged].mean() >= 0.9
    assert found.fitted is not None
    assert found.fitted.platt.a < 0
    assert (np.diff(found.fitted.isotonic.probabilities) <= 0).all()

    found = calibrated(run, labelled(sampled(run, n=600)), "miss-rate=0.05")
    threshold = found.thresholds[0]
    assert (threshold.band, threshold.m, threshold.guarantee) == ("review", found.positives, True)
    assert threshold.k == int(0.05 * (found.positives + 1)) - 1
    assert threshold.bound is not None
    assert (scores[true] <= np.float32(threshold.value)).mean() <= threshold.bound


@pytest.mark.parametrize("budget", [0.02, 0.1])
def test_a_review_budget_is_kept_exactly_and_used_up(run: str, budget: float) -> None:
    scores = np.delete(truth()[0], 7)
    found = calibrated(run, labelled(sampled(run)), "precision=0.95", f"review-budget={budget}")
    reject, review = (np.float32(item.value) for item in found.thresholds)
    in_review = int(((scores > review) & (scores <= reject)).sum())
    assert in_review <= budget * ROWS
    assert in_review >= budget * ROWS - 1
    assert found.thresholds[1].m == in_review


def test_targets_that_collide_say_how_to_go_on(run: str) -> None:
    labels = labelled(sampled(run))
    with pytest.raises(
        RefusedError, match=r"would swallow the review band at 0\.5; calibrate review in the same command"
    ):
        calibrated(run, labels, "precision=0.7")
    both = calibrated(run, labels, "precision=0.7", "miss-rate=0.4")
    reject, review = both.thresholds
    assert reject.value - 1e-4 < review.value < reject.value
    assert any("as good as empty" in note for note in both.notes)
    with pytest.raises(RefusedError, match=r"lies beyond the reject threshold 0\.85 already"):
        calibrated(run, labels, "miss-rate=0.4")
    with pytest.raises(RefusedError, match=r"would give it a review band that it never had.*--band reject"):
        calibrated(run, labelled(sampled(run, rule="off-caption")), "miss-rate=0.05")
    with pytest.raises(RefusedError, match="one target for each band"):
        calibrated(run, labels, "precision=0.9", "precision=0.95")


@pytest.mark.parametrize(
    "text", ["precision", "precision=95", "precision<=0.9", "recall=0.9", "miss-rate=0", "precision=e"]
)
def test_what_is_no_target_is_refused(text: str) -> None:
    with pytest.raises(RefusedError, match=r"is no target; write precision=0\.95"):
        c.Target.parse(text)


def drop_doubtful(labels: list[c.Label]) -> list[c.Label]:
    scores, _ = truth()
    return [label for label in labels if not 0.2 < scores[int(label.uid or "", 16)] < 0.9]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda labels: [replace(label, design=None) for label in labels], "do not say how they were drawn"),
        (lambda labels: [replace(label, design="by hand") for label in labels], "names no design"),
        (lambda labels: [*labels[:-1], replace(labels[-1], design="uniform seed 1")], "drawn in several ways"),
        (lambda labels: [replace(label, probability=None) for label in labels], "no inclusion_probability"),
        (lambda labels: [replace(label, probability=0.5) for label in labels], "by their inclusion_probability 3000"),
        (drop_doubtful, "by their inclusion_probability 400 were drawn"),
        (lambda labels: [*labels[:-1], replace(labels[-1], uid="x")], "1 of the labelled rows have no score"),
        (lambda labels: [replace(x, design="flagged above 0.5 seed 0") for x in labels], "not every labelled row"),
        (lambda labels: [replace(x, design="flagged seed 0") for x in labels], "names no design"),
    ],
)
def test_labels_that_were_not_drawn_uniformly_get_an_estimate(
    run: str, change: Callable[[list[c.Label]], list[c.Label]], sentence: str
) -> None:
    found = calibrated(run, change(labelled(sampled(run))), "precision=0.95", "miss-rate=0.05")
    assert [item.guarantee for item in found.thresholds] == [False, False]
    assert any(note.startswith("estimate, no guarantee: ") and sentence in note for note in found.notes)


@pytest.mark.parametrize("design", ["uncertain", "per-band"])
def test_designs_that_are_not_uniform_get_an_estimate(run: str, design: str) -> None:
    found = calibrated(run, labelled(sampled(run, n=900, design=design)), "precision=0.6", band="review")
    assert [item.guarantee for item in found.thresholds] == [False]
    assert any(f"by the design {design}, not uniformly" in note for note in found.notes)


def test_weights_undo_what_bands_sampled_alike_do_to_the_estimate(run: str) -> None:
    _, true = truth()
    found = calibrated(run, labelled(sampled(run, n=900, design="per-band")), "precision=0.95")
    assert found.prevalence == pytest.approx(true.mean(), abs=0.03)
    assert found.positives / found.labels > true.mean() + 0.1


def test_a_uniform_sample_judged_from_the_top_keeps_its_guarantee(run: str) -> None:
    labels = labelled(sampled(run, n=900))
    part = [label if position < 400 else replace(label, true=None) for position, label in enumerate(labels)]
    found = calibrated(run, part)
    assert found.thresholds == calibrated(run, labelled(sampled(run, n=400))).thresholds


def test_holes_count_against_precision_and_cost_the_miss_rate_its_guarantee(run: str) -> None:
    labels = labelled(sampled(run))
    whole = calibrated(run, labels, "precision=0.9", "miss-rate=0.02")
    positives = [position for position, label in enumerate(labels[:300]) if label.true]
    holes = [replace(label, true=None) if position in positives[:3] else label for position, label in enumerate(labels)]
    found = calibrated(run, holes, "precision=0.9", "miss-rate=0.02")
    assert [item.guarantee for item in whole.thresholds] == [True, True]
    assert [item.guarantee for item in found.thresholds] == [True, False]
    reject = found.thresholds[0]
    assert reject.n == 400
    assert reject.k is not None
    assert whole.thresholds[0].k is not None
    assert reject.value >= whole.thresholds[0].value
    assert any("3 rows without a label among the judged ones count as not true" in note for note in found.notes)
    shuffled = list(reversed(holes))  # the order of the file does not matter
    assert calibrated(run, shuffled, "precision=0.9", "miss-rate=0.02").thresholds == found.thresholds


def test_a_shift_of_prevalence_ends_the_guarantee_and_moves_what_to_expect(run: str) -> None:
    labels = labelled(sampled(run))
    same = calibrated(run, labels, "precision=0.9", prevalence=0.3)
    assert same.thresholds[0].guarantee
    found = calibrated(run, labels, "precision=0.9", "miss-rate=0.02", prevalence=0.01)
    assert [item.guarantee for item in found.thresholds] == [False, True]  # misses are shares of positives alone
    reject = found.expected[0]
    drawn = np.array([int(label.uid or "", 16) for label in labels])
    scores, true = truth()
    flagged = scores[drawn] > np.float32(found.thresholds[0].value)
    tpr, fpr = flagged[true[drawn]].mean(), flagged[~true[drawn]].mean()
    assert reject.precision == pytest.approx(0.01 * tpr / (0.01 * tpr + 0.99 * fpr))
    assert reject.share == pytest.approx(0.01 * tpr + 0.99 * fpr)
    assert any("the stated prevalence 0.01 is not that of the labels" in note for note in found.notes)


@pytest.mark.parametrize(
    ("n", "judge", "targets", "sentence"),
    [
        (60, None, ["precision=0.95"], "60 labels are too few for precision 0.95 at confidence 0.9: at least 72"),
        (30, None, ["miss-rate=0.02"], "positive labels are too few for a miss rate of 0.02: it needs 49"),
        (400, lambda row: False, ["precision=0.95"], "all 400 labels are negative"),
        (400, lambda row: None, ["precision=0.95"], "fill in the column 'label'"),
        (400, lambda row: row % 2 == 0, ["precision=0.95"], "no threshold shows precision 0.95.*at best"),
        (400, None, ["review-budget=0.0001"], "less than the next rows of equal score"),
    ],
)
def test_labels_that_cannot_do_it_are_refused(
    run: str, n: int, judge: Callable[[int], Any] | None, targets: list[str], sentence: str
) -> None:
    with pytest.raises(RefusedError, match=sentence):
        calibrated(run, labelled(sampled(run, n=n), judge), *targets)


def test_flagged_labels_that_are_all_true_are_enough(run: str) -> None:
    found = calibrated(run, labelled(sampled(run, design="flagged", cut=0.5), lambda row: True), "precision=0.95",
                       "review-budget=0.01")  # fmt: skip
    assert found.thresholds[0].guarantee
    assert found.fitted is None
    assert any("all labels are positive" in note for note in found.notes)
    ET.fromstring(c.plot_svg(found))


def test_labels_by_key_and_for_several_rules(run: str) -> None:
    labels = labelled(sampled(run))
    by_key = calibrated(run, [replace(label, uid=None) for label in labels])
    assert by_key.thresholds == calibrated(run, labels).thresholds
    mixed = [*labels, *labelled(sampled(run, rule="off-caption"))]
    with pytest.raises(RefusedError, match=r"several rules \(off-caption, weapons\); say which with --rule"):
        calibrated(run, mixed)
    assert calibrated(run, mixed, rule="weapons").thresholds == calibrated(run, labels).thresholds


# ------------------------------------------------------------------ promise 5


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("a rifle", "a musket", "the run's scores of 'weapons' come from other prompts"),
        ("version: 2", "version: 2\ntemplates: none", "come from other prompts"),
        ("id: weapons", "id: arms", "has no rule 'weapons'"),
    ],
)
def test_scores_of_another_policy_are_refused(run: str, old: str, new: str, sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence):
        calibrated(run, labelled(sampled(run)), policy=POLICY.replace(old, new), rule="weapons")


def test_thresholds_and_other_rules_may_differ_from_those_of_the_run(run: str) -> None:
    changed = POLICY.replace("above: 0.50", "above: 0.4").replace("below: 200", "below: 100")
    assert calibrated(run, labelled(sampled(run)), policy=changed).thresholds[0].guarantee


def test_a_policy_calibrated_for_other_weights_of_the_model_is_refused(run: str, tmp_path: Path) -> None:
    text = c.calibrated_text(POLICY.encode(), "p.yaml", calibrated(run, labelled(sampled(run))), TODAY).decode()
    other = write_run(tmp_path / "other", weights_sha256="b" * 64)
    with pytest.raises(RefusedError, match="calibrated for other weights of fake"):
        calibrated(other, labelled(sampled(other)), policy=text)
    second = write_run(tmp_path / "second", weights_sha256="b" * 64, model="fake-2")
    found = calibrated(second, labelled(sampled(second)), policy=text)
    both = parse_policy(c.calibrated_text(text.encode(), "p.yaml", found, TODAY))
    assert [entry.model for entry in both.calibrations] == ["fake", "fake-2"]


def test_runs_that_hold_no_scores_are_refused(tmp_path: Path) -> None:
    embedded = write_run(tmp_path / "embed", job="embed")
    with pytest.raises(RefusedError, match="`embed` decides nothing; decide it with `clipfilter filter"):
        c.open_scored(embedded)
    (tmp_path / "embed/versions/000001.json").unlink()
    with pytest.raises(RefusedError, match="has not finished"):
        c.open_scored(embedded)
    with pytest.raises(RefusedError, match="not a run directory"):
        c.open_scored(str(tmp_path))


# ------------------------------------------------------------------ writing


def test_the_written_policy_is_calibrated_and_otherwise_untouched(run: str) -> None:
    found = calibrated(run, labelled(sampled(run)), "precision=0.95", "miss-rate=0.05")
    text = c.calibrated_text(POLICY.encode(), "p.yaml", found, TODAY).decode()
    assert text.startswith(POLICY)
    policy = parse_policy(text)
    compiled = compile_policy(policy, FakeEncoder())
    rule = compiled.rules[0]
    assert rule.calibrated
    assert compiled.uncalibrated == ["off-caption"]
    assert (rule.reject, rule.review) == tuple(item.value for item in found.thresholds)
    entry = policy.calibrations[0]
    assert (entry.model, entry.weights_sha256, entry.decode) == ("fake", "a" * 64, "fast")
    assert entry.prompts_sha256 == compiled.prompts_sha256
    reject = entry.rules["weapons"].reject
    assert reject is not None
    assert (reject.n, reject.m, reject.k) == (400, found.thresholds[0].m, found.thresholds[0].k)
    assert (reject.target, reject.confidence, reject.design) == ("precision>=0.95", 0.9, "uniform seed 0")
    assert (reject.guarantee, reject.date) == (True, TODAY)
    probability = entry.rules["weapons"].probability
    assert probability is not None
    assert probability.n == 400
    assert 0 < probability.platt.brier < 0.06
    with pytest.raises(RefusedError, match="other decode mode"):
        compile_policy(policy, FakeEncoder(), decode="exact")
    assert policy.from_canonical(json.loads(json.dumps(policy.canonical()))).sha256 == policy.sha256


def test_a_head_is_calibrated_as_a_concept_is(tmp_path: Path) -> None:
    start, stop = POLICY.index("    concept:"), POLICY.index("    review:")
    policy = POLICY[:start] + "    head: laion-aesthetic-v2\n" + POLICY[stop:]
    run = write_run(tmp_path / "heads", policy)
    labels = labelled(sampled(run))
    found = calibrated(run, labels, policy=policy)
    entry = parse_policy(c.calibrated_text(policy.encode(), "p.yaml", found, TODAY)).calibrations[0]
    assert entry.rules["weapons"].reject is not None
    with pytest.raises(RefusedError, match="come from another definition"):
        calibrated(run, labels, policy=policy.replace("aesthetic-v2", "aesthetic-v1"))


def test_a_second_rule_joins_the_entry_and_comments_in_it_stay(run: str) -> None:
    first = c.calibrated_text(POLICY.encode(), "p.yaml", calibrated(run, labelled(sampled(run))), TODAY).decode()
    commented = first.replace("    decode: fast\n", "    # checked by hand\n    decode: fast\n")
    commented = commented.replace("calibrations:\n", "\n# ---- below: numbers\ncalibrations:\n") + "\n# the end\n"
    labels = labelled(sampled(run, rule="off-caption", n=600))
    found = calibrated(run, labels, "precision=0.9", policy=commented)
    text = c.calibrated_text(commented.encode(), "p.yaml", found, TODAY).decode()
    assert text.startswith(POLICY + "\n# ---- below: numbers\ncalibrations:\n")
    assert text.endswith("\n# the end\n")
    assert "    # checked by hand\n" in text
    policy = parse_policy(text)
    assert set(policy.calibrations[0].rules) == {"weapons", "off-caption"}
    assert compile_policy(policy, FakeEncoder()).uncalibrated == []
    again = c.calibrated_text(text.encode(), "p.yaml", found, TODAY).decode()
    assert again == text


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.rstrip("\n"),
        lambda text: "\ufeff" + text,
        lambda text: "---\n" + text + "...\n",
        lambda text: (
            text.replace("on_missing: review\n", "") + "calibrations: []\n# about missing ones\non_missing: review\n"
        ),
    ],
    ids=["crlf", "no last line end", "bom", "document marks", "in the middle"],
)
def test_files_of_every_shape_keep_it(run: str, change: Callable[[str], str]) -> None:
    text = change(POLICY)
    written = c.calibrated_text(text.encode(), "p.yaml", calibrated(run, labelled(sampled(run))), TODAY).decode()
    assert parse_policy(written).calibrations[0].rules["weapons"].reject is not None
    kept = [line for line in text.splitlines() if line != "calibrations: []"]
    assert [line for line in written.splitlines() if line in kept] == kept
    assert ("\r\n" in written) == ("\r\n" in text)
    assert written.count("\n") == written.count("\r\n") or "\r\n" not in text


def test_json_and_odd_calibrations_are_refused(run: str) -> None:
    found = calibrated(run, labelled(sampled(run)))
    with pytest.raises(RefusedError, match="written in braces"):
        c.calibrated_text(json.dumps(parse_policy(POLICY).canonical()).encode(), "p.json", found, TODAY)
    text = c.calibrated_text(POLICY.encode(), "p.yaml", found, TODAY).decode()
    odd = text.replace('any_of: ["a', 'any_of: &phrases ["a').replace("{above: 0.85}", "&cut {above: 0.85}")
    odd = odd.replace("        probability:", "        review: *cut\n        probability:").replace(
        "review: {above: 0.50}", ""
    )
    odd = odd.replace("above: 0.85}", "above: 0.2}")
    with pytest.raises(RefusedError, match="cannot be edited in place"):
        c.calibrated_text(odd.encode(), "p.yaml", found, TODAY)


def test_writing_is_atomic_and_notices_a_change(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(POLICY)
    path.chmod(0o640)
    link = tmp_path / "link.yaml"
    link.symlink_to(path)
    c.write_policy(link, (POLICY + "# more\n").encode(), expected=POLICY.encode())
    assert link.is_symlink()
    assert path.read_text() == POLICY + "# more\n"
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(RefusedError, match="changed while it was calibrated"):
        c.write_policy(path, POLICY.encode(), expected=POLICY.encode())
    assert path.read_text() == POLICY + "# more\n"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["link.yaml", "p.yaml"]


def test_packs_are_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is a pack that came with clipfilter; give --out"):
        c.policy_path("demo", None)
    source, target = c.policy_path("demo", str(tmp_path / "mine.yaml"))
    assert source.name == "demo.yaml"
    assert target == tmp_path / "mine.yaml"


# ------------------------------------------------------------------ the command line


def test_the_commands_from_sample_to_policy(run: str, tmp_path: Path) -> None:
    policy, labels, plot = tmp_path / "p.yaml", tmp_path / "labels.csv", tmp_path / "plot.svg"
    policy.write_text(POLICY)
    runner = CliRunner()
    done = runner.invoke(policy_app, ["sample", run, "--rule", "weapons", "--n", "300", "--out", str(labels)])
    assert done.exit_code == 0, done.output
    assert "300 of 5,999 rows to label for 'weapons' (uniform seed 0)" in done.output
    _, true = truth()
    with open(labels, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["label"] = "yes" if true[int(row["cf_uid"], 16)] else "no"
    with open(labels, "w", newline="") as file:
        writer = csv.DictWriter(file, SAMPLE_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    arguments = ["calibrate", str(policy), "--labels", str(labels), "--on", run, "--target", "precision=0.95"]
    done = runner.invoke(policy_app, [*arguments, "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.output)
    assert policy.read_text() == POLICY
    assert (shown["rule"], shown["written"], shown["thresholds"][0]["guarantee"]) == ("weapons", None, True)
    done = runner.invoke(policy_app, [*arguments, "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    assert "guaranteed with 90% confidence" in done.output
    reject = load_policy(str(policy)).calibrations[0].rules["weapons"].reject
    assert reject is not None
    assert reject.above == shown["thresholds"][0]["value"]
    assert ET.parse(plot).getroot().tag.endswith("svg")


def test_a_plot_escapes_what_it_shows(run: str) -> None:
    found = replace(calibrated(run, labelled(sampled(run))), rule="<script>alert(1)</script>", model="a & b")
    svg = c.plot_svg(found)
    assert "<script" not in svg
    texts = [item.text for item in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert "<script>alert(1)</script> (shop) on a & b" in texts
