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

from clipfilter import columns as cf
from clipfilter import defaults
from clipfilter.cli import options as o
from clipfilter.cli.jobs import job_request, run_command
from clipfilter.cli.printing import bar, new_table, say, stdout
from clipfilter.text import spreadsheet

if TYPE_CHECKING:
    import pyarrow as pa
    from rich.console import Console

    from clipfilter.policies import LabelScorer, LabelSet
    from clipfilter.sources import SourceOptions

_BAR = 24
_IN_FULL = 12  # images with all their labels and a bar each; more get a line
_LISTED = 200  # lines on a terminal
_COUNTED = 20


@o.grouped
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
    model: o.ModelOfSource = None,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Add the labels as columns to a whole dataset: a run directory, resumed."),
    ] = None,
    as_json: o.Json = False,
    csv_file: Annotated[str | None, typer.Option("--csv", metavar="FILE", help="Write a CSV file.")] = None,
    parquet: Annotated[str | None, typer.Option(metavar="FILE", help="Write a Parquet file.")] = None,
    *,
    placing: o.Placing,
    batches: o.Batches,
    image_column: o.ImageColumn = None,
    private: o.Private = False,
    max_failures: o.MaxFailures = defaults.MAX_FAILURES,
    quiet: o.Quiet = False,
) -> None:
    """Say which of some labels fits each image best, without training (zero-shot classification)."""
    from clipfilter.errors import RefusedError
    from clipfilter.sources import SourceOptions

    wanted = _label_set(labels, labels_file, templates, independent, top)
    if out is not None:
        if len(images) != 1 or csv_file or parquet:
            raise RefusedError(
                "--out takes one dataset or run, and writes Parquet itself; leave out --csv and --parquet."
            )
        telling = o.Telling(max_failures, as_json=as_json, quiet=quiet)
        groups = (placing, batches, o.Columns("none", image_column, private=private), telling)
        request = job_request("score", images[0], out, *groups, labels=wanted, model=model)
        run_command(request, telling, after=_print_counts)
        return
    if placing.address is not None or placing.workers is not None:
        raise RefusedError("--address and --workers are for whole datasets; name a run directory with --out.")
    options = {**vars(batches), "threads": placing.threads, "device": placing.device}
    _classify(
        images,
        wanted,
        model,
        SourceOptions(image_column, private=private),
        options,
        csv_file,
        parquet,
        as_json,
        quiet,
        max_failures,
    )


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
    source_options: SourceOptions,
    options: dict[str, Any],
    csv_file: str | None,
    parquet: str | None,
    as_json: bool,
    quiet: bool,
    max_failures: float,
) -> None:
    from clipfilter.cli.display import row_progress
    from clipfilter.engine import EXIT_DONE, EXIT_FAILURES, open_inputs, stream_options
    from clipfilter.operations import classify_stream
    from clipfilter.policies import LabelScorer
    from clipfilter.runs import Run

    inputs = open_inputs(images, source_options)
    encoder, streaming = stream_options(inputs, model, **options)
    scorer = LabelScorer(labels, encoder)
    lost: list[dict[str, str]] = []
    counts: Counter[str | None] = Counter()
    with row_progress() as on_rows:
        tables = _counted(classify_stream(inputs, scorer, encoder, streaming, on_rows, lost), counts)
        sinks = [*([_Csv(csv_file, labels)] if csv_file else []), *([_parquet(parquet)] if parquet else [])]
        shown: list[dict[str, Any]] = []
        if as_json:
            _print_json(_through(tables, sinks), labels, encoder.fingerprint["model"], lost)
        else:
            for table in _through(tables, sinks):
                shown += table.slice(0, max(0, _LISTED - len(shown))).to_pylist()
    if not as_json and not quiet:
        _print(shown, counts, scorer, lost, [name for name in (csv_file, parquet) if name])
    if all(isinstance(item, Run) for item in inputs):  # its failures were judged when it was made
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
        counts.update(_won(table))
        yield table


def _won(table: pa.Table | pa.RecordBatch) -> dict[str | None, int]:
    """How many rows each label won; None stands for those that failed."""
    return {item["values"]: item["counts"] for item in table[cf.LABEL].value_counts().to_pylist()}


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
        _make_folder(path)
        self._file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self._k = min(labels.top, len(labels.names))
        self._writer = csv.writer(self._file)
        pairs = [name for place in range(1, self._k + 1) for name in (f"label_{place}", f"score_{place}")]
        self._writer.writerow(["image", *pairs, "error_class", "error"])

    def write(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            found = row[cf.LABELS] or [{"label": "", "score": ""}] * self._k
            pairs = [value for item in found for value in (item["label"], item["score"])]
            cells = [row["image"], *pairs, row[cf.ERROR_CLASS] or "", row[cf.ERROR] or ""]
            self._writer.writerow([spreadsheet(cell) for cell in cells])

    def close(self) -> None:
        self._file.close()


def _parquet(path: str) -> Any:
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
            entry = {"image": row["image"], "labels": row[cf.LABELS]}
            if row[cf.ERROR_CLASS] is not None:
                entry |= {"error_class": row[cf.ERROR_CLASS], "error": row[cf.ERROR]}
            print("" if first else ",", json.dumps(entry, ensure_ascii=False), sep="\n", end="")
            first = False
    print('\n], "failed_shards": ' + json.dumps(lost, ensure_ascii=False) + "}")


def _print(
    rows: list[dict[str, Any]],
    counts: Counter[str | None],
    scorer: LabelScorer,
    lost: list[dict[str, str]],
    files: list[str],
) -> None:
    console = stdout()
    total = counts.total()
    if total <= _IN_FULL:
        for row in rows:
            _print_image(console, row)
    else:
        _print_lines(console, rows)
        if total > len(rows):
            say(console, f"... and {total - len(rows):,} more; --json, --csv and --parquet have all", style="dim")
        _print_table(console, counts)
    for item in lost:
        say(console, f"shard {item['path']}: {item['error']}", style="red")
    if scorer.truncated:
        say(console, f"note: {scorer.truncated:,} prompts are longer than the model reads and were cut", style="yellow")
    for name in files:
        say(console, name)


def _print_image(console: Console, row: dict[str, Any]) -> None:
    from clipfilter import text

    say(console, text.clean(row["image"]), style="bold")
    if row[cf.LABELS] is None:
        say(console, f"  {row[cf.ERROR_CLASS]}: {text.clean(row[cf.ERROR])}", style="magenta")
        return
    width = max(len(text.clean(item["label"], 40)) for item in row[cf.LABELS])
    for place, item in enumerate(row[cf.LABELS]):
        name = f"  {text.clean(item['label'], 40):<{width}}  {item['score']:>6.1%}  "
        say(console, (name, "" if place == 0 else "dim"), (bar(item["score"], _BAR), "green" if place == 0 else "dim"))


def _print_lines(console: Console, rows: list[dict[str, Any]]) -> None:
    from rich.text import Text

    from clipfilter import text

    found = new_table("image", "label", ">score", "next")
    # The widths keep names and scores on a terminal of 80 columns, whatever an error has to say.
    image, label, score, following = found.columns
    image.overflow, image.min_width = "fold", 20
    label.no_wrap, label.max_width = True, 22
    score.min_width = 6
    following.no_wrap, following.max_width = True, 24
    for row in rows:
        name = Text(text.clean(row["image"]))
        if row[cf.LABELS] is None:
            why = Text(text.clean(row[cf.ERROR], 60), "dim")
            found.add_row(name, Text(row[cf.ERROR_CLASS], "magenta"), "", why)
            continue
        best, *others = row[cf.LABELS]
        then = f"{text.clean(others[0]['label'], 30)} {others[0]['score']:.1%}" if others else ""
        found.add_row(name, Text(text.clean(best["label"], 40)), f"{best['score']:.1%}", Text(then, "dim"))
    console.print(found)


def _print_table(console: Console, counts: Counter[str | None]) -> None:
    """How many images each label won."""
    from rich.text import Text

    from clipfilter import text

    total = counts.total()
    found = new_table("label", ">images", ">share", "")
    labels = [(label, count) for label, count in counts.most_common() if label is not None]
    for label, count in labels[:_COUNTED]:
        line = Text(bar(count / total, _BAR), "green")
        found.add_row(Text(text.clean(label, 40)), f"{count:,}", f"{count / total:.1%}", line)
    if counts[None]:
        found.add_row(Text("failed", "magenta"), f"{counts[None]:,}", f"{counts[None] / total:.1%}", "")
    console.print()
    console.print(found)
    if len(labels) > _COUNTED:
        say(console, f"... and {len(labels) - _COUNTED:,} labels more", style="dim")


def _print_counts(out: str) -> None:
    """How many rows of a finished run each label won, read shard by shard."""
    from clipfilter.runs import Run

    run = Run.open(out)
    counts: Counter[str | None] = Counter({None: run.version.totals.failed})
    for _, batch in run.batches("annotated", [cf.LABEL]):
        counts.update(_won(batch))
    _print_table(stdout(), counts)
