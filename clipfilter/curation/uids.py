"""Row uids as numbers: DataComp's "u8,u8" halves, an order that every shard agrees on, and seeded hashes for draws."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter.errors import RefusedError

#: The two halves of a 128-bit uid, as DataComp's subset files have them.
HALVES = np.dtype("u8,u8")
_HEX = np.full(256, 255, np.uint8)
for _digits in (b"0123456789abcdef", b"0123456789ABCDEF"):
    _HEX[np.frombuffer(_digits, np.uint8)] = np.arange(16, dtype=np.uint8)


def uid_halves(uids: Any) -> np.ndarray:
    """`HALVES` [n]: (int(uid[:16], 16), int(uid[16:], 16)) of each uid.

    uids: strings of 32 hex digits (Arrow or a sequence). Raises RefusedError for any other.
    """
    keys, is_hex = _parse(_column(uids))
    if not is_hex.all():
        raise RefusedError(
            "a DataComp subset needs uids of 32 hex digits, which this source's uid column does not have."
        )
    return np.ascontiguousarray(keys).view(HALVES).ravel()


def uid_keys(uids: Any) -> np.ndarray:
    """uint64 [n, 2] that stand for the uids: their value where they are 32 hex digits, else 128 bits of their sha256.

    The same uid gives the same key whatever it is stored beside, so orders and draws made from keys do not depend on
    shards.
    """
    column = _column(uids)
    keys, is_hex = _parse(column)
    for row in np.flatnonzero(~is_hex).tolist():
        digest = hashlib.sha256((column[row].as_py() or "").encode("utf-8", "surrogatepass")).digest()
        keys[row] = np.frombuffer(digest[:16], ">u8")
    return keys


def seeded_hash(keys: np.ndarray, seed: int, salt: str = "") -> np.ndarray:
    """uint64 [n], uniform: a hash of each key (uint64 [n, 2]) under a seed and a purpose (splitmix64, Steele 2014)."""
    start = hashlib.sha256(f"{seed}\0{salt}".encode()).digest()[:8]
    state = np.uint64(int.from_bytes(start, "big"))
    return _mix(_mix(keys[:, 0] ^ state) ^ keys[:, 1])


def canonical_order(preference: np.ndarray | None, keys: np.ndarray, place: np.ndarray | None = None) -> np.ndarray:
    """int64 [n]: positions from the most to the least preferred row.

    The highest preference first (NaN last), equal ones by uid, equal uids by `place` (uint64 [n, 2], shard and row).
    """
    columns = [keys[:, 1], keys[:, 0]]
    if place is not None:
        columns = [place[:, 1], place[:, 0], *columns]
    if preference is not None:
        scores = np.asarray(preference, np.float64)
        columns.append(-np.where(np.isnan(scores), -np.inf, scores) + 0.0)
    return np.lexsort(columns)


def _mix(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(values ^ (values >> np.uint64(31)))


def _column(uids: Any) -> pa.Array:
    if isinstance(uids, pa.ChunkedArray):
        uids = uids.combine_chunks()
    if not isinstance(uids, pa.Array):
        uids = pa.array(uids if isinstance(uids, Sequence) else list(uids), pa.string())
    return uids if pa.types.is_string(uids.type) else uids.cast(pa.string())


def _parse(uids: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """uint64 [n, 2] and which of them are 32 hex digits, bool [n]; the others are zero."""
    keys = np.zeros((len(uids), 2), np.uint64)
    fits = np.asarray(pc.fill_null(pc.equal(pc.binary_length(uids), 32), False))
    if not fits.any():
        return keys, fits
    chosen = uids.filter(pa.array(fits))
    chosen = pa.concat_arrays([chosen])  # offsets from 0
    _, _, data = chosen.buffers()
    start = np.frombuffer(chosen.buffers()[1], np.int32)[chosen.offset]
    text = np.frombuffer(data, np.uint8)[start : start + 32 * len(chosen)].reshape(-1, 32)
    digits = _HEX[text]
    good = (digits < 16).all(axis=1)
    packed = (digits[:, 0::2] << 4) | (digits[:, 1::2] & 15)
    keys[fits] = np.ascontiguousarray(packed).view(">u8").astype(np.uint64)
    rows = np.flatnonzero(fits)
    keys[rows[~good]] = 0
    fits[rows[~good]] = False
    return keys, fits
