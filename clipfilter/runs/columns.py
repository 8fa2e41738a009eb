"""The tables a shard is made of: their schemas, and the pure functions that fill them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.errors import RowError

if TYPE_CHECKING:
    from clipfilter.models import Encoder
    from clipfilter.policies import CompiledPolicy, LabelScorer

#: Identity columns of every annotated row, after the source's own columns.
IDENTITY = pa.schema(
    [
        (cf.SHARD, pa.string()),
        (cf.ROW, pa.int64()),
        (cf.KEY, pa.string()),
        (cf.UID, pa.string()),
        (cf.SHA256, pa.string()),
        (cf.WIDTH, pa.int32()),
        (cf.HEIGHT, pa.int32()),
        (cf.FORMAT, pa.string()),
        (cf.CAPTION, pa.string()),
        (cf.SOURCE_JSON, pa.string()),
    ]
)
FAILED = pa.schema(
    [
        (cf.SHARD, pa.string()),
        (cf.ROW, pa.int64()),
        (cf.KEY, pa.string()),
        (cf.UID, pa.string()),
        (cf.ERROR_CLASS, pa.string()),
        (cf.ERROR, pa.string()),
    ]
)
#: Cheap pixel facts stored beside each embedding (see clipfilter/images/facts.py for their definitions).
FACTS = pa.schema(
    [
        (cf.WIDTH, pa.int32()),
        (cf.HEIGHT, pa.int32()),
        (cf.BRIGHTNESS, pa.float32()),
        (cf.CONTRAST, pa.float32()),
        (cf.BLUR, pa.float32()),
        (cf.ENTROPY, pa.float32()),
        (cf.PHASH, pa.uint64()),
        (cf.COLOURFULNESS, pa.float32()),
    ]
)
#: Columns that a decision adds; a later decision replaces them.
DECISION_COLUMNS = (cf.SIMILARITY, cf.DECISION, cf.REASONS, cf.SEVERITY, cf.ACTION)


def decision_inputs() -> pa.Schema:
    """What a policy's metadata rules may use besides the source's own columns."""
    return pa.unify_schemas([IDENTITY, FACTS])


def is_decision_column(name: str) -> bool:
    return name in DECISION_COLUMNS or name.startswith(cf.SCORE)


def embeddings_schema(dim: int, text: bool) -> pa.Schema:
    """Schema of `OUT/embeddings/*.arrow`; unit-norm float16 vectors, text_emb null where there is no caption."""
    vector = pa.list_(pa.float16(), dim)
    fields = [(cf.SHARD, pa.string()), (cf.ROW, pa.int64()), (cf.UID, pa.string()), ("image_emb", vector)]
    return pa.schema([*fields, *([("text_emb", vector)] if text else []), *FACTS])


def as_matrix(column: pa.ChunkedArray | pa.Array, dim: int) -> np.ndarray:
    """A fixed_size_list<float16> column as float16 [n, dim], without copying when it is one chunk.

    Null vectors (no caption) come out as zeros.
    """
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [
        np.asarray(chunk.values.slice(chunk.offset * dim, len(chunk) * dim)).view(np.float16).reshape(-1, dim)
        for chunk in chunks
    ]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, dim), np.float16)


def vector_column(values: np.ndarray, present: np.ndarray | None = None) -> pa.Array:
    """float16 [n, dim] as a fixed_size_list column; rows where `present` is False become null."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1), pa.float16())
    mask = None if present is None or present.all() else pa.array(~present)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1], mask=mask)


def failed_table(shard: str, rows: pa.Table, errors: Sequence[RowError]) -> pa.Table:
    """The rows that failed, with class and message."""
    return pa.table(
        {
            cf.SHARD: pa.array([shard] * rows.num_rows, pa.string()),
            cf.ROW: rows[cf.ROW],
            cf.KEY: rows[cf.KEY],
            cf.UID: rows[cf.UID],
            cf.ERROR_CLASS: pa.array([error.error_class for error in errors], pa.string()),
            cf.ERROR: pa.array([error.message for error in errors], pa.string()),
        },
        schema=FAILED,
    )


def with_facts(rows: pa.Table, embeddings: pa.Table) -> pa.Table:
    """Rows with the image facts that lie beside their embeddings; null where an earlier version did not measure one."""
    for field in FACTS:
        if field.name not in rows.column_names:
            known = field.name in embeddings.column_names
            rows = rows.append_column(field, embeddings[field.name] if known else pa.nulls(rows.num_rows, field.type))
    return rows


def annotate(
    rows: pa.Table,
    embeddings: pa.Table,
    encoder: Encoder,
    policy: CompiledPolicy | None,
    thresholds: dict[str, float | None] | None,
    labels: LabelScorer | None = None,
) -> pa.Table:
    """The annotated rows of one shard: source and identity columns, then similarity, scores, decision and reasons.

    rows       : one row per image that did not fail, source and identity columns (see IDENTITY).
    embeddings : the same rows in the same order, `embeddings_schema`.
    policy     : None after `embed` and a plain `score`: decision and reasons are null.
    thresholds : the fixed numbers of dataset-level rules; None while they are not known (scores only).
    labels     : adds `LABEL_COLUMNS` (zero-shot classification).
    """
    from clipfilter.policies import REASONS, similarity

    dim = encoder.dim
    image = as_matrix(embeddings["image_emb"], dim)
    text, has_text = None, np.zeros(len(image), bool)
    if "text_emb" in embeddings.column_names:
        text = as_matrix(embeddings["text_emb"], dim)
        has_text = np.asarray(embeddings["text_emb"].is_valid())
    if policy is None:
        n = rows.num_rows
        added = pa.table(
            {
                cf.SIMILARITY: pa.array(similarity(image, text), pa.float32(), mask=~has_text),
                cf.DECISION: pa.nulls(n, pa.string()),
                cf.REASONS: pa.nulls(n, REASONS),
            }
        )
    else:
        scores = policy.score(image, text, has_text, with_facts(rows, embeddings))
        decided = policy.decide(scores, thresholds) if thresholds is not None else None
        added = policy.annotation(scores, decided)
    tables = [added] if labels is None else [added, labels.columns(image)]
    for table in tables:
        for name in table.column_names:
            if name in rows.column_names:  # labels of the run that is classified again
                rows = rows.drop_columns([name])
            rows = rows.append_column(table.schema.field(name), table[name])
    return rows.replace_schema_metadata({"clipfilter": json.dumps(_record(policy, encoder))} if policy else None)


def _record(policy: CompiledPolicy, encoder: Encoder) -> dict[str, Any]:
    """What every annotated file says about the decision it holds, so that it can be read apart from its run."""
    return {
        "policy": policy.policy.name,
        "version": policy.policy.version,
        "policy_sha256": policy.policy.sha256,
        "prompts_sha256": policy.prompts_sha256,
        "model": encoder.fingerprint["model"],
        "weights_sha256": encoder.fingerprint["weights_sha256"],
        "uncalibrated": list(policy.uncalibrated),
    }
