"""`train`: fine-tune a model on image-caption pairs, or train one from scratch."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipfilter import defaults
from clipfilter.cli import options as o
from clipfilter.cli.printing import new_table, print_json, say, stdout

if TYPE_CHECKING:
    from clipfilter.training import Shown, TrainResult

_LINE_SECONDS = 10.0


@dataclass(frozen=True)
class Training(o.Group):
    """What trains, on what and how; the names are those of TrainSettings."""

    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Images with captions: anything `run` reads.")]
    out: Annotated[
        str, typer.Option("--out", "-o", help="Folder for checkpoints, logs and the result; resumed when it exists.")
    ]
    model: Annotated[
        str, typer.Option(help="nano, nano=/path, an open_clip name/tag, or ARCH=/path/to/checkpoint.")
    ] = defaults.MODEL
    train: Annotated[
        str, typer.Option(help="What trains: heads, last-N-blocks, all; image:... or text:... for one tower.")
    ] = "last-2-blocks"
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Begin with random weights; --model is a bare architecture.")
    ] = False
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the pairs.")] = 5
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs in memory at once, per worker.")] = 64
    accumulate: Annotated[int, typer.Option(min=1, help="Batches contrasted with each other in one step.")] = 1
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-5
    weight_decay: Annotated[float, typer.Option(help="Weight decay; gains, biases and temperature have none.")] = 0.1
    warmup: Annotated[int | None, typer.Option(min=0, help="Steps until the peak rate [default: a tenth of all].")] = (
        None
    )
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = 1.0
    dtype: o.Dtype = None
    device: o.Device = defaults.DEVICE
    seed: Annotated[int, typer.Option(help="Order, captions, crops and dropout follow from it.")] = 0
    loss: Annotated[
        Literal["clip", "siglip"],
        typer.Option(help="clip (softmax) or siglip (sigmoid, for models with a logit bias)."),
    ] = "clip"
    augment: Annotated[
        bool, typer.Option("--augment/--no-augment", help="Random resized crops, as open_clip trains.")
    ] = True
    where: Annotated[
        list[str] | None,
        typer.Option(help="Train on rows with this column=value; several values of a column are alternatives."),
    ] = None
    limit: o.Limit = None
    image_column: o.ImageColumn = None
    caption_column: o.CaptionColumn = None
    private: o.Private = False
    dev: Annotated[str | None, typer.Option(help="Pairs to measure on [default: held out of the pairs].")] = None
    dev_where: Annotated[
        list[str] | None, typer.Option(help="column=value of the dev rows, of --dev or of SOURCE.")
    ] = None
    dev_measure: Annotated[
        Literal["recall@10", "loss"], typer.Option(help="What chooses the epoch and stops early.")
    ] = "recall@10"
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better dev measure before training stops.")] = 3
    zero_shot: Annotated[
        str | None, typer.Option(help="Images with class labels, to keep what the model could do before.")
    ] = None
    label_column: Annotated[str, typer.Option(help="Column of --zero-shot with the class names.")] = "label"
    max_zero_shot_loss: Annotated[
        float, typer.Option(help="Points of zero-shot top-1 that interpolation may lose.")
    ] = 1.0
    checkpoint_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints; each epoch ends with one.")
    ] = 200
    engine: Annotated[Literal["local", "ray"], typer.Option(help="local, or ray for several GPUs or machines.")] = (
        "local"
    )
    workers: Annotated[int, typer.Option(min=1, help="Workers of --engine ray, one per GPU.")] = 1
    address: o.Address = None
    threads: o.Threads = None
    log: Annotated[str, typer.Option(help="csv, or csv,tensorboard.")] = "csv"

    def request(self) -> dict[str, Any]:
        """What TrainSettings takes, with the defaults of the device."""
        from clipfilter.engine import DEFAULT_DTYPE

        device = _device(self.device)
        dtype = self.dtype or DEFAULT_DTYPE["cuda" if device.startswith("cuda") else "cpu"]
        lists = {"where": tuple(self.where or ()), "dev_where": tuple(self.dev_where or ())}
        log = tuple(part.strip() for part in self.log.split(","))
        return vars(self) | lists | {"device": device, "dtype": dtype, "log": log}


@o.grouped
def train(*, training: Training, as_json: o.Json = False, quiet: o.Quiet = False) -> None:
    """Fine-tune a model on captions, then interpolate with what it was, so that it keeps its zero-shot abilities."""
    from clipfilter.training import TrainSettings
    from clipfilter.training import train as run_training

    settings = TrainSettings(**training.request())
    silent = quiet or as_json
    with contextlib.redirect_stdout(sys.stderr), _progress(enabled=not silent) as shown:
        command = ["clipfilter", *sys.argv[1:]]
        result = run_training(settings, command=command, tell=shown.tell, show=shown.show)
    if as_json:
        print_json({"out": result.out, **result.summary})
    elif not quiet:
        _print_result(result)


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


class _Shown:
    """What `train` reports, as lines on stderr; on a terminal the steps are a bar."""

    def __init__(self, bar: Any | None) -> None:
        self._bar = bar
        self._task: Any = None
        self._last = time.monotonic()

    def tell(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, soft_wrap=True, highlight=False, markup=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def show(self, step: Shown) -> None:
        dev = "" if step.best is None else f"  best dev measure {step.best:.4f}"
        line = f"epoch {step.epoch + 1}  loss {step.loss:.4f}{dev}"
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task("", total=step.steps)
            self._bar.update(self._task, completed=step.step, description=line)
        elif time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            print(f"step {step.step} of {step.steps}  {line}", file=sys.stderr, flush=True)


class _Silent(_Shown):
    def tell(self, line: str) -> None:
        pass

    def show(self, step: Shown) -> None:
        pass


@contextlib.contextmanager
def _progress(*, enabled: bool) -> Iterator[_Shown]:
    if not enabled:
        yield _Silent(None)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Shown(None)
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        yield _Shown(bar)


def _print_result(result: TrainResult) -> None:
    from clipfilter.training import table_rows

    console = stdout()
    if not result.computed:
        console.print("everything was already done; nothing was computed again", style="dim")
    found = new_table("", *(f">{name}" for name in result.summary["reported"]))
    for title, values in table_rows(result.summary):
        found.add_row(title, *values)
    console.print(found)
    summary = result.summary
    say(
        console,
        f"{summary['steps']} steps in {summary['epochs']} epochs, interpolated with alpha {summary['alpha']:g}; measured on "
        f"{summary['reported_on']['pairs']:,} pairs and {summary['reported_on']['labelled']:,} labelled images "
        "that chose nothing",
        style="dim",
    )
    say(console, f"model    --model {summary['load']}")
    say(console, f"card     {result.out}/MODEL_CARD.md")
