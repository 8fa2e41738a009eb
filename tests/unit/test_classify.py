"""Zero-shot labels: the formulas, every kind of input, equality with `evaluate`, and labels and scores as columns of a run."""

from __future__ import annotations

import copy
import csv
import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import typer

import clipfilter
from clipfilter.cli.classify import classify as classify_command
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.engine.stream import StreamOptions, encode_image, load_for, open_inputs
from clipfilter.errors import RefusedError
from clipfilter.evaluation.dataset import DataRequest
from clipfilter.evaluation.evaluate import EvaluateRequest, evaluate
from clipfilter.models import Encoder, load_encoder
from clipfilter.operations.classify import CLASSIFIED, classify_stream
from clipfilter.operations.verify import verify_run
from clipfilter.policies import compile_policy, load_policy, parse_policy
from clipfilter.policies.labels import LabelScorer, LabelSet, parse_labels
from clipfilter.policies.language.scores import ScorePolicy, named_scores, scores_of
from clipfilter.policies.prompts import TEMPLATES
from tests.support.engine import POLICY, SHARED, data_files, photos, policy_file, write_tars
from tests.support.policies import FakeEncoder, embeddings

BATCH = 6
ANIMALS = ("a cat", "a dog", "a cow", "a pig", "a castle")


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return load_encoder("nano", threads=1)


def found(given: list[Any], encoder: Encoder, labels: LabelSet, batch_size: int = BATCH, **more: Any) -> pa.Table:
    options = StreamOptions(batch_size=batch_size, threads=1)
    return pa.concat_tables(classify_stream(open_inputs(given), LabelScorer(labels, encoder), encoder, options, **more))


# --- scores ---------------------------------------------------------------------------------------------------------


def test_shares_are_the_softmax_over_the_labels_at_the_models_scale() -> None:
    encoder = FakeEncoder(logit_scale=30.0)
    scorer = LabelScorer(LabelSet(("cat", "dog", "cow"), ("a photo of a {}.", "a {}"), top=9), encoder)  # type: ignore[arg-type]
    images = embeddings(1500)  # more than one block
    index, score = scorer.best(images)
    assert index.shape == score.shape == (1500, 3)
    texts = np.stack(
        [[encoder.vector(t.replace("{}", n)) for t in ("a photo of a {}.", "a {}")] for n in ("cat", "dog", "cow")]
    )
    means = texts.mean(axis=1)
    logits = 30.0 * images.astype(float) @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(index, np.argsort(-expected, axis=1))
    np.testing.assert_allclose(score, -np.sort(-expected, axis=1), rtol=1e-4)
    np.testing.assert_allclose(score.sum(axis=1), 1, rtol=1e-6)


def test_independent_scores_of_a_softmax_model_are_those_of_a_policys_concept() -> None:
    encoder = FakeEncoder()
    names = ("a cat", "people", "food")  # two of them are generic negatives themselves
    scorer = LabelScorer(LabelSet(names, TEMPLATES["photo"], independent=True, top=3), encoder)  # type: ignore[arg-type]
    images = embeddings(50)
    index, score = scorer.best(images)
    rules = "".join(
        f"  - {{id: r{i}, concept: {{any_of: [{n!r}]}}, reject: {{above: 0.99}}}}\n" for i, n in enumerate(names)
    )
    policy = compile_policy(parse_policy(f"policy: p\nversion: 1\nrules:\n{rules}"), encoder)
    values = policy.score(images, None, None, pa.table({"x": np.zeros(50)})).values
    expected = np.stack([values[f"r{i}"] for i in range(3)], axis=1)
    np.testing.assert_allclose(score, np.take_along_axis(expected, index, axis=1), rtol=1e-4)
    assert (np.diff(score, axis=1) <= 0).all()
    assert not np.allclose(score.sum(axis=1), 1, rtol=1e-2)


def test_independent_scores_of_a_sigmoid_model_are_its_sigmoid() -> None:
    encoder = FakeEncoder(score_kind="sigmoid", logit_bias=-2.0, logit_scale=12.0)
    scorer = LabelScorer(LabelSet(("cat", "dog"), ("{}",), independent=True), encoder)  # type: ignore[arg-type]
    images = embeddings(20)
    index, score = scorer.best(images)
    cosines = images.astype(float) @ np.stack([encoder.vector(name) for name in ("cat", "dog")]).T
    np.testing.assert_allclose(score, -np.sort(-1 / (1 + np.exp(2.0 - 12.0 * cosines)), axis=1), rtol=1e-4)
    np.testing.assert_array_equal(index[:, 0], cosines.argmax(axis=1))


@pytest.mark.parametrize("top", [1, 3, 80])
def test_of_labels_with_equal_scores_the_first_comes_first(top: int) -> None:
    encoder = FakeEncoder()
    names = ["b", *(f"n{i}" for i in range(100)), "a"]
    encoder.vector = lambda text: np.eye(64)[0] if text in ("a", "b") else np.eye(64)[1]  # type: ignore[method-assign]
    index, _ = LabelScorer(LabelSet(tuple(names), ("{}",), top=top), encoder).best(np.eye(64, dtype=np.float16)[:1])  # type: ignore[arg-type]
    assert index[0].tolist() == [0, 101, *range(1, 101)][:top]


def test_labels_that_make_no_sense_are_refused() -> None:
    for names, word in (((), "no labels"), (("a", ""), "empty"), (("a", "b", "a"), "twice"), (("x" * 301,), "longer")):
        with pytest.raises(RefusedError, match=word):
            LabelSet(names)
    with pytest.raises(RefusedError, match="1 or more"):
        LabelSet(("a",), top=0)
    assert parse_labels(" cat, a dog ,cow") == ("cat", "a dog", "cow")
    labels = LabelSet(("a", "b"), ("{}",), independent=True, top=2)
    assert LabelSet.from_json(json.loads(json.dumps(labels.to_json()))) == labels


def test_the_ensembles_are_whole() -> None:
    assert [len(set(TEMPLATES[name])) for name in ("imagenet", "cifar")] == [80, 18]
    assert all(template.count("{}") == 1 for templates in TEMPLATES.values() for template in templates)


# --- inputs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server over a folder."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *args: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_every_kind_of_input_and_no_image_is_lost(nano: Encoder, server: str, tmp_path: Path) -> None:
    animals = [(name, data) for name, data, _ in photos() if name.startswith("farm_")][:5]
    folder = tmp_path / "some"
    folder.mkdir()
    for name, data in animals:
        (folder / f"{name}.jpg").write_bytes(data)
    (folder / "broken.jpg").write_bytes(animals[0][1][:500])
    names = sorted(path.name for path in folder.iterdir())
    one = str(folder / f"{animals[0][0]}.jpg")
    picture = np.full((50, 40, 3), 0.5)
    given = [
        one, str(tmp_path / "nope.png"), f"{server}/some/{animals[1][0]}.jpg", f"{server}/gone.jpg",
        str(folder), str(folder / "farm_*.jpg"), animals[0][1], picture,
    ]  # fmt: skip
    told: list[int] = []
    table = found(given, nano, LabelSet(ANIMALS, top=2), on_rows=told.append)
    assert table.schema == CLASSIFIED
    inside = [f"{folder}/{name}" for name in names]
    images = [*given[:4], *inside, *[path for path in inside if "farm_" in path], "image 0", "image 1"]
    assert table["image"].to_pylist() == images
    assert sum(told) == len(images)
    errors = dict(zip(images, table["cf_error_class"].to_pylist(), strict=True))
    assert {name for name, error in errors.items() if error} == {given[1], given[3], f"{folder}/broken.jpg"}
    assert errors[given[1]] == errors[given[3]] == "missing_image"
    assert errors[f"{folder}/broken.jpg"] == "decode_error"
    best = table.filter(pc.equal(table["image"], one))["cf_labels"].to_pylist()[0]
    assert len(best) == 2
    # The same picture by path, in the folder and as bytes: the same label, whatever it was batched with.
    same = table.take([0, images.index(f"{folder}/{Path(one).name}"), len(images) - 2])
    assert len(set(same["cf_label"].to_pylist())) == 1
    np.testing.assert_allclose(same["cf_label_score"].to_numpy(), best[0]["score"], atol=1e-3)
    assert pc.sum(pc.is_null(table["cf_label"])).as_py() == 3


def test_pictures_in_memory_are_refused_where_they_are_none() -> None:
    with pytest.raises(TypeError, match="not int"):
        encode_image(3)
    for array, word in (
        (np.zeros((4, 4, 2), np.uint8), "shape"),
        (np.zeros((4, 4), np.int64), "uint8"),
        (np.full((4, 4), 2.0), "0 to 1"),
        (np.full((4, 4), np.nan), "0 to 1"),
    ):
        with pytest.raises(ValueError, match=word):
            encode_image(array)
    with pytest.raises(RefusedError, match="no images"):
        open_inputs([])
    with pytest.raises(RefusedError, match="does not exist"):
        open_inputs(["/no/such/folder"])


# --- the same as evaluate -------------------------------------------------------------------------------------------


def as_evaluated(source: Path, column: str, nano: Encoder) -> None:
    """classify's labels are right as often as `evaluate` says, in total, among five, and for each class."""
    result = evaluate(
        EvaluateRequest(DataRequest(str(source), label_column=column, batch_size=16), label_style="words")
    )
    assert result.zero_shot is not None
    truth = [str(name).replace("_", " ").lower() for name in pq.read_table(source)[column].to_pylist()]
    table = found([str(source)], nano, LabelSet(tuple(result.classes)), batch_size=16)
    best = table["cf_label"].to_pylist()
    five = [{item["label"] for item in row} for row in table["cf_labels"].to_pylist()]
    right = np.array([a == b for a, b in zip(best, truth, strict=True)])
    assert right.mean() == result.zero_shot.top1
    assert np.mean([name in some for name, some in zip(truth, five, strict=True)]) == result.zero_shot.top5
    for index, count, share in result.zero_shot.per_class:
        own = right[[name == result.classes[index] for name in truth]]
        assert (len(own), own.mean()) == (count, share)


def test_classify_is_right_exactly_as_often_as_evaluate_says(nano: Encoder, tmp_path: Path) -> None:
    some = [(name, data) for name, data, _ in photos() if name.startswith(("farm_", "drum", "horse", "kitten"))]
    names = ["horse" if "horse" in name else name.rpartition("_")[2] for name, _ in some]
    assert len(set(names)) >= 9
    images = pa.array([data for _, data in some], pa.binary())
    pq.write_table(pa.table({"image": images, "label": names}), tmp_path / "some.parquet")
    as_evaluated(tmp_path / "some.parquet", "label", nano)


@pytest.mark.integration
@pytest.mark.skipif(not (SHARED / "data/caltech101").is_dir(), reason="needs CLIPFILTER_SHARED/data/caltech101")
def test_classify_equals_evaluate_on_photos_of_caltech101(nano: Encoder, tmp_path: Path) -> None:
    whole = pq.read_table(SHARED / "data/caltech101/caltech101.parquet", columns=["image", "label"])
    pq.write_table(whole.take(pa.array(np.arange(0, whole.num_rows, 32))), tmp_path / "some.parquet")
    as_evaluated(tmp_path / "some.parquet", "label", nano)


# --- columns of a run -----------------------------------------------------------------------------------------------

LABELS = LabelSet(ANIMALS, TEMPLATES["none"], top=2)


def job(source: Path, out: Path, **more: Any) -> JobRequest:
    base = {} if (source / "plan.json").exists() else {"batch_size": BATCH}
    return JobRequest("score", str(source), str(out), engine="local", threads=1, **{**base, **more})


def rows(out: Path) -> pa.Table:
    return ds.dataset(out / "annotated").to_table().sort_by([("cf_shard", "ascending"), ("cf_row", "ascending")])


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tars(tmp_path_factory.mktemp("tars"), 2, 7)


@pytest.fixture(scope="module")
def labelled(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("labelled") / "run"
    assert run_job(job(tars, out, labels=LABELS, captions="none")).exit_code == 0
    return out


@pytest.mark.integration
def test_labels_are_columns_of_a_run_that_resumes(labelled: Path, tars: Path, nano: Encoder) -> None:
    assert verify_run(str(labelled)).problems == []
    table = rows(labelled)
    streamed = found([str(tars)], nano, LABELS)
    for name in ("cf_label", "cf_label_score", "cf_labels"):
        assert table[name].combine_chunks().equals(streamed[name].combine_chunks().cast(table[name].type)), name
    assert table["cf_decision"].null_count == 14
    before = data_files(labelled)
    again = run_job(job(tars, labelled, labels=LABELS, captions="none"))
    assert (again.rows_processed, again.exit_code) == (0, 0)
    with pytest.raises(RefusedError, match=r"another plan.*labels"):
        run_job(job(tars, labelled, labels=LabelSet(ANIMALS[:2]), captions="none"))
    assert data_files(labelled) == before


@pytest.mark.integration
def test_a_run_is_labelled_again_without_images(labelled: Path, nano: Encoder, tmp_path: Path) -> None:
    other = LabelSet(("a photo", "a drawing"), TEMPLATES["none"], independent=True)
    out = tmp_path / "other"
    assert run_job(job(labelled, out, labels=other)).exit_code == 0
    assert verify_run(str(out)).problems == []
    assert not (out / "embeddings").exists()
    table, streamed = rows(out), found([str(labelled)], nano, other)
    assert table.column_names.count("cf_label") == 1
    assert set(table["cf_label"].to_pylist()) <= set(other.names)
    assert table["cf_label_score"].to_pylist() == streamed["cf_label_score"].to_pylist()
    with pytest.raises(RefusedError, match="is used whole"):
        run_job(job(labelled, tmp_path / "x", labels=other, limit=3))
    # A run of a run leads to the run that holds the embeddings.
    assert found([str(out)], nano, other)["cf_label"].to_pylist() == table["cf_label"].to_pylist()


CONCEPTS = """
templates: none
animal: [a cat, a dog]
building:
  any_of: [a castle]
  but_not: [a landscape]
  score: margin
"""


@pytest.mark.integration
def test_score_adds_columns_as_run_scores_them_and_decides_nothing(tars: Path, tmp_path: Path) -> None:
    policy = policy_file(tmp_path, POLICY)
    decided, scored, named = (tmp_path / name for name in ("decided", "scored", "named"))
    run_job(JobRequest("run", str(tars), str(decided), policy=policy, engine="local", threads=1, batch_size=BATCH))
    assert run_job(job(tars, scored, policy=scores_of(load_policy(policy)))).exit_code == 0
    assert verify_run(str(scored)).problems == []
    assert clipfilter.open_run(scored).plan.policy is None  # nothing was decided
    a, b = rows(decided), rows(scored)
    assert b["cf_decision"].null_count == b["cf_reasons"].null_count == len(b) == 14
    for name in ("cf_similarity", "cf_score.animals", "cf_score.off-caption", "cf_score.small"):
        np.testing.assert_allclose(a[name].to_numpy(), b[name].to_numpy(), atol=1e-5)
    # Other thresholds need no other scores; another phrase does.
    changed = scores_of(parse_policy(POLICY.replace("0.70", "0.75")))
    assert run_job(job(tars, scored, policy=changed)).rows_processed == 0
    with pytest.raises(RefusedError, match="another plan"):
        run_job(job(tars, scored, policy=scores_of(parse_policy(POLICY.replace("a cat", "a kitten")))))
    (tmp_path / "concepts.yaml").write_text(CONCEPTS)
    assert run_job(job(scored, named, policy=named_scores([], str(tmp_path / "concepts.yaml")))).exit_code == 0
    assert verify_run(str(named)).problems == []
    c = rows(named)
    assert [name for name in c.column_names if name.startswith("cf_score.")] == ["cf_score.animal", "cf_score.building"]
    assert c["cf_similarity"].to_pylist() == b["cf_similarity"].to_pylist()
    assert pc.all(pc.less(pc.abs(c["cf_score.building"]), 1)).as_py()


def test_columns_of_a_score_are_named_strictly(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(CONCEPTS)
    policy = named_scores(["laion-aesthetic-v2"], str(file))
    assert [rule.id for rule in policy.rules] == ["laion-aesthetic-v2", "animal", "building"]
    assert ScorePolicy.from_canonical(policy.canonical()).sha256 == policy.sha256
    for text, word in (
        ("zebra:\n  any_off: [a]\n", r"c\.yaml:2:3: unknown key 'any_off'"),
        ("zebra: [a, 3]\n", r"c\.yaml:1:12: a phrase must be text"),
        ("[a, b]\n", "a map of names"),
        ("templates: none\n", "a map of names"),
        ("policy: x\nversion: 1\nrules: []\n", "--policy instead"),
        ("a: [x\n", r"c\.yaml:"),
    ):
        file.write_text(text)
        with pytest.raises(RefusedError, match=word):
            named_scores([], str(file))
    with pytest.raises(RefusedError, match="cannot be read"):
        named_scores([], str(tmp_path / "none.yaml"))
    with pytest.raises(RefusedError, match="did you mean 'laion-aesthetic-v2'"):
        named_scores(["laion-aesthetc-v2"])


# --- the command ----------------------------------------------------------------------------------------------------


def command(*images: str, **more: Any) -> int:
    with pytest.raises(typer.Exit) as done:
        classify_command(list(images), **{"labels": ",".join(ANIMALS), "threads": 1, **more})
    return done.value.exit_code


def test_the_command_prints_and_writes_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cat = next(data for name, data, _ in photos() if name == "farm_cat")
    (tmp_path / "[bold]cat.jpg").write_bytes(cat)
    image, missing = str(tmp_path / "[bold]cat.jpg"), str(tmp_path / "none.jpg")
    table, sheet = tmp_path / "made" / "t.parquet", tmp_path / "made" / "t.csv"
    assert command(image, missing, parquet=str(table), csv_file=str(sheet), top=2) == 3
    printed = capsys.readouterr()
    assert "a cat " in printed.out
    assert "missing_image: there is no file" in printed.out
    assert "[bold]cat.jpg" in printed.out.replace("\n", "")
    assert "1 of 2 images" in printed.err
    stored = pq.read_table(table).to_pylist()
    assert [row["cf_label"] for row in stored] == ["a cat", None]
    with sheet.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["image", "label_1", "score_1", "label_2", "score_2", "error_class", "error"]
    assert (lines[1][0], lines[1][1], lines[2][1], lines[2][5]) == (image, "a cat", "", "missing_image")
    assert float(lines[1][2]) == pytest.approx(stored[0]["cf_label_score"])
    assert command(image, missing, as_json=True, top=1, max_failures=0.5) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["images"][0] == {
        "image": image, "labels": [{"label": "a cat", "score": pytest.approx(stored[0]["cf_label_score"])}]
    }  # fmt: skip
    assert document["images"][1]["error_class"] == "missing_image"
    assert document["names"] == list(ANIMALS)


def test_the_command_refuses_what_contradicts_itself(tmp_path: Path) -> None:
    for more, word in (
        ({"labels": None}, "either --labels"),
        ({"labels_file": "x"}, "either --labels"),
        ({"templates": "phoot"}, "--templates phoot"),
        ({"out": str(tmp_path), "csv_file": "x"}, "writes Parquet itself"),
        ({"workers": 2}, "--out"),
    ):
        with pytest.raises(RefusedError, match=word):
            command("x.jpg", **more)
    with pytest.raises(RefusedError, match="--labels-file"):
        command("x.jpg", labels=None, labels_file=str(tmp_path / "none"))


def test_a_models_batch_is_no_larger_than_the_images_there_are(nano: Encoder) -> None:
    sizes: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(nano, name)

        def encode_images(self, pixels: np.ndarray) -> np.ndarray:
            sizes.append(len(pixels))
            return nano.encode_images(pixels)

    found([photos()[0][1], photos()[1][1]], Watched(), LABELS, batch_size=64)  # type: ignore[arg-type]
    assert sizes == [2]


@pytest.mark.integration
def test_a_run_is_classified_by_the_model_that_embedded_it_and_no_other(labelled: Path, nano: Encoder) -> None:
    inputs = open_inputs([str(labelled)])
    assert load_for(inputs, None, threads=1).fingerprint == nano.fingerprint
    other = copy.copy(nano)
    other.fingerprint = nano.fingerprint | {"weights_sha256": "0" * 64}
    with pytest.raises(RefusedError, match="was embedded with nano"):
        clipfilter.classify(str(labelled), ANIMALS, encoder=other)
