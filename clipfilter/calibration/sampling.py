"""Draws the rows to label from a run: seeded, streamed, with the chance each row had."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.calibration.scores import ScoredRun, bands_in_use, direction_of
from clipfilter.decisions import DECISIONS, LIMITS
from clipfilter.errors import RefusedError
from clipfilter.policies import Policy, Rule
from clipfilter.text import spreadsheet

DesignName = Literal["uniform", "flagged", "uncertain", "per-band"]
SAMPLE_COLUMNS = (
    cf.UID, cf.KEY, "path", cf.SHARD, cf.ROW, "caption", "score", "band", "rule", "label",
    "sample_design", "inclusion_probability",
)  # fmt: skip
_READ = (cf.UID, cf.KEY, cf.SHARD, cf.ROW, cf.CAPTION)
_DESIGN = re.compile(
    r"(?P<name>uniform|flagged|uncertain|per-band)"
    r"(?: (?P<direction>above|below) (?P<cut>[-+.\deE]{1,30}))?(?: seed (?P<seed>\d{1,18}))?\Z"
)


@dataclass(frozen=True)
class Design:
    """How rows were drawn; its text is what the column `sample_design` holds, such as "flagged above 0.5 seed 0".

    uniform: every scored row alike. flagged: every row beyond a cut alike. uncertain: the rows nearest to a threshold.
    per-band: every row of a band alike, as many from each band. Only the first two earn a guarantee.
    """

    name: str
    direction: str | None = None
    cut: float | None = None
    seed: int | None = None

    def __str__(self) -> str:
        cut = f" {self.direction} {self.cut!r}" if self.cut is not None else ""
        return f"{self.name}{cut}" + (f" seed {self.seed}" if self.seed is not None else "")

    @classmethod
    def parse(cls, text: str | None) -> Design | None:
        """The design that a file names; None for any other text."""
        match = _DESIGN.match(text or "")
        if match is None:
            return None
        try:
            cut = float(match["cut"]) if match["cut"] else None
        except ValueError:
            return None
        if (cut is None) == (match["name"] in ("flagged", "uncertain")):
            return None
        return cls(match["name"], match["direction"], cut, int(match["seed"]) if match["seed"] else None)


def draw_number(seed: int, uid: str) -> int:
    """64 bits that decide about a row: rows are drawn in the order of this number, wherever and whenever it is asked."""
    digest = hashlib.blake2b(uid.encode("utf-8", "surrogatepass"), digest_size=8, key=f"sample {seed}".encode())
    return int.from_bytes(digest.digest(), "big")


@dataclass
class _Stratum:
    """The rows of one part of the run with the smallest numbers, and how many rows the part has."""

    want: int
    rows: int = 0
    held: list[tuple[np.ndarray, pa.Table]] = field(default_factory=list)
    waiting: int = 0
    limit: float = np.inf

    def offer(self, order: np.ndarray, rows: pa.Table) -> None:
        """order: float64 or uint64 [n], smallest first; rows: the same n rows."""
        self.rows += len(order)
        good = order <= self.limit
        if not good.any():
            return
        self.held.append((order[good], rows.filter(pa.array(good))))
        self.waiting += int(good.sum())
        if self.waiting > 4 * self.want + 1024:
            self.settle()

    def settle(self) -> tuple[np.ndarray, pa.Table] | None:
        """Keep the `want` smallest, in order; ties by uid, so that the result does not depend on the order of shards."""
        if not self.held:
            return None
        order = np.concatenate([order for order, _ in self.held])
        table = pa.concat_tables([rows for _, rows in self.held]).combine_chunks()
        ties = [np.array(table[name].to_pylist()) for name in (cf.ROW, cf.SHARD, cf.UID)]
        picked = np.lexsort((*ties, order))[: self.want]
        order, table = order[picked], table.take(pa.array(picked))
        self.held, self.waiting = [(order, table)], len(order)
        if len(order) == self.want:
            self.limit = order[-1]
        return order, table


@dataclass(frozen=True)
class Sample:
    """Rows to label (`COLUMNS`, in drawing order) and what they were drawn from."""

    rows: pa.Table
    design: Design
    rule: str
    population: int  # rows the draw was from
    unscored: int  # rows of the run without a score of the rule


def draw(
    run: ScoredRun, policy: Policy, rule: Rule, *, n: int, design: DesignName, cut: float | None, seed: int
) -> Sample:
    """n rows of a run to label, in memory that does not grow with the run.

    cut: the raw score beyond which rows count as flagged (flagged), or near which they are uncertain (uncertain); without
    it the rule's loosest threshold. A larger n with the same seed draws the same rows first, so labels keep their use.

    Raises RefusedError where there is nothing to draw from.
    """
    bands = bands_in_use(policy, rule, run.plan.model.get("weights_sha256"))
    cuts = [cut] if cut is not None else [bands[name].value for name in LIMITS if name in bands]
    _refuse_senseless(run, rule, n, design, cut, cuts)
    direction = direction_of(policy, rule) if cuts else "above"  # without a cut no direction is needed
    loosest = cuts[0] if cuts else None
    if design in ("flagged", "uncertain"):
        meant = Design(design, direction, loosest, seed if design == "flagged" else None)
    else:
        meant = Design(design, seed=seed)
    strata = {name: _Stratum(n) for name in (DECISIONS if design == "per-band" else ("all",))}
    unscored = 0
    for path, batch, scores in run.batches(rule.id, _READ):
        scored = ~np.isnan(scores)
        unscored += int((~scored).sum())
        place = _bands(scores, {name: band.value for name, band in bands.items()}, direction)
        table = pa.Table.from_batches([batch]).append_column("path", pa.array([path] * len(scores), pa.string()))
        table = table.append_column("score", pa.array(scores)).append_column("band", pa.array(place))
        if design == "uncertain":
            order = np.min([np.abs(scores - np.float32(value)) for value in cuts], axis=0).astype(np.float64)
        else:
            order = np.array([draw_number(seed, uid) for uid in batch.column(cf.UID).to_pylist()], np.uint64)
        if design == "flagged" and loosest is not None:
            scored &= past(scores, direction, loosest)
        for name, stratum in strata.items():
            chosen = scored & (place == name) if design == "per-band" else scored
            stratum.offer(order[chosen], table.filter(pa.array(chosen)))
    population = sum(stratum.rows for stratum in strata.values())
    if population == 0:
        beyond = f" {direction} {loosest:g}" if design == "flagged" else ""
        raise RefusedError(f"no row of {run.url} has a score of {rule.id!r}{beyond}; there is nothing to label.")
    rows = _drawn(strata, n, certain=design == "uncertain")
    return Sample(_finished(rows, rule.id, meant), meant, rule.id, population, unscored)


def _refuse_senseless(
    run: ScoredRun, rule: Rule, n: int, design: DesignName, cut: float | None, cuts: list[float]
) -> None:
    if n < 1:
        raise RefusedError(f"--n is a number of rows, 1 or more, not {n}.")
    if cut is not None and design not in ("flagged", "uncertain"):
        raise RefusedError(f"--cut belongs to the designs flagged and uncertain, not to {design}.")
    if design != "uniform" and not cuts:
        raise RefusedError(f"the rule {rule.id!r} has no threshold for {run.model}; give the raw score with --cut.")


def _drawn(strata: dict[str, _Stratum], n: int, *, certain: bool) -> pa.Table:
    """n rows out of all strata, in drawing order, with the chance that each had (1 where the draw was `certain`)."""
    parts = []
    for name, share in _allot({name: stratum.rows for name, stratum in strata.items()}, n).items():
        settled = strata[name].settle()
        if settled is not None and share:
            chance = 1.0 if certain else share / strata[name].rows
            part = settled[1].slice(0, share).append_column("order", pa.array(settled[0][:share]))
            parts.append(part.append_column("inclusion_probability", pa.array([chance] * part.num_rows, pa.float64())))
    rows = pa.concat_tables(parts)
    return rows.take(pa.array(np.argsort(np.asarray(rows["order"]), kind="stable")))


def past(scores: np.ndarray, direction: str, cut: float) -> np.ndarray:
    """Which scores lie strictly beyond a cut, compared in float32 as the engine does; bool [n]."""
    with np.errstate(invalid="ignore"):
        return np.asarray(scores > np.float32(cut) if direction == "above" else scores < np.float32(cut))


def _bands(scores: np.ndarray, thresholds: dict[str, float], direction: str) -> np.ndarray:
    place = np.full(len(scores), "keep", object)
    for name in LIMITS:
        if name in thresholds:
            place[past(scores, direction, thresholds[name])] = name
    return place


def _allot(sizes: dict[str, int], n: int) -> dict[str, int]:
    """n split evenly; what a small part cannot give goes to the others."""
    shares = dict.fromkeys(sizes, 0)
    left = min(n, sum(sizes.values()))
    while left:
        open_parts = [name for name in sizes if shares[name] < sizes[name]]
        each = max(1, left // len(open_parts))
        for name in open_parts:
            given = min(each, sizes[name] - shares[name], left)
            shares[name] += given
            left -= given
    return shares


def _finished(rows: pa.Table, rule: str, design: Design) -> pa.Table:
    n = rows.num_rows
    rows = rows.rename_columns(["caption" if name == cf.CAPTION else name for name in rows.column_names])
    for name, value in (("rule", rule), ("label", ""), ("sample_design", str(design))):
        rows = rows.append_column(name, pa.array([value] * n, pa.string()))
    return rows.select(list(SAMPLE_COLUMNS))


def write_sample(sample: Sample, path: str) -> None:
    """Write the rows to label as .csv, .jsonl or .parquet; never over an existing file, which may hold labels.

    Raises RefusedError.
    """
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in (".csv", ".jsonl", ".parquet"):
        raise RefusedError(f"--out {path} must be a .csv, .jsonl or .parquet file.")
    if target.exists():
        raise RefusedError(f"--out {path} exists, and may hold labels; name another file.")
    if not target.parent.is_dir():
        raise RefusedError(f"--out {path}: there is no folder {target.parent}.")
    if suffix == ".parquet":
        import pyarrow.parquet as pq

        pq.write_table(sample.rows, target)
    else:
        text = _csv_text(sample.rows) if suffix == ".csv" else _jsonl_text(sample.rows)
        target.write_text(text, encoding="utf-8", newline="")


def _jsonl_text(rows: pa.Table) -> str:
    import json

    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in _records(rows))


def _csv_text(rows: pa.Table) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, SAMPLE_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in _records(rows):
        writer.writerow(row | {name: spreadsheet(row[name]) for name in (cf.KEY, "path", "caption")})
    return text.getvalue()


def _records(rows: pa.Table) -> Sequence[dict[str, Any]]:
    records: list[dict[str, Any]] = rows.to_pylist()
    for row in records:
        row["score"] = float(f"{row['score']:.7g}")
    return records
