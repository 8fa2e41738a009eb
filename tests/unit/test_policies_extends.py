"""Policies built on others: what is inherited, what wins, where a mistake is pointed at, which calibrations still count."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipfilter.errors import RefusedError
from clipfilter.policies import compile_policy, load_policy, parse_policy
from clipfilter.policies.language.schema import json_sha256, rule_prompts_sha256
from tests.support.policies import FakeEncoder

BASE = """\
policy: base
version: 7
description: The base.
templates: none
on_missing: keep
variables: {near: ["a toy gun", "a camera"], sure: 0.9, colour: red}
rules:
  - id: weapons
    concept:
      any_of: ["a handgun", "a ${colour} rifle"]
      but_not: ["${near}", "a power drill"]
    review: {above: 0.5}
    reject: {above: "${sure}"}
  - id: small
    metadata: min_side
    reject: {below: 200}
card: {intended_use: x, confuses: y, not_for: z}
interchange:
  openai: {violence: [weapons], other: [small]}
  rekognition: {Violence/Weapons: [weapons]}
"""
CHILD = "policy: child\nversion: 1\nextends: base.yaml\n"
WEIGHTS = "a" * 64


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / "child.yaml"


def test_a_policy_that_only_extends_decides_as_its_base(tmp_path: Path) -> None:
    child = load_policy(write(tmp_path, base=BASE, child=CHILD))
    base = load_policy(tmp_path / "base.yaml")
    assert (child.name, child.version, child.description, child.card) == ("child", 1, None, None)
    assert child.on_missing == "keep"
    assert child.canonical()["rules"] == base.canonical()["rules"]
    weapons = child.canonical()["rules"][0]["concept"]
    assert weapons["any_of"] == ["a handgun", "a red rifle"]
    assert weapons["but_not"] == ["a toy gun", "a camera", "a power drill"]
    assert child.rules[0].reject is not None
    assert child.rules[0].reject.value == 0.9
    assert child.interchange == base.interchange


def test_what_the_file_says_itself_wins(tmp_path: Path) -> None:
    text = CHILD + (
        "on_missing: reject\nremove: [small]\nvariables: {sure: 0.99, colour: blue}\nrules:\n"
        "  - id: new\n    metadata: width\n    reject: {below: 9}\n"
        "  - id: weapons\n    concept: {but_not: [a stick]}\n    review: {above: 0.7}\n"
    )
    policy = load_policy(write(tmp_path, base=BASE, child=text))
    assert [rule.id for rule in policy.rules] == ["weapons", "new"]
    weapons = policy.canonical()["rules"][0]
    assert weapons["concept"]["any_of"] == ["a handgun", "a blue rifle"]
    assert weapons["concept"]["but_not"] == ["a stick"]
    assert (weapons["review"], weapons["reject"]) == ({"above": 0.7}, {"above": 0.99})
    assert weapons["on_missing"] == "reject"
    assert policy.interchange is not None
    assert policy.interchange.openai == {"violence": ("weapons",)}  # the removed rule went with its category


def test_several_bases_and_packs(tmp_path: Path) -> None:
    other = "policy: other\nversion: 1\nrules:\n  - {id: small, metadata: min_side, reject: {below: 300}}\n"
    text = "policy: child\nversion: 1\nextends: [base.yaml, sub/../other.yaml, curate-basic]\n"
    policy = load_policy(write(tmp_path, base=BASE, other=other, child=text))
    assert [rule.id for rule in policy.rules][:2] == ["weapons", "small"]
    assert policy.rules[1].reject is not None
    assert policy.rules[1].reject.value == 300
    assert "few-words" in [rule.id for rule in policy.rules]
    assert parse_policy("policy: c\nversion: 1\nextends: curate-basic\n").rules


def test_a_removed_rule_may_be_defined_anew(tmp_path: Path) -> None:
    text = CHILD + "remove: [weapons]\nrules:\n  - id: weapons\n    alignment: {}\n    reject: {below: 0.1}\n"
    policy = load_policy(write(tmp_path, base=BASE, child=text))
    assert {rule.id: rule.kind for rule in policy.rules} == {"small": "metadata", "weapons": "alignment"}


@pytest.mark.parametrize(
    ("base", "child", "place", "words"),
    [
        (BASE.replace("review: {above: 0.5}", "review: {above: 0.95}"), CHILD, "base.yaml:12:21", "never applies"),
        (BASE, CHILD + "variables: {sure: 0.4}\n", "base.yaml:12:21", "never applies"),
        (BASE.replace("any_of", "anyof"), CHILD, "base.yaml:10:7", "did you mean 'any_of'"),
        (BASE, CHILD + "rules: [{id: weapons, rejct: {above: 0.9}}]\n", "child.yaml:4:23", "did you mean 'reject'"),
        (BASE, CHILD + "rules: [{id: weapons, alignment: {}}]\n", "child.yaml:4:23", "exactly one kind"),
        (BASE, CHILD + "rules: [{id: a, metadata: width, reject: {below: 1}}, {id: a, metadata: width, reject: {below: 1}}]\n",
         "child.yaml:4:60", "two rules"),
        (BASE, "version: 1\nextends: base.yaml\n", "child.yaml:1:1", "needs the key 'policy'"),
        (BASE, CHILD + "interchange: {openai: {x: [smal]}}\n", "child.yaml:4:28", "did you mean 'small'"),
        (BASE, CHILD + "variables: {shure: 0.4}\n", "child.yaml:4:13", "never used"),
    ],
)  # fmt: skip
def test_a_mistake_is_pointed_at_in_the_file_that_has_it(
    tmp_path: Path, base: str, child: str, place: str, words: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        load_policy(write(tmp_path, base=base, child=child))
    assert str(caught.value).startswith(f"{tmp_path}/{place}: "), caught.value
    assert words in str(caught.value)


def calibrations(policy: str, folder: Path, threshold: float = 0.8) -> str:
    """A block of calibrations with the prompts that `policy` has."""
    (folder / "tmp.yaml").write_text(policy)
    prompts = json_sha256(rule_prompts_sha256(load_policy(folder / "tmp.yaml")))
    return (
        f'calibrations:\n  - model: fake\n    weights_sha256: "{WEIGHTS}"\n    prompts_sha256: "{prompts}"\n'
        f"    rules: {{weapons: {{reject: {{above: {threshold}}}}}}}\n"
    )


def threshold(policy: Path) -> tuple[float | None, bool | None]:
    compiled = compile_policy(load_policy(policy), FakeEncoder(weights_sha256=WEIGHTS))
    return compiled.rules[0].reject, compiled.rules[0].calibrated


def test_a_calibration_is_inherited_while_the_prompts_are_the_same(tmp_path: Path) -> None:
    base = BASE + calibrations(BASE, tmp_path)
    sizes = CHILD + "rules: [{id: small, reject: {below: 100}}]\n"
    assert threshold(write(tmp_path, base=base, child=sizes)) == (0.8, True)
    words = CHILD + "variables: {colour: blue}\n"
    assert threshold(write(tmp_path, base=base, child=words)) == (0.9, False)
    bands = CHILD + "rules: [{id: weapons, reject: {above: 0.95}}]\n"
    assert threshold(write(tmp_path, base=base, child=bands)) == (0.95, False)
    grandchild = CHILD.replace("base", "middle")
    assert threshold(write(tmp_path, base=base, middle=sizes, child=grandchild)) == (0.8, True)


def test_a_files_own_calibration_wins(tmp_path: Path) -> None:
    base = BASE + calibrations(BASE, tmp_path)
    own = CHILD + calibrations(BASE, tmp_path, 0.7)
    assert threshold(write(tmp_path, base=base, child=own)) == (0.7, True)
    other = (CHILD + "variables: {colour: blue}\n") + calibrations(BASE, tmp_path, 0.7)
    with pytest.raises(RefusedError, match="other prompts"):
        threshold(write(tmp_path, base=base, child=other))


def test_files_that_a_base_names_lie_beside_the_base(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "words.txt").write_text("casino\n")
    block = "  - {id: words, text: {block_list: words.txt}, reject: {above: 0.5}}\n"
    write(shared, base=BASE.replace("card:", f"{block}card:"))
    child = load_policy(write(tmp_path, child=CHILD.replace("base.yaml", "shared/base.yaml")))
    assert child.canonical()["rules"] == load_policy(shared / "base.yaml").canonical()["rules"]
    assert "words" in [rule.id for rule in child.rules]


def test_dollars_may_be_written() -> None:
    text = "policy: p\nversion: 1\nrules: [{id: a, concept: {any_of: ['%s']}, reject: {above: 0.5}}]\n"
    assert parse_policy(text % "a $5 bill, $${x}").rules[0].concept.any_of == ("a $5 bill, ${x}",)  # type: ignore[union-attr]
