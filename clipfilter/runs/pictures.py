"""The pictures behind a run's rows, read again from the dataset; those that changed since they were decided are no more."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from clipfilter import columns as cf
from clipfilter.sources import Shard, Source


class Pictures:
    """Reads pictures of rows from the dataset of a run, shard by shard; wherever a picture is shown, it comes from here.

    dataset: `Plan.dataset`, which is the same for a run and for every run that scored, decided or added columns to it.
    """

    def __init__(self, dataset: dict[str, Any]) -> None:
        """Raises whatever the libraries between us and the dataset raise where it is no longer there."""
        self._source = Source.from_plan(dataset)

    def read(self, shard: Shard, rows: Mapping[int, str | None]) -> Iterator[tuple[int, bytes]]:
        """(row, encoded picture) of these rows of a shard, in its order.

        rows: the sha256 of each row's picture when it was decided, None where nobody recorded it. Rows without a picture,
        or with another one now, are left out. Raises whatever reading the dataset raises.
        """
        for batch in self._source.read(shard, rows=sorted(rows)):
            for row, image in zip(batch.column(cf.ROW).to_pylist(), batch.column(cf.IMAGE), strict=True):
                if row in rows and image.is_valid:
                    data: bytes = image.as_py()
                    if rows[row] in (None, hashlib.sha256(data).hexdigest()):
                        yield row, data
