"""Decisions in the shapes of OpenAI's moderation, Rekognition's and SafeSearch's answers, by the policy's own mapping.

A rule's confidence is its score where that is a probability (a concept's, or such a head's), else what its band says: 0
kept, 0.5 review, 1 rejected. A category is as confident as the most confident of its rules, and flagged where one of them
put the row into review or rejected it. Only mapped categories appear: silence about the others is no clean bill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clipfilter.decisions import ESCALATE, LIMITS
from clipfilter.report.data import RuleData
from clipfilter.report.explain import RuleVerdict

Categories = Mapping[str, Sequence[str]]
Verdicts = Mapping[str, RuleVerdict]

FLAGGED = frozenset({*LIMITS, ESCALATE})
_BY_BAND = {"review": 0.5, "reject": 1.0, "escalate": 1.0}
_SAFESEARCH = ("adult", "spoof", "medical", "violence", "racy")


def confidence(rule: RuleData, verdict: RuleVerdict) -> float:
    """How sure the rule is that the row is what it looks for, 0 to 1."""
    if verdict.score is not None and rule.measure.is_probability(rule.measured):
        score = min(max(float(verdict.score), 0.0), 1.0)
        below = any(band.direction == "below" for band in rule.bands)
        return 1.0 - score if below else score
    return _BY_BAND.get(verdict.result, 0.0)


def _scores(categories: Categories, rules: Mapping[str, RuleData], verdicts: Verdicts) -> dict[str, tuple[float, bool]]:
    """(confidence, flagged) of each category."""
    return {
        name: (
            max(confidence(rules[rule], verdicts[rule]) for rule in members),
            any(verdicts[rule].result in FLAGGED for rule in members),
        )
        for name, members in categories.items()
    }


def openai(
    categories: Categories, rules: Mapping[str, RuleData], verdicts: Verdicts, row: Mapping[str, Any], policy: str
) -> dict[str, Any]:
    """As POST /v1/moderations answers for one image; `model` names the policy."""
    found = _scores(categories, rules, verdicts)
    return {
        "id": f"modr-{row['uid']}",
        "model": policy,
        "results": [
            {
                "flagged": any(flagged for _, flagged in found.values()),
                "categories": {name: flagged for name, (_, flagged) in found.items()},
                "category_scores": {name: score for name, (score, _) in found.items()},
                "category_applied_input_types": {name: ["image"] for name in found},
            }
        ],
    }


def rekognition(
    categories: Categories, rules: Mapping[str, RuleData], verdicts: Verdicts, row: Mapping[str, Any], policy: str
) -> dict[str, Any]:
    """As DetectModerationLabels answers: the flagged labels and the levels above them, Confidence in per cent."""
    labels: dict[str, dict[str, Any]] = {}
    for path, (score, flagged) in _scores(categories, rules, verdicts).items():
        if not flagged:
            continue
        levels = [part.strip() for part in path.split("/")]
        for level, name in enumerate(levels, 1):
            label = {
                "Confidence": round(100 * score, 4),
                "Name": name,
                "ParentName": levels[level - 2] if level > 1 else "",
                "TaxonomyLevel": level,
            }
            known = labels.setdefault("/".join(levels[:level]), label)
            known["Confidence"] = max(known["Confidence"], label["Confidence"])
    ordered = sorted(labels.values(), key=lambda label: (-label["Confidence"], label["TaxonomyLevel"], label["Name"]))
    return {"ModerationLabels": ordered, "ModerationModelVersion": policy, "ContentTypes": []}


def safesearch(
    categories: Categories, rules: Mapping[str, RuleData], verdicts: Verdicts, row: Mapping[str, Any], policy: str
) -> dict[str, Any]:
    """As Vision's safeSearchAnnotation: a likelihood for each of its five categories."""
    return {
        "safeSearchAnnotation": {
            name: max(
                (_likelihood(verdicts[rule]) for rule in categories.get(name, ())),
                key=_LIKELIHOODS.index,
                default="UNKNOWN",
            )
            for name in _SAFESEARCH
        }
    }


_LIKELIHOODS = ("UNKNOWN", "VERY_UNLIKELY", "UNLIKELY", "POSSIBLE", "LIKELY", "VERY_LIKELY")


def _likelihood(verdict: RuleVerdict) -> str:
    """Rejected is VERY_LIKELY, review POSSIBLE; kept UNLIKELY beyond half of the loosest threshold, else VERY_UNLIKELY."""
    if verdict.result in ("reject", "escalate"):
        return "VERY_LIKELY"
    if verdict.result == "review":
        return "POSSIBLE"
    if verdict.result == "missing" or verdict.score is None:
        return "UNKNOWN"
    above = [
        item["threshold"]
        for item in verdict.thresholds
        if item["direction"] == "above" and item["threshold"] is not None
    ]
    return "UNLIKELY" if above and verdict.score > min(above) / 2 else "VERY_UNLIKELY"


Shape = Callable[[Categories, Mapping[str, RuleData], Verdicts, Mapping[str, Any], str], dict[str, Any]]
SHAPES: dict[str, Shape] = {"openai": openai, "rekognition": rekognition, "safesearch": safesearch}
