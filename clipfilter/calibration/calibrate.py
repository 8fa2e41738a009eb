"""Chooses a rule's thresholds from labels and a run's stored scores, and says what they will do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter.calibration import guarantees as g
from clipfilter.calibration import probability as prob
from clipfilter.calibration.labels import Label
from clipfilter.calibration.sampling import Design, draw_number, past
from clipfilter.calibration.scores import (
    ScoredRun,
    bands_in_use,
    direction_of,
    find_rule,
    prompts_sha256,
    refuse_other_scores,
)
from clipfilter.decisions import DECISIONS
from clipfilter.errors import RefusedError
from clipfilter.policies import Band, Policy, Rule, json_sha256

BANDS = tuple(reversed(DECISIONS))
_TARGET = re.compile(r"(precision|miss-rate|review-budget)\s*(>=|<=|=)\s*([0-9.eE+-]{1,20})\Z")
_SIGN = {"precision": ">=", "miss-rate": "<=", "review-budget": "<="}
_HOME = {"precision": "reject", "miss-rate": "review", "review-budget": "review"}


@dataclass(frozen=True)
class Target:
    """What a threshold must reach: a precision, a miss rate, or a share of rows in review. str() as in `target:`."""

    kind: str
    value: float
    band: str

    def __str__(self) -> str:
        return f"{self.kind}{_SIGN[self.kind]}{self.value:g}"

    @classmethod
    def parse(cls, text: str, band: str | None = None) -> Target:
        """`precision=0.95`, `miss-rate=0.05`, `review-budget=0.02`. Raises RefusedError."""
        match = _TARGET.match(text.strip())
        try:
            value = float(match[3]) if match else -1.0
        except ValueError:
            value = -1.0
        if match is None or match[2] not in ("=", _SIGN[match[1]]) or not 0 < value < 1:
            raise RefusedError(
                f"{text[:60]!r} is no target; write precision=0.95, miss-rate=0.05 or review-budget=0.02 (a share between "
                "0 and 1)."
            )
        if match[1] == "review-budget" and band == "reject":
            raise RefusedError("a review-budget sizes the review band; leave out --band reject.")
        return cls(match[1], value, band or _HOME[match[1]])


@dataclass(frozen=True)
class Threshold:
    """One calibrated threshold with its evidence; the counts are those of `schema.CalibratedBand`."""

    band: str
    direction: str
    value: float
    target: str
    n: int
    m: int
    k: int | None
    confidence: float | None
    bound: float | None
    design: str
    guarantee: bool

    def entry(self, date: str) -> dict[str, Any]:
        """As it is written under `calibrations`."""
        found = {
            self.direction: self.value, "n": self.n, "m": self.m, "k": self.k, "target": self.target,
            "confidence": self.confidence, "bound": None if self.bound is None else float(f"{self.bound:.6g}"),
            "design": self.design, "guarantee": self.guarantee, "date": date,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Expected:
    """What one band will hold. rows: of the run; share: of all rows, at the stated prevalence if there is one.

    precision: share of true rows in the band, with a two-sided interval; recall: share of all true rows that are in the
    band. None where the labels cannot say.
    """

    band: str
    rows: int
    share: float | None
    precision: float | None
    low: float | None
    high: float | None
    recall: float | None


@dataclass(frozen=True)
class Calibrated:
    """Everything one calibration found. `notes` are sentences for the user.

    scores, true, weights: of the judged rows, raw scores float32 [n]; in_use: thresholds that decide, by band.
    """

    policy: str
    rule: str
    model: str
    weights_sha256: str
    prompts_sha256: str
    preprocess_sha256: str
    decode: str
    direction: str
    design: str
    labels: int
    positives: int
    prevalence: float | None
    stated_prevalence: float | None
    rows: int
    unscored: int
    confidence: float
    thresholds: list[Threshold]
    in_use: dict[str, float]
    expected: list[Expected]
    fitted: prob.Fitted | None
    notes: list[str]
    scores: np.ndarray = field(repr=False)
    true: np.ndarray = field(repr=False)
    weights: np.ndarray | None = field(repr=False)


@dataclass(frozen=True)
class _Judged:
    """The labels as arrays [n], and what they are worth. `flags`: scores turned so that higher is more suspect.

    holes: rows drawn before some judged row and left without a label, `flags` of them. doubts: why no guarantee holds.
    population: flagging scores, ascending, of the rows the labels were drawn from.
    """

    flags: np.ndarray
    true: np.ndarray
    weights: np.ndarray | None
    holes: np.ndarray
    design: str
    doubts: list[str]
    population: np.ndarray
    cut: float | None  # flagging score beyond which the labels lie

    @property
    def uniform(self) -> bool:
        """Whether the labels can speak for all rows, flagged or not."""
        return self.cut is None

    @property
    def both(self) -> bool:
        """Whether there are labels of both kinds."""
        return bool(self.true.any() and not self.true.all())


def calibrate(
    policy: Policy,
    run: ScoredRun,
    labels: Sequence[Label],
    targets: Sequence[Target],
    *,
    rule: str | None = None,
    confidence: float = 0.9,
    prevalence: float | None = None,
) -> Calibrated:
    """Thresholds for one rule of a policy from labels on a run; nothing is written.

    Holds 4 bytes per row of the run. Raises RefusedError where the run's scores are not the policy's, the labels are too
    few or of one kind, or no threshold reaches a target.
    """
    _refuse_senseless(targets, confidence, prevalence)
    own, chosen = _choose_rule(policy, labels, rule)
    refuse_other_scores(run, policy, own)
    direction = direction_of(policy, own)
    written = bands_in_use(policy, own, run.plan.model.get("weights_sha256"))
    _refuse_new_bands(own, targets, written)
    sign = 1.0 if direction == "above" else -1.0
    ascending, flags, unscored = _collect(run, own.id, chosen, sign)
    judged = _judge(chosen, flags, ascending, direction, sign)
    _refuse_useless(judged)
    shifted = _shift(judged, prevalence, confidence)
    flagging = {name: sign * band.value for name, band in written.items()}
    chooser = _Chooser(judged, ascending, run.rows, sign, confidence, _limits(own), shifted is None, flagging)
    chooser.choose(targets)
    return Calibrated(
        **_bound_to(policy, run),
        rule=own.id,
        direction=direction,
        design=judged.design,
        labels=len(judged.true),
        positives=int(judged.true.sum()),
        prevalence=float(np.average(judged.true, weights=judged.weights)) if judged.uniform else None,
        stated_prevalence=prevalence,
        rows=run.rows,
        unscored=unscored,
        confidence=confidence,
        thresholds=[chooser.found[name] for name in BANDS if name in chooser.found],
        in_use={name: sign * chooser.flagging[name] for name in BANDS if name in chooser.flagging},
        expected=_expect(judged, ascending, chooser.flagging, prevalence if judged.uniform else None, confidence),
        fitted=prob.fit(sign * judged.flags, judged.true, judged.weights, falling=sign < 0) if judged.both else None,
        notes=chooser.notes + _notes(judged, targets, shifted, unscored),
        scores=(sign * judged.flags).astype(np.float32),
        true=judged.true,
        weights=judged.weights,
    )


def _bound_to(policy: Policy, run: ScoredRun) -> dict[str, str]:
    """What the thresholds hold for, as `Calibrated` has it: these prompts with this model on images decoded this way."""
    return {
        "policy": policy.name,
        "model": run.model,
        "weights_sha256": str(run.plan.model.get("weights_sha256")),
        "prompts_sha256": prompts_sha256(policy),
        "preprocess_sha256": json_sha256(run.plan.model.get("preprocess")),
        "decode": run.decode,
    }


def _refuse_senseless(targets: Sequence[Target], confidence: float, prevalence: float | None) -> None:
    if not 0.5 <= confidence < 1:
        raise RefusedError(f"--confidence is at least 0.5 and below 1, not {confidence:g}.")
    if prevalence is not None and not 0 < prevalence < 1:
        raise RefusedError(f"--prevalence is a share of true rows between 0 and 1, not {prevalence:g}.")
    if not targets or len({target.band for target in targets}) < len(targets):
        raise RefusedError("give one target for each band: one for reject (precision), one for review, or both.")


def _refuse_new_bands(rule: Rule, targets: Sequence[Target], written: dict[str, Band]) -> None:
    """Refuse targets of bands that the rule does not have."""
    for target in targets:
        if target.band not in written:
            has = " and ".join(written) or "no band for this model"
            other = (
                f", or --band {next(iter(written))} for the band it has"
                if target.kind != "review-budget" and written
                else ""
            )
            raise RefusedError(
                f"the rule {rule.id!r} has {has}, so {target} would give it a {target.band} band that it never had; write one "
                f"into the policy first{other}."
            )


def _notes(judged: _Judged, targets: Sequence[Target], shifted: str | None, unscored: int) -> list[str]:
    """What a reader must know before trusting the thresholds."""
    notes = [f"estimate, no guarantee: {doubt}" for doubt in judged.doubts]
    if shifted is not None:
        notes.append(shifted)
    if len(judged.holes) and any(target.kind == "precision" for target in targets):
        notes.append(f"{len(judged.holes)} rows without a label among the judged ones count as not true for precision")
    if unscored:
        notes.append(f"{unscored:,} rows of the run have no score of this rule; on_missing decides them")
    if not judged.both:
        notes.append("all labels are positive: no recall and no probability can be told from them")
    return notes


@dataclass
class _Chooser:
    """Chooses the thresholds of one rule, one target after the other; flagging scores throughout.

    ascending: those of all scored rows. rows: of the run. limits: what raw thresholds must lie between. undoubted: whether
    nothing outside the labels speaks against a guarantee. flagging: thresholds that decide, by band; found: those chosen.
    """

    judged: _Judged
    ascending: np.ndarray
    rows: int
    sign: float
    confidence: float
    limits: tuple[float, float]
    undoubted: bool
    flagging: dict[str, float]
    found: dict[str, Threshold] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def choose(self, targets: Sequence[Target]) -> None:
        """Raises RefusedError where no threshold reaches a target, or none would leave a review band."""
        for target in sorted(targets, key=lambda target: (target.band == "review", target.kind)):
            self._choose(target)
        review, reject = self.flagging.get("review"), self.flagging.get("reject")
        if review is not None and reject is not None and not _looser(review, reject):
            raise RefusedError(
                f"the reject threshold {self._direction} {self.sign * reject:g} would swallow the review band at "
                f"{self.sign * review:g}; calibrate review in the same command, with a second --target such as "
                "review-budget=0.02 or miss-rate=0.05."
            )

    def _choose(self, target: Target) -> None:
        value, evidence = self._reach(target)
        reject = self.flagging.get("reject")
        if target.band == "review" and reject is not None and not _looser(value, reject):
            if "reject" not in self.found:
                raise RefusedError(
                    f"every row that {target} asks for lies beyond the reject threshold {self.sign * reject:g} already; "
                    "calibrate it too, with a second --target such as precision=0.95."
                )
            value = reject - max(4e-6 * abs(reject), 1e-9)
            self.notes.append(f"{target} holds at the reject threshold already, so the review band is as good as empty")
        self.flagging[target.band] = value
        self.found[target.band] = Threshold(
            band=target.band, direction=self._direction, value=self.sign * value, target=str(target), **evidence
        )

    @property
    def _direction(self) -> str:
        return "above" if self.sign > 0 else "below"

    def _reach(self, target: Target) -> tuple[float, dict[str, Any]]:
        """(threshold, evidence) for one target."""
        if target.kind == "miss-rate":
            return _miss_rate(self.judged, self.ascending, target, self.confidence)
        if target.kind == "review-budget":
            return _budget(self.ascending, self.rows, self.flagging.get("reject"), target)
        low, high = self.limits if self.sign > 0 else (-self.limits[1], -self.limits[0])
        value, evidence = _precision(self.judged, target, self.confidence, (low, high))
        return value, evidence | {"guarantee": evidence["guarantee"] and self.undoubted}


def _choose_rule(policy: Policy, labels: Sequence[Label], name: str | None) -> tuple[Rule, list[Label]]:
    """The rule, and the labels that are about it."""
    named = sorted({label.rule for label in labels if label.rule is not None})
    if name is None and len(named) > 1:
        raise RefusedError(f"the labels are about several rules ({', '.join(named[:8])}); say which with --rule.")
    rule = find_rule(policy, name or (named[0] if named else None))
    own = [label for label in labels if label.rule in (None, rule.id)]
    if not own:
        raise RefusedError(f"no label is about the rule {rule.id!r} (they are about {', '.join(named[:8])}).")
    return rule, own


def _limits(rule: Rule) -> tuple[float, float]:
    """What thresholds must lie strictly between: 0 and 1 for probabilities, which the schema refuses beyond."""
    return (0.0, 1.0) if rule.measure.has_probability else (-np.inf, np.inf)


def _collect(run: ScoredRun, rule: str, labels: Sequence[Label], sign: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Flagging scores of all scored rows, ascending; those of the labels [len(labels)], NaN where there is none; and
    the number of rows without a score."""
    if all(label.uid is not None for label in labels):
        column, names = cf.UID, [label.uid for label in labels]
    elif all(label.key is not None for label in labels):
        column, names = cf.KEY, [label.key for label in labels]
    else:
        raise RefusedError("some labels have only cf_uid, others only cf_key; give the same one for all.")
    position: dict[str | None, int] = {}
    for name in names:
        position.setdefault(name, len(position))
    wanted = pa.array(list(position), pa.string())
    scores = np.empty(run.rows, np.float32)
    values = np.full(len(position), np.nan, np.float32)
    times = np.zeros(len(position), np.int64)
    at = 0
    for _, batch, part in run.batches(rule, (column,)):
        scores[at : at + len(part)] = part
        at += len(part)
        index = pc.index_in(batch.column(column), value_set=wanted)
        rows = np.flatnonzero(np.asarray(index.is_valid()))
        for row, label in zip(rows.tolist(), index.drop_null().to_pylist(), strict=True):
            if times[label] == 0:
                values[label] = part[row]
            times[label] += 1
    if column == cf.KEY and (times > 1).any():
        key = list(position)[int(np.argmax(times > 1))]
        raise RefusedError(f"the key {key!r} is in the run {times.max()} times, so labels must name images by cf_uid.")
    scored = scores[:at]
    scored = scored[~np.isnan(scored)]
    turned = scored if sign > 0 else -scored
    turned.sort()
    return turned, sign * values[[position[name] for name in names]], at - len(scored)


def _judge(labels: Sequence[Label], flags: np.ndarray, ascending: np.ndarray, direction: str, sign: float) -> _Judged:
    """What the labels are worth: their design checked against the run, rows left out, weights."""
    texts = {label.design for label in labels}
    design = Design.parse(next(iter(texts))) if len(texts) == 1 else None
    doubts = _doubts_of_design(texts, design)
    population, cut = ascending, None
    if design is not None and design.name == "flagged" and design.cut is not None:
        cut = sign * design.cut
        population = ascending[past(ascending, "above", cut)]
        if design.direction != direction or not past(flags[~np.isnan(flags)], "above", cut).all():
            doubts.append(f"not every labelled row has a score {design}, as the design says")
    kept = _without_repeats(labels)
    absent = int(np.isnan(flags[kept]).sum())
    if absent:
        doubts.append(f"{absent} of the labelled rows have no score in this run")
    kept = kept[~np.isnan(flags[kept])]
    known = np.array([label.probability for label in labels if label.probability is not None])
    if not doubts:
        doubts += _doubts_of_chances(known, len(labels), len(population))
    truth = np.array([labels[position].true is True for position in kept], bool)
    empty = np.array([labels[position].true is None for position in kept], bool)
    numbers = np.array(
        [draw_number(design.seed or 0, str(labels[p].uid)) if design and labels[p].uid else 0 for p in kept], np.uint64
    )
    # Labelled up to some row of the drawing order: the rest was not drawn, as it were. Anything else is a hole.
    last = numbers[~empty].max() if (~empty).any() else np.uint64(0)
    holes = empty & (numbers <= last)
    weights = None
    if len(known) == len(labels) and np.ptp(known) > 1e-9:
        weights = 1.0 / np.array([labels[position].probability for position in kept[~empty]], np.float64)
    return _Judged(
        flags=flags[kept][~empty],
        true=truth[~empty],
        weights=weights,
        holes=flags[kept][holes],
        design=str(design) if design is not None else "mixed" if len(texts) > 1 else "unknown",
        doubts=doubts,
        population=population,
        cut=cut,
    )


def _doubts_of_design(texts: set[str | None], design: Design | None) -> list[str]:
    """Why the way in which the labels were drawn earns no guarantee. texts: what they say of it."""
    if len(texts) > 1:
        return ["the labels were drawn in several ways"]
    if texts == {None}:
        return ["the labels do not say how they were drawn (column sample_design)"]
    if design is None:
        return ["the column sample_design names no design of `clipfilter policy sample`"]
    if design.name not in ("uniform", "flagged"):
        return [f"the labels were drawn by the design {design.name}, not uniformly"]
    return []


def _without_repeats(labels: Sequence[Label]) -> np.ndarray:
    """Positions, ascending. The same image twice (duplicate uids are legal) is one label; a judged one counts before an
    empty one."""
    merged: dict[str | None, int] = {}
    for position, label in enumerate(labels):
        name = label.uid or label.key
        if name not in merged or labels[merged[name]].true is None:
            merged[name] = position
    return np.array(sorted(merged.values()), np.intp)


def _doubts_of_chances(known: np.ndarray, labels: int, population: int) -> list[str]:
    """Why the labels cannot be all that were drawn. known: the inclusion probabilities that there are."""
    if len(known) < labels:
        return ["some labels have no inclusion_probability"]
    drawn = known[0] * population
    if np.ptp(known) > 1e-9 or abs(drawn - labels) > 0.5:
        return [f"the file has {labels} rows, but by their inclusion_probability {drawn:.0f} were drawn from this run"]
    return []


def _refuse_useless(judged: _Judged) -> None:
    if not len(judged.true):
        raise RefusedError("no row of the labels file has a label and a score in this run; fill in the column 'label'.")
    if not judged.true.any():
        raise RefusedError(
            f"all {len(judged.true)} labels are negative; a threshold needs positives: sample with --design flagged, "
            "or correct the rule's phrases."
        )


def _shift(judged: _Judged, stated: float | None, confidence: float) -> str | None:
    """A sentence where the stated prevalence is not that of the labels, else None."""
    if stated is None:
        return None
    if judged.cut is not None:
        return "estimate, no guarantee: labels of flagged rows alone cannot be carried over to a stated prevalence"
    m, k = g.flagged_counts(judged.flags, judged.true, judged.weights, np.array([-np.inf]))
    low, high = _interval(float(k[0]), float(m[0]), confidence)
    if low <= stated <= high:
        return None
    return (
        f"estimate, no guarantee: the stated prevalence {stated:g} is not that of the labels ({low:.3g} to {high:.3g}); "
        "what holds for the run need not hold there"
    )


def _precision(
    judged: _Judged, target: Target, confidence: float, limits: tuple[float, float]
) -> tuple[float, dict[str, Any]]:
    flags = np.concatenate([judged.flags, judged.holes])
    true = np.concatenate([judged.true, np.zeros(len(judged.holes), bool)])
    weights = judged.weights
    if weights is not None:
        weights = np.concatenate([weights, np.full(len(judged.holes), weights.mean())])
    labels = len(flags) if weights is None else int(weights.sum() ** 2 / np.sum(weights**2))
    grid = g.candidates(judged.population, labels, target.value, confidence, limits)
    walk = g.precision_walk(grid, flags, true, weights, target.value, confidence)
    if walk.accepted is None:
        best = int(np.argmax(walk.bounds)) if len(walk.bounds) else None
        seen = (
            f" (at best {walk.k[best]:.0f} of {walk.m[best]:.0f} flagged labels are true, which shows {walk.bounds[best]:.3g})"
            if best is not None and walk.m[best] > 0
            else ""
        )
        raise RefusedError(
            f"no threshold shows precision {target.value:g} at confidence {confidence:g} with these {labels} labels{seen}; "
            "label more rows (--design flagged finds most), lower the target, or improve the rule's phrases."
        )
    at = walk.accepted
    beyond = past(flags, "above", float(grid.thresholds[at]))
    evidence = {
        "n": len(flags),
        "m": int(beyond.sum()),
        "k": int((beyond & true).sum()),
        "confidence": confidence,
        "bound": float(walk.bounds[at]),
        "design": judged.design,
        "guarantee": not judged.doubts,
    }
    return float(grid.thresholds[at]), evidence


def _miss_rate(
    judged: _Judged, ascending: np.ndarray, target: Target, confidence: float
) -> tuple[float, dict[str, Any]]:
    positives = judged.flags[judged.true]
    weights = None if judged.weights is None else judged.weights[judged.true]
    value = g.miss_threshold(ascending, positives, weights, target.value)
    missed = int((~past(positives, "above", value)).sum())
    evidence = {
        "n": len(judged.true),
        "m": len(positives),
        "k": missed,
        "confidence": confidence,
        "bound": float(g.upper_bound(missed, len(positives), confidence)),
        "design": judged.design,
        # Positives that were never candidates for a label (not flagged) or got none could be the ones missed.
        "guarantee": not judged.doubts and judged.cut is None and not len(judged.holes),
    }
    return value, evidence


def _budget(ascending: np.ndarray, rows: int, reject: float | None, target: Target) -> tuple[float, dict[str, Any]]:
    rejected = 0 if reject is None else int(g.beyond(ascending, reject))
    most = int(target.value * rows)
    value = g.threshold_for(ascending, rejected + most)
    reviewed = 0 if value is None else int(g.beyond(ascending, value)) - rejected
    if value is None or reviewed < 1:
        raise RefusedError(
            f"{target} of {rows:,} rows is {most:,}, less than the next rows of equal score; allow a larger budget."
        )
    evidence = {
        "n": rows, "m": reviewed, "k": None, "confidence": None, "bound": reviewed / rows, "design": "all rows",
        "guarantee": True,
    }  # fmt: skip
    return value, evidence


def _looser(review: float, reject: float) -> bool:
    """Whether a review threshold leaves a band below the reject threshold (flagging scores), as the schema asks."""
    return review < reject and reject - review > 2e-6 * max(abs(review), abs(reject))


def _interval(k: float, m: float, confidence: float) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval of k of m."""
    level = (1 + confidence) / 2
    return float(g.lower_bound(k, m, level)), float(g.upper_bound(k, m, level)) if m > 0 else 1.0


def _expect(
    judged: _Judged, ascending: np.ndarray, flagging: dict[str, float], prevalence: float | None, confidence: float
) -> list[Expected]:
    """What each band will hold: rows of the run exactly, shares of true rows from the labels."""
    edges = [("reject", flagging.get("reject", np.inf), np.inf)]
    top = edges[0][1]
    edges.append(("review", flagging.get("review", top), top))
    edges.append(("keep", -np.inf, edges[1][1]))
    own = np.ones(len(judged.true)) if judged.weights is None else judged.weights
    positive, negative = float(own[judged.true].sum()), float(own[~judged.true].sum())
    found = []
    for name, low, high in edges:
        if name != "keep" and name not in flagging:
            continue
        rows = int(g.beyond(ascending, low) - g.beyond(ascending, high))
        inside = past(judged.flags, "above", low) & ~past(judged.flags, "above", high)
        weights = own[inside]
        share: float = rows / max(1, len(ascending))
        precision = recall = None
        interval: tuple[float | None, float | None] = (None, None)
        covered = judged.cut is None or low >= judged.cut
        if covered and len(weights):
            m = float(weights.sum() ** 2 / np.sum(weights**2))
            precision = float(np.average(judged.true[inside], weights=weights))
            interval = _interval(m * precision, m, confidence)
        if judged.cut is None and negative > 0:
            recall = float(own[inside & judged.true].sum()) / positive
            if prevalence is not None:
                wrong = float(own[inside & ~judged.true].sum()) / negative
                share = prevalence * recall + (1 - prevalence) * wrong
                precision = prevalence * recall / share if share > 0 else None
                interval = (None, None)
        found.append(Expected(name, rows, share, precision, *interval, recall))
    return found
