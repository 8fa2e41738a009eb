"""A new kind of rule is one file: this one defines a tiny kind, and all that asks about kinds knows it while it lasts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from clipfilter.cli.policies import policy_app
from clipfilter.errors import RefusedError
from clipfilter.policies import (
    Attachments,
    Measure,
    Policy,
    Words,
    Written,
    compile_policy,
    joined,
    measure_of,
    parse_policy,
    policy_schema,
    scores_of,
)
from clipfilter.policies.kinds.base import Answer, numbers_answer
from clipfilter.policies.kinds.registry import MEASURES
from clipfilter.policies.parts.fields import Number, fail
from clipfilter.report.data import Band, RuleData
from clipfilter.report.explain import sentence, verdict
from clipfilter.report.rules import meaning
from tests.support.kinds import trial_kind
from tests.support.policies import FakeEncoder, embeddings

POLICY = """
policy: p
version: 1
rules:
  - id: far
    distance: {column: miles, factor: 1.6}
    review: {above: 8}
    reject: {above: 80}
  - {id: sum, combine: {weighted: {far: 0.5}}, review: {above: 1000}}
"""


class Distance(Measure):
    """A numeric column times a factor."""

    kind = "distance"
    about = "How far away the picture was taken."

    column: str
    factor: Number = 1.0

    def check_band(self, band: Any, *at: str | int) -> None:
        if band.value < 0:
            fail("no distance is below 0", *at, band.direction)

    @property
    def numbers(self) -> tuple[str, ...]:
        return (self.column,)

    def answer(self, thresholds: Sequence[float], files: Attachments) -> Answer:
        return numbers_answer(
            lambda table: self.factor * np.asarray(table[self.column].to_numpy(), np.float64), thresholds
        )

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        return ["How far away, by the column ", Written(spec["column"], 20), "."]

    @classmethod
    def measured(cls, spec: Any) -> Words:
        return ["distance"]


@pytest.fixture
def distance() -> Iterator[None]:
    with trial_kind(Distance):
        yield


def test_a_policy_with_it_loads_and_keeps_its_canonical_form(distance: None) -> None:
    policy = parse_policy(POLICY)
    assert policy.rules[0].kind == "distance"
    canonical = policy.canonical()
    assert canonical["rules"][0]["distance"] == {"column": "miles", "factor": 1.6}
    assert Policy.from_canonical(json.loads(json.dumps(canonical))).sha256 == policy.sha256
    assert [rule.kind for rule in scores_of(policy).rules] == ["distance", "combine"]


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("above: 80}", "above: -1}", "p.yaml:8:21: no distance is below 0"),
        ("factor: 1.6", "facto: 1.6", "p.yaml:6:31: unknown key 'facto' in 'distance'; did you mean 'factor'?"),
        ("reject:", "pixels: dark\n    reject:", "the rule 'far' is of kind pixels and distance"),
        ("reject: {above: 80}", "templates: none", "templates belong to concept rules, and 'far' is of kind distance"),
    ],
)
def test_what_is_wrong_with_it_is_refused_with_its_place(distance: None, right: str, wrong: str, message: str) -> None:
    with pytest.raises(RefusedError) as refused:
        parse_policy(POLICY.replace(right, wrong, 1), "p.yaml")
    assert message in str(refused.value)


def test_it_scores_and_decides_beside_the_other_kinds(distance: None) -> None:
    compiled = compile_policy(parse_policy(POLICY), FakeEncoder())
    rows = pa.table({"miles": [1.0, 10.0, 100.0, None]})
    scores = compiled.score(embeddings(4), None, None, rows)
    decided = compiled.decide(scores)
    np.testing.assert_array_equal(scores.values["far"], np.float32([1.6, 16, 160, np.nan]))
    np.testing.assert_array_equal(scores.values["sum"], np.float32([0.8, 8, 80, np.nan]))
    assert decided.decision.to_pylist() == ["keep", "review", "reject", "review"]


def test_reports_and_explanations_have_its_words(distance: None) -> None:
    compiled = compile_policy(parse_policy(POLICY), FakeEncoder())
    scores = compiled.score(embeddings(1), None, None, pa.table({"miles": [100.0]}))
    row = compiled.annotation(scores, compiled.decide(scores)).to_pylist()[0]
    spec = compiled.policy.canonical()["rules"][0]
    bands = [Band(name, "above", spec[name]["above"], "written", spec[name]) for name in ("review", "reject")]
    rule = RuleData("far", "distance", spec, None, bands)
    said = sentence(verdict(rule, row))
    assert said == "distance 160 is above 80, as written in the policy"
    assert "How far away, by the column miles." in joined(meaning(rule), lambda written: written.text)
    assert compiled.policy.rules[0].measure.summary(conditional=False) == '{"column": "miles", "factor": 1.6}'


def test_editors_and_the_command_line_know_it(distance: None, tmp_path: Any) -> None:
    schema = policy_schema()
    assert schema["$defs"]["Rule"]["properties"]["distance"]["description"] == Distance.about
    document = {"policy": "p", "version": 1, "rules": [{"id": "far", "distance": {"column": "miles"}}]}
    jsonschema.validate(document, schema)
    document["rules"][0]["distance"] = {"colum": "miles"}  # type: ignore[index]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema)
    (tmp_path / "p.yaml").write_text(POLICY)
    shown = CliRunner().invoke(policy_app, ["show", str(tmp_path / "p.yaml")])
    assert shown.exit_code == 0, shown.output
    assert "distance" in shown.output


def test_it_is_gone_afterwards() -> None:
    with trial_kind(Distance):
        assert measure_of("distance") is Distance
    with pytest.raises(RefusedError, match="unknown key 'distance'"):
        parse_policy(POLICY)
    assert "distance" not in policy_schema()["$defs"]["Rule"]["properties"]
    with pytest.raises(KeyError):
        measure_of("distance")


def test_every_kind_says_what_it_is() -> None:
    assert len({measure.kind for measure in MEASURES}) == len(MEASURES)
    for measure in MEASURES:
        assert measure.about
        assert measure.__doc__
        assert measure.meaning.__func__ is not Measure.meaning.__func__  # type: ignore[attr-defined]
        assert measure.measured.__func__ is not Measure.measured.__func__  # type: ignore[attr-defined]
        makes = [measure.plan.__func__ is not Measure.plan.__func__, measure.answer is not Measure.answer]  # type: ignore[attr-defined]
        assert makes.count(True) == 1
