"""Head rules in policies: the language, scores and decisions, and what thresholds are bound to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.engine.job import JobRequest, run_job
from clipfilter.errors import RefusedError
from clipfilter.models import load_encoder
from clipfilter.models.heads import HeadFile, load_head
from clipfilter.policies import CompiledPolicy, Policy, compile_policy, parse_policy
from clipfilter.policies.fraction import dataset_thresholds
from clipfilter.policies.kinds.head import CurvedHead, OpenedHead
from clipfilter.policies.language.schema import json_sha256, rule_prompts_sha256
from clipfilter.report import write_report
from clipfilter.report.explain import explain_row, sentence
from tests.support.engine import commits, data_files, write_tars
from tests.support.policies import FakeEncoder, embeddings

DIM = 64
CONCEPT = '{id: cats, concept: {any_of: ["a cat"], but_not: ["a dog"]}, review: {above: 0.5}}'


def head(path: Path, widths: tuple[int, ...] = (1,), size: float = 1.0, seed: int = 0, **metadata: str) -> Path:
    """A head of random weights for the fake encoder's embeddings."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, np.ndarray] = {}
    dim = inner = int(metadata.get("dim", DIM))
    for number, outer in enumerate(widths):
        tensors[f"layers.{number}.weight"] = (size * rng.normal(size=(outer, inner))).astype("f4")
        tensors[f"layers.{number}.bias"] = rng.normal(size=outer).astype("f4")
        inner = outer
    usual = {"clipfilter_head": "1", "model": "fake", "dim": str(dim), "activation": "relu", "final": "none"}
    HeadFile(tensors, usual | {"layers": ",".join(map(str, widths))} | metadata).write(path)
    return path


def policy(*rules: str) -> Policy:
    return parse_policy("policy: p\nversion: 1\nrules:\n" + "".join(f"  - {rule}\n" for rule in rules))


def compiled(*rules: str, **encoder: Any) -> CompiledPolicy:
    return compile_policy(policy(*rules), FakeEncoder(**encoder))


def score(policy: CompiledPolicy, rows: np.ndarray) -> Any:
    return policy.score(rows, None, None, pa.table({"x": pa.nulls(len(rows))}))


def _members(policy: CompiledPolicy, kind: type) -> list[Any]:
    """The policy's heads of one sort."""
    return [
        member for plan, _ in policy.scorer.plans for member in getattr(plan, "members", ()) if isinstance(member, kind)
    ]


def exact(path: Path, rows: np.ndarray) -> np.ndarray:
    return load_head(f"file:{path}", FakeEncoder().fingerprint, DIM).exact(rows)


# ---------------------------------------------------------------- the language


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("{id: a, head: laion-asthetic-v2, reject: {below: 5}}", "p.yaml:4:19: there is no head 'laion-asthetic-v2'"),
        ("{id: a, head: laion-asthetic-v2, reject: {below: 5}}", "did you mean 'laion-aesthetic-v2'?"),
        (
            "{id: a, head: laion-nsfw, reject: {above: 90}}",
            "a probability threshold is between 0 and 1; did you mean 0.9?",
        ),
        ("{id: a, head: [x], reject: {above: 0.9}}", 'head must be the name of a head, not ["x"]'),
        ("{id: a, head: {nme: violence}, reject: {above: 0.9}}", "head needs a name"),
        (
            "{id: a, head: {name: violence, sha: x}, reject: {above: 0}}",
            "unknown key 'sha' in 'head'; did you mean 'sha256'?",
        ),
        ("{id: a, head: {name: violence, sha256: 12}, reject: {above: 0}}", "not a sha256"),
        (
            "{id: a, head: 'file:/no/such/head.safetensors', reject: {above: 0}}",
            "/no/such/head.safetensors does not exist",
        ),
        ("{id: a, head: violence, templates: photo, reject: {above: 0}}", "is of kind head"),
        ("{id: a, head: violence, alignment: {}, reject: {above: 0}}", "is of kind alignment and head"),
        ("{id: a, head: violence, reject: {outside_top: 0.3}}", "a head rule takes above or below"),
        ("{id: a, head: violence}", "would decide nothing"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_place(rule: str, message: str) -> None:
    with pytest.raises(RefusedError) as caught:
        parse_policy(f"policy: p\nversion: 1\nrules:\n  - {rule}\n", "p.yaml")
    assert message in str(caught.value)
    assert re.match(r"p\.yaml:\d+:\d+: ", str(caught.value))


def test_the_canonical_form_says_which_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = head(tmp_path / "h.safetensors")
    monkeypatch.chdir(tmp_path)
    found = policy(
        "{id: a, head: 'file:h.safetensors', reject: {above: 0}}", "{id: b, head: violence, reject: {above: 0}}"
    )
    mine, published = found.canonical()["rules"]
    assert mine["head"]["name"] == f"file:{path}"
    assert published["head"] == "violence"
    given = policy(f"{{id: a, head: {{name: 'file:h.safetensors', sha256: {'d' * 64}}}, reject: {{above: 0}}}}")
    assert given.canonical()["rules"][0]["head"] == {"name": f"file:{path}", "sha256": "d" * 64}
    path.unlink()  # workers get the canonical form, and the file is looked for where the policy is compiled
    assert Policy.from_canonical(found.canonical()).canonical() == found.canonical()
    with pytest.raises(RefusedError, match=r"rule 'a': the head .* does not exist"):
        compile_policy(found, FakeEncoder())
    head(path, seed=1)
    with pytest.raises(RefusedError, match="is not the file it was"):
        compile_policy(found, FakeEncoder())
    assert policy("{id: a, head: 'file:h.safetensors', reject: {above: 0}}").sha256 != found.sha256


def test_a_head_for_another_model_is_refused_where_the_policy_meets_its_model() -> None:
    with pytest.raises(
        RefusedError, match=r"rule 'a': the head violence is for embeddings of ViT-L-14/openai or ViT-B-32/"
    ):
        compiled("{id: a, head: violence, reject: {above: 0}}")


# ---------------------------------------------------------------- scores and decisions


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    return {
        "linear": head(tmp_path / "linear.safetensors", size=3.0),
        "chain": head(tmp_path / "chain.safetensors", (8, 4, 1), seed=1, activation="none"),
        "mlp": head(tmp_path / "mlp.safetensors", (16, 1), seed=2, final="sigmoid"),
    }


def rules(paths: dict[str, Path], threshold: float = 0.5) -> list[str]:
    return [f"{{id: {name}, head: 'file:{path}', reject: {{above: {threshold}}}}}" for name, path in paths.items()]


def test_scores_are_the_heads_own_and_linear_ones_are_columns_of_the_one_product(three: dict[str, Path]) -> None:
    both = compiled(*rules(three), CONCEPT)
    alone = compiled(CONCEPT)
    rows = embeddings(3000)
    found = score(both, rows)
    hidden = len(_members(both, OpenedHead)[0].network.weights[0])
    assert both.matrix.shape == (DIM, alone.matrix.shape[1] + 2 + hidden)  # of the perceptron its first layer
    for name, path in three.items():
        np.testing.assert_allclose(found.values[name], exact(path, rows), atol=2e-5)
    np.testing.assert_allclose(found.values["cats"], score(alone, rows).values["cats"], atol=1e-6)
    np.testing.assert_array_equal(found.nearest["cats"], score(alone, rows).nearest["cats"])


def test_rows_do_not_depend_on_how_many_follow(three: dict[str, Path]) -> None:
    plan = compiled(*rules(three), CONCEPT)
    rows = embeddings(2500)
    whole = score(plan, rows)
    for part in (slice(0, 1024), slice(1024, 2048), slice(2048, 2500), slice(2048, 2049)):
        some = score(plan, rows[part])
        for name in whole.values:
            np.testing.assert_array_equal(some.values[name], whole.values[name][part])


@pytest.mark.parametrize(("size", "opened"), [(0.05, True), (1.0, True), (4.0, False)])
def test_heads_of_layers_decide_as_float64_does(tmp_path: Path, size: float, opened: bool) -> None:
    """Thresholds hard beside a row's own exact score: none lands on the wrong side, however it was computed."""
    path = head(tmp_path / "h.safetensors", (16, 8, 1), size=size)
    rows = embeddings(300)
    truth = exact(path, rows)
    for threshold in (np.sort(truth)[::40, None] * [1 - 1e-12, 1 + 1e-12]).ravel().tolist():
        plan = compiled(f"{{id: mlp, head: 'file:{path}', reject: {{above: {threshold!r}}}}}")
        assert bool(_members(plan, OpenedHead)) is opened
        assert bool(_members(plan, CurvedHead)) is not opened
        values = score(plan, rows).values["mlp"]
        np.testing.assert_array_equal(values > np.float32(threshold), truth > threshold)
        np.testing.assert_allclose(values, truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_decisions_at_the_threshold_are_those_of_float64(tmp_path: Path, size: float) -> None:
    """Thousands of rows as close to the threshold as float16 allows, for weights of every length."""
    rng = np.random.default_rng(7)
    path = head(tmp_path / "h.safetensors", size=size)
    base = embeddings(1, seed=5)
    rows = np.repeat(base, 4000, axis=0)
    for row in rows:  # the same embedding with a few numbers moved by one unit in the last place, up and down
        up, down = rng.choice(DIM, 2, replace=False)
        row[up], row[down] = np.nextafter(row[up], np.float16(9)), np.nextafter(row[down], np.float16(-9))
    scores = exact(path, rows)
    weight, bias = load_head(f"file:{path}", FakeEncoder().fingerprint, DIM).linear or (np.zeros(0), 0.0)
    # One row at a time, as the second look does it: the product's rounding may depend on its shape.
    alone = np.array([row.astype(np.float64) @ weight.astype(np.float64) + bias for row in rows])
    for threshold in np.sort(scores)[1000:3000:40].tolist():
        plan = compiled(f"{{id: a, head: 'file:{path}', reject: {{above: {threshold!r}}}}}")
        found = score(plan, rows)
        np.testing.assert_array_equal(found.values["a"] > np.float32(threshold), alone > threshold)
        assert np.abs(found.values["a"] - scores).max() < 1e-5 * max(size * 8, 1)
    np.testing.assert_array_equal(plan.decide(found).codes == 2, alone > threshold)


def test_reasons_missing_rows_and_ranks(tmp_path: Path) -> None:
    path = head(tmp_path / "h.safetensors", (4, 1))
    plan = compiled(
        f"{{id: h, head: 'file:{path}', review: {{above: 0.0}}, reject: {{above: 0.5}}}}",
        f"{{id: other, head: {{name: 'file:{path}'}}}}",
        "{id: best, fraction: {of: other}, reject: {outside_bottom: 0.5}}",
    )
    rows = embeddings(2000)
    rows[7], rows[8, 3] = 0, np.nan
    found = score(plan, rows)
    assert np.flatnonzero(np.isnan(found.values["h"])).tolist() == [7, 8]
    thresholds, _ = dataset_thresholds(plan, lambda rule: [found.values[rule]])
    decided = plan.decide(found, thresholds)
    values = found.values["h"]
    for row in range(2000):
        reasons = {reason["rule"]: reason for reason in decided.reasons[row].as_py()}
        band = "missing" if row in (7, 8) else "reject" if values[row] > 0.5 else "review" if values[row] > 0 else None
        if band is None:
            assert "h" not in reasons
            continue
        assert reasons["h"]["band"] == band
        assert reasons["h"]["nearest"] is None
        if band != "missing":
            assert reasons["h"]["score"] == values[row]
            assert reasons["h"]["threshold"] == np.float32(0.5 if band == "reject" else 0.0)
    assert decided.counts["best"]["reject"] == pytest.approx(1000, abs=3)


# ---------------------------------------------------------------- what thresholds are bound to


def test_calibrations_are_bound_to_the_heads_file(tmp_path: Path) -> None:
    path = head(tmp_path / "h.safetensors")

    def text(path: Path, prompts: str = "") -> str:
        rule = f"policy: p\nversion: 1\nrules:\n  - {{id: a, head: 'file:{path}', reject: {{above: 0.5}}}}\n"
        bands = "{reject: {above: 0.7}}"
        entry = f"{{model: fake, weights_sha256: {'a' * 64}, prompts_sha256: {prompts}, rules: {{a: {bands}}}}}"
        return rule + (f"calibrations:\n  - {entry}\n" if prompts else "")

    plain = compile_policy(parse_policy(text(path)), FakeEncoder())
    assert plain.uncalibrated == ["a"]
    prompts = plain.prompts_sha256
    calibrated = compile_policy(parse_policy(text(path, prompts)), FakeEncoder())
    assert calibrated.rules[0].reject == 0.7
    assert calibrated.uncalibrated == []
    moved = path.rename(tmp_path / "moved.safetensors")
    assert compile_policy(parse_policy(text(moved, prompts)), FakeEncoder()).rules[0].reject == 0.7
    head(moved, seed=9)
    with pytest.raises(RefusedError, match="calibrated for fake with other prompts"):
        compile_policy(parse_policy(text(moved, prompts)), FakeEncoder())


def test_published_heads_bind_by_the_hashes_of_their_files() -> None:
    names = ["laion-aesthetic-v1", "laion-aesthetic-v2", "laion-nsfw", "violence"]
    found = [rule_prompts_sha256(policy(f"{{id: a, head: {name}, reject: {{above: 0.5}}}}"))["a"] for name in names]
    assert len(set(found)) == 4
    without = policy(CONCEPT)
    assert json_sha256(rule_prompts_sha256(without)) == json_sha256(
        {"cats": rule_prompts_sha256(policy(CONCEPT, "{id: v, head: violence, reject: {above: 0}}"))["cats"]}
    )


# ---------------------------------------------------------------- the whole way


@pytest.mark.integration
def test_filtering_a_runs_embeddings_gives_the_very_files_of_the_run(tmp_path: Path) -> None:
    encoder = load_encoder("nano")
    paths = {
        name: head(
            tmp_path / f"{name}.safetensors", widths, 3.0, model=encoder.fingerprint["model"], dim=str(encoder.dim)
        )
        for name, widths in (("linear", (1,)), ("mlp", (8, 1)))
    }
    lines = "".join(f"  - {rule}\n" for rule in rules(paths))
    (tmp_path / "p.yaml").write_text(f"policy: p\nversion: 1\nrules:\n{lines}")
    given = str(tmp_path / "p.yaml")
    source = write_tars(tmp_path / "data", 2, 9)
    whole = run_job(JobRequest("run", str(source), str(tmp_path / "run"), policy=given, engine="local"))
    filtered = run_job(JobRequest("filter", whole.out, str(tmp_path / "out"), policy=given, engine="local"))
    assert filtered.totals == whole.totals
    assert 0 < whole.totals["rules"]["linear"]["reject"] < 18
    annotated = {name: sha for name, sha in data_files(Path(whole.out)).items() if name.startswith("annotated/")}
    assert annotated == {n: s for n, s in data_files(Path(filtered.out)).items() if n.startswith("annotated/")}
    assert len(commits(Path(whole.out))) == 2
    page = Path(write_report(whole.out)).read_text(encoding="utf-8")
    assert "the head <bdi>file:" in page
    row = next(Path(whole.out, "annotated").glob("*.parquet"))
    explained = explain_row(whole.out, pq.read_table(row)["cf_uid"][0].as_py())
    assert {rule.kind for rule in explained.rules} >= {"head"}
    assert all(sentence(rule) for rule in explained.rules)
