"""Rows that come one by one (tars, folders): captions and uids from their records, batches of bounded size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from clipfilter.errors import RefusedError
from clipfilter.sources.img2dataset import merge
from clipfilter.sources.model import ReadStats, SourceOptions, row_uid
from clipfilter.sources.schema import COLUMN_PREFIX, fit_records, full_schema, infer_record_schema

# Where a caption is looked for when nobody says, best first. A list under `captions` counts as all captions of a row.
# fmt: off
CAPTION_NAMES = (
    "captions", "caption", "text", "TEXT", "txt", "alt_text", "alt", "alttext", "Caption", "CAPTION", "Text", "prompt",
    "description", "sentence", "sentences", "title", "comment",
)
# fmt: on
# Where a conversation about the picture is looked for (LLaVA's, chat messages); its answers are captions, if nothing is.
_CONVERSATIONS = ("conversations", "messages")
_ANSWERING = frozenset({"gpt", "assistant", "model", "bot"})
_TEXTS = ("raw", "caption", "text", "sentence")  # of a caption that is an object
UID_PATTERN = "^[0-9a-fA-F]{32}$"
_UID = re.compile(UID_PATTERN)


@dataclass(slots=True)
class Row:
    """One row before it becomes part of a batch; `image` is None exactly where `error_class` is set (or unread)."""

    number: int
    key: str
    uid: str
    image: bytes | None
    captions: list[str] | None
    record: dict[str, Any]
    error_class: str | None = None
    error: str | None = None
    unfit: dict[str, Any] | None = None  # already known not to fit any column


def clean_captions(values: Iterable[Any]) -> list[str] | None:
    """The non-blank texts among `values`, each once, as valid Unicode; None when there is none."""
    kept: list[str] = []
    for value in values:
        if isinstance(value, str) and value.strip():
            value = value.encode("utf-8", "replace").decode("utf-8")
            if value not in kept:
                kept.append(value)
    return kept or None


def caption_fields(fields: Iterable[str]) -> list[str]:
    """The fields in which captions are looked for when nobody says, best first: as they are called, then in any case."""
    known = list(fields)
    lowered = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in reversed(known)}
    names = [name for name in (*CAPTION_NAMES, *_CONVERSATIONS) if name in known]
    return list(dict.fromkeys([*names, *(lowered[name] for name in CAPTION_NAMES if name in lowered)]))


def caption_texts(value: Any) -> list[str]:
    """The captions in a field: a text, a list of texts or of objects that hold one, the answers of a conversation."""
    if isinstance(value, str):
        return [value]
    texts: list[str] = []
    for item in value if isinstance(value, list) else []:
        if isinstance(item, dict):
            speaker = item.get("from", item.get("role"))
            if speaker is None:
                item = next((item[name] for name in _TEXTS if isinstance(item.get(name), str)), None)
            elif speaker in _ANSWERING:
                said = item.get("value", item.get("content"))
                said = "\n".join(caption_texts(said)) if isinstance(said, list) else said
                item = said.replace("<image>", "").strip() if isinstance(said, str) else None
        if isinstance(item, str):
            texts.append(item)
    return texts


def record_captions(
    record: dict[str, Any], texts: Sequence[str], column: str | None, guessed: Sequence[str]
) -> list[str] | None:
    """All captions of one row: the named field's; else the caption members' and any list under a caption name;
    else the first caption field that holds text; else the answers of a conversation."""
    if column is not None:
        return clean_captions(caption_texts(record.get(column)))
    plain = [name for name in guessed if name not in _CONVERSATIONS]
    for name in plain:
        if isinstance(record.get(name), list) and (listed := caption_texts(record[name])):
            return clean_captions([*texts, *listed])
    if not any(text.strip() for text in texts):
        for name in plain:
            if isinstance(record.get(name), str) and record[name].strip():
                return clean_captions([record[name]])
        for name in _CONVERSATIONS:
            if name in guessed and (answers := caption_texts(record.get(name))):
                return clean_captions(answers)
    return clean_captions(texts)


def record_uid(record: dict[str, Any], column: str | None, path: str, key: str, occurrence: int = 1) -> str:
    """The row's own uid (from `column`, else a field `uid` of 32 hex digits), else the hash of (path, key)."""
    value = record.get(column or "uid")
    if column is not None and value not in (None, ""):
        return str(value)
    if column is None and isinstance(value, str) and _UID.match(value):
        return value
    return row_uid(path, key, occurrence)


def parse_json(data: bytes) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(fields, unfit): a JSON object's fields; anything else is kept as text under "json" for cf_source_json."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return {}, {"json": data.decode("utf-8", "replace")}
    return (value, None) if isinstance(value, dict) else ({}, {"json": value})


def decode_text(data: bytes) -> str:
    return data.decode("utf-8-sig", "replace").strip("\0\r\n")


def batches(
    rows: Iterable[Row], columns: pa.Schema, options: SourceOptions, stats: ReadStats
) -> Iterator[pa.RecordBatch]:
    """Group rows into record batches of at most max_batch_rows rows and max_batch_bytes image bytes."""
    schema = full_schema(columns)
    pending: list[Row] = []
    size = 0
    for row in rows:
        more = len(row.image) if row.image is not None else 0
        if pending and (len(pending) >= options.max_batch_rows or size + more > options.max_batch_bytes):
            yield _batch(pending, columns, schema, stats)
            pending, size = [], 0
        pending.append(row)
        size += more
    if pending:
        yield _batch(pending, columns, schema, stats)


def _batch(rows: list[Row], columns: pa.Schema, schema: pa.Schema, stats: ReadStats) -> pa.RecordBatch:
    fitted, misfits = fit_records([row.record for row in rows], columns, [row.unfit for row in rows])
    stats.misfits += sum(1 for text in misfits if text is not None)
    prefix = [
        [row.number for row in rows],
        [row.key for row in rows],
        [row.uid for row in rows],
        None,
        [row.captions for row in rows],
        [row.error_class for row in rows],
        [row.error for row in rows],
        misfits,
    ]
    arrays = [
        image_array([row.image for row in rows]) if values is None else pa.array(values, item.type)
        for values, item in zip(prefix, COLUMN_PREFIX, strict=True)
    ]
    return pa.RecordBatch.from_arrays([*arrays, *fitted], schema=schema)


def image_array(images: Sequence[bytes | None]) -> pa.Array:
    """large_binary from bytes, copied once (pa.array would grow its buffer by doubling)."""
    offsets = np.zeros(len(images) + 1, np.int64)
    np.cumsum([len(image or b"") for image in images], out=offsets[1:])
    valid = np.packbits([image is not None for image in images], bitorder="little")
    data = pa.py_buffer(b"".join(image or b"" for image in images))
    missing = sum(1 for image in images if image is None)
    buffers = [pa.py_buffer(valid.tobytes()) if missing else None, pa.py_buffer(offsets.tobytes()), data]
    return pa.Array.from_buffers(pa.large_binary(), len(images), buffers, missing)


def check_field(name: str | None, option: str, known: Iterable[str], where: str) -> None:
    """Refuse an option that names a field no sampled record has."""
    known = sorted(set(known))
    if name is not None and name not in known:
        listed = ", ".join(known[:30]) or "none"
        raise RefusedError(f"{option} {name} is not in {where}; its fields are: {listed}.")


def chosen_rows(rows: Sequence[int], count: int) -> list[int]:
    """The numbers of the rows asked for, ascending, each once; IndexError where a shard of `count` rows lacks one."""
    wanted = sorted({int(row) for row in rows})
    if wanted and not 0 <= wanted[0] <= wanted[-1] < count:
        raise IndexError(f"rows {wanted[0]} to {wanted[-1]} of a shard with {count} rows")
    return wanted


def travelling(records: Sequence[dict[str, Any]], sidecar: pa.Schema | None) -> tuple[pa.Schema, set[str]]:
    """(the columns that travel, the names of all fields) of sampled records and of img2dataset's sidecar beside them."""
    columns = infer_record_schema(records)
    fields = {name for record in records for name in record}
    if sidecar is None:
        return columns, fields
    return merge(sidecar, columns), fields | set(sidecar.names)
