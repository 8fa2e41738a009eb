"""The page of `policy diff`: what a change of policy does to a dataset, in counts and in pictures."""

from __future__ import annotations

from collections import Counter
from typing import Any

from clipfilter import text
from clipfilter.decisions import ESCALATE, LIMITS, MISSING
from clipfilter.operations import Comparison, Flip, Side
from clipfilter.policies import OVERRIDE_RULE as OVERRIDE
from clipfilter.policies import Words, Written
from clipfilter.report.examples import Example, Examples
from clipfilter.report.html import page
from clipfilter.report.thumbnails import add_thumbnails

_DECISIONS = {"keep": "Kept", "review": "To review", "reject": "Rejected"}
_BANDS = (*LIMITS, ESCALATE, MISSING, "keep")


def diff_page(found: Comparison, thumbnails: str) -> str:
    """The whole HTML document. thumbnails: "none", "blur" or "show"; what either policy does not keep is blurred."""
    examples = [_example(flip) for flip in found.flips]
    problem = None
    if thumbnails != "none":
        problem = add_thumbnails(Examples({("", ""): examples}, found.shards), found.source, thumbnails)
    before, after = found.before, found.after
    heading = f"{before.name} to {after.name}"
    if before.name == after.name:
        heading = f"{after.name}: version {before.version} to {after.version}"
    names = dict.fromkeys([*before.rules, *after.rules])
    return page(
        "diff.html",
        title=f"{before.name} {before.version} against {after.name} {after.version}",
        heading=heading,
        run=found.run,
        version=int(found.dataset_version),
        model=found.model,
        rows=found.rows,
        flipped=found.flipped,
        decisions=[
            (name, shown, before.decisions[name], after.decisions[name],
             _signed(after.decisions[name] - before.decisions[name]))
            for name, shown in _DECISIONS.items()
        ],
        changes=sorted(found.changes.items(), key=lambda item: -item[1]),
        rules=[(name, _bands(before, name), _bands(after, name)) for name in names],
        problem=problem,
        flips=_flips(found, examples),
    )  # fmt: skip


def _bands(side: Side, rule: str) -> str:
    counts = side.rules.get(rule, Counter())
    return ", ".join(f"{counts[band]:,} {band}" for band in _BANDS if counts.get(band)) or "–"


def _flips(found: Comparison, examples: list[Example]) -> list[tuple[tuple[str, str], int, bool, list[dict[str, Any]]]]:
    """(change, rows, whether there are pictures, cards) of each kind of change."""
    cards: dict[tuple[str, str], list[dict[str, Any]]] = {}
    pictures: set[tuple[str, str]] = set()
    for flip, example in zip(found.flips, examples, strict=True):
        change, said = (flip.before, flip.after), (_reasons(flip.reasons_before), _reasons(flip.reasons_after))
        cards.setdefault(change, []).append({"example": example, "before": said[0], "after": said[1]})
        if example.image is not None:
            pictures.add(change)
    return [(change, found.changes[change], change in pictures, shown) for change, shown in cards.items()]


def _reasons(reasons: list[dict[str, Any]]) -> Words:
    said: list[str | Written] = []
    for reason in reasons:
        said += ["; "] if said else []
        said += _reason(reason)
    return said or ["kept"]


def _reason(reason: dict[str, Any]) -> Words:
    rule, score, limit = text.clean(reason["rule"], 60), reason["score"], reason["threshold"]
    if reason["rule"] == OVERRIDE:
        return [f"a person decided {text.clean(reason['band'], 20)}"]
    if reason["band"] == "escalate":
        return [f"escalated by {rule}: on a list of known pictures"]
    if reason["band"] == "tighten":
        return [f"{rule} tightens thresholds"]
    if not isinstance(score, float) or not isinstance(limit, float):
        return [f"{rule} could not be evaluated"]
    said = f"{reason['band']} by {rule}, {text.score(score, limit)} beyond {text.score(limit, score)}"
    if not reason["nearest"]:
        return [said]
    return [f"{said}, nearest “", Written(reason["nearest"], 60, isolated=True), "”"]


def _example(flip: Flip) -> Example:
    # Shown clearly only when both policies keep it, which a flip never is: "blur" blurs every one.
    return Example(
        flip.commit, flip.path, flip.row, flip.key, flip.caption, flip.sha256, None, None, [], hidden=flip.hidden
    )


def _signed(change: int) -> str:
    return f"{change:+,}".replace("-", "−") if change else "0"
