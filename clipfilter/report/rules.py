"""The rules' part of the page: the table of decisions, and per rule its histogram, thresholds and examples."""

from __future__ import annotations

from typing import Any

from clipfilter.decisions import LIMITS, MISSING
from clipfilter.models.heads import HEADS
from clipfilter.policies import PIXELS, in_words
from clipfilter.report import charts, text
from clipfilter.report.data import Band, RuleData, RunData
from clipfilter.report.examples import HEADINGS, Example, Examples
from clipfilter.report.histogram import Histogram
from clipfilter.report.markup import dot, note, plural, table
from clipfilter.report.thumbnails import NO_THUMBNAILS

_DECISIONS = {"keep": "kept", "review": "review", "reject": "rejected", None: "undecided"}
_METADATA = {
    "width": "width in pixels",
    "height": "height in pixels",
    "min_side": "shorter side in pixels",
    "max_side": "longer side in pixels",
    "aspect_ratio": "longer side divided by shorter side",
    "pixels": "width times height",
    "caption_words": "words of the caption",
    "caption_chars": "characters of the caption",
    "brightness": "brightness of the picture",
    "contrast": "contrast of the picture",
    "blur": "sharpness measure of the picture",
    "entropy": "entropy of the picture’s grey levels",
    "colourfulness": "colourfulness of the picture",
}
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
        counts = [rule.counts[band] for band in (*reversed(LIMITS), MISSING)]
        counts[0] += rule.counts["escalate"]
        label = "{:,} rejected, {:,} to review, {:,} not scored".format(*counts)
        parts = [*zip((*reversed(LIMITS), "failed"), counts, strict=True), ("empty", max(total - rule.stopped, 0))]
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
    if rule.kind == "concept":
        concept = rule.spec["concept"]
        parts = [_phrases(concept["any_of"])] if concept.get("any_of") else []
        parts += ["learned vectors"] if "vectors" in concept else []
        said = f"Looks for {' or '.join(parts)}" if parts else "Looks"
        if concept.get("all_of"):
            said += f"{', together with' if parts else ' for all of'} {_phrases(concept['all_of'])}"
        if concept.get("but_not"):
            said += f", told apart from {_phrases(concept['but_not'])}"
        said += " and from what ordinary pictures show" if concept.get("generic") else ""
        kinds = {
            "probability": "The score is a probability: 0 not at all, 1 certainly",
            "margin": "The score is the best phrase’s similarity minus the best contrast’s",
            "cosine": "The score is the similarity (cosine) to the best phrase",
            "calibrated": "The score is a probability calibrated on labels: of ten images with 0.9, nine are right",
        }
        said += f". {kinds.get(concept.get('score', 'probability'), 'The score is as the policy defines it')}."
    elif rule.kind == "alignment":
        said = "How well the caption fits the picture. The score is the cosine of both embeddings; higher fits better."
    elif rule.kind == "head":
        said = f"The score of {_head(rule.spec['head'])} on the embedding of the picture."
    elif rule.kind == "safety":
        said = _safety(rule.spec["safety"])
    elif rule.kind == "text":
        said = _text(rule.spec["text"])
    elif rule.kind == "known":
        said = _known(rule)
    elif rule.kind == "combine":
        parts = [f"{weight:g} × {text.esc(name)}" for name, weight in rule.spec["combine"]["weighted"].items()]
        said = f"The weighted sum of other rules’ scores: {' + '.join(parts)}."
    elif rule.kind in ("metadata", "pixels"):
        name = rule.spec["metadata"] if rule.kind == "metadata" else PIXELS[rule.spec["pixels"]].metadata
        said = f"A number of the image: {text.esc(_METADATA.get(name, 'the column ' + name))}."
    else:
        said = f"Ranks all images by the score of {text.esc(rule.spec['fraction']['of'])}."
    if "tighten" in rule.spec:
        tighten = rule.spec["tighten"]
        direction = "above" if "above" in tighten else "below"
        names = ", ".join(text.esc(name) for name in tighten["rules"])
        said += f" {direction.capitalize()} {tighten[direction]:g} it tightens the thresholds of {names} by {tighten['by']:g}."
    if "when" in rule.spec:
        said += f" It only applies when {text.esc(in_words(rule.spec['when']), 400)}."
    missing = rule.spec.get("on_missing", "review")
    return f"{said} An image without this score {_ON_MISSING.get(missing, missing)}."


def _safety(spec: dict[str, Any]) -> str:
    said = "A safety checker"
    if "concepts" in spec:
        said += f" for {_phrases([concept['text'] for concept in spec['concepts']])}"
    if spec.get("special_care"):
        said += f", stricter by {spec['adjustment']:g} where it sees "
        said += _phrases([concept["text"] for concept in spec["special_care"]])
    return f"{said}. The score is the highest similarity to a concept, less the threshold of that concept."


def _text(spec: dict[str, Any]) -> str:
    where = f"the column {text.esc(spec['column'])}" if "column" in spec else "the caption"
    if "language" in spec:
        names = ", ".join(spec["language"])
        if "language_column" in spec:
            return f"Whether the column {text.esc(spec['language_column'])} says {names}: 1 or 0."
        return f"How sure it is that {where} is written in {names}; 0 where another language is likelier."
    what = "patterns" if "matches" in spec else "words of the block list"
    return f"How many {what} are found in {where}."


def _known(rule: RuleData) -> str:
    if "sha256" in rule.spec["known"]:
        return "Whether the very file is on a list of known ones: 1 or 0."
    bits = rule.spec["known"]["distance"]
    return (
        f"Whether the picture resembles one on a list of known ones: at most {bits} of 64 bits of their perceptual hashes "
        "differ. The score is the share of bits that agree, 0 beyond."
    )


def _escalated(rule: RuleData) -> str:
    if rule.spec.get("action") != "escalate":
        return ""
    count = plural(rule.counts["escalate"], "image")
    return note(f"{count} escalated: rejected, never copied, and shown on no page, not even blurred.")


def _head(spec: str | dict[str, str]) -> str:
    name = spec if isinstance(spec, str) else spec["name"]
    meaning = HEADS[name].meaning if name in HEADS else ""
    return f"the head <bdi>{text.esc(name, 120)}</bdi>" + (f" ({text.esc(meaning)})" if meaning else "")


def _phrases(phrases: list[str]) -> str:
    shown = ", ".join(f"“<bdi>{text.esc(phrase, 120)}</bdi>”" for phrase in phrases[:8])
    return shown + (f" and {len(phrases) - 8} more" if len(phrases) > 8 else "")


def _chart(rule: RuleData) -> str:
    histogram = rule.histogram
    if not histogram.n:
        return note("No image has this score.")
    limits = [band for band in rule.bands if band.threshold is not None]
    scored = f"{plural(histogram.n, 'image')} scored {_spread(histogram)}"
    label = f"Histogram of the score of {rule.id}: {scored}. " + " ".join(
        f"{band.beyond:,} lie {band.direction} {text.threshold(band.threshold or 0)} ({band.name})." for band in limits
    )
    probability = rule.kind == "concept" and rule.spec["concept"].get("score", "probability") == "probability"
    full = (0.0, 1.0) if probability else None
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
