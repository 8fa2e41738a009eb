"""One run as the page looks at it: its columns, its rules, its model and what a person has labelled."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter.engine import refuse_other_weights, stored_model
from clipfilter.operations import escalated_rows
from clipfilter.report import RuleData, rules_of
from clipfilter.runs import Run, RunVectors, annotate, of_run
from clipfilter.serve.columns import RunColumns
from clipfilter.serve.effect import Changes, Effects
from clipfilter.serve.export import changed_policy

if TYPE_CHECKING:
    from clipfilter.models import Encoder


class ServedRun:
    """A finished run, opened at its newest version. Safe to use from several threads; memory as `RunColumns` says.

    model: where the run's own model is, if it was a local one.
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        """Raises RefusedError where there is no finished run, or none with rows."""
        self.vectors = RunVectors.open(url)
        self.run = self.vectors.run
        self.url = self.run.url
        self.plan = self.run.plan
        self.rules: list[RuleData] = rules_of(self.plan, self.run.version)
        self.columns = RunColumns(self.vectors, self.rules)
        self._hide_escalated_before()
        self.effects = Effects(self.columns, self.rules, self._rescore)
        self._model = model
        self._encoder: Encoder | None = None
        # Torch keeps a pool of threads per calling thread, so one thread does all encoding.
        self._torch = ThreadPoolExecutor(1, thread_name_prefix="encoder")
        self._places: dict[str, int] = {}
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Begin to load the model, so that the first search need not wait; whatever is wrong, that search says."""
        self._torch.submit(self._load)

    def on_encoder(self, work: Any) -> Any:
        """`work(encoder)`, on the thread that owns the model. Raises RefusedError where the model cannot be had."""
        return self._torch.submit(lambda: work(self._load())).result()

    def positions_of(self, uids: list[str]) -> list[int | None]:
        """Where the rows with these uids are; None for those the run does not hold. Reads the uids shard by shard."""
        with self._lock:
            wanted = [uid for uid in uids if uid not in self._places]
            if wanted:
                values = pa.array(wanted, pa.string())
                for shard in self.vectors.shards:
                    column = self.run.table(shard.annotated, [cf.UID])[cf.UID]
                    index = pc.index_in(column, value_set=values)
                    rows = np.flatnonzero(np.asarray(index.is_valid()))
                    for row, number in zip(rows.tolist(), index.drop_null().to_pylist(), strict=True):
                        self._places.setdefault(wanted[number], shard.start + row)
            return [self._places.get(uid) for uid in uids]

    def close(self) -> None:
        self._torch.shutdown(wait=True, cancel_futures=True)
        self.vectors.close()

    def _hide_escalated_before(self) -> None:
        """What an earlier decision of these rows escalated is not shown because a later one no longer says so."""
        run = self.run
        while of_run(run.plan.source):
            run = Run(run.plan.source["run"])
            hidden = escalated_rows(run.url)
            for shard in self.vectors.shards:
                rows = [row for name, row in hidden if name == shard.shard.id]
                if rows:
                    part = range(shard.start, shard.start + shard.rows)
                    numbers = self.vectors.rows_at(part, [cf.ROW])[cf.ROW].to_numpy()
                    self.columns.escalated[shard.start : shard.start + shard.rows] |= np.isin(numbers, rows)

    def _load(self) -> Encoder:
        if self._encoder is None:
            from clipfilter.models import load_encoder

            encoder = load_encoder(self._model or stored_model(self.plan))
            refuse_other_weights(self.plan, encoder.fingerprint)
            self._encoder = encoder
        assert self._encoder is not None
        return self._encoder

    def _rescore(self, changes: Changes, rule: str, rows: np.ndarray) -> np.ndarray:
        """Scores of one rule under moved thresholds, float32 [n], by the engine's own code."""
        return np.asarray(self.on_encoder(lambda encoder: self._scores(encoder, changes, rule, rows)), np.float32)

    def _scores(self, encoder: Encoder, changes: Changes, rule: str, rows: np.ndarray) -> np.ndarray:
        from clipfilter.policies import Attachments, compile_policy

        policy = changed_policy(self.plan, changes)
        decode = "exact" if self.plan.options["decode"] == "exact" else "fast"
        compiled = compile_policy(policy, encoder, decode=decode, files=Attachments(self.run.directory))
        numbers, inside = self.vectors.locate(rows)
        found = np.empty(len(rows), np.float32)
        for number in np.unique(numbers):
            mine = np.flatnonzero(numbers == number)
            stored, embeddings = self.vectors.stored(int(number))
            some = pa.array(inside[mine])
            scored = annotate(stored.take(some), embeddings.take(some), encoder, compiled, None)[cf.score(rule)]
            found[mine] = scored.to_numpy().astype(np.float32)
        return found
