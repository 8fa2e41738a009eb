"""The Python API: `import clipfilter` is light, results are Arrow and NumPy, and they are those of a run."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import clipfilter
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.errors import RefusedError
from clipfilter.models import Encoder
from tests.support.engine import POLICY, REPO, photos, policy_file, samples
from tests.support.sources import write_webdataset

BATCH = 6
CATS = "policy: cats\nversion: 1\nrules:\n  - {id: cats, concept: {any_of: [a cat]}, reject: {above: 0.9}}\n"


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return clipfilter.load_encoder("nano", threads=1)


@pytest.fixture(scope="module")
def animals() -> list[bytes]:
    wanted = ("farm_cat", "farm_dog", "farm_cow")
    return [data for name, data, _ in photos() if name in wanted]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decided run of 12 photographs, of which one is broken."""
    folder = tmp_path_factory.mktemp("run")
    made = samples(12)
    made[4]["jpg"] = b"<html>"
    write_webdataset(folder / "tars" / "0.tar", made[:7])
    write_webdataset(folder / "tars" / "1.tar", made[7:])
    job = JobRequest(
        "run", str(folder / "tars"), str(folder / "out"), policy=policy_file(folder, POLICY), engine="local", threads=1,
        batch_size=BATCH, copy=False, max_failures=1.0,
    )  # fmt: skip
    run_job(job)
    return folder / "out"


def test_importing_clipfilter_imports_nothing_heavy() -> None:
    code = """
import sys, clipfilter
assert not {"numpy", "pyarrow", "torch", "pydantic"} & set(sys.modules), "import clipfilter is heavy"
import clipfilter.search  # the package, under the name of the function
assert callable(clipfilter.search)
from clipfilter import *
assert set(clipfilter.__all__) <= set(dir(clipfilter))
assert all(getattr(clipfilter, name) is not None for name in clipfilter.__all__)
assert "torch" not in sys.modules, "using the API's names loads torch"
try:
    clipfilter.serach
except AttributeError as error:
    assert "serach" in str(error)
else:
    raise AssertionError
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_embeddings_are_arrays_and_rows_are_tables(nano: Encoder, animals: list[bytes]) -> None:
    found = clipfilter.embed([*animals, b"no image"], encoder=nano)
    assert (found.image_emb.dtype, found.image_emb.shape) == (np.float16, (3, nano.dim))
    np.testing.assert_allclose(np.linalg.norm(found.image_emb.astype(np.float32), axis=1), 1, atol=1e-3)
    assert found.rows["image"].to_pylist() == ["image 0", "image 1", "image 2"]
    assert found.failed.to_pylist()[0]["image"] == "image 3"
    assert found.failed.to_pylist()[0]["cf_error_class"] == "decode_error"
    with Image.open(io.BytesIO(animals[0])) as image:
        assert found.rows["cf_width"].to_pylist()[0] == image.width
        one = clipfilter.embed(image, encoder=nano)
    np.testing.assert_allclose(one.image_emb[0], found.image_emb[0], atol=2e-3)
    with pytest.raises(RefusedError, match="no images"):
        clipfilter.embed([], encoder=nano)


def test_it_works_where_an_event_loop_runs(nano: Encoder, animals: list[bytes]) -> None:
    """As in a notebook's cell."""

    async def cell() -> pa.Table:
        return clipfilter.classify(animals, "a cat, a dog, a cow", encoder=nano, k=1)

    table = asyncio.run(cell())
    assert sorted(table["cf_label"].to_pylist()) == ["a cat", "a cow", "a dog"]
    own = clipfilter.classify(animals, ["cat", "dog", "cow"], templates=["a photo of a {}."], encoder=nano)
    assert [label.split()[-1] for label in table["cf_label"].to_pylist()] == own["cf_label"].to_pylist()


def test_a_policy_decides_images_and_embeddings_alike(nano: Encoder, animals: list[bytes]) -> None:
    policy = clipfilter.Policy.parse(CATS)
    table = policy.decide([*animals, b"no image"], encoder=nano)
    assert table.column_names == [
        "image", "cf_similarity", "cf_score.cats", "cf_decision", "cf_reasons", "cf_error_class", "cf_error"
    ]  # fmt: skip
    assert sorted(table["cf_decision"].to_pylist()[:3]) == ["keep", "keep", "reject"]
    assert table.to_pylist()[3]["cf_decision"] is None
    assert table.to_pylist()[3]["cf_error_class"] == "decode_error"
    reject = next(row for row in table.to_pylist() if row["cf_decision"] == "reject")
    assert reject["cf_reasons"][0]["rule"] == "cats"
    found = clipfilter.embed([*animals, b"no image"], encoder=nano)  # the same batch, and so the same bits
    again = policy.decide(image_emb=found.image_emb.astype(np.float32), encoder=nano)
    for name in ("cf_score.cats", "cf_decision", "cf_reasons"):
        assert again[name].to_pylist() == table[name].to_pylist()[:3]
    assert repr(policy) == "Policy('cats', version 1, 1 rules)"


def test_captions_sizes_and_ranks_reach_the_rules(nano: Encoder, animals: list[bytes]) -> None:
    policy = clipfilter.Policy.parse("""
policy: all
version: 1
rules:
  - {id: match, alignment: {}, reject: {below: 0.15}}
  - {id: short, metadata: caption_words, review: {below: 2}}
  - {id: side, metadata: min_side, reject: {below: 100}}
  - {id: best, fraction: {of: match}, reject: {outside_top: 0.5}}
""")
    order = [name for name, _, _ in photos() if name in ("farm_cat", "farm_dog", "farm_cow")]
    assert order == ["farm_cat", "farm_dog", "farm_cow"]
    captions = ["a cat", "dog", None]
    table = policy.decide(animals, captions=captions, encoder=nano)
    assert table["cf_score.short"].to_pylist()[:2] == [2.0, 1.0]
    assert table["cf_similarity"].to_pylist()[2] is None
    assert table["cf_decision"].to_pylist()[2] == "review"  # no caption: on_missing
    ranked = table["cf_score.best"].to_pylist()[:2]
    assert (table["cf_decision"].to_pylist()[0] == "reject") == (ranked[0] < ranked[1])
    found = clipfilter.embed(animals, encoder=nano)
    again = policy.decide(image_emb=found.image_emb, captions=captions, columns=found.rows, encoder=nano)
    for name in ("cf_similarity", "cf_score.side", "cf_decision"):
        assert again[name].to_pylist() == table[name].to_pylist(), name
    for more, word in (
        ({"captions": ["one"]}, "fewer captions"),
        ({"captions": ["x"] * 4}, "more captions"),
        ({"image_emb": found.image_emb}, "either images or image_emb"),
    ):
        with pytest.raises(ValueError, match=word):
            policy.decide(animals, encoder=nano, **more)
    for emb, word in ((found.image_emb[:, :5], r"\[n, "), (found.image_emb * np.float16(2), "unit norm")):
        with pytest.raises(ValueError, match=word):
            policy.decide(image_emb=emb, encoder=nano)


def test_a_policy_that_is_not_there_is_refused() -> None:
    assert clipfilter.Policy.load("caption-match").name == "caption-match"
    with pytest.raises(clipfilter.RefusedError, match="no policy pack"):
        clipfilter.Policy.load("nothing")


@pytest.mark.integration
def test_a_run_is_read_and_used_without_its_images(run: Path, nano: Encoder) -> None:
    opened = clipfilter.open_run(run)
    assert (len(opened.versions), opened.totals["rows"], opened.totals["failed"]) == (1, 12, 1)
    assert repr(opened).endswith("version 1, 12 rows)")
    rows = pa.Table.from_batches(opened.rows())
    assert rows.num_rows == 11
    assert pa.Table.from_batches(opened.rows(["cf_key", "cf_decision"])).column_names == ["cf_key", "cf_decision"]
    assert pa.Table.from_batches(opened.failed())["cf_key"].to_pylist() == ["000004"]
    blocks = list(opened.embeddings())
    assert all(block.dtype == np.float16 and not block.flags.writeable for block in blocks)
    stored = np.concatenate(blocks)
    found = clipfilter.embed(str(run), captions=True, encoder=nano)
    np.testing.assert_array_equal(found.image_emb, stored)
    assert found.rows["image"].to_pylist() == rows["cf_key"].to_pylist()
    cosines = np.vecdot(found.image_emb.astype(np.float32), found.text_emb.astype(np.float32))
    np.testing.assert_allclose(cosines, rows["cf_similarity"].to_numpy(), atol=1e-6)
    # The policy of the run decides as the run did, from images that are long gone.
    decided = clipfilter.Policy.parse(POLICY).decide(str(run), encoder=nano)
    good = decided.filter(decided["cf_decision"].is_valid())
    assert good["cf_decision"].to_pylist() == rows["cf_decision"].to_pylist()
    assert good["cf_reasons"].to_pylist() == rows["cf_reasons"].to_pylist()
    result = clipfilter.search(run, "a photo of a cat", k=3, encoder=nano)
    assert result.hits.num_rows == 3
    emb = nano.encode_texts(["a photo of a cat"])[0]
    best = int((stored.astype(np.float32) @ emb).argmax())
    assert result.hits["cf_key"].to_pylist()[0] == rows["cf_key"].to_pylist()[best]
    with pytest.raises(RefusedError, match="is not a run directory"):
        clipfilter.open_run(run.parent)


@pytest.mark.integration
def test_a_dataset_is_embedded_as_a_run_embeds_it(run: Path, nano: Encoder) -> None:
    fresh = clipfilter.embed(str(run.parent / "tars"), captions=True, encoder=nano, batch_size=BATCH)
    np.testing.assert_array_equal(fresh.image_emb, np.concatenate(list(clipfilter.open_run(run).embeddings())))
    assert fresh.rows["number"].to_pylist() == [number for number in range(12) if number != 4]
    assert fresh.failed["image"].to_pylist() == ["000004"]
    assert fresh.text_emb is not None
    assert fresh.text_emb.shape == (11, nano.dim)
