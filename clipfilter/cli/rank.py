"""`rank`: candidate images for a prompt, best first."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfilter.cli.jobs import BatchSize, Decode, DecodeOption, Device, Dtype, Json, Threads

if TYPE_CHECKING:
    import pyarrow as pa

_BAR = 20


def rank(
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="Image files, URLs, folders or globs, a dataset, or a run.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", help="What the images should show.")],
    by: Annotated[
        str, typer.Option(help="clip (similarity to the prompt), head:NAME (its score), or policy:NAME.")
    ] = "clip",
    policy: Annotated[
        str | None, typer.Option("--policy", "-p", help="Drop what this policy rejects; the prompt is the caption.")
    ] = None,
    top: Annotated[int | None, typer.Option("-k", "--top", min=1, help="Only the best K.")] = None,
    model: Annotated[
        str | None, typer.Option(help="As for embed [default: nano; of a run, the model that embedded it].")
    ] = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    decode: DecodeOption = Decode.fast,
    as_json: Json = False,
) -> None:
    """Order images by how well they fit a prompt; what a policy rejects drops out, with the reason."""
    from clipfilter.cli.evaluate import row_progress
    from clipfilter.engine import EXIT_DONE, EXIT_FAILURES, embed_stream, open_inputs, stream_options
    from clipfilter.operations import Ranker

    inputs = open_inputs(images)
    encoder, options = stream_options(
        inputs, model, device=device, dtype=dtype.value if dtype else None, threads=threads, batch_size=batch_size,
        decode=decode.value,
    )  # fmt: skip
    ranker = Ranker(encoder, by, policy)
    lost: list[dict[str, str]] = []
    with row_progress() as on_rows:
        table = ranker.rank_embedded(prompt, embed_stream(inputs, encoder, options, on_rows, lost))
    rows = _rows(table, top)
    if as_json:
        head = {"prompt": prompt, "model": encoder.fingerprint["model"], "by": by, "policy": policy}
        print(json.dumps({**head, "images": rows, "failed_shards": lost}, indent=1, ensure_ascii=False))
    else:
        _print(rows, ranker.by, lost)
    failed = any(row["error_class"] for row in rows)
    raise typer.Exit(EXIT_FAILURES if failed or lost else EXIT_DONE)


def _rows(table: pa.Table, top: int | None) -> list[dict[str, Any]]:
    """The best `top`, and all that dropped out."""
    rows = [
        {
            "rank": row["rank"],
            "image": row["image"],
            "score": row["score"],
            "similarity": row["cf_similarity"],
            "decision": row["cf_decision"],
            "reasons": row["cf_reasons"],
            "error_class": row["cf_error_class"],
            "error": row["cf_error"],
        }
        for row in table.to_pylist()
    ]
    return [row for row in rows if top is None or row["rank"] is None or row["rank"] <= top]


def _print(rows: list[dict[str, Any]], by: str, lost: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from clipfilter.report import text

    console = Console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("rank", justify="right")
    table.add_column("image", overflow="fold")
    table.add_column(text.clean(by, 40), justify="right")
    if by != "clip":
        table.add_column("clip", justify="right")
    table.add_column()
    ranked = [row["score"] for row in rows if row["rank"] and row["score"] is not None]
    low, high = (min(ranked), max(ranked)) if ranked else (0.0, 0.0)
    for row in rows:
        name = Text(text.clean(row["image"]))
        if row["error_class"] is not None:
            why = Text(f"{row['error_class']}: {text.clean(row['error'], 80)}", "magenta")
        elif row["rank"] is None:
            why = Text(f"rejected: {_reasons(row)}", "red")
        elif row["decision"] == "review":
            why = Text(f"review: {_reasons(row)}", "yellow")
        else:
            share = (row["score"] - low) / (high - low) if row["score"] is not None and high > low else 1.0
            why = Text("█" * round(_BAR * share) or "▏", "green")
        numbers = [row["score"]] + ([row["similarity"]] if by != "clip" else [])
        cells = ["" if value is None else f"{value:.3f}" for value in numbers]
        table.add_row("" if row["rank"] is None else str(row["rank"]), name, *cells, why)
    console.print(table)
    for item in lost:
        console.print(Text(f"shard {item['path']}: {item['error']}", "red"), soft_wrap=True)


def _reasons(row: dict[str, Any]) -> str:
    found = (
        [reason for reason in row["reasons"] or [] if reason["band"] == (row["decision"] or "")] or row["reasons"] or []
    )
    return "; ".join(
        f"{reason['rule']} {'has no score' if reason['score'] is None else _number(reason)}" for reason in found
    )


def _number(reason: dict[str, Any]) -> str:
    sign = ">" if reason["score"] > reason["threshold"] else "<"
    return f"{reason['score']:.3g} {sign} {reason['threshold']:.3g}"


def add_to(app: typer.Typer) -> None:
    app.command("rank")(rank)
