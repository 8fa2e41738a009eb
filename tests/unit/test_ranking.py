"""Ranking: order, rejects, failures, and the best of what a pipeline generates."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
import typer
from PIL import Image

import clipfilter
from clipfilter.cli.rank import rank as rank_command
from clipfilter.engine.stream import embed_stream, open_inputs
from clipfilter.errors import RefusedError
from clipfilter.models import Encoder, load_encoder
from clipfilter.models.heads import HeadFile
from clipfilter.operations.rank import RANKED, Ranker, best_of, rank
from clipfilter.policies import parse_policy
from clipfilter.runs.columns import as_matrix
from pipelines.rank_generated import Shapes, main
from tests.support.engine import photos

POLICY_TEXT = """
policy: ranking-test
version: 1
rules:
  - {id: cats, concept: {any_of: ["a cat"]}, reject: {above: 0.9}}
  - {id: off-prompt, alignment: {}, reject: {below: 0.0}}
  - {id: flat, metadata: height, review: {below: 150}}
"""
POLICY = parse_policy(POLICY_TEXT)


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return load_encoder("nano", threads=1)


@pytest.fixture(scope="module")
def animals() -> dict[str, bytes]:
    wanted = ("farm_cat", "farm_dog", "farm_cow", "farm_pig", "eiffel_tower")
    return {name: data for name, data, _ in photos() if name in wanted}


def names(table: Any, images: dict[str, bytes]) -> list[str]:
    keys = list(images)
    return [keys[position] for position in table["position"].to_pylist()]


def test_candidates_are_ordered_by_their_cosine_to_the_prompt(nano: Encoder, animals: dict[str, bytes]) -> None:
    table = rank("a photo of a pig", list(animals.values()), encoder=nano)
    assert table.schema == RANKED
    assert names(table, animals)[0] == "farm_pig"
    assert table["rank"].to_pylist() == [1, 2, 3, 4, 5]
    (shard,) = embed_stream(open_inputs(list(animals.values())), nano)
    text = nano.encode_texts(["a photo of a pig"])[0].astype(np.float16).astype(np.float32)
    cosines = as_matrix(shard.embeddings["image_emb"], nano.dim).astype(np.float32) @ text
    assert table["position"].to_pylist() == np.argsort(-cosines).tolist()
    np.testing.assert_allclose(table["score"].to_numpy(), -np.sort(-cosines), atol=1e-6)
    assert table["cf_similarity"].equals(table["score"])


def test_pictures_in_memory_rank_as_their_files_do(nano: Encoder, animals: dict[str, bytes], tmp_path: Any) -> None:
    files, pictures, arrays = [], [], []
    for name, data in animals.items():
        image = Image.open(io.BytesIO(data))
        image.save(tmp_path / f"{name}.png")
        files.append(str(tmp_path / f"{name}.png"))
        pictures.append(image)
        arrays.append(np.asarray(image) / 255)
    tables = [rank("a dog", given, encoder=nano) for given in (files, pictures, arrays)]
    assert names(tables[0], animals)[0] == "farm_dog"
    for table in tables[1:]:
        assert table["position"].equals(tables[0]["position"])
        assert table["score"].equals(tables[0]["score"])


def test_rejects_drop_out_with_the_reason_and_review_comes_last(
    nano: Encoder, animals: dict[str, bytes], tmp_path: Any
) -> None:
    flat = Image.open(io.BytesIO(animals["farm_cow"])).crop((0, 0, 200, 120))
    given = [*animals.values(), flat, b"no image"]
    prompt = "a photo of a cat or a cow"
    table = rank(prompt, given, policy=POLICY, encoder=nano)
    cat = list(animals).index("farm_cat")
    order, decisions = table["position"].to_pylist(), table["cf_decision"].to_pylist()
    assert decisions == [*sorted(decisions[:-2], key=["keep", "review"].index), "reject", None]
    assert order[-2:] == [cat, len(given) - 1]
    assert table["rank"].to_pylist() == [*range(1, len(given) - 1), None, None]
    assert table["cf_error_class"].to_pylist()[-1] == "decode_error"
    rejected = table.slice(len(given) - 2, 1).to_pylist()[0]
    assert [(reason["rule"], reason["band"], reason["nearest"]) for reason in rejected["cf_reasons"]] == [
        ("cats", "reject", "a cat")
    ]
    assert len(animals) in [p for p, d in zip(order, decisions, strict=True) if d == "review"]
    # The prompt is the caption that alignment compares with; without a policy the cat would have been ranked.
    assert all("off-prompt" not in str(row) for row in table["cf_reasons"].to_pylist())
    assert rank(prompt, given, encoder=nano)["rank"].null_count == 1
    (tmp_path / "p.yaml").write_text(POLICY_TEXT)
    assert rank(prompt, given, by=f"policy:{tmp_path}/p.yaml", encoder=nano).equals(table)


def test_a_head_orders_by_its_score(nano: Encoder, animals: dict[str, bytes], tmp_path: Any) -> None:
    tower = nano.encode_texts(["a photo of the Eiffel Tower"])
    model = {
        "model": nano.fingerprint["model"],
        "dim": str(nano.dim),
        "weights_sha256": nano.fingerprint["weights_sha256"],
    }
    how = {"clipfilter_head": "1", "layers": "1", "activation": "none", "final": "none"}
    tensors = {"layers.0.weight": tower, "layers.0.bias": np.zeros(1, np.float32)}
    HeadFile(tensors, {**model, **how}).write(tmp_path / "tower.safetensors")
    table = rank("a cow", list(animals.values()), by=f"head:file:{tmp_path}/tower.safetensors", encoder=nano)
    assert names(table, animals)[0] == "eiffel_tower"
    assert names(rank("a cow", list(animals.values()), encoder=nano), animals)[0] == "farm_cow"
    scores = table["score"].to_pylist()
    assert scores == sorted(scores, reverse=True)
    assert table["cf_similarity"].to_pylist()[0] < max(table["cf_similarity"].to_pylist())


def test_what_cannot_be_ranked_is_refused(nano: Encoder, animals: dict[str, bytes]) -> None:
    images = list(animals.values())
    fraction = parse_policy("""
policy: top
version: 1
rules:
  - {id: match, alignment: {}, reject: {below: 0.0}}
  - {id: best, fraction: {of: match}, reject: {outside_top: 0.5}}
""")
    for more, word in (
        ({"by": "beauty"}, "no order 'beauty'"),
        ({"by": "head:beauty"}, "no head"),
        ({"by": "head:laion-aesthetic-v2"}, "is for embeddings of"),
        ({"policy": fraction}, "whole dataset"),
        ({"by": "policy:caption-match", "policy": POLICY}, "two policies"),
    ):
        with pytest.raises(RefusedError, match=word):
            rank("a cow", images, encoder=nano, **more)
    with pytest.raises(RefusedError, match="prompt is empty"):
        rank("  ", images, encoder=nano)
    with pytest.raises(RefusedError, match="no images"):
        rank("a cow", [], encoder=nano)


# --- generated images -----------------------------------------------------------------------------------------------


def test_the_best_of_what_a_pipeline_draws(nano: Encoder) -> None:
    best = best_of(Shapes(), "a red circle", 24, 2, encoder=nano, seed=100)
    assert len(best.images) == len(best.seeds) == 2
    drawn = Shapes()("x", generator=[torch.Generator().manual_seed(seed) for seed in range(100, 124)]).images
    cosines = clipfilter.embed(drawn, encoder=nano).image_emb @ nano.encode_texts(["a red circle"])[0]
    assert best.seeds == (100 + np.argsort(-cosines)[:2]).tolist()
    assert best.table.num_rows == 24
    assert best.table["image"].to_pylist()[0] == f"seed {best.seeds[0]}"
    # A candidate is its seed: neither the batch nor how many there are changes it.
    one = Shapes()("x", generator=[torch.Generator().manual_seed(best.seeds[0])]).images[0]
    assert one.tobytes() == best.images[0].tobytes()
    batched = best_of(Shapes(), "a red circle", 24, 2, encoder=nano, seed=100, batch_size=7)
    assert batched.seeds == best.seeds


@pytest.mark.parametrize(
    ("prompt", "colour"),
    [
        ("a red circle", (255, 0, 0)),
        ("a red square", (255, 0, 0)),
        ("a black square", (0, 0, 0)),
        ("a green circle", (0, 128, 0)),
    ],
)
def test_the_best_picture_has_the_colour_of_the_prompt(nano: Encoder, prompt: str, colour: tuple[int, ...]) -> None:
    best = best_of(Shapes(), prompt, 24, 1, encoder=nano, seed=100)
    assert colour in {found for _, found in best.images[0].getcolors()}


def test_what_a_policy_rejects_is_never_the_best(nano: Encoder) -> None:
    policy = parse_policy("policy: p\nversion: 1\nrules:\n  - {id: no, alignment: {}, reject: {below: 0.99}}\n")
    best = best_of(Shapes(), "a red circle", 3, 2, encoder=nano, policy=policy, seed=1)
    assert (best.images, best.seeds) == ([], [])
    assert best.table["cf_decision"].to_pylist() == ["reject"] * 3
    assert pc.all(pc.equal(pc.list_value_length(best.table["cf_reasons"]), 1)).as_py()


def test_the_pipeline_is_called_as_diffusers_pipelines_are(nano: Encoder) -> None:
    calls: list[dict[str, Any]] = []

    def pipeline(prompt: str, *, num_images_per_prompt: int, generator: Any, **options: Any) -> Any:
        calls.append(
            {"prompt": prompt, "n": num_images_per_prompt, "seeds": [g.initial_seed() for g in generator], **options}
        )
        return SimpleNamespace(images=np.zeros((num_images_per_prompt, 40, 40, 3), np.float32))  # output_type="np"

    best = best_of(pipeline, "a cow", 5, 9, encoder=nano, seed=7, batch_size=2, guidance_scale=7.5)
    assert [(call["n"], call["seeds"]) for call in calls] == [(2, [7, 8]), (2, [9, 10]), (1, [11])]
    assert all(call["prompt"] == "a cow" and call["guidance_scale"] == 7.5 for call in calls)
    assert best.seeds == [7, 8, 9, 10, 11]  # equal scores keep their order
    short = lambda prompt, **options: SimpleNamespace(images=[])  # noqa: E731
    with pytest.raises(ValueError, match="asked for 1 images and gave 0"):
        best_of(short, "a cow", 2, encoder=nano)
    with pytest.raises(ValueError, match="1 or more"):
        best_of(pipeline, "a cow", 2, 0, encoder=nano)
    before = len(calls)
    with pytest.raises(RefusedError, match="no order"):
        best_of(pipeline, "a cow", 2, by="x", encoder=nano)
    assert len(calls) == before, "nothing is generated for a request that is refused"


def test_the_example_script_keeps_the_best(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main(["a red circle", "--n", "8", "--k", "3", "--out", str(tmp_path / "best"), "--device", "cpu", "--seed", "5"])
    ranking = json.loads((tmp_path / "best" / "ranking.json").read_text())
    kept = sorted(path.name for path in (tmp_path / "best").glob("*.png"))
    assert kept == [f"{row['rank']}-{row['image'].replace(' ', '-')}.png" for row in ranking[:3]]
    assert len(capsys.readouterr().out.splitlines()) == len(ranking) == 8


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_command_shows_the_order_and_why_others_dropped_out(
    animals: dict[str, bytes], tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for name, data in animals.items():
        (tmp_path / f"{name}.jpg").write_bytes(data)
        paths.append(str(tmp_path / f"{name}.jpg"))
    (tmp_path / "p.yaml").write_text(
        "policy: p\nversion: 1\nrules:\n  - {id: cats, concept: {any_of: [a cat]}, reject: {above: 0.9}}\n"
    )
    with pytest.raises(typer.Exit) as done:
        rank_command(paths, prompt="a cow", policy=str(tmp_path / "p.yaml"), top=2, as_json=True, threads=1)
    assert done.value.exit_code == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["rank"] for row in found["images"]] == [1, 2, None]
    assert found["images"][0]["image"].endswith("farm_cow.jpg")
    assert found["images"][2]["decision"] == "reject"
    with pytest.raises(typer.Exit) as done:
        rank_command([*paths, str(tmp_path / "gone.jpg")], prompt="a cow", policy=str(tmp_path / "p.yaml"), threads=1)
    assert done.value.exit_code == 3
    printed = capsys.readouterr().out.replace("\n", "")
    assert "rejected: cats" in printed
    assert "missing_image" in printed


def test_ranking_is_part_of_the_api() -> None:
    assert clipfilter.rank is rank
    assert clipfilter.best_of is best_of
    assert clipfilter.Ranker is Ranker
