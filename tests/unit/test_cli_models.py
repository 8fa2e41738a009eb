"""`clipfilter models`: what it prints, and what it refuses before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from clipfilter.cli.main import add_commands
from clipfilter.errors import RefusedError
from clipfilter.models import load_encoder
from clipfilter.models.nano import WEIGHTS
from tests.support.engine import PHOTOS


def run(*arguments: str) -> str:
    """What `clipfilter models ARGUMENTS` prints; exceptions come through."""
    app = typer.Typer()
    add_commands(app)
    app.callback()(lambda: None)
    result = CliRunner().invoke(app, ["models", *arguments], catch_exceptions=False)
    if isinstance(result.exception, RefusedError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list_finds_names_and_says_what_is_here() -> None:
    everything = json.loads(run("list", "--json"))
    names = [entry["name"] for entry in everything]
    assert names[0] == "nano"
    assert len(names) == len(set(names)) > 100
    assert {"ViT-B-32/openai", "RN50/openai", "ViT-L-14-336/openai", "ViT-B-16-SigLIP/webli"} <= set(names)
    nano = load_encoder("nano")
    assert (everything[0]["dim"], everything[0]["cached"]) == (nano.dim, True)
    found = json.loads(run("list", "vit-l-14-336*", "--json"))
    assert {entry["name"].partition("/")[0] for entry in found} <= {"ViT-L-14-336", "ViT-L-14-336-quickgelu"}
    assert all(entry["image_size"] == 336 for entry in found)
    assert "ViT-B-32/laion2b_s34b_b79k" in run("list", "laion2b_s34b_b79k")
    assert "onnx:DIR" in run("list")
    with pytest.raises(RefusedError, match="no model's name holds 'nothing-like-it'"):
        run("list", "nothing-like-it")


def test_download_gives_the_bundled_weights_and_refuses_what_is_here(tmp_path: Path) -> None:
    assert run("download", "nano").strip() == str(WEIGHTS)
    with pytest.raises(RefusedError, match="nothing to download"):
        run("download", f"ViT-B-32={tmp_path}/x.safetensors")


def test_show_says_what_a_model_is() -> None:
    nano = load_encoder("nano")
    facts = json.loads(run("show", "nano", "--json"))
    assert facts["fingerprint"] == nano.fingerprint
    assert facts["preprocess"] == nano.preprocess.to_json()
    assert (facts["dim"], facts["context_length"], facts["logit_scale"]) == (
        nano.dim,
        nano.context_length,
        nano.logit_scale,
    )
    assert (facts["dtype"], facts["score_kind"], facts["note"]) == ("fp32", "softmax", None)
    assert 30_000_000 < facts["parameters"] < 50_000_000
    assert facts["bytes"] == 4 * facts["parameters"]
    table = run("show", "nano")
    assert f"{facts['parameters']:,}" in table
    assert nano.fingerprint["weights_sha256"] in table


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(RefusedError, match="unknown model"):
        run("show", "nanoo")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--int8"], "--measure SOURCE"),
        (["--measure", str(PHOTOS)], "--int8"),
        (["--policy", "demo"], "--int8 and --measure"),
        (["--int8", "--measure", "/nowhere"], "nowhere"),
        (["--int8", "--measure", str(PHOTOS), "--policy", "no-such-policy"], "no-such-policy"),
    ],
)
def test_export_checks_its_options_first(tmp_path: Path, options: list[str], says: str) -> None:
    with pytest.raises(RefusedError, match=says):
        run("export", "nano", "--to", str(tmp_path / "out"), *options)
    assert list(tmp_path.iterdir()) == []


def test_export_never_overwrites(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
    with pytest.raises(RefusedError, match="exists"):
        run("export", "nano", "--to", str(tmp_path))


@pytest.mark.integration
def test_agreement_counts_rows_and_changed_decisions(tmp_path: Path) -> None:
    """Of a model with itself nothing changes; of one whose images are turned around, decisions do."""
    from clipfilter.evaluation.agreement import agreement, read_sample
    from clipfilter.policies import load_policy
    from clipfilter.sources import open_source

    nano: Any = load_encoder("nano")
    sample = read_sample(open_source(str(PHOTOS)), nano.preprocess, 16)
    assert sample.rows == 16
    readable = len(sample.pixels())
    policy = load_policy("demo")
    same = agreement(nano, nano, sample, policy)
    assert same["images"] == {"n": readable, "mean": 1.0, "min": 1.0}
    assert same["texts"]["mean"] == 1.0
    assert same["policy"] == {"name": policy.name, "version": policy.version, "rows": readable, "changed": 0}

    class Turned:
        def __getattr__(self, name: str) -> Any:
            return getattr(nano, name)

        def encode_images(self, pixels: Any) -> Any:
            return -nano.encode_images(pixels)

    turned = agreement(nano, Turned(), sample, policy)
    assert turned["images"]["mean"] == -1.0
    assert turned["texts"]["min"] == 1.0
    assert turned["policy"]["changed"] > readable / 2
