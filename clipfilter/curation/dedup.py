"""`curate dedup`: duplicates of a whole run by bytes, perceptual hash and embedding, as columns of a new run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter.curation.clusters import fit_centroids, nearest_centroids
from clipfilter.curation.duplicates import exact_duplicates, follow, near_duplicates, semantic_duplicates
from clipfilter.curation.scores import smallest
from clipfilter.curation.uids import canonical_order, seeded_hash, uid_keys
from clipfilter.errors import RefusedError
from clipfilter.policies import check_metadata, metadata_values
from clipfilter.runs import FACTS, Run, RunShard, as_matrix, derive, refuse_existing, with_facts
from clipfilter.sources import schema_from_text
from clipfilter.storage import Directory

COLUMNS = pa.schema(
    [
        (cf.DUPLICATE, pa.bool_()),
        (cf.DUPLICATE_OF, pa.string()),
        (cf.DUPLICATE_KIND, pa.string()),
        (cf.DUPLICATE_COSINE, pa.float32()),
        (cf.DUPLICATE_BITS, pa.int8()),
    ]
)
KINDS = ("exact", "near", "semantic")
_SAMPLE_PER_CLUSTER = 64
_ROWS_PER_CLUSTER = 1000
_MOST_CLUSTERS = 20_000


@dataclass(frozen=True)
class DedupOptions:
    """What counts as a duplicate; it is part of the new run's plan.

    near: largest Hamming distance of perceptual hashes (0 to 31), None for not at all. semantic: smallest cosine
    (1 - eps), None for not at all. prefer: the metadata number of which the higher one is kept, ties by uid; None is uid
    alone. clusters: k-means clusters, within which embeddings are compared; None is one per thousand rows, at most 20 000.
    """

    exact: bool = True
    near: int | None = 4
    semantic: float | None = None
    prefer: str | None = "pixels"
    clusters: int | None = None
    seed: int = 0


@dataclass
class DedupResult:
    """Rows, how many are duplicates of each kind, and how the clusters came out."""

    out: str
    version: str
    rows: int
    duplicates: dict[str, int]
    clusters: int = 0
    largest_cluster: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"kept": self.rows - sum(self.duplicates.values())}


@dataclass
class _Rows:
    """All rows of the run as columns, in the order of the version: about 80 bytes each, in memory."""

    keys: np.ndarray  # uint64 [n, 2]
    places: np.ndarray  # uint64 [n, 2]: shard id, row
    preference: np.ndarray | None  # float64 [n]
    digests: np.ndarray  # uint64 [n, 2]
    has_digest: np.ndarray
    hashes: np.ndarray  # uint64 [n]
    has_hash: np.ndarray


@dataclass
class _Found:
    """keeper: int64 [n], a kept row or -1; kind: int8 [n], place in KINDS or -1."""

    keeper: np.ndarray
    kind: np.ndarray
    clusters: int = 0
    largest: int = 0
    slot: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    store: np.ndarray | None = None


def find_duplicates(run: str, out: str, options: DedupOptions) -> DedupResult:
    """Write `out`: the rows of `run` with the columns `COLUMNS`.

    cf_duplicate is true for a row that goes; cf_duplicate_of is the uid of the row that stays in its place,
    cf_duplicate_kind why (`exact`, `near`, `semantic`), and cosine and bits compare the two. Kinds are looked for in this
    order, each among what the ones before kept; a keeper that goes later takes its duplicates along. Every part is
    computed in the canonical order of the rows, so that neither the order of shards nor who computes them matters.

    Memory: about 80 bytes per row, the near pairs, 64 embeddings per cluster while these are fitted, and then one
    cluster of embeddings; the embeddings that are compared wait in a scratch file of `out`.

    Raises RefusedError for options that make no sense or do not fit the run.
    """
    source = Run(run).origin()
    _check(source, options)
    refuse_existing(source, out, COLUMNS)
    scratch = Directory(out)
    with scratch:
        rows = _collect(source, options)
        order = canonical_order(rows.preference, rows.keys, rows.places)
        found = _search(source, rows, order, options, scratch)
        uids = _uids_of(source, np.unique(found.keeper[found.keeper >= 0]))
        offsets = {shard.commit.name: first for first, shard in _numbered(source)}

        def compute(shard: RunShard) -> dict[str, pa.Array]:
            return _columns(shard, offsets[shard.commit.name], found, rows, uids)

        summary = derive(source, out, COLUMNS, {"dedup": asdict(options)}, compute)
    duplicates = {name: int((found.kind == code).sum()) for code, name in enumerate(KINDS)}
    return DedupResult(summary["out"], summary["version"], len(order), duplicates, found.clusters, found.largest)


def _check(run: Run, options: DedupOptions) -> None:
    if options.near is not None and not 0 <= options.near < 32:
        raise RefusedError(f"--near is a number of bits between 0 and 31, not {options.near}.")
    if options.semantic is not None and not 0 < options.semantic <= 1:
        raise RefusedError(f"--semantic is a cosine above 0 and at most 1 (0.95 is usual), not {options.semantic:g}.")
    if not options.exact and options.near is None and options.semantic is None:
        raise RefusedError("nothing is to be looked for; leave --exact on, or give --near or --semantic.")
    if options.prefer is not None:
        schema = schema_from_text(run.plan.source["schema"])
        numbers = pa.schema([*schema, *FACTS, pa.field(cf.SIMILARITY, pa.float32())])
        check_metadata(options.prefer, numbers)


def _collect(run: Run, options: DedupOptions) -> _Rows:
    parts = [_rows_of(shard, options) for shard in run.shards(similarity=True)]
    if not parts:
        raise RefusedError(f"the run in {run.url} has no rows; there is nothing to compare.")
    columns: list[list[Any]] = [[getattr(part, item.name) for part in parts] for item in fields(_Rows)]
    joined: list[Any] = [None if column[0] is None else np.concatenate(column) for column in columns]
    return _Rows(*joined)


def _rows_of(shard: RunShard, options: DedupOptions) -> _Rows:
    table, store = shard.rows, shard.embeddings
    shards = np.full(table.num_rows, shard.id, np.uint64)
    return _Rows(
        keys=uid_keys(table[cf.UID]),
        places=np.stack([shards, np.asarray(table[cf.ROW]).astype(np.uint64)], 1),
        preference=metadata_values(options.prefer, with_facts(table, store)) if options.prefer is not None else None,
        digests=uid_keys(pc.utf8_slice_codeunits(table[cf.SHA256], 0, 32)),
        has_digest=np.asarray(table[cf.SHA256].is_valid()),
        hashes=np.asarray(store[cf.PHASH].fill_null(0), np.uint64),
        has_hash=np.asarray(store[cf.PHASH].is_valid()),
    )


def _search(run: Run, rows: _Rows, order: np.ndarray, options: DedupOptions, scratch: Directory) -> _Found:
    n = len(order)
    found = _Found(np.full(n, -1, np.int64), np.full(n, -1, np.int8))

    def drop(code: int, candidates: np.ndarray, keeper: np.ndarray) -> None:
        """keeper: places in `candidates`, -1 for kept ones."""
        gone = keeper >= 0
        found.keeper[candidates[gone]] = candidates[keeper[gone]]
        found.kind[candidates[gone]] = code

    if options.exact:
        candidates = order[rows.has_digest[order]]
        drop(0, candidates, exact_duplicates(rows.digests[candidates]))
    if options.near is not None:
        candidates = order[rows.has_hash[order] & (found.kind[order] < 0)]
        drop(1, candidates, near_duplicates(rows.hashes[candidates], options.near)[0])
    if options.semantic is not None:
        candidates = order[found.kind[order] < 0]
        for members, keeper in _semantic(run, rows, candidates, options, found, scratch):
            drop(2, members, keeper)
    # The last link of a chain of kinds is what connects a row with the one that stays.
    direct = found.keeper.copy()
    found.keeper = follow(direct)
    moved = np.flatnonzero(found.keeper != direct)
    while len(moved):
        found.kind[moved] = np.maximum(found.kind[moved], found.kind[direct[moved]])
        direct[moved] = direct[direct[moved]]
        moved = moved[found.keeper[moved] != direct[moved]]
    return found


def _semantic(
    run: Run, rows: _Rows, candidates: np.ndarray, options: DedupOptions, found: _Found, scratch: Directory
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows of one cluster in canonical order, their keepers' places in it) of every cluster."""
    assert options.semantic is not None
    n, total = len(candidates), len(rows.keys)
    k = min(options.clusters or min(max(1, n // _ROWS_PER_CLUSTER), _MOST_CLUSTERS), n)
    dim = run.dim
    chosen = candidates[smallest(seeded_hash(rows.keys[candidates], options.seed, "clusters"), k * _SAMPLE_PER_CLUSTER)]
    sample = np.empty((len(chosen), dim), np.float16)
    wanted = np.full(total, -1, np.int64)
    wanted[chosen] = np.arange(len(chosen))
    for first, emb in _embeddings(run, dim):
        places = wanted[first : first + len(emb)]
        sample[places[places >= 0]] = emb[places >= 0]
    centroids = fit_centroids(sample, k)

    labels = np.full(total, -1, np.int64)
    alive = np.zeros(total, bool)
    alive[candidates] = True
    for first, emb in _embeddings(run, dim):
        inside = alive[first : first + len(emb)]
        labels[first : first + len(emb)][inside] = nearest_centroids(emb, centroids)[inside]
    grouped = candidates[np.argsort(labels[candidates], kind="stable")]  # by cluster, canonical order within
    slot = np.full(total, -1, np.int64)
    slot[grouped] = np.arange(n)
    store = np.memmap(scratch.scratch() / "vectors", np.float16, "w+", shape=(n, dim))
    for first, emb in _embeddings(run, dim):
        places = slot[first : first + len(emb)]
        store[places[places >= 0]] = emb[places >= 0]
    found.slot, found.store = slot, store
    sizes = np.bincount(labels[candidates], minlength=k)
    found.clusters, found.largest = k, int(sizes.max())
    start = 0
    for size in sizes.tolist():
        members = grouped[start : start + size]
        if size:
            yield members, semantic_duplicates(store[start : start + size], options.semantic)[0]
        start += size


def _numbered(run: Run) -> Iterator[tuple[int, RunShard]]:
    """(number of the first row, shard) of every shard."""
    first = 0
    for shard in run.shards():
        yield first, shard
        first += shard.rows.num_rows


def _embeddings(run: Run, dim: int) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, float16 [m, d]) of every shard."""
    for first, shard in _numbered(run):
        yield first, as_matrix(shard.embeddings["image_emb"], dim)


def _uids_of(run: Run, wanted: np.ndarray) -> dict[int, str]:
    """Row number -> uid, of these rows (ascending)."""
    uids: dict[int, str] = {}
    for first, shard in _numbered(run):
        here = wanted[(wanted >= first) & (wanted < first + shard.rows.num_rows)]
        uids.update(zip(here.tolist(), shard.rows[cf.UID].take(pa.array(here - first)).to_pylist(), strict=True))
    return uids


def _columns(shard: RunShard, first: int, found: _Found, rows: _Rows, uids: dict[int, str]) -> dict[str, pa.Array]:
    here = slice(first, first + shard.rows.num_rows)
    keeper, kind = found.keeper[here], found.kind[here]
    gone = keeper >= 0
    cosine = np.full(len(keeper), np.nan, np.float32)
    compared = np.flatnonzero(gone & (kind == 2))
    if len(compared) and found.store is not None:
        dim = found.store.shape[1]
        own = as_matrix(shard.embeddings["image_emb"], dim)[compared].astype(np.float64)
        cosine[compared] = np.vecdot(own, found.store[found.slot[keeper[compared]]].astype(np.float64))
    hashed = gone & rows.has_hash[here] & rows.has_hash[keeper]
    bits = np.where(hashed, np.bitwise_count(rows.hashes[here] ^ rows.hashes[keeper]), 0)
    return {
        cf.DUPLICATE: pa.array(gone),
        cf.DUPLICATE_OF: pa.array([uids[k] if k >= 0 else None for k in keeper.tolist()], pa.string()),
        cf.DUPLICATE_KIND: pa.array([KINDS[k] if k >= 0 else None for k in kind.tolist()], pa.string()),
        cf.DUPLICATE_COSINE: pa.array(cosine, pa.float32(), mask=np.isnan(cosine)),
        cf.DUPLICATE_BITS: pa.array(bits.astype(np.int8), pa.int8(), mask=~hashed),
    }
