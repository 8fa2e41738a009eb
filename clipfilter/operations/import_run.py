"""`import`: embeddings that exist already (clip-retrieval's, DataComp's npz) become a run, as if `embed` had made it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter import columns as cf
from clipfilter import defaults
from clipfilter.errors import ENCODE_ERROR, RefusedError, RowError
from clipfilter.runs import (
    FACTS,
    IDENTITY,
    Account,
    Counts,
    Plan,
    ShardWriter,
    annotate,
    embeddings_schema,
    failed_table,
    finish_run,
    ledger,
    settle_plan,
    vector_column,
)
from clipfilter.sources import (
    IMPORTED_KIND,
    Imported,
    Location,
    Seen,
    Shard,
    Source,
    SourceOptions,
    freeze,
    row_uid,
    shard_id,
    travel_name,
)
from clipfilter.storage import Directory, etag

if TYPE_CHECKING:
    from clipfilter.models import Encoder

_CAPTIONS = ("caption", "text", "TEXT")
_KEYS = ("key", "image_path", "url", "URL")
#: Vectors whose length is further from 1 are normalised; those nearer keep their bits.
_UNIT = 1e-3


@dataclass(frozen=True)
class ImportOptions:
    """model: who made the embeddings. arrays: prefix of the npz arrays (l14, b32). Columns: None means find out."""

    model: str
    arrays: str | None = None
    caption_column: str | None = None
    uid_column: str | None = None
    key_column: str | None = None
    rows_per_shard: int = defaults.ROWS_PER_SHARD


@dataclass(frozen=True)
class _Part:
    """One metadata file and where the embeddings of its rows are. text: None where there are none."""

    metadata: str
    image: str
    text: str | None
    rows: int
    size: int
    etag: str


def import_embeddings(folder: str, out: str, options: ImportOptions) -> dict[str, Any]:
    """Write the run `out` from a folder of embeddings and metadata that are aligned by position.

    Known layouts: `img_emb/img_emb_N.npy` with `metadata/metadata_N.parquet` and perhaps `text_emb/text_emb_N.npy`
    (clip-retrieval, any padding of N), and `X.npz` with `X.parquet` (DataComp: arrays `l14_img`, `l14_txt`, `b32_img`,
    ...). The model is loaded for its fingerprint, and its size must be that of the embeddings. Vectors become float16 of
    unit norm; a zero or non-finite image vector is a failed row, such a text vector a missing caption. Nothing is ever
    unpickled. Memory: one shard, for npz one array. Repeating an interrupted call resumes it. Returns {"out", "version",
    "totals"}. Raises RefusedError before anything is written where the folder or the model does not fit.
    """
    from clipfilter.models import load_encoder

    directory, target = Directory(folder), Directory(out)
    if target.url == directory.url or target.url.startswith(directory.url + "/"):
        raise RefusedError(f"--out {target.url} lies in the folder that is imported; name another directory.")
    if options.rows_per_shard < 1:
        raise RefusedError(f"--rows-per-shard is 1 or more, not {options.rows_per_shard}.")
    encoder = load_encoder(options.model, device="cpu")
    parts = _find(directory, encoder.dim, options)
    schema, names = _columns(directory, parts, options)
    text = any(part.text for part in parts)
    form = {"kind": IMPORTED_KIND, "has_captions": text or names["caption"] is not None, "columns": names}
    source = Source(directory.url, Imported(Location(directory.url), SourceOptions(), freeze(schema), form))
    plan = settle_plan(target, _plan(source, encoder, options, text))
    writer = _Writer(target, plan, encoder, names, source, text)
    done = ledger.list_commits(target)
    committed: list[str] = []
    with target:
        for part in parts:
            with _opened(directory, part, target) as (image, text_emb):
                for shard, rows in _shards(directory, part, schema, options.rows_per_shard):
                    name = ledger.CommitName(shard.id, "embedded", 1)
                    committed.append(name.path)
                    if (shard.id, "embedded") not in done:
                        here = slice(shard.start, shard.stop)
                        texts = None if text_emb is None else text_emb[here]
                        writer.write(shard, rows, image[here], texts)
        return finish_run(target, plan, committed, [])


def _plan(source: Source, encoder: Encoder, options: ImportOptions, text: bool) -> Plan:
    """The run's plan; the pixels were prepared by the model's own transform, so decode is "exact"."""
    given = {"rows_per_shard": options.rows_per_shard, "arrays": options.arrays}
    unknown = dict.fromkeys(("max_pixels", "limit", "sample"))
    return Plan(
        job="import",
        source=source.to_plan(),
        policy=None,
        policy_sha256=None,
        model={name: value for name, value in encoder.fingerprint.items() if name != "backend"},
        options={"decode": "exact", "batch_size": None, "captions": "first", **unknown, "copy": False, **given},
        text_column=text,
    )


# --- finding and checking ------------------------------------------------------------------------------------------


def _find(directory: Directory, dim: int, options: ImportOptions) -> list[_Part]:
    names = directory.names("")
    if "img_emb" in names:
        return _clip_retrieval(directory, dim, options.model)
    pairs = [name for name in names if name.endswith(".parquet") and name.removesuffix(".parquet") + ".npz" in names]
    if not pairs:
        raise RefusedError(
            f"{directory.url} has neither img_emb/ (clip-retrieval) nor .parquet files with .npz beside them (DataComp)."
        )
    return [_npz(directory, name, dim, options) for name in pairs]


def _clip_retrieval(directory: Directory, dim: int, model: str) -> list[_Part]:
    image, text, metadata = (
        _numbered(directory, folder, pattern)
        for folder, pattern in (
            ("img_emb", r"img_emb_(\d+)\.npy"),
            ("text_emb", r"text_emb_(\d+)\.npy"),
            ("metadata", r"metadata_(\d+)\.parquet"),
        )
    )
    if not image:
        raise RefusedError(f"{directory.url}/img_emb holds no img_emb_N.npy files.")
    if set(image) != set(metadata) or (text and set(text) != set(image)):
        numbers = sorted(set(image) ^ set(metadata) or set(image) ^ set(text))
        raise RefusedError(
            f"{directory.url} lacks files: embeddings and metadata do not all exist for number {numbers[0]}."
        )
    parts = []
    for number in sorted(image):
        rows = _parquet(directory, metadata[number]).metadata.num_rows
        for name in (image[number], text.get(number)):
            if name is not None:
                with directory.open(name) as handle:
                    _check_header(_npy_header(handle, name), name, rows, dim, model)
        info = directory.fs.info(directory.path(image[number]))
        parts.append(_Part(metadata[number], image[number], text.get(number), rows, int(info["size"]), etag(info)))
    return parts


def _numbered(directory: Directory, folder: str, pattern: str) -> dict[int, str]:
    found: dict[int, str] = {}
    for name in directory.names(folder):
        match = re.fullmatch(pattern, name)
        if match and found.setdefault(int(match[1]), f"{folder}/{name}") != f"{folder}/{name}":
            raise RefusedError(f"{directory.url}/{folder} has two files of number {int(match[1])}.")
    return found


def _npz(directory: Directory, name: str, dim: int, options: ImportOptions) -> _Part:
    import zipfile

    file = name.removesuffix(".parquet") + ".npz"
    rows = _parquet(directory, name).metadata.num_rows
    try:
        with directory.open(file) as handle, zipfile.ZipFile(handle) as archive:
            headers = {}
            for entry in archive.namelist():
                with archive.open(entry) as member:
                    headers[entry.removesuffix(".npy")] = _npy_header(member, f"{file}:{entry}")
    except zipfile.BadZipFile as error:
        raise RefusedError(f"{file} is no npz file ({error}).") from error
    prefixes = [key.removesuffix("_img") for key, (shape, _) in headers.items() if key.endswith("_img")]
    fitting = [p for p in prefixes if len(headers[f"{p}_img"][0]) == 2 and headers[f"{p}_img"][0][1] == dim]
    chosen = options.arrays or (fitting[0] if len(fitting) == 1 else None)
    if chosen is None or f"{chosen}_img" not in headers:
        raise RefusedError(
            f"{file} has the arrays {', '.join(headers)}; name the pair of {options.model} ({dim} numbers) with --arrays."
        )
    text = f"{chosen}_txt" if f"{chosen}_txt" in headers else None
    for key in (f"{chosen}_img", text):
        if key is not None:
            _check_header(headers[key], f"{file}:{key}", rows, dim, options.model)
    info = directory.fs.info(directory.path(file))
    return _Part(name, f"{file}:{chosen}_img", text and f"{file}:{text}", rows, int(info["size"]), etag(info))


def _npy_header(handle: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(handle)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(handle)
    except ValueError as error:
        raise RefusedError(f"{name} is not a .npy array that can be read safely ({error}).") from error
    return shape, dtype


def _check_header(header: tuple[tuple[int, ...], np.dtype[Any]], name: str, rows: int, dim: int, model: str) -> None:
    shape, dtype = header
    if len(shape) != 2 or dtype.kind != "f":
        raise RefusedError(f"{name} holds {dtype} {list(shape)}, not one row of floats per image.")
    if shape[1] != dim:
        raise RefusedError(f"{name} has {shape[1]} numbers per row, {model} makes {dim}; name the right --model.")
    if shape[0] != rows:
        raise RefusedError(f"{name} has {shape[0]:,} rows, its metadata {rows:,}; they must be aligned.")


def _parquet(directory: Directory, name: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(directory.open(name))
    except pa.ArrowException as error:
        raise RefusedError(f"{name} is not a readable Parquet file ({error}).") from error


def _columns(
    directory: Directory, parts: list[_Part], options: ImportOptions
) -> tuple[pa.Schema, dict[str, str | None]]:
    """The schema that all metadata files have, and which of its columns are caption, uid, key, sizes and hash."""
    schema: pa.Schema | None = None
    for part in parts:
        own = _parquet(directory, part.metadata).schema_arrow.remove_metadata()
        if schema is None:
            schema = own
        elif not own.equals(schema):
            raise RefusedError(f"{part.metadata} has other columns than {parts[0].metadata}; import them apart.")
    assert schema is not None
    have = schema

    def choose(given: str | None, flag: str, guesses: tuple[str, ...]) -> str | None:
        if given is not None and given not in have.names:
            raise RefusedError(f"the metadata has no column {given!r} ({flag}); it has {', '.join(have.names)[:300]}.")
        return given or next((name for name in guesses if name in have.names), None)

    pairs = (("original_width", "original_height"), ("width", "height"), (cf.WIDTH, cf.HEIGHT))
    sizes = next((pair for pair in pairs if set(pair) <= set(have.names)), pairs[0])
    return schema, {
        "caption": choose(options.caption_column, "--caption-column", _CAPTIONS),
        "uid": choose(options.uid_column, "--uid-column", ("uid", cf.UID)),
        "key": choose(options.key_column, "--key-column", _KEYS),
        "width": choose(None, "", sizes[:1]),
        "height": choose(None, "", sizes[1:]),
        "sha256": choose(None, "", ("sha256", cf.SHA256)),
    }


# --- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(directory: Directory, part: _Part, target: Directory) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The image and text vectors of a part, memory-mapped where they are .npy files."""
    with ExitStack() as stack:

        def load(name: str) -> np.ndarray:
            file, _, array = name.partition(":")
            if array:
                with directory.open(file) as handle, np.load(handle, allow_pickle=False) as arrays:
                    return np.asarray(arrays[array])
            path = stack.enter_context(directory.fetched(file, target.scratch()))
            return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))

        yield load(part.image), None if part.text is None else load(part.text)


def _shards(directory: Directory, part: _Part, schema: pa.Schema, size: int) -> Iterator[tuple[Shard, pa.Table]]:
    """Ranges of a part's rows with their metadata; the file is streamed."""
    path = part.image.partition(":")[0]
    pending: list[pa.Table] = []
    held = start = 0

    def take(rows: int) -> pa.Table:
        nonlocal pending, held
        whole = pa.concat_tables(pending)
        pending, held = [whole.slice(rows)], held - rows
        return whole.slice(0, rows)

    for batch in _parquet(directory, part.metadata).iter_batches(size):
        pending.append(pa.Table.from_batches([batch]).cast(schema))
        held += batch.num_rows
        while held >= size or (held and start + held == part.rows):
            rows = min(size, held)
            stop = start + rows
            id = shard_id(path, start, stop)
            yield Shard(id, path, "parquet", start, stop, size=part.size, etag=part.etag), take(rows)
            start = stop


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Writer:
    """What every shard is written with. names: what the metadata's columns are used as; text: whether there are texts."""

    target: Directory
    plan: Plan
    encoder: Encoder
    names: dict[str, str | None]
    source: Source
    text: bool

    def write(self, shard: Shard, metadata: pa.Table, image: np.ndarray, text: np.ndarray | None) -> None:
        """Write and commit one shard: aligned metadata, image vectors [n, d] and text vectors (None: not in this part)."""
        rows, store, failed = self._tables(shard, metadata, image, text)
        with ShardWriter(self.target, shard, None) as writer:
            writer.embeddings(store)
            writer.failed(failed)
            writer.annotated(annotate(rows, store, self.encoder, None, None), final=True)
            count = failed.num_rows
            counts = Counts(rows=metadata.num_rows, failed=count, embedded=rows.num_rows)
            account = Account(counts, {ENCODE_ERROR: count} if count else {}, seen=Seen(rows=counts.rows))
            writer.commit(account, stage="embedded", plan=self.plan.sha256)

    def _tables(
        self, shard: Shard, metadata: pa.Table, image: np.ndarray, text: np.ndarray | None
    ) -> tuple[pa.Table, pa.Table, pa.Table]:
        """Rows, embeddings (equally long) and failed rows."""
        n = metadata.num_rows
        identity = _identity(shard, metadata, self.names)
        image_emb, good = _unit(image)
        columns = {name: identity[name] for name in (cf.SHARD, cf.ROW, cf.UID)}
        columns["image_emb"] = vector_column(image_emb)
        if self.text:
            text_emb, usable = (np.zeros_like(image_emb), np.zeros(n, bool)) if text is None else _unit(text)
            if self.names["caption"] is not None:
                usable &= np.asarray(identity[cf.CAPTION].is_valid())
            columns["text_emb"] = vector_column(text_emb, usable)
        for fact in FACTS:
            columns[fact.name] = identity.get(fact.name, pa.nulls(n, fact.type))
        store = pa.table({name: columns[name] for name in embeddings_schema(self.encoder.dim, self.text).names})
        travelling = metadata.rename_columns([travel_name(column) for column in metadata.column_names])
        rows = pa.table({name: travelling[name] for name in self.source.schema.names} | identity)
        problem = RowError(ENCODE_ERROR, "the embedding is zero or not finite")
        failed = rows.filter(pa.array(~good))
        return (
            rows.filter(pa.array(good)).combine_chunks(),
            store.filter(pa.array(good)).combine_chunks(),
            failed_table(shard.id, failed, [problem] * failed.num_rows),
        )


def _unit(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(float16 [n, d] of unit norm, which rows could be used bool [n]); rows that have unit norm keep their bits."""
    exact = np.asarray(values, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(exact.astype(np.float64), axis=1)
    good = np.isfinite(norms) & (norms > 0)
    scale = np.where(good & (np.abs(norms - 1) > _UNIT), norms, 1.0)
    result = np.where(good[:, None], exact / scale[:, None], 0.0).astype(np.float16)
    return result, good


def _identity(shard: Shard, rows: pa.Table, names: dict[str, str | None]) -> dict[str, pa.Array]:
    n = rows.num_rows

    def column(what: str, kind: pa.DataType) -> pa.Array | None:
        name = names[what]
        if name is None:
            return None
        values = rows[name].combine_chunks()
        try:
            return values.cast(kind, safe=pa.types.is_string(kind))
        except pa.ArrowException as error:
            raise RefusedError(f"the column {name!r} cannot be used as {what} ({error}).") from error

    key = column("key", pa.string())
    numbers = [str(shard.start + row) for row in range(n)]
    uid = column("uid", pa.string())
    hashed: Callable[[], pa.Array] = lambda: pa.array([row_uid(shard.path, number) for number in numbers])  # noqa: E731
    caption = column("caption", pa.string())
    if caption is not None:
        blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(caption)), 0)
        caption = pc.if_else(blank, pa.scalar(None, pa.string()), caption)
    sizes = {what: column(what, pa.int32()) for what in ("width", "height")}
    found = {
        cf.SHARD: pa.array([shard.id] * n, pa.string()),
        cf.ROW: pa.array(np.arange(n), pa.int64()),
        cf.KEY: pa.array(numbers) if key is None else pc.coalesce(key, pa.array(numbers)),
        cf.UID: hashed() if uid is None else (pc.coalesce(uid, hashed()) if uid.null_count else uid),
        cf.SHA256: column("sha256", pa.string()),
        cf.WIDTH: sizes["width"],
        cf.HEIGHT: sizes["height"],
        cf.FORMAT: None,
        cf.CAPTION: caption,
        cf.SOURCE_JSON: None,
    }
    return {
        field.name: pa.nulls(n, field.type) if found[field.name] is None else found[field.name] for field in IDENTITY
    }
