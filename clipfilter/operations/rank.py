"""Rank candidate images for a prompt by CLIP score, a head or a policy; and keep the best of what a generator makes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter import defaults
from clipfilter.decisions import DECISIONS
from clipfilter.engine import StreamOptions, embed_stream, open_inputs, stream_options
from clipfilter.errors import RefusedError
from clipfilter.policies import REASONS, Policy, compile_policy, load_policy, named_scores
from clipfilter.runs import annotate

if TYPE_CHECKING:
    from clipfilter.engine import EmbeddedShard
    from clipfilter.models import Encoder

#: One row per candidate, best first; then those that a policy rejects, then those that could not be read, both without
#: a rank. position: the candidate's place among those given, from 0. score: what they are ordered by.
RANKED = pa.schema(
    [
        ("rank", pa.int32()),
        ("position", pa.int64()),
        ("image", pa.string()),
        ("score", pa.float32()),
        (cf.SIMILARITY, pa.float32()),
        (cf.DECISION, pa.string()),
        (cf.REASONS, REASONS),
        (cf.ERROR_CLASS, pa.string()),
        (cf.ERROR, pa.string()),
    ]
)
_HEAD, _POLICY = "head:", "policy:"


class Ranker:
    """Orders candidates for prompts with one model, loaded and compiled once.

    by: "clip" (cosine of image and prompt), "head:NAME" (a head's score, highest first; `head:file:/path` for one's own)
    or "policy:P". policy: a policy, pack or file besides: what it rejects drops out, and what it keeps comes before
    what it would have reviewed. The prompt counts as the caption: alignment rules compare with it. "policy:P" is
    "clip" with that policy.

    Raises RefusedError for an unknown order, head or policy, and for a policy with dataset-level rules.
    """

    def __init__(self, encoder: Encoder, by: str = "clip", policy: Policy | str | None = None) -> None:
        if by.startswith(_POLICY):
            if policy is not None:
                raise RefusedError("two policies are named; give one, as policy or as by.")
            by, policy = "clip", by.removeprefix(_POLICY)
        if by != "clip" and not by.startswith(_HEAD):
            raise RefusedError(f"there is no order {by!r}; rank by clip, head:NAME or policy:NAME.")
        self.encoder = encoder
        self.by = by
        self._column = cf.SIMILARITY
        self._head = self._policy = None
        if by.startswith(_HEAD):
            scores = named_scores([by.removeprefix(_HEAD)])
            self._head = compile_policy(scores, encoder)
            self._column = cf.score(scores.rules[0].id)
        if policy is not None:
            found = load_policy(policy) if isinstance(policy, str) else policy
            self._policy = compile_policy(found, encoder)
            if self._policy.dataset_rules:
                raise RefusedError(
                    f"policy {found.name!r} compares images with a whole dataset ({', '.join(self._policy.dataset_rules)}), "
                    "and there is none here; use a policy without fraction rules."
                )

    def rank(
        self,
        prompt: str,
        images: Sequence[Any],
        options: StreamOptions | None = None,
        on_rows: Callable[[int], None] | None = None,
    ) -> pa.Table:
        """The candidates as a table of the schema `RANKED`.

        images: what `engine.stream.open_inputs` takes: paths, URLs, folders, runs, Pillow images, arrays, bytes.
        """
        return self.rank_embedded(prompt, embed_stream(open_inputs(images), self.encoder, options, on_rows))

    def rank_embedded(self, prompt: str, shards: Any) -> pa.Table:
        """The same for candidates that are embedded already: an iterable of `EmbeddedShard`s of this model."""
        if not prompt.strip():
            raise RefusedError("the prompt is empty; say what the images should show.")
        text = np.asarray(self.encoder.encode_texts([prompt])).astype(np.float16)
        parts, before = [], 0
        for shard in shards:
            part = self._score(prompt, text, shard)
            parts.append(part.set_column(1, "position", pc.add(part["position"], pa.scalar(before, pa.int64()))))
            before += part.num_rows
        return _ordered(pa.concat_tables(parts) if parts else RANKED.empty_table())

    def _score(self, prompt: str, text: np.ndarray, shard: EmbeddedShard) -> pa.Table:
        """One shard in the order of its rows: `RANKED` without ranks, positions from 0."""
        n, failed = shard.rows.num_rows, shard.failed
        asked = shard.with_captions([prompt] * n, np.repeat(text, n, axis=0))
        rows, embeddings = asked.rows, asked.embeddings
        decided = annotate(rows, embeddings, self.encoder, self._policy, {} if self._policy else None)
        scored = annotate(rows, embeddings, self.encoder, self._head, None) if self._head else decided
        numbers = pa.chunked_array([*rows[cf.ROW].chunks, *failed[cf.ROW].chunks], pa.int64())
        position = np.empty(n + failed.num_rows, np.int64)
        position[np.argsort(np.asarray(numbers), kind="stable")] = np.arange(len(position))
        columns = {
            "position": pa.array(position[:n]),
            "image": rows[cf.KEY],
            "score": scored[self._column],
            **{name: decided[name] for name in (cf.SIMILARITY, cf.DECISION, cf.REASONS)},
        }
        good = _table(columns, n)
        bad = {"position": pa.array(position[n:]), "image": failed[cf.KEY]}
        return pa.concat_tables(
            [good, _table(bad | {name: failed[name] for name in (cf.ERROR_CLASS, cf.ERROR)}, failed.num_rows)]
        )


def rank(
    prompt: str,
    images: Sequence[Any],
    *,
    by: str = "clip",
    policy: Policy | str | None = None,
    model: str | None = None,
    encoder: Encoder | None = None,
    device: str = defaults.DEVICE,
) -> pa.Table:
    """Order images for a prompt: one row per image, the schema is `RANKED`.

    images: paths, URLs, folders, Pillow images, arrays ([h, w, 3] uint8, or float from 0 to 1) or encoded bytes. by,
    policy: see `Ranker`. encoder: a loaded model instead of the name of one.

    Raises RefusedError for a request that cannot be done. An image that cannot be read is a row with its error.
    """
    inputs = open_inputs(images)
    options = StreamOptions()
    if encoder is None:
        encoder, options = stream_options(inputs, model, device=device)
    return Ranker(encoder, by, policy).rank_embedded(prompt, embed_stream(inputs, encoder, options))


class Pipeline(Protocol):
    """What `best_of` needs of a generator: the call signature of a diffusers text-to-image pipeline."""

    def __call__(self, prompt: str, *, num_images_per_prompt: int, generator: Any, **options: Any) -> Any:
        """An object whose `images` are as many Pillow images, or an array [n, h, w, 3]."""


@dataclass(frozen=True)
class Best:
    """images: the best ones, best first; seeds: the seed that made each. table: all candidates (`RANKED`), where
    `image` is "seed S" and `position` the number of the candidate."""

    images: list[Any]
    seeds: list[int]
    table: pa.Table = field(repr=False)


def best_of(
    pipeline: Pipeline,
    prompt: str,
    n: int,
    k: int = 1,
    *,
    by: str = "clip",
    policy: Policy | str | None = None,
    model: str | None = None,
    encoder: Encoder | None = None,
    device: str = defaults.DEVICE,
    seed: int | None = None,
    batch_size: int = 1,
    **options: Any,
) -> Best:
    """Generate n images, drop what a policy rejects, keep the best k.

    pipeline: any object called like a diffusers pipeline. Candidate i is made by a generator of its own, seeded with
    seed + i, so that it can be made again alone and does not depend on batch_size, the candidates per call. seed None
    draws one. options go to the pipeline (num_inference_steps, guidance_scale, ...). Of a policy that rejects all, the
    result has no images; the table says why.

    Raises ValueError for n, k or batch_size below 1 or a pipeline that gives another number of images than it was asked
    for; RefusedError as `rank`.
    """
    import torch

    if n < 1 or k < 1 or batch_size < 1:
        raise ValueError(f"n, k and batch_size are 1 or more, not {n}, {k} and {batch_size}")
    if encoder is None:
        encoder, _ = stream_options([], model, device=device)
    ranker = Ranker(encoder, by, policy)  # before anything is generated: it may be refused
    first = random.SystemRandom().randrange(2**31) if seed is None else seed
    seeds = [first + number for number in range(n)]
    images: list[Any] = []
    for start in range(0, n, batch_size):
        part = seeds[start : start + batch_size]
        generators = [torch.Generator().manual_seed(one) for one in part]
        made = list(pipeline(prompt, num_images_per_prompt=len(part), generator=generators, **options).images)
        if len(made) != len(part):
            raise ValueError(f"the pipeline was asked for {len(part)} images and gave {len(made)}")
        images += made
    table = ranker.rank(prompt, images)
    names = pa.array([f"seed {seeds[position]}" for position in table["position"].to_pylist()], pa.string())
    table = table.set_column(table.schema.get_field_index("image"), "image", names)
    chosen = table.filter(pc.is_valid(table["rank"])).slice(0, k)["position"].to_pylist()
    return Best([images[position] for position in chosen], [seeds[position] for position in chosen], table)


def _table(columns: dict[str, Any], n: int) -> pa.Table:
    """The columns given and nulls for the others."""
    return pa.table({item.name: columns.get(item.name, pa.nulls(n, item.type)) for item in RANKED}, schema=RANKED)


def _ordered(table: pa.Table) -> pa.Table:
    """By decision (keep, review; undecided as keep), falling score and position; then rejected, then failed ones."""
    n = table.num_rows
    decision = np.array([DECISIONS.index(value) if value else 0 for value in table[cf.DECISION].to_pylist()], np.int64)
    decision[np.asarray(pc.is_valid(table[cf.ERROR_CLASS]))] = len(DECISIONS)
    score = np.nan_to_num(np.asarray(table["score"].to_numpy(), np.float64), nan=-np.inf)
    order = np.lexsort((np.asarray(table["position"]), -score, decision))
    table = table.take(pa.array(order))
    in_race = decision[order] < DECISIONS.index("reject")
    return table.set_column(0, "rank", pa.array(np.arange(1, n + 1, dtype=np.int32), mask=~in_race))
