"""Concepts beyond phrases, safety checkers, modifiers, conditions, sums, pixel qualities: each against its definition."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from clipfilter.errors import RefusedError
from clipfilter.images.facts import image_facts
from clipfilter.policies import CompiledPolicy, Policy, compile_policy, load_policy, parse_policy, texts
from clipfilter.policies.kinds.pixels import PIXELS
from clipfilter.policies.language.schema import rule_prompts_sha256
from clipfilter.policies.parts.conditions import truth
from tests.support.engine import PHOTOS
from tests.support.policies import FakeEncoder, embeddings

DIM = 64


def policy(*rules: dict[str, Any], **more: Any) -> str:
    return json.dumps({"policy": "p", "version": 1, "templates": "none", "rules": list(rules), **more})


def compiled(*rules: dict[str, Any], encoder: FakeEncoder | None = None, **more: Any) -> CompiledPolicy:
    return compile_policy(parse_policy(policy(*rules, **more)), encoder or FakeEncoder())


def near(of: CompiledPolicy, rows: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = embeddings(rows, DIM, seed).astype(np.float64)
    for _ in range(2):
        values += 0.6 * of.matrix.T[rng.integers(0, of.matrix.shape[1], rows)] * rng.random((rows, 1))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


def table(rows: int, **columns: Any) -> pa.Table:
    return pa.table({"cf_row": np.arange(rows), **columns})


def cosines(images: np.ndarray, phrases: list[str]) -> np.ndarray:
    return images.astype(np.float64) @ np.stack([FakeEncoder().vector(phrase) for phrase in phrases]).T


def probability(positive: np.ndarray, negative: np.ndarray, weights: Any = 1.0, scale: float = 20.0) -> np.ndarray:
    weights = np.broadcast_to(weights, positive.shape[1])
    a = (np.exp(scale * positive) * weights).sum(axis=1) / weights.sum()
    b = np.exp(scale * negative).mean(axis=1)
    return np.asarray(a / (a + b))


CAT = {"id": "cat", "concept": {"any_of": ["a cat"], "but_not": ["a dog"], "generic": False}, "reject": {"above": 0.9}}


# ------------------------------------------------------------------ concepts


def test_weights_multiply_the_odds() -> None:
    concept = {"any_of": ["a cat", {"text": "a  lynx", "weight": 5}], "but_not": ["a dog", "a fox"], "generic": False}
    found = compiled({"id": "c", "concept": concept, "reject": {"above": 0.7}})
    assert found.policy.canonical()["rules"][0]["concept"]["weights"] == {"a lynx": 5.0}
    images = near(found, 400)
    values = found.score(images, None, None, table(400)).values["c"]
    positive, negative = cosines(images, ["a cat", "a lynx"]), cosines(images, ["a dog", "a fox"])
    np.testing.assert_allclose(values, probability(positive, negative, [1, 5]), atol=2e-5)
    assert np.abs(values - probability(positive, negative)).max() > 0.1
    sigmoid = FakeEncoder(score_kind="sigmoid", logit_scale=20.0, logit_bias=-3.0)
    values = (
        compiled({"id": "c", "concept": concept, "reject": {"above": 0.7}}, encoder=sigmoid)
        .score(images, None, None, table(400))
        .values["c"]
    )

    def odds(cosine: np.ndarray, weight: float) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-(20 * cosine - 3)) / weight))

    best = np.maximum(odds(positive[:, 0], 1), odds(positive[:, 1], 5))
    np.testing.assert_allclose(values, best - np.maximum(*odds(negative, 1).T), atol=2e-5)


def test_a_background_stands_against_what_is_like_no_phrase() -> None:
    concept = {"any_of": ["a cat", {"text": "a lynx", "weight": 5}], "all_of": ["a hat"], "but_not": ["a dog", "a fox"]}
    concept |= {"generic": False, "background": 0.2}
    found = compiled(CAT, {"id": "c", "concept": concept, "reject": {"above": 0.3}})
    images = near(found, 400)
    values = found.score(images, None, None, table(400)).values
    against = np.exp(20 * cosines(images, ["a dog", "a fox"])).mean(axis=1) + np.exp(20 * 0.2)
    likely = [
        np.exp(20 * cosines(images, ["a cat", "a lynx"])) @ [1 / 6, 5 / 6],
        np.exp(20 * cosines(images, ["a hat"]))[:, 0],
    ]
    np.testing.assert_allclose(values["c"], np.min([a / (a + against) for a in likely], axis=0), atol=2e-5)
    alone = compiled(CAT).score(images, None, None, table(400)).values["cat"]
    np.testing.assert_allclose(values["cat"], alone, atol=2e-6)
    far = -found.matrix.T[:1].astype(
        np.float16
    )  # unlike every phrase: without a background anything could be the score
    assert found.score(far, None, None, table(1)).values["c"][0] < 0.02


def test_a_background_is_part_of_the_prompts_hash_and_means_nothing_to_sigmoid_models() -> None:
    told = {
        "id": "c",
        "concept": {"any_of": ["a cat"], "but_not": ["a dog"], "background": 0.2},
        "reject": {"above": 0.5},
    }
    plain = {**told, "concept": {"any_of": ["a cat"], "but_not": ["a dog"]}}
    hashes = [rule_prompts_sha256(parse_policy(policy(rule)))["c"] for rule in (told, plain)]
    assert hashes[0] != hashes[1]
    sigmoid = FakeEncoder(score_kind="sigmoid", logit_scale=20.0, logit_bias=-3.0)
    images = near(compiled(plain), 50)
    values = [
        compiled(rule, encoder=sigmoid).score(images, None, None, table(50)).values["c"] for rule in (told, plain)
    ]
    np.testing.assert_array_equal(*values)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"background": 1.5}, "background is 1.5, but must be a cosine, between -1 and 1"),
        ({"background": "low"}, "is not a number"),
        ({"background": 0.2, "score": "margin"}, "background belongs to probabilities; score: margin has none"),
        ({"backgrund": 0.2}, "did you mean 'background'"),
    ],
)
def test_a_background_that_cannot_be_is_refused(changes: dict[str, Any], complaint: str) -> None:
    concept = {"any_of": ["a cat"], "but_not": ["a dog"], **changes}
    with pytest.raises(RefusedError, match=complaint):
        parse_policy(policy({"id": "c", "concept": concept, "reject": {"above": 0.1}}))


@pytest.mark.parametrize("score", ["probability", "margin", "cosine"])
def test_all_of_is_as_likely_as_its_least_likely_part(score: str) -> None:
    concept = {"any_of": ["a cat", "a lynx"], "all_of": ["a hat", "a table"], "but_not": ["a dog"], "generic": False}
    found = compiled(
        CAT, {"id": "c", "concept": {**concept, "score": score}, "reject": {"above": 0.05}}, CAT | {"id": "z"}
    )
    images = near(found, 400)
    scores = found.score(images, None, None, table(400))
    negative = cosines(images, ["a dog"])
    parts = [cosines(images, phrases) for phrases in (["a cat", "a lynx"], ["a hat"], ["a table"])]
    if score == "probability":
        exact = np.min([probability(part, negative) for part in parts], axis=0)
    else:
        exact = np.min([part.max(axis=1) - (negative[:, 0] if score == "margin" else 0) for part in parts], axis=0)
    np.testing.assert_allclose(scores.values["c"], exact, atol=2e-5)
    np.testing.assert_array_equal(scores.values["z"], scores.values["cat"])
    fired = [row for row in found.decide(scores).reasons.to_pylist() if any(r["rule"] == "c" for r in row)]
    assert fired
    assert {r["nearest"] for row in fired for r in row if r["rule"] == "c"} <= {"a cat", "a lynx", "a hat", "a table"}


def test_learned_vectors_stand_beside_phrases(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "positives": rng.standard_normal((3, DIM)).astype(np.float32),
        "negatives": rng.standard_normal((2, DIM)),
    }
    save_file(tensors, tmp_path / "v.safetensors", {"model": "fake", "weights_sha256": "a" * 64})
    rule = {
        "id": "c",
        "concept": {"vectors": "v.safetensors", "any_of": ["a cat"], "generic": False},
        "reject": {"above": 0.6},
    }
    (tmp_path / "p.yaml").write_text(policy(rule))
    loaded = load_policy(tmp_path / "p.yaml")
    assert Policy.from_canonical(json.loads(json.dumps(loaded.canonical()))).canonical() == loaded.canonical()
    found = compile_policy(loaded, FakeEncoder())
    images = near(found, 300)
    unit = {name: rows / np.linalg.norm(rows, axis=1, keepdims=True) for name, rows in tensors.items()}
    x = images.astype(np.float64)
    positive = np.concatenate([cosines(images, ["a cat"]), x @ unit["positives"].T], axis=1)
    scores = found.score(images, None, None, table(300))
    np.testing.assert_allclose(scores.values["c"], probability(positive, x @ unit["negatives"].T), atol=2e-5)
    named = {r["nearest"] for row in found.decide(scores).reasons.to_pylist() for r in row}
    assert named & {f"learned vector {n}" for n in (1, 2, 3)}
    with pytest.raises(RefusedError, match=r"rule 'c': the vectors .* have 64 numbers, but embeddings of fake have 32"):
        compile_policy(loaded, FakeEncoder(dim=32))
    with pytest.raises(RefusedError, match="are for the weights aaaaaaaaaaaa"):
        compile_policy(loaded, FakeEncoder(weights_sha256="b" * 64))
    save_file({"positives": np.zeros((1, DIM), np.float32)}, tmp_path / "v.safetensors")
    with pytest.raises(RefusedError, match="not zero"):
        compile_policy(load_policy(tmp_path / "p.yaml"), FakeEncoder())
    (tmp_path / "v.safetensors").write_bytes(b"\x80\x04pickle" * 10)
    with pytest.raises(RefusedError, match="cannot be read"):
        compile_policy(load_policy(tmp_path / "p.yaml"), FakeEncoder())


def calibrated(score: str, a: float = 6.0) -> str:
    entry = {
        "model": "fake",
        "weights_sha256": "a" * 64,
        "prompts_sha256": compiled(CAT).prompts_sha256,
        "rules": {
            "cat": {
                "reject": {"above": 0.8},
                "probability": {
                    "n": 100,
                    "platt": {"a": a, "b": -4.0, "brier": 0.1, "ece": 0.02},
                    "isotonic": {"scores": [0.0], "probabilities": [0.5], "brier": 0.1, "ece": 0.02},
                },
            }
        },
    }
    rule = {**CAT, "concept": {**CAT["concept"], "score": score}, "review": {"above": 0.5}}  # type: ignore[dict-item]
    return policy(rule, calibrations=[entry])


def test_a_calibrated_score_is_platts_probability_and_decides_alike() -> None:
    raw = compile_policy(parse_policy(calibrated("probability")), FakeEncoder())
    bent = compile_policy(parse_policy(calibrated("calibrated")), FakeEncoder())
    assert bent.prompts_sha256 == raw.prompts_sha256
    images = near(raw, 500)
    first, second = (p.score(images, None, None, table(500)) for p in (raw, bent))
    exact = 1 / (1 + np.exp(-(6.0 * first.values["cat"].astype(np.float64) - 4.0)))
    np.testing.assert_allclose(second.values["cat"], exact, atol=2e-6)
    rejected = [p.decide(s).codes == 2 for p, s in ((raw, first), (bent, second))]
    np.testing.assert_array_equal(*rejected)  # the calibrated threshold is carried over
    assert 0 < rejected[0].sum() < 500
    with pytest.raises(RefusedError, match="not calibrated for fake: write score: probability"):
        compile_policy(
            parse_policy(calibrated("calibrated").replace("a" * 64, "b" * 64).replace('"fake"', '"x"')), FakeEncoder()
        )
    with pytest.raises(RefusedError, match="falls while its score rises"):
        compile_policy(parse_policy(calibrated("calibrated", a=-6.0)), FakeEncoder())


# ------------------------------------------------------------------ safety checkers


def safety_scores(images: np.ndarray, adjustment: float, strictness: float) -> np.ndarray:
    """REFERENCE formula: a = adjustment if any(cos(x, s_k) - t_k + adj > 0) else 0; max_j(cos(x, c_j) - t_j) + a."""
    care = (cosines(images, ["a child", "a pet"]) - [0.10, 0.2] + strictness > 0).any(axis=1)
    assert 0 < care.sum() < len(images)
    return np.asarray(
        (cosines(images, ["gore", "a knife"]) - [0.2, 0.05]).max(axis=1) + np.where(care, adjustment, 0.0)
    )


@pytest.mark.parametrize(("adjustment", "strictness"), [(0.01, 0.0), (0.1, 0.03)])
def test_a_safety_checker_in_words_is_the_published_formula(adjustment: float, strictness: float) -> None:
    safety = {
        "concepts": [{"text": "gore", "threshold": 0.2}, {"text": "a knife", "threshold": 0.05}],
        "special_care": [{"text": "a child", "threshold": 0.10}, {"text": "a pet", "threshold": 0.2}],
        "adjustment": adjustment,
        "strictness": strictness,
    }
    found = compiled(CAT, {"id": "s", "safety": safety, "reject": {"above": 0}})
    images = near(found, 1500)
    scores = found.score(images, None, None, table(1500))
    exact = safety_scores(images, adjustment, strictness)
    np.testing.assert_allclose(scores.values["s"], exact, atol=1e-6)
    decided = found.decide(scores)
    flagged = np.array([any(r["rule"] == "s" for r in row) for row in decided.reasons.to_pylist()])
    np.testing.assert_array_equal(flagged, exact > 0)
    named = {r["nearest"] for row in decided.reasons.to_pylist() for r in row if r["rule"] == "s"}
    assert named == {"gore", "a knife"}
    part = found.score(images[:700], None, None, table(700))
    np.testing.assert_array_equal(part.values["s"], scores.values["s"][:700])


def test_a_published_safety_checker_scores_as_its_head(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = {
        "concept_embeds": rng.standard_normal((17, 768)).astype(np.float32),
        "concept_embeds_weights": rng.uniform(0.0, 0.05, 17).astype(np.float32),
        "special_care_embeds": rng.standard_normal((3, 768)).astype(np.float32),
        "special_care_embeds_weights": rng.uniform(0.0, 0.05, 3).astype(np.float32),
    }
    save_file(tensors, tmp_path / "checker.safetensors")
    (tmp_path / "p.yaml").write_text(
        policy(
            {"id": "s", "safety": {"file": "checker.safetensors"}, "reject": {"above": 0.03}},
            {"id": "h", "head": f"file:{tmp_path}/checker.safetensors", "reject": {"above": 0.03}},
        )
    )
    encoder = FakeEncoder(dim=768)
    encoder.fingerprint["model"] = "ViT-L-14/openai"
    found = compile_policy(load_policy(tmp_path / "p.yaml"), encoder)
    scores = found.score(embeddings(900, 768), None, None, table(900))
    # The head divides by the norm of the stored float16 embedding, which is 1 but for its rounding.
    np.testing.assert_allclose(scores.values["s"], scores.values["h"], atol=1e-5)
    by = [{r["rule"] for r in row} for row in found.decide(scores).reasons.to_pylist()]
    close = np.abs(scores.values["s"] - 0.03) < 1e-5
    assert all(rules in (set(), {"s", "h"}) for rules, near in zip(by, close, strict=True) if not near)
    assert 50 < sum(map(bool, by)) < 850
    with pytest.raises(RefusedError, match=r"is for embeddings of ViT-L-14/openai, not of fake"):
        compile_policy(load_policy(tmp_path / "p.yaml"), FakeEncoder(dim=768))


# ------------------------------------------------------------------ modifiers, severities, actions


def test_a_modifier_tightens_the_thresholds_of_others() -> None:
    night = {
        "id": "night",
        "metadata": "dark",
        "tighten": {"above": 5, "by": 30, "rules": ["a", "b"]},
        "on_missing": "keep",
    }
    fog = {"id": "fog", "metadata": "fog", "tighten": {"above": 0, "by": 50, "rules": ["a"]}, "review": {"above": 9}}
    a = {"id": "a", "metadata": "x", "review": {"above": 50}, "reject": {"above": 100}, "severity": 4, "action": "call"}
    b = {"id": "b", "metadata": "x", "reject": {"below": 10}, "severity": 6}
    found = compiled(a, b, night, fog)
    #        plain  night  night+fog  edge   unknown fog    below
    x = pa.array([80.0, 80.0, 60.0, 70.0, 60.0, 39.0])
    dark = pa.array([0, 9, 9, 9, 0, 9])
    fog_column = pa.array([0, 0, 1, 0, None, 0])
    scores = found.score(embeddings(6), None, None, table(6, x=x, dark=dark, fog=fog_column))
    decided = found.decide(scores)
    reasons = [[(r["rule"], r["band"], r["threshold"]) for r in row] for row in decided.reasons.to_pylist()]
    assert reasons == [
        [("a", "review", 50)],
        [("a", "reject", 70), ("night", "tighten", 5)],
        [("a", "reject", 50), ("fog", "tighten", 0)],  # the larger amount counts
        [("a", "review", 20), ],  # 70 is not above 70, and would be reviewed untightened too
        [("a", "review", 50), ("fog", "missing", None)],
        [("b", "reject", 40), ("a", "review", 20), ("night", "tighten", 5)],
    ]  # fmt: skip
    assert decided.severity is not None
    assert decided.severity.tolist() == [4, 4, 4, 4, 4, 6]
    assert decided.action is not None
    assert decided.action.to_pylist() == ["call"] * 6
    written = found.annotation(scores, decided)
    assert written.schema.field("cf_severity").type == pa.int32()
    assert found.annotation(scores, None).schema == written.schema


def test_scores_near_a_moved_threshold_are_settled_in_float64() -> None:
    probe = compiled(CAT)
    images = near(probe, 300)
    exact = probability(cosines(images, ["a cat"]), cosines(images, ["a dog"]))
    # What is compared is the compiled float32 vector, so take the plan's own float64 score.
    from clipfilter.policies.kinds.concept_plan import concept_scores

    plan, _ = probe.scorer.plans[0]
    exact = concept_scores(plan, plan.weights.astype(np.float64) @ images.astype(np.float64).T)[0]
    row = int(np.argmin(np.abs(exact - 0.6)))
    for shift in (-3e-9, 3e-9):
        threshold = float(exact[row] + 0.1 + shift)
        rule = {**CAT, "reject": {"above": threshold}}
        on = {"id": "on", "metadata": "x", "tighten": {"above": 0, "by": 0.1, "rules": ["cat"]}}
        found = compiled(rule, on)
        decided = found.decide(found.score(images, None, None, table(300, x=np.ones(300))))
        assert (decided.codes[row] == 2) == (exact[row] > threshold - 0.1)


# ------------------------------------------------------------------ conditions and sums

VALUES: Any = st.one_of(st.none(), st.sampled_from(["a", "b", "c"]))
LEAVES: Any = st.one_of(
    st.builds(lambda v: {"column": "s", "is": v}, st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=2)),
    st.builds(lambda v: {"column": "n", "above": v}, st.integers(-2, 2)),
    st.builds(lambda v: {"column": "n", "below": v}, st.integers(-2, 2)),
    st.builds(lambda c, p: {"column": c, "present": p}, st.sampled_from(["s", "n"]), st.booleans()),
)
CONDITIONS: Any = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.builds(lambda c: {"not": c}, inner),
        st.builds(lambda k, c: {k: c}, st.sampled_from(["all", "any"]), st.lists(inner, min_size=1, max_size=3)),
    ),
    max_leaves=5,
)


def kleene(condition: dict[str, Any], row: dict[str, Any]) -> bool | None:
    if "not" in condition:
        inner = kleene(condition["not"], row)
        return None if inner is None else not inner
    for key, deciding in (("all", False), ("any", True)):
        if key in condition:
            parts = [kleene(part, row) for part in condition[key]]
            return deciding if deciding in parts else None if None in parts else not deciding
    value = row[condition["column"]]
    if "present" in condition:
        return (value is not None) == condition["present"]
    if value is None:
        return None
    if "is" in condition:
        return value in condition["is"]
    return value > condition["above"] if "above" in condition else value < condition["below"]


@given(CONDITIONS, st.lists(st.tuples(VALUES, st.one_of(st.none(), st.integers(-3, 3))), min_size=1, max_size=12))
@settings(max_examples=150, deadline=None)
def test_conditions_are_kleenes_logic(condition: dict[str, Any], values: list[tuple[Any, Any]]) -> None:
    rule = {"id": "r", "metadata": "n", "when": condition, "reject": {"above": 100}}
    try:
        parsed = parse_policy(policy(rule))
    except RefusedError:  # nested too deep
        return
    assert Policy.from_canonical(json.loads(json.dumps(parsed.canonical()))).canonical() == parsed.canonical()
    names = [{"s": s, "n": n} for s, n in values]
    data = pa.table(
        {"s": pa.array([s for s, _ in values], pa.string()), "n": pa.array([n for _, n in values], pa.int32())}
    )
    assert parsed.rules[0].when is not None
    expected = [{True: 1, False: 0, None: -1}[kleene(condition, row)] for row in names]
    assert truth(parsed.rules[0].when, data).tolist() == expected


def test_a_rule_judges_only_the_rows_of_its_condition() -> None:
    small = {"id": "small", "metadata": "width", "when": {"column": "source", "is": ["web"]}, "reject": {"below": 200}}
    ranked = {"id": "third", "fraction": {"of": "small"}, "reject": {"outside_top": 0.5}}
    found = compiled(small, ranked)
    data = table(4, source=["web", "scan", None, "web"], cf_width=[100, 100, 100, 900], cf_height=[900] * 4)
    found.check_columns(data.schema)
    scores = found.score(embeddings(4), None, None, data)
    np.testing.assert_array_equal(scores.values["third"], np.float32([100, np.nan, np.nan, 900]))
    decided = found.decide(scores, {"third.reject": 500.0})
    assert [[(r["rule"], r["band"]) for r in row] for row in decided.reasons.to_pylist()] == [
        [("small", "reject"), ("third", "reject")],
        [],  # does not apply, so nothing is missing
        [("small", "missing"), ("third", "missing")],  # nobody knows whether it applies
        [],
    ]


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ({"colum": "x", "is": "a"}, "did you mean 'column'"),
        ({"column": "x"}, "is compared with"),
        ({"column": "x", "is": ["a", 1]}, "all be texts"),
        ({"column": "x", "above": "3"}, "not a number"),
        ({"column": "x", "above": 3, "below": 2}, "nothing is above"),
        ({"all": []}, "list of conditions"),
        ({"any": [{"column": "x", "is": "a"}], "column": "y"}, "exactly one of"),
        ({"not": [1]}, "a condition is a map"),
        ("source == 'x'", "a condition is a map"),
    ],
)
def test_conditions_that_make_no_sense(when: Any, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        parse_policy(policy({"id": "r", "metadata": "n", "when": when, "reject": {"above": 1}}))


def test_conditions_meet_their_columns_before_work_begins() -> None:
    found = compiled({"id": "r", "metadata": "width", "when": {"column": "sorce", "is": "x"}, "reject": {"above": 1}})
    with pytest.raises(RefusedError, match=r"rule 'r': the condition needs the column 'sorce'.*did you mean 'source'"):
        found.check_columns(pa.schema([("source", pa.string())]))
    with pytest.raises(RefusedError, match="compares 'sorce' with a text, but the column holds int64"):
        found.check_columns(pa.schema([("sorce", pa.int64())]))


def test_a_weighted_sum_of_scores() -> None:
    first = {"id": "a", "metadata": "x"}
    second = {"id": "b", "metadata": "y", "when": {"column": "x", "below": 10}}
    total = {"id": "sum", "combine": {"weighted": {"a": 2, "b": -0.5}}, "reject": {"above": 6}}
    found = compiled(first, second, total)
    scores = found.score(embeddings(4), None, None, table(4, x=[4.0, 12.0, 2.0, None], y=[2.0, 100.0, None, 1.0]))
    np.testing.assert_array_equal(scores.values["sum"], np.float32([7, 24, np.nan, np.nan]))
    assert found.decide(scores).decision.to_pylist() == ["reject", "reject", "review", "review"]
    with pytest.raises(RefusedError, match="there is no rule \"c\" before 'sum'"):
        parse_policy(policy(first, {**total, "combine": {"weighted": {"c": 1}}}))
    with pytest.raises(RefusedError, match="does not come before"):
        parse_policy(policy(total, first, second))


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        ({"concept": {"any_of": ["x"], "weights": {"y": 2}}, "reject": {"above": 0.5}}, 'no phrase "y"'),
        ({"concept": {"any_of": [{"text": "x", "wieght": 2}]}, "reject": {"above": 0.5}}, "unknown key 'wieght'"),
        ({"concept": {"any_of": [{"text": "x", "weight": 0}]}, "reject": {"above": 0.5}}, "above 0"),
        (
            {"concept": {"any_of": [{"text": "x", "weight": 2}], "score": "margin"}, "reject": {"above": 0.5}},
            "weights belong",
        ),
        ({"concept": {"any_of": ["x"], "all_of": ["X "]}, "reject": {"above": 0.5}}, "any_of and in all_of"),
        ({"concept": {}, "reject": {"above": 0.5}}, "needs the key 'any_of'"),
        ({"concept": {"vectors": "nowhere.safetensors"}, "reject": {"above": 0.5}}, "does not exist"),
        ({"safety": {"special_care": []}, "reject": {"above": 0}}, "either concepts in words or a file"),
        ({"safety": {"concepts": [{"text": "x", "threshold": 2}]}, "reject": {"above": 0}}, "between -1 and 1"),
        ({"safety": {"concepts": [{"text": "x"}]}, "reject": {"above": 0}}, "needs the key 'threshold'"),
        ({"pixels": "drak"}, "did you mean 'dark'"),
        ({"pixels": "dark", "reject": {"above": 3}}, "lies below its threshold"),
        ({"metadata": "x", "tighten": {"above": 1, "by": 1, "rules": ["r"]}}, "cannot tighten itself"),
        ({"metadata": "x", "tighten": {"above": 1, "by": 0, "rules": ["q"]}}, "above 0"),
        (
            {"metadata": "x", "reject": {"below": 1}, "tighten": {"above": 1, "by": 1, "rules": ["q"]}},
            "a rule has one direction",
        ),
        ({"metadata": "x", "tighten": {"above": 1, "by": 1, "rules": ["q"]}}, "there is no rule"),
        ({"metadata": "x", "reject": {"above": 1}, "severity": "high"}, "whole number from 0 to 100"),
        ({"metadata": "x", "reject": {"above": 1}, "action": "reject"}, "the bands decide"),
        ({"combine": {"weighted": {}}, "reject": {"above": 1}}, "weighted is a map"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(rule: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError, match=words) as caught:
        parse_policy(policy({"id": "r", **rule}))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------ pixel qualities


def test_pixel_qualities_on_pictures() -> None:
    """Each quality finds its picture among the samples at its default threshold, and no ordinary photograph."""
    from clipfilter.images.decode import decode

    rules = [{"id": name, "pixels": name} for name in PIXELS]
    found = compiled(*rules)
    names = ["dark.jpg", "blurred.jpg", "camera.jpg", "invoice.png", "kitten.jpg", "coffee.jpg", "great_wall.jpg"]
    pictures = {name: decode((PHOTOS / name).read_bytes()).rgb for name in names}
    pictures["wide"] = pictures["kitten.jpg"][:60]
    facts = {name: image_facts(rgb) for name, rgb in pictures.items()}
    columns = {
        f"cf_{fact}": [getattr(of, fact) for of in facts.values()]
        for fact in ("brightness", "contrast", "blur", "entropy", "colourfulness")
    }
    sizes = {"cf_width": [p.shape[1] for p in pictures.values()], "cf_height": [p.shape[0] for p in pictures.values()]}
    data = table(len(pictures), **columns, **sizes)
    reasons = found.decide(found.score(embeddings(len(pictures)), None, None, data)).reasons.to_pylist()
    fired = {name: {r["rule"] for r in row} for name, row in zip(pictures, reasons, strict=True)}
    assert {"dark", "blurry"} <= fired["dark.jpg"]
    assert fired["blurred.jpg"] == {"blurry"}
    assert fired["camera.jpg"] == {"grayscale"}
    assert {"bright", "low_information"} <= fired["invoice.png"]
    assert fired["wide"] == {"odd_aspect"}
    assert fired["kitten.jpg"] == fired["coffee.jpg"] == fired["great_wall.jpg"] == set()


def test_colourfulness_is_that_of_hasler_and_suesstrunk() -> None:
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (40, 30, 3)).astype(np.uint8)
    red, green, blue = rgb.reshape(-1, 3).T.astype(np.float64)
    rg, yb = red - green, (red + green) / 2 - blue
    exact = math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean())
    assert image_facts(rgb).colourfulness == pytest.approx(exact, rel=1e-5)
    assert image_facts(np.repeat(rgb[:, :, :1], 3, axis=2)).colourfulness == 0


def test_runs_from_before_a_fact_was_measured_say_that_it_is_missing() -> None:
    from clipfilter.runs.columns import with_facts

    rows = with_facts(pa.table({"cf_row": [0, 1]}), pa.table({"cf_blur": pa.array([5.0, 500.0], pa.float32())}))
    found = compiled({"id": "grey", "pixels": "grayscale"}, {"id": "blurry", "pixels": "blurry"})
    decided = found.decide(found.score(embeddings(2), None, None, rows))
    assert decided.decision.to_pylist() == ["reject", "review"]
    assert decided.counts["grey"]["missing"] == 2


# ------------------------------------------------------------------ prompts on disk


class Real(FakeEncoder):
    """A stand-in that a hash identifies, as models of files are."""

    def __init__(self, **changes: Any) -> None:
        super().__init__(**changes)
        self.fingerprint |= {"architecture": "fake", "backend": "numpy"}


def test_prompts_are_embedded_once_per_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(texts.VARIABLE, str(tmp_path / "texts"))
    first, second, other = Real(), Real(), Real(weights_sha256="c" * 64)
    plans = [compiled(CAT, encoder=encoder).matrix for encoder in (first, second, other)]
    assert first.asked
    assert second.asked == []
    assert other.asked == first.asked
    np.testing.assert_array_equal(plans[0], plans[1])
    files = sorted((tmp_path / "texts").iterdir())
    assert len(files) == 2
    for damage in (b"", b"\x93NUMPY nonsense", files[0].read_bytes()[:-7], b"\x80\x04K\x01."):
        for file in files:
            file.write_bytes(damage)
        again = Real()
        np.testing.assert_array_equal(compiled(CAT, encoder=again).matrix, plans[0])
        assert again.asked == first.asked
    monkeypatch.setenv(texts.VARIABLE, "off")
    last = Real()
    compiled(CAT, encoder=last)
    assert last.asked


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(texts.VARIABLE, str(tmp_path / "file" / "texts"))
    assert compiled(CAT, encoder=Real()).matrix.shape == (DIM, 2)
