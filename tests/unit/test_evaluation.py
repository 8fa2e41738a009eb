"""`clipfilter evaluate`: what counts as a label or a caption in every kind of source, names, refusals, and the output."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.engine.job import JobRequest, run_job
from clipfilter.errors import RefusedError
from clipfilter.evaluation.dataset import DataRequest, EvaluationData, open_dataset
from clipfilter.evaluation.evaluate import EvaluateRequest, Evaluation, assess, evaluate
from clipfilter.evaluation.labels import name_classes, read_labels, read_templates
from clipfilter.evaluation.measures import caption_match_auc, retrieval
from clipfilter.models import Encoder, load_encoder
from clipfilter.policies.prompts import TEMPLATES
from clipfilter.policies.texts import class_vectors
from clipfilter.sources import SourceOptions
from tests.support.edition import CAPTIONS_AUC, LABELS_TOP1, RECALL_AT_10
from tests.support.engine import PHOTOS, cli, photos, samples
from tests.support.sources import write_members, write_webdataset

#: The package's face has a function of the same name.
MODULE = importlib.import_module("clipfilter.evaluation.evaluate")
TEMPLATE = ("a photo of {}",)
BATCH = 6  # the last batch is padded, and padding costs time


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return load_encoder("nano", threads=1)


def embed(nano: Encoder, source: Path, **more: Any) -> EvaluationData:
    return open_dataset(DataRequest(str(source), batch_size=BATCH, **more)).embed(nano)


def parquet(folder: Path, **columns: Any) -> Path:
    """Photographs in a Parquet file with these columns (as many rows as the first has)."""
    count = len(next(iter(columns.values())))
    path = folder / "photos.parquet"
    images = pa.array([data for _, data, _ in photos()[:count]], pa.binary())
    pq.write_table(pa.table({"image": images, **columns}), path)
    return path


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    """An ImageFolder: one folder per class, one of them nested, one image without a class."""
    for name, data, _ in photos():
        for word, folder in (("farm_", "train/farm_animal"), ("drum", "train/drums"), ("eiffel_tower", "")):
            if name.startswith(word):
                place = tmp_path / "animals" / folder
                place.mkdir(parents=True, exist_ok=True)
                (place / f"{name}.jpg").write_bytes(data)
    return tmp_path / "animals"


# --- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_run_has_the_same_bits_as_its_source_and_needs_no_images(
    nano: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = samples(20)
    for number, sample in enumerate(made):
        sample["json"]["label"] = "odd" if number % 2 else "even"
    made[3]["txt"] = " "
    made[5]["jpg"] = b"<html>"
    tar = write_webdataset(tmp_path / "tars" / "0.tar", made)
    job = JobRequest(
        "embed", str(tmp_path / "tars"), str(tmp_path / "run"), engine="local", threads=1, batch_size=BATCH
    )
    run_job(job)
    fresh = embed(nano, tmp_path / "tars")
    tar.unlink()
    stored = embed(nano, tmp_path / "run")
    for data in (fresh, stored):
        assert (data.rows, len(data.image_emb), data.failed_by_class) == (20, 19, {"decode_error": 1})
        assert [(item["key"], item["class"]) for item in data.failures] == [("000005", "decode_error")]
        assert data.image_emb.dtype == data.text_emb.dtype == np.float16
        assert 3 not in data.text_image.tolist()
        assert len(data.text_emb) == 18
    np.testing.assert_array_equal(fresh.image_emb, stored.image_emb)
    np.testing.assert_array_equal(fresh.text_emb, stored.text_emb)
    np.testing.assert_array_equal(fresh.text_image, stored.text_image)
    assert [fresh.label_values[i] for i in fresh.label_index] == [stored.label_values[i] for i in stored.label_index]
    some = embed(nano, tmp_path / "run", where=(("label", "odd"),), limit=7)
    assert (some.rows, some.label_values) == (7, ["odd"])
    odd = np.flatnonzero([stored.label_values[i] == "odd" for i in stored.label_index])[:7]
    np.testing.assert_array_equal(some.image_emb, stored.image_emb[odd])
    with pytest.raises(RefusedError, match="first caption"):
        open_dataset(DataRequest(str(tmp_path / "run"), captions="all"))
    asked = embed(nano, tmp_path / "run", options=SourceOptions(caption_column="name"), limit=4)
    np.testing.assert_allclose(asked.text_emb, nano.encode_texts([p[0] for p in photos()[:4]]), atol=1e-3)
    request = EvaluateRequest(DataRequest(str(tmp_path / "run")))
    found = run_evaluate(nano, monkeypatch, request)
    assert (found.facts["kind"], found.counts["labelled"], found.counts["captioned"]) == ("run", 19, 18)
    monkeypatch.setattr(nano, "fingerprint", dict(nano.fingerprint, weights_sha256="0" * 64))
    with pytest.raises(RefusedError, match="other weights"):
        run_evaluate(nano, monkeypatch, request)


def test_the_folder_is_the_label_where_asked(nano: Encoder, animals: Path) -> None:
    data = embed(nano, animals, label_column="folder")
    labels = [data.label_values[i] if i >= 0 else None for i in data.label_index]
    assert labels == [None, "drums", "drums"] + ["farm_animal"] * (len(labels) - 3)
    assert len(labels) > 6
    found = assess(nano, data, TEMPLATE, style="words")
    assert found.classes == ["drums", "farm animal"]
    assert found.zero_shot is not None
    assert found.zero_shot.n == len(labels) - 1
    labelled = data.label_index >= 0
    nearest = (data.image_emb.astype(np.float32) @ class_vectors(nano, found.classes, TEMPLATE).T).argmax(1)
    assert found.zero_shot.top1 == np.mean(nearest[labelled] == data.label_index[labelled])
    assert found.zero_shot.top1 > LABELS_TOP1
    assert found.retrieval is None
    assert found.caption_match is None


def test_all_captions_or_the_first(nano: Encoder, tmp_path: Path) -> None:
    names = [(name, caption) for name, _, caption in photos()[:6]]
    captions = [[caption, f"a picture of {name}"] for name, caption in names]
    captions[2] = []
    captions[4].insert(0, "")
    path = parquet(tmp_path, captions=captions)
    first, every = embed(nano, path), embed(nano, path, captions="all")
    assert first.text_image.tolist() == [0, 1, 3, 4, 5]
    assert every.text_image.tolist() == [0, 0, 1, 1, 3, 3, 4, 4, 5, 5]
    assert every.distinct_texts == 10
    np.testing.assert_allclose(every.text_emb[every.first_text], first.text_emb, atol=1e-3)
    result = assess(nano, every, TEMPLATE)
    assert result.retrieval == retrieval(every.image_emb, every.text_emb, every.text_image)
    assert result.caption_match is not None
    own = every.image_emb[[0, 1, 3, 4, 5]], every.text_emb[::2]
    assert result.caption_match.auc == caption_match_auc(*own)
    assert result.counts["captioned"] == result.caption_match.pairs == 5


def test_where_and_limit_choose_rows(nano: Encoder, tmp_path: Path) -> None:
    path = parquet(
        tmp_path, label=list("abcdef"), split=["dev", "test", None, "dev", "dev", "train"], part=[1, 1, 1, 2, 1, 1]
    )
    chosen = [
        ((("split", "dev"),), None, "ade"),
        ((("split", "dev"), ("part", "1")), None, "ae"),
        ((("split", "dev"), ("split", "test")), None, "abde"),
        ((("split", "dev"),), 2, "ad"),
        ((), 3, "abc"),
    ]
    for where, limit, labels in chosen:
        data = embed(nano, path, where=where, limit=limit)
        assert "".join(str(data.label_values[i]) for i in data.label_index) == labels
    with pytest.raises(RefusedError, match="no row"):
        embed(nano, path, where=(("split", "nothing"),))


def test_a_damaged_tar_gives_what_it_has_and_says_so(nano: Encoder, tmp_path: Path) -> None:
    made = samples(6)
    for sample in made:
        sample["cls"] = "0"
    tar = write_webdataset(tmp_path / "whole.tar", made)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    data = embed(nano, tmp_path / "tars")
    assert 0 < len(data.image_emb) < 6
    assert data.damaged_shards == ["0.tar"]
    assert data.label_values == [0]


def test_a_source_without_one_good_image_is_refused(nano: Encoder, tmp_path: Path) -> None:
    write_members(tmp_path / "0.tar", [("a.jpg", b"<html>"), ("a.txt", b"a cat")])
    with pytest.raises(RefusedError, match="none of the 1 images"):
        embed(nano, tmp_path)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "style", "classes", "index"),
    [
        (["b_B", "a"], None, "as-is", ["a", "b_B"], [1, 0]),
        (["b_B", "a"], None, "words", ["a", "b b"], [1, 0]),
        (["A_x", "a x"], None, "words", ["a x"], [0, 0]),
        ([2, 0], ["cat", "dog", "Eagle_Owl"], "words", ["cat", "dog", "Eagle_Owl"], [2, 0]),
        (["dog"], ["cat", "dog"], "as-is", ["cat", "dog"], [1]),
        ([7, 8], {"8": "cat", "7": "dog", "9": "cat"}, "as-is", ["cat", "dog"], [1, 0]),
        (["Faces_easy", "z_z"], {"Faces_easy": "a Face"}, "words", ["a Face", "z z"], [0, 1]),
    ],
)
def test_classes_are_named(labels: Any, names: Any, style: Any, classes: list[str], index: list[int]) -> None:
    found, positions = name_classes(labels, names, style)
    assert found == classes
    assert positions.tolist() == index


@pytest.mark.parametrize(
    ("labels", "names", "sentence"),
    [
        ([3], ["cat"], "label 3"),
        ([-1], ["cat"], "label -1"),
        (["dog"], ["cat"], "'dog'"),
        ([3], {"1": "cat"}, "label 3"),
        ([3], None, "label 3"),
    ],
)
def test_a_label_without_a_name_is_refused(labels: Any, names: Any, sentence: str) -> None:
    with pytest.raises(RefusedError, match=sentence):
        name_classes(labels, names)


def test_files_of_names_and_templates(tmp_path: Path) -> None:
    def written(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    assert read_labels(written("a.txt", "\ufeffcat\n dog \n\n")) == ["cat", "dog"]
    assert read_labels(written("a.json", '["cat", "dog"]')) == ["cat", "dog"]
    assert read_labels(written("b.json", '{"0": "cat"}')) == {"0": "cat"}
    for bad in ("", "3", "[]", "{}", "[1]", '{"a": [1]}', '["a", ""]'):
        with pytest.raises(RefusedError, match="--labels"):
            read_labels(written("bad.json", bad))
    for path in (written("empty.txt", "\n"), str(tmp_path / "none.txt"), str(tmp_path)):
        with pytest.raises(RefusedError, match="--labels"):
            read_labels(path)
    assert read_templates("photo") == TEMPLATES["photo"]
    assert read_templates(written("t.txt", "a photo of a {}.\n\n{}\n")) == ("a photo of a {}.", "{}")
    for bad in ("a photo", "{} and {}", ""):
        with pytest.raises(RefusedError, match="template"):
            read_templates(written("t.txt", bad))
    with pytest.raises(RefusedError, match="neither"):
        read_templates("phto")


# --- requests -------------------------------------------------------------------------------------------------------


def numbers(folder: Path, **more: Any) -> EvaluateRequest:
    return EvaluateRequest(DataRequest(str(parquet(folder, label=[0, 1, 1], **more)), batch_size=BATCH))


@pytest.mark.parametrize(
    ("request_of", "sentence"),
    [
        (lambda f: EvaluateRequest(DataRequest(str(parquet(f, score=[1.5])))), "neither labels nor captions"),
        (lambda f: EvaluateRequest(DataRequest(str(f / "nothing"))), "nothing"),
        (lambda f: EvaluateRequest(DataRequest(str(parquet(f, label=["a"])), label_column="lable")), "'lable'.*label"),
        (lambda f: EvaluateRequest(DataRequest(str(parquet(f, score=[1.5])), label_column="score")), "'score' holds"),
        (lambda f: EvaluateRequest(DataRequest(str(parquet(f, label=["a"])), where=(("splt", "x"),))), "'splt'.*label"),
        (lambda f: EvaluateRequest(DataRequest(str(parquet(f, label=["a"], x=[[1]])), where=(("x", "1"),))), "'x'"),
        (lambda f: EvaluateRequest(DataRequest(str(parquet(f, label=["a"]))), templates="phto"), "phto"),
        (lambda f: EvaluateRequest(DataRequest(str(PHOTOS)), labels=str(PHOTOS / "captions.jsonl")), "--label-column"),
        (numbers, "--labels FILE"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_model_is_loaded(
    request_of: Callable[[Path], EvaluateRequest], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **__: Any) -> None:
        pytest.fail("the model was loaded")

    monkeypatch.setattr(MODULE, "load_encoder", loaded)
    with pytest.raises(RefusedError, match=sentence):
        evaluate(request_of(tmp_path))


def run_evaluate(nano: Encoder, monkeypatch: pytest.MonkeyPatch, request: EvaluateRequest) -> Evaluation:
    """`evaluate` with the model that is loaded already."""
    monkeypatch.setattr(MODULE, "load_encoder", lambda *_, **__: nano)
    return evaluate(request)


def test_numbers_for_labels_are_passed_over_where_captions_are(
    nano: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    captions = ["the same words", "the same words", "other words"]
    found = run_evaluate(nano, monkeypatch, numbers(tmp_path, caption=captions))
    assert found.zero_shot is None
    assert found.counts["labelled"] == 0
    assert found.caption_match is not None
    notes = "\n".join(found.notes)
    assert "--labels FILE" in notes
    assert "only 2 of 3 captions are different" in notes


def test_texts_beyond_the_context_are_counted(nano: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = "word " * 300
    path = parquet(tmp_path, label=["cat", long], caption=[long, "a cat"])
    found = run_evaluate(nano, monkeypatch, EvaluateRequest(DataRequest(str(path), batch_size=BATCH), templates="none"))
    assert (found.counts["captions_truncated"], found.counts["prompts_truncated"]) == (1, 1)
    assert any("1 captions are longer" in note for note in found.notes)


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_the_sample_photographs(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = cli("evaluate", str(PHOTOS), "--json", "--out", str(out), "--threads", "1", check=False)
    assert done.returncode == 3  # 3 of 97 images are broken on purpose
    assert "3 of 97 rows" in done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text())
    assert (result["rows"], result["images"], result["captioned"]) == (97, 94, 93)
    assert {item["key"] for item in result["failures"]} == {"huge.png", "truncated.jpg", "not_found.jpg"}
    assert result["fingerprint"]["weights_sha256"]
    assert result["zero_shot"] is None
    assert result["caption_match"]["auc"] > CAPTIONS_AUC
    assert result["retrieval"]["text_to_image"]["10"] > RECALL_AT_10
    assert result["retrieval"]["text_to_image"]["10"] >= result["retrieval"]["text_to_image"]["5"]


def test_the_table(animals: Path) -> None:
    (animals / "bad.jpg").write_bytes(b"<html>")
    done = cli(
        "evaluate", str(animals), "--label-column", "folder", "--label-style", "words", "--max-failures", "0.2",
        "--threads", "1", "--batch-size", "6",
    )  # fmt: skip
    words = " ".join(done.stdout.split())
    assert "zero-shot classes top-1 top-5 mean per class" in words
    assert "worst classes images top-1" in words
    assert "farm animal" in words
    assert "failed: 1 decode_error (bad.jpg)" in words
    assert "retrieval" not in words


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--where", "split"], "COLUMN=VALUE"),
        (["--out", "/nowhere/at/all.json"], "--out"),
        (["--captions", "max"], "captions"),
    ],
)
def test_refusals_have_one_sentence_and_exit_code_2(more: list[str], sentence: str) -> None:
    done = cli("evaluate", str(PHOTOS), *more, check=False)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
