"""Any source or run as embeddings, labels and captions: what the measures need, and nothing else, in memory.

Images are read and decoded as a run does it and their pixels dropped at once. What stays grows with the rows: a float16
embedding per image and per caption (1.3 GB for a million images of 640 numbers), rounded as a run stores them, so that
cosines equal a run's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from clipfilter import columns as cf
from clipfilter import defaults
from clipfilter.engine import (
    MAX_THREADS,
    PatientReader,
    StageTimes,
    ThreadDecoder,
    cpu_count,
    decoded_ahead,
    embed_rows,
)
from clipfilter.errors import ClipfilterError, RefusedError, ShardError
from clipfilter.images import DecodeSettings, Mode
from clipfilter.runs import Run, as_matrix, is_run, read_table
from clipfilter.sources import COLUMN_PREFIX, Shard, Source, SourceOptions, is_binary, open_source

if TYPE_CHECKING:
    from clipfilter.models import Encoder

#: `--label-column folder`: the name of the folder that an image lies in.
FOLDER = "folder"
_LABEL_NAMES = ("label", "cls", "class", "class_name")
_LISTED_FAILURES = 1000
_TEXT_BATCH = 1024


@dataclass(frozen=True)
class DataRequest:
    """Which rows to evaluate on, and which of their columns.

    source: dataset or run directory. label_column: a column, or "folder"; None looks for one of the usual names. where:
    (column, value) pairs; a row must have one of the values given for each column, compared as text. captions: the
    first caption of each row, or all. limit: of the selected rows, only so many. batch_size: images per forward pass; a
    run's own size gives a run's own bits. threads decode; decode_ahead: batches decoded while the model works, for GPUs.
    """

    source: str
    options: SourceOptions = field(default_factory=SourceOptions)
    label_column: str | None = None
    where: tuple[tuple[str, str], ...] = ()
    captions: Literal["first", "all"] = "first"
    limit: int | None = None
    decode: Mode = defaults.DECODE
    batch_size: int = 64
    threads: int | None = None
    decode_ahead: int = 0


@dataclass
class EvaluationData:
    """image_emb float16 [n, dim]; label_index int [n] into label_values, -1 where there is none; text_emb float16 [m, dim]
    and text_image int [m], in the images' order and each image's first caption first.

    rows: those selected; each is an image or failed. failures: the first 1 000, with key, class and message. Of a run
    with `where` or a limit, failed rows are not known: a run keeps none of their columns.
    """

    image_emb: np.ndarray
    label_index: np.ndarray
    label_values: list[str | int]
    text_emb: np.ndarray
    text_image: np.ndarray
    distinct_texts: int
    texts_truncated: int
    rows: int
    failed_by_class: dict[str, int]
    failures: list[dict[str, str]]
    failed_shards: list[dict[str, str]]
    damaged_shards: list[str]

    @property
    def failed(self) -> int:
        return sum(self.failed_by_class.values())

    @property
    def first_text(self) -> np.ndarray:
        """int [images with a caption]: the position of each one's first caption in text_emb."""
        return np.asarray(np.unique(self.text_image, return_index=True)[1])


@dataclass(frozen=True)
class Dataset:
    """A request checked against its source; `base` is the finished run that holds the embeddings, where it is one."""

    request: DataRequest
    source: Source
    base: Run | None
    label_column: str | None
    captions: bool

    @property
    def kind(self) -> str:
        return "run" if self.base else self.source.kind

    @property
    def integer_labels(self) -> bool:
        """Whether labels are numbers, which need names."""
        return self.label_column in self.source.schema.names and pa.types.is_integer(
            self.source.schema.field(self.label_column).type
        )

    def embed(self, encoder: Encoder, on_rows: Callable[[int], None] | None = None) -> EvaluationData:
        """Embed the selected rows, or take them from the run. on_rows is told of every batch's rows.

        Raises RefusedError when no row is selected or none could be used, ClipfilterError when the model fails.
        """
        collected = _Collected(self, encoder, on_rows or (lambda rows: None))
        if self.base is None:
            _read_source(self, collected)
        else:
            _read_run(self, self.base, collected)
        return collected.finish()


def open_dataset(request: DataRequest) -> Dataset:
    """Check a request before anything is embedded. Raises RefusedError, also when there are neither labels nor captions."""
    base = Run(request.source).origin() if is_run(request.source) else None
    if base is not None:
        source = Source.from_plan(base.dataset)
        if request.options.image_column or request.options.uid_column:
            raise RefusedError(
                f"{request.source} is a run, whose images are embedded already; leave out --image-column."
            )
    else:
        source = open_source(request.source, request.options)
    for name, _ in request.where:
        _check_where(name, source)
    label_column = _label_column(request.label_column, source)
    captions = _has_captions(request, source, base is not None)
    if label_column is None and not captions:
        raise RefusedError(
            f"{request.source} has neither labels nor captions to evaluate against; name a column with --label-column "
            "(or `folder` for one folder per class) or with --caption-column."
        )
    return Dataset(request, source, base, label_column, captions)


def _listing(source: Source) -> str:
    return ", ".join(source.schema.names)[:500] or "none"


def _check_where(name: str, source: Source) -> None:
    if name not in source.schema.names:
        raise RefusedError(f"--where: the source has no column {name!r}; its columns are: {_listing(source)}.")
    kind = source.schema.field(name).type
    if pa.types.is_nested(kind) or is_binary(kind):
        raise RefusedError(f"--where: the column {name!r} holds {kind}; choose one with single values.")


def _label_column(named: str | None, source: Source) -> str | None:
    if named is None:
        found = (name for name in _LABEL_NAMES if name in source.schema.names)
        return next((name for name in found if _is_label(source.schema.field(name).type)), None)
    if named not in source.schema.names:
        if named == FOLDER:
            return FOLDER
        raise RefusedError(f"--label-column: the source has no column {named!r}; its columns are: {_listing(source)}.")
    kind = source.schema.field(named).type
    if not _is_label(kind):
        raise RefusedError(f"--label-column: {named!r} holds {kind}; labels are texts or integers, one per row.")
    return named


def _is_label(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind))


def _has_captions(request: DataRequest, source: Source, stored: bool) -> bool:
    named = request.options.caption_column
    if not stored:
        return source.has_captions is not False
    if named is not None and named not in source.schema.names:
        raise RefusedError(f"--caption-column: the run has no column {named!r}; its columns are: {_listing(source)}.")
    if named is None and request.captions == "all":
        raise RefusedError(
            "a run keeps the first caption of each row; name the column that has all of them with --caption-column."
        )
    return named is not None or source.has_captions is not False


class _Collected:
    """Gathers what is kept of each shard."""

    def __init__(self, dataset: Dataset, encoder: Encoder, on_rows: Callable[[int], None]) -> None:
        self.dataset, self.encoder, self.on_rows = dataset, encoder, on_rows
        self.images = 0
        self.rows = 0
        self.failed: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.failed_shards: list[dict[str, str]] = []
        self.damaged: list[str] = []
        self._image_emb: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._label_index: dict[str | int, int] = {}
        self._text_emb: list[np.ndarray] = []
        self._text_image: list[np.ndarray] = []
        self._texts: set[int] = set()  # hashes, to tell how many are different
        self.truncated = 0

    @property
    def left(self) -> int | None:
        """Rows still wanted, None for all."""
        limit = self.dataset.request.limit
        return None if limit is None else limit - self.rows

    def add(
        self,
        image_emb: np.ndarray,
        labels: Sequence[str | int | None] | None,
        captions: Sequence[list[str]],
        text_emb: np.ndarray | None,
    ) -> None:
        """Rows with an image: float16 [r, dim], labels, captions; text_emb float16 [r, dim] holds the embeddings of
        their first captions where they are known."""
        self._image_emb.append(image_emb)
        index = [self._label_index.setdefault(v, len(self._label_index)) if v is not None else -1 for v in labels or ()]
        self._labels.append(np.array(index if labels is not None else [-1] * len(image_emb), np.int64))
        first = self.dataset.request.captions == "first"
        lists = [item[:1] if first else item for item in captions]
        owners = np.repeat(np.arange(len(lists)), [len(item) for item in lists])
        texts = [text for item in lists for text in item]
        self._texts.update(map(hash, texts))
        self._text_emb.append(text_emb[owners] if text_emb is not None else self._encode(texts))
        self._text_image.append(owners + self.images)
        self.images += len(image_emb)

    def fail(self, table: pa.Table) -> None:
        self.failed.update(table[cf.ERROR_CLASS].to_pylist())
        room = _LISTED_FAILURES - len(self.failures)
        for row in table.slice(0, room).to_pylist():
            self.failures.append({"key": row[cf.KEY], "class": row[cf.ERROR_CLASS], "message": row[cf.ERROR] or ""})

    def finish(self) -> EvaluationData:
        if not self.rows:
            lost = f"; {self.failed_shards[0]['error']}" if self.failed_shards else ""
            raise RefusedError(f"no row of {self.dataset.request.source} was selected; look at --where{lost}.")
        if not self.images:
            example = f" ({self.failures[0]['message']})" if self.failures else ""
            raise RefusedError(f"none of the {self.rows:,} images could be read{example}; nothing can be measured.")
        text_emb = np.concatenate(self._text_emb)
        if not np.isfinite(text_emb).all():
            raise ClipfilterError(f"the model {self.encoder.name} gives no finite vector for some captions.")
        return EvaluationData(
            image_emb=np.concatenate(self._image_emb),
            label_index=np.concatenate(self._labels),
            label_values=list(self._label_index),
            text_emb=text_emb,
            text_image=np.concatenate(self._text_image),
            distinct_texts=len(self._texts),
            texts_truncated=self.truncated,
            rows=self.rows,
            failed_by_class=dict(sorted(self.failed.items())),
            failures=self.failures,
            failed_shards=self.failed_shards,
            damaged_shards=self.damaged,
        )

    def _encode(self, texts: list[str]) -> np.ndarray:
        parts = [np.empty((0, self.encoder.dim), np.float16)]
        for start in range(0, len(texts), _TEXT_BATCH):
            batch = texts[start : start + _TEXT_BATCH]
            parts.append(self.encoder.encode_texts(batch).astype(np.float16))
            self.truncated += self.encoder.count_truncated(batch)
        return np.concatenate(parts)


# --- a source -------------------------------------------------------------------------------------------------------


def _read_source(dataset: Dataset, collected: _Collected) -> None:
    request = dataset.request
    settings = DecodeSettings(collected.encoder.preprocess, request.decode, defaults.MAX_PIXELS)
    decoder = ThreadDecoder(settings, request.threads or min(MAX_THREADS, cpu_count()))
    for shard in dataset.source.iter_shards():
        if collected.left == 0:
            break
        try:
            _embed_shard(dataset, shard, decoder, collected)
        except ShardError as error:
            collected.failed_shards.append({"path": shard.path, "error": str(error)})


def _embed_shard(dataset: Dataset, shard: Shard, decoder: ThreadDecoder, collected: _Collected) -> None:
    request, column = dataset.request, dataset.label_column
    carried = [COLUMN_PREFIX.field(cf.CAPTIONS)]
    if column in dataset.source.schema.names:
        carried.append(dataset.source.schema.field(column))
    first = request.captions == "first"
    reader = PatientReader(dataset.source, shard)
    chosen, size = _selected(reader, request.where), collected.encoder.preprocess.size
    # As a run does it (docs/decisions/0002): shard by shard, in batches of one size.
    with decoded_ahead(
        chosen, decoder, size, request.batch_size, StageTimes(), request.decode_ahead, max_rows=collected.left
    ) as batches:
        embedded = embed_rows(
            batches, collected.encoder, shard=shard.id, source_schema=pa.schema(carried),
            text=dataset.captions and first, captions="first", times=StageTimes(), on_batch=collected.on_rows,
        )  # fmt: skip
    rows, dim = embedded.rows, collected.encoder.dim
    text_emb = as_matrix(embedded.embeddings["text_emb"], dim) if dataset.captions and first else None
    collected.rows += rows.num_rows + embedded.failed.num_rows
    collected.truncated += embedded.captions_truncated
    collected.fail(embedded.failed)
    if reader.stats.damaged:
        collected.damaged.append(shard.path)
    lists = rows[cf.CAPTIONS].to_pylist() if dataset.captions else [None] * rows.num_rows
    collected.add(
        as_matrix(embedded.embeddings["image_emb"], dim), _labels(rows, column), [_usable(c) for c in lists], text_emb
    )


def _selected(batches: Any, where: Sequence[tuple[str, str]]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        yield batch.filter(_mask(batch, where)) if where else batch


def _mask(rows: pa.RecordBatch | pa.Table, where: Sequence[tuple[str, str]]) -> pa.Array | pa.ChunkedArray:
    """Which rows have, for every column named, one of the values given for it; a null is no value."""
    mask: Any = None
    for name in dict(where):
        values = pa.array([value for other, value in where if other == name], pa.string())
        chosen = pc.is_in(pc.cast(rows[name], pa.string()), value_set=values)
        mask = chosen if mask is None else pc.and_(mask, chosen)
    return mask


def _labels(rows: pa.Table, column: str | None) -> list[str | int | None] | None:
    if column is None:
        return None
    if column in rows.column_names:
        found: list[str | int | None] = rows[column].to_pylist()
        return [None if value == "" else value for value in found]
    folders = (key.rpartition("/")[0].rpartition("/")[2] for key in rows[cf.KEY].to_pylist())
    return [folder or None for folder in folders]


def _usable(captions: str | list[str | None] | None) -> list[str]:
    found = [captions] if isinstance(captions, str) else captions or []
    return [text for text in found if text and text.strip()]


# --- a run ----------------------------------------------------------------------------------------------------------


def _read_run(dataset: Dataset, run: Run, collected: _Collected) -> None:
    request = dataset.request
    captions = request.options.caption_column or cf.CAPTION
    stored = captions == cf.CAPTION and run.plan.options["captions"] == "first" and run.plan.text_column
    wanted = {cf.KEY, captions, dataset.label_column, *(name for name, _ in request.where)}
    whole = not request.where and request.limit is None
    for lost in run.version.failed_shards:
        collected.failed_shards.append({"path": lost.shard.path, "error": lost.error})
    for commit in run.commits():
        if collected.left == 0:
            break
        if whole:
            collected.fail(run.failed(commit))
            collected.rows += commit.counts.failed
        if whole and stored:
            collected.truncated += commit.captions_truncated
        if commit.damaged:
            collected.damaged.append(commit.shard.path)
        if commit.files.annotated is None:
            continue
        rows = run.table(commit.files.annotated, wanted.__contains__)
        embeddings = read_table(*run.embeddings_at(commit))
        chosen = np.arange(rows.num_rows) if not request.where else np.flatnonzero(_mask(rows, request.where))
        chosen = chosen[: collected.left]
        rows = rows.take(pa.array(chosen))
        dim = collected.encoder.dim
        text_emb = as_matrix(embeddings["text_emb"], dim)[chosen] if stored else None
        lists = rows[captions].to_pylist() if dataset.captions else [None] * rows.num_rows
        collected.rows += rows.num_rows
        collected.on_rows(rows.num_rows)
        collected.add(
            as_matrix(embeddings["image_emb"], dim)[chosen],
            _labels(rows, dataset.label_column),
            [_usable(c) for c in lists],
            text_emb,
        )
