"""How far two encoders of one vector space agree on real rows: cosines of their vectors, decisions of a policy."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter import defaults
from clipfilter.engine import (
    MAX_THREADS,
    DecodedBatch,
    EmbeddedShard,
    StageTimes,
    ThreadDecoder,
    cpu_count,
    decode_batches,
    embed_rows,
)
from clipfilter.errors import RefusedError, RowError
from clipfilter.images import DecodeSettings, Mode, PreprocessConfig
from clipfilter.policies import Policy, compile_policy, fraction_thresholds
from clipfilter.runs import annotate, as_matrix
from clipfilter.sources import Source

if TYPE_CHECKING:
    from clipfilter.models import Encoder

_BATCH = 32
_DECODE: Mode = "fast"


@dataclass(frozen=True)
class Sample:
    """Decoded rows of a source, in memory: batches of 32, `columns` as the source has them."""

    columns: pa.Schema
    batches: list[DecodedBatch]

    @property
    def rows(self) -> int:
        return sum(batch.rows.num_rows for batch in self.batches)

    def pixels(self) -> np.ndarray:
        """uint8 [n, 3, S, S]: the images that could be read."""
        return np.concatenate([batch.pixels[: batch.rows.num_rows][_readable(batch)] for batch in self.batches])

    def captions(self) -> list[str]:
        """The first caption of every row that has one."""
        lists = [item for batch in self.batches for item in batch.rows[cf.CAPTIONS].to_pylist()]
        return [item[0] for item in lists if item and item[0] and item[0].strip()]

    def split(self, first: int) -> tuple[Sample, Sample]:
        """The first `first` batches, and the others."""
        return replace(self, batches=self.batches[:first]), replace(self, batches=self.batches[first:])


def read_sample(source: Source, preprocess: PreprocessConfig, limit: int) -> Sample:
    """The first `limit` rows of `source`, decoded for a model; RefusedError when no image among them can be read."""
    decoder = ThreadDecoder(DecodeSettings(preprocess, _DECODE, defaults.MAX_PIXELS), min(MAX_THREADS, cpu_count()))
    batches: list[DecodedBatch] = []
    left = limit
    for shard in source.iter_shards():
        for batch in decode_batches(source.read(shard), decoder, preprocess.size, _BATCH, StageTimes(), max_rows=left):
            batches.append(batch)
            left -= batch.rows.num_rows
        if left <= 0:
            break
    if not any(_readable(batch).any() for batch in batches):
        raise RefusedError(f"no image of {source.url} can be read: name other images to measure on")
    return Sample(source.schema, batches)


def _readable(batch: DecodedBatch) -> np.ndarray:
    return np.array([not isinstance(image, RowError) for image in batch.images], bool)


def agreement(reference: Encoder, other: Encoder, sample: Sample, policy: Policy | None = None) -> dict[str, Any]:
    """What changes when `other` takes the place of `reference`, as JSON.

    images, texts: {n, mean, min} of the cosines between the two encoders' vectors (texts None without captions), on
    embeddings as a run stores them. policy: {name, version, rows, changed} or None; thresholds calibrated for the
    reference are used for both, and dataset-level ones are each encoder's own.
    """
    ours, theirs = (_embed(sample, encoder) for encoder in (reference, other))
    found: dict[str, Any] = {
        "images": _summary(_vectors(ours, "image_emb", reference.dim), _vectors(theirs, "image_emb", reference.dim)),
        "texts": None,
        "policy": None,
    }
    if ours.embeddings["text_emb"].null_count < len(ours.embeddings):
        has_text = np.asarray(ours.embeddings["text_emb"].is_valid())
        pair = (_vectors(item, "text_emb", reference.dim)[has_text] for item in (ours, theirs))
        found["texts"] = _summary(*pair)
    if policy is not None:
        bound = copy.copy(other)
        bound.fingerprint = other.fingerprint | {"weights_sha256": reference.fingerprint["weights_sha256"]}
        before, after = _decisions(ours, reference, policy), _decisions(theirs, bound, policy)
        found["policy"] = {
            "name": policy.name,
            "version": policy.version,
            "rows": len(before),
            "changed": int(np.count_nonzero(before != after)),
        }
    return found


def _embed(sample: Sample, encoder: Encoder) -> EmbeddedShard:
    return embed_rows(
        sample.batches, encoder, shard="sample", source_schema=sample.columns, text=True, captions="first",
        times=StageTimes(),
    )  # fmt: skip


def _vectors(embedded: EmbeddedShard, column: str, dim: int) -> np.ndarray:
    return np.asarray(as_matrix(embedded.embeddings[column], dim), np.float64)


def _summary(left: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines = (left * right).sum(axis=1) / lengths
    return {"n": len(cosines), "mean": round(float(cosines.mean()), 6), "min": round(float(cosines.min()), 6)}


def _decisions(embedded: EmbeddedShard, encoder: Encoder, policy: Policy) -> np.ndarray:
    """The decision of every row, object [n]."""
    compiled = compile_policy(policy, encoder, decode=_DECODE)
    thresholds: dict[str, float | None] = {}
    if compiled.dataset_thresholds:
        scored = annotate(embedded.rows, embedded.embeddings, encoder, compiled, None)
        for item in compiled.dataset_thresholds:
            scores = np.asarray(scored[cf.score(item.of)].to_numpy(), np.float32)
            threshold = fraction_thresholds(lambda scores=scores: [scores], [(item.fraction, item.tail)])[0]  # type: ignore[misc]
            thresholds[item.key] = threshold.value
    decided = annotate(embedded.rows, embedded.embeddings, encoder, compiled, thresholds)
    return np.asarray(decided[cf.DECISION].to_pylist(), object)
