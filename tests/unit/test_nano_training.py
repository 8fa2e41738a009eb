"""How nano was taught: the visual thesaurus is sound, made-up features show their classes, the weights learned both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from clipfilter.models._torch import torch_with_torchvision

torch_with_torchvision()

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from clipfilter.models import Encoder, load_encoder  # noqa: E402
from clipfilter.models.nano import NANO_CONFIG, WEIGHTS  # noqa: E402
from clipfilter.models.nano.network import unpack  # noqa: E402

TOOLS = Path(__file__).resolve().parents[2] / "tools" / "nano"
LARGEST_FILE = 48_000_000  # bytes: what a wheel may carry


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    for name in ("features", "init_weights", "looks_like", "pictures", "train", "wordnet"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return load_encoder("nano")


def test_every_line_of_the_thesaurus_spreads_one_over_real_classes(tools: None) -> None:
    from looks_like import read_looks

    looks = read_looks()
    assert len(looks) > 800
    assert sum(len(look.terms) for look in looks) > 3000
    for look in looks:
        assert sum(look.classes.values()) == pytest.approx(1)
        assert all(0 <= index < 1000 and share > 0 for index, share in look.classes.items())
        assert all(term == term.strip() and term for term in look.terms)


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["cat\ttabby, no such beast"], "no such beast"),
        (["bird\tcrane"], None),  # the machine; "crane bird" is the other one
        (["coat\tcardigan"], "cardigan"),  # a dog and a garment: must say which
        (["cat\ttabby", "dog; cat\tbeagle"], "stands twice"),
    ],
)
def test_the_thesaurus_refuses_what_is_no_class(
    tools: None, tmp_path: Path, lines: list[str], complaint: str | None
) -> None:
    from looks_like import read_looks

    path = tmp_path / "looks.tsv"
    path.write_text("# a comment\n" + "\n".join(lines) + "\n", encoding="utf-8")
    if complaint is None:
        assert read_looks(path)[0].classes == {517: 1.0}
    else:
        with pytest.raises(SystemExit, match=complaint):
            read_looks(path)


def test_made_up_features_show_their_classes(tools: None) -> None:
    from train import SHOWN, Vocabulary

    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(1000, 256, generator=generator)
    photos = torch.randn(500, 256, generator=generator).relu()
    nouns = {
        "vectors": torch.randn(40, 384, generator=generator),
        "paths": torch.arange(40 * 2).view(40, 2) + 1,
        "class_paths": torch.arange(1000 * 2).view(1000, 2) + 1,
    }
    looks = {
        "vectors": torch.randn(20, 384, generator=generator),
        "lines": torch.arange(20) // 2,
        "classes": torch.eye(1000)[:10],
    }
    vocabulary = Vocabulary(nouns, looks, photos, weight, torch.tensor([3]), 0.2)
    assert len(vocabulary.unseen_looks) == 4  # both phrases of two of ten lines
    assert len(vocabulary.nouns) == 39  # without the noun of class 3
    assert torch.equal(vocabulary.targets.float().argmax(1)[:40], torch.arange(40))

    shown = torch.arange(200)[:, None].expand(-1, SHOWN)
    features = vocabulary.make_up(photos[:200], shown, generator)
    logits, before = features @ weight.T, photos[:200] @ weight.T
    raised = (logits - before).gather(1, shown[:, :1])
    assert raised.mean() > 5
    assert (logits.argmax(1) == shown[:, 0]).float().mean() > (before.argmax(1) == shown[:, 0]).float().mean() + 0.2

    _, fit, texts, targets = vocabulary.draw(photos[:64], generator)
    assert fit.shape == (64, len(texts)) == (64, len(targets))
    assert bool((((fit.sum(1) - 1).abs() < 1e-4) | (fit.sum(1) == 0)).all())


def test_pictures_of_like_names_are_no_contrast_and_names_of_many_pictures_come_less_often(tools: None) -> None:
    from train import Pictures

    texts = F.normalize(torch.randn(5, 384, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts[1] = F.normalize(texts[0] + 0.1 * texts[2], dim=-1)  # "scissors" and "a pair of scissors"
    names = torch.tensor([0] * 90 + [1] * 5 + [3] * 5)
    features = torch.arange(100.0).expand(2, 1280, 100).transpose(1, 2)
    pictures = Pictures(
        {"features": features, "texts": texts, "names": names, "own": [[i] for i in names.tolist()]}, 0.0
    )
    drawn, told, alike = pictures.draw(20, torch.Generator().manual_seed(0))
    shown = names[drawn[:, 0].long()]
    torch.testing.assert_close(told, texts[shown])
    family = shown.masked_fill(shown < 2, 0)
    assert torch.equal(alike, (family[:, None] == family[None]).fill_diagonal_(False))
    assert (shown == 0).float().mean() < 0.8  # 90 % of the pictures
    held = Pictures({"features": features, "texts": texts, "names": names, "own": [[i] for i in names.tolist()]}, 0.5)
    assert set(names[held.unseen].tolist()).isdisjoint(names[held.draw(5, torch.Generator())[0][:, 0].long()].tolist())


def test_a_figure_is_cut_out_and_pasted_onto_something_else(tools: None) -> None:
    import io
    import random

    import numpy as np
    from pictures import clean, pasted
    from PIL import Image, ImageDraw

    def jpeg(image: Image.Image) -> bytes:
        out = io.BytesIO()
        image.save(out, "JPEG", quality=95)
        return out.getvalue()

    drawing = Image.new("RGB", (200, 160), "white")
    ImageDraw.Draw(drawing).ellipse((40, 30, 160, 130), fill=(200, 0, 0))
    photo = jpeg(Image.new("RGB", (300, 200), (0, 90, 0)))
    for seed in range(12):
        pixels = pasted(jpeg(drawing), [photo], random.Random(seed)).astype(int)
        assert pixels.shape == (3, 240, 240)
        assert (pixels.min(0) > 240).mean() < 0.3  # hardly any white is left, unless white is the plain colour drawn
        red = (pixels[0] > 150) & (pixels[1] < 70) & (pixels[2] < 70)
        assert 0.15 < red.mean() < 0.95
    full = Image.fromarray(np.random.default_rng(0).integers(0, 120, (100, 100, 3), dtype=np.uint8))
    assert pasted(jpeg(full), [photo], random.Random(0)).max() < 160  # fills its frame: a crop of itself
    assert clean("The_Pair of  Scissors-02.") == "pair of scissors"


@pytest.mark.parametrize(
    ("text", "looks"),
    [
        ("a photo of an owl", {24}),
        ("a wedding", {578, 982}),  # gown, groom
        ("a photo of a telephone", {487, 528, 707}),
        ("mountains", {970, 979, 980}),
        ("an airplane in the sky", {404, 895, 908}),
    ],
)
def test_texts_point_at_the_classes_that_such_photos_light_up(nano: Encoder, text: str, looks: set[int]) -> None:
    config = json.loads(NANO_CONFIG.read_text(encoding="utf-8"))["network"]
    vectors = F.normalize(unpack(load_file(WEIGHTS))["image_head.class_vectors"], dim=-1)
    block = torch.from_numpy(nano.encode_texts([text]))[0, config["caption_dim"] :]
    assert int((vectors @ block).argmax()) in looks


def test_the_file_stays_small() -> None:
    assert WEIGHTS.stat().st_size <= LARGEST_FILE
