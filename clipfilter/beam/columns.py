"""What the statistics count, as pure functions on columns; nothing here knows Beam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter.decisions import DECISIONS
from clipfilter.policies import key_score, locate

DUPLICATES = pa.schema(
    [
        (cf.SHA256, pa.string()),
        (cf.UID, pa.string()),
        (cf.SHARD, pa.string()),
        (cf.ROW, pa.int64()),
        ("keeper_uid", pa.string()),
    ]
)
# User names, passwords, ports and the rest of the address do not count; linear time (RE2).
_HOST = r"^(?i:https?)://(?:[^/?#@\\]*@)?(?P<host>\[[0-9A-Fa-f:.]*\]|[^/?#:\\\s]*)"
_HEX = np.zeros(256, np.uint64)
_HEX[[ord(c) for c in "0123456789abcdef"]] = np.arange(16)


def hosts(urls: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """The host of each http(s) address, in lower case: string [n], "" where there is none."""
    found = pc.struct_field(pc.extract_regex(urls.cast(pa.string()), _HOST), "host")
    return pc.fill_null(pc.utf8_rtrim(pc.utf8_lower(found), "."), "")


def count_by_host(
    urls: pa.ChunkedArray | pa.Array, decisions: pa.ChunkedArray | pa.Array
) -> dict[str, tuple[int, ...]]:
    """Rows per host and decision: {host: (keep, review, reject)}."""
    table = (
        pa.table({"host": hosts(urls), "decision": decisions})
        .group_by(["host", "decision"])
        .aggregate([([], "count_all")])
    )
    counts: dict[str, list[int]] = {}
    for host, decision, count in zip(
        *(table[name].to_pylist() for name in ("host", "decision", "count_all")), strict=True
    ):
        if decision in DECISIONS:
            counts.setdefault(host, [0, 0, 0])[DECISIONS.index(decision)] += count
    return {host: tuple(three) for host, three in counts.items()}


def hash_buckets(hashes: pa.ChunkedArray | pa.Array, buckets: int) -> np.ndarray:
    """Which of `buckets` parts each hash (hex string, not null) belongs to: int64 [n], even and the same everywhere."""
    first = np.asarray(hashes.to_numpy(zero_copy_only=False), dtype="S8").view(np.uint8).reshape(-1, 8)
    value = np.zeros(len(first), np.uint64)
    for place in range(8):
        value = value * np.uint64(16) + _HEX[first[:, place]]
    return (value % np.uint64(buckets)).astype(np.int64)


def exact_duplicates(rows: pa.Table) -> pa.Table:
    """Rows whose bytes another row has too, without the first of each group, which keeps its place.

    rows: cf_sha256, cf_uid, cf_shard, cf_row; all rows of a hash must be among them. The keeper is the row with the
    smallest uid (then shard, then row), so that the order of the input does not matter. Returns `DUPLICATES`.
    """
    rows = rows.filter(pc.is_valid(rows[cf.SHA256]))
    rows = rows.sort_by([(name, "ascending") for name in (cf.SHA256, cf.UID, cf.SHARD, cf.ROW)]).combine_chunks()
    n = rows.num_rows
    codes = np.asarray(rows[cf.SHA256].combine_chunks().dictionary_encode().indices) if n else np.empty(0, np.int64)
    first = np.concatenate([[True], codes[1:] != codes[:-1]])[:n].astype(bool)
    keeper = np.maximum.accumulate(np.where(first, np.arange(n), 0)) if n else np.empty(0, np.int64)
    table = rows.append_column("keeper_uid", rows[cf.UID].take(pa.array(keeper, pa.int64())))
    return table.filter(pa.array(~first, pa.bool_())).select(DUPLICATES.names).cast(DUPLICATES)


def quantile_rank(ranked: int, q: float) -> int:
    """Ascending rank (from 0) of a quantile, as in `curation.fraction.quantiles`: the nearest lower rank."""
    return int(q * (ranked - 1))


def quantile_buckets(high: np.ndarray, wanted: Sequence[float]) -> list[int]:
    """The buckets whose lower halves have to be counted for these quantiles; high: see `fraction.high_histogram`."""
    ranked = int(high.sum())
    return sorted({locate(high, quantile_rank(ranked, q))[0] for q in wanted}) if ranked else []


def quantiles(high: np.ndarray, lows: Mapping[int, np.ndarray], wanted: Sequence[float]) -> list[float | None]:
    """Exact quantiles of float32 scores from the two histograms of a radix selection; None where no row has a score."""
    ranked = int(high.sum())
    if not ranked:
        return [None] * len(wanted)
    found: list[float | None] = []
    for q in wanted:
        bucket, inside = locate(high, quantile_rank(ranked, q))
        found.append(key_score(bucket << 16 | locate(lows[bucket], inside)[0]))
    return found
