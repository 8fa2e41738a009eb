"""`clipfilter models`: find, look at, download and export models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfilter.cli.options import Json
from clipfilter.cli.printing import print_json, say, stdout

if TYPE_CHECKING:
    from clipfilter.models import Encoder, TorchEncoder

Name = Annotated[str, typer.Argument(metavar="NAME", help="A model as --model takes it.")]

#: Rows that int8 scales are chosen on; the others are measured.
_CALIBRATION_BATCHES = 2
_MIN_MEASURED = 8

models_app = typer.Typer(no_args_is_help=True, help="Find, look at, download and export models.", rich_markup_mode=None)


@models_app.command("list")
def list_(
    pattern: Annotated[
        str | None, typer.Argument(metavar="[PATTERN]", help="Part of a name, or a pattern such as 'ViT-L-14*'.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the models that have names, and which of them are on this machine."""
    from clipfilter.errors import RefusedError
    from clipfilter.models import OTHER_NAMES, find_model, list_models

    found = list_models() if pattern is None else find_model(pattern)
    if not found:
        raise RefusedError(f"no model's name holds {pattern!r}: `clipfilter models list` lists all")
    if as_json:
        print_json([entry.to_json() for entry in found])
        return
    from rich import box
    from rich.table import Table

    console = stdout()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("model", overflow="fold")
    for title in ("dim", "pixels", "tokens"):
        table.add_column(title, justify="right")
    table.add_column("here")
    for entry in found:
        numbers = (str(entry.dim), str(entry.image_size), str(entry.context_length))
        table.add_row(entry.name, *numbers, "yes" if entry.cached else "")
    console.print(table)
    if pattern is None:
        console.print("and by path or repository:", style="dim")
        for name, meaning in OTHER_NAMES:
            say(console, f"  {name:<26} {meaning}")


@models_app.command("download")
def download(name: Name) -> None:
    """Fetch a model's weights and tokenizer into the cache, for use without a network."""
    from clipfilter.models import download_model as fetch

    typer.echo(fetch(name))


@models_app.command("show")
def show(name: Name, as_json: Json = False) -> None:
    """Load a model and print what it is: size, preprocessing, score, fingerprint, and what int8 costs."""
    from clipfilter.models import load_encoder

    facts = _facts(load_encoder(name))
    if as_json:
        print_json(facts, ascii_only=False)
        return
    preprocess, fingerprint = facts["preprocess"], facts["fingerprint"]
    lines = {
        "model": facts["name"],
        "parameters": f"{facts['parameters']:,}",
        "size": f"{facts['bytes'] / 1e6:,.1f} MB",
        "dimension": facts["dim"],
        "context": f"{facts['context_length']} tokens",
        "image": f"{preprocess['size']} x {preprocess['size']}, {preprocess['resize_mode']}, {preprocess['interpolation']}",
        "mean, std": ", ".join(f"{value:.4g}" for value in (*preprocess["mean"], *preprocess["std"])),
        "activation": fingerprint.get("activation", "the architecture's own"),
        "dtype": facts["dtype"],
        "score": facts["score_kind"],
        "logit scale": f"{facts['logit_scale']:.4g}"
        + ("" if facts["logit_bias"] is None else f", bias {facts['logit_bias']:.4g}"),
        "architecture": fingerprint["architecture"],
        "weights": fingerprint["weights_sha256"],
        "backend": fingerprint["backend"],
    }
    if facts["note"]:
        lines["note"] = facts["note"]
    for label, value in lines.items():
        typer.echo(f"{label:<14} {value}")


@models_app.command("export")
def export(
    name: Name,
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="Folder to write; it must not exist.")],
    int8: Annotated[bool, typer.Option("--int8", help="int8 linear layers, for CPUs; needs --measure.")] = False,
    measure: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Images to choose int8 scales on and to measure their cost.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", "-p", help="Also count the decisions of this policy that int8 changes.")
    ] = None,
    limit: Annotated[int, typer.Option(min=16, help="Only the first N rows of --measure.")] = 500,
    as_json: Json = False,
) -> None:
    """Write a model as ONNX graphs, which --model onnx:DIR runs on ONNX Runtime."""
    from clipfilter.errors import RefusedError
    from clipfilter.models import export_onnx, load_encoder, loss_note
    from clipfilter.policies import load_policy
    from clipfilter.sources import open_source
    from clipfilter.storage import local_path

    if int8 != (measure is not None):
        raise RefusedError("--int8 changes every vector and --measure SOURCE says how much: give both, or neither")
    if policy is not None and not int8:
        raise RefusedError("--policy counts the decisions that int8 changes: give it with --int8 and --measure SOURCE")
    loaded = load_policy(policy) if policy is not None else None
    source = open_source(measure) if measure is not None else None
    encoder: Any = load_encoder(name)
    out = local_path(to)
    if source is None:
        report = export_onnx(encoder, out)
    else:
        calibration, judge = _measuring(encoder, source, limit, loaded)
        report = export_onnx(encoder, out, int8=True, calibration=calibration, judge=judge)
    note = loss_note(report.config)
    if as_json:
        facts = {"folder": str(report.folder), "bytes": report.bytes, "note": note, "config": report.config}
        print_json(facts, ascii_only=False)
        return
    worst = max(report.config["parity"].values())
    typer.echo(f"{report.folder} ({report.bytes / 1e6:,.1f} MB); largest 1 - cosine to {name} before int8: {worst:.0e}")
    if note:
        typer.echo(note)
        for tower, reason in report.config["quantisation"]["reasons"].items():
            typer.echo(f"the {tower} tower stays float32: {reason}")
    typer.echo(f"use it with --model onnx:{to}")


def _measuring(
    encoder: TorchEncoder, source: Any, limit: int, policy: Any
) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """What int8 scales are chosen on, and the judge of the result, on other rows of the same source."""
    from clipfilter.errors import RefusedError
    from clipfilter.evaluation import agreement, read_sample
    from clipfilter.models import Calibration

    sample = read_sample(source, encoder.preprocess, limit)
    batches = len(sample.batches)
    chosen, measured = sample.split(min(_CALIBRATION_BATCHES, batches // 2))
    if not chosen.batches or measured.rows < _MIN_MEASURED:
        raise RefusedError(f"{source.url} has too few rows to choose int8 scales and measure them: give a few hundred")
    calibration = Calibration(chosen.pixels(), chosen.captions())

    def judge(reference: Encoder, other: Encoder) -> dict[str, Any]:
        return agreement(reference, other, measured, policy)

    return calibration, judge


def _facts(encoder: Any) -> dict[str, Any]:
    """What `show` prints, as JSON."""
    from clipfilter.models import ONNX_PREFIX, folder_size, loss_note, read_folder, weight_size
    from clipfilter.storage import local_path

    note = None
    if encoder.name.startswith(ONNX_PREFIX):
        folder = local_path(encoder.name.removeprefix(ONNX_PREFIX))
        config = read_folder(folder)
        parameters, size = config["parameters"], folder_size(folder)
        note = loss_note(config)
    else:
        parameters, size = weight_size(encoder)
    return {
        "name": encoder.name,
        "parameters": parameters,
        "bytes": size,
        "dim": encoder.dim,
        "context_length": encoder.context_length,
        "preprocess": encoder.preprocess.to_json(),
        "dtype": encoder.fingerprint.get("quantisation", encoder.fingerprint["dtype"]),
        "score_kind": encoder.score_kind,
        "logit_scale": encoder.logit_scale,
        "logit_bias": encoder.logit_bias,
        "fingerprint": encoder.fingerprint,
        "note": note,
    }
