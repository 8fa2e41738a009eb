"""The policy language: what is accepted means what it says; the rest is refused with one sentence and a place."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from clipfilter.errors import RefusedError
from clipfilter.policies import Policy, load_policy, pack_names, parse_policy
from clipfilter.policies.prompts import GENERIC_NEGATIVES, GENERIC_VERSION, TEMPLATES

GOOD = """\
policy: marketplace-safety
version: 3
description: A test.
templates: photo
rules:
  - id: weapons
    concept:
      any_of: ["a handgun", "a rifle"]
      but_not: ["a toy water gun", "a camera"]
    review: {above: 0.50}
    reject: {above: 0.85}
  - id: off-caption
    alignment: {}
    reject: {below: 0.26}
  - id: too-small
    metadata: min_side
    reject: {below: 200}
  - id: best-third
    fraction: {of: off-caption}
    reject: {outside_top: 0.30}
on_missing: review
"""
HASH = "0" * 64
CALIBRATION = f"""\
calibrations:
  - model: nano
    weights_sha256: "{HASH}"
    prompts_sha256: "{HASH}"
    rules: {{weapons: {{reject: {{above: 0.9, n: 400, target: precision>=0.95}}}}}}
"""


def test_the_example_of_the_design() -> None:
    policy = parse_policy(GOOD + CALIBRATION)
    assert (policy.name, policy.version, policy.on_missing) == ("marketplace-safety", 3, "review")
    assert [rule.kind for rule in policy.rules] == ["concept", "alignment", "metadata", "fraction"]
    weapons = policy.rules[0]
    assert weapons.concept is not None
    assert weapons.concept.score == "probability"
    assert weapons.concept.generic == GENERIC_VERSION
    assert weapons.reject is not None
    assert (weapons.reject.direction, weapons.reject.value) == ("above", 0.85)
    assert policy.templates == TEMPLATES["photo"]
    assert policy.calibrations[0].rules["weapons"].reject.n == 400  # type: ignore[union-attr]
    assert [entry.key for entry in policy.dataset_thresholds] == ["best-third.reject"]


def test_the_canonical_form_is_its_own_canonical_form() -> None:
    policy = parse_policy(GOOD + CALIBRATION)
    canonical = policy.canonical()
    text = json.dumps(canonical)
    assert Policy.from_canonical(json.loads(text)).canonical() == canonical
    assert Policy.from_canonical(canonical).sha256 == policy.sha256
    assert parse_policy(text).sha256 == policy.sha256  # JSON is YAML
    assert canonical["rules"][0]["concept"]["generic"] == GENERIC_VERSION
    assert canonical["rules"][0]["templates"] == list(TEMPLATES["photo"])
    assert canonical["rules"][1]["on_missing"] == "review"


def test_the_hash_changes_with_decisions_only() -> None:
    base = parse_policy(GOOD).sha256
    same = [
        GOOD.replace("description: A test.\n", "# a comment\n"),
        GOOD.replace("templates: photo", "templates: " + json.dumps(TEMPLATES["photo"])),
        GOOD.replace("on_missing: review\n", ""),
        GOOD.replace("0.50", "5e-1").replace("below: 200", "below: 200.0"),
        GOOD.replace("\n", "\r\n"),
        "\ufeff" + GOOD,
    ]
    assert {parse_policy(text).sha256 for text in same} == {base}
    other = [
        GOOD.replace("0.50", "0.51"),
        GOOD.replace("a camera", "a cameras"),
        GOOD.replace("templates: photo", "templates: none"),
        GOOD.replace("version: 3", "version: 4"),
        GOOD.replace("on_missing: review", "on_missing: keep"),
        GOOD + CALIBRATION,
    ]
    assert len({parse_policy(text).sha256 for text in other} | {base}) == len(other) + 1


def test_yaml_traps_are_text() -> None:
    policy = parse_policy(GOOD.replace('"a handgun"', "no, on, 2024-01-01, 12:30:00, 0b11"))
    assert policy.rules[0].concept.any_of == ("no", "on", "2024-01-01", "12:30:00", "0b11", "a rifle")  # type: ignore[union-attr]


def test_anchors_may_share_a_list() -> None:
    text = GOOD.replace('["a toy water gun", "a camera"]', '&near ["a toy water gun", "a camera"]').replace(
        "on_missing",
        "  - {id: b, concept: {any_of: [a knife], but_not: *near}, reject: {above: 0.5}}\non_missing",
    )
    assert parse_policy(text).rules[-1].concept.but_not == ("a toy water gun", "a camera")  # type: ignore[union-attr]


def test_generic_negatives_that_a_rule_names_itself_are_left_out() -> None:
    policy = parse_policy(GOOD.replace('"a rifle"', '"An  Animal"'))
    assert set(GENERIC_NEGATIVES[GENERIC_VERSION]) - set(policy.rules[0].concept.generic_phrases) == {"an animal"}  # type: ignore[union-attr]


def rule(text: str) -> str:
    """A policy of one rule, on line 3."""
    return f"policy: p\nversion: 1\nrules: [{text}]\n"


CONCEPT = "id: a, concept: {any_of: [x]}"
# (name, the policy, where it must point, what the sentence must hold); one per line reads best:
# ruff: noqa: E501
REFUSED: list[tuple[str, str | bytes, str, str]] = [
    ("empty", "", "1:1", "empty"),
    ("only a comment", "# nothing\n", "1:1", "empty"),
    ("a list", "- a\n- b\n", "1:1", "is a map"),
    ("a word", "policy", "1:1", "is a map"),
    ("not closed", "policy: [1, 2\n", "2:1", "not valid YAML"),
    ("tab", "policy: p\n\tversion: 1\n", "2:1", "not valid YAML"),
    ("not UTF-8", b"policy: caf\xe9\n", "1:12", "UTF-8"),
    ("UTF-16", GOOD.encode("utf-16"), "1:1", "UTF-8"),
    ("a control character", "policy: p\nversion: \x07\n", "2:10", "control character"),
    ("a null byte", "policy: p\x00\n", "1:10", "control character"),
    ("two documents", GOOD + "---\n" + GOOD, "22:1", "one document"),
    ("a duplicate key", GOOD.replace("on_missing", "version"), "21:1", "twice"),
    ("a duplicate key in a rule", rule("{id: a, id: b}"), "3:17", "twice"),
    ("a python tag", GOOD.replace("version: 3", "version: !!python/object/apply:os.system [ls]"), "2:10", "tag"),
    ("a custom tag", GOOD.replace("photo", "!include /etc/passwd"), "4:12", "tag"),
    ("a standard tag", GOOD.replace("version: 3", "version: !!int 3"), "2:10", "tag"),
    ("a merge key", "base: &b {version: 1}\n<<: *b\n", "2:1", "merge"),
    ("an unknown alias", "policy: *nothing\n", "1:9", "alias"),
    ("an alias of itself", "policy: &a [*a]\n", "1:13", "alias"),
    ("a list as key", "? [a, b]\n: 1\n", "1:3", "key must be plain text"),
    ("too deep", "policy: " + "[" * 100 + "]" * 100, "1:20", "levels deep"),
    ("very deep", "policy: " + "[" * 100_000, "1:20", "levels deep"),
    ("deep blocks", "\n".join(" " * i + "a:" for i in range(300)), "13:13", "levels deep"),
    (
        "laughs",
        "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)),
        "5:11",
        "expand",
    ),
    ("a megabyte of text", GOOD.replace("A test.", "x" * 1_000_000), "3:1", "bytes"),
    ("a megabyte phrase", GOOD.replace("a rifle", "x" * 1_000_000), "8:1", "bytes"),
    ("a long phrase", GOOD.replace("a rifle", "x" * 2_000), "8:29", "characters"),
    ("many phrases", GOOD.replace('"a rifle"', ", ".join(f"p{i}" for i in range(400))), "8:", "more than the 256"),
    ("many rules", rule(", ".join(f"{{id: r{i}, metadata: width, reject: {{below: 1}}}}" for i in range(300))), "3:", "200"),
    ("many nodes", "policy: [" + "1," * 30_000 + "]", "1:", "entries"),
    ("no policy", GOOD.replace("policy: marketplace-safety\n", ""), "1:1", "needs the key 'policy'"),
    ("no version", GOOD.replace("version: 3\n", ""), "1:1", "needs the key 'version'"),
    ("no rules", "policy: p\nversion: 1\n", "1:1", "needs the key 'rules'"),
    ("empty rules", "policy: p\nversion: 1\nrules: []\n", "3:8", "at least one rule"),
    ("rules as a map", "policy: p\nversion: 1\nrules: {a: 1}\n", "3:8", "must be a list"),
    ("rules as text", "policy: p\nversion: 1\nrules: all\n", "3:8", "must be a list"),
    ("rules without value", "policy: p\nversion: 1\nrules:\n", "3:1", "no value"),
    ("a rule as text", rule("weapons"), "3:9", "must be a map"),
    ("an empty rule", rule("{}"), "3:9", "needs the key 'id'"),
    ("an empty list item", "policy: p\nversion: 1\nrules:\n  -\n", "4:4", "no value"),
    ("a version as text", GOOD.replace("version: 3", 'version: "3"'), "2:10", "whole number"),
    ("a negative version", GOOD.replace("version: 3", "version: -3"), "2:10", "whole number"),
    ("a float version", GOOD.replace("version: 3", "version: 3.5"), "2:10", "whole number"),
    ("a boolean version", GOOD.replace("version: 3", "version: true"), "2:10", "whole number"),
    ("a name with spaces", GOOD.replace("marketplace-safety", "my policy!"), "1:9", "is not a name"),
    ("a rule id with a dot", GOOD.replace("id: weapons", "id: a.b"), "6:9", "is not a name"),
    ("a root typo", GOOD.replace("on_missing", "on_mising"), "21:1", "did you mean 'on_missing'"),
    ("a rule typo", GOOD.replace("reject: {above", "rejct: {above"), "11:5", "did you mean 'reject'"),
    ("a kind typo", GOOD.replace("    concept:", "    concpet:"), "7:5", "did you mean 'concept'"),
    ("a concept typo", GOOD.replace("but_not", "butnot"), "9:7", "did you mean 'but_not'"),
    ("a band typo", GOOD.replace("{above: 0.85}", "{abve: 0.85}"), "11:14", "did you mean 'above'"),
    ("a fraction typo", GOOD.replace("{of: off-caption}", "{off: off-caption}"), "19:16", "did you mean 'of'"),
    ("an unknown key", GOOD.replace("on_missing: review", "colour: red"), "21:1", "the keys here are policy, version"),
    ("a key of alignment", GOOD.replace("alignment: {}", "alignment: {model: x}"), "13:17", "unknown key 'model'"),
    ("alignment without value", GOOD.replace("alignment: {}", "alignment:"), "13:5", "alignment: {}"),
    ("alignment with a value", GOOD.replace("alignment: {}", "alignment: caption"), "13:16", "alignment: {}"),
    ("no kind", rule("{id: a, reject: {above: 0.5}}"), "3:9", "has no kind"),
    ("two kinds", rule("{id: a, metadata: width, alignment: {}, reject: {below: 0.2}}"), "3:", "exactly one kind"),
    ("no band", rule(f"{{{CONCEPT}}}"), "3:9", "would decide nothing"),
    ("an empty band", rule(f"{{{CONCEPT}, reject: {{}}}}"), "3:", "no threshold"),
    ("a band as a number", rule(f"{{{CONCEPT}, reject: 0.5}}"), "3:", "must be a map"),
    ("two directions", rule(f"{{{CONCEPT}, reject: {{above: 0.5, below: 0.1}}}}"), "3:", "exactly one direction"),
    (
        "bands of two directions",
        rule("{id: a, alignment: {}, review: {above: 0.5}, reject: {below: 0.1}}"),
        "3:",
        "write two rules",
    ),
    ("a hidden review band", GOOD.replace("above: 0.50", "above: 0.90"), "10:21", "never applies"),
    ("review equal to reject", GOOD.replace("above: 0.50", "above: 0.85"), "10:21", "never applies"),
    (
        "review and reject that float32 cannot tell apart",
        GOOD.replace("above: 0.50", "above: 0.8499999999"),
        "10:21",
        "never applies",
    ),
    (
        "a hidden review band below",
        GOOD.replace("reject: {below: 200}", "reject: {below: 200}\n    review: {below: 100}"),
        "18:21",
        "must be above the reject threshold",
    ),
    ("nan", GOOD.replace("0.85", ".nan"), "11:21", "not a threshold"),
    ("inf", GOOD.replace("below: 200", "below: .inf"), "17:21", "not a threshold"),
    ("overflow", GOOD.replace("below: 200", "below: 1e999"), "17:21", "not a threshold"),
    ("too large for a score", GOOD.replace("below: 200", "below: 1e39"), "17:21", "too large"),
    ("a threshold as text", GOOD.replace("0.85", '"0.85"'), "11:21", "is not a number"),
    ("a threshold as a word", GOOD.replace("0.85", "high"), "11:21", "is not a number"),
    ("a threshold as true", GOOD.replace("0.85", "true"), "11:21", "is not a number"),
    ("a threshold as a list", GOOD.replace("0.85", "[0.85]"), "11:21", "is not a number"),
    ("a percentage", GOOD.replace("above: 0.85", "above: 85"), "11:21", "did you mean 0.85"),
    ("a probability of 1", GOOD.replace("0.85", "1.0"), "11:21", "between 0 and 1"),
    ("a cosine of 26", GOOD.replace("0.26", "26"), "14:21", "cosine"),
    ("a fraction of 30", GOOD.replace("0.30", "30"), "20:27", "did you mean 0.3"),
    ("a fraction of 0", GOOD.replace("0.30", "0"), "20:27", "above 0"),
    ("a fraction rule with above", GOOD.replace("outside_top: 0.30", "above: 0.3"), "20:14", "outside_top"),
    ("outside_top of a concept", GOOD.replace("above: 0.85", "outside_top: 0.3"), "11:14", "fraction rules"),
    ("a fraction without band", GOOD.replace("    reject: {outside_top: 0.30}\n", ""), "19:5", "needs a band"),
    ("a fraction of nothing", GOOD.replace("of: off-caption", "of: off-capton"), "19:20", "did you mean 'off-caption'"),
    ("a fraction of itself", GOOD.replace("of: off-caption", "of: best-third"), "19:20", "ranks itself"),
    (
        "a fraction of a later rule",
        rule("{id: f, fraction: {of: a}, reject: {outside_top: 0.3}}, {id: a, alignment: {}}"),
        "3:",
        "comes later",
    ),
    (
        "a fraction of a fraction",
        rule(
            "{id: a, alignment: {}}, {id: f, fraction: {of: a}, reject: {outside_top: 0.3}}, "
            "{id: g, fraction: {of: f}, reject: {outside_top: 0.3}}"
        ),
        "3:",
        "itself a fraction",
    ),
    ("two rules of one id", GOOD.replace("id: too-small", "id: weapons"), "15:9", "two rules"),
    ("no phrases", rule("{id: a, concept: {any_of: []}, reject: {above: 0.5}}"), "3:", "empty"),
    ("no any_of", rule("{id: a, concept: {but_not: [x]}, reject: {above: 0.5}}"), "3:", "needs the key 'any_of'"),
    ("a phrase without a list", rule("{id: a, concept: {any_of: a gun}, reject: {above: 0.5}}"), "3:", 'write ["a gun"]'),
    ("a number as phrase", rule("{id: a, concept: {any_of: [42]}, reject: {above: 0.5}}"), "3:", "put it in quotes"),
    ("a blank phrase", rule('{id: a, concept: {any_of: ["  "]}, reject: {above: 0.5}}'), "3:", "a phrase is empty"),
    ("a phrase twice", rule("{id: a, concept: {any_of: [Gun, gun]}, reject: {above: 0.5}}"), "3:", "twice"),
    ("a contradiction", GOOD.replace("a camera", "a rifle"), "9:36", "in any_of and in but_not"),
    (
        "nothing to contrast",
        rule("{id: a, concept: {any_of: [x], generic: false}, reject: {above: 0.5}}"),
        "3:",
        "something to compare with",
    ),
    ("generic as yes", rule("{id: a, concept: {any_of: [x], generic: yes}, reject: {above: 0.5}}"), "3:", "true, false"),
    ("a generic list of the future", GOOD.replace("but_not:", "generic: 99\n      but_not:"), "9:16", "version of a list"),
    ("a score typo", GOOD.replace("but_not:", "score: cosin\n      but_not:"), "9:14", "did you mean 'cosine'"),
    ("an ensemble typo", GOOD.replace("templates: photo", "templates: imagenet-lik"), "4:12", "did you mean 'imagenet-like'"),
    ("a template without braces", GOOD.replace("photo", "[a photo]"), "4:13", "exactly once"),
    ("a template with a format", GOOD.replace("photo", '["{0.__class__}"]'), "4:13", "exactly once"),
    ("a template with two braces", GOOD.replace("photo", '["{} {}"]'), "4:13", "exactly once"),
    ("templates of a metadata rule", GOOD.replace("metadata: min_side", "metadata: min_side\n    templates: none"), "17:5", "concept rules"),
    ("metadata as a number", GOOD.replace("metadata: min_side", "metadata: 5"), "16:15", "must be text"),
    ("on_missing typo", GOOD.replace("on_missing: review", "on_missing: drop"), "21:13", "review, reject, keep"),
    ("on_missing of a rule", GOOD.replace("alignment: {}", "alignment: {}\n    on_missing: 3"), "14:17", "review, reject, keep"),
    ("a calibration of nothing", GOOD + CALIBRATION.replace("{weapons", "{weapon"), "26:", "did you mean 'weapons'"),
    ("a calibration without hash", GOOD + CALIBRATION.replace(f'"{HASH}"', '"abc"', 1), "24:21", "sha256"),
    ("a calibration the other way", GOOD + CALIBRATION.replace("above", "below"), "26:", "points above"),
    ("a calibration below review", GOOD + CALIBRATION.replace("0.9,", "0.4,"), "26:", "never applies"),
    ("a calibrated size", GOOD + CALIBRATION.replace("{weapons", "{too-small"), "26:", "depends on no model"),
    ("two entries for one model", GOOD + CALIBRATION + CALIBRATION.removeprefix("calibrations:\n"), "28:21", "one entry per model"),
    ("a calibration typo", GOOD + CALIBRATION.replace("weights_sha256", "weight_sha256"), "24:5", "did you mean 'weights_sha256'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "place", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_with_one_sentence_and_a_place(text: str | bytes, place: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    began = time.perf_counter()
    with pytest.raises(RefusedError) as caught:
        load_policy(path)
    assert time.perf_counter() - began < 60  # expanding everything would take hours
    sentence = str(caught.value)
    match = re.fullmatch(re.escape(str(path)) + r":(\d+:\d+): (.+)", sentence)
    assert match, sentence
    assert match[1].startswith(place) if place.endswith(":") else match[1] == place, sentence
    assert words in match[2]
    assert len(match[2]) < 400
    assert "pydantic" not in sentence


def test_every_single_character_damage_is_refused_or_loads() -> None:
    """No damaged file may end in anything but a policy or a refusal."""
    for position in range(0, len(GOOD), 5):
        for damage in ("", ":", "[", "\n", "&a", "!x ", "\t"):
            text = GOOD[:position] + damage + GOOD[position + 1 :]
            sentence = ""
            try:
                parse_policy(text)
            except RefusedError as error:
                sentence = str(error)
            assert not sentence or re.match(r"policy:\d+:\d+: .", sentence)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="there is no policy file"):
        load_policy(tmp_path / "none.yaml")
    with pytest.raises(RefusedError, match="there is no policy pack 'no-such-pack'"):
        load_policy("no-such-pack")
    with pytest.raises(RefusedError, match="cannot be read"):
        load_policy(tmp_path)
    with pytest.raises(RefusedError):
        load_policy("a\0b.yaml")


def test_packs_are_found_by_name_and_suggested() -> None:
    assert {"caption-match", "curate-basic", "marketplace-safety", "demo"} <= set(pack_names())
    for name in pack_names():
        assert load_policy(name).name == name
    with pytest.raises(RefusedError, match="did you mean 'caption-match'"):
        load_policy("caption-mach")


def test_loading_runs_no_heavy_import() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from clipfilter.policies.language.load import parse_policy; parse_policy(sys.argv[1]); "
        "assert not {'torch', 'ray', 'open_clip'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, GOOD], check=True, timeout=60)


def test_every_example_of_the_reference_loads() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reference" / "policy.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        whole = block if block.startswith("policy:") else "policy: p\nversion: 1\nrules:\n" + block
        assert parse_policy(whole).rules
    sentence = re.search(r"^clipfilter: typo.yaml:9:7: (.*?)\n```", text, re.MULTILINE)
    assert sentence
    with pytest.raises(RefusedError, match=re.escape(sentence[1])):
        parse_policy(GOOD.replace("but_not", "butnot"))


def test_the_reference_names_every_key_and_every_ensemble() -> None:
    from clipfilter.policies.kinds.concept import Concept
    from clipfilter.policies.language.rule import Rule
    from clipfilter.policies.parts.bands import Band, Calibration
    from clipfilter.policies.parts.columns import BUILTINS

    text = (Path(__file__).parents[2] / "docs" / "reference" / "policy.md").read_text()
    keys = {name for model in (Policy, Rule, Concept, Band, Calibration) for name in model.model_fields}
    assert [name for name in (*keys, *TEMPLATES, *BUILTINS) if name not in text] == []
    for name, templates in TEMPLATES.items():
        assert name == "none" or f"`{name}` ({len(templates)}" in text
