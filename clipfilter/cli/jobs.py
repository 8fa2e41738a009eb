"""`run`, `embed`, `score` and `filter`: the commands that process a dataset."""

from __future__ import annotations

import contextlib
import enum
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

Source = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE", help="Parquet, webdataset tars, an image folder or img2dataset output; path or URL."
    ),
]
Out = Annotated[str, typer.Option("--out", "-o", help="Run directory to write (path or URL); resumed when it exists.")]
Model = Annotated[
    str,
    typer.Option(help="nano, ARCH/TAG of open_clip, ARCH=/path, hf-hub:ORG/NAME, hf:ORG/NAME or onnx:DIR."),
]
Address = Annotated[str | None, typer.Option(help="Address of a Ray cluster; without it Ray runs on this machine.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Encoder processes or actors [default: one per GPU, or per 8 cores].")
]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads of each worker.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="Images per forward pass [default: 64 on CPU, 256 on GPU].")]
MaxPixels = Annotated[int, typer.Option(min=1, help="Images with more pixels are refused from their header.")]
ImageColumn = Annotated[str | None, typer.Option(help="Column with image bytes, paths or URLs.")]
CaptionColumn = Annotated[str | None, typer.Option(help="Column with captions.")]
UidColumn = Annotated[str | None, typer.Option(help="Column with the rows' own unique ids.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")]
Sample = Annotated[float | None, typer.Option(help="Only this share of the rows, chosen by a hash of their uid.")]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="Try damaged shards and transient failures again.")]
MaxFailures = Annotated[
    float, typer.Option(min=0, max=1, help="Share of rows that may fail before the exit code is 3.")
]
MetricsPort = Annotated[
    int | None,
    typer.Option(min=0, max=65535, help="Serve Prometheus metrics at this port while it runs; 0: a free one."),
]
MetricsHost = Annotated[
    str | None, typer.Option(help="Address to serve metrics at [default: 127.0.0.1, this machine].")
]
MetricsFile = Annotated[
    str | None, typer.Option(help="Write metrics to this file, for node_exporter's textfile collector.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, do nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table.")]


class Engine(enum.StrEnum):
    auto = "auto"
    local = "local"
    ray = "ray"


class Decode(enum.StrEnum):
    fast = "fast"
    exact = "exact"


class Precision(enum.StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Captions(enum.StrEnum):
    first = "first"
    max = "max"
    mean = "mean"
    none = "none"


class Thumbnails(enum.StrEnum):
    none = "none"
    blur = "blur"
    show = "show"


ThumbnailsOption = Annotated[
    Thumbnails, typer.Option(help="Thumbnails of review and rejected rows in the report: none, blur or show.")
]
EngineOption = Annotated[
    Engine, typer.Option(help="Where the work runs; auto takes ray for an address or several GPUs.")
]
DecodeOption = Annotated[Decode, typer.Option(help="fast (scaled JPEG decoding) or exact (open_clip's own transform).")]
CaptionsOption = Annotated[
    Captions, typer.Option(help="Which caption counts when a row has several; none ignores them.")
]
Dtype = Annotated[Precision | None, typer.Option(help="fp32, bf16 or fp16 [default: fp32 on CPU, bf16 on GPU].")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the model with torch.compile; slow to start.")]
_MAX_PIXELS = 178_956_970
_MODEL_OF_A_SOURCE_OR_RUN = typer.Option(help="As for embed [default: nano; of a run, the model that embedded it].")


def run(
    source: Source,
    out: Out,
    policy: Annotated[str, typer.Option("--policy", "-p", help="Policy file, or the name of a pack.")],
    model: Model = "nano",
    engine: EngineOption = Engine.auto,
    address: Address = None,
    workers: Workers = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = None,
    compile_model: Compile = False,
    batch_size: BatchSize = None,
    decode: DecodeOption = Decode.fast,
    max_pixels: MaxPixels = _MAX_PIXELS,
    captions: CaptionsOption = Captions.first,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    uid_column: UidColumn = None,
    limit: Limit = None,
    sample: Sample = None,
    copy: Annotated[
        bool, typer.Option("--copy/--no-copy", help="Write kept and review images beside the decisions.")
    ] = True,
    thumbnails: ThumbnailsOption = Thumbnails.blur,
    retry_failed: RetryFailed = False,
    max_failures: MaxFailures = 0.01,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = None,
    metrics_file: MetricsFile = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decide a dataset: embed every image, score it by a policy, write kept, review and rejected rows."""
    run_command("run", **locals())


def embed(
    source: Source,
    out: Out,
    model: Model = "nano",
    engine: EngineOption = Engine.auto,
    address: Address = None,
    workers: Workers = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = None,
    compile_model: Compile = False,
    batch_size: BatchSize = None,
    decode: DecodeOption = Decode.fast,
    max_pixels: MaxPixels = _MAX_PIXELS,
    captions: CaptionsOption = Captions.first,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    uid_column: UidColumn = None,
    limit: Limit = None,
    sample: Sample = None,
    retry_failed: RetryFailed = False,
    max_failures: MaxFailures = 0.01,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = None,
    metrics_file: MetricsFile = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Embed a dataset once; `filter` decides it later, as often as you like, without images."""
    run_command("embed", **locals())


def score(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A dataset as for embed, or a run; path or URL.")],
    out: Out,
    heads: Annotated[
        str | None, typer.Option(help="Add a column for each of these heads: names or file:/path, with commas between.")
    ] = None,
    concepts: Annotated[
        str | None, typer.Option(help="Add a column for each concept of this YAML file: names with their phrases.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", "-p", help="Add the scores of this policy's rules, without its decisions.")
    ] = None,
    model: Annotated[str | None, _MODEL_OF_A_SOURCE_OR_RUN] = None,
    engine: EngineOption = Engine.auto,
    address: Address = None,
    workers: Workers = None,
    threads: Threads = None,
    device: Device = "auto",
    dtype: Dtype = None,
    compile_model: Compile = False,
    batch_size: BatchSize = None,
    decode: DecodeOption = Decode.fast,
    max_pixels: MaxPixels = _MAX_PIXELS,
    captions: CaptionsOption = Captions.first,
    image_column: ImageColumn = None,
    caption_column: CaptionColumn = None,
    uid_column: UidColumn = None,
    limit: Limit = None,
    sample: Sample = None,
    retry_failed: RetryFailed = False,
    max_failures: MaxFailures = 0.01,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = None,
    metrics_file: MetricsFile = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Add CLIP score (image-caption similarity), heads and named concepts to every row as columns; no decisions."""
    given = locals()
    wanted = {name: given.pop(name) for name in ("heads", "concepts", "policy")}
    run_command("score", **given, policy=_score_policy(**wanted))


def _score_policy(heads: str | None, concepts: str | None, policy: str | None) -> Any:
    """The columns to add as a policy without bands; None for the similarity alone."""
    if heads is None and concepts is None and policy is None:
        return None
    from clipfilter.errors import RefusedError
    from clipfilter.policies import load_policy, named_scores, scores_of

    if policy is None:
        return named_scores([name.strip() for name in (heads or "").split(",") if name.strip()], concepts)
    if heads or concepts:
        raise RefusedError(
            "--policy names all columns; leave out --heads and --concepts, or write them into the policy."
        )
    return scores_of(load_policy(policy))


def filter_(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory of an earlier run, embed or score.")],
    out: Out,
    policy: Annotated[str, typer.Option("--policy", "-p", help="Policy file, or the name of a pack.")],
    model: Annotated[
        str | None, typer.Option(help="Where the run's own model is now, if it was a local one [default: as recorded].")
    ] = None,
    engine: EngineOption = Engine.auto,
    address: Address = None,
    workers: Workers = None,
    threads: Threads = None,
    device: Device = "auto",
    max_failures: MaxFailures = 0.01,
    metrics_port: MetricsPort = None,
    metrics_host: MetricsHost = None,
    metrics_file: MetricsFile = None,
    dry_run: DryRun = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Decide an embedded dataset again with a policy, without reading any image."""
    run_command("filter", source=run, **{name: value for name, value in locals().items() if name != "run"})


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)
    app.command("embed")(embed)
    app.command("filter")(filter_)
    app.command("score")(score)


def run_command(job: str, after: Callable[[str], None] | None = None, **given: Any) -> None:
    """Run a job with the options of its command and show the result; `after` prints more of the directory for people.

    Raises typer.Exit with the job's code.
    """
    from clipfilter.cli import display
    from clipfilter.engine import LOOPBACK, JobRequest, MetricsOptions, published, run_job, together
    from clipfilter.sources import SourceOptions

    port, host, file = (given.pop(f"metrics_{name}", None) for name in ("port", "host", "file"))
    metrics = MetricsOptions(port, host or LOOPBACK, file)
    dry_run, as_json, quiet = given.pop("dry_run"), given.pop("as_json"), given.pop("quiet")
    thumbnails = given.pop("thumbnails", None)
    columns = {name: given.pop(name, None) for name in ("image_column", "caption_column", "uid_column")}
    captions = given.get("captions", "first")
    options = SourceOptions(**columns, captions="first" if captions == "none" else str(captions))  # type: ignore[arg-type]
    plain: dict[str, Any] = {n: str(v) if isinstance(v, enum.StrEnum) else v for n, v in given.items()}
    request = JobRequest(job=job, source_options=options, **plain)  # type: ignore[arg-type]
    if dry_run:
        display.print_plan(request, as_json)
        return
    # Ray prints what its workers suffer; stdout belongs to the result.
    shown = display.progress(enabled=not (quiet or as_json))
    with contextlib.redirect_stdout(sys.stderr), published(metrics, job) as watched, shown as line:
        result = run_job(request, together(line, watched))
        if watched is not None:
            watched.finish(result)
    report = None
    if job in ("run", "filter"):
        from clipfilter.report import write_report

        choice = str(thumbnails) if thumbnails else "none"
        report = write_report(result.out, thumbnails=choice)
    if as_json:
        display.print_json(result, report)
    elif not quiet:
        display.print_result(result, report)
        if after is not None:
            after(result.out)
    elif result.exit_code:
        print(*result.messages, sep="\n", file=sys.stderr)
    raise typer.Exit(result.exit_code)
