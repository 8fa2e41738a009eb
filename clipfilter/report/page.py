"""The page: one HTML file with everything in it, no script, and a policy that forbids loading anything."""

from __future__ import annotations

import base64
import hashlib
import time
from importlib.resources import files
from urllib.parse import unquote

from clipfilter import __version__
from clipfilter.report import charts, reproduce, rules, text
from clipfilter.report.data import RunData
from clipfilter.report.examples import Examples

#: What a class of failure means, for people.
FAILURES = {
    "decode_error": "The bytes are not an image that can be shown: cut off, damaged, or something else under an image's name.",
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
_DECIDED = (("keep", "Kept"), ("review", "To review"), ("reject", "Rejected"), ("failed", "Failed"))


def render(data: RunData, examples: Examples, thumbnails: str, problem: str | None) -> str:
    """The whole document.

    thumbnails: "none", "blur" or "show", as asked for. problem: why pictures are missing, None when they are not.
    """
    style = files("clipfilter.report").joinpath("style.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    # The style's own hash instead of 'unsafe-inline': even markup that slipped through could not style anything.
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:; base-uri 'none'; form-action 'none'"
    title = f"{dataset_name(data)} – {_decided_by(data)}"
    sections = [
        _summary(data),
        rules.section(data, examples, thumbnails, problem),
        _failures(data),
        _speed(data),
        _policy(data),
        _fingerprints(data),
        _reproduce(data),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        '<meta name="robots" content="noindex">\n'
        f'<meta name="generator" content="clipfilter {__version__}">\n<link rel="icon" href="data:,">\n'
        f"<title>{text.esc(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        + _header(data)
        + "<main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main>\n"
        + f"<footer><p>Written by clipfilter {__version__} on {text.moment(time.time())} from the files of the run. "
        "Derived, for people: the run’s commits and versions are what counts.</p></footer>\n</body>\n</html>\n"
    )


def dataset_name(data: RunData) -> str:
    """The last part of the source's URL."""
    url = text.place(data.source.get("url", "")).rstrip("/")
    return unquote(url.rsplit("/", 1)[-1]) or url or "dataset"


def _decided_by(data: RunData) -> str:
    if data.plan.policy is None:
        return "embedded" if data.plan.job == "embed" else "scored"
    return f"{data.plan.policy['policy']} version {data.plan.policy['version']}"


def _header(data: RunData) -> str:
    facts = [
        f"Model {text.esc(data.plan.model.get('model', 'unknown'))}",
        f"{data.totals['shards']:,} {_plural(data.totals['shards'], 'shard')}",
        f"Dataset version {int(data.version)}",
        f"Finished {text.moment(data.speed.last)}",
    ]
    if data.plan.policy is not None:
        kicker = f"Filtered by the policy {text.esc(data.plan.policy['policy'])}, version {text.esc(data.plan.policy['version'])}"
    else:
        kicker = "Embedded; nothing was decided" if data.plan.job == "embed" else "Scored; nothing was decided"
    links = [("summary", "Summary"), *([("rules", "Rules")] if data.rules else [("similarity", "Similarity")])]
    links += [("failures", "Failures"), ("speed", "Speed")]
    links += [("policy", "Policy")] if data.plan.policy is not None else []
    links += [("fingerprints", "Fingerprints"), ("reproduce", "Reproduce")]
    return (
        f'<header>\n<p class="kicker">{kicker}</p>\n<h1><bdi>{text.esc(dataset_name(data), 120)}</bdi></h1>\n'
        f'<ul class="facts">{"".join(f"<li>{fact}</li>" for fact in facts)}</ul>\n'
        f'<nav aria-label="Sections"><ul>{"".join(f"<li><a href=#{name}>{shown}</a></li>" for name, shown in links)}</ul></nav>\n'
        "</header>\n"
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
        f'<div><dt>{_dot(name)}{shown}</dt><dd class="count">{counts[name]:,}</dd>'
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
    if not rows:
        return "This run has no images: the source held none that could be read."
    if totals["failed"]:
        failed = f" <b>{totals['failed']:,}</b> ({text.share(totals['failed'], rows)}) could not be read."
    else:
        failed = " Every image could be read."
    if data.plan.policy is None:
        done = "embedded" if data.plan.job == "embed" else "compared with their captions"
        return (
            f"Of {rows:,} images, <b>{totals['embedded']:,}</b> ({text.share(totals['embedded'], rows)}) are {done}. "
            f"Nothing has been decided yet.{failed}"
        )
    said = (
        f"Of {rows:,} images, <b>{totals['keep']:,}</b> ({text.share(totals['keep'], rows)}) are kept, "
        f"<b>{totals['reject']:,}</b> ({text.share(totals['reject'], rows)}) are rejected, and "
        f"<b>{totals['review']:,}</b> ({text.share(totals['review'], rows)}) wait for a person to decide.{failed}"
    )
    most = max(data.rules, key=lambda rule: rule.counts["reject"], default=None)
    if most is not None and most.counts["reject"] and len(data.rules) > 1:
        said += (
            f" The rule that rejects most is <b>{text.esc(most.id)}</b>, with {most.counts['reject']:,} "
            f"{_plural(most.counts['reject'], 'image')}."
        )
    return said


def _callout(data: RunData) -> str:
    """What a reader must know before trusting the numbers."""
    totals, notes, bad = data.totals, [], False
    if data.differences:
        bad = True
        notes.append(f"The numbers do not agree: {text.esc('; '.join(data.differences))}. Run <code>clipfilter verify</code>.")
    if totals["failed_shards"]:
        bad = True
        notes.append(
            f"{totals['failed_shards']:,} {_plural(totals['failed_shards'], 'shard')} could not be read at all; how many images "
            "they hold is unknown, and they are in no number on this page."
        )
    if totals["damaged_shards"]:
        bad = True
        count = totals["damaged_shards"]
        notes.append(
            f"{count:,} {_plural(count, 'shard')} {'is' if count == 1 else 'are'} damaged: {text.size(totals['bytes_unread'])} "
            "at the end could not be read. The images before the damage are counted here."
        )
    uncalibrated = [rule.id for rule in data.rules if rule.calibrated is False and rule.bands]
    if uncalibrated:
        shown = ", ".join(f"<b>{text.esc(name)}</b>" for name in uncalibrated[:12])
        more = f" and {len(uncalibrated) - 12} more" if len(uncalibrated) > 12 else ""
        notes.append(
            f"The thresholds of {shown}{more} are not calibrated for this model: they are the policy author’s choice, "
            "not measured on labelled examples, and say nothing about how often a decision is right."
        )
    options = data.plan.options
    if options.get("limit"):
        notes.append(f"Only the first {options['limit']:,} rows of the source were asked for (<code>--limit</code>).")
    if options.get("sample"):
        notes.append(f"Only a sample of {options['sample']:.3%} of the source was asked for (<code>--sample</code>).")
    if not notes:
        return ""
    items = "".join(f"<li>{note}</li>" for note in notes)
    return f'<aside class="callout{" bad" if bad else ""}" aria-label="Before you rely on this"><ul>{items}</ul></aside>\n'


def _failures(data: RunData) -> str:
    totals = data.totals
    parts = ['<section id="failures">\n<h2>Failures and gaps</h2>']
    if data.failures:
        parts.append(
            f"<p>{totals['failed']:,} of {totals['rows']:,} images ({text.share(totals['failed'], totals['rows'])}) failed. "
            "Each is recorded with its reason; none of them took another image with it.</p>"
        )
        body = ""
        for found in sorted(data.failures.values(), key=lambda item: -item.count):
            shown = "".join(
                f"<p><bdi>{text.esc(message, 300)}</bdi><br><span class=note><bdi>{text.esc(key, 120)}</bdi> in "
                f"<bdi>{text.esc(path, 160)}</bdi></span></p>"
                for message, key, path in found.examples
            )
            body += (
                f'<tr><th scope="row"><code>{text.esc(found.name)}</code></th><td class="num">{found.count:,}</td>'
                f'<td class="num">{text.share(found.count, totals["rows"])}</td>'
                f"<td>{text.esc(FAILURES.get(found.name, ''))}</td><td>{shown}</td></tr>"
            )
        parts.append(
            '<div class="scroll"><table><caption class="note">Failed images by class</caption><thead><tr><th scope="col">Class</th>'
            '<th scope="col" class="num">Images</th><th scope="col" class="num">Share</th><th scope="col">Meaning</th>'
            f'<th scope="col">Examples</th></tr></thead><tbody>{body}</tbody></table></div>'
        )
    else:
        parts.append("<p>No image failed.</p>")
    failed_shards = data.content["failed_shards"]
    if failed_shards:
        body = "".join(
            f'<tr><th scope="row"><bdi>{text.esc(item["shard"]["path"], 200)}</bdi></th><td><bdi>{text.esc(item["error"], 400)}</bdi></td></tr>'
            for item in failed_shards[:20]
        )
        more = f'<p class="note">{len(failed_shards) - 20:,} more are in the version file.</p>' if len(failed_shards) > 20 else ""
        parts.append(
            '<div class="scroll"><table><caption class="note">Shards that could not be read (their images are not counted)'
            '</caption><thead><tr><th scope="col">Shard</th><th scope="col">Error</th></tr></thead>'
            f"<tbody>{body}</tbody></table></div>{more}"
        )
    if data.damaged:
        body = "".join(
            f'<tr><th scope="row"><bdi>{text.esc(path, 200)}</bdi></th><td class="num">{unread:,}</td></tr>' for path, unread in data.damaged
        )
        parts.append(
            '<div class="scroll"><table><caption class="note">Damaged shards</caption><thead><tr><th scope="col">Shard</th>'
            f'<th scope="col" class="num">Bytes not read</th></tr></thead><tbody>{body}</tbody></table></div>'
        )
    gaps = [
        (totals["not_downloaded"], "rows of the source were never downloaded; they are not counted as images"),
        (totals["duplicate_keys"], "images have a key that an earlier image of their shard already has; both are kept apart"),
        (data.extra["clashes"], "files were passed over because their sample already had an image"),
        (data.extra["misfits"], "rows have metadata of another type than the rest; it is kept as JSON beside them"),
        (totals["captions_truncated"], "captions are longer than the model reads; it saw their beginning"),
        (data.speed.halvings, "times the batch was halved because memory ran out"),
        (data.speed.retries, "shards needed another attempt"),
    ]
    items = "".join(f"<li>{count:,} {what}.</li>" for count, what in gaps if count)
    parts.append(f"<ul>{items}</ul>" if items else "")
    return "\n".join(parts) + "\n</section>"


def _speed(data: RunData) -> str:
    speed, run, rows = data.speed, data.run, data.totals["rows"]
    parts = ['<section id="speed">\n<h2>Speed</h2>']
    done = run.get("rows_processed") or 0
    working = (run.get("seconds") or 0) - (run.get("startup_seconds") or 0)
    unit = "images" if data.plan.job != "filter" else "rows"
    if done and working > 0:
        parts.append(
            f"<p>{done:,} {unit} in {text.duration(working)}: <b>{_rate(done / working)} {unit} a second</b>, after "
            f"{text.duration(run.get('startup_seconds') or 0)} of start-up, with the {text.esc(run.get('engine', ''))} engine.</p>"
        )
        if done < rows:
            parts.append(f'<p class="note">The other {rows - done:,} were done by an earlier start of the same run.</p>')
    elif speed.first is not None and speed.last is not None and speed.last > speed.first and rows:
        span = speed.last - speed.first
        parts.append(
            f"<p>{rows:,} {unit} in {text.duration(span)} from the first shard’s beginning to the last one’s end "
            f"({_rate(rows / span)} {unit} a second, pauses included).</p>"
        )
    seconds = [(name, speed.seconds[name]) for name in _STEPS if speed.seconds[name] > 0]
    seconds += [(name, value) for name, value in sorted(speed.seconds.items()) if name not in _STEPS and value > 0]
    if seconds:
        whole = sum(value for _, value in seconds)
        drawn = [(_STEPS.get(name, (name, "failed"))[1], value) for name, value in seconds]
        label = "Worker time by step: " + ", ".join(
            f"{_STEPS.get(name, (name, ''))[0]} {text.share(value, whole)}" for name, value in seconds
        )
        body = "".join(
            f'<tr><th scope="row">{_dot(_STEPS.get(name, ("", "failed"))[1])} {text.esc(_STEPS.get(name, (name, ""))[0])}</th>'
            f'<td class="num">{text.duration(value)}</td><td class="num">{text.share(value, whole)}</td></tr>'
            for name, value in seconds
        )
        parts.append(
            charts.stacked_bar(drawn, label=label, height=18)
            + '<div class="scroll"><table><caption class="note">Where the workers’ time went. Steps overlap, so this adds up '
            "to more than the time on the clock.</caption>"
            '<thead><tr><th scope="col">Step</th><th scope="col" class="num">Time</th><th scope="col" class="num">Share</th></tr>'
            f"</thead><tbody>{body}</tbody></table></div>"
        )
    if speed.machines:
        count, cores = len(speed.machines), sum(speed.machines.values())
        backends = ", ".join(sorted(speed.backends)) or "unknown backend"
        parts.append(
            f'<p class="note">{count:,} {_plural(count, "machine")}, {cores:,} {_plural(cores, "core")} in all, {text.esc(backends)}.</p>'
        )
    return "\n".join(parts) + "\n</section>"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 20 else f"{value:.1f}"


def _policy(data: RunData) -> str:
    if data.plan.policy is None:
        return ""
    shown = text.clean_block(reproduce.policy_yaml(data.plan.policy), 200_000)
    import html

    return (
        '<section id="policy">\n<h2>Policy</h2>\n<p class="note">As it decided: lists written out, defaults filled in. '
        "It can be saved and used as a policy file.</p>\n"
        f'<pre tabindex="0" role="region" aria-label="Policy text"><code>{html.escape(shown)}</code></pre>\n</section>'
    )


def _fingerprints(data: RunData) -> str:
    model, plan, files_of = data.plan.model, data.plan, data.content["commits"]
    preprocess = model.get("preprocess") or {}
    rows = [
        ("Model", text.esc(model.get("model", "unknown"))),
        ("Architecture", text.esc(model.get("architecture", "unknown"))),
        ("Weights, sha256", _code(model.get("weights_sha256"))),
        (
            "Images as the model sees them",
            text.esc(
                f"{preprocess.get('size')} x {preprocess.get('size')} pixels, {preprocess.get('interpolation')}, "
                f"{preprocess.get('resize_mode')}; decoded {plan.options.get('decode', 'fast')}; {model.get('dtype', '')}"
            ),
        ),
        ("Policy, sha256", _code(plan.policy_sha256) if plan.policy_sha256 else "none"),
        ("Plan, sha256", _code(plan.sha256)),
        ("Dataset version", f"{int(data.version)}, made of {len(files_of):,} {_plural(len(files_of), 'commit')}"),
        ("Written by", text.esc(plan.created_by)),
    ]
    if data.content.get("thresholds"):
        fixed = ", ".join(
            f"{name} = {text.score(value) if value is not None else 'nothing to rank'}" for name, value in data.content["thresholds"].items()
        )
        rows.insert(6, ("Fixed over the dataset", text.esc(fixed, 2000)))
    if data.kept_files:
        rows.append(("Kept images", f"{data.kept_files:,} {_plural(data.kept_files, 'file')}, {text.size(data.kept_bytes)}"))
    body = "".join(f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' for name, value in rows)
    return (
        '<section id="fingerprints">\n<h2>Fingerprints</h2>\n<p class="note">What makes these decisions the ones they are; '
        "the same fingerprints give the same decisions.</p>\n"
        f'<div class="scroll"><table class="plain-table"><tbody>{body}</tbody></table></div>\n</section>'
    )


def _reproduce(data: RunData) -> str:
    lines = "\n\n".join(
        f'<span class="comment"># {text.esc(comment)}</span>\n{text.esc(command, 2000)}' for comment, command in reproduce.commands(data)
    )
    return (
        '<section id="reproduce">\n<h2>Check it, use it, repeat it</h2>\n'
        f'<pre class="commands" tabindex="0" role="region" aria-label="Commands"><code>{lines}</code></pre>\n</section>'
    )


def _code(value: object) -> str:
    return f"<code>{text.esc(value)}</code>"


def _dot(name: str) -> str:
    return f'<svg class="dot" width="10" height="10" aria-hidden="true"><circle class="{name}" cx="5" cy="5" r="5"/></svg>'


def _plural(count: int, word: str) -> str:
    return word if count == 1 else word + "s"
