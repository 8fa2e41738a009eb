"""`policy test` on real photographs with the bundled model, its exit code and JUnit; `policy show`'s view of a contrast."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from typer.testing import CliRunner

from clipfilter.cli.main import add_commands, app
from clipfilter.errors import RefusedError
from clipfilter.evaluation.contrast import contrasts
from clipfilter.models import Encoder, load_encoder
from clipfilter.operations.expectations import run_tests
from clipfilter.policies import load_policy, pack_names, parse_policy
from clipfilter.policies.language.files import packs_folder
from tests.support.edition import CAT, NO_CAT, SHOWN_OF_MARKETPLACE_SAFETY
from tests.support.engine import PHOTOS
from tests.support.policies import FakeEncoder

POLICY = f"""\
policy: shop
version: 1
rules:
  - id: cat
    concept: {{any_of: ["a cat", "a kitten"], but_not: ["a dog", "a building"]}}
    review: {{above: 0.8}}
  - id: few-words
    metadata: caption_words
    reject: {{below: 3}}
    on_missing: keep
  - id: small
    metadata: min_side
    reject: {{below: 100}}
  - id: price
    metadata: price
    review: {{above: 1000}}
    on_missing: keep
tests:
  - {{image: {PHOTOS}/kitten.jpg, expect: review, rules: {{cat: {{band: review, above: {CAT}}}}}}}
  - {{image: {PHOTOS}/colosseum.jpg, expect: keep, rules: {{cat: {{band: keep, below: {NO_CAT}}}}}}}
  - {{image: {PHOTOS}/colosseum.jpg, columns: {{price: 5000}}, expect: review, rules: {{price: review, small: keep}}}}
  - {{size: [640, 480], caption: two words, expect: reject, rules: {{few-words: reject}}}}
  - {{name: no caption, size: [640, 480], expect: keep, rules: {{few-words: missing, price: missing}}}}
  - {{size: [640, 99], caption: three short words, expect: reject, rules: {{small: {{below: 100}}}}}}
"""
WRONG = """\
tests:
  - {image: nowhere.jpg, expect: keep}
  - {name: "odd \\u0001 <name>", size: [640, 480], expect: reject}
  - {size: [640, 480], rules: {few-words: {band: keep, above: 5}, small: {below: 100}}}
"""


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return load_encoder("nano", threads=1)


def test_a_policy_that_does_what_its_tests_say(nano: Encoder, tmp_path: Path) -> None:
    report = run_tests(parse_policy(POLICY), tmp_path, nano)
    assert [result.problems for result in report.results] == [[]] * 6
    assert report.failed == 0
    first = report.results[0]
    assert (first.name, first.decision, first.expected) == ("kitten.jpg", "review", f"review, cat: review above {CAT}")
    assert first.rules["cat"].nearest in ("a cat", "a kitten")
    assert report.to_json()["passed"] is True
    assert json.loads(json.dumps(report.to_json()))["tests"][1]["decision"] == "keep"


def test_what_is_wrong_is_said_for_every_test(nano: Encoder, tmp_path: Path) -> None:
    report = run_tests(parse_policy(POLICY.split("tests:")[0] + WRONG), tmp_path, nano)
    missing, decision, rules = report.results
    assert missing.decision == "failed"
    assert missing.problems == [f"there is no image {tmp_path}/nowhere.jpg"]
    assert decision.problems == ["keep instead of reject"]
    assert rules.problems == [
        "few-words says missing instead of keep",
        "few-words has no score, which should be above 5",
        "small has the score 480.000, which is not below 100",
    ]
    assert report.failed == 3


def test_ranks_say_nothing_of_single_images(nano: Encoder, tmp_path: Path) -> None:
    text = (
        "policy: p\nversion: 1\nrules:\n  - {id: match, alignment: {}}\n"
        "  - {id: best, fraction: {of: match}, reject: {outside_top: 0.3}}\n"
        "tests:\n  - {size: [64, 64], caption: nothing of the kind, expect: keep}\n"
        "  - {size: [64, 64], expect: review, rules: {best: missing}}\n"
    )
    report = run_tests(parse_policy(text), tmp_path, nano)
    assert report.failed == 0
    assert any("ranks whole datasets" in note for note in report.notes)


def test_a_policy_without_tests_is_refused(nano: Encoder, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="has no tests"):
        run_tests(parse_policy(POLICY.split("tests:")[0]), tmp_path, nano)


@pytest.fixture(scope="module")
def cli() -> CliRunner:
    if not app.registered_commands:
        add_commands(app)
    return CliRunner()


def test_the_command_its_exit_code_and_junit(cli: CliRunner, tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(POLICY)
    (tmp_path / "bad.yaml").write_text(POLICY.split("tests:")[0] + WRONG)
    good = cli.invoke(app, ["policy", "test", str(tmp_path / "good.yaml")])
    assert good.exit_code == 0, good.output
    assert "6 of 6 tests pass" in good.output
    bad = cli.invoke(app, ["policy", "test", str(tmp_path / "bad.yaml"), "--junit", str(tmp_path / "out.xml")])
    assert bad.exit_code == 3
    assert "0 of 3 tests pass" in bad.output
    suite = ET.parse(tmp_path / "out.xml").getroot()
    assert (suite.tag, suite.get("tests"), suite.get("failures")) == ("testsuite", "3", "3")
    assert suite.findall("testcase")[1].get("name") == "2 odd � <name>"
    failure = suite.findall("testcase")[0].find("failure")
    assert failure is not None
    assert "there is no image" in str(failure.get("message"))
    shown = cli.invoke(app, ["policy", "test", str(tmp_path / "good.yaml"), "--json"])
    assert json.loads(shown.output)["failed"] == 0


def test_every_pack_passes_its_tests_and_has_a_card(nano: Encoder) -> None:
    for name in pack_names():
        policy = load_policy(name)
        assert policy.card is not None, f"{name} has no card"
        report = run_tests(policy, packs_folder(), nano)
        problems = {result.name: result.problems for result in report.results if not result.passed}
        assert not problems, f"{name}: {problems}"


def test_no_pack_names_minors() -> None:
    for name in pack_names():
        for rule in load_policy(name).rules:
            words = " ".join(rule.concept.any_of) if rule.concept is not None else ""
            assert not {"child", "children", "kid", "minor", "teen", "girl", "boy", "baby"} & set(words.split()), (
                rule.id
            )


def test_a_near_miss_that_crowds_a_positive_is_named() -> None:
    near = [f"near miss {number}" for number in range(20)]
    text = (
        "policy: p\nversion: 1\ntemplates: none\nrules:\n"
        f"  - {{id: a, concept: {{any_of: [x, y], but_not: {json.dumps(near)}, generic: false}}, reject: {{above: 0.5}}}}\n"
        "  - {id: b, concept: {any_of: [x]}, reject: {above: 0.5}}\n"
    )
    encoder = FakeEncoder()
    found, alone = contrasts(parse_policy(text), encoder)  # type: ignore[arg-type]
    for positive, other in zip(found.positives, "yx", strict=True):
        alike = float(encoder.vector(positive.phrase) @ encoder.vector(other))
        cosines = {phrase: float(encoder.vector(positive.phrase) @ encoder.vector(phrase)) for phrase in near}
        expected = sorted(near, key=lambda phrase: -cosines[phrase])[:3]
        assert (positive.alike, positive.alike_cosine) == (other, pytest.approx(alike, abs=1e-5))
        assert [neighbour.phrase for neighbour in positive.nearest] == expected
        crowded = [phrase for phrase in expected if cosines[phrase] > alike]
        assert [neighbour.phrase for neighbour in positive.crowded] == crowded
        assert crowded
        assert all(any(phrase in warning for warning in found.warnings) for phrase in crowded)
    assert alone.positives[0].alike is None
    assert alone.warnings == []
    assert all(neighbour.generic for neighbour in alone.positives[0].nearest)


def test_show_prints_rules_and_contrast(cli: CliRunner) -> None:
    shown = cli.invoke(app, ["policy", "show", "marketplace-safety"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    for words in (*SHOWN_OF_MARKETPLACE_SAFETY, "as nano reads its phrases", "may not tell them apart"):
        assert words in shown.output, words
    canonical = cli.invoke(app, ["policy", "show", "marketplace-safety", "--json"])
    assert json.loads(canonical.output) == load_policy("marketplace-safety").canonical()
