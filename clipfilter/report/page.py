"""The page: one HTML file with everything in it, no script, and a policy that forbids loading anything."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from clipfilter import charts, text
from clipfilter.report import reproduce, rules
from clipfilter.report.data import LISTED_SHARDS, RunData, Speed
from clipfilter.report.examples import Examples
from clipfilter.report.html import page
from clipfilter.report.thumbnails import NO_THUMBNAILS

#: What a class of failure means, for people.
FAILURES = {
    "decode_error": "Not an image that can be shown: cut off, damaged, or something else under an image’s name.",
    "unsupported_format": "A picture, drawing or video of a kind that is not read; it may well be whole.",
    "image_too_large": "More pixels than the limit; refused from the header, before memory was spent.",
    "missing_image": "The row names an image that is not there.",
    "read_error": "The image could not be fetched; the next run with --retry-failed tries again.",
    "decoder_crash": "The image brought its decoder down; it was isolated and only this row was lost.",
    "decode_timeout": "Decoding took longer than --decode-timeout; the next run with --retry-failed tries again.",
    "encode_error": "The model could not embed this image.",
    "unexpected_error": "Something nobody foresaw happened with this row; it alone was lost. Please report it.",
}
#: What the workers' seconds are spent on: words and the class of its part of the bar.
_STEPS = {
    "decode": ("Reading and decoding", "step-a"),
    "encode_images": ("Embedding images", "step-b"),
    "encode_texts": ("Embedding captions", "step-c"),
    "decide_and_write": ("Deciding and writing", "step-d"),
}
_POLICY_CHARACTERS = 200_000
_DECIDED = {"keep": "Kept", "review": "To review", "reject": "Rejected", "failed": "Failed"}


def render(data: RunData, examples: Examples, thumbnails: str, problem: str | None) -> str:
    """The whole document.

    thumbnails: "none", "blur" or "show", as asked for. problem: why pictures are missing, None when they are not.
    """
    policy = data.plan.policy
    shown = rules.views(data, examples) if policy is not None else rules.similarity(data, examples)
    return page(
        "report.html",
        policy=policy,
        policy_text=text.clean_block(reproduce.policy_yaml(policy or {}), _POLICY_CHARACTERS),
        totals=data.totals,
        options={"limit": None, "sample": None} | data.plan.options,
        chosen=len(data.chosen),
        thumbnails=thumbnails,
        problem=problem or "",
        no_thumbnails=bool(problem and problem.endswith(NO_THUMBNAILS)),
        fingerprints=_fingerprints(data),
        commands=reproduce.commands(data),
        **_header(data),
        **_summary(data),
        **_failures(data),
        **_speed(data),
        **shown,
    )


def dataset_name(data: RunData) -> str:
    """The last part of the source's URL."""
    url = text.place(data.plan.dataset.get("url", "")).rstrip("/")
    name = url.rsplit("/", 1)[-1]
    return (unquote(name) if "://" in url else name) or "dataset"


def _header(data: RunData) -> dict[str, Any]:
    policy, job, name = data.plan.policy, data.plan.job, dataset_name(data)
    if policy is not None:
        decided = f"{policy['policy']} version {policy['version']}"
        kicker = f"Filtered by the policy {policy['policy']}, version {policy['version']}"
    else:
        decided = "embedded" if job == "embed" else "scored"
        kicker = f"{decided.capitalize()}; nothing was decided"
    links = ["Summary", "Similarity", "Failures", "Speed", "Fingerprints", "Reproduce"]
    if policy is not None:
        links = ["Summary", "Rules", "Failures", "Speed", "Policy", "Fingerprints", "Reproduce"]
    return {
        "title": f"{name} – {decided}",
        "name": name,
        "kicker": kicker,
        "links": {shown.lower(): shown for shown in links},
        "facts": [
            f"Model {data.plan.model.get('model', 'unknown')}",
            text.plural(data.totals.shards, "shard"),
            f"Dataset version {data.version.number}",
            f"Finished {text.moment(data.speed.last)}",
        ],
    }


def _summary(data: RunData) -> dict[str, Any]:
    totals = data.totals
    if data.plan.policy is not None:
        tiles = [(name, shown, totals[name]) for name, shown in _DECIDED.items()]
    else:
        tiles = [("plain", "Embedded", totals.embedded), ("failed", "Failed", totals.failed)]
    label = ", ".join(f"{shown} {count:,} ({text.share(count, totals.rows)})" for _, shown, count in tiles)
    busiest = max(data.rules, key=lambda rule: rule.counts["reject"], default=None)
    several = busiest is not None and busiest.counts["reject"] and len(data.rules) > 1
    return {
        "done": "embedded" if data.plan.job == "embed" else "compared with their captions",
        "tiles": tiles,
        "summary_bar": charts.stacked_bar([(name, count) for name, _, count in tiles], label=label),
        "busiest": busiest if several else None,
        "differences": data.differences,
        "uncalibrated": [rule.id for rule in data.rules if rule.calibrated is False and rule.bands],
    }


def _failures(data: RunData) -> dict[str, Any]:
    totals = data.totals
    gaps = [
        (totals.not_downloaded, "rows of the source were never downloaded; they are not counted as images"),
        (totals.duplicate_keys, "images have a key that an earlier image of their shard has; both are kept apart"),
        (data.extra["clashes"], "files were passed over because their sample already had an image"),
        (data.extra["misfits"], "rows have metadata of another type than the rest; it is kept as JSON beside them"),
        (totals.captions_truncated, "captions are longer than the model reads; it saw their beginning"),
        (
            totals.profiles_ignored,
            "images have a colour profile that cannot be used; their colours were taken as they are",
        ),
        (data.speed.halvings, "times the batch was halved because memory ran out"),
        (data.speed.retries, "shards needed another attempt"),
    ]
    return {
        "failures": sorted(data.failures.values(), key=lambda item: -item.count),
        "meanings": FAILURES,
        "failed_shards": data.version.failed_shards,
        "damaged": data.damaged,
        "listed": LISTED_SHARDS,
        "gaps": [(count, what) for count, what in gaps if count],
    }


def _speed(data: RunData) -> dict[str, Any]:
    speed, run, rows = data.speed, data.summary, data.totals.rows
    done, startup = run.get("rows_processed") or 0, run.get("startup_seconds") or 0
    working = (run.get("seconds") or 0) - startup
    timed = span = None
    if done and working > 0:
        timed = {"rows": done, "seconds": working, "rate": _rate(done / working), "startup": startup}
        timed["engine"] = run.get("engine", "")
    elif speed.first is not None and speed.last is not None and speed.last > speed.first and rows:
        seconds = speed.last - speed.first
        span = {"seconds": seconds, "rate": _rate(rows / seconds)}
    steps = _steps(speed)
    label = ", ".join(f"{shown} {share}" for shown, _, _, share in steps)
    bar = [(look, seconds) for _, look, seconds, _ in steps]
    return {
        "unit": "images" if data.plan.job != "filter" else "rows",
        "timed": timed,
        "span": span,
        "steps": steps,
        "steps_bar": charts.stacked_bar(bar, label=f"Worker time by step: {label}", height=18),
        "machines": speed.machines,
        "backends": speed.backends,
    }


def _steps(speed: Speed) -> list[tuple[str, str, float, str]]:
    """(words, class, worker seconds, share of all) of the steps that took any time, in the order of the work."""
    seconds = {name: speed.seconds[name] for name in _STEPS} | dict(sorted(speed.seconds.items()))
    whole = sum(value for value in seconds.values() if value > 0)
    return [
        (*_STEPS.get(name, (name, "failed")), value, text.share(value, whole))
        for name, value in seconds.items()
        if value > 0
    ]


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def _fingerprints(data: RunData) -> list[tuple[str, object, bool]]:
    """(what, its value, whether that is a hash) of all that makes the decisions what they are."""
    model, plan = data.plan.model, data.plan
    preprocess = model.get("preprocess") or {}
    seen = (
        f"{preprocess.get('size')} x {preprocess.get('size')} pixels, {preprocess.get('interpolation')}, "
        f"{preprocess.get('resize_mode')} side, decoded {plan.options.get('decode', 'fast')}"
    )
    rows: list[tuple[str, object, bool]] = [
        ("Model", model.get("model", "unknown"), False),
        ("Architecture", model.get("architecture", "unknown"), False),
        ("Weights, sha256", model.get("weights_sha256"), True),
        ("Images as it sees them", seen, False),
        ("Precision", model.get("dtype", "unknown"), False),
        ("Policy, sha256", plan.policy_sha256 or "no policy", bool(plan.policy_sha256)),
        ("Plan, sha256", plan.sha256, True),
    ]
    for name, value in data.version.thresholds.items():
        rows.append((f"Fixed: {name}", text.score(value) if value is not None else "nothing to rank", False))
    made = f"{data.version.number}, made of {text.plural(len(data.version.commits), 'commit')}"
    rows.append(("Dataset version", made, False))
    if data.kept_files:
        rows.append(("Kept images", f"{text.plural(data.kept_files, 'file')}, {text.size(data.kept_bytes)}", False))
    rows.append(("Written by", plan.created_by, False))
    return rows
