"""`curate score` and `curate balance`: negCLIPLoss, NormSim and MetaCLIP's balancing as columns of a new run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter.curation.arrays import load_matrix
from clipfilter.curation.balance import Entries, balanced, count_entries
from clipfilter.curation.scores import BANK_SIZE, NormSim, negclip_scores, smallest
from clipfilter.curation.uids import seeded_hash, uid_keys
from clipfilter.errors import RefusedError
from clipfilter.runs import Run, RunShard, as_matrix, derive, refuse_existing


def add_scores(
    run: str,
    out: str,
    *,
    negclip: bool = False,
    target: str | None = None,
    p: float = np.inf,
    bank_size: int = BANK_SIZE,
    seed: int = 0,
) -> dict[str, Any]:
    """Write `out`: the rows of `run` with `cf_negclip` and, with a `target` (.npy of embeddings), `cf_normsim`.

    Both are float32 and higher is better; cf_negclip is null without a caption. The bank is the `bank_size` captioned rows
    with the smallest seeded hash of their uid. Memory: bank and target. Returns `derive`'s summary. Raises RefusedError
    where nothing is asked for, the run has no captions, or the target does not fit.
    """
    source = Run(run).origin()
    added: list[tuple[str, pa.DataType]] = []
    options: dict[str, Any] = {}
    scorers: dict[str, Callable[[RunShard], pa.Array]] = {}
    if negclip:
        if not source.plan.text_column:
            raise RefusedError(f"the run in {source.url} has no caption embeddings, which negCLIPLoss compares.")
        added.append((cf.NEGCLIP, pa.float32()))
        options["negclip"] = {"bank": bank_size, "seed": seed}
    if target is not None:
        matrix = _target(target, source.dim)
        similarity = NormSim(matrix, p)
        added.append((cf.NORMSIM, pa.float32()))
        options["normsim"] = {"target": hashlib.sha256(matrix.tobytes()).hexdigest(), "p": "inf" if p == np.inf else p}
        scorers[cf.NORMSIM] = lambda shard: pa.array(
            similarity.scores(as_matrix(shard.embeddings["image_emb"], source.dim))
        )
    if not added:
        raise RefusedError("nothing is to be computed; give --negclip, --normsim TARGET.npy or both.")
    refuse_existing(source, out, pa.schema(added))
    if negclip:
        scorers[cf.NEGCLIP] = _Bank(source, bank_size, seed).scores

    def compute(shard: RunShard) -> dict[str, pa.Array]:
        return {column: score(shard) for column, score in scorers.items()}

    return derive(source, out, pa.schema(added), options, compute)


def _target(url: str, dim: int) -> np.ndarray:
    """The embeddings of a target set, float32 [t, dim]; RefusedError for those of another model."""
    matrix = load_matrix(url)
    if matrix.shape[1] != dim:
        raise RefusedError(
            f"{url} has {matrix.shape[1]} numbers per row, the run's embeddings {dim}; "
            "the target must come from the run's own model."
        )
    return matrix


class _Bank:
    """The fixed bank of a run: the captioned rows with the smallest seeded hashes of their uids, in the order of these."""

    def __init__(self, run: Run, size: int, seed: int) -> None:
        self._dim = run.dim
        # Shard by shard, only what can still be among the smallest is held.
        hashes, places = np.empty(0, np.uint64), np.empty((0, 2), np.uint64)
        image = text = np.empty((0, self._dim), np.float16)
        for shard in run.shards():
            has = np.flatnonzero(np.asarray(shard.embeddings["text_emb"].is_valid()))
            own = seeded_hash(uid_keys(shard.rows[cf.UID])[has], seed, "bank")
            best = smallest(own, size)
            rows = has[best]
            numbers = np.asarray(shard.rows[cf.ROW])[rows].astype(np.uint64)
            hashes = np.concatenate([hashes, own[best]])
            places = np.concatenate([places, np.stack([np.full(len(rows), shard.id, np.uint64), numbers], 1)])
            image = np.concatenate([image, as_matrix(shard.embeddings["image_emb"], self._dim)[rows]])
            text = np.concatenate([text, as_matrix(shard.embeddings["text_emb"], self._dim)[rows]])
            order = np.lexsort((places[:, 1], places[:, 0], hashes))[:size]
            hashes, places, image, text = hashes[order], places[order], image[order], text[order]
        self._image, self._text = image.astype(np.float32), text.astype(np.float32)
        self._place = {(shard, row): i for i, (shard, row) in enumerate(places.tolist())}

    def scores(self, shard: RunShard) -> pa.Array:
        has = np.asarray(shard.embeddings["text_emb"].is_valid())
        rows = np.asarray(shard.rows[cf.ROW]).tolist()
        place = np.array([self._place.get((shard.id, row), -1) for row in rows], np.int64)
        values = np.full(len(rows), np.nan, np.float32)
        image, text = (as_matrix(shard.embeddings[name], self._dim) for name in ("image_emb", "text_emb"))
        values[has] = negclip_scores(image[has], text[has], self._image, self._text, place[has])
        return pa.array(values, pa.float32(), mask=~has)


def add_balance(run: str, out: str, entries: str, *, t: int, seed: int = 0) -> dict[str, Any]:
    """Write `out`: the rows of `run` with `cf_balanced`, which is true for the rows that MetaCLIP's balancing keeps.

    entries: text file, one entry per line. t: captions per entry that are kept as they are (20 000 for 400 M rows in the
    paper). Two passes over the captions; memory: the entries and one shard's matches. Returns `derive`'s summary and how
    many rows are kept.
    """
    if t < 1:
        raise RefusedError(f"--t is a number of captions, 1 or more, not {t}.")
    try:
        listed = Entries(line for line in Path(entries).read_text(encoding="utf-8").splitlines() if line)
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{entries} cannot be read as a list of entries ({error}).") from error
    source = Run(run).origin()
    added = pa.schema([(cf.BALANCED, pa.bool_())])
    refuse_existing(source, out, added)
    counts = np.zeros(len(listed.names), np.int64)
    for shard in source.shards():
        matches = (listed.match(caption) for caption in shard.rows[cf.CAPTION].to_pylist())
        counts += count_entries(matches, len(listed.names))

    def compute(shard: RunShard) -> dict[str, pa.Array]:
        matches = [listed.match(caption) for caption in shard.rows[cf.CAPTION].to_pylist()]
        return {cf.BALANCED: pa.array(balanced(matches, uid_keys(shard.rows[cf.UID]), counts, listed.names, t, seed))}

    options = {"balance": {"entries": listed.sha256, "t": t, "seed": seed}}
    return derive(source, out, added, options, compute)
