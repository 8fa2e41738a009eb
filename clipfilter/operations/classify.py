"""Classify any images by labels in words, shard by shard: a table of every image's best labels, failed ones included."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.engine import Input, StreamOptions, embed_stream
from clipfilter.policies import LABEL_COLUMNS, LabelScorer
from clipfilter.runs import as_matrix

if TYPE_CHECKING:
    from clipfilter.engine import EmbeddedShard
    from clipfilter.models import Encoder

#: One row per image, in the order of the source. Labels are null where the image failed, and the error where it did not.
CLASSIFIED = pa.schema([("image", pa.string()), *LABEL_COLUMNS, (cf.ERROR_CLASS, pa.string()), (cf.ERROR, pa.string())])


def classify_stream(
    inputs: Sequence[Input],
    scorer: LabelScorer,
    encoder: Encoder,
    options: StreamOptions | None = None,
    on_rows: Callable[[int], None] | None = None,
    failed_shards: list[dict[str, str]] | None = None,
) -> Iterator[pa.Table]:
    """Tables of the schema `CLASSIFIED`, one per shard; arguments and errors as in `engine.stream.embed_stream`."""
    for shard in embed_stream(inputs, encoder, options, on_rows, failed_shards):
        yield _table(shard, scorer, encoder.dim)


def _table(shard: EmbeddedShard, scorer: LabelScorer, dim: int) -> pa.Table:
    rows, failed = shard.rows, shard.failed
    best = scorer.columns(as_matrix(shard.embeddings["image_emb"], dim))
    good = pa.table({cf.ROW: rows[cf.ROW], "image": rows[cf.KEY], **dict(zip(best.column_names, best, strict=True))})
    bad = failed.select([cf.ROW, cf.KEY, cf.ERROR_CLASS, cf.ERROR]).rename_columns({cf.KEY: "image"})
    table = pa.concat_tables([good, bad], promote_options="default").sort_by(cf.ROW)
    return pa.table({name: table[name] for name in CLASSIFIED.names}, schema=CLASSIFIED)
