"""`clipfilter policy sample` and `clipfilter policy calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipfilter.cli.options import Json, Policy
from clipfilter.cli.printing import new_table, print_json, say, stdout
from clipfilter.decisions import Limit

if TYPE_CHECKING:
    from clipfilter.calibration import Calibrated, Sample

RuleOption = Annotated[str | None, typer.Option(help="Id of the rule [default: the only one that can be meant].")]


def sample(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory of a run or filter.")],
    out: Annotated[str, typer.Option("--out", "-o", help="File to write: .csv, .jsonl or .parquet.")],
    rule: RuleOption = None,
    policy: Annotated[
        str | None, typer.Option("--policy", "-p", help="Policy whose thresholds count [default: the run's].")
    ] = None,
    n: Annotated[int, typer.Option("--n", min=1, help="How many rows.")] = 400,
    design: Annotated[
        Literal["uniform", "flagged", "uncertain", "per-band"],
        typer.Option(
            help="uniform: all scored rows alike; flagged: those beyond --cut alike; uncertain: nearest to a threshold; "
            "per-band: as many from each band. Only the first two earn a guarantee."
        ),
    ] = "uniform",
    cut: Annotated[
        float | None, typer.Option(help="Raw score for flagged and uncertain [default: the rule's loosest threshold].")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws other rows.")] = 0,
    as_json: Json = False,
) -> None:
    """Draw rows to label from a run: a file with captions, scores and an empty column for the label."""
    from clipfilter.calibration import draw, find_rule, open_scored, refuse_other_scores, write_sample
    from clipfilter.policies import load_policy

    scored = open_scored(run)
    used = load_policy(policy) if policy else scored.policy
    chosen = find_rule(used, rule)
    refuse_other_scores(scored, used, chosen)
    drawn = draw(scored, used, chosen, n=n, design=design, cut=cut, seed=seed)
    write_sample(drawn, out)
    if as_json:
        print_json(_sample_summary(drawn, out))
        return
    rows = drawn.rows.num_rows
    typer.echo(f"{rows:,} of {drawn.population:,} rows to label for {drawn.rule!r} ({drawn.design}) in {out}")
    if drawn.unscored:
        typer.echo(f"{drawn.unscored:,} rows of the run have no score of this rule and cannot be drawn")
    typer.echo(
        "fill in the column label with 1 (the rule is right to flag it) or 0, from the top; leave doubtful rows empty"
    )


def _sample_summary(drawn: Sample, out: str) -> dict[str, Any]:
    return {
        "out": out, "rule": drawn.rule, "rows": drawn.rows.num_rows, "population": drawn.population,
        "unscored": drawn.unscored, "sample_design": str(drawn.design),
    }  # fmt: skip


def calibrate(
    policy: Policy,
    labels: Annotated[str, typer.Option(help="Labels: .csv, .jsonl or .parquet with cf_uid or cf_key, and label.")],
    on: Annotated[str, typer.Option("--on", metavar="RUN", help="Run or filter whose stored scores are used.")],
    target: Annotated[
        list[str],
        typer.Option(help="precision=0.95, miss-rate=0.05 or review-budget=0.02; give it twice for both bands."),
    ],
    rule: RuleOption = None,
    confidence: Annotated[float, typer.Option(help="Confidence of the guarantee.")] = 0.9,
    band: Annotated[
        Limit | None,
        typer.Option(help="Band that a single target is for [default: reject for precision, else review]."),
    ] = None,
    prevalence: Annotated[
        float | None, typer.Option(help="Share of true rows to expect the results at [default: that of the labels].")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="Write a calibrated copy there and leave POLICY alone.")
    ] = None,
    plot: Annotated[str | None, typer.Option(help="Write a plot to this .svg file.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the thresholds, write no policy.")] = False,
    as_json: Json = False,
) -> None:
    """Choose a rule's thresholds from labels, with a guarantee, and write them with their evidence into the policy."""
    from clipfilter import calibration as c
    from clipfilter.errors import RefusedError
    from clipfilter.policies import load_policy

    if band is not None and len(target) > 1:
        raise RefusedError("--band is for a single --target; several have a band each.")
    targets = [c.Target.parse(text, band) for text in target]
    if plot is not None and not (plot.lower().endswith(".svg") and Path(plot).parent.is_dir()):
        raise RefusedError(f"--plot {plot} must be an .svg file in a folder that exists.")
    loaded = load_policy(policy)
    source, destination = (None, None) if dry_run else c.policy_path(policy, out)
    judged = (c.open_scored(on), c.read_labels(labels), targets)
    found = c.calibrate(loaded, *judged, rule=rule, confidence=confidence, prevalence=prevalence)
    if source is not None and destination is not None:
        _write(found, source, destination)
    if plot is not None:
        Path(plot).write_text(c.plot_svg(found), encoding="utf-8")
    written = str(destination) if destination else None
    if as_json:
        print_json(_summary(found, written))
    else:
        _print(found, written, plot)


def _write(found: Calibrated, source: Path, destination: Path) -> None:
    """Write the policy with its new thresholds; what has been changed in it meanwhile is not overwritten."""
    import datetime

    from clipfilter.calibration import calibrated_text, write_policy

    raw = source.read_bytes()
    text = calibrated_text(raw, str(source), found, datetime.date.today().isoformat())
    same = destination.exists() and destination.samefile(source)
    write_policy(destination, text, expected=raw if same else None)


def _summary(found: Calibrated, written: str | None) -> dict[str, Any]:
    from dataclasses import asdict, replace

    plain = asdict(replace(found, fitted=None))
    for name in ("scores", "true", "weights", "fitted"):
        del plain[name]
    fitted = found.fitted
    plain["probability"] = None if fitted is None else {
        "n": fitted.n,
        "platt": {"a": fitted.platt.a, "b": fitted.platt.b, "brier": fitted.brier["platt"], "ece": fitted.ece["platt"]},
        "isotonic": {
            "scores": fitted.isotonic.scores.tolist(), "probabilities": fitted.isotonic.probabilities.tolist(),
            "brier": fitted.brier["isotonic"], "ece": fitted.ece["isotonic"],
        },
    }  # fmt: skip
    return plain | {"written": written}


def _print(found: Calibrated, written: str | None, plot: str | None) -> None:
    console = stdout()
    say(
        console,
        f"{found.rule}: {found.labels:,} labels ({found.positives:,} positive, {found.design}), "
        f"scores of {found.model}, decode {found.decode}",
    )
    for item in found.thresholds:
        value = f"{item.direction} {item.value:.6g}"
        say(console, f"  {item.target:<20}  {item.band:<6}  {value:<14}  {_counts(item)}; {_promise(item)}")
    at = found.stated_prevalence if found.stated_prevalence is not None else found.prevalence
    say(console, f"to expect of {found.rows:,} rows" + (f", {at:.1%} of them true" if at is not None else "") + ":")
    expected = new_table("band", ">rows", ">share", ">of these true", ">of all true")
    for row in found.expected:
        interval = f" ({row.low:.3f} to {row.high:.3f})" if row.low is not None and row.high is not None else ""
        expected.add_row(
            row.band,
            f"{row.rows:,}",
            f"{row.share:.2%}" if row.share is not None else "",
            f"{row.precision:.3f}{interval}" if row.precision is not None else "not known",
            f"{row.recall:.1%}" if row.recall is not None else "not known",
        )
    console.print(expected)
    if found.fitted is not None:
        scores = [
            f"{n} Brier {found.fitted.brier[n]:.4f}, ECE {found.fitted.ece[n]:.4f}" for n in ("platt", "isotonic")
        ]
        say(console, f"probability of a score (cross-validated): {'; '.join(scores)}")
    for note in found.notes:
        say(console, note, style="yellow")
    if plot is not None:
        say(console, f"plot     {plot}")
    if written:
        say(console, f"written  {written}")
    else:
        say(console, "nothing was written (--dry-run)", style="dim")


def _counts(item: Any) -> str:
    if item.target.startswith("precision"):
        return f"{item.k:,} of {item.m:,} flagged are true"
    if item.target.startswith("miss-rate"):
        return f"{item.k:,} of {item.m:,} positives missed"
    return f"{item.m:,} of {item.n:,} rows"


def _promise(item: Any) -> str:
    if not item.guarantee:
        return "an estimate, no guarantee"
    if item.target.startswith("precision"):
        return f"guaranteed with {item.confidence:.0%} confidence"
    if item.target.startswith("miss-rate"):
        return f"guaranteed on average, and at most {item.bound:.3g} with {item.confidence:.0%} confidence"
    return "exact for this run"
