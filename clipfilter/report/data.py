"""Everything the report says, gathered from a run's files: streamed, one shard at a time, in bounded memory."""

from __future__ import annotations

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter.charts import Histogram
from clipfilter.decisions import DECISIONS, ESCALATE, LIMITS, MISSING
from clipfilter.policies import Measure, bent, measure_in, measure_of
from clipfilter.runs import Commit, Plan, Run, Totals, Version, Work

BANDS = (*LIMITS, MISSING, ESCALATE)
#: How many example messages each class of failure gets, and how many troubled shards are listed.
FAILURE_EXAMPLES = 4
LISTED_SHARDS = 20

_BATCH = 16_384
_COMMITS_AT_ONCE = 64
_THREADS = 4


@dataclass
class Band:
    """One threshold of a rule. `threshold` is None where a dataset-level rule had nothing to rank.

    beyond: rows strictly past the threshold. source: "written", "calibrated" or "dataset" (fixed from all rows).
    """

    name: str
    direction: str
    threshold: float | None
    source: str
    written: dict[str, Any]
    evidence: dict[str, Any] = field(default_factory=dict)
    beyond: int = 0


@dataclass
class RuleData:
    """One rule: what it says, what it did. `counts` are the rows of each band as the rows' reasons name them.

    alone: rows that only this rule brought to their decision; without it they would have been decided more mildly.
    calibrated: None where the threshold depends on no model.
    """

    id: str
    kind: str
    spec: dict[str, Any]
    calibrated: bool | None
    bands: list[Band]
    histogram: Histogram = field(default_factory=Histogram)
    unscored: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    alone: int = 0

    @property
    def measure(self) -> type[Measure]:
        """Its kind, which knows its words."""
        return measure_of(self.kind)

    @property
    def measured(self) -> Any:
        """What the policy says below the kind's name."""
        return self.spec[self.kind]

    def band(self, name: str) -> Band | None:
        return next((band for band in self.bands if band.name == name), None)

    @property
    def stopped(self) -> int:
        """Rows the rule puts into review or reject, for whatever reason."""
        return sum(self.counts.values())


@dataclass
class FailureClass:
    """Failed rows of one class; examples are (message, key, path of the shard)."""

    name: str
    count: int = 0
    examples: list[tuple[str, str, str]] = field(default_factory=list)


@dataclass
class Speed:
    """Where the time went. seconds: worker seconds by step, summed over shards; first, last: Unix times."""

    seconds: Counter[str] = field(default_factory=Counter)
    first: float | None = None
    last: float | None = None
    machines: dict[str, int] = field(default_factory=dict)
    backends: set[str] = field(default_factory=set)
    halvings: int = 0
    retries: int = 0

    def add(self, work: Work) -> None:
        self.first = work.started if self.first is None else min(self.first, work.started)
        self.last = work.finished if self.last is None else max(self.last, work.finished)
        if len(self.machines) < 10_000:
            self.machines[str(work.machine.get("host"))] = int(work.machine.get("cores") or 0)
        if work.of_worker is not None:
            self.seconds.update(work.of_worker.seconds)
            if work.of_worker.backend:
                self.backends.add(str(work.of_worker.backend))
            self.halvings += work.of_worker.batch_halvings
            self.retries += max(0, work.of_worker.attempt - 1)


@dataclass
class RunData:
    """A finished run as the report shows it."""

    run: Run
    summary: dict[str, Any]  # run.json: derived, used for timings only
    rules: list[RuleData]
    similarity: Histogram = field(default_factory=Histogram)
    decisions: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    failures: dict[str, FailureClass] = field(default_factory=dict)
    extra: Counter[str] = field(default_factory=Counter)
    kept_bytes: int = 0
    kept_files: int = 0
    damaged: list[tuple[str, int]] = field(default_factory=list)  # path, bytes not read
    speed: Speed = field(default_factory=Speed)
    differences: list[str] = field(default_factory=list)
    chosen: list[str] = field(default_factory=list)  # commits to take examples from

    @property
    def plan(self) -> Plan:
        return self.run.plan

    @property
    def version(self) -> Version:
        return self.run.version

    @property
    def totals(self) -> Totals:
        return self.run.version.totals


def gather(run: Run) -> RunData:
    """Read a run, whose thresholds and shards are those of its version. Raises RefusedError where it has not finished."""
    summary = run.directory.read_json("run.json") if run.directory.exists("run.json") else {}
    data = RunData(run, summary, rules_of(run.plan, run.version))
    picker = _ShardPicker()
    with ThreadPoolExecutor(_THREADS) as pool:
        commits = run.commits()
        while part := list(itertools.islice(commits, _COMMITS_AT_ONCE)):
            for commit, sums in zip(part, pool.map(lambda c: _sum_shard(run, data.rules, c), part), strict=True):
                _add_shard(data, commit, sums)
                data.speed.add(commit.work)
                picker.see(commit)
    if run.version.thresholds:  # two stages; the first one's times are in its own commits
        for commit in run.scored():
            data.speed.add(commit.work)
    _compare(data)
    data.chosen = picker.choose()
    return data


def rules_of(plan: Plan, version: Version) -> list[RuleData]:
    """The rules with the thresholds that decided: calibrated for this model, fixed over the dataset, or as written."""
    policy = plan.policy or {"rules": []}
    weights = plan.model.get("weights_sha256")
    entries: list[dict[str, Any]] = policy.get("calibrations", [])
    own = next((entry for entry in entries if entry.get("weights_sha256") == weights), {})
    rules = []
    for spec in policy["rules"]:
        measure = measure_in(spec)
        depends = measure.needs_model
        calibrated = own.get("rules", {}).get(spec["id"], {}) if depends else {}
        named = [name for name in LIMITS if name in spec or name in calibrated]
        # Where the score is the calibrated probability, calibrated thresholds (raw scores) are carried over to it.
        bends = measure.is_calibrated(spec[measure.kind])
        curve = calibrated.get("probability", {}).get("platt") if bends else None
        bands = [_band(name, spec, calibrated.get(name), version, curve) for name in named]
        if measure.actions:
            bands = [Band(spec["action"], "above", 0.0, "written", {})]
        rules.append(RuleData(spec["id"], measure.kind, spec, bool(calibrated) if depends else None, bands))
    return rules


def _band(
    name: str,
    spec: dict[str, Any],
    calibrated: dict[str, Any] | None,
    version: Version,
    curve: dict[str, float] | None = None,
) -> Band:
    if calibrated:
        direction = "above" if "above" in calibrated else "below"
        evidence: dict[str, Any] = {key: calibrated[key] for key in ("n", "target") if key in calibrated}
        value = calibrated[direction] if curve is None else bent((curve["a"], curve["b"]), calibrated[direction])
        return Band(name, direction, value, "calibrated", spec.get(name, {}), evidence)
    written = spec[name]
    direction, value = next(iter(written.items()))
    if direction.startswith("outside_"):
        fixed = version.thresholds.get(f"{spec['id']}.{name}")
        return Band(name, "below" if direction == "outside_top" else "above", fixed, "dataset", written)
    return Band(name, direction, value, "written", written)


@dataclass
class _ShardSums:
    """What one shard adds."""

    rules: list[tuple[Histogram, int, Counter[str], int, list[int]]] = field(default_factory=list)
    similarity: Histogram = field(default_factory=Histogram)
    decisions: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    failures: dict[str, FailureClass] = field(default_factory=dict)


def _add_shard(data: RunData, commit: Commit, sums: _ShardSums) -> None:
    for rule, (histogram, unscored, counts, alone, beyond) in zip(data.rules, sums.rules, strict=True):
        rule.histogram.merge(histogram)
        rule.unscored += unscored
        rule.counts.update(counts)
        rule.alone += alone
        for band, count in zip(rule.bands, beyond, strict=True):
            band.beyond += count
    data.similarity.merge(sums.similarity)
    data.decisions.update(sums.decisions)
    data.rows += sums.rows
    for found in sums.failures.values():
        known = data.failures.setdefault(found.name, FailureClass(found.name))
        known.count += found.count
        seen = {message for message, _, _ in known.examples}
        fresh = [example for example in found.examples if example[0] not in seen]
        known.examples += fresh[: FAILURE_EXAMPLES - len(known.examples)]
    data.extra.update(clashes=commit.counts.clashes, misfits=commit.counts.misfits)
    if commit.damaged and len(data.damaged) < LISTED_SHARDS:
        data.damaged.append((commit.shard.path, commit.bytes_unread))
    if commit.files.kept is not None:
        data.kept_files += 1
        data.kept_bytes += commit.files.kept.bytes


def _sum_shard(run: Run, rules: list[RuleData], commit: Commit) -> _ShardSums:
    sums = _ShardSums(rules=[(Histogram(), 0, Counter(), 0, [0] * len(rule.bands)) for rule in rules])
    wanted = {cf.SIMILARITY, cf.DECISION, cf.REASONS, *(cf.score(rule.id) for rule in rules)}
    for batch in run.batches_of(commit.files.annotated, wanted.__contains__, _BATCH):
        _sum_batch(sums, rules, batch)
    for batch in run.batches_of(commit.files.failed, (cf.KEY, cf.ERROR_CLASS, cf.ERROR), _BATCH):
        _sum_failures(sums.failures, batch, commit.shard.path)
        sums.rows += batch.num_rows
    return sums


def _sum_batch(sums: _ShardSums, rules: list[RuleData], batch: pa.RecordBatch) -> None:
    sums.rows += batch.num_rows
    names = set(batch.schema.names)
    if cf.SIMILARITY in names:
        sums.similarity.add(floats(batch.column(cf.SIMILARITY)))
    if cf.DECISION in names:
        for item in pc.value_counts(batch.column(cf.DECISION)).to_pylist():
            if item["values"] is not None:
                sums.decisions[item["values"]] += item["counts"]
    fired, alone = _reasons(rules, batch) if cf.REASONS in names else (None, None)
    for position, rule in enumerate(rules):
        histogram, unscored, counts, only, beyond = sums.rules[position]
        if cf.score(rule.id) in names:
            values = floats(batch.column(cf.score(rule.id)))
            histogram.add(values)
            unscored += int(np.isnan(values).sum())
            beyond = [count + int(past(values, band).sum()) for count, band in zip(beyond, rule.bands, strict=True)]
        if fired is not None and alone is not None:
            counts.update({band: int(n) for band, n in zip(BANDS, fired[position], strict=True) if n})
            only += int(alone[position])
        sums.rules[position] = (histogram, unscored, counts, only, beyond)


def _reasons(rules: list[RuleData], batch: pa.RecordBatch) -> tuple[np.ndarray, np.ndarray]:
    """Rows by rule and band, int64 [rules, bands]; and the rows that each rule alone brought to their decision [rules]."""
    lists = batch.column(cf.REASONS)
    flat = lists.flatten()
    row = np.asarray(pc.list_parent_indices(lists))
    rule = np.asarray(pc.index_in(flat.field("rule"), pa.array([r.id for r in rules], pa.string())).fill_null(-1))
    band = np.asarray(pc.index_in(flat.field("band"), pa.array(list(BANDS))).fill_null(-1))
    known = (rule >= 0) & (band >= 0)
    row, rule, band = row[known], rule[known], band[known]
    fired = np.bincount(rule * len(BANDS) + band, minlength=len(rules) * len(BANDS)).reshape(len(rules), len(BANDS))
    missing = np.array([2 if r.spec.get("on_missing") == "reject" else 1 for r in rules] or [1])
    severity = np.where(band == 2, missing[rule], np.where(band == 0, 1, 2))
    worst = np.zeros(batch.num_rows, np.int64)
    np.maximum.at(worst, row, severity)
    top = severity == worst[row]
    single = top & (np.bincount(row[top], minlength=batch.num_rows)[row] == 1)
    return fired, np.bincount(rule[single], minlength=len(rules))


def floats(column: pa.Array) -> np.ndarray:
    """A float32 column as float32 [n], NaN for null."""
    return np.asarray(column.to_numpy(zero_copy_only=False), np.float32)


def past(values: np.ndarray, band: Band) -> np.ndarray:
    """Which scores lie strictly beyond a band's threshold, compared as the engine does (float32)."""
    if band.threshold is None:
        return np.zeros(len(values), bool)
    limit = np.float32(band.threshold)
    with np.errstate(invalid="ignore"):
        return values > limit if band.direction == "above" else values < limit


def _sum_failures(failures: dict[str, FailureClass], batch: pa.RecordBatch, path: str) -> None:
    classes = batch.column(cf.ERROR_CLASS)
    for item in pc.value_counts(classes).to_pylist():
        name = str(item["values"])
        found = failures.setdefault(name, FailureClass(name))
        found.count += item["counts"]
        if len(found.examples) >= FAILURE_EXAMPLES:
            continue
        seen = {message for message, _, _ in found.examples}
        for row in np.flatnonzero(np.asarray(pc.equal(classes, item["values"]).fill_null(False)))[:256].tolist():
            message, key = str(batch.column(cf.ERROR)[row].as_py()), str(batch.column(cf.KEY)[row].as_py())
            if message not in seen and len(found.examples) < FAILURE_EXAMPLES:
                seen.add(message)
                found.examples.append((message, key, path))


def _compare(data: RunData) -> None:
    """Where the version's totals are not what the rows say; a healthy run has none."""
    totals = data.totals
    failed = sum(item.count for item in data.failures.values())
    pairs = [("rows", totals.rows, data.rows), ("failed", totals.failed, failed)]
    if data.version.stage == "decided":
        pairs += [(name, totals[name], data.decisions[name]) for name in DECISIONS]
        for rule in data.rules:
            said = totals.rules.get(rule.id, {})
            pairs += [(f"{rule.id} {band}", said.get(band, 0), rule.counts[band]) for band in BANDS]
    data.differences = [
        f"the version counts {said:,} {name}, the rows say {found:,}" for name, said, found in pairs if said != found
    ]


class _ShardPicker:
    """Chooses a few shards for the examples from their commits alone: those that cover what the rules did."""

    LIMIT = 6
    SPREAD = 3

    def __init__(self) -> None:
        self._best: dict[tuple[str, str], tuple[int, str]] = {}
        self._does: dict[str, set[tuple[str, str]]] = {}
        self._names: list[str] = []

    def see(self, commit: Commit) -> None:
        if commit.files.annotated is None:
            return
        name = commit.name
        self._names.append(name)
        found = {("decision", decision): commit.counts.get(decision, 0) for decision in DECISIONS}
        found |= {(rule, band): n for rule, bands in commit.rules.items() for band, n in bands.items()}
        done = {pair for pair, count in found.items() if count}
        for pair in done:
            if found[pair] > self._best.get(pair, (0, ""))[0]:
                before = self._best.get(pair)
                self._best[pair] = (found[pair], name)
                self._does[name] = done
                if before is not None and all(best != before[1] for _, best in self._best.values()):
                    self._does.pop(before[1], None)

    def choose(self) -> list[str]:
        """At most `LIMIT` commits, in order: a greedy cover first, then an even spread up to `SPREAD`."""
        left = set(self._best)
        chosen: list[str] = []
        while left and len(chosen) < self.LIMIT:
            name = max(sorted(self._does), key=lambda item: len(self._does[item] & left))
            if not self._does[name] & left:
                break
            chosen.append(name)
            left -= self._does[name]
        for position in range(self.SPREAD):
            if self._names and len(chosen) < self.SPREAD:
                name = self._names[position * (len(self._names) - 1) // max(self.SPREAD - 1, 1)]
                if name not in chosen:
                    chosen.append(name)
        return sorted(chosen, key=self._names.index)
