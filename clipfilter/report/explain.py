"""Why one row was decided as it was: the whole chain from the image to the decision, read from the run's files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter import text
from clipfilter.decisions import ESCALATE, LIMITS, TIGHTEN
from clipfilter.errors import RefusedError
from clipfilter.policies import OVERRIDE_RULE as OVERRIDE
from clipfilter.policies import Attachments, Policy, in_words, joined, measure_of
from clipfilter.report.data import RuleData, rules_of
from clipfilter.runs import Commit, DataFile, Run

_ROW = (cf.ROW, cf.KEY, cf.UID, cf.SHA256, cf.WIDTH, cf.HEIGHT, cf.FORMAT, cf.CAPTION, cf.DECISION)


@dataclass
class RuleVerdict:
    """What one rule said about the row. result: keep, review, reject, escalate, missing (it could not be evaluated), or
    skipped (its condition excludes the row).

    nearest, contrast: the phrase the image is nearest to, and what it was told apart from; only for rules that fired.
    limit: the threshold that was passed, where modifiers had moved it; tightens: whether the rule itself moved another's.
    when: its condition in words. severity, action: as the policy names them.
    """

    id: str
    kind: str
    measures: str
    score: float | None
    result: str
    thresholds: list[dict[str, Any]]
    calibrated: bool | None
    on_missing: str
    nearest: str | None = None
    contrast: str | None = None
    limit: float | None = None
    tightens: bool = False
    when: str | None = None
    severity: int | None = None
    action: str | None = None


@dataclass
class Explanation:
    """Enough to answer an appeal: the row, every rule's score and thresholds, policy, model and where it is on record.

    override: what a person decided about the row (decision, by, date, note), None for nothing.
    """

    uid: str
    key: str
    decision: str
    shard: dict[str, Any]
    row: int
    image: dict[str, Any]
    caption: str | None
    rules: list[RuleVerdict]
    error: dict[str, str] | None
    policy: dict[str, Any] | None
    model: dict[str, Any]
    run: str
    version: str
    commit: str
    notes: list[str] = field(default_factory=list)
    override: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def explain_row(run: str, wanted: str) -> Explanation:
    """The row of a run whose cf_uid, or else whose cf_key, is `wanted`; the files are searched one shard at a time.

    Raises RefusedError when there is no such run or row, or when several rows have that key.
    """
    opened = Run.open(run)
    found: list[tuple[Commit, bool, dict[str, Any]]] = []
    for commit in opened.commits():
        for file in (commit.files.annotated, commit.files.failed):
            found += [(commit, file is commit.files.failed, row) for row in _rows(opened, file, wanted)]
        exact = [item for item in found if item[2][cf.UID] == wanted]
        if exact:
            found = exact
            break
    if not found:
        raise RefusedError(f"{run} has no row whose cf_uid or cf_key is {wanted!r}; annotated/ and failed/ list them.")
    if len(found) > 1:
        uids = ", ".join(row[cf.UID] for _, _, row in found[:3])
        raise RefusedError(f"{len(found)} rows have the key {wanted!r}; give one's cf_uid ({uids}).")
    return _explanation(opened, *found[0])


def _rows(run: Run, file: DataFile | None, wanted: str) -> Iterator[dict[str, Any]]:
    """The rows of a file that bear the name; only where one does are the other columns read."""

    def bearing(batch: pa.RecordBatch) -> pa.RecordBatch:
        hit = pc.or_kleene(pc.equal(batch[cf.UID], wanted), pc.equal(batch[cf.KEY], wanted))
        return batch.filter(pc.fill_null(hit, False))

    if any(bearing(batch).num_rows for batch in run.batches_of(file, (cf.UID, cf.KEY))):
        for batch in run.batches_of(file, lambda name: name.startswith(cf.PREFIX)):
            yield from bearing(batch).to_pylist()


def _explanation(run: Run, commit: Commit, failed: bool, row: dict[str, Any]) -> Explanation:
    plan = run.plan
    policy = plan.policy
    rules = (
        [] if failed or row.get(cf.DECISION) is None else [verdict(rule, row) for rule in rules_of(plan, run.version)]
    )
    image = {key.removeprefix(cf.PREFIX): row[key] for key in _ROW[3:7] if row.get(key) is not None}
    notes = []
    if any(rule.calibrated is False for rule in rules):
        notes.append(
            "Thresholds marked uncalibrated are as written in the policy; nobody measured them for this model."
        )
    override = _override(run, row)
    if any(rule.result == ESCALATE for rule in rules):
        notes.append(
            "The picture is on a list of known ones that are escalated: it is rejected, never copied and never shown"
            + ("; a person's decision does not change that." if override else ".")
        )
    elif override is not None:
        notes.append("A person's decision wins over the rules; what they said is recorded all the same.")
    if commit.damaged:
        notes.append(f"The shard is damaged: {commit.bytes_unread:,} bytes after its last row were not read.")
    return Explanation(
        uid=row[cf.UID],
        key=row[cf.KEY] or "",
        decision="failed" if failed else row.get(cf.DECISION) or "none",
        shard={"id": commit.shard.id, "path": commit.shard.path},
        row=row[cf.ROW],
        image=image,
        caption=row.get(cf.CAPTION),
        rules=rules,
        error={"class": row[cf.ERROR_CLASS], "message": row[cf.ERROR]} if failed else None,
        policy=None
        if policy is None
        else {"name": policy["policy"], "version": policy["version"], "sha256": plan.policy_sha256},
        model=plan.model,
        run=run.url,
        version=run.version.name,
        commit=commit.name,
        notes=notes,
        override=override,
    )


def _override(run: Run, row: dict[str, Any]) -> dict[str, Any] | None:
    """What a person decided, with who, when and why as far as the run still has it."""
    made = next((reason for reason in row.get(cf.REASONS) or [] if reason["rule"] == OVERRIDE), None)
    if made is None:
        return None
    found = None
    try:
        policy = Policy.from_canonical(run.plan.policy or {})
        if policy.overrides is not None:
            found = policy.overrides.find(row[cf.UID], Attachments(run.directory))
    except RefusedError:  # the run's copy of the list is gone; the decision is in the row
        pass
    return {**(found or {}), "decision": made["band"]}


def verdict(rule: RuleData, row: dict[str, Any]) -> RuleVerdict:
    """What the rule said about an annotated row (its columns by name)."""
    value = row.get(cf.score(rule.id))
    own = [reason for reason in row.get(cf.REASONS) or [] if reason["rule"] == rule.id]
    fired = next((reason for reason in own if reason["band"] != TIGHTEN), None)
    when = rule.spec.get("when")
    on_missing = rule.spec.get("on_missing") or "review"
    unscored = "skipped" if when is not None and on_missing != "keep" else "missing"
    return RuleVerdict(
        id=rule.id,
        kind=rule.kind,
        measures=joined(rule.measure.measured(rule.measured), lambda said: text.clean(said.text, said.limit)),
        score=value,
        result=fired["band"] if fired else unscored if value is None else "keep",
        thresholds=[
            {"band": b.name, "direction": b.direction, "threshold": b.threshold, "from": b.source, **b.evidence}
            for b in rule.bands
        ],
        calibrated=rule.calibrated,
        on_missing=on_missing,
        nearest=fired["nearest"] if fired else None,
        contrast=fired["contrast"] if fired else None,
        limit=fired["threshold"] if fired else None,
        tightens=len(own) > (fired is not None),
        when=in_words(when) if when is not None else None,
        severity=rule.spec.get("severity"),
        action=rule.spec.get("action"),
    )


def sentence(rule: RuleVerdict) -> str:
    """One rule's part in the decision, in plain words."""
    said = _sentence(rule)
    if rule.tightens:
        said += "; so it moved the thresholds of other rules"
    if rule.severity and rule.result in (*LIMITS, ESCALATE):
        said += f"; severity {rule.severity}"
    if rule.action and not measure_of(rule.kind).actions and rule.result in LIMITS:
        said += f"; action {text.clean(rule.action, 64)}"
    return said


def _sentence(rule: RuleVerdict) -> str:
    if rule.result == "skipped":
        return f"does not apply to this row (only when {text.clean(rule.when, 300)})"
    if rule.score is None and rule.when is not None and rule.on_missing == "keep":
        return f"does not apply to this row, or could not be evaluated (only when {text.clean(rule.when, 300)})"
    said = None if rule.score is None else measure_of(rule.kind).verdict(rule.measures, rule.score, rule.result)
    if said is not None:
        return said
    if rule.score is None:
        does = {"review": "sends the row to review", "reject": "rejects the row", "keep": "lets the row pass"}
        return f"could not be evaluated, which {does.get(rule.on_missing, 'sends the row to review')}"
    if rule.result == "keep":
        limits = [limit for limit in rule.thresholds if limit["threshold"] is not None]
        shown = ", ".join(f"{limit['band']} {_limit(limit, rule.score)}" for limit in limits)
        return f"{rule.measures} {text.score(rule.score)} passes" + (f" ({shown})" if shown else "")
    limit = next(item for item in rule.thresholds if item["band"] == rule.result)
    origin = {"calibrated": "calibrated", "dataset": "fixed over the dataset", "written": "as written in the policy"}
    said = f"{rule.measures} {text.score(rule.score, limit['threshold'])} is {_limit(limit, rule.score)}, {origin[limit['from']]}"
    if rule.limit is not None and abs(rule.limit - limit["threshold"]) > 1e-6 * max(1.0, abs(limit["threshold"])):
        said = (
            f"{rule.measures} {text.score(rule.score, rule.limit)} is {limit['direction']} "
            f"{text.score(rule.limit, rule.score)}, to which another rule moved the threshold {limit['threshold']:g}"
        )
    if rule.nearest:
        said += f"; {measure_of(rule.kind).found_as} “{text.clean(rule.nearest, 120)}”"
        said += f", told apart from “{text.clean(rule.contrast, 120)}”" if rule.contrast else ""
    return said


def _limit(limit: dict[str, Any], score: float) -> str:
    return f"{limit['direction']} {text.score(limit['threshold'], score)}"
