"""`run`, `embed`, `score` and `filter`: the commands that process a dataset."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipfilter import defaults
from clipfilter.cli import options as o

if TYPE_CHECKING:
    from clipfilter.engine import JobRequest

ThumbnailsOption = Annotated[
    defaults.Thumbnails, typer.Option(help="Thumbnails of review and rejected rows in the report: none, blur or show.")
]


@o.grouped
def run(
    source: o.Source,
    out: o.Out,
    policy: o.PolicyOption,
    model: o.Model = defaults.MODEL,
    *,
    placing: o.Placing,
    encoding: o.Encoding,
    columns: o.Columns,
    rows: o.Rows,
    copy: o.Copy = True,
    thumbnails: ThumbnailsOption = defaults.THUMBNAILS,
    retry_failed: o.RetryFailed = False,
    telling: o.Telling,
) -> None:
    """Decide a dataset: embed every image, score it by a policy, write kept, review and rejected rows."""
    groups = (placing, encoding, columns, rows, telling)
    request = job_request("run", source, out, *groups, policy=policy, model=model, copy=copy, retry_failed=retry_failed)
    run_command(request, telling, thumbnails=thumbnails)


@o.grouped
def embed(
    source: o.Source,
    out: o.Out,
    model: o.Model = defaults.MODEL,
    *,
    placing: o.Placing,
    encoding: o.Encoding,
    columns: o.Columns,
    rows: o.Rows,
    retry_failed: o.RetryFailed = False,
    telling: o.Telling,
) -> None:
    """Embed a dataset once; `filter` decides it later, as often as you like, without images."""
    groups = (placing, encoding, columns, rows, telling)
    request = job_request("embed", source, out, *groups, model=model, retry_failed=retry_failed)
    run_command(request, telling)


@o.grouped
def score(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A dataset as for embed, or a run; path or URL.")],
    out: o.Out,
    heads: Annotated[
        str | None, typer.Option(help="Add a column for each of these heads: names or file:/path, with commas between.")
    ] = None,
    concepts: Annotated[
        str | None, typer.Option(help="Add a column for each concept of this YAML file: names with their phrases.")
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", "-p", help="Add the scores of this policy's rules, without its decisions.")
    ] = None,
    model: o.ModelOfSource = None,
    *,
    placing: o.Placing,
    encoding: o.Encoding,
    columns: o.Columns,
    rows: o.Rows,
    retry_failed: o.RetryFailed = False,
    telling: o.Telling,
) -> None:
    """Add CLIP score (image-caption similarity), heads and named concepts to every row as columns; no decisions."""
    added = _score_policy(heads, concepts, policy)
    groups = (placing, encoding, columns, rows, telling)
    request = job_request("score", source, out, *groups, policy=added, model=model, retry_failed=retry_failed)
    run_command(request, telling)


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


@o.grouped
def filter_(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory of an earlier run, embed or score.")],
    out: o.Out,
    policy: o.PolicyOption,
    model: o.ModelOfRun = None,
    *,
    placing: o.Placing,
    telling: o.Telling,
) -> None:
    """Decide an embedded dataset again with a policy, without reading any image."""
    request = job_request("filter", run, out, placing, telling, policy=policy, model=model)
    run_command(request, telling)


def job_request(job: str, source: str, out: str, *groups: o.Group, **given: Any) -> JobRequest:
    """What the engine is asked for, from groups of options and `given` ones, by the request's names."""
    from clipfilter.engine import JobRequest

    for group in groups:
        given |= group.request()
    return JobRequest(job, source, out, **given)  # type: ignore[arg-type]


def run_command(
    request: JobRequest,
    telling: o.Telling,
    *,
    thumbnails: defaults.Thumbnails = "none",
    after: Callable[[str], None] | None = None,
) -> None:
    """Run a job and show the result; `after` prints more of its directory for people.

    Raises typer.Exit with the job's code.
    """
    from clipfilter.cli import display
    from clipfilter.engine import run_job

    if telling.dry_run:
        display.print_plan(request, telling.as_json)
        return
    result = display.watched(lambda line: run_job(request, line), request.job, telling.metrics(), silent=telling.silent)
    report = None
    if request.job in ("run", "filter"):
        from clipfilter.report import write_report

        report = write_report(result.out, thumbnails=thumbnails)
    if telling.as_json:
        display.print_json(result, report)
    elif not telling.quiet:
        display.print_result(result, report)
        if after is not None:
            after(result.out)
    elif result.exit_code:
        print(*result.messages, sep="\n", file=sys.stderr)
    raise typer.Exit(result.exit_code)
