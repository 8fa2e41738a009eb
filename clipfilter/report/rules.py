"""The rules' part of the page: the table of decisions, and per rule its histogram, thresholds and examples."""

from __future__ import annotations

from clipfilter.report import charts, text
from clipfilter.report.data import Band, RuleData, RunData
from clipfilter.report.examples import HEADINGS, Example, Examples

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
}
_ON_MISSING = {"review": "goes to review", "reject": "is rejected", "keep": "is let through"}


def section(data: RunData, examples: Examples, thumbnails: str, problem: str | None) -> str:
    """All rules; for a run without policy the similarity of images and captions."""
    if data.plan.policy is None:
        return _similarity(data, examples, thumbnails, problem)
    parts = ['<section id="rules">\n<h2>Decisions by rule</h2>', _table(data)]
    parts.append(_about_pictures(thumbnails, problem, undecided=False) if examples.by_bucket else "")
    parts += [_rule(data, rule, examples) for rule in data.rules]
    return "\n".join(parts) + "\n</section>"


def _table(data: RunData) -> str:
    rows = data.totals["rows"]
    body = ""
    for rule in data.rules:
        label = f"{rule.counts['reject']:,} rejected, {rule.counts['review']:,} to review, {rule.counts['missing']:,} not scored"
        bar = charts.stacked_bar(
            [("reject", rule.counts["reject"]), ("review", rule.counts["review"]), ("failed", rule.counts["missing"])]
            + [("empty", max(rows - rule.stopped, 0))],
            label=label,
            height=12,
        )
        body += (
            f'<tr><th scope="row"><a href="#rule-{text.esc(rule.id)}">{text.esc(rule.id)}</a></th>'
            + "".join(f'<td class="num">{rule.counts[band]:,}</td>' for band in ("reject", "review", "missing"))
            + f'<td class="num">{text.share(rule.stopped, rows)}</td><td class="num">{rule.alone:,}</td><td class="wide">{bar}</td></tr>'
        )
    return (
        '<p class="note">How many images each rule puts into its bands. An image can be caught by several rules; the worst one '
        "decides. “By this rule alone” counts the images that would have been treated more mildly without it.</p>\n"
        '<div class="scroll"><table><thead><tr><th scope="col">Rule</th><th scope="col" class="num">Reject</th>'
        '<th scope="col" class="num">Review</th><th scope="col" class="num">Not scored</th><th scope="col" class="num">Share</th>'
        '<th scope="col" class="num">By this rule alone</th><th scope="col">Of all images</th></tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _about_pictures(thumbnails: str, problem: str | None, *, undecided: bool) -> str:
    if thumbnails == "none":
        return '<p class="note">Examples are shown without pictures (<code>--thumbnails none</code>).</p>'
    if problem:
        return f'<p class="note">{text.esc(problem)}</p>'
    if thumbnails == "show":
        return '<p class="note">All example pictures are shown clearly (<code>--thumbnails show</code>).</p>'
    which = "pictures are blurred, since nobody has decided about them" if undecided else "pictures that were not kept are blurred"
    return f'<p class="note">Example {which}; <code>clipfilter report --thumbnails show</code> writes the page with clear ones.</p>'


def _rule(data: RunData, rule: RuleData, examples: Examples) -> str:
    chips = f'<span class="chip">{rule.kind}</span>'
    if rule.calibrated is not None and rule.bands:
        chips += (
            '<span class="chip keep">calibrated for this model</span>' if rule.calibrated else '<span class="chip review">not calibrated</span>'
        )
    parts = [
        f'<article class="rule" id="rule-{text.esc(rule.id)}" aria-labelledby="name-{text.esc(rule.id)}">',
        f'<div class="rule-head"><h3 id="name-{text.esc(rule.id)}">{text.esc(rule.id)}</h3>{chips}</div>',
        f"<p>{_meaning(rule)}</p>",
        _chart(data, rule),
        _thresholds(data, rule),
    ]
    parts += [
        _bucket(found, bucket, rule) for bucket in HEADINGS if (found := examples.by_bucket.get((rule.id, bucket)))
    ]
    return "\n".join(part for part in parts if part) + "\n</article>"


def _meaning(rule: RuleData) -> str:
    """What the score says, in words."""
    if rule.kind == "concept":
        concept = rule.spec["concept"]
        said = f"Looks for {_phrases(concept['any_of'])}"
        if concept.get("but_not"):
            said += f", told apart from {_phrases(concept['but_not'])}"
        said += " and from what ordinary pictures show" if concept.get("generic") else ""
        kinds = {
            "probability": "The score is a probability: 0 not at all, 1 certainly",
            "margin": "The score is the best phrase’s similarity minus the best contrast’s",
            "cosine": "The score is the similarity (cosine) to the best phrase",
        }
        said += f". {kinds.get(concept.get('score', 'probability'), 'The score is as the policy defines it')}."
    elif rule.kind == "alignment":
        said = "How well the caption fits the picture. The score is the cosine of the two embeddings; higher fits better."
    elif rule.kind == "metadata":
        name = rule.spec["metadata"]
        said = f"A number of the image: {text.esc(_METADATA.get(name, 'the column ' + name))}."
    else:
        said = f"Ranks all images by the score of {text.esc(rule.spec['fraction']['of'])}."
    missing = rule.spec.get("on_missing", "review")
    return f"{said} An image without this score {_ON_MISSING.get(missing, missing)}."


def _phrases(phrases: list[str]) -> str:
    shown = ", ".join(f"“<bdi>{text.esc(phrase, 120)}</bdi>”" for phrase in phrases[:8])
    return shown + (f" and {len(phrases) - 8} more" if len(phrases) > 8 else "")


def _chart(data: RunData, rule: RuleData) -> str:
    histogram = rule.histogram
    if not histogram.n:
        return '<p class="note">No image has this score.</p>'
    scored = text.number(histogram.n)
    label = f"Histogram of the score of {rule.id} for {scored} images, from {text.score(histogram.minimum)} to {text.score(histogram.maximum)}. "
    label += " ".join(
        f"{band.beyond} lie {band.direction} the {band.name} threshold {text.threshold(band.threshold)}."
        for band in rule.bands
        if band.threshold is not None
    )
    full = (0.0, 1.0) if rule.kind == "concept" and rule.spec["concept"].get("score", "probability") == "probability" else None
    drawn = charts.bars(histogram, [band.threshold for band in rule.bands if band.threshold is not None], full)
    notes = [
        f"{scored} images scored from {text.score(histogram.minimum)} to {text.score(histogram.maximum)}, "
        f"half of them below about {text.score(histogram.quantile(0.5))}."
    ]
    if rule.unscored:
        notes.append(f"{rule.unscored:,} have no score.")
    if charts.squeezed(drawn):
        notes.append("Bar heights are square roots, so that rare scores can be seen.")
    below, above = drawn.outside
    if below:
        notes.append(f"{below:,} lower ones are drawn in the first bar.")
    if above:
        notes.append(f"{above:,} higher ones are drawn in the last bar.")
    return charts.histogram_svg(histogram, rule.bands, label=label, full=full) + f'\n<p class="note">{" ".join(notes)}</p>'


def _thresholds(data: RunData, rule: RuleData) -> str:
    if not rule.bands:
        return '<p class="note">This rule decides nothing by itself; another one ranks its score.</p>'
    body = ""
    for band in sorted(rule.bands, key=lambda item: item.name != "reject"):
        shown = "none: nothing to rank" if band.threshold is None else f"{band.direction} {text.score(band.threshold)}"
        body += (
            f'<tr><th scope="row"><span class="chip {band.name}">{band.name}</span></th><td>{shown}</td>'
            f'<td class="num">{band.beyond:,}</td><td class="num">{text.share(band.beyond, rule.histogram.n)}</td>'
            f"<td>{_origin(band, rule)}</td></tr>"
        )
    return (
        '<div class="scroll"><table><thead><tr><th scope="col">Band</th><th scope="col">Threshold</th>'
        '<th scope="col" class="num">Images beyond</th><th scope="col" class="num">Of those scored</th>'
        f'<th scope="col">Where the threshold comes from</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def _origin(band: Band, rule: RuleData) -> str:
    if band.source == "calibrated":
        found = []
        if "target" in band.evidence:
            found.append(f"target {text.esc(band.evidence['target'])}")
        if "n" in band.evidence:
            found.append(f"{band.evidence['n']:,} labelled examples")
        return "Calibrated for this model" + (f": {', '.join(found)}" if found else "")
    if band.source == "dataset":
        direction, share = next(iter(band.written.items()))
        which = "best" if direction == "outside_top" else "lowest"
        return f"Fixed over the whole dataset: outside the {which} {share:.4g} of all ranked images"
    if rule.calibrated is None:
        return "Written in the policy"
    return "Written in the policy, not calibrated for this model"


def _similarity(data: RunData, examples: Examples, thumbnails: str, problem: str | None) -> str:
    histogram = data.similarity
    parts = ['<section id="similarity">\n<h2>How well captions fit their pictures</h2>']
    if histogram.n:
        label = f"Histogram of caption similarity of {histogram.n} images, from {text.score(histogram.minimum)} to {text.score(histogram.maximum)}"
        parts.append(
            "<p>The cosine of image and caption embedding (CLIP score); higher fits better.</p>\n"
            + charts.histogram_svg(histogram, [], label=label)
            + f'<p class="note">{histogram.n:,} images have a caption. Scores go from {text.score(histogram.minimum)} to '
            f"{text.score(histogram.maximum)}, half of them below about {text.score(histogram.quantile(0.5))}.</p>"
        )
    else:
        parts.append("<p>No image has a caption that was compared with it.</p>")
    found = {bucket: rows for (_, bucket), rows in examples.by_bucket.items()}
    if found:
        parts.append(_about_pictures(thumbnails, problem, undecided=True))
        parts += [_bucket(found[bucket], bucket, None) for bucket in HEADINGS if bucket in found]
    return "\n".join(parts) + "\n</section>"


def _bucket(found: list[Example], bucket: str, rule: RuleData | None) -> str:
    plain = " no-images" if all(example.image is None for example in found) else ""
    cards = "".join(_card(example, rule) for example in found)
    return f'<div class="examples{plain}"><h4>{HEADINGS[bucket]}</h4><ul class="cards">{cards}</ul></div>'


def _card(example: Example, rule: RuleData | None) -> str:
    decision = example.decision if example.decision in _DECISIONS else None
    reason = next((item for item in example.reasons if rule is not None and item["rule"] == rule.id), None)
    limit = reason["threshold"] if reason else None
    if limit is None and rule is not None:
        limit = next((band.threshold for band in rule.bands if band.threshold is not None), None)
    parts = []
    if example.image is not None:
        seen = "Blurred picture" if example.blurred else "Picture"
        caption = f": {example.caption}" if example.caption else f" {example.key}"
        parts.append(f'<img src="{example.image}" alt="{text.esc(seen + caption, 200)}" loading="lazy" decoding="async">')
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
    parts.append(f'<p class="key"><bdi>{text.esc(example.key, 90)}</bdi> · <bdi>{text.esc(example.path, 90)}</bdi></p>')
    return f"<li>{''.join(parts)}</li>"
