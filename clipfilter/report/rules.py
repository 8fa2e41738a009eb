"""The rules' part of the page: what each rule means and did, its histogram, thresholds and examples, in words."""

from __future__ import annotations

from typing import Any

from clipfilter import charts, text
from clipfilter.charts import Histogram, Limit
from clipfilter.models.heads import HEADS
from clipfilter.policies import PIXELS, in_words
from clipfilter.report.data import Band, RuleData, RunData
from clipfilter.report.examples import HEADINGS, Example, Examples
from clipfilter.report.html import Foreign, Sentence

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
_SCORES = {
    "probability": "The score is a probability: 0 not at all, 1 certainly",
    "margin": "The score is the best phrase’s similarity minus the best contrast’s",
    "cosine": "The score is the similarity (cosine) to the best phrase",
    "calibrated": "The score is a probability calibrated on labels: of ten images with 0.9, nine are right",
}
_ON_MISSING = {"review": "goes to review", "reject": "is rejected", "keep": "is let through"}


def views(data: RunData, examples: Examples) -> dict[str, Any]:
    """What the template says about every rule of a policy."""
    return {
        "rules": [_rule(data, rule, examples) for rule in data.rules],
        "examples": bool(examples.by_bucket),
    }


def similarity(data: RunData, examples: Examples) -> dict[str, Any]:
    """What the template says where there are no rules: how well images fit their captions."""
    histogram = data.similarity
    shown = None
    if histogram.n:
        scored = f"{text.plural(histogram.n, 'image')} with a caption, {_spread(histogram)}"
        drawn = charts.bars(histogram, [])
        chart = charts.histogram_svg(drawn, [], label=f"Histogram of caption similarity: {scored}")
        shown = {"chart": chart, "notes": f"{scored}."}
    return {"similarity": shown, "examples": _buckets(examples, None)}


def _rule(data: RunData, rule: RuleData, examples: Examples) -> dict[str, Any]:
    total = data.totals["rows"]
    counts = [rule.counts["reject"] + rule.counts["escalate"], rule.counts["review"], rule.counts["missing"]]
    label = "{:,} rejected, {:,} to review, {:,} not scored".format(*counts)
    parts = [*zip(("reject", "review", "failed"), counts, strict=True), ("empty", max(total - rule.stopped, 0))]
    chart, notes = _chart(rule)
    return {
        "id": rule.id,
        "kind": rule.kind,
        "calibrated": rule.calibrated if rule.bands else None,
        "counts": counts,
        "stopped": rule.stopped,
        "alone": rule.alone,
        "bar": charts.stacked_bar(parts, label=label, height=12),
        "meaning": meaning(rule),
        "escalated": rule.counts["escalate"] if rule.spec.get("action") == "escalate" else None,
        "chart": chart,
        "notes": notes,
        "bands": _bands(rule),
        "examples": _buckets(examples, rule),
    }


def meaning(rule: RuleData) -> Sentence:
    """What the score says, in words."""
    said = _said(rule)
    if "tighten" in rule.spec:
        tighten = rule.spec["tighten"]
        direction = "above" if "above" in tighten else "below"
        limit, names = f"{direction.capitalize()} {tighten[direction]:g}", ", ".join(tighten["rules"])
        said.append(f" {limit} it tightens the thresholds of {names} by {tighten['by']:g}.")
    if "when" in rule.spec:
        said.append(f" It only applies when {text.clean(in_words(rule.spec['when']))}.")
    missing = rule.spec.get("on_missing", "review")
    return [*said, f" An image without this score {_ON_MISSING.get(missing, missing)}."]


def _said(rule: RuleData) -> Sentence:
    if rule.kind == "concept":
        return _concept(rule.spec["concept"])
    if rule.kind == "alignment":
        return [
            "How well the caption fits the picture. The score is the cosine of both embeddings; higher fits better."
        ]
    if rule.kind == "head":
        return _head(rule.spec["head"])
    if rule.kind == "safety":
        return _safety(rule.spec["safety"])
    if rule.kind == "text":
        return [_text(rule.spec["text"])]
    if rule.kind == "known":
        return [_known(rule)]
    if rule.kind == "combine":
        parts = [f"{weight:g} × {name}" for name, weight in rule.spec["combine"]["weighted"].items()]
        return [f"The weighted sum of other rules’ scores: {' + '.join(parts)}."]
    if rule.kind in ("metadata", "pixels"):
        name = rule.spec["metadata"] if rule.kind == "metadata" else PIXELS[rule.spec["pixels"]].metadata
        return [f"A number of the image: {text.clean(_METADATA.get(name, f'the column {name}'))}."]
    return [f"Ranks all images by the score of {rule.spec['fraction']['of']}."]


def _concept(concept: dict[str, Any]) -> Sentence:
    said: Sentence = ["Looks"]
    if concept.get("any_of"):
        said += [" for ", *_phrases(concept["any_of"])]
    if "vectors" in concept:
        said.append(f" {'or' if len(said) > 1 else 'for'} learned vectors")
    if concept.get("all_of"):
        said += [", together with " if len(said) > 1 else " for all of ", *_phrases(concept["all_of"])]
    if concept.get("but_not"):
        said += [", told apart from ", *_phrases(concept["but_not"])]
    said += [" and from what ordinary pictures show"] if concept.get("generic") else []
    return [*said, f". {_SCORES.get(concept.get('score', 'probability'), 'The score is as the policy defines it')}."]


def _safety(spec: dict[str, Any]) -> Sentence:
    said: Sentence = ["A safety checker"]
    if "concepts" in spec:
        said += [" for ", *_phrases([concept["text"] for concept in spec["concepts"]])]
    if spec.get("special_care"):
        said.append(f", stricter by {spec['adjustment']:g} where it sees ")
        said += _phrases([concept["text"] for concept in spec["special_care"]])
    return [*said, ". The score is the highest similarity to a concept, less the threshold of that concept."]


def _text(spec: dict[str, Any]) -> str:
    where = f"the column {text.clean(spec['column'])}" if "column" in spec else "the caption"
    if "language" in spec:
        names = ", ".join(spec["language"])
        if "language_column" in spec:
            return f"Whether the column {text.clean(spec['language_column'])} says {names}: 1 or 0."
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


def _head(spec: str | dict[str, str]) -> Sentence:
    name = spec if isinstance(spec, str) else spec["name"]
    means = f" ({text.clean(HEADS[name].meaning)})" if name in HEADS and HEADS[name].meaning else ""
    return ["The score of the head ", Foreign(text.clean(name, 120)), f"{means} on the embedding of the picture."]


def _phrases(phrases: list[str]) -> Sentence:
    said: Sentence = []
    for phrase in phrases[:8]:
        said += [", “" if said else "“", Foreign(text.clean(phrase, 120)), "”"]
    return [*said, f" and {len(phrases) - 8} more"] if len(phrases) > 8 else said


def _chart(rule: RuleData) -> tuple[str, str]:
    """The drawing of the rule's scores, "" where it has none, and the notes below."""
    histogram = rule.histogram
    if not histogram.n:
        return "", "No image has this score."
    bands = [(band, band.threshold) for band in rule.bands if band.threshold is not None]
    scored = f"{text.plural(histogram.n, 'image')} scored {_spread(histogram)}"
    label = f"Histogram of the score of {rule.id}: {scored}. " + " ".join(
        f"{band.beyond:,} lie {band.direction} {text.threshold(limit)} ({band.name})." for band, limit in bands
    )
    probability = rule.kind == "concept" and rule.spec["concept"].get("score", "probability") == "probability"
    drawn = charts.bars(histogram, [limit for _, limit in bands], (0.0, 1.0) if probability else None)
    notes = [f"{scored}."]
    if rule.unscored:
        notes.append(f"{rule.unscored:,} have no score.")
    if charts.squeezed(drawn):
        notes.append("Bar heights are square roots, so that rare scores can be seen.")
    lower, higher = drawn.outside
    notes += [f"{lower:,} lower ones are drawn in the first bar."] if lower else []
    notes += [f"{higher:,} higher ones in the last bar."] if higher else []
    limits = [Limit(band.name, band.direction, limit) for band, limit in bands]
    return charts.histogram_svg(drawn, limits, label=text.clean(label, 600)), " ".join(notes)


def _spread(histogram: Histogram) -> str:
    if histogram.minimum == histogram.maximum:
        return f"{text.score(histogram.minimum)}, every one"
    middle = text.score(histogram.quantile(0.5))
    return f"from {text.score(histogram.minimum)} to {text.score(histogram.maximum)}, median about {middle}"


def _bands(rule: RuleData) -> list[dict[str, Any]]:
    return [
        {
            "name": band.name,
            "threshold": "none: nothing to rank"
            if band.threshold is None
            else f"{band.direction} {text.score(band.threshold)}",
            "beyond": band.beyond,
            "share": text.share(band.beyond, rule.histogram.n),
            "origin": _origin(band, rule),
        }
        for band in sorted(rule.bands, key=lambda item: item.name != "reject")
    ]


def _origin(band: Band, rule: RuleData) -> str:
    if band.source == "calibrated":
        found = [f"target {band.evidence['target']}"] if "target" in band.evidence else []
        found += [f"{band.evidence['n']:,} labelled examples"] if "n" in band.evidence else []
        return "Calibrated for this model" + (f": {', '.join(found)}" if found else "")
    if band.source == "dataset":
        direction, share = next(iter(band.written.items()))
        which = "top" if direction == "outside_top" else "bottom"
        return f"Fixed over the whole dataset: outside the {which} {100 * share:.4g}% of the ranked images"
    return "Written in the policy" + ("" if rule.calibrated is None else ", not calibrated for this model")


def _buckets(examples: Examples, rule: RuleData | None) -> list[dict[str, Any]]:
    """The examples of a rule (None: of a run without rules) from worst to best, by bucket."""
    found = []
    for bucket, heading in HEADINGS.items():
        shown = examples.by_bucket.get((rule.id if rule is not None else "", bucket))
        if shown:
            seen = any(example.image is not None for example in shown)
            look = f"n{len(shown)}" if seen else "no-images"
            found.append({"heading": heading, "look": look, "cards": [_card(example, rule) for example in shown]})
    return found


def _card(example: Example, rule: RuleData | None) -> dict[str, Any]:
    decision = example.decision if example.decision in _DECISIONS else None
    reasons = example.reasons if rule is not None else []
    own = next((item for item in reasons if rule is not None and item["rule"] == rule.id), {})
    limit = own.get("threshold")
    if limit is None and rule is not None:
        limit = next((band.threshold for band in rule.bands if band.threshold is not None), None)
    return {
        "example": example,
        "score": text.score(example.score, limit),
        "look": decision or "",
        "decision": _DECISIONS[decision],
        "nearest": own.get("nearest"),
        "contrast": own.get("contrast"),
        "others": [item["rule"] for item in reasons if rule is not None and item["rule"] != rule.id],
    }
