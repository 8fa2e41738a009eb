"""Encoders: loading and refusing, what nano knows, and equality with open_clip's own forward."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from clipfilter.errors import RefusedError
from clipfilter.images.preprocess import prepare
from clipfilter.models import Encoder, load_encoder
from clipfilter.models._torch import torch_with_torchvision
from tests.support.edition import EDITION

torch_with_torchvision()

import open_clip  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

# How far one row may move when other rows share its batch: kernels may sum in another order, nothing more.
NEIGHBOUR_BOUND = 2e-6

pytestmark = pytest.mark.fresh


@pytest.fixture(scope="module")
def nano() -> Encoder:
    return load_encoder("nano")


@pytest.fixture(scope="module")
def vit_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A randomly initialised ViT-B-32 as a safetensors file."""
    path = tmp_path_factory.mktemp("weights") / "vit-b-32.safetensors"
    torch.manual_seed(0)
    model = open_clip.create_model("ViT-B-32", pretrained_text=False)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def vit(vit_checkpoint: Path) -> Encoder:
    return load_encoder(f"ViT-B-32={vit_checkpoint}")


def noise(n: int, size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 3, size, size), dtype=np.uint8)


# --- nano


def test_nano_gives_unit_vectors_of_its_dimension(nano: Encoder) -> None:
    images = nano.encode_images(noise(6, nano.preprocess.size))
    texts = nano.encode_texts(["a dog", "a red car", ""])
    assert images.shape == (6, nano.dim)
    assert texts.shape == (3, nano.dim)
    assert images.dtype == texts.dtype == np.float32
    for rows in (images, texts):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)


def test_nano_loads_without_what_only_other_tools_need() -> None:
    """timm imports wandb where it is installed, which takes most of a second and writes nothing here."""
    program = (
        "import sys; from clipfilter.models import load_encoder; load_encoder('nano'); "
        "assert 'timm' in sys.modules; print('wandb' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def test_the_tests_know_this_edition(nano: Encoder) -> None:
    assert nano.fingerprint["model"] == EDITION


def test_nano_is_deterministic_and_a_second_load_is_the_same_model(nano: Encoder) -> None:
    pixels, texts = noise(5, nano.preprocess.size), ["a cat on a sofa", "two men play football"]
    again = load_encoder(nano.fingerprint["model"])
    assert again.fingerprint == nano.fingerprint
    np.testing.assert_array_equal(nano.encode_images(pixels), nano.encode_images(pixels))
    np.testing.assert_array_equal(nano.encode_images(pixels), again.encode_images(pixels))
    np.testing.assert_array_equal(nano.encode_texts(texts), again.encode_texts(texts))


def test_a_row_does_not_depend_on_its_batch_neighbours(nano: Encoder) -> None:
    pixels = noise(7, nano.preprocess.size)
    together = nano.encode_images(pixels)
    alone = np.concatenate([nano.encode_images(pixels[i : i + 1]) for i in range(7)])
    assert np.abs(together - alone).max() <= NEIGHBOUR_BOUND
    texts = ["a dog", "a much longer sentence about a man who rides a bicycle through the rain " * 3, "x", "😀"]
    together = nano.encode_texts(texts)
    alone = np.concatenate([nano.encode_texts([text]) for text in texts])
    assert np.abs(together - alone).max() <= NEIGHBOUR_BOUND
    np.testing.assert_allclose(nano.encode_texts(texts[::-1])[::-1], together, atol=NEIGHBOUR_BOUND)


def test_an_empty_batch_gives_no_rows(nano: Encoder) -> None:
    assert nano.encode_images(noise(0, nano.preprocess.size)).shape == (0, nano.dim)
    assert nano.encode_texts([]).shape == (0, nano.dim)
    assert nano.count_truncated([]) == 0


def test_long_texts_are_truncated_and_counted(nano: Encoder) -> None:
    fits, long = "word " * (nano.context_length - 2), "word " * (nano.context_length - 1)
    assert nano.count_truncated([fits, long, "short"]) == 1
    longer = nano.encode_texts([long, long + " and an end that is never read"])
    np.testing.assert_array_equal(longer[0], longer[1])


@pytest.mark.parametrize(
    "text", ["", " ", "😀🎉", "x" * 10_000, "word " * 2_000, "日本語のテキスト", "\x00\ufffd", "[SEP] [PAD]"]
)
def test_odd_texts_give_finite_unit_vectors(nano: Encoder, text: str) -> None:
    vector = nano.encode_texts([text, "a dog"])
    assert np.isfinite(vector).all()
    assert np.linalg.norm(vector[0]) == pytest.approx(1, abs=1e-5)


def test_nano_names_what_real_photos_show(nano: Encoder) -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image has the photographs for this test")
    # The astronaut's portrait among these photographs is not here: nano takes it for the rocket behind her (model card).
    photos = {
        "a photo of a cat": data.chelsea(),
        "a cup of coffee": data.coffee(),
        "a rocket on its launch pad": data.rocket(),
    }
    images = nano.encode_images(np.stack([prepare(photo, nano.preprocess) for photo in photos.values()]))
    scores = images @ nano.encode_texts(list(photos)).T
    assert scores.argmax(1).tolist() == [0, 1, 2]
    assert scores.argmax(0).tolist() == [0, 1, 2]
    against = nano.encode_texts(["a photo of a handgun", "a bottle of wine", "a screenshot of text"])
    assert (scores.diagonal() > (images @ against.T).max(1)).all()


def test_wrong_pixels_are_an_error(nano: Encoder) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        nano.encode_images(noise(1, 32))
    with pytest.raises(ValueError, match="expected uint8"):
        nano.encode_images(noise(1, nano.preprocess.size).astype(np.float32))


def test_nano_in_bfloat16_is_the_same_model_to_two_digits(nano: Encoder) -> None:
    half = load_encoder("nano", dtype="bf16")
    pixels, texts = noise(2, nano.preprocess.size), ["a dog in the snow", "a handgun"]
    assert (half.encode_images(pixels) * nano.encode_images(pixels)).sum(1).min() > 0.99
    assert (half.encode_texts(texts) * nano.encode_texts(texts)).sum(1).min() > 0.99
    assert half.fingerprint["dtype"] == "bf16"
    assert half.fingerprint["weights_sha256"] == nano.fingerprint["weights_sha256"]


def test_the_bundled_files_stay_small() -> None:
    import clipfilter.models.nano as package

    assert package.WEIGHTS.stat().st_size <= 48_000_000


# --- open_clip


def test_a_local_checkpoint_equals_open_clips_own_forward(vit: Encoder, vit_checkpoint: Path) -> None:
    encoder = vit
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32")
    model.load_state_dict(load_file(vit_checkpoint))
    model.eval()
    from PIL import Image

    rgb = np.random.default_rng(1).integers(0, 256, (3, 300, 260, 3), dtype=np.uint8)
    texts = ["a dog", "", "a man who rides a bicycle through the rain while it is getting dark", "word " * 200, "😀"]
    with torch.no_grad():
        images = model.encode_image(torch.stack([transform(Image.fromarray(x)) for x in rgb]), normalize=True)
        vectors = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts), normalize=True)
    mine = encoder.encode_images(np.stack([prepare(x, encoder.preprocess) for x in rgb]))
    assert (mine * images.numpy()).sum(1).min() > 1 - 1e-6
    assert (encoder.encode_texts(texts) * vectors.numpy()).sum(1).min() > 1 - 1e-6
    # Cut to the longest text of the batch or not, alone or together.
    short = np.concatenate([encoder.encode_texts([text]) for text in texts])
    assert np.abs(short - encoder.encode_texts(texts)).max() <= NEIGHBOUR_BOUND
    assert encoder.count_truncated(texts) == 1
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert (encoder.dim, encoder.context_length, encoder.score_kind) == (512, 77, "softmax")


def test_preprocessing_is_bit_identical_to_open_clips(vit: Encoder) -> None:
    from PIL import Image

    from clipfilter.models.encoder import TorchEncoder

    encoder = vit
    assert isinstance(encoder, TorchEncoder)
    transform = open_clip.image_transform(224, is_train=False)
    rgb = np.random.default_rng(2).integers(0, 256, (333, 257, 3), dtype=np.uint8)
    mine = encoder.normalise(prepare(rgb, encoder.preprocess)[None])
    assert torch.equal(mine[0], transform(Image.fromarray(rgb)))


def test_the_fingerprint_names_the_weights_not_their_folder(vit: Encoder, vit_checkpoint: Path, tmp_path: Path) -> None:
    moved = tmp_path / vit_checkpoint.name
    os.link(vit_checkpoint, moved)
    here, there = vit.fingerprint, load_encoder(f"ViT-B-32={moved}").fingerprint
    assert here == there
    assert here["activation"] == "gelu"
    quick = load_encoder(f"ViT-B-32-quickgelu={vit_checkpoint}")
    assert quick.fingerprint["activation"] == "quick_gelu"


def test_very_long_words_do_not_stall_the_tokenizer(vit: Encoder) -> None:
    letters = "".join(np.random.default_rng(0).choice(list("abcdefghijklmnopqrstuvwxyz"), 10_000))
    assert np.isfinite(vit.encode_texts([letters, "a" * 10_000])).all()


# --- refusals: each names what is wrong


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nanoo", "unknown model"),
        ("nano@99", r"bundles nano@\d+, not nano@99"),
        ("ViT-B-3", "did you mean ViT-B-32"),
        ("ViT-B-32", "ViT-B-32/openai"),
        ("ViT-B-32/nonsense", "no weights called 'nonsense'"),
        ("ViT-B-32=/nowhere/weights.safetensors", "does not exist"),
    ],
)
def test_unknown_models_are_refused(name: str, says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        load_encoder(name)


def test_unknown_dtype_device_and_threads_are_refused() -> None:
    with pytest.raises(RefusedError, match="fp32"):
        load_encoder("nano", dtype="int3")  # type: ignore[arg-type]
    with pytest.raises(RefusedError, match="cpu"):
        load_encoder("nano", device="abacus")
    with pytest.raises(RefusedError, match="threads"):
        load_encoder("nano", threads=0)


def test_a_truncated_checkpoint_is_refused(vit_checkpoint: Path, tmp_path: Path) -> None:
    for suffix in ("safetensors", "pt"):
        cut = tmp_path / f"cut.{suffix}"
        with vit_checkpoint.open("rb") as file:
            cut.write_bytes(file.read(1_000_000))
        with pytest.raises(RefusedError, match=r"damaged|more than weights"):
            load_encoder(f"ViT-B-32={cut}")


class _Touch:
    """Unpickling this creates a file: what a hostile checkpoint would do with worse."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    zipped, plain = tmp_path / "zip.pt", tmp_path / "plain.bin"
    torch.save({"state_dict": _Touch(mark)}, zipped)
    plain.write_bytes(pickle.dumps(_Touch(mark), protocol=2))
    for path in (zipped, plain):
        with pytest.raises(RefusedError, match=r"more than weights|damaged"):
            load_encoder(f"ViT-B-32={path}")
    assert not mark.exists()


def test_a_checkpoint_of_another_architecture_is_refused(vit_checkpoint: Path) -> None:
    with pytest.raises(RefusedError, match="does not fit the architecture ViT-S-32"):
        load_encoder(f"ViT-S-32={vit_checkpoint}")


def test_weights_that_cannot_be_downloaded_say_where_to_put_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip.pretrained

    def offline(*args: object, **kwargs: object) -> str:
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip.pretrained, "download_pretrained", offline)
    with pytest.raises(RefusedError, match=r"huggingface\.co/.*ViT-B-32=/path/to") as refused:
        load_encoder("ViT-B-32/laion2b_s34b_b79k")
    assert "no route to host" in str(refused.value)
