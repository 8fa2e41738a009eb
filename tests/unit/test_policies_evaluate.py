"""Scores and decisions against plain numpy written from the definitions, and the promises about reproducibility."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clipfilter.errors import RefusedError
from clipfilter.policies import CompiledPolicy, Policy, compile_policy, load_policy, parse_policy
from clipfilter.policies.arithmetic import settle, similarity
from clipfilter.policies.deciding import REASONS
from clipfilter.policies.fraction import dataset_thresholds
from clipfilter.policies.kinds.concept_plan import ConceptPlan, concept_scores
from clipfilter.policies.prompts import GENERIC_NEGATIVES, TEMPLATES
from tests.support.policies import FakeEncoder, embeddings

CONCEPTS = """\
policy: p
version: 1
rules:
  - id: weapons
    concept:
      any_of: ["a handgun", "a rifle", "a person holding a gun"]
      but_not: ["a toy water gun", "a camera"]
    review: {above: 0.50}
    reject: {above: 0.85}
  - id: plain
    concept: {any_of: ["a cat"], but_not: ["a dog", "a fox"], generic: false}
    templates: none
    reject: {below: 0.3}
  - id: margin
    concept: {any_of: ["a cat", "a lynx"], but_not: ["a dog"], score: margin}
    templates: ["one {}", "two {}"]
    reject: {above: 0.1}
  - id: cosine
    concept: {any_of: ["a tree", "a bush"], generic: false, score: cosine}
    reject: {above: 0.2}
"""
DATA = """\
policy: p
version: 1
rules:
  - id: match
    alignment: {}
    review: {below: 0.5}
    reject: {below: 0.2}
  - id: small
    metadata: min_side
    reject: {below: 200}
  - {id: narrow, metadata: aspect_ratio, review: {above: 3}}
  - id: top
    fraction: {of: match}
    reject: {outside_top: 0.5}
"""


def sizes(rows: int, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "cf_width": pa.array(rng.integers(100, 900, rows), pa.int32()),
            "cf_height": pa.array(rng.integers(100, 900, rows), pa.int32()),
        }
    )


def compiled(text: str = CONCEPTS, **encoder: Any) -> CompiledPolicy:
    return compile_policy(parse_policy(text), FakeEncoder(**encoder))


def concepts(policy: CompiledPolicy) -> ConceptPlan:
    """The arrays of the policy's concept rules."""
    plan, _ = policy.scorer.plans[0]
    assert isinstance(plan, ConceptPlan)
    return plan


def near(policy: CompiledPolicy, rows: int, seed: int = 0, pull: float = 0.5) -> np.ndarray:
    """Embeddings of which many lie near the policy's phrases, so that every band occurs."""
    rng = np.random.default_rng(seed)
    values = embeddings(rows, policy.matrix.shape[0], seed).astype(np.float64)
    values = (1 - pull) * values + pull * policy.matrix.T[rng.integers(0, policy.matrix.shape[1], rows)]
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)


# ------------------------------------------------------------------ the formulas, written a second time


def naive_vector(encoder: FakeEncoder, phrase: str, templates: tuple[str, ...]) -> np.ndarray:
    mean = np.mean([encoder.vector(template.replace("{}", phrase)) for template in templates], axis=0)
    return mean / np.linalg.norm(mean)


def naive_score(policy: Policy, encoder: FakeEncoder, rule_id: str, image: np.ndarray) -> float:
    rule = next(rule for rule in policy.rules if rule.id == rule_id)
    assert rule.concept is not None
    templates = rule.templates or policy.templates
    generic = GENERIC_NEGATIVES[rule.concept.generic] if rule.concept.generic else ()
    x = image.astype(np.float64)
    positive = [x @ naive_vector(encoder, phrase, templates) for phrase in rule.concept.any_of]
    negative = [x @ naive_vector(encoder, phrase, templates) for phrase in (*rule.concept.but_not, *generic)]
    if rule.concept.score == "cosine":
        return max(positive)
    if rule.concept.score == "margin":
        return max(positive) - max(negative)
    if encoder.score_kind == "sigmoid":

        def p(cosine: float) -> float:
            return 1 / (1 + np.exp(-(encoder.logit_scale * cosine + (encoder.logit_bias or 0))))

        return max(map(p, positive)) - max(map(p, negative))

    def logmeanexp(values: list[float]) -> float:
        return float(np.log(np.mean(np.exp(np.array(values) * encoder.logit_scale))))

    a, b = logmeanexp(positive), logmeanexp(negative)
    return float(np.exp(a) / (np.exp(a) + np.exp(b)))


@pytest.mark.parametrize(
    "encoder",
    [{}, {"logit_scale": 100.0}, {"score_kind": "sigmoid", "logit_scale": 110.0, "logit_bias": -12.0}],
    ids=["scale 20", "scale 100", "sigmoid"],
)
def test_scores_are_the_formula(encoder: dict[str, Any]) -> None:
    policy = compiled(**encoder)
    images = near(policy, 300)
    scores = policy.score(images, None, None, sizes(300))
    for rule in ("weapons", "plain", "margin", "cosine"):
        expected = [naive_score(policy.policy, FakeEncoder(**encoder), rule, image) for image in images]
        assert scores.values[rule].dtype == np.float32
        np.testing.assert_allclose(scores.values[rule], expected, rtol=0, atol=2e-5)
        assert np.std(expected) > 0.01


def test_synonyms_add_no_weight() -> None:
    """The same cosine from one positive or from three gives the same probability."""
    encoder = FakeEncoder()
    alike = {text: encoder.vector("gun") for text in ("gun", "pistol", "firearm")}
    encoder.vector = lambda text: alike.get(text, FakeEncoder().vector(text))  # type: ignore[method-assign]
    image = near(compiled(), 40, pull=0)
    image[:, :] = (encoder.vector("gun") + 0.8 * encoder.vector("cup")).astype(np.float16)
    found = []
    for words in ("gun", "gun, pistol, firearm"):
        rule = f"{{id: a, concept: {{any_of: [{words}], but_not: [cup]}}, reject: {{above: 0.5}}}}"
        text = f"{{policy: p, version: 1, templates: none, rules: [{rule}]}}"
        found.append(compile_policy(parse_policy(text), encoder).score(image, None, None, sizes(40)).values["a"][0])
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_nearest_and_contrast_are_the_strongest_phrases() -> None:
    policy = compiled()
    images = near(policy, 500)
    scores = policy.score(images, None, None, sizes(500))
    encoder = FakeEncoder()
    rule = policy.policy.rules[0]
    assert rule.concept is not None
    fired = np.flatnonzero(scores.values["weapons"] > 0.5)
    assert len(fired) > 20
    for row in fired:
        x = images[row].astype(np.float64)

        def strongest(phrases: tuple[str, ...], x: np.ndarray = x) -> str:
            return max(phrases, key=lambda phrase: x @ naive_vector(encoder, phrase, TEMPLATES["photo"]))

        assert concepts(policy).labels[scores.nearest["weapons"][row]] == strongest(rule.concept.any_of)
        negatives = (*rule.concept.but_not, *rule.concept.generic_phrases)
        assert concepts(policy).labels[scores.contrast["weapons"][row]] == strongest(negatives)


# ------------------------------------------------------------------ reproducibility


@pytest.mark.parametrize("rows", [1, 2, 1023, 1024, 1025, 2500])
def test_a_score_does_not_depend_on_the_rows_that_follow(rows: int) -> None:
    policy = compiled(CONCEPTS + DATA.split("rules:\n")[1])
    images, texts = near(policy, 3000), near(policy, 3000, seed=9)
    has, table = np.random.default_rng(1).random(3000) < 0.9, sizes(3000)
    whole = policy.score(images, texts, has, table)
    part = policy.score(images[:rows], texts[:rows], has[:rows], table.slice(0, rows))
    for name, values in whole.values.items():
        np.testing.assert_array_equal(part.values[name], values[:rows])
    for name, values in whole.nearest.items():
        np.testing.assert_array_equal(part.nearest[name], values[:rows])
    np.testing.assert_array_equal(part.similarity, whole.similarity[:rows])
    np.testing.assert_array_equal(np.where(has, similarity(images, texts), np.float32(np.nan)), whole.similarity)


def test_memory_maps_and_plain_arrays_score_alike() -> None:
    policy = compiled()
    images = near(policy, 1500)
    locked = images.copy()
    locked.flags.writeable = False
    a, b = (policy.score(x, None, None, sizes(1500)).values["weapons"] for x in (images, locked))
    np.testing.assert_array_equal(a, b)


def test_memory_maps_score_alike_where_torch_cannot_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def refuse(array: np.ndarray) -> None:
        raise BufferError("Cannot export readonly array")

    policy = compiled()
    images = near(policy, 1500)
    shared = policy.score(images, images[::-1], None, sizes(1500))
    images.flags.writeable = False
    monkeypatch.setattr(torch, "from_dlpack", refuse)
    copied = policy.score(images, images[::-1], None, sizes(1500))
    np.testing.assert_array_equal(copied.values["weapons"], shared.values["weapons"])
    np.testing.assert_array_equal(copied.similarity, shared.similarity)


def test_threads_and_torch_change_no_bit(tmp_path: Path) -> None:
    code = """
import sys, hashlib
if sys.argv[1] == "torch": import torch
import numpy as np
from tests.unit.test_policies_evaluate import *
policy = compiled(dim=512)
images = near(policy, 2100)
scores = policy.score(images, images[::-1].copy(), None, sizes(2100))
digest = hashlib.sha256(scores.similarity.tobytes())
for values in scores.values.values(): digest.update(values.tobytes())
print(digest.hexdigest())
"""
    root = Path(__file__).parents[2]
    seen = set()
    for threads, torch in (("1", "no"), ("2", "torch")):
        env = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", code, torch],
            check=True,
            capture_output=True,
            text=True,
            env=env,
            cwd=root,
            timeout=120,
        )
        seen.add(done.stdout)
    assert len(seen) == 1


def test_a_score_at_its_threshold_is_settled_in_float64() -> None:
    """Thresholds put exactly on, and a hair beside, the float64 scores of real rows: the side is always float64's."""
    images = near(compiled(), 200)
    exact = np.array([naive_exact(compiled(), image) for image in images])
    order = np.argsort(exact)
    picked = [row for row in order if 0.01 < exact[row] < 0.99][:: max(1, len(order) // 20)]
    assert len(picked) > 5
    for row in picked:
        for shift in (-3e-9, 0.0, 3e-9):
            threshold = float(exact[row] + shift)
            policy = compiled(CONCEPTS.replace("    review: {above: 0.50}\n", "").replace("0.85", repr(threshold)))
            scores = policy.score(images, None, None, sizes(200))
            decided = policy.decide(scores)
            fired = {
                index
                for index, reasons in enumerate(decided.reasons.to_pylist())
                if any(r["rule"] == "weapons" for r in reasons)
            }
            assert fired == set(np.flatnonzero(exact > threshold))
            # What is recorded says the same.
            recorded = np.float32(scores.values["weapons"]) > np.float32(threshold)
            assert set(np.flatnonzero(recorded)) == fired


def naive_exact(policy: CompiledPolicy, image: np.ndarray) -> float:
    """The weapons score in float64 from the compiled matrix and the stored float16 embedding."""
    cosines = concepts(policy).weights.astype(np.float64) @ image.astype(np.float64)
    return float(concept_scores(concepts(policy), cosines[:, None])[0, 0])


def test_settled_scores_keep_their_side() -> None:
    threshold = 0.26
    single = np.float32(threshold)
    exact = np.array([threshold, threshold + 1e-12, threshold - 1e-12, float(single), 0.3, np.nan])
    stored = settle(exact, [threshold])
    assert stored[0] == single
    assert stored[1] == np.nextafter(single, np.float32(1))
    assert stored[2] == np.nextafter(single, np.float32(0))
    assert stored[4] == np.float32(0.3)
    assert np.isnan(stored[5])
    np.testing.assert_allclose(stored, exact, rtol=2.4e-7)


# ------------------------------------------------------------------ deciding


def aligned() -> tuple[CompiledPolicy, np.ndarray, np.ndarray, np.ndarray, pa.Table]:
    """Six rows: cosine 1, 0.4, 0.1, no caption, zero image, 1 with a small image."""
    policy = compiled(DATA)
    image = np.zeros((6, 64), np.float16)
    text = np.zeros((6, 64), np.float16)
    image[:, 0] = 1
    image[4] = 0
    for row, cosine in enumerate([1, 0.4, 0.1, 1, 1, 1]):
        text[row, :2] = cosine, np.sqrt(1 - cosine**2)
    has = np.array([True, True, True, False, True, True])
    table = pa.table({"cf_width": [640, 640, 900, 640, 640, 500], "cf_height": [480, 480, 200, 480, 480, 199]})
    return policy, image, text, has, table


def test_decisions_and_reasons() -> None:
    policy, image, text, has, table = aligned()
    scores = policy.score(image, text, has, table)
    numbers, _ = dataset_thresholds(policy, lambda rule: [scores.values[rule]])
    assert numbers == {"top.reject": pytest.approx(0.4, abs=1e-3)}  # 4 ranked rows: the third best
    decided = policy.decide(scores, numbers)
    assert decided.decision.to_pylist() == ["keep", "review", "reject", "review", "review", "reject"]
    assert decided.totals() == {"keep": 1, "review": 3, "reject": 2}
    reasons = [[(r["rule"], r["band"]) for r in row] for row in decided.reasons.to_pylist()]
    assert reasons == [
        [],
        [("match", "review")],
        [("match", "reject"), ("top", "reject"), ("narrow", "review")],
        [("match", "missing"), ("top", "missing")],
        [("match", "missing"), ("top", "missing")],
        [("small", "reject")],
    ]
    small = decided.reasons.to_pylist()[5][0]
    assert small == {
        "rule": "small", "band": "reject", "score": 199.0, "threshold": 200.0, "nearest": None, "contrast": None,
    }  # fmt: skip
    assert decided.counts["match"] == {"review": 1, "reject": 1, "missing": 2}


def test_reasons_agree_with_scores_row_by_row() -> None:
    """An independent, slow reading of scores and bands must give the same decisions and reasons."""
    policy = compiled(CONCEPTS + DATA.split("rules:\n")[1])
    n = 2000
    images, texts = near(policy, n), near(policy, n, seed=3, pull=0.3)
    texts[:700] = images[:700]
    has = np.random.default_rng(1).random(n) < 0.8
    scores = policy.score(images, texts, has, sizes(n))
    numbers, _ = dataset_thresholds(policy, lambda rule: [scores.values[rule]])
    decided = policy.decide(scores, numbers)
    table = policy.annotation(scores, decided)
    severity = {"keep": 0, "review": 1, "reject": 2, "missing": 1}
    bands: dict[str, list[tuple[str, str, float]]] = {
        "weapons": [("reject", "above", 0.85), ("review", "above", 0.5)],
        "plain": [("reject", "below", 0.3)],
        "margin": [("reject", "above", 0.1)],
        "cosine": [("reject", "above", 0.2)],
        "match": [("reject", "below", 0.2), ("review", "below", 0.5)],
        "small": [("reject", "below", 200)],
        "narrow": [("review", "above", 3)],
        "top": [("reject", "below", numbers["top.reject"] or 0.0)],
    }
    for row in table.to_pylist():
        expected = []
        for order, (rule, entries) in enumerate(bands.items()):
            value = row[f"cf_score.{rule}"]
            for band, direction, threshold in entries:
                single = float(np.float32(threshold))
                if value is not None and (value > single if direction == "above" else value < single):
                    expected.append((-severity[band], order, rule, band, value, single))
                    break
            if value is None:
                expected.append((-1, order, rule, "missing", None, None))
        expected.sort(key=lambda entry: entry[:2])
        got = [(r["rule"], r["band"], r["score"], r["threshold"]) for r in row["cf_reasons"]]
        assert got == [entry[2:] for entry in expected]
        worst = max((-entry[0] for entry in expected), default=0)
        assert row["cf_decision"] == ("keep", "review", "reject")[worst]
        for reason in row["cf_reasons"]:
            concept = reason["rule"] in ("weapons", "plain", "margin", "cosine")
            assert (reason["nearest"] is not None) == concept
            assert (reason["contrast"] is not None) == (concept and reason["rule"] != "cosine")
    assert set(table["cf_decision"].to_pylist()) == {"keep", "review", "reject"}


@pytest.mark.parametrize(
    ("policy_wide", "own", "decision", "bands"),
    [
        ("review", None, "review", ["missing", "missing"]),
        ("reject", None, "reject", ["missing", "missing"]),
        ("keep", None, "keep", []),
        ("keep", "reject", "reject", ["missing"]),
        ("reject", "keep", "reject", ["missing"]),
    ],
)
def test_on_missing(policy_wide: str, own: str | None, decision: str, bands: list[str]) -> None:
    text = DATA + f"on_missing: {policy_wide}\n"
    if own:
        text = text.replace("alignment: {}", f"alignment: {{}}\n    on_missing: {own}")
    policy = compiled(text)
    _, image, _, _, table = aligned()
    scores = policy.score(image, None, None, table)
    decided = policy.decide(scores, {"top.reject": None})
    assert decided.decision.to_pylist()[0] == decision
    assert [reason["band"] for reason in decided.reasons.to_pylist()[0]] == bands


def test_a_caption_that_is_missing_never_passes_silently() -> None:
    policy, image, text, has, table = aligned()
    decided = policy.decide(policy.score(image, text, has, table), {"top.reject": 0.0})
    assert decided.decision.to_pylist()[3] == "review"


def test_a_concept_fraction_explains_itself() -> None:
    policy = compiled(
        "{policy: p, version: 1, rules: [{id: cat, concept: {any_of: [a cat, a lynx]}}, "
        "{id: few, fraction: {of: cat}, reject: {outside_bottom: 0.5}}]}"
    )
    scores = policy.score(near(policy, 100), None, None, sizes(100))
    numbers, evidence = dataset_thresholds(policy, lambda rule: [scores.values[rule]])
    decided = policy.decide(scores, numbers)
    rejected = decided.totals()["reject"]
    assert rejected == 100 - evidence["few.reject"]["kept"]
    reason = next(row[0] for row in decided.reasons.to_pylist() if row)
    assert reason["nearest"] in ("a cat", "a lynx")
    assert reason["contrast"] in GENERIC_NEGATIVES[1]


def test_thresholds_must_be_fixed_before_deciding() -> None:
    policy, image, text, has, table = aligned()
    scores = policy.score(image, text, has, table)
    with pytest.raises(ValueError, match=r"top\.reject"):
        policy.decide(scores, {})


def test_annotation_has_the_columns_of_the_contract() -> None:
    policy, image, text, has, table = aligned()
    scores = policy.score(image, text, has, table)
    bare = policy.annotation(scores, None)
    done = policy.annotation(scores, policy.decide(scores, {"top.reject": 0.3}))
    assert bare.schema == done.schema
    assert done.schema == pa.schema(
        [
            ("cf_similarity", pa.float32()),
            *((f"cf_score.{rule}", pa.float32()) for rule in ("match", "small", "narrow", "top")),
            ("cf_decision", pa.string()),
            ("cf_reasons", REASONS),
        ]
    )
    assert bare["cf_decision"].null_count == 6
    assert bare["cf_reasons"].null_count == 6
    assert done["cf_similarity"].to_pylist()[3:5] == [None, None]
    assert done["cf_reasons"].null_count == 0
    done.validate(full=True)


def test_no_rows() -> None:
    policy = compiled(CONCEPTS + DATA.split("rules:\n")[1])
    scores = policy.score(embeddings(0), embeddings(0), np.zeros(0, bool), sizes(0))
    table = policy.annotation(scores, policy.decide(scores, {"top.reject": 0.5}))
    assert table.num_rows == 0
    table.validate(full=True)


# ------------------------------------------------------------------ metadata


def metadata(name: str, **columns: Any) -> list[float | None]:
    policy = compiled(f"{{policy: p, version: 1, rules: [{{id: m, metadata: {name}, reject: {{below: 0}}}}]}}")
    table = pa.table(columns)
    scores = policy.score(embeddings(table.num_rows), None, None, table)
    return policy.annotation(scores, None)["cf_score.m"].to_pylist()


def test_sizes_come_from_the_original_where_the_source_knows_it() -> None:
    size = {"cf_width": [256, 256, 256, None], "cf_height": [256, 100, 256, None]}
    assert metadata("min_side", **size) == [256, 100, 256, None]
    original = {"original_width": [1000, None, 0, 50], "original_height": [250, None, 40, 60]}
    assert metadata("min_side", **size, **original) == [250, 100, 256, 50]
    assert metadata("max_side", **size, **original) == [1000, 256, 256, 60]
    assert metadata("aspect_ratio", **size, **original) == [4, pytest.approx(2.56), 1, pytest.approx(1.2)]
    assert metadata("pixels", **size, **original) == [250_000, 25_600, 65_536, 3_000]
    assert metadata("width", **size, original_width=[1, 1, 1, 1]) == [256, 256, 256, None]


def test_captions_count_as_datacomp_counts_them() -> None:
    captions = pa.array(["two words", " a\tb\nc ", "", "   ", None, "\u732b \U0001f600"], pa.string())
    expected = [2, 3, 0, 0, None, 2]
    assert metadata("caption_words", cf_caption=captions) == expected
    assert metadata("caption_chars", cf_caption=captions) == [9, 7, 0, 3, None, 3]
    for text, words in zip(captions.to_pylist(), expected, strict=True):
        assert text is None or len(text.split()) == words
    lists = pa.array([["two words", "other"], [], None, [None, "x"], ["one"]], pa.list_(pa.string()))
    assert metadata("caption_words", cf_captions=lists) == [2, None, None, None, 1]
    assert metadata("caption_words", cf_width=[1, 2]) == [None, None]


def test_any_numeric_column_and_facts() -> None:
    from decimal import Decimal

    assert metadata("punsafe", punsafe=[0.25, None, float("nan"), float("inf")]) == [0.25, None, None, None]
    assert metadata("clip", clip=pa.array([0.5, None], pa.float16())) == [0.5, None]
    assert metadata("price", price=pa.array([Decimal("1.50"), None])) == [1.5, None]
    assert metadata("adult", adult=[True, False, None]) == [1, 0, None]
    assert metadata("big", big=pa.array([2**60, 3], pa.int64())) == [float(2**60), 3]
    assert metadata("blur", cf_blur=pa.array([1.5], pa.float32())) == [1.5]
    with pytest.raises(RefusedError, match="holds string"):
        metadata("NSFW", NSFW=["UNLIKELY"])
    with pytest.raises(RefusedError, match="did you mean 'similarity'"):
        metadata("similarty", similarity=[0.3])
    with pytest.raises(RefusedError, match="rule 'm': the metadata rule needs the column 'cf_blur'"):
        compiled("{policy: p, version: 1, rules: [{id: m, metadata: blur, reject: {below: 0}}]}").check_columns(
            pa.schema([("cf_width", pa.int32())])
        )


def test_a_size_equal_to_its_threshold_is_inside() -> None:
    """`below: 200` keeps 200 and `above: 3` keeps 3.0, as DataComp's >= and <=."""
    policy = compiled(DATA)
    table = pa.table({"cf_width": [200, 600, 601, 199], "cf_height": [200, 200, 200, 200]})
    scores = policy.score(embeddings(4), embeddings(4), np.ones(4, bool), table)
    decided = policy.decide(scores, {"top.reject": -1.0})
    assert [[r["rule"] for r in row] for row in decided.reasons.to_pylist()] == [[], [], ["narrow"], ["small"]]


def test_similarity_of_an_imported_run_serves_where_there_are_no_texts() -> None:
    policy = compiled(DATA)
    table = sizes(3).append_column("cf_similarity", pa.array([0.6, 0.1, None], pa.float32()))
    scores = policy.score(embeddings(3), None, None, table)
    np.testing.assert_array_equal(scores.values["match"], np.array([0.6, 0.1, np.nan], np.float32))


# ------------------------------------------------------------------ compiling and calibrations


def test_equal_prompts_are_embedded_once_and_the_matrix_is_float32() -> None:
    encoder = FakeEncoder()
    policy = compile_policy(parse_policy(CONCEPTS), encoder)
    assert len(encoder.asked) == len(set(encoder.asked))
    assert "a photo of a handgun" in encoder.asked
    assert policy.matrix.dtype == np.float32
    assert policy.matrix.shape[0] == encoder.dim
    np.testing.assert_allclose(np.linalg.norm(policy.matrix, axis=0), 1, atol=1e-6)


def test_prompts_hash_follows_the_texts_only() -> None:
    base = compiled()
    assert compiled(CONCEPTS.replace("0.85", "0.9")).prompts_sha256 == base.prompts_sha256
    for change in (
        ("a rifle", "a musket"),
        ("templates: none", "templates: photo"),
        ("score: margin", "score: cosine"),
    ):
        assert compiled(CONCEPTS.replace(*change)).prompts_sha256 != base.prompts_sha256
    assert set(base.rule_prompts_sha256) == {"weapons", "plain", "margin", "cosine"}


def test_a_policy_without_concepts_asks_the_model_nothing() -> None:
    encoder = FakeEncoder()
    policy = compile_policy(parse_policy(DATA), encoder)
    assert encoder.asked == []
    assert policy.needs_text
    assert policy.dataset_rules == ["top"]
    assert not compiled().needs_text


def test_truncated_prompts_are_counted() -> None:
    policy = compiled(CONCEPTS.replace("a rifle", "a rifle " * 25))
    assert policy.truncated_texts == len(TEMPLATES["photo"])
    assert any("cut" in warning for warning in policy.warnings)


def with_calibration(**changes: Any) -> str:
    prompts = compiled().prompts_sha256
    entry = {"model": "fake", "weights_sha256": "a" * 64, "prompts_sha256": prompts, **changes}
    lines = "".join(f'    {"- " if i == 0 else "  "}{k}: "{v}"\n' for i, (k, v) in enumerate(entry.items()))
    rules = "      rules: {weapons: {reject: {above: 0.95, n: 400, target: precision>=0.95}}}\n"
    return CONCEPTS + "calibrations:\n" + lines + rules


def test_a_calibration_is_used_where_weights_and_prompts_match() -> None:
    policy = compiled(with_calibration())
    rule = policy.rules[0]
    assert (rule.review, rule.reject, rule.calibrated) == (0.5, 0.95, True)
    assert policy.uncalibrated == ["plain", "margin", "cosine"]
    assert "uncalibrated for fake: plain, margin, cosine" in policy.warnings[0]


def test_a_calibration_for_another_model_leaves_the_rule_uncalibrated() -> None:
    policy = compiled(with_calibration(model="ViT-B-32", weights_sha256="b" * 64))
    assert policy.rules[0].reject == 0.85
    assert policy.uncalibrated[0] == "weapons"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights_sha256": "b" * 64}, "other weights"),
        ({"prompts_sha256": "b" * 64}, "other prompts"),
        ({"preprocess_sha256": "b" * 64}, "other preprocessing"),
        ({"decode": "exact"}, "other decode mode"),
    ],
)
def test_a_calibration_that_belongs_elsewhere_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(RefusedError, match=words) as caught:
        compiled(with_calibration(**changes))
    assert "recalibrate" in str(caught.value)


def test_a_rule_with_thresholds_for_other_models_only_is_refused() -> None:
    text = with_calibration(model="ViT-B-32", weights_sha256="b" * 64)
    text = text.replace("    review: {above: 0.50}\n    reject: {above: 0.85}\n", "")
    with pytest.raises(RefusedError, match="only for ViT-B-32, not for fake"):
        compiled(text)


@pytest.mark.parametrize("name", ["caption-match", "curate-basic", "marketplace-safety", "demo"])
def test_every_pack_decides(name: str) -> None:
    policy = compile_policy(load_policy(name), FakeEncoder())
    table = sizes(50).append_column("cf_caption", pa.array(["a dog runs on grass"] * 50))
    for fact in ("cf_brightness", "cf_contrast", "cf_blur", "cf_entropy"):
        table = table.append_column(fact, pa.array(np.full(50, 100.0), pa.float32()))
    policy.check_columns(table.schema)
    scores = policy.score(embeddings(50), embeddings(50, seed=1), np.ones(50, bool), table)
    numbers, _ = dataset_thresholds(policy, lambda rule: [scores.values[rule]])
    assert sum(policy.decide(scores, numbers).totals().values()) == 50
