"""The approximate index in memory: which rows may be nearest, found without looking at most of them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from clipfilter.runs import RunVectors
from clipfilter.search.exact import Nearest
from clipfilter.search.index import (
    ANEW,
    IndexUnusableError,
    Manifest,
    Quantizer,
    Segment,
    identity,
    latest_manifest,
    require_faiss,
    verified,
)
from clipfilter.storage import Directory

#: A query looks into this many times the root of the number of lists (64 of 1024, chosen on Flickr8k's training split; see
#: docs/decisions/0017), and this many candidates per wanted row have their exact cosine computed.
_PROBES = 2.0
_LEAST_PROBES = 16
_CANDIDATES_PER_ROW = 10
_LEAST_CANDIDATES = 100
#: With fewer rows than this that count, all of them are looked at exactly.
_FEW_ROWS = 50_000
#: Segments that are open at a time while loading.
_SEGMENTS_AT_ONCE = 256


class ApproximateIndex:
    """The segments of an index that hold rows of one version of a run; positions are that version's.

    covered: bool per shard of the run, whether the index holds it; the others are searched exactly. Memory: one byte per
    dimension and 8 bytes for each row. Safe to search from several threads.
    """

    def __init__(self, vectors: RunVectors, directory: Directory, manifest: Manifest) -> None:
        """Raises IndexUnusableError when a file is missing or not what the manifest says."""
        faiss = require_faiss()
        self._vectors = vectors
        self.manifest = manifest
        quantizer = Quantizer.read(directory, manifest)
        by_embeddings = {segment.embeddings: segment for segment in manifest.segments}
        found = [by_embeddings.get(shard.embeddings.sha256) for shard in vectors.shards]
        self.covered = np.array([segment is not None for segment in found])
        self._index = faiss.IndexIVFScalarQuantizer(
            quantizer.coarse, manifest.dim, manifest.lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT,
            False,
        )  # fmt: skip
        self._index.parallel_mode = 1  # the threads share the lists of one query
        self._index.is_trained = True
        faiss.copy_array_to_vector(quantizer.span.reshape(-1), self._index.sq.trained)
        self._quantizer = quantizer  # the index only borrows the coarse one
        segments = [(i, segment) for i, segment in enumerate(found) if segment is not None]
        _fill(self._index, vectors, directory, manifest, segments)

    @classmethod
    def open(cls, vectors: RunVectors, url: str) -> ApproximateIndex | None:
        """The index in `url`, None when there is none.

        Raises IndexUnusableError when it is damaged or was made with another model.
        """
        directory = Directory(url)
        found = latest_manifest(directory)
        if found is None:
            return None
        manifest = found[1]
        if manifest.model != identity(vectors.plan.model) or manifest.dim != vectors.dim:
            raise IndexUnusableError(
                f"the index in {url} is of embeddings by {manifest.model.get('model')} "
                f"(weights {str(manifest.model.get('weights_sha256'))[:12]}), not of this run's."
            )
        return cls(vectors, directory, manifest)

    @property
    def rows(self) -> int:
        """How many rows of the run it holds."""
        return int(self._index.ntotal)

    def top_k(
        self, query: np.ndarray, k: int, mask: np.ndarray | None = None, *, probes: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(positions int64, cosines float32) as `exact.top_k`, of rows in the lists nearest to the query.

        The best candidates by code get their exact cosine from the stored vectors (not those of a run on an object store:
        theirs is the cosine of the code, off by about 0.001). Rows the index does not hold are all looked at.
        probes: lists to look into, by default twice the root of their number; more when a mask leaves only some of the rows.
        """
        count = self._vectors.rows if mask is None else int(np.count_nonzero(mask))
        nearest = Nearest(query, k)
        if mask is not None and count <= _FEW_ROWS:
            self._scan(nearest, mask, np.ones(len(self.covered), bool))
            return nearest.result()
        share = count / self._vectors.rows
        lists = self.manifest.lists
        probes = probes or max(_LEAST_PROBES, round(_PROBES * np.sqrt(lists) / share))
        positions, cosines = self._candidates(query, max(_LEAST_CANDIDATES, _CANDIDATES_PER_ROW * k), probes, mask)
        if self._vectors.directory.local:
            order = np.argsort(positions)
            nearest.add_rows(positions[order], self._vectors.vectors_at(positions[order]))
        else:
            nearest.add_cosines(positions, cosines)
        self._scan(nearest, mask, ~self.covered)
        return nearest.result()

    def _candidates(
        self, query: np.ndarray, count: int, probes: int, mask: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        faiss = require_faiss()
        parameters = faiss.SearchParametersIVF(nprobe=min(probes, self.manifest.lists))
        if mask is not None:
            bits = np.packbits(mask, bitorder="little")
            selector = faiss.IDSelectorBitmap(bits)
            parameters.sel = selector
        count = min(count, max(self.rows, 1))
        cosines, positions = self._index.search(query[None].astype(np.float32), count, params=parameters)
        there = positions[0] >= 0
        return positions[0][there], cosines[0][there]

    def _scan(self, nearest: Nearest, mask: np.ndarray | None, shards: np.ndarray) -> None:
        """Look at all rows of these shards."""
        for number in np.flatnonzero(shards):
            shard = self._vectors.shards[number]
            if mask is not None and not mask[shard.start : shard.start + shard.rows].any():
                continue
            for start, block in self._vectors.shard_blocks(int(number)):
                nearest.add(start, block, None if mask is None else mask[start : start + len(block)])


def _fill(
    index: Any, vectors: RunVectors, directory: Directory, manifest: Manifest, segments: list[tuple[int, Segment]]
) -> None:
    """Add the segments to faiss's inverted lists, each list from many segments at once, so that it seldom grows."""
    faiss = require_faiss()
    for first in range(0, len(segments), _SEGMENTS_AT_ONCE):
        opened = []
        for number, segment in segments[first : first + _SEGMENTS_AT_ONCE]:
            lists, rows, codes = _read(directory, manifest, segment, vectors.shards[number].rows)
            bounds = np.searchsorted(lists, np.arange(manifest.lists + 1))
            opened.append((bounds, rows.astype(np.int64) + vectors.shards[number].start, codes))
        for number in range(manifest.lists):
            slices = [slice(bounds[number], bounds[number + 1]) for bounds, _, _ in opened]
            parts = [(p[s], c[s]) for s, (_, p, c) in zip(slices, opened, strict=True) if s.start < s.stop]
            if parts:
                positions = np.concatenate([part[0] for part in parts])
                codes = np.concatenate([part[1] for part in parts])
                index.invlists.add_entries(number, len(positions), faiss.swig_ptr(positions), faiss.swig_ptr(codes))
    index.ntotal = sum(segment.rows for _, segment in segments)


def _read(
    directory: Directory, manifest: Manifest, segment: Segment, rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A segment's lists and rows (int32 [n]) and codes (uint8 [n, dim]), memory-mapped.

    All is checked: faiss does not look at what it is given. Raises IndexUnusableError.
    """
    expected = pa.schema([("list", pa.int32()), ("row", pa.int32()), ("code", pa.binary(manifest.dim))])
    with verified(directory, asdict(segment)) as path:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    whole = table.schema == expected and table.num_rows == segment.rows == rows and table["code"].num_chunks == 1
    if not whole or any(column.null_count for column in table.columns):
        raise IndexUnusableError(
            f"{segment.name} of the index in {directory.url} is not the segment it should be; {ANEW}."
        )
    lists, numbers = table["list"].to_numpy(), table["row"].to_numpy()
    sorted_lists = (np.diff(lists) >= 0).all() and lists[0] >= 0 and lists[-1] < manifest.lists
    if not sorted_lists or not np.array_equal(np.sort(numbers), np.arange(rows)):
        raise IndexUnusableError(
            f"{segment.name} of the index in {directory.url} names rows that do not exist; {ANEW}."
        )
    return lists, numbers, np.frombuffer(table["code"].chunk(0).buffers()[1], np.uint8).reshape(rows, manifest.dim)
