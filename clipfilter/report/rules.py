"""The rules' part of the page: the table of decisions, and per rule its histogram, thresholds and examples."""

from __future__ import annotations

from clipfilter.policies import Written, in_words, joined
from clipfilter.report import charts, text
from clipfilter.report.data import Band, RuleData, RunData
from clipfilter.report.examples import HEADINGS, Example, Examples
from clipfilter.report.histogram import Histogram
from clipfilter.report.markup import dot, note, plural, table
from clipfilter.report.thumbnails import NO_THUMBNAILS

_DECISIONS = {"keep": "kept", "review": "review", "reject": "rejected", None: "undecided"}
_ON_MISSING = {"review": "goes to review", "reject": "is rejected", "keep": "is let through"}


def section(data: RunData, examples: Examples, thumbnails: str, problem: str | None) -> str:
    """All rules; for a run without policy the similarity of images and captions."""
    if data.plan.policy is None:
        return _similarity(data, examples, thumbnails, problem)
    parts = ['<section id="rules">\n<h2>Decisions by rule</h2>', _table(data)]
    parts.append(_about_examples(data, thumbnails, problem) if examples.by_bucket else "")
    parts += [_rule(data, rule, examples) for rule in data.rules]
    return "\n".join(parts) + "\n</section>"


def _table(data: RunData) -> str:
    total = data.totals["rows"]
    rows = []
    for rule in data.rules:
        counts = [rule.counts[band] for band in ("reject", "review", "missing")]
        counts[0] += rule.counts["escalate"]
        label = "{:,} rejected, {:,} to review, {:,} not scored".format(*counts)
        parts = [*zip(("reject", "review", "failed"), counts, strict=True), ("empty", max(total - rule.stopped, 0))]
        rows.append(
            [
                f'<a href="#rule-{text.esc(rule.id)}">{text.esc(rule.id)}</a>',
                *(f"{count:,}" for count in counts),
                text.share(rule.stopped, total),
                f"{rule.alone:,}",
                charts.stacked_bar(parts, label=label, height=12),
            ]
        )
    legend = {"reject": "Reject", "review": "Review", "failed": "Not scored"}
    columns = [
        "Rule",
        *(f"#{dot(look)}{title}" for look, title in legend.items()),
        "#Share",
        "#By it alone",
        "~Of all images",
    ]
    return note(
        "How many images each rule puts into its bands. An image can be caught by several rules, and the worst one "
        "decides. “By it alone” counts the images that would have been treated more mildly without the rule."
    ) + table(columns, rows)


def _about_examples(data: RunData, thumbnails: str, problem: str | None) -> str:
    """Where the examples come from, and what became of their pictures."""
    said = f"The examples come from {len(data.chosen):,} of {plural(data.totals['shards'], 'shard')}."
    if thumbnails == "none":
        return note(f"{said} They are without pictures (<code>--thumbnails none</code>).")
    if problem and problem.endswith(NO_THUMBNAILS):
        return note(f"{said} {text.esc(text.place(problem))}")
    if thumbnails == "show":
        said += " All their pictures are shown clearly (<code>--thumbnails show</code>)."
    else:
        which = "nobody has decided about yet" if data.plan.policy is None else "were not kept"
        said += (
            f" Pictures that {which} are blurred beyond recovery; "
            "<code>clipfilter report --thumbnails show</code> writes the page with clear ones."
        )
    return note(f"{said} {text.esc(text.place(problem or ''))}")


def _rule(data: RunData, rule: RuleData, examples: Examples) -> str:
    name = text.esc(rule.id)
    chips = f'<span class="chip">{rule.kind}</span>'
    if rule.calibrated is not None and rule.bands:
        look, said = ("keep", "calibrated for this model") if rule.calibrated else ("review", "not calibrated")
        chips += f'<span class="chip {look}">{said}</span>'
    parts = [
        f'<article class="rule" id="rule-{name}" aria-labelledby="name-{name}">',
        f'<div class="rule-head"><h3 id="name-{name}">{name}</h3>{chips}</div>',
        f"<p>{_meaning(rule)}</p>",
        _escalated(rule),
        _chart(rule),
        _thresholds(rule),
        _buckets({bucket: rows for (owner, bucket), rows in examples.by_bucket.items() if owner == rule.id}, rule),
    ]
    return "\n".join(part for part in parts if part) + "\n</article>"


def _meaning(rule: RuleData) -> str:
    """What the score says, in words."""
    said = joined(rule.measure.meaning(rule.measured), _shown)
    if "tighten" in rule.spec:
        tighten = rule.spec["tighten"]
        direction = "above" if "above" in tighten else "below"
        names = ", ".join(text.esc(name) for name in tighten["rules"])
        said += f" {direction.capitalize()} {tighten[direction]:g} it tightens the thresholds of {names} by {tighten['by']:g}."
    if "when" in rule.spec:
        said += f" It only applies when {text.esc(in_words(rule.spec['when']), 400)}."
    missing = rule.spec.get("on_missing", "review")
    return f"{said} An image without this score {_ON_MISSING.get(missing, missing)}."


def _shown(written: Written) -> str:
    shown = text.esc(written.text, written.limit)
    return f"<bdi>{shown}</bdi>" if written.isolated else shown


def _escalated(rule: RuleData) -> str:
    if rule.spec.get("action") != "escalate":
        return ""
    count = plural(rule.counts["escalate"], "image")
    return note(f"{count} escalated: rejected, never copied, and shown on no page, not even blurred.")


def _chart(rule: RuleData) -> str:
    histogram = rule.histogram
    if not histogram.n:
        return note("No image has this score.")
    limits = [band for band in rule.bands if band.threshold is not None]
    scored = f"{plural(histogram.n, 'image')} scored {_spread(histogram)}"
    label = f"Histogram of the score of {rule.id}: {scored}. " + " ".join(
        f"{band.beyond:,} lie {band.direction} {text.threshold(band.threshold or 0)} ({band.name})." for band in limits
    )
    full = (0.0, 1.0) if rule.measure.fills_unit(rule.measured) else None
    drawn = charts.bars(histogram, [band.threshold for band in limits if band.threshold is not None], full)
    notes = [f"{scored}."]
    if rule.unscored:
        notes.append(f"{rule.unscored:,} have no score.")
    if charts.squeezed(drawn):
        notes.append("Bar heights are square roots, so that rare scores can be seen.")
    for count, which in zip(
        drawn.outside, ("lower ones are drawn in the first", "higher ones in the last"), strict=True
    ):
        if count:
            notes.append(f"{count:,} {which} bar.")
    return charts.histogram_svg(histogram, rule.bands, label=label, full=full) + "\n" + note(" ".join(notes))


def _spread(histogram: Histogram) -> str:
    if histogram.minimum == histogram.maximum:
        return f"{text.score(histogram.minimum)}, every one"
    middle = text.score(histogram.quantile(0.5))
    return f"from {text.score(histogram.minimum)} to {text.score(histogram.maximum)}, median about {middle}"


def _thresholds(rule: RuleData) -> str:
    if not rule.bands:
        return note("This rule decides nothing by itself; another one ranks its score.")
    rows = [
        [
            f'<span class="chip {band.name}">{band.name}</span>',
            "none: nothing to rank" if band.threshold is None else f"{band.direction} {text.score(band.threshold)}",
            f"{band.beyond:,}",
            text.share(band.beyond, rule.histogram.n),
            _origin(band, rule),
        ]
        for band in sorted(rule.bands, key=lambda item: item.name != "reject")
    ]
    columns = ["Band", "Threshold", "#Images beyond", "#Of those scored", "Where the threshold comes from"]
    return table(columns, rows, attributes=' class="thresholds"')


def _origin(band: Band, rule: RuleData) -> str:
    if band.source == "calibrated":
        found = [f"target {text.esc(band.evidence['target'])}"] if "target" in band.evidence else []
        found += [f"{band.evidence['n']:,} labelled examples"] if "n" in band.evidence else []
        return "Calibrated for this model" + (f": {', '.join(found)}" if found else "")
    if band.source == "dataset":
        direction, share = next(iter(band.written.items()))
        which = "top" if direction == "outside_top" else "bottom"
        return f"Fixed over the whole dataset: outside the {which} {100 * share:.4g}% of the ranked images"
    return "Written in the policy" + ("" if rule.calibrated is None else ", not calibrated for this model")


def _similarity(data: RunData, examples: Examples, thumbnails: str, problem: str | None) -> str:
    histogram = data.similarity
    parts = ['<section id="similarity">\n<h2>How well captions fit their pictures</h2>']
    if histogram.n:
        scored = f"{plural(histogram.n, 'image')} with a caption, {_spread(histogram)}"
        parts += [
            "<p>The cosine of image and caption embedding (CLIP score); higher fits better.</p>",
            charts.histogram_svg(histogram, [], label=f"Histogram of caption similarity: {scored}"),
            note(f"{scored}."),
        ]
    else:
        parts.append("<p>No image has a caption that was compared with it.</p>")
    if examples.by_bucket:
        parts.append(_about_examples(data, thumbnails, problem))
        parts.append(_buckets({bucket: rows for (_, bucket), rows in examples.by_bucket.items()}, None))
    return "\n".join(parts) + "\n</section>"


def _buckets(found: dict[str, list[Example]], rule: RuleData | None) -> str:
    """The examples from worst to best, every bucket under its heading."""
    shown = ""
    for bucket, heading in HEADINGS.items():
        if bucket in found:
            plain = "no-images" if all(example.image is None for example in found[bucket]) else f"n{len(found[bucket])}"
            cards = "".join(_card(example, rule) for example in found[bucket])
            shown += f'<div class="examples {plain}"><h4>{heading}</h4><ul class="cards">{cards}</ul></div>\n'
    return f'<div class="buckets">\n{shown}</div>' if shown else ""


def _card(example: Example, rule: RuleData | None) -> str:
    decision = example.decision if example.decision in _DECISIONS else None
    reason = next((item for item in example.reasons if rule is not None and item["rule"] == rule.id), None)
    limit = reason["threshold"] if reason else None
    if limit is None and rule is not None:
        limit = next((band.threshold for band in rule.bands if band.threshold is not None), None)
    parts = []
    if example.image is not None:
        seen = "Blurred picture" if example.blurred else "Picture"
        alt = text.esc(f"{seen}: {example.caption or example.key}", 200)
        parts.append(f'<img src="{example.image}" alt="{alt}" loading="lazy" decoding="async">')
    parts.append(
        f'<div class="line"><span class="value">{text.score(example.score, limit)}</span>'
        f'<span class="chip {decision or ""}">{_DECISIONS[decision]}</span></div>'
    )
    if example.caption:
        parts.append(f'<p class="caption"><bdi>{text.esc(example.caption, 220)}</bdi></p>')
    if reason and reason.get("nearest"):
        said = f"nearest “<bdi>{text.esc(reason['nearest'], 100)}</bdi>”"
        if reason.get("contrast"):
            said += f", against “<bdi>{text.esc(reason['contrast'], 100)}</bdi>”"
        parts.append(f'<p class="small">{said}</p>')
    others = [item["rule"] for item in example.reasons if rule is not None and item["rule"] != rule.id]
    if others:
        parts.append(f'<p class="small">also caught by {text.esc(", ".join(others), 120)}</p>')
    where = " · ".join(
        f"<bdi>{text.esc(part, 90)}</bdi>" for part in (example.key, example.path) if part not in ("", ".")
    )
    return f'<li>{"".join(parts)}<p class="key">{where}</p></li>'
