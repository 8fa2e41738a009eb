"""What the page is told, as JSON data: the run, pages of rows, one row explained, the effect of moved thresholds."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from clipfilter import columns as cf
from clipfilter import text
from clipfilter.charts import Histogram, bars
from clipfilter.decisions import DECISIONS, ESCALATE, LIMITS, MISSING
from clipfilter.errors import RefusedError
from clipfilter.report import RuleData, sentence, verdict
from clipfilter.serve.columns import BANDS
from clipfilter.serve.effect import Changes
from clipfilter.serve.export import changed_policy
from clipfilter.serve.labels import LabelFile
from clipfilter.serve.query import MOST_FOUND, Found, RowsRequest
from clipfilter.serve.run import ServedRun

_ROW = (cf.UID, cf.KEY, cf.CAPTION)
_CAPTION = 600


def about(run: ServedRun, labels: LabelFile) -> dict[str, Any]:
    """Everything that does not change while the page is open, and the labels so far."""
    plan = run.plan
    return {
        "name": text.clean(
            text.place(run.plan.dataset.get("url", "")).rstrip("/").rsplit("/", 1)[-1] or "dataset", 120
        ),
        "run": text.place(run.url),
        "version": run.run.version.number,
        "model": str(plan.model.get("model")),
        "policy": {"name": plan.policy["policy"], "version": plan.policy["version"]} if plan.policy else None,
        "rows": run.columns.rows,
        "failed": run.run.version.totals.failed,
        "decisions": run.columns.totals() if plan.policy else {},
        "rules": [_rule(run, rule) for rule in run.rules],
        "scores": [name for name in run.columns.scores if not np.isnan(run.columns.scores[name]).all()],
        "columns": [name for name in run.vectors.schema.names if not name.startswith((cf.REASONS, cf.SOURCE_JSON))],
        "most_found": MOST_FOUND,
        "labels": {rule.id: label_state(run, labels, rule.id) for rule in run.rules if rule.measure.needs_model},
    }


def _rule(run: ServedRun, rule: RuleData) -> dict[str, Any]:
    columns = run.columns
    limits = [band.threshold for band in rule.bands if band.threshold is not None]
    scores = columns.ascending(rule.id)[1] if rule.id in columns.scores else np.empty(0, np.float32)
    histogram = Histogram()
    histogram.add(scores)
    drawn = (
        bars(histogram, limits, (0.0, 1.0) if rule.measure.fills_unit(rule.measured) else None) if len(scores) else None
    )
    return {
        "id": rule.id,
        "kind": rule.kind,
        "of": rule.measured["of"] if rule.measure.ranks else None,
        "calibrated": rule.calibrated,
        "fixed": run.effects.movable(rule),
        "labels": rule.measure.needs_model,
        "counts": columns.bands_of(columns.rules.index(rule.id)),
        "unscored": columns.rows - len(scores),
        "low": float(scores[0]) if len(scores) else None,
        "high": float(scores[-1]) if len(scores) else None,
        "edges": [] if drawn is None else [float(f"{edge:.9g}") for edge in drawn.edges],
        "bars": [] if drawn is None else drawn.counts.tolist(),
        "bands": [
            {
                "name": band.name,
                "direction": band.direction,
                "threshold": band.threshold,
                "value": next(iter(band.written.values())) if band.source == "dataset" else band.threshold,
                "source": band.source,
            }
            for band in sorted(rule.bands, key=lambda item: item.name != "reject")
        ],
    }


def label_state(run: ServedRun, labels: LabelFile, rule: str) -> dict[str, Any]:
    """How far the labels of a rule are, where they are written, and the command that uses them."""
    given, sample = labels.labelled(rule), labels.sample(rule)
    done = sum(uid in given for uid in sample)
    path = str(labels.path)
    command = ["clipfilter", "policy", "calibrate", "POLICY.yaml", "--labels", path, "--on", run.url, "--rule", rule]
    return {
        "labelled": len(given),
        "true": sum(given.values()),
        "sample": len(sample),
        "sample_done": done,
        "file": path,
        "command": " ".join(shlex.quote(part) for part in [*command, "--target", "precision=0.9"]),
    }


def page_of(run: ServedRun, labels: LabelFile, request: RowsRequest, found: Found) -> dict[str, Any]:
    """One page of the rows found."""
    part = slice(request.offset, request.offset + request.limit)
    positions = found.positions[part]
    cosines = [None] * len(positions) if found.cosines is None else [float(v) for v in found.cosines[part]]
    stored = run.vectors.rows_at(positions, [n for n in _ROW if n in run.vectors.schema.names]).to_pylist()
    after: dict[int, int] = {}
    if request.changes:
        effect = run.effects.of(request.changes, exact=request.flips)
        hit = np.searchsorted(effect.rows, positions)
        for position, at in zip(positions.tolist(), hit.tolist(), strict=True):
            if at < len(effect.rows) and effect.rows[at] == position:
                after[position] = int(effect.after[at])
    rows = [
        _card(run, labels, request, position, row, cosine, after.get(position))
        for position, row, cosine in zip(positions.tolist(), stored, cosines, strict=True)
    ]
    return {"total": len(found.positions), "offset": request.offset, "rows": rows}


def _card(
    run: ServedRun,
    labels: LabelFile,
    request: RowsRequest,
    position: int,
    row: Mapping[str, Any],
    cosine: float | None,
    after: int | None,
) -> dict[str, Any]:
    columns = run.columns
    decision = int(columns.decision[position])
    uid = str(row[cf.UID])
    return {
        "position": position,
        "uid": uid,
        "key": text.clean(row.get(cf.KEY) or uid, 200),
        "caption": text.clean(row[cf.CAPTION], _CAPTION) if row.get(cf.CAPTION) else None,
        "decision": DECISIONS[decision] if decision >= 0 else None,
        "after": DECISIONS[after] if after is not None else None,
        "escalated": bool(columns.escalated[position]),
        "cosine": cosine,
        "score": _score(run, request.sort or request.label_rule, position),
        "reasons": [
            {"rule": rule, "band": BANDS[columns.band[number, position]], "score": _score(run, rule, position)}
            for number, rule in enumerate(columns.rules)
            if columns.band[number, position]
        ],
        "label": labels.get(uid, request.label_rule) if request.label_rule else None,
    }


def _score(run: ServedRun, name: str, position: int) -> float | None:
    """A row's score of a rule, or its similarity; None where it has none."""
    value = run.columns.scores[name][position] if name in run.columns.scores else math.nan
    return None if math.isnan(value) else float(value)


def row_explained(run: ServedRun, position: int) -> dict[str, Any]:
    """One row with everything that decided it, in plain words."""
    if position >= run.columns.rows:
        raise RefusedError(f"there is no row {position}.")
    wanted = [name for name in run.vectors.schema.names if name.startswith(cf.PREFIX) and name != cf.SOURCE_JSON]
    row = run.vectors.rows_at([position], wanted).to_pylist()[0]
    number, _ = run.vectors.locate([position])
    decision = row.get(cf.DECISION)
    verdicts = [verdict(rule, row) for rule in run.rules] if decision else []
    order = {"reject": 0, ESCALATE: 1, "review": 2, MISSING: 3, "keep": 4}
    verdicts.sort(key=lambda item: order.get(item.result, len(order)))
    return {
        "position": position,
        "uid": row[cf.UID],
        "key": text.clean(row.get(cf.KEY) or "", 400),
        "caption": text.clean(row[cf.CAPTION], 2000) if row.get(cf.CAPTION) else None,
        "decision": decision,
        "escalated": bool(run.columns.escalated[position]),
        "image": {name: row.get(f"{cf.PREFIX}{name}") for name in ("width", "height", "format", "sha256")},
        "similarity": row.get(cf.SIMILARITY),
        "shard": text.clean(run.vectors.shards[int(number[0])].shard.path, 400),
        "row": row[cf.ROW],
        "rules": [
            {
                "id": item.id,
                "result": item.result,
                "sentence": sentence(item),
                "uncalibrated": item.calibrated is False and item.result != "keep",
            }
            for item in verdicts
        ],
    }


def effect(run: ServedRun, changes: Changes, *, exact: bool) -> dict[str, Any]:
    """What moved thresholds change. Raises RefusedError where no policy could say them."""
    began = time.perf_counter()
    changed_policy(run.plan, changes)
    found = run.effects.of(changes, exact=exact)
    totals = run.columns.totals()
    for (before, after), count in found.changes.items():
        totals[before] -= count
        totals[after] += count
    return {
        "flipped": len(found.rows),
        "rows": run.columns.rows,
        "changes": [{"from": a, "to": b, "rows": n} for (a, b), n in sorted(found.changes.items())],
        "decisions": totals,
        "rules": found.rules,
        "thresholds": found.thresholds,
        "doubtful": found.doubtful,
        "milliseconds": round(1000 * (time.perf_counter() - began), 2),
    }


def labelled_row(run: ServedRun, position: int, rule: str) -> dict[str, Any]:
    """What a labels file says of a row. Raises RefusedError where the row has no score of the rule."""
    own = run.effects.rule(rule)
    if not own.measure.needs_model:
        raise RefusedError(f"{rule!r} is a {own.kind} rule, whose threshold depends on no model; it needs no labels.")
    if position >= run.columns.rows:
        raise RefusedError(f"there is no row {position}.")
    score = _score(run, rule, position)
    if score is None:
        raise RefusedError(f"this row has no score of {rule!r}, so its label says nothing about a threshold.")
    names = [name for name in (*_ROW, cf.SHARD, cf.ROW) if name in run.vectors.schema.names]
    row = run.vectors.rows_at([position], names).to_pylist()[0]
    number, _ = run.vectors.locate([position])
    band = BANDS[run.columns.band[run.columns.rules.index(rule), position]]
    return {
        cf.UID: row[cf.UID],
        cf.KEY: row.get(cf.KEY),
        "path": str(run.vectors.shards[int(number[0])].shard.path),
        cf.SHARD: row[cf.SHARD],
        cf.ROW: row[cf.ROW],
        "caption": row.get(cf.CAPTION),
        "score": score,
        "band": band if band in LIMITS else "keep",
    }
