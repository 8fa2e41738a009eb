"""`evaluate`: how good a model is on data with labels or captions."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipfilter import defaults
from clipfilter.cli import options as o
from clipfilter.cli.printing import new_table, say, stdout

if TYPE_CHECKING:
    from rich.console import Console

    from clipfilter.evaluation import Evaluation

_SHOWN_CLASSES = 5


@dataclass(frozen=True)
class Measuring(o.Group):
    """What is measured, on what."""

    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="A dataset with labels or captions, or a run directory; path or URL."),
    ]
    model: Annotated[
        str | None,
        typer.Option(
            help="nano, an open_clip name/pretrained tag, or ARCH=/path/to/checkpoint [default: nano, or the run's own]."
        ),
    ] = None
    label_column: Annotated[
        str | None,
        typer.Option(
            help="Column with the class; `folder` takes the name of the image's folder "
            "[default: label, cls, class or class_name]."
        ),
    ] = None
    labels: Annotated[
        str | None,
        typer.Option(help="Class names: JSON list or label-to-name object, or text with one name per line, 0 first."),
    ] = None
    label_style: Annotated[
        Literal["as-is", "words"],
        typer.Option(help="words: labels without a name in --labels in lower case, underscores as spaces."),
    ] = "as-is"
    templates: Annotated[
        str, typer.Option(help="Prompt ensemble: none, photo, cifar-style, imagenet-like, or a file, one per line.")
    ] = "photo"
    caption_column: o.CaptionColumn = None
    captions: Annotated[Literal["first", "all"], typer.Option(help="Which captions of a row retrieval asks with.")] = (
        "first"
    )
    where: Annotated[
        list[str] | None,
        typer.Option(help="Only rows with COLUMN=VALUE; repeated: all columns, and any of the values of one."),
    ] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N of the selected rows.")] = None
    image_column: o.ImageColumn = None
    private: o.Private = False
    device: o.Device = defaults.DEVICE
    dtype: o.Dtype = None
    batch_size: o.BatchSize = None
    threads: o.Threads = None
    decode: o.Decode = defaults.DECODE

    def request(self) -> dict[str, Any]:
        """What an EvaluateRequest takes, with the defaults of the device."""
        from clipfilter.engine import on_device
        from clipfilter.evaluation import DataRequest
        from clipfilter.sources import SourceOptions

        at = on_device(self.device, self.dtype, self.batch_size)
        data = DataRequest(
            source=self.source,
            options=SourceOptions(self.image_column, self.caption_column, private=self.private),
            label_column=self.label_column,
            where=tuple(_condition(text) for text in self.where or ()),
            captions=self.captions,
            limit=self.limit,
            decode=self.decode,
            batch_size=at.batch_size,
            threads=self.threads,
            decode_ahead=at.decode_ahead,
        )
        same = {name: getattr(self, name) for name in ("model", "labels", "label_style", "templates")}
        return {"data": data, "device": at.device, "dtype": at.dtype, **same}


@o.grouped
def evaluate(
    *,
    measuring: Measuring,
    max_failures: o.MaxFailures = defaults.MAX_FAILURES,
    out: Annotated[str | None, typer.Option("--out", "-o", help="Also write the result to this JSON file.")] = None,
    as_json: o.Json = False,
) -> None:
    """Measure a model: zero-shot classification where there are labels, retrieval and matching where captions are."""
    from clipfilter.cli.display import row_progress
    from clipfilter.engine import EXIT_DONE, EXIT_FAILURES
    from clipfilter.errors import RefusedError
    from clipfilter.evaluation import EvaluateRequest
    from clipfilter.evaluation import evaluate as measure

    if out is not None and not Path(out).absolute().parent.is_dir():
        raise RefusedError(f"--out {out}: its folder does not exist; make it first.")
    request = EvaluateRequest(**measuring.request())
    with row_progress() as on_rows:
        result = measure(request, on_rows)
    text = json.dumps(result.to_json(), indent=1, ensure_ascii=False)
    if out is not None:
        Path(out).write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
    else:
        _print(result)
    counts = result.counts
    if counts["failed_shards"] or counts["failed"] > max_failures * counts["rows"]:
        print(
            f"clipfilter: {counts['failed']:,} of {counts['rows']:,} rows and {len(counts['failed_shards'])} whole shards "
            f"failed and are not in the numbers; the limit is {max_failures:.1%} of the rows (--max-failures) and no shard.",
            file=sys.stderr,
        )
        raise typer.Exit(EXIT_FAILURES)
    raise typer.Exit(EXIT_DONE)


def _condition(text: str) -> tuple[str, str]:
    from clipfilter.errors import RefusedError

    name, equals, value = text.partition("=")
    if not equals or not name:
        raise RefusedError(f"--where {text!r} is not COLUMN=VALUE; write for example --where split=dev.")
    return name.strip(), value


def _print(result: Evaluation) -> None:
    console = stdout()
    counts = result.counts
    say(
        console,
        f"{counts['images']:,} images ({counts['labelled']:,} with a label, {counts['captioned']:,} with a caption) of "
        f"{result.facts['source']}, model {result.facts['model']}",
    )
    if result.zero_shot is not None:
        _print_zero_shot(console, result)
    if result.retrieval is not None:
        recall = result.retrieval
        rows = [
            ("text to image", f"{recall.texts:,}", *(f"{share:.3f}" for share in recall.text_to_image.values())),
            ("image to text", f"{recall.images:,}", *(f"{share:.3f}" for share in recall.image_to_text.values())),
        ]
        _table(console, ("retrieval", "queries", *(f"recall@{k}" for k in recall.text_to_image)), rows)
    if result.caption_match is not None:
        match = result.caption_match
        rows = [("all wrong pairs", f"{match.pairs:,}", f"{match.auc:.3f}")]
        rows.append(("one wrong caption each", f"{match.pairs:,}", f"{match.auc_shuffled:.3f}"))
        _table(console, ("caption match", "pairs", "AUC"), rows)
    if counts["failed"] or counts["failed_shards"]:
        say(console, _failures(result), style="magenta")
    for path in counts["damaged_shards"]:
        say(console, f"{path} is damaged; only the rows before the damage are in the numbers", style="red")
    for note in result.notes:
        say(console, f"note: {note}", style="yellow")


def _print_zero_shot(console: Console, result: Evaluation) -> None:
    found = result.zero_shot
    assert found is not None
    row = (f"{found.n:,} images", f"{len(result.classes):,}", f"{found.top1:.3f}", f"{found.top5:.3f}")
    _table(
        console, ("zero-shot", "classes", "top-1", "top-5", "mean per class"), [(*row, f"{found.mean_per_class:.3f}")]
    )
    if len(found.per_class) < 2:
        return
    # Of equal shares the class with more images says more.
    worst = sorted(found.per_class, key=lambda item: (item[2], -item[1], item[0]))
    best = sorted(found.per_class, key=lambda item: (-item[2], -item[1], item[0]))
    shown = min(_SHOWN_CLASSES, len(worst) // 2)
    for title, items in (("worst classes", worst[:shown]), ("best classes", best[:shown])):
        _table(console, (title, "images", "top-1"), [(result.classes[i], f"{n:,}", f"{s:.3f}") for i, n, s in items])


def _table(console: Console, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
    from rich.text import Text

    found = new_table(columns[0], *(f">{name}" for name in columns[1:]))
    for row in rows:
        found.add_row(*(Text(cell) for cell in row))
    console.print()
    console.print(found)


def _failures(result: Evaluation) -> str:
    counts = result.counts
    parts = [f"{count:,} {name}" for name, count in counts["failed_by_class"].items()]
    parts += [f"shard {item['path']}: {item['error']}" for item in counts["failed_shards"][:3]]
    names = ", ".join(item["key"] for item in counts["failures"][:3])
    more = ", ..." if len(counts["failures"]) > 3 else ""
    return f"failed: {'; '.join(parts)}" + (f" ({names}{more})" if names else "")
