"""Statistics of a decided run on any Beam runner: quantiles of scores, keep rates per domain, exact duplicates."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipfilter.beam.columns import quantile_buckets, quantiles
from clipfilter.beam.options import BeamOptions
from clipfilter.decisions import DECISIONS
from clipfilter.errors import ClipfilterError, RefusedError
from clipfilter.runs import Run, Version
from clipfilter.storage import Directory

if TYPE_CHECKING:
    import apache_beam as beam

QUANTILES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
#: Rows whose hashes one worker sorts at once, and domains it writes at once: what bounds its memory.
_HASHES_PER_PART = 1_000_000
_ROWS_PER_DOMAIN_PART = 20_000_000


@dataclass(frozen=True)
class StatisticsRequest:
    """What to count. run: a decided run directory, its newest version; out: where statistics.json and its tables go.

    url_column: source column with addresses, for keep rates per domain. quantiles: shares in [0, 1].
    """

    run: str
    out: str
    url_column: str | None = None
    quantiles: tuple[float, ...] = QUANTILES


def dataset_statistics(request: StatisticsRequest, options: BeamOptions) -> dict[str, Any]:
    """Run the pipeline to its end; the content of OUT/statistics.json.

    Raises RefusedError when the run is not finished or not decided, lacks the URL column, or the runner cannot be used;
    ClipfilterError when the pipeline fails.
    """
    if bad := [q for q in request.quantiles if not 0 <= q <= 1]:
        raise RefusedError(f"a quantile is a share of the rows between 0 and 1, not {bad[0]}.")
    for url, what in ((request.run, "the run"), (request.out, "the directory for statistics")):
        options.refuse_unshared(url, what)
    run = Run.open(request.run)
    if run.version.stage != "decided":
        raise RefusedError(f"{request.run} is not a finished run with decisions; decide it first.")
    _refuse_missing_column(request, run)
    if Directory(request.out).url.startswith(run.url + "/") or Directory(request.out).url == run.url:
        raise RefusedError(f"{request.out} lies inside the run; name a directory outside it for the statistics.")
    pipeline = options.pipeline()
    build(pipeline, request, run.url, run.version)
    try:
        state = pipeline.run().wait_until_finish()
    except Exception as error:
        raise ClipfilterError(f"the Beam pipeline failed: {error}") from error
    if state != "DONE":
        raise ClipfilterError(f"the Beam pipeline ended as {state}; the runner's log says why.")
    content: dict[str, Any] = Directory(request.out).read_json("statistics.json")
    return content


def build(pipeline: beam.Pipeline, request: StatisticsRequest, run: str, version: Version) -> beam.PCollection:
    """Add everything to a pipeline. Its elements are names of commits, columns as bytes, and counts; never rows."""
    import apache_beam as beam

    from clipfilter.beam import transforms as t

    totals, wanted = version.totals, list(request.quantiles)
    about = {"run": run, "version": version.name, "rows": totals.decided, **{name: totals[name] for name in DECISIONS}}
    commits = pipeline | "Commits" >> beam.Create(version.commits).with_output_types(str) | "Spread" >> beam.Reshuffle()
    parts = [
        _quantiles_of(commits | "Scores" >> beam.ParDo(t.ReadScores(run)).with_output_types(tuple[str, bytes]), wanted)
    ]
    buckets = 1 + totals.decided // _HASHES_PER_PART
    parts.append(
        commits
        | "Hashes" >> beam.ParDo(t.SplitByHash(run, buckets)).with_output_types(tuple[int, bytes])
        | "PerHash" >> beam.GroupByKey()
        | "Duplicates" >> beam.ParDo(t.WriteDuplicates(request.out)).with_output_types(tuple[str, str])
    )
    if request.url_column is not None:
        pieces = 1 + totals.decided // _ROWS_PER_DOMAIN_PART
        counts = tuple[int, int, int]
        parts.append(
            commits
            | "Hosts" >> beam.ParDo(t.CountHosts(run, request.url_column)).with_output_types(tuple[str, counts])
            | "SumHosts" >> beam.CombinePerKey(t.SumCounts()).with_output_types(tuple[str, counts])
            | "PartOfHost" >> beam.Map(_part_of_host, pieces).with_output_types(tuple[int, tuple[str, counts]])
            | "PerPart" >> beam.GroupByKey()
            | "Domains" >> beam.ParDo(t.WriteHosts(request.out)).with_output_types(tuple[str, str])
        )
    parts.append(pipeline | "About" >> beam.Create([("run", json.dumps(about))]).with_output_types(tuple[str, str]))
    return (
        tuple(parts)
        | "All" >> beam.Flatten()
        | "Together" >> beam.Map(_together).with_output_types(tuple[str, tuple[str, str]])
        | "Group" >> beam.GroupByKey()
        | "Summary" >> beam.ParDo(t.WriteSummary(request.out)).with_output_types(str)
    )


def _quantiles_of(scores: beam.PCollection, wanted: list[float]) -> beam.PCollection:
    """(name, float32 bytes) of every score -> its exact quantiles, in two passes over histograms."""
    import apache_beam as beam

    from clipfilter.beam import transforms as t

    high = scores | "High" >> beam.CombinePerKey(t.SumHistograms()).with_output_types(tuple[str, bytes])
    low = (
        scores
        | "Select" >> beam.FlatMap(_in_buckets, beam.pvalue.AsDict(high), wanted).with_output_types(tuple[str, bytes])
        | "Low" >> beam.CombinePerKey(t.SumHistograms(low=True)).with_output_types(tuple[str, bytes])
        | "ByScore" >> beam.MapTuple(_by_score).with_output_types(tuple[str, tuple[int, bytes]])
    )
    tagged_high = high | "AsHigh" >> beam.MapTuple(_as_high).with_output_types(tuple[str, tuple[int, bytes]])
    return (
        (tagged_high, low)
        | "Both" >> beam.Flatten()
        | "PerScore" >> beam.GroupByKey()
        | "Quantiles" >> beam.Map(_quantiles, wanted).with_output_types(tuple[str, str])
    )


def _refuse_missing_column(request: StatisticsRequest, run: Run) -> None:
    from clipfilter.sources import Source

    if request.url_column is None:
        return
    names = Source.from_plan(run.dataset).schema.names
    if request.url_column not in names:
        raise RefusedError(
            f"the run has no column {request.url_column!r}; its source has {', '.join(names) or 'none'}."
        )


def _histogram(encoded: bytes) -> np.ndarray:
    return np.frombuffer(zlib.decompress(encoded), "<i8")


def _in_buckets(item: tuple[str, bytes], high: dict[str, bytes], wanted: list[float]) -> Iterator[tuple[str, bytes]]:
    """Each column once per bucket that a quantile falls into; the bucket leads the bytes and is in the key."""
    name, scores = item
    for bucket in quantile_buckets(_histogram(high[name]), wanted):
        yield f"{bucket:05d}{name}", bucket.to_bytes(4, "little") + scores


def _by_score(key: str, low: bytes) -> tuple[str, tuple[int, bytes]]:
    return key[5:], (int(key[:5]), low)


def _as_high(name: str, high: bytes) -> tuple[str, tuple[int, bytes]]:
    return name, (-1, high)


def _quantiles(item: tuple[str, Any], wanted: list[float]) -> tuple[str, str]:
    """All histograms of one score -> its exact quantiles, as JSON."""
    name, parts = item
    histograms = {bucket: _histogram(encoded) for bucket, encoded in parts}
    high = histograms.pop(-1)
    found = quantiles(high, histograms, wanted)
    content = {"name": name, "ranked": int(high.sum()), "quantiles": dict(zip(map(str, wanted), found, strict=True))}
    return "scores", json.dumps(content)


def _part_of_host(item: tuple[str, tuple[int, int, int]], pieces: int) -> tuple[int, tuple[str, tuple[int, int, int]]]:
    return zlib.crc32(item[0].encode()) % pieces, item


def _together(item: tuple[str, str]) -> tuple[str, tuple[str, str]]:
    return "", item
