"""Search a run: by texts, images and rows, filtered by columns, through the index where there is a sound one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.errors import RefusedError
from clipfilter.runs import RunVectors
from clipfilter.search.approximate import ApproximateIndex
from clipfilter.search.exact import top_k
from clipfilter.search.index import EXACT_ROWS, IndexUnusableError, index_url
from clipfilter.search.query import MINUS_WEIGHT, query_vector
from clipfilter.search.where import parse_where

if TYPE_CHECKING:
    from clipfilter.models import Encoder

#: Annotated columns of a hit, unless others are asked for.
RESULT_COLUMNS = (cf.KEY, cf.UID, cf.CAPTION, cf.DECISION, cf.SHARD, cf.ROW)


@dataclass(frozen=True)
class SearchResult:
    """The nearest rows, best first.

    hits: `rank` int64 from 1, `cosine` float, then the annotated columns that were asked for. positions: int64 [n], for
    `RunVectors`. method: exact or approximate. rows: of the run; matching: how many satisfy the condition. notes: sentences
    about an index that could not be used, or only in part.
    """

    run: str
    version: str
    model: str
    method: str
    rows: int
    matching: int
    hits: pa.Table
    positions: np.ndarray = field(repr=False)
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready; columns without their `cf_`."""
        hits = [{name.removeprefix(cf.PREFIX): value for name, value in row.items()} for row in self.hits.to_pylist()]
        return {
            "run": self.run,
            "version": self.version,
            "model": self.model,
            "method": self.method,
            "rows": self.rows,
            "matching": self.matching,
            "notes": self.notes,
            "hits": hits,
        }


class Searcher:
    """A run opened for searching; model and index are loaded once, when first needed. Safe to use from several threads
    but for that first time."""

    def __init__(
        self,
        run: str,
        *,
        version: str | int | None = None,
        model: str | None = None,
        encoder: Encoder | None = None,
        index: str | None = None,
        exact: bool = False,
    ) -> None:
        """model: where the run's own model is, if it was a local one; or an `encoder` that is already loaded. index: where
        the approximate index is, by default beside the run. exact: use no index.

        Raises RefusedError when there is no finished run, or no index where one was named.
        """
        self.vectors = RunVectors.open(run, version)
        self.notes: list[str] = []
        self._model = model
        self._encoder = encoder
        self._checked = False
        self._index = None if exact else self._open_index(run, index)

    @property
    def encoder(self) -> Encoder:
        """The model of the run. Raises RefusedError when it cannot be had, or its weights are others now."""
        from clipfilter.engine import refuse_other_weights, stored_model
        from clipfilter.models import load_encoder

        if self._encoder is None:
            self._encoder = load_encoder(self._model or stored_model(self.vectors.plan))
        if not self._checked:
            refuse_other_weights(self.vectors.plan, self._encoder.fingerprint)
            self._checked = True
        return self._encoder

    def query(
        self,
        text: Sequence[str] = (),
        image: Sequence[str | bytes] = (),
        uid: Sequence[str] = (),
        minus: Sequence[str] = (),
        *,
        minus_weight: float = MINUS_WEIGHT,
    ) -> tuple[np.ndarray, list[int]]:
        """(float32 [dim], positions of the rows named by `uid`); see `query.query_vector`."""
        positions = [self._position(value) for value in uid]
        found = query_vector(
            self.encoder if text or image or minus else None,
            text,
            image,
            minus,
            vectors=self.vectors.vectors_at(positions) if positions else None,
            minus_weight=minus_weight,
            decode=self.vectors.plan.options.get("decode", "fast"),
            color=self.vectors.plan.options.get("color", "ignore"),
        )
        return found, positions

    def search(
        self,
        text: Sequence[str] = (),
        image: Sequence[str | bytes] = (),
        uid: Sequence[str] = (),
        minus: Sequence[str] = (),
        *,
        k: int = 10,
        where: str | None = None,
        columns: Sequence[str] = RESULT_COLUMNS,
        minus_weight: float = MINUS_WEIGHT,
    ) -> SearchResult:
        """The k rows nearest to the sum of the texts, images and rows, less the `minus` texts; rows given by uid are not
        among them.

        where: a condition on annotated columns (see `where.parse_where`). Raises RefusedError for a condition that cannot
        be read, an unknown column or uid, an image that cannot be read, or nothing to search for.
        """
        condition = None if where is None else parse_where(where, self.vectors.schema)
        self.vectors.check_columns(columns)
        query, own = self.query(text, image, uid, minus, minus_weight=minus_weight)
        mask = None if condition is None else self.vectors.mask(condition)
        matching = self.vectors.rows if mask is None else int(np.count_nonzero(mask))
        wanted = min(k + len(own), self.vectors.rows)
        if self._index is not None:
            positions, cosines = self._index.top_k(query, wanted, mask)
        else:
            positions, cosines = top_k(self.vectors, query, wanted, mask)
        others = np.flatnonzero(~np.isin(positions, own))[:k]
        positions, cosines = positions[others], cosines[others]
        rows = self.vectors.rows_at(positions, columns)
        hits = pa.table(
            {
                "rank": pa.array(np.arange(1, len(positions) + 1)),
                "cosine": pa.array(cosines),
                **{name: rows[name] for name in rows.column_names},
            }
        )
        return SearchResult(
            run=self.vectors.url,
            version=self.vectors.version,
            model=str(self.vectors.plan.model["model"]),
            method="exact" if self._index is None else "approximate",
            rows=self.vectors.rows,
            matching=matching,
            hits=hits,
            positions=positions,
            notes=list(self.notes),
        )

    def close(self) -> None:
        self.vectors.close()

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _position(self, uid: str) -> int:
        found = self.vectors.uid_position(uid)
        if found is None:
            raise RefusedError(
                f"{self.vectors.url} has no row whose cf_uid is {uid!r}; search results and annotated/ list them."
            )
        return found

    def _open_index(self, run: str, url: str | None) -> ApproximateIndex | None:
        """The index, or None with a note that says why there is none to use."""
        where = index_url(self.vectors.url, url)
        try:
            index = ApproximateIndex.open(self.vectors, where)
        except (IndexUnusableError, RefusedError) as error:
            self.notes.append(f"searched without the index: {error}")
            return None
        if index is None:
            if url is not None:
                raise RefusedError(f"there is no index in {url}; `clipfilter index {run} --index {url}` makes it.")
            if self.vectors.rows >= EXACT_ROWS:
                self.notes.append(
                    f"{self.vectors.rows:,} rows were searched one by one; `clipfilter index {run}` makes it fast."
                )
            return None
        missing = int(np.count_nonzero(~index.covered))
        if missing:
            rows = self.vectors.rows - index.rows
            self.notes.append(
                f"{rows:,} rows ({missing:,} of {len(index.covered):,} shards) are newer than the index and were searched one "
                f"by one; `clipfilter index {run}` takes them up."
            )
        return index


def search_run(run: str, text: str | Sequence[str] = (), **options: Any) -> SearchResult:
    """Open a run, search it once and close it: the options of `Searcher` and of `Searcher.search`."""
    opening = {name: options.pop(name) for name in ("version", "model", "encoder", "index", "exact") if name in options}
    with Searcher(run, **opening) as searcher:
        return searcher.search([text] if isinstance(text, str) else text, **options)
