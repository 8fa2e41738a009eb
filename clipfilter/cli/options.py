"""The options that several commands share, each declared once: its type, its help and its default.

Options that always come together are a group, a dataclass. A command under `grouped` takes a group as one parameter.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfilter import defaults

if TYPE_CHECKING:
    from clipfilter.engine import MetricsOptions

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Parquet or Arrow, webdataset tars, zips, an image folder, img2dataset output, or a table that names images; "
        "path or URL.",
    ),
]
Run = Annotated[str, typer.Argument(metavar="RUN", help="Run directory (path or URL).")]
Policy = Annotated[str, typer.Argument(metavar="POLICY", help="Policy file, or the name of a pack.")]
PolicyOption = Annotated[str, typer.Option("--policy", "-p", help="Policy file, or the name of a pack.")]
Out = Annotated[str, typer.Option("--out", "-o", help="Run directory to write (path or URL); resumed when it exists.")]
Model = Annotated[
    str,
    typer.Option(help="nano, ARCH/TAG of open_clip, ARCH=/path, hf-hub:ORG/NAME, hf:ORG/NAME or onnx:DIR."),
]
ModelOfSource = Annotated[
    str | None, typer.Option(help="As for embed [default: nano; of a run, the model that embedded it].")
]
ModelOfRun = Annotated[
    str | None, typer.Option(help="Where the run's own model is now, if it was a local one [default: as recorded].")
]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster; without it Ray runs on this machine.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of each worker.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[defaults.Dtype | None, typer.Option(help="fp32, bf16 or fp16 [default: fp32 on CPU, bf16 on GPU].")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images per forward pass [default: 64 on CPU, 256 on GPU].")]
Decode = Annotated[
    defaults.Decode, typer.Option(help="fast (scaled JPEG decoding) or exact (open_clip's own transform).")
]
Color = Annotated[
    defaults.Color, typer.Option(help="Embedded colour profiles: ignore (as models are trained) or managed (to sRGB).")
]
ImageColumn = Annotated[
    str | None, typer.Option(help="Column with image bytes, base64, paths or URLs; of tars a member's extension.")
]
Private = Annotated[
    bool,
    typer.Option("--private", help="Also fetch from private addresses, and through the environment's proxies."),
]
Pictures = Annotated[
    defaults.Pictures,
    typer.Option(help="Of a key or row with several pictures: all are rows, or the first; the others are left out."),
]
CaptionColumn = Annotated[str | None, typer.Option(help="Column with captions.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")]
Copy = Annotated[bool, typer.Option("--copy/--no-copy", help="Write kept and review images beside the decisions.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Try damaged shards and transient failures again.")]
MaxFailures = Annotated[
    float, typer.Option(min=0, max=1, help="Share of rows that may fail before the exit code is 3.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table.")]
Seed = Annotated[int, typer.Option(help="Another seed draws other rows.")]


@dataclass(frozen=True)
class Group:
    """Options that always come together."""

    def request(self) -> dict[str, Any]:
        """What the request of a job takes of them."""
        return vars(self)


@dataclass(frozen=True)
class Placing(Group):
    """Where the work runs."""

    engine: Annotated[
        defaults.Engine, typer.Option(help="Where the work runs; auto takes ray for an address or several GPUs.")
    ] = defaults.ENGINE
    address: Address = None
    workers: Annotated[
        int | None, typer.Option(min=1, help="Encoder processes or actors [default: one per GPU, or per 8 cores].")
    ] = None
    threads: Threads = None
    device: Device = defaults.DEVICE


@dataclass(frozen=True)
class Batches(Group):
    """How images become batches."""

    dtype: Dtype = None
    batch_size: BatchSize = None
    decode: Decode = defaults.DECODE


@dataclass(frozen=True)
class Encoding(Group):
    """How images become batches, with all that a job can be told about it."""

    dtype: Dtype = None
    compile_model: Annotated[
        bool, typer.Option("--compile", help="Compile the model with torch.compile; slow to start.")
    ] = False
    batch_size: BatchSize = None
    decode: Decode = defaults.DECODE
    decode_in: Annotated[
        defaults.DecodeIn,
        typer.Option(
            help="threads, or processes: children with limits of memory and time, for images nobody vouches for."
        ),
    ] = defaults.DECODE_IN
    decode_timeout: Annotated[float, typer.Option(min=1, help="Seconds that decoding one image may take.")] = (
        defaults.DECODE_TIMEOUT
    )
    max_pixels: Annotated[int, typer.Option(min=1, help="Images with more pixels are refused from their header.")] = (
        defaults.MAX_PIXELS
    )
    color: Color = defaults.COLOR


@dataclass(frozen=True)
class Columns(Group):
    """Which columns of a source mean what, and which of a row's captions counts."""

    captions: Annotated[
        defaults.Captions, typer.Option(help="Which caption counts when a row has several; none ignores them.")
    ] = defaults.CAPTIONS
    image_column: ImageColumn = None
    caption_column: CaptionColumn = None
    uid_column: Annotated[str | None, typer.Option(help="Column with the rows' own unique ids.")] = None
    pictures: Pictures = defaults.PICTURES
    private: Private = False

    def request(self) -> dict[str, Any]:
        from clipfilter.sources import SourceOptions

        # A source reads captions even where the job ignores them: they stay columns of the rows.
        read = {"captions": defaults.CAPTIONS} if self.captions == "none" else {}
        return {"captions": self.captions, "source_options": SourceOptions(**vars(self) | read)}


@dataclass(frozen=True)
class Rows(Group):
    """Which rows of a source."""

    limit: Limit = None
    sample: Annotated[
        float | None, typer.Option(help="Only this share of the rows, chosen by a hash of their uid.")
    ] = None


@dataclass(frozen=True)
class Telling(Group):
    """What a job says while it runs and when it is done."""

    max_failures: MaxFailures = defaults.MAX_FAILURES
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Serve Prometheus metrics at this port while it runs; 0: a free one."),
    ] = None
    metrics_host: Annotated[
        str | None, typer.Option(help="Address to serve metrics at [default: 127.0.0.1, this machine].")
    ] = None
    metrics_file: Annotated[
        str | None, typer.Option(help="Write metrics to this file, for node_exporter's textfile collector.")
    ] = None
    dry_run: DryRun = False
    as_json: Json = False
    quiet: Quiet = False

    def request(self) -> dict[str, Any]:
        return {"max_failures": self.max_failures}

    @property
    def silent(self) -> bool:
        """Whether nothing is shown to people while it runs."""
        return self.quiet or self.as_json

    def metrics(self) -> MetricsOptions:
        """Where metrics go."""
        from clipfilter.engine import MetricsOptions

        return MetricsOptions(self.metrics_port, self.metrics_host or defaults.LOOPBACK, self.metrics_file)


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The command with each parameter that is a group replaced by the group's options, in their order.

    The command line, its help and a caller in Python see the options; the command gets the groups.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if isinstance(kind, type) and issubclass(kind, Group)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name]))
            continue
        kinds = typing.get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=_default(field), annotation=kinds[field.name]
            )
            for field in dataclasses.fields(groups[name])
        ]
    signature = inspect.Signature(parameters)

    @functools.wraps(command)
    def call(*args: Any, **options: Any) -> None:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        given = bound.arguments
        for name, kind in groups.items():
            given[name] = kind(**{field.name: given.pop(field.name) for field in dataclasses.fields(kind)})
        command(**given)

    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _default(field: dataclasses.Field[Any]) -> Any:
    return inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
