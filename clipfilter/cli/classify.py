"""`classify`: which of some labels fits each image best."""

from __future__ import annotations

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfilter.cli.jobs import (
    Address,
    BatchSize,
    Decode,
    DecodeOption,
    Device,
    Dtype,
    Engine,
    EngineOption,
    ImageColumn,
    Json,
    MaxFailures,
    Quiet,
    Threads,
    Workers,
    run_command,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

    from clipfilter.policies import LabelSet

_BAR = 24
_IN_FULL = 12  # images with all their labels and a bar each; more get a line
_LISTED = 200  # lines on a terminal
_COUNTED = 20


def classify(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="Image files, URLs, folders or globs, a dataset, or a run (path or URL)."
        ),
    ],
    labels: Annotated[str | None, typer.Option(help="The labels, with commas between them: cat,dog.")] = None,
    labels_file: Annotated[str | None, typer.Option(help="The labels: JSON list, or text with one per line.")] = None,
    templates: Annotated[
        str, typer.Option(help="Named prompt ensemble (photo, imagenet, cifar, none, ...) or a file, one per line.")
    ] = "photo",
    independent: Annotated[
        bool, typer.Option("--independent", help="Score each label on its own; the scores need not add up to 1.")
    ] = False,
    top: Annotated[int, typer.Option("-k", "--top", min=1, help="Labels per image.")] = 5,
    model: Annotated[
        str | None, typer.Option(help="As for embed [default: nano; of a run, the model that embedded it].")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Add the labels as columns to a whole dataset: a run directory, resumed."),
    ] = None,
    as_json: Json = False,
    csv_file: Annotated[str | None, typer.Option("--csv", metavar="FILE", help="Write a CSV file.")] = None,
    parquet: Annotated[str | None, typer.Option(metavar="FILE", help="Write a Parquet file.")] = None,
    engine: EngineOption = Engine.auto,
    address: Address = None,
    workers: Workers = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = None,
    batch_size: BatchSize = None,
    decode: DecodeOption = Decode.fast,
    image_column: ImageColumn = None,
    max_failures: MaxFailures = 0.01,
    quiet: Quiet = False,
) -> None:
    """Say which of some labels fits each image best, without training (zero-shot classification)."""
    from clipfilter.errors import RefusedError

    wanted = _label_set(labels, labels_file, templates, independent, top)
    if out is not None:
        if len(images) != 1 or csv_file or parquet:
            raise RefusedError(
                "--out takes one dataset or run, and writes Parquet itself; leave out --csv and --parquet."
            )
        run_command(
            "score", _print_counts, source=images[0], out=out, labels=wanted, captions="none", model=model,
            engine=engine, address=address, workers=workers, threads=threads, device=device, dtype=dtype,
            batch_size=batch_size, decode=decode, image_column=image_column, max_failures=max_failures,
            as_json=as_json, quiet=quiet, dry_run=False,
        )  # fmt: skip
        return
    if address is not None or workers is not None:
        raise RefusedError("--address and --workers are for whole datasets; name a run directory with --out.")
    options: dict[str, Any] = {
        "threads": threads, "device": device, "dtype": dtype.value if dtype else None, "batch_size": batch_size,
        "decode": decode.value, "image_column": image_column,
    }  # fmt: skip
    _classify(images, wanted, model, options, csv_file, parquet, as_json, quiet, max_failures)


def _label_set(labels: str | None, labels_file: str | None, templates: str, independent: bool, top: int) -> LabelSet:
    from clipfilter.errors import RefusedError
    from clipfilter.evaluation import read_labels, read_templates
    from clipfilter.policies import LabelSet, parse_labels

    if (labels is None) == (labels_file is None):
        raise RefusedError("name the labels, with either --labels cat,dog or --labels-file FILE.")
    if labels is not None:
        names = parse_labels(labels)
    else:
        found = read_labels(str(labels_file), "--labels-file")
        names = tuple(dict.fromkeys(found.values() if isinstance(found, dict) else found))
    return LabelSet(names, read_templates(templates), independent=independent, top=top)


def _classify(
    images: list[str],
    labels: LabelSet,
    model: str | None,
    options: dict[str, Any],
    csv_file: str | None,
    parquet: str | None,
    as_json: bool,
    quiet: bool,
    max_failures: float,
) -> None:
    from clipfilter.cli.evaluate import row_progress
    from clipfilter.engine import EXIT_DONE, EXIT_FAILURES, StoredRun, open_inputs, stream_options
    from clipfilter.operations import classify_stream
    from clipfilter.policies import LabelScorer
    from clipfilter.sources import SourceOptions

    inputs = open_inputs(images, SourceOptions(image_column=options.pop("image_column")))
    encoder, streaming = stream_options(inputs, model, **options)
    scorer = LabelScorer(labels, encoder)
    lost: list[dict[str, str]] = []
    counts: Counter[str | None] = Counter()
    with row_progress() as on_rows:
        tables = _counted(classify_stream(inputs, scorer, encoder, streaming, on_rows, lost), counts)
        sinks = [sink for sink in (_csv(csv_file, labels), _parquet(parquet)) if sink is not None]
        shown: list[dict[str, Any]] = []
        if as_json:
            _print_json(_through(tables, sinks), labels, encoder.fingerprint["model"], lost)
        else:
            for table in _through(tables, sinks):
                shown += table.slice(0, max(0, _LISTED - len(shown))).to_pylist()
    if not as_json and not quiet:
        _print(shown, counts, scorer, lost, [name for name in (csv_file, parquet) if name])
    if all(isinstance(item, StoredRun) for item in inputs):  # its failures were judged when it was made
        raise typer.Exit(EXIT_DONE)
    rows, failed = counts.total(), counts[None]
    if lost or failed > max_failures * rows:
        print(
            f"clipfilter: {failed:,} of {rows:,} images and {len(lost)} shards could not be read; the limit is "
            f"{max_failures:.1%} of the images (--max-failures) and no shard.",
            file=sys.stderr,
        )
        raise typer.Exit(EXIT_FAILURES)
    raise typer.Exit(EXIT_DONE)


def _counted(tables: Iterable[pa.Table], counts: Counter[str | None]) -> Iterator[pa.Table]:
    for table in tables:
        counts.update({item["values"]: item["counts"] for item in table["cf_label"].value_counts().to_pylist()})
        yield table


def _through(tables: Iterable[pa.Table], sinks: list[Any]) -> Iterator[pa.Table]:
    """The tables, each written to every sink as it passes."""
    try:
        for table in tables:
            for sink in sinks:
                sink.write(table)
            yield table
    finally:
        for sink in sinks:
            sink.close()


class _Csv:
    """image, then label_1, score_1, label_2, ... best first, then the error of an image that failed."""

    def __init__(self, path: str, labels: LabelSet) -> None:
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._k = min(labels.top, len(labels.names))
        self._writer = csv.writer(self._file)
        pairs = [name for place in range(1, self._k + 1) for name in (f"label_{place}", f"score_{place}")]
        self._writer.writerow(["image", *pairs, "error_class", "error"])

    def write(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            found = row["cf_labels"] or [{"label": "", "score": ""}] * self._k
            pairs = [value for item in found for value in (item["label"], item["score"])]
            self._writer.writerow([row["image"], *pairs, row["cf_error_class"] or "", row["cf_error"] or ""])

    def close(self) -> None:
        self._file.close()


def _csv(path: str | None, labels: LabelSet) -> _Csv | None:
    if path is None:
        return None
    _make_folder(path)
    return _Csv(path, labels)


def _parquet(path: str | None) -> Any:
    if path is None:
        return None
    import pyarrow.parquet as pq

    from clipfilter.operations import CLASSIFIED

    _make_folder(path)
    return pq.ParquetWriter(path, CLASSIFIED, compression="zstd")


def _make_folder(path: str) -> None:
    Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)


def _print_json(tables: Iterable[pa.Table], labels: LabelSet, model: str, lost: list[dict[str, str]]) -> None:
    """One object, written as the images come, so that memory does not grow with them."""
    head = json.dumps({"model": model, **labels.to_json()}, ensure_ascii=False)
    print(head[:-1] + ', "images": [', end="")
    first = True
    for table in tables:
        for row in table.to_pylist():
            entry = {"image": row["image"], "labels": row["cf_labels"]}
            if row["cf_error_class"] is not None:
                entry |= {"error_class": row["cf_error_class"], "error": row["cf_error"]}
            print("" if first else ",", json.dumps(entry, ensure_ascii=False), sep="\n", end="")
            first = False
    print('\n], "failed_shards": ' + json.dumps(lost, ensure_ascii=False) + "}")


def _print(
    rows: list[dict[str, Any]],
    counts: Counter[str | None],
    scorer: Any,
    lost: list[dict[str, str]],
    files: list[str],
) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console()
    total = counts.total()
    if total <= _IN_FULL:
        for row in rows:
            _print_image(console, row)
    else:
        _print_lines(console, rows)
        if total > len(rows):
            console.print(f"... and {total - len(rows):,} more; --json, --csv and --parquet have all", style="dim")
        _print_table(console, counts)
    for item in lost:
        console.print(Text(f"shard {item['path']}: {item['error']}", "red"), soft_wrap=True)
    if scorer.truncated:
        console.print(
            Text(f"note: {scorer.truncated:,} prompts are longer than the model reads and were cut", "yellow")
        )
    for name in files:
        console.print(name, soft_wrap=True, highlight=False, markup=False)


def _print_image(console: Console, row: dict[str, Any]) -> None:
    from rich.text import Text

    from clipfilter.report import text

    console.print(Text(text.clean(row["image"]), "bold"), soft_wrap=True)
    if row["cf_labels"] is None:
        console.print(Text(f"  {row['cf_error_class']}: {text.clean(row['cf_error'])}", "magenta"), soft_wrap=True)
        return
    width = max(len(text.clean(item["label"], 40)) for item in row["cf_labels"])
    for place, item in enumerate(row["cf_labels"]):
        bar = "█" * round(_BAR * item["score"]) or "▏"
        name = f"  {text.clean(item['label'], 40):<{width}}  {item['score']:>6.1%}  "
        console.print(Text.assemble((name, "" if place == 0 else "dim"), (bar, "green" if place == 0 else "dim")))


def _print_lines(console: Console, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    from clipfilter.report import text

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    # The widths keep names and scores on a terminal of 80 columns, whatever an error has to say.
    table.add_column("image", overflow="fold", min_width=20)
    table.add_column("label", no_wrap=True, max_width=22)
    table.add_column("score", justify="right", min_width=6)
    table.add_column("next", no_wrap=True, overflow="ellipsis", max_width=24)
    for row in rows:
        name = Text(text.clean(row["image"]))
        if row["cf_labels"] is None:
            table.add_row(
                name, Text(row["cf_error_class"], "magenta"), "", Text(text.clean(row["cf_error"], 60), "dim")
            )
            continue
        best, *others = row["cf_labels"]
        following = f"{text.clean(others[0]['label'], 30)} {others[0]['score']:.1%}" if others else ""
        table.add_row(name, Text(text.clean(best["label"], 40)), f"{best['score']:.1%}", Text(following, "dim"))
    console.print(table)


def _print_table(console: Console, counts: Counter[str | None]) -> None:
    """How many images each label won."""
    from rich.table import Table
    from rich.text import Text

    from clipfilter.report import text

    total = counts.total()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("label")
    table.add_column("images", justify="right")
    table.add_column("share", justify="right")
    table.add_column()
    found = [(label, count) for label, count in counts.most_common() if label is not None]
    for label, count in found[:_COUNTED]:
        bar = "█" * round(_BAR * count / total) or "▏"
        table.add_row(Text(text.clean(label, 40)), f"{count:,}", f"{count / total:.1%}", Text(bar, "green"))
    if counts[None]:
        table.add_row(Text("failed", "magenta"), f"{counts[None]:,}", f"{counts[None] / total:.1%}", "")
    console.print()
    console.print(table)
    if len(found) > _COUNTED:
        console.print(f"... and {len(found) - _COUNTED:,} labels more", style="dim")


def _print_counts(out: str) -> None:
    """How many rows of a finished run each label won, read shard by shard."""
    from rich.console import Console

    from clipfilter.runs import Run

    run = Run.open(out)
    counts: Counter[str | None] = Counter({None: run.version.totals.failed})
    for _, batch in run.batches("annotated", ["cf_label"]):
        counts.update({item["values"]: item["counts"] for item in batch["cf_label"].value_counts().to_pylist()})
    _print_table(Console(), counts)


def add_to(app: typer.Typer) -> None:
    app.command("classify")(classify)
