"""Exports every decision of a run as JSON Lines: for appeals and audits, or in the shapes of other services' answers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from clipfilter import columns as cf
from clipfilter.decisions import ESCALATE, LIMITS, MISSING
from clipfilter.errors import RefusedError
from clipfilter.policies import Policy, load_policy, pack_names
from clipfilter.report.data import RuleData, rules_of
from clipfilter.report.explain import RuleVerdict, sentence, verdict
from clipfilter.report.interchange import SHAPES
from clipfilter.runs import Commit, Plan, Run
from clipfilter.storage import directory_of

FORMAT = "clipfilter-audit/1"
AUDIT = "audit"
KINDS = (AUDIT, *SHAPES)
_BATCH = 2048


@dataclass(frozen=True)
class Exported:
    """What was written: rows by decision (`failed` for rows without one)."""

    out: str
    rows: int
    decisions: dict[str, int]


def export_decisions(run: str, out: str, *, kind: str = AUDIT, mapping: str | None = None) -> Exported:
    """Write one JSON object per row of a run's newest version, in the order of its shards.

    kind: `audit`, or a service whose answers are imitated. mapping: policy whose `interchange` says which rules stand for
    which category [default: the pack that the run's policy is called after]. out: a new local file or object.
    Memory is that of one batch of rows; the file appears whole or not at all.

    Raises RefusedError when the run has no decisions, `out` exists, or there is no mapping.
    """
    opened = Run.open(run)
    if opened.plan.policy is None:
        raise RefusedError(f"{run} holds no decisions; decide it first: clipfilter filter {run} --policy P --out OUT.")
    exporter = _Exporter(opened, kind, mapping)
    target, name = directory_of(out.rstrip("/"))
    if not name or name in (".", "..") or target.exists(name):
        raise RefusedError(f"--out {out} exists; name a new file.")
    decisions: Counter[str] = Counter()
    with target:
        temporary = target.scratch() / PurePosixPath(name).name
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for commit, failed, row in _rows(opened):
                made = exporter.row(commit, failed, row)
                decisions[_decision(row, failed)] += 1
                file.write(json.dumps(made, allow_nan=False, separators=(",", ":")) + "\n")
        target.publish(temporary, name)
    return Exported(out, sum(decisions.values()), dict(decisions))


def _rows(run: Run) -> Iterator[tuple[Commit, bool, dict[str, Any]]]:
    """(commit, whether the row failed, row) of every row."""
    for commit in run.commits():
        for file in (commit.files.annotated, commit.files.failed):
            for batch in run.batches_of(file, lambda name: name.startswith(cf.PREFIX), _BATCH):
                for row in batch.to_pylist():
                    yield commit, file is commit.files.failed, row


def _decision(row: dict[str, Any], failed: bool) -> str:
    return "failed" if failed else str(row.get(cf.DECISION))


class _Exporter:
    """Turns rows into objects of one kind."""

    def __init__(self, run: Run, kind: str, mapping: str | None) -> None:
        plan = self._plan = run.plan
        assert plan.policy is not None
        self._kind = kind
        self._rules = {rule.id: rule for rule in rules_of(plan, run.version)}
        self._policy = {
            "name": plan.policy["policy"],
            "version": plan.policy["version"],
            "sha256": plan.policy_sha256,
        }
        self._run = {"run": run.url, "version": run.version.name}
        self._categories = {} if kind == AUDIT else _categories(plan, kind, mapping, self._rules)

    def row(self, commit: Commit, failed: bool, row: dict[str, Any]) -> dict[str, Any]:
        verdicts = {} if failed else {rule.id: verdict(rule, row) for rule in self._rules.values()}
        if self._kind == AUDIT:
            return self._audit(commit, failed, row, verdicts)
        ours = {
            "uid": row[cf.UID],
            "key": row[cf.KEY],
            "decision": _decision(row, failed),
            "policy_sha256": self._plan.policy_sha256,
        }
        if failed:
            return {"error": {"code": row[cf.ERROR_CLASS], "message": row[cf.ERROR]}, "clipfilter": ours}
        title = f"{self._policy['name']}-{self._policy['version']}"
        return {**SHAPES[self._kind](self._categories, self._rules, verdicts, ours, title), "clipfilter": ours}

    def _audit(
        self, commit: Commit, failed: bool, row: dict[str, Any], verdicts: dict[str, RuleVerdict]
    ) -> dict[str, Any]:
        image = {key: row.get(f"{cf.PREFIX}{key}") for key in ("sha256", "width", "height", "format")}
        return {
            "format": FORMAT,
            "uid": row[cf.UID],
            "key": row[cf.KEY],
            "decision": _decision(row, failed),
            "reasons": [] if failed else row[cf.REASONS],
            "said": [f"{item.id}: {sentence(item)}" for item in verdicts.values() if item.result in _SAYING],
            "rules": [asdict(item) for item in verdicts.values()],
            "error": {"class": row[cf.ERROR_CLASS], "message": row[cf.ERROR]} if failed else None,
            "image": None if failed else image,
            "caption": row.get(cf.CAPTION),
            "similarity": row.get(cf.SIMILARITY),
            "shard": {"id": commit.shard.id, "path": commit.shard.path},
            "row": row[cf.ROW],
            "policy": self._policy,
            "model": self._plan.model,
            "decode": self._plan.options.get("decode"),
            "record": {**self._run, "commit": commit.name},
        }


#: Results that are worth a sentence; the rest only passed.
_SAYING = frozenset({*LIMITS, MISSING, ESCALATE})


def _categories(plan: Plan, kind: str, mapping: str | None, rules: dict[str, RuleData]) -> dict[str, tuple[str, ...]]:
    """Which rules stand for which category. Raises RefusedError."""
    assert plan.policy is not None
    name = str(plan.policy["policy"])
    if mapping is None and name not in pack_names():
        raise RefusedError(
            f"the run's policy {name!r} is no pack; say with --mapping which policy file has its `interchange`."
        )
    policy: Policy = load_policy(mapping or name)
    found: dict[str, tuple[str, ...]] | None = getattr(policy.interchange, kind, None)
    if not found:
        raise RefusedError(
            f"the policy {policy.name!r} has no `interchange: {{{kind}: ...}}` to say which rules mean what."
        )
    unknown = sorted({rule for members in found.values() for rule in members} - set(rules))
    if unknown:
        raise RefusedError(
            f"the mapping of {policy.name!r} names rules that the run's policy {name!r} does not have: {', '.join(unknown)}."
        )
    return found
