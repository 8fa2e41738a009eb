"""`rank`: candidate images for a prompt, best first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfilter import columns as cf
from clipfilter import defaults
from clipfilter.cli import options as o
from clipfilter.cli.printing import bar, new_table, print_json, say, stdout

if TYPE_CHECKING:
    import pyarrow as pa

_BAR = 20


@o.grouped
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
    model: o.ModelOfSource = None,
    threads: o.Threads = None,
    device: o.Device = defaults.DEVICE,
    *,
    batches: o.Batches,
    as_json: o.Json = False,
) -> None:
    """Order images by how well they fit a prompt; what a policy rejects drops out, with the reason."""
    from clipfilter.cli.display import row_progress
    from clipfilter.engine import EXIT_DONE, EXIT_FAILURES, embed_stream, open_inputs, stream_options
    from clipfilter.operations import Ranker

    inputs = open_inputs(images)
    encoder, options = stream_options(inputs, model, device=device, threads=threads, **vars(batches))
    ranker = Ranker(encoder, by, policy)
    lost: list[dict[str, str]] = []
    with row_progress() as on_rows:
        ranked = ranker.rank_embedded(prompt, embed_stream(inputs, encoder, options, on_rows, lost))
    rows = _rows(ranked, top)
    if as_json:
        head = {"prompt": prompt, "model": encoder.fingerprint["model"], "by": by, "policy": policy}
        print_json({**head, "images": rows, "failed_shards": lost}, ascii_only=False)
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
            "similarity": row[cf.SIMILARITY],
            "decision": row[cf.DECISION],
            "reasons": row[cf.REASONS],
            "error_class": row[cf.ERROR_CLASS],
            "error": row[cf.ERROR],
        }
        for row in table.to_pylist()
    ]
    return [row for row in rows if top is None or row["rank"] is None or row["rank"] <= top]


def _print(rows: list[dict[str, Any]], by: str, lost: list[dict[str, str]]) -> None:
    from rich.text import Text

    from clipfilter import text

    console = stdout()
    found = new_table(">rank", "image", f">{text.clean(by, 40)}", *([">clip"] if by != "clip" else []), "")
    found.columns[1].overflow = "fold"
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
            why = Text(bar(share, _BAR), "green")
        numbers = [row["score"]] + ([row["similarity"]] if by != "clip" else [])
        cells = ["" if value is None else f"{value:.3f}" for value in numbers]
        found.add_row("" if row["rank"] is None else str(row["rank"]), name, *cells, why)
    console.print(found)
    for item in lost:
        say(console, f"shard {item['path']}: {item['error']}", style="red")


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
