"""Every pack, and a policy of all kinds of rules, keep their canonical form, their hash, and the hashes of their prompts.

`tests/golden/policies.json` was written by the code before rule kinds had files of their own; a change of any byte of it
would cut finished runs, calibrations and labels off from the policies that made them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipfilter.policies import Policy, load_policy, pack_names, parse_policy, rule_prompts_sha256

GOLDEN = Path(__file__).parents[1] / "golden" / "policies.json"
EVERY_KIND = """
policy: every-kind
version: 4
templates: ["a photo of {}", "{}"]
rules:
  - id: cats
    concept:
      any_of: [{text: a cat, weight: 2}, "  a   kitten "]
      all_of: [a sofa]
      but_not: [a dog]
      background: 0.18
    review: {above: 0.4}
    reject: {above: 0.7}
    severity: 4
    action: queue-cats
  - {id: plain, concept: {any_of: [an animal], generic: false, score: cosine}, templates: none, review: {above: 0.2}}
  - {id: match, alignment: {}, review: {below: 0.05}, on_missing: keep}
  - {id: nice, head: laion-aesthetic-v2, review: {below: 4}}
  - id: words
    safety:
      concepts: [{text: blood, threshold: 0.2}]
      special_care: [{text: a child, threshold: 0.25}]
      adjustment: 0.02
    reject: {above: 0}
  - id: small
    metadata: min_side
    when: {all: [{column: source, is: scan}, {not: {column: width, above: 9}}]}
    reject: {below: 20}
  - {id: dark, pixels: dark}
  - {id: flat, pixels: low_information, review: {below: 2}}
  - {id: spoken, text: {language: [fr, en, fr]}, review: {below: 0.5}}
  - {id: said, text: {language: en, language_column: lang}, review: {below: 1}}
  - {id: mail, text: {matches: '[a-z]+@[a-z]+', column: note}, reject: {above: 0}}
  - {id: listed, text: {block_list: ["bad  word", worse]}, reject: {above: 0}, tighten: {above: 1, by: 0.1, rules: [cats]}}
  - {id: twin, known: {phash: [00FF00ff00ff00ff], distance: 3}, action: review}
  - {id: same, known: {sha256: [aa00000000000000000000000000000000000000000000000000000000000000]}, action: escalate}
  - {id: both, combine: {weighted: {cats: 0.5, plain: 2}}, review: {above: 1}}
  - {id: best, fraction: {of: both}, reject: {outside_bottom: 0.3}}
calibrations:
  - model: some
    weights_sha256: bb00000000000000000000000000000000000000000000000000000000000000
    prompts_sha256: cc00000000000000000000000000000000000000000000000000000000000000
    rules: {cats: {review: {above: 0.3, n: 5, target: precision=0.9}}}
overrides:
  - {cf_uid: u1, decision: keep, by: me}
on_missing: reject
"""


def described(policy: Policy) -> dict[str, Any]:
    return {"sha256": policy.sha256, "prompts": rule_prompts_sha256(policy), "canonical": policy.canonical()}


def found(name: str) -> dict[str, Any]:
    return described(parse_policy(EVERY_KIND) if name == "every-kind" else load_policy(name))


@pytest.mark.parametrize("name", ["every-kind", *pack_names()])
def test_a_policy_is_what_it_was(name: str) -> None:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    # As text, so that the order of the keys counts: runs store the canonical form as it is.
    made = found(name)
    assert json.dumps(made["canonical"], indent=1) == json.dumps(golden["canonical"], indent=1)
    assert made == golden


def test_the_canonical_form_is_a_policy_with_itself_as_its_canonical_form() -> None:
    for name in ("every-kind", *pack_names()):
        canonical = found(name)["canonical"]
        assert Policy.from_canonical(canonical).canonical() == canonical
