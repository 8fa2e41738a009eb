"""The page: one HTML file with everything in it, no script, and a policy that forbids loading anything."""

from __future__ import annotations

import base64
import hashlib
import html
import time
from collections.abc import Sequence
from importlib.resources import files
from urllib.parse import unquote

from clipfilter.report import charts, reproduce, rules, text
from clipfilter.report.data import LISTED_SHARDS, RunData
from clipfilter.report.examples import Examples
from clipfilter.report.markup import dot, items, note, place_of, plural, table
from clipfilter.version import __version__

#: What a class of failure means, for people.
FAILURES = {
    "decode_error": "Not an image that can be shown: cut off, damaged, or something else under an image’s name.",
    "image_too_large": "More pixels than the limit; refused from the header, before memory was spent.",
    "missing_image": "The row names an image that is not there.",
    "read_error": "The image could not be fetched; the next run with --retry-failed tries again.",
    "decoder_crash": "The image brought its decoder down; it was isolated and only this row was lost.",
    "encode_error": "The model could not embed this image.",
}
_STEPS = {
    "decode": ("Reading and decoding", "step-a"),
    "encode_images": ("Embedding images", "step-b"),
    "encode_texts": ("Embedding captions", "step-c"),
    "decide_and_write": ("Deciding and writing", "step-d"),
}
_POLICY_CHARACTERS = 200_000
_DECIDED: tuple[tuple[str, str], ...] = (
    ("keep", "Kept"),
    ("review", "To review"),
    ("reject", "Rejected"),
    ("failed", "Failed"),
)


def render(data: RunData, examples: Examples, thumbnails: str, problem: str | None) -> str:
    """The whole document.

    thumbnails: "none", "blur" or "show", as asked for. problem: why pictures are missing, None when they are not.
    """
    sections = [
        _summary(data),
        rules.section(data, examples, thumbnails, problem),
        _failures(data),
        _speed(data),
        _policy(data),
        _fingerprints(data),
        _reproduce(data),
    ]
    title = f"{dataset_name(data)} – {_decided_by(data)}"
    derived = "the files of the run. Derived, for people: the run’s commits and versions are what counts"
    return document(title, _header(data), sections, derived)


def document(title: str, header: str, sections: Sequence[str], written_from: str) -> str:
    """A self-contained page. title: plain text; header and sections: HTML already escaped, empty sections left out."""
    style = files("clipfilter.report").joinpath("style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # The style's own hash instead of 'unsafe-inline': even markup that slipped through could not style anything.
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        '<meta name="robots" content="noindex">\n'
        f'<meta name="generator" content="clipfilter {__version__}">\n<link rel="icon" href="data:,">\n'
        f"<title>{text.esc(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + header
        + "<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n"
        + f"<footer><p>Written by clipfilter {__version__} on {text.moment(time.time())} from {written_from}."
        "</p></footer>\n</body>\n</html>\n"
    )


def dataset_name(data: RunData) -> str:
    """The last part of the source's URL."""
    url = text.place(data.plan.dataset.get("url", "")).rstrip("/")
    name = url.rsplit("/", 1)[-1]
    return (unquote(name) if "://" in url else name) or "dataset"


def _decided_by(data: RunData) -> str:
    if data.plan.policy is None:
        return "embedded" if data.plan.job == "embed" else "scored"
    return f"{data.plan.policy['policy']} version {data.plan.policy['version']}"


def _header(data: RunData) -> str:
    policy = data.plan.policy
    facts = [
        f"Model {text.esc(data.plan.model.get('model', 'unknown'))}",
        plural(data.totals["shards"], "shard"),
        f"Dataset version {data.version.number}",
        f"Finished {text.moment(data.speed.last)}",
    ]
    if policy is not None:
        kicker = f"Filtered by the policy {text.esc(policy['policy'])}, version {text.esc(policy['version'])}"
    else:
        kicker = f"{_decided_by(data).capitalize()}; nothing was decided"
    links = {
        "summary": "Summary",
        **({"rules": "Rules"} if policy is not None else {"similarity": "Similarity"}),
        "failures": "Failures",
        "speed": "Speed",
        **({"policy": "Policy"} if policy is not None else {}),
        "fingerprints": "Fingerprints",
        "reproduce": "Reproduce",
    }
    listed = items([f'<a href="#{name}">{shown}</a>' for name, shown in links.items()])
    return (
        f'<header>\n<p class="kicker">{kicker}</p>\n<h1><bdi>{text.esc(dataset_name(data), 120)}</bdi></h1>\n'
        f'<div class="facts">{items(facts)}</div>\n<nav aria-label="Sections">{listed}</nav>\n</header>\n'
    )


def _summary(data: RunData) -> str:
    totals, rows = data.totals, data.totals["rows"]
    if data.plan.policy is not None:
        names = _DECIDED
        counts = {name: totals[name] for name, _ in names}
    else:
        names = (("plain", "Embedded"), ("failed", "Failed"))
        counts = {"plain": totals["embedded"], "failed": totals["failed"]}
    label = ", ".join(f"{shown} {counts[name]:,} ({text.share(counts[name], rows)})" for name, shown in names)
    tiles = [f'<div><dt>Images in</dt><dd class="count">{rows:,}</dd></div>']
    tiles += [
        f'<div><dt>{dot(name)}{shown}</dt><dd class="count">{counts[name]:,}</dd>'
        f'<dd class="part">{text.share(counts[name], rows)}</dd></div>'
        for name, shown in names
    ]
    return (
        '<section id="summary" aria-label="Summary">\n'
        f'<p class="lead">{_sentence(data)}</p>\n'
        + charts.stacked_bar([(name, counts[name]) for name, _ in names], label=label)
        + f'\n<dl class="tiles">{"".join(tiles)}</dl>\n{_callout(data)}</section>'
    )


def _sentence(data: RunData) -> str:
    """What happened, in words that need no knowledge of the tool."""
    totals, rows = data.totals, data.totals["rows"]

    def part(name: str) -> str:
        return f"<b>{totals[name]:,}</b> ({text.share(totals[name], rows)})"

    if not rows:
        return "This run has no images: the source held none that could be read."
    failed = f" {part('failed')} could not be read." if totals["failed"] else " Every image could be read."
    if data.plan.policy is None:
        done = "embedded" if data.plan.job == "embed" else "compared with their captions"
        return f"Of {rows:,} images, {part('embedded')} are {done}. Nothing has been decided yet.{failed}"
    said = (
        f"Of {rows:,} images, {part('keep')} are kept, {part('reject')} are rejected, and {part('review')} wait for "
        f"a person to decide.{failed}"
    )
    most = max(data.rules, key=lambda rule: rule.counts["reject"], default=None)
    if most is not None and most.counts["reject"] and len(data.rules) > 1:
        said += (
            f" The rule that rejects most is <b>{text.esc(most.id)}</b>, with {plural(most.counts['reject'], 'image')}."
        )
    return said


def _callout(data: RunData) -> str:
    """What a reader must know before trusting the numbers."""
    totals, options, notes = data.totals, data.plan.options, []
    if data.differences:
        different = text.esc("; ".join(data.differences))
        notes.append(f"The numbers do not agree: {different}. Run <code>clipfilter verify</code>.")
    if totals["failed_shards"]:
        notes.append(
            f"{plural(totals['failed_shards'], 'shard')} could not be read at all. How many images they hold is "
            "unknown, and no number on this page counts them."
        )
    if totals["damaged_shards"]:
        notes.append(
            f"{plural(totals['damaged_shards'], 'shard')} damaged: {text.size(totals['bytes_unread'])} at the end "
            "could not be read. The images before the damage are counted here."
        )
    bad = bool(notes)
    uncalibrated = [rule.id for rule in data.rules if rule.calibrated is False and rule.bands]
    if uncalibrated:
        shown = ", ".join(f"<b>{text.esc(name)}</b>" for name in uncalibrated[:12])
        more = f" and {len(uncalibrated) - 12} more" if len(uncalibrated) > 12 else ""
        notes.append(
            f"The thresholds of {shown}{more} are not calibrated for this model: they are the policy author’s "
            "choice, not measured on labelled examples, and say nothing about how often a decision is right."
        )
    if options.get("limit"):
        notes.append(f"Only the first {options['limit']:,} rows of the source were asked for (<code>--limit</code>).")
    if options.get("sample"):
        notes.append(f"Only {options['sample']:.4g} of the source’s rows were asked for (<code>--sample</code>).")
    look = "callout bad" if bad else "callout"
    return f'<aside class="{look}" aria-label="Before you rely on this">{items(notes)}</aside>\n' if notes else ""


def _failures(data: RunData) -> str:
    totals = data.totals
    parts = ['<section id="failures">\n<h2>Failures and gaps</h2>']
    if data.failures:
        parts.append(
            f"<p>{totals['failed']:,} of {totals['rows']:,} images failed. Each is recorded with its reason; none of "
            "them took another image with it.</p>"
        )
        rows = []
        for found in sorted(data.failures.values(), key=lambda item: -item.count):
            examples = "".join(
                f"<p><bdi>{text.esc(text.place(message), 300)}</bdi><br>"
                f'<span class="note">{place_of(key, path)}</span></p>'
                for message, key, path in found.examples
            )
            meaning = text.esc(FAILURES.get(found.name, ""))
            name = f"<code>{text.esc(found.name)}</code>"
            rows.append([name, f"{found.count:,}", text.share(found.count, totals["rows"]), meaning, examples])
        columns = ["Class", "#Images", "#Share", "Meaning", "Examples"]
        parts.append(table(columns, rows, caption="Failed images by class"))
    else:
        parts.append("<p>No image failed.</p>")
    failed_shards = data.version.failed_shards
    if failed_shards:
        rows = [
            [
                f"<bdi class='wrap'>{text.esc(item.shard.path, 200)}</bdi>",
                f"<bdi>{text.esc(text.place(item.error), 400)}</bdi>",
            ]
            for item in failed_shards[:LISTED_SHARDS]
        ]
        said = "Shards that could not be read; their images are not counted"
        parts.append(table(["Shard", "Error"], rows, caption=said))
        parts.append(_more(len(failed_shards)))
    if data.damaged:
        rows = [[f"<bdi class='wrap'>{text.esc(path, 200)}</bdi>", f"{unread:,}"] for path, unread in data.damaged]
        parts.append(table(["Shard", "#Bytes not read"], rows, caption="Damaged shards"))
        parts.append(_more(totals["damaged_shards"]))
    gaps = [
        (totals["not_downloaded"], "rows of the source were never downloaded; they are not counted as images"),
        (totals["duplicate_keys"], "images have a key that an earlier image of their shard has; both are kept apart"),
        (data.extra["clashes"], "files were passed over because their sample already had an image"),
        (data.extra["misfits"], "rows have metadata of another type than the rest; it is kept as JSON beside them"),
        (totals["captions_truncated"], "captions are longer than the model reads; it saw their beginning"),
        (data.speed.halvings, "times the batch was halved because memory ran out"),
        (data.speed.retries, "shards needed another attempt"),
    ]
    parts.append(items([f"{count:,} {what}." for count, what in gaps if count]))
    return "\n".join(part for part in parts if part) + "\n</section>"


def _more(count: int) -> str:
    return note(f"{count - LISTED_SHARDS:,} more are not listed here.") if count > LISTED_SHARDS else ""


def _speed(data: RunData) -> str:
    speed, run, rows = data.speed, data.summary, data.totals["rows"]
    parts = ['<section id="speed">\n<h2>Speed</h2>']
    done = run.get("rows_processed") or 0
    startup = run.get("startup_seconds") or 0
    working = (run.get("seconds") or 0) - startup
    unit = "images" if data.plan.job != "filter" else "rows"
    if done and working > 0:
        parts.append(
            f"<p>{done:,} {unit} in {text.duration(working)}: <b>{_rate(done / working)} {unit} a second</b>, after "
            f"{text.duration(startup)} of start-up, with the {text.esc(run.get('engine', ''))} engine.</p>"
        )
        if done < rows:
            parts.append(note(f"The other {rows - done:,} were done by an earlier start of the same run."))
    elif speed.first is not None and speed.last is not None and speed.last > speed.first and rows:
        span = speed.last - speed.first
        parts.append(
            f"<p>{rows:,} {unit} in {text.duration(span)} from the beginning of the first shard to the end of the last "
            f"one ({_rate(rows / span)} {unit} a second, pauses included).</p>"
        )
    steps = {name: speed.seconds[name] for name in _STEPS} | dict(sorted(speed.seconds.items()))
    steps = {name: value for name, value in steps.items() if value > 0}
    if steps:
        whole = sum(steps.values())
        named = {name: _STEPS.get(name, (name, "failed")) for name in steps}
        label = ", ".join(f"{named[name][0]} {text.share(value, whole)}" for name, value in steps.items())
        bar = [(named[name][1], value) for name, value in steps.items()]
        body = [
            [f"{dot(named[name][1])} {text.esc(named[name][0])}", text.duration(value), text.share(value, whole)]
            for name, value in steps.items()
        ]
        parts.append(charts.stacked_bar(bar, label=f"Worker time by step: {label}", height=18))
        said = "Where the workers’ time went. Steps overlap, so they can add up to more than the clock’s time."
        parts.append(table(["Step", "#Time", "#Share"], body, caption=said, attributes=' class="narrow"'))
    if speed.machines:
        where = f"{plural(len(speed.machines), 'machine')}, {plural(sum(speed.machines.values()), 'core')} in all"
        parts.append(note(f"{where}, {text.esc(', '.join(sorted(speed.backends)) or 'unknown backend')}."))
    return "\n".join(parts) + "\n</section>"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def _policy(data: RunData) -> str:
    if data.plan.policy is None:
        return ""
    shown = html.escape(text.clean_block(reproduce.policy_yaml(data.plan.policy), _POLICY_CHARACTERS))
    return (
        '<section id="policy">\n<h2>Policy</h2>\n'
        + note("As it decided: lists written out, defaults filled in. It can be saved and used as a policy file.")
        + f'\n<pre tabindex="0" role="region" aria-label="Policy text"><code>{shown}</code></pre>\n</section>'
    )


def _fingerprints(data: RunData) -> str:
    model, plan = data.plan.model, data.plan
    preprocess = model.get("preprocess") or {}
    seen = (
        f"{preprocess.get('size')} x {preprocess.get('size')} pixels, {preprocess.get('interpolation')}, "
        f"{preprocess.get('resize_mode')} side, decoded {plan.options.get('decode', 'fast')}"
    )
    rows = [
        ["Model", text.esc(model.get("model", "unknown"))],
        ["Architecture", text.esc(model.get("architecture", "unknown"))],
        ["Weights, sha256", _code(model.get("weights_sha256"))],
        ["Images as it sees them", text.esc(seen)],
        ["Precision", text.esc(model.get("dtype", "unknown"))],
        ["Policy, sha256", _code(plan.policy_sha256) if plan.policy_sha256 else "no policy"],
        ["Plan, sha256", _code(plan.sha256)],
    ]
    for name, value in data.version.thresholds.items():
        rows.append([f"Fixed: {text.esc(name)}", text.score(value) if value is not None else "nothing to rank"])
    rows.append(["Dataset version", f"{data.version.number}, made of {plural(len(data.version.commits), 'commit')}"])
    if data.kept_files:
        rows.append(["Kept images", f"{plural(data.kept_files, 'file')}, {text.size(data.kept_bytes)}"])
    rows.append(["Written by", text.esc(plan.created_by)])
    return (
        '<section id="fingerprints">\n<h2>Fingerprints</h2>\n'
        + note("What makes these decisions the ones they are; equal fingerprints give equal decisions.")
        + table(["", ""], rows, attributes=' class="plain-table"')
        + "\n</section>"
    )


def _reproduce(data: RunData) -> str:
    lines = "\n\n".join(
        f'<span class="comment"># {text.esc(comment)}</span>\n{text.esc(command, 2000)}'
        for comment, command in reproduce.commands(data)
    )
    return (
        '<section id="reproduce">\n<h2>Check it, use it, repeat it</h2>\n'
        f'<pre class="commands" tabindex="0" role="region" aria-label="Commands"><code>{lines}</code></pre>\n</section>'
    )


def _code(value: object) -> str:
    return f"<code>{text.esc(value)}</code>"
