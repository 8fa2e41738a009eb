"""`process_shard`, the unit of work: decoded batches in, embeddings, decisions and the failed rows out.

A plain function over an iterator: it knows no executor, no scheduler and no file system.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter import defaults
from clipfilter.decisions import DECISIONS
from clipfilter.engine.culprits import but_for_culprits
from clipfilter.engine.decoding import DecodedBatch, StageTimes, image_columns
from clipfilter.errors import ENCODE_ERROR, RowError
from clipfilter.runs import FAILED, IDENTITY, Account, Counts, annotate, embeddings_schema, failed_table, vector_column

if TYPE_CHECKING:
    from clipfilter.models import Encoder
    from clipfilter.policies import CompiledPolicy, LabelScorer


class Sink(Protocol):
    """Where the tables of a shard go."""

    def embeddings(self, table: pa.Table) -> None: ...
    def failed(self, table: pa.Table) -> None: ...
    def annotated(self, table: pa.Table, *, final: bool) -> None: ...
    def copy(self, what: Literal["kept", "review"], rows: list[int]) -> None: ...


@dataclass(frozen=True)
class ShardReport(Account):
    """What became of the rows of one shard, and how the encoder fared: batches halved, seconds it waited, by step."""

    batch_halvings: int = 0
    encoder_waited: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class EmbeddedShard:
    """All rows of a shard after the encoder: rows and embeddings (equal length, equal order) and the failed.

    encoder_waited: seconds in which the encoder had its turn and no decoded batch was there.
    """

    rows: pa.Table
    embeddings: pa.Table
    failed: pa.Table
    captions_truncated: int
    batch_halvings: int
    encoder_waited: float = 0.0
    profiles_ignored: int = 0

    def with_captions(
        self, captions: list[str | None], text: np.ndarray, has: np.ndarray | None = None
    ) -> EmbeddedShard:
        """The shard with other captions and their embeddings, float16 [n, dim]. has: which rows have one, None is all."""
        rows = self.rows.drop_columns([name for name in self.rows.column_names if name == cf.CAPTION])
        stored = self.embeddings.drop_columns([name for name in self.embeddings.column_names if name == "text_emb"])
        rows = rows.append_column(cf.CAPTION, pa.array(captions, pa.string()))
        return EmbeddedShard(rows, stored.append_column("text_emb", vector_column(text, has)), self.failed, 0, 0)


def process_shard(
    batches: Iterable[DecodedBatch],
    encoder: Encoder,
    policy: CompiledPolicy | None,
    sink: Sink,
    *,
    shard: str,
    source_schema: pa.Schema,
    text: bool,
    captions: defaults.Captions = defaults.CAPTIONS,
    turn: contextlib.AbstractContextManager[Any] | None = None,
    times: StageTimes | None = None,
    on_batch: Any = None,
    labels: LabelScorer | None = None,
) -> ShardReport:
    """Embed, score and decide one shard.

    batches : `DecodedBatch`es in shard order, all of one size (the last may hold fewer rows).
    policy  : None embeds only. A policy with dataset-level rules is scored here and decided later, once the
              thresholds over all shards are fixed (`decide_shard`). One that only scores decides nothing.
    labels  : adds their columns to the annotated rows.
    text    : whether caption embeddings are stored. `captions` says which caption of a row counts: the first,
              the one most similar to the image, or the mean direction of all.
    turn    : held while the encoder is in use, so that one shard is written while the next one is embedded.
    on_batch: called with the number of rows after each batch (progress).
    """
    times = times or StageTimes()
    with turn or contextlib.nullcontext():
        embedded = embed_rows(
            batches, encoder, shard=shard, source_schema=source_schema, text=text, captions=captions, times=times,
            on_batch=on_batch,
        )  # fmt: skip
    with times.step("decide_and_write"):
        final = policy is None or not policy.dataset_rules
        decides = final and policy is not None and policy.policy.decides
        embedded, table = _annotated(embedded, encoder, policy, {} if decides else None, labels)
        sink.embeddings(embedded.embeddings)
        sink.failed(embedded.failed)
        sink.annotated(table, final=final)
        report = shard_report(table, embedded.failed, decides)
        if decides:
            copy_decided(table, sink)
    ignored = embedded.profiles_ignored
    return replace(
        report,
        counts=Counts({**report.counts, "profiles_ignored": ignored}) if ignored else report.counts,
        captions_truncated=embedded.captions_truncated,
        batch_halvings=embedded.batch_halvings,
        encoder_waited=embedded.encoder_waited,
        seconds=times.seconds,
    )


def decide_shard(
    rows: pa.Table,
    embeddings: pa.Table,
    failed: pa.Table,
    encoder: Encoder,
    policy: CompiledPolicy | None,
    thresholds: dict[str, float | None] | None,
    sink: Sink,
    *,
    copy: bool,
    final: bool,
    labels: LabelScorer | None = None,
) -> ShardReport:
    """Decide, or only score, stored rows without images.

    rows: annotated rows of an earlier run; its decision columns must already be removed. thresholds: the fixed
    numbers of dataset-level rules, or None to score only. final: whether these rows are the run's result.
    """
    table = annotate(rows, embeddings, encoder, policy, thresholds, labels)
    sink.annotated(table, final=final)
    if thresholds is not None and copy:
        copy_decided(table, sink)
    return shard_report(table, failed, thresholds is not None)


def _annotated(embedded: EmbeddedShard, *more: Any) -> tuple[EmbeddedShard, pa.Table]:
    """`annotate` for a shard, and the shard without the rows that cannot be scored."""
    rows, embeddings = embedded.rows, embedded.embeddings

    def attempt(some: Sequence[int]) -> pa.Table:
        chosen = pa.array(np.isin(np.arange(rows.num_rows), some))
        return annotate(rows.filter(chosen), embeddings.filter(chosen), *more)

    table, broken = but_for_culprits(rows.num_rows, lambda: annotate(rows, embeddings, *more), attempt)
    if not broken:
        return embedded, table
    lost = np.isin(np.arange(rows.num_rows), list(broken))
    kept, gone = pa.array(~lost), rows.filter(pa.array(lost))
    failed = failed_table(gone[cf.SHARD][0].as_py(), gone, [broken[row] for row in sorted(broken)])
    failed = pa.concat_tables([embedded.failed, failed]).sort_by(cf.ROW).combine_chunks()
    return replace(embedded, rows=rows.filter(kept), embeddings=embeddings.filter(kept), failed=failed), table


def copy_decided(table: pa.Table, sink: Sink) -> None:
    """Have the source's own bytes of kept and review rows written, when there are any."""
    decisions = np.asarray(table[cf.DECISION].to_pylist(), dtype=object)
    numbers = np.asarray(table[cf.ROW])
    for what, decision in (("kept", "keep"), ("review", "review")):
        rows = numbers[decisions == decision].tolist()
        if rows:
            sink.copy(what, rows)  # type: ignore[arg-type]


def embed_rows(
    batches: Iterable[DecodedBatch],
    encoder: Encoder,
    *,
    shard: str,
    source_schema: pa.Schema,
    text: bool,
    captions: defaults.Captions,
    times: StageTimes,
    on_batch: Any = None,
) -> EmbeddedShard:
    """Run the encoder over all batches of a shard and collect its tables (see `EmbeddedShard`)."""
    rows_schema = pa.schema([*source_schema, *IDENTITY])
    store = embeddings_schema(encoder.dim, text)
    rows, stored, failed = [rows_schema.empty_table()], [store.empty_table()], [FAILED.empty_table()]
    truncated = ignored = 0
    runner = _BatchRunner(encoder)
    waited, idle = 0.0, time.perf_counter()
    for batch in batches:
        waited += time.perf_counter() - idle
        columns, errors, cut = _embed_batch(batch, runner, shard, captions if text else None, times)
        truncated += cut
        ignored += sum(not isinstance(image, RowError) and image.profile_ignored for image in batch.images)
        rows.append(pa.table({name: columns[name] for name in rows_schema.names}, schema=rows_schema))
        stored.append(pa.table({name: columns[name] for name in store.names}, schema=store))
        failed.append(errors)
        if on_batch is not None:
            on_batch(batch.rows.num_rows)
        idle = time.perf_counter()
    good, vectors, bad = (pa.concat_tables(parts).combine_chunks() for parts in (rows, stored, failed))
    return EmbeddedShard(good, vectors, bad, truncated, runner.halvings, waited, ignored)


def _embed_batch(
    batch: DecodedBatch, runner: _BatchRunner, shard: str, captions: defaults.Captions | None, times: StageTimes
) -> tuple[dict[str, Any], pa.Table, int]:
    """The columns of the rows that did not fail (source, identity, embeddings), the failed rows, captions truncated.

    captions: None embeds none.
    """
    key = batch.rows[cf.KEY][0].as_py()
    with times.step("encode_images", key):
        image_emb, broken = runner.images(batch.pixels)
    image_emb = image_emb[: batch.rows.num_rows]
    lists = [_usable(own) for own in batch.rows[cf.CAPTIONS].to_pylist()]
    text_emb, has_text, truncated = None, np.empty(0, bool), 0
    if captions is not None:
        with times.step("encode_texts", key):
            (text_emb, has_text, truncated), unread = runner.captions(lists, image_emb, captions)
        broken |= unread
    for row in np.flatnonzero(~np.isfinite(image_emb).all(axis=1)).tolist():
        broken.setdefault(row, RowError(ENCODE_ERROR, "the model gave no finite embedding"))
    images = [
        image if isinstance(image, RowError) else broken.get(row, image) for row, image in enumerate(batch.images)
    ]
    ok = np.array([not isinstance(image, RowError) for image in images], bool)
    good = batch.rows.filter(pa.array(ok))
    columns = {name: good[name] for name in good.schema.names} | image_columns(images)
    columns[cf.SHARD] = pa.array([shard] * good.num_rows, pa.string())
    columns[cf.CAPTION] = pa.array(
        [next(iter(own), None) for own, kept in zip(lists, ok, strict=True) if kept], pa.string()
    )
    columns["image_emb"] = vector_column(image_emb[ok].astype(np.float16))
    if text_emb is not None:
        columns["text_emb"] = vector_column(text_emb[ok].astype(np.float16), has_text[ok])
    errors = [image for image in images if isinstance(image, RowError)]
    return columns, failed_table(shard, pa.table(batch.rows.filter(pa.array(~ok))), errors), truncated


class _BatchRunner:
    """Calls the encoder with one batch size; halves it, and remembers, when the GPU runs out of memory.

    An exception costs the rows that cause it: in their places the others meet zeros and empty texts, as those of images
    that could not be decoded, so that their numbers stay the same.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.halvings = 0

    def images(self, pixels: np.ndarray) -> tuple[np.ndarray, dict[int, RowError]]:
        """uint8 [B, 3, S, S] -> float32 [B, dim], unit norm; and the rows that cannot be embedded."""

        def attempt(rows: Sequence[int]) -> np.ndarray:
            some = np.zeros_like(pixels)
            some[list(rows)] = pixels[list(rows)]
            return self._images(some)

        return but_for_culprits(len(pixels), lambda: self._images(pixels), attempt)

    def captions(
        self, lists: list[list[str]], image_emb: np.ndarray, mode: defaults.Captions
    ) -> tuple[tuple[np.ndarray, np.ndarray, int], dict[int, RowError]]:
        """See `_captions`; and the rows whose captions cannot be embedded."""

        def attempt(rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray, int]:
            some = [own if row in rows else [""] * len(own) for row, own in enumerate(lists)]
            return self._captions(some, image_emb, mode)

        return but_for_culprits(len(lists), lambda: self._captions(lists, image_emb, mode), attempt)

    def _images(self, pixels: np.ndarray) -> np.ndarray:
        while True:
            size = max(1, len(pixels) >> self.halvings)
            try:
                parts = [self.encoder.encode_images(pixels[at : at + size]) for at in range(0, len(pixels), size)]
                return np.concatenate(parts) if len(parts) > 1 else parts[0]
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError" or size == 1:
                    raise
                self.halvings += 1
                _empty_cuda_cache()

    def _captions(
        self, lists: list[list[str]], image_emb: np.ndarray, mode: defaults.Captions
    ) -> tuple[np.ndarray, np.ndarray, int]:
        """One text embedding per row: float32 [n, dim], which rows have one bool [n], captions truncated."""
        n, dim = image_emb.shape
        result = np.zeros((n, dim), np.float32)
        has = np.array([bool(item) for item in lists], bool)
        texts = [text for item in lists for text in (item[:1] if mode == "first" else item)]
        if not texts:
            return result, has, 0
        owners = np.repeat(np.arange(n), [min(len(item), 1) if mode == "first" else len(item) for item in lists])
        emb = np.asarray(self.encoder.encode_texts(texts), np.float32)
        if mode == "first":
            result[owners] = emb
        elif mode == "mean":
            np.add.at(result, owners, emb)
            norms = np.linalg.norm(result, axis=1, keepdims=True)
            result /= np.where(norms == 0, 1, norms)
        else:
            cosine = np.einsum("ij,ij->i", emb, image_emb[owners])
            # Later captions win only when strictly better: stable for equal captions.
            best = np.full(n, -np.inf)
            for index, owner in enumerate(owners):
                if cosine[index] > best[owner]:
                    best[owner] = cosine[index]
                    result[owner] = emb[index]
        return result, has, self.encoder.count_truncated(texts)


def _usable(captions: list[str | None] | None) -> list[str]:
    return [text for text in captions or [] if text and text.strip()]


def _empty_cuda_cache() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shard_report(table: pa.Table, failed: pa.Table, decided: bool) -> ShardReport:
    """The counts of a shard's annotated and failed rows."""
    from clipfilter.policies import escalated

    counts = Counts(rows=table.num_rows + failed.num_rows, failed=failed.num_rows, embedded=table.num_rows)
    rules: dict[str, Counter[str]] = {}
    if decided:
        decisions = Counter(table[cf.DECISION].to_pylist())
        counts |= {name: decisions.get(name, 0) for name in DECISIONS}
        counts["decided"] = sum(decisions.values())
        flat = table[cf.REASONS].combine_chunks().flatten()
        hidden = int(escalated(table[cf.REASONS]).sum())
        counts |= {"escalated": hidden} if hidden else {}
        for rule, band in zip(flat.field("rule").to_pylist(), flat.field("band").to_pylist(), strict=True):
            rules.setdefault(rule, Counter())[band] += 1
    classes = Counter(failed[cf.ERROR_CLASS].to_pylist())
    return ShardReport(
        counts,
        dict(sorted(classes.items())),
        {rule: dict(sorted(bands.items())) for rule, bands in sorted(rules.items())},
    )
