"""The rules' part of the page: what each rule means and did, its histogram, thresholds and examples, in words."""

from __future__ import annotations

from typing import Any

from clipfilter import charts, text
from clipfilter.charts import Histogram, Limit
from clipfilter.decisions import LIMITS
from clipfilter.policies import Words, Written, in_words
from clipfilter.report.data import Band, RuleData, RunData
from clipfilter.report.examples import HEADINGS, Example, Examples

_DECISIONS = {"keep": "kept", "review": "review", "reject": "rejected", None: "undecided"}
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
    total = data.totals.rows
    counts = [rule.counts["reject"] + rule.counts["escalate"], rule.counts["review"], rule.counts["missing"]]
    label = "{:,} rejected, {:,} to review, {:,} not scored".format(*counts)
    parts = [*zip((*reversed(LIMITS), "failed"), counts, strict=True), ("empty", max(total - rule.stopped, 0))]
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


def meaning(rule: RuleData) -> Words:
    """What the score says, in words."""
    said = [*rule.measure.meaning(rule.measured)]
    if "tighten" in rule.spec:
        tighten = rule.spec["tighten"]
        direction = "above" if "above" in tighten else "below"
        limit, names = f"{direction.capitalize()} {tighten[direction]:g}", ", ".join(tighten["rules"])
        said.append(f" {limit} it tightens the thresholds of {names} by {tighten['by']:g}.")
    if "when" in rule.spec:
        said += [" It only applies when ", Written(in_words(rule.spec["when"])), "."]
    missing = rule.spec.get("on_missing", "review")
    return [*said, f" An image without this score {_ON_MISSING.get(missing, missing)}."]


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
    full = (0.0, 1.0) if rule.measure.fills_unit(rule.measured) else None
    drawn = charts.bars(histogram, [limit for _, limit in bands], full)
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
