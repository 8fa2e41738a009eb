"""The Python API: everything below is also `clipfilter.<name>`; results are Arrow tables and NumPy arrays.

Works in a notebook: no event loop, no signal handlers, no child processes. Images are paths, http(s) URLs, folders, globs,
datasets, run directories, Pillow images, arrays ([h, w, 3] uint8, or floating point from 0 to 1) or encoded bytes; one of them
or a list. Everywhere `model` is a name for `load_encoder` (default: nano; of a run, its own model) and `encoder` a model
that is loaded already, which saves loading it again. A request that cannot be done raises `RefusedError`, whose text says
what to do; an image that cannot be read is a row with its error class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from clipfilter import columns as cf
from clipfilter import defaults, runs
from clipfilter.engine import (
    EmbeddedShard,
    StreamOptions,
    embed_stream,
    open_inputs,
    refuse_other_weights,
    stream_options,
)
from clipfilter.errors import RefusedError
from clipfilter.models import load_encoder
from clipfilter.operations import Best, Ranker, best_of, rank
from clipfilter.policies import DEFAULT_TEMPLATES
from clipfilter.runs import FACTS, annotate, as_matrix, vector_column
from clipfilter.runs import Run as StoredRun

if TYPE_CHECKING:
    import PIL.Image

    from clipfilter.models import Encoder
    from clipfilter.policies import Policy as PolicyModel
    from clipfilter.runs import Plan
    from clipfilter.search import SearchResult

    Image = str | Path | bytes | np.ndarray | PIL.Image.Image
    Images = Image | Sequence[Image]

__all__ = [
    "Best",
    "Embeddings",
    "Policy",
    "Ranker",
    "RefusedError",
    "Run",
    "best_of",
    "classify",
    "embed",
    "load_encoder",
    "open_run",
    "rank",
    "search",
]

_FAILED = pa.schema([("image", pa.string()), (cf.ERROR_CLASS, pa.string()), (cf.ERROR, pa.string())])


@dataclass(frozen=True)
class Embeddings:
    """image_emb: float16 [n, dim], unit norm. text_emb: the same for captions, zero where there is none; None if they
    were not asked for. rows: Arrow table of n rows, `image` and what the source and the decoder know of each (its
    columns, cf_width, cf_height, cf_sha256, ...). failed: `image`, cf_error_class and cf_error of those without one."""

    image_emb: np.ndarray
    text_emb: np.ndarray | None
    rows: pa.Table
    failed: pa.Table


def embed(
    images: Images,
    *,
    captions: bool = False,
    model: str | None = None,
    encoder: Encoder | None = None,
    device: str = defaults.DEVICE,
    batch_size: int | None = None,
    decode: str = defaults.DECODE,
) -> Embeddings:
    """Embed images as a run would, into memory; a run's embeddings are read, not computed.

    captions: embed the first caption of each row of a dataset too. Memory grows with the images: for more than fit,
    write a run with `clipfilter embed` and `open_run` it.
    """
    inputs = open_inputs(_listed(images))
    if encoder is None:
        encoder, options = stream_options(
            inputs, model, device=device, batch_size=batch_size, decode=decode, text=captions
        )
    else:
        options = _options(inputs, encoder, batch_size, decode, captions)
    shards = list(embed_stream(inputs, encoder, options))
    dim = encoder.dim
    images_emb = [as_matrix(shard.embeddings["image_emb"], dim) for shard in shards]
    texts_emb = [_text_emb(shard.embeddings, dim) for shard in shards] if captions else None
    rows = pa.concat_tables([shard.rows for shard in shards], promote_options="permissive")
    failed = pa.concat_tables([shard.failed for shard in shards])
    return Embeddings(
        image_emb=np.concatenate(images_emb),
        text_emb=None if texts_emb is None else np.concatenate(texts_emb),
        rows=_image_first(rows),
        failed=_image_first(failed).select(_FAILED.names),
    )


def classify(
    images: Images,
    labels: Sequence[str] | str,
    *,
    templates: str | Sequence[str] = DEFAULT_TEMPLATES,
    independent: bool = False,
    k: int = 5,
    model: str | None = None,
    encoder: Encoder | None = None,
    device: str = defaults.DEVICE,
) -> pa.Table:
    """The best labels of each image (zero-shot classification): one row per image, in order.

    labels: names, or one text with commas. templates: a named ensemble, or texts with one `{}` for the label.
    independent: a score of its own for each label instead of shares of 1 (see `zero_shot.labels.LabelScorer`).

    Columns: image, cf_label, cf_label_score, cf_labels (list of {label, score}, best first, at most k), cf_error_class,
    cf_error.
    """
    from clipfilter.evaluation import read_templates
    from clipfilter.operations import CLASSIFIED, classify_stream
    from clipfilter.policies import LabelScorer, LabelSet, label_names

    inputs = open_inputs(_listed(images))
    phrasings = read_templates(templates) if isinstance(templates, str) else tuple(templates)
    wanted = LabelSet(label_names(labels), phrasings, independent=independent, top=k)
    encoder, options = _loaded(inputs, model, encoder, device)
    tables = list(classify_stream(inputs, LabelScorer(wanted, encoder), encoder, options))
    return pa.concat_tables([CLASSIFIED.empty_table(), *tables])


def search(run: str | Path, text: str | Sequence[str] = (), **options: Any) -> SearchResult:
    """The rows of a run nearest to texts and images: `hits` is an Arrow table with rank, cosine and the rows' columns.

    options: those of `clipfilter.search.Searcher` and its `search`: image (paths, URLs or bytes), uid, minus, k, where,
    columns, exact, encoder, ... For many queries keep a `Searcher` open.
    """
    from clipfilter.search import search_run

    return search_run(str(run), text, **options)


class Policy:
    """A policy, ready to decide. `model` is the policy itself (`clipfilter.policies.Policy`)."""

    def __init__(self, policy: PolicyModel) -> None:
        self.model = policy
        self.name = policy.name
        self.version = policy.version
        self.sha256 = policy.sha256

    def __repr__(self) -> str:
        return f"Policy({self.name!r}, version {self.version}, {len(self.model.rules)} rules)"

    @classmethod
    def load(cls, path_or_pack: str | Path) -> Policy:
        """The policy in this file, or the pack of this name. Raises RefusedError with line and column."""
        from clipfilter.policies import load_policy

        return cls(load_policy(path_or_pack))

    @classmethod
    def parse(cls, text: str) -> Policy:
        """The policy in this YAML text. Raises RefusedError with line and column."""
        from clipfilter.policies import parse_policy

        return cls(parse_policy(text))

    def decide(
        self,
        images: Images | None = None,
        *,
        captions: Sequence[str | None] | None = None,
        image_emb: np.ndarray | None = None,
        text_emb: np.ndarray | None = None,
        columns: pa.Table | None = None,
        model: str | None = None,
        encoder: Encoder | None = None,
        device: str = defaults.DEVICE,
    ) -> pa.Table:
        """Decide images, or embeddings that are there already: one row each, in order.

        captions: one per image, None where there is none; datasets and runs bring their own. image_emb [n, dim] and
        text_emb [n, dim], unit norm, of this very model, take the place of images; columns (n rows) then holds what
        metadata rules need (cf_width, cf_height, ...). Dataset-level rules rank the rows given here.

        Columns: image, cf_similarity, cf_score.<rule> of each rule, cf_decision (keep, review, reject; null where the
        image failed), cf_reasons (list of {rule, band, score, threshold, nearest, contrast, ...}), cf_error_class, cf_error.
        """
        from clipfilter.policies import compile_policy

        if (images is None) == (image_emb is None):
            raise ValueError("decide takes either images or image_emb")
        if images is None:
            assert image_emb is not None
            encoder = encoder or stream_options([], model, device=device)[0]
            shards: Iterable[EmbeddedShard] = [_given(encoder, image_emb, text_emb, captions, columns)]
        else:
            inputs = open_inputs(_listed(images))
            encoder, options = _loaded(inputs, model, encoder, device, text=True)
            shards = embed_stream(inputs, encoder, options)
            if captions is not None:
                shards = _captioned(shards, encoder, captions)
        compiled = compile_policy(self.model, encoder)
        return _decide(list(shards), encoder, compiled)


class Run:
    """A finished run, read-only. `versions` are its versions as JSON, oldest first; `version` is the newest one's totals,
    thresholds and commits; `plan` what was done, with the model's fingerprint."""

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self._run = runs.Run.open(self.url)
        self.plan: Plan = self._run.plan
        self.versions: list[dict[str, Any]] = [version.to_json() for version in self._run.versions()]
        self.version = self.versions[-1]
        self.totals: dict[str, Any] = self.version["totals"]

    def __repr__(self) -> str:
        return f"Run({self.url!r}, version {self.version['version']}, {self.totals['rows']:,} rows)"

    def rows(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The annotated rows as Arrow batches, shard by shard, in the order of the version; memory holds one batch.

        columns: names of some of them. A `pa.Table` of all: `pa.Table.from_batches(run.rows())`.
        """
        yield from (batch for _, batch in self._run.batches("annotated", columns))

    def failed(self) -> Iterator[pa.RecordBatch]:
        """The rows that failed, with cf_error_class and cf_error, in the same way."""
        yield from (batch for _, batch in self._run.batches("failed"))

    def embeddings(self) -> Iterator[np.ndarray]:
        """The image embeddings, float16 [rows, dim], in the order of `rows`: memory-mapped views of the files of each
        shard, so that nothing is read before it is used. (A run on an object store is fetched file by file.)"""
        with runs.RunVectors(self._run) as stored:
            for _, block in stored.blocks():
                yield block


def open_run(run: str | Path) -> Run:
    """Open a run directory (path or URL) for reading. Raises RefusedError when no finished run is there."""
    return Run(run)


def _listed(images: Any) -> list[Any]:
    """One image, or many, as a list."""
    if isinstance(images, str | Path | bytes | bytearray | memoryview) or hasattr(images, "getbands"):
        return [images]
    if isinstance(images, np.ndarray) and images.ndim < 4:
        return [images]
    return list(images)


def _loaded(
    inputs: Sequence[Any], model: str | None, encoder: Encoder | None, device: str, text: bool = False
) -> tuple[Encoder, StreamOptions]:
    if encoder is None:
        return stream_options(inputs, model, device=device, text=text)
    return encoder, _options(inputs, encoder, None, "fast", text)


def _options(inputs: Sequence[Any], encoder: Encoder, batch_size: int | None, decode: str, text: bool) -> StreamOptions:
    for item in inputs:
        if isinstance(item, StoredRun):
            refuse_other_weights(item.plan, encoder.fingerprint)
    return StreamOptions(batch_size=batch_size or 64, decode="exact" if decode == "exact" else "fast", text=text)


def _image_first(table: pa.Table) -> pa.Table:
    names = [cf.KEY, *(name for name in table.column_names if name not in (cf.KEY, cf.SHARD, cf.ROW))]
    return table.select(names).rename_columns(["image", *names[1:]])


def _text_emb(embeddings: pa.Table, dim: int) -> np.ndarray:
    if "text_emb" not in embeddings.column_names:
        return np.zeros((embeddings.num_rows, dim), np.float16)
    found = as_matrix(embeddings["text_emb"], dim)
    missing = np.asarray(embeddings["text_emb"].is_null())
    return np.where(missing[:, None], np.float16(0), found)


def _given(
    encoder: Encoder,
    image_emb: np.ndarray,
    text_emb: np.ndarray | None,
    captions: Sequence[str | None] | None,
    columns: pa.Table | None,
) -> EmbeddedShard:
    """Embeddings that a caller brings, as the shard that a run would have made of their images."""
    image_emb = _unit_half(image_emb, encoder.dim, "image_emb")
    n = len(image_emb)
    for name, value in (("text_emb", text_emb), ("captions", captions)):
        if value is not None and len(value) != n:
            raise ValueError(f"there are {n} embeddings, but {len(value)} {name}")
    if columns is not None and columns.num_rows != n:
        raise ValueError(f"there are {n} embeddings, but {columns.num_rows} rows of columns")
    facts = {} if columns is None else {name: columns[name] for name in columns.column_names}
    numbers = pa.array(np.arange(n))
    rows = {cf.KEY: pa.array([str(i) for i in range(n)], pa.string()), **facts, cf.ROW: numbers}
    store = {name: facts.get(name, pa.nulls(n, FACTS.field(name).type)) for name in FACTS.names}
    store |= {cf.ROW: numbers, "image_emb": vector_column(image_emb)}
    if text_emb is not None:
        store["text_emb"] = vector_column(_unit_half(text_emb, encoder.dim, "text_emb"))
    shard = EmbeddedShard(pa.table(rows), pa.table(store), _no_failures(), 0, 0)
    return shard if captions is None else _with_captions(shard, encoder, list(captions))


def _unit_half(emb: np.ndarray, dim: int, name: str) -> np.ndarray:
    emb = np.asarray(emb)
    if emb.ndim != 2 or emb.shape[1] != dim:
        raise ValueError(f"{name} has the shape {list(emb.shape)}; this model's embeddings are [n, {dim}]")
    norms = np.linalg.norm(emb.astype(np.float32), axis=1)
    if not np.allclose(norms, 1, atol=0.01):
        raise ValueError(f"{name} must have unit norm; divide each row by its length")
    return emb.astype(np.float16)


def _captioned(
    shards: Iterable[EmbeddedShard], encoder: Encoder, captions: Sequence[str | None]
) -> Iterator[EmbeddedShard]:
    """Shards of images with captions from a list in the order of the images, failed ones counted too."""
    left = list(captions)
    for shard in shards:
        numbers = np.concatenate([np.asarray(shard.rows[cf.ROW]), np.asarray(shard.failed[cf.ROW])])
        own, left = left[: len(numbers)], left[len(numbers) :]
        if len(own) != len(numbers):
            raise ValueError("there are fewer captions than images")
        place = np.argsort(np.argsort(numbers, kind="stable"), kind="stable")[: shard.rows.num_rows]
        yield _with_captions(shard, encoder, [own[i] for i in place])
    if left:
        raise ValueError("there are more captions than images")


def _with_captions(shard: EmbeddedShard, encoder: Encoder, captions: list[str | None]) -> EmbeddedShard:
    has = np.array([bool(text and text.strip()) for text in captions], bool)
    emb = np.zeros((len(captions), encoder.dim), np.float16)
    if has.any():
        emb[has] = encoder.encode_texts([text for text in captions if text and text.strip()]).astype(np.float16)
    return shard.with_captions(captions, emb, has)


def _no_failures() -> pa.Table:
    from clipfilter.runs import FAILED

    return FAILED.empty_table()


def _decide(shards: list[EmbeddedShard], encoder: Encoder, compiled: Any) -> pa.Table:
    """All shards decided, dataset-level thresholds taken over all of them; rows in their order, failed ones among them."""
    thresholds: dict[str, float | None] = {}
    if compiled.dataset_rules:
        from clipfilter.policies import dataset_thresholds

        scored = [annotate(shard.rows, shard.embeddings, encoder, compiled, None) for shard in shards]
        chunks: Callable[[str], Iterable[np.ndarray]] = lambda rule: (  # noqa: E731
            np.asarray(table[cf.score(rule)].to_numpy(), np.float32) for table in scored
        )
        thresholds = dataset_thresholds(compiled, chunks)[0]
    parts = []
    for shard in shards:
        table = annotate(shard.rows, shard.embeddings, encoder, compiled, thresholds)
        wanted = [cf.ROW, cf.KEY, cf.SIMILARITY, *compiled.score_columns, cf.DECISION, cf.REASONS]
        good = table.select(wanted).replace_schema_metadata(None)
        bad = shard.failed.select([cf.ROW, cf.KEY, cf.ERROR_CLASS, cf.ERROR])
        parts.append(pa.concat_tables([good, bad], promote_options="default").sort_by(cf.ROW))
    return pa.concat_tables(parts).rename_columns({cf.KEY: "image"}).drop_columns([cf.ROW])
