"""The source of a run that was imported from embeddings: it has columns and no images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa

from clipfilter.errors import RefusedError
from clipfilter.sources.discover import Location
from clipfilter.sources.model import ReadStats, Shard, SourceOptions
from clipfilter.sources.seen import Seen

IMPORTED_KIND = "import"


class Imported:
    """What `Source` asks of a format, with the answer that there are no images."""

    def __init__(self, location: Location, options: SourceOptions, columns: pa.Schema, plan: dict[str, Any]) -> None:
        self.location, self.options, self.columns, self.plan = location, options, columns, plan

    def iter_shards(self, listing: Seen) -> Iterator[Shard]:
        self._refuse()

    def read(
        self, shard: Shard, rows: Sequence[int] | None, images: bool, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]:
        self._refuse()

    def copy_rows(self, shard: Shard, rows: Sequence[int], target: Path) -> int:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RefusedError(
            f"the run was imported from the embeddings in {self.location.root} and has no images; export it with "
            "--as datacomp or --as clip-retrieval."
        )
