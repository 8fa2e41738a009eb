"""A shard's rows, however one of them resists being read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import fields

import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.errors import ClipfilterError, unexpected
from clipfilter.sources import Shard, Source

log = logging.getLogger("clipfilter.engine")


class PatientReader:
    """Batches of a shard's rows; where reading raises what nobody foresaw, the row alone that causes it is lost.

    stats: of the whole shard, complete once all is read. Raises what no row is to blame for: ShardError, and trouble with
    the system, which may pass.
    """

    def __init__(self, source: Source, shard: Shard) -> None:
        self._source, self._shard = source, shard
        self._reader = source.read(shard)
        self.stats = self._reader.stats

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        last = -1
        try:
            for batch in self._reader:
                last = batch.column(cf.ROW)[-1].as_py()
                yield batch
            return
        except (ClipfilterError, OSError, MemoryError):
            raise
        except Exception as error:
            log.warning("%s: reading raised what nobody foresaw", self._shard.path, exc_info=True)
            listing = self._source.read(self._shard, images=False)
            known = list(listing)
            if not known:
                raise error from None
        rows = pa.Table.from_batches(known)
        for field in fields(self.stats):
            setattr(self.stats, field.name, getattr(listing.stats, field.name))
        yield from self._apart(rows.filter(pa.compute.greater(rows[cf.ROW], last)))

    def _apart(self, rows: pa.Table) -> Iterator[pa.RecordBatch]:
        """These rows with their pictures. rows: without them."""
        done = 0
        try:
            for batch in self._source.read(self._shard, rows[cf.ROW].to_pylist()):
                done += batch.num_rows
                yield batch
            return
        except (ClipfilterError, OSError, MemoryError):
            raise
        except Exception as error:
            problem = unexpected(error)
        left = rows.slice(done)
        if left.num_rows == 1:
            for name, value in ((cf.ERROR_CLASS, problem.error_class), (cf.ERROR, problem.message)):
                place = left.schema.get_field_index(name)
                left = left.set_column(place, left.schema.field(place), pa.array([value], pa.string()))
            yield from left.to_batches()
            return
        middle = left.num_rows // 2
        yield from self._apart(left.slice(0, middle))
        yield from self._apart(left.slice(middle))
