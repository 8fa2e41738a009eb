"""The published JSON Schema: current, passes everything that loads, and marks what people get wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from clipfilter.policies.language.files import pack_names, packs_folder
from clipfilter.policies.language.json_schema import policy_schema
from clipfilter.policies.language.yaml_nodes import read_yaml

REPO = Path(__file__).parents[2]
PUBLISHED = REPO / "docs" / "reference" / "policy.schema.json"


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(PUBLISHED.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def problems(validator: jsonschema.Draft202012Validator, policy: Any) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(policy)]


def test_the_published_schema_is_current() -> None:
    assert json.loads(PUBLISHED.read_text()) == policy_schema(), (
        "run `clipfilter policy schema --out docs/reference/policy.schema.json`"
    )


@pytest.mark.parametrize("name", pack_names())
def test_every_pack_passes(validator: jsonschema.Draft202012Validator, name: str) -> None:
    assert problems(validator, read_yaml((packs_folder() / f"{name}.yaml").read_bytes()).plain()) == []


def test_every_example_of_the_reference_passes(validator: jsonschema.Draft202012Validator) -> None:
    text = (REPO / "docs" / "reference" / "policy.md").read_text()
    blocks = [block for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if block.startswith("policy:")]
    assert len(blocks) >= 4
    for block in blocks:
        assert problems(validator, read_yaml(block.encode()).plain()) == []


GOOD = """\
policy: p
version: 1
variables: {sure: 0.9, near: ["a stick"]}
rules:
  - id: weapons
    concept: {any_of: ["a gun", {text: a rifle, weight: 2}], but_not: ["${near}"], generic: false}
    templates: ["a photo of {}"]
    review: {above: 0.5}
    reject: {above: "${sure}"}
  - {id: dull, head: laion-aesthetic-v2, reject: {below: 4.5}}
  - {id: words, text: {matches: "(?i)sale"}, review: {above: 0.5}}
  - {id: dark, pixels: dark}
on_missing: keep
tests: [{size: [64, 64], rules: {weapons: keep, dark: {above: 1}}}]
"""
MISTAKES = [
    ("a root typo", "on_missing: keep", "on_mising: keep"),
    ("a rule typo", "    review: {above: 0.5}", "    reviews: {above: 0.5}"),
    ("a concept typo", "but_not:", "butnot:"),
    ("a band typo", "{below: 4.5}", "{belw: 4.5}"),
    ("two directions", "{below: 4.5}", "{below: 4.5, above: 1}"),
    ("an empty band", "{below: 4.5}", "{}"),
    ("a threshold in quotes", "{below: 4.5}", '{below: "4.5"}'),
    ("a phrase without a list", '["a photo of {}"]', "a photo of {}"),
    ("a number as phrase", '["a gun",', "[42,"),
    ("a template without braces", '["a photo of {}"]', '["a photo"]'),
    ("an unknown ensemble", '["a photo of {}"]', "imagent"),
    ("an unknown decision", "on_missing: keep", "on_missing: drop"),
    ("an unknown pixel quality", "pixels: dark", "pixels: drak"),
    ("two kinds", "pixels: dark", "pixels: dark, metadata: width"),
    ("no kind", ", pixels: dark", ", review: {above: 1}"),
    ("no id", "id: dark, ", ""),
    ("an empty value", "on_missing: keep", "on_missing:"),
    ("no rules", "rules:", "rule:"),
    ("a list of variables", '{sure: 0.9, near: ["a stick"]}', "[sure]"),
    ("an unknown outcome", "weapons: keep", "weapons: passes"),
    ("a size that is no pair", "size: [64, 64]", "size: [64]"),
    ("version as text", "version: 1", 'version: "1"'),
]


def test_what_people_get_wrong_is_marked(validator: jsonschema.Draft202012Validator) -> None:
    assert problems(validator, read_yaml(GOOD.encode()).plain()) == []
    for name, right, wrong in MISTAKES:
        assert right in GOOD, name
        assert problems(validator, read_yaml(GOOD.replace(right, wrong, 1).encode()).plain()), name


def test_a_policy_that_extends_needs_no_rules_of_its_own(validator: jsonschema.Draft202012Validator) -> None:
    child = {"policy": "p", "version": 1, "extends": "marketplace-safety"}
    assert problems(validator, child) == []
    assert problems(validator, {**child, "rules": [{"id": "weapons", "review": {"above": 0.7}}]}) == []
    assert problems(validator, {"policy": "p", "version": 1, "rules": [{"id": "weapons", "review": {"above": 0.7}}]})
