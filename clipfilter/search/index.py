"""The approximate index of a run: one segment per shard, made once, listed by create-only manifests.

    INDEX/manifests/000001.json            what the index holds: model, quantizer, one entry per shard; the newest counts
    INDEX/quantizer-<h>.arrow              centroids of the lists (rows "centroid") and the range of the codes ("low", "span")
    INDEX/segments/<shard>-<h>.arrow       of each row of a shard: its list, its row, its code of one byte per dimension

`<h>` are the first 16 hex digits of the file's sha256. It is the inverted file of Sivic and Zisserman (2003) with scalar
quantization, as faiss computes it; the files are plain Arrow, so that nothing but numbers is ever read from them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipfilter.errors import ClipfilterError, RefusedError
from clipfilter.models.heads import cache_folder
from clipfilter.runs import HASH_LENGTH, RunVectors
from clipfilter.storage import Directory, file_sha256, join
from clipfilter.version import __version__

#: Below this many rows exact search is fast enough, and needs no index.
EXACT_ROWS = 1_000_000
FORMAT = 1
FOLDER = "index"
#: Rows per list that the centroids are trained on, and their iterations of k-means.
_TRAINING_ROWS = 40
_ITERATIONS = 8
_SEED = 20_260_101
#: Lists are made anew when the rows call for this many times as many as there are.
_OUTGROWN = 4
_MOST_LISTS = 65_536
ANEW = "make it anew with `clipfilter index --rebuild`"
_MANIFEST = re.compile(r"\d{6}\.json")
_NAMES = {
    "quantizer": re.compile(rf"quantizer-[0-9a-f]{{{HASH_LENGTH}}}\.arrow"),
    "segment": re.compile(rf"segments/[0-9a-f]{{16}}-[0-9a-f]{{{HASH_LENGTH}}}\.arrow"),
}


class IndexUnusableError(ClipfilterError):
    """The index is damaged or belongs to something else; the text says what is wrong and what to do."""


@dataclass(frozen=True)
class Segment:
    """One shard in the index. commit: the commit that it was made for; embeddings: sha256 of the vectors' file, which is
    what a run's shard is recognised by. The rest describes the segment's own file."""

    commit: str
    embeddings: str
    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What one state of an index holds. quantizer: name, bytes and sha256; trained_rows: how many rows the run had then."""

    model: dict[str, Any]
    dim: int
    lists: int
    trained_rows: int
    quantizer: dict[str, Any]
    run: str
    version: str
    segments: tuple[Segment, ...]
    format: int = FORMAT
    created_by: str = field(default=f"clipfilter {__version__}", compare=False)

    @property
    def rows(self) -> int:
        return sum(segment.rows for segment in self.segments)

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class IndexResult:
    """What `build_index` did. segments_new: made now; segments_dropped: no longer in the run. manifest: its number."""

    to: str
    manifest: int
    rows: int
    lists: int
    segments: int
    segments_new: int
    segments_dropped: int
    bytes: int
    retrained: bool


def index_url(run_url: str, to: str | None) -> str:
    """Where the index of a run is: `to`, else the folder `index` in the run directory."""
    return to if to is not None else join(run_url, FOLDER)


def build_index(
    run: str,
    to: str | None = None,
    *,
    rebuild: bool = False,
    on_rows: Callable[[int, int], None] | None = None,
) -> IndexResult:
    """Make or update the approximate index of the newest version of `run`, in `to` or beside the run.

    Segments of shards that are there already are kept; new shards get theirs, those of superseded shards are left out.
    rebuild: train and encode anew. on_rows: told (rows done, rows to do). Memory: the training sample, then that of one
    shard.
    Raises RefusedError when faiss is missing, or `to` holds the index of another model or is no index.
    """
    require_faiss()
    with RunVectors.open(run) as vectors:
        directory = Directory(index_url(vectors.url, to))
        with directory:
            return _build(vectors, directory, rebuild, on_rows)


def require_faiss() -> Any:
    """The faiss module. Raises RefusedError with the way to install it."""
    try:
        import faiss
    except ImportError as error:
        raise RefusedError(
            "the approximate index needs faiss: install it with `pip install 'clipfilter[search]'`, or search exactly."
        ) from error
    return faiss


def identity(model: dict[str, Any]) -> dict[str, Any]:
    """The part of a model's fingerprint that an index is bound to."""
    return {name: model.get(name) for name in ("model", "architecture", "weights_sha256", "preprocess")}


def latest_manifest(directory: Directory) -> tuple[int, Manifest] | None:
    """Number and content of the newest manifest, None where there is no index.

    Raises IndexUnusableError for one that cannot be read.
    """
    names = [name for name in directory.names("manifests") if _MANIFEST.fullmatch(name)]
    if not names:
        return None
    try:
        value = directory.read_json(f"manifests/{names[-1]}")
        if value.pop("format") != FORMAT:
            raise IndexUnusableError(f"the index in {directory.url} was written in another format; {ANEW}.")
        segments = tuple(Segment(**segment) for segment in value.pop("segments"))
        manifest = Manifest(**value, segments=segments)
        named = [(manifest.quantizer["name"], "quantizer"), *((segment.name, "segment") for segment in segments)]
        if any(not _NAMES[kind].fullmatch(name) for name, kind in named):
            raise ValueError("a file name")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise IndexUnusableError(
            f"the index in {directory.url} has a damaged manifest ({names[-1]}: {error}); {ANEW}."
        ) from error
    return int(names[-1][:6]), manifest


def _build(
    vectors: RunVectors,
    directory: Directory,
    rebuild: bool,
    on_rows: Callable[[int, int], None] | None,
) -> IndexResult:
    found = _existing(vectors, directory, rebuild)
    wanted = default_lists(vectors.rows)
    old = found[1] if found and not rebuild and wanted < _OUTGROWN * found[1].lists else None
    if old is not None:
        quantizer = Quantizer.read(directory, old)
        manifest_quantizer, trained_rows = old.quantizer, old.trained_rows
    else:
        quantizer = Quantizer.train(vectors, wanted)
        manifest_quantizer, trained_rows = quantizer.write(directory), vectors.rows
    have = {segment.embeddings: segment for segment in old.segments} if old is not None else {}
    segments = _segments(vectors, quantizer, directory, have, on_rows)
    manifest = Manifest(
        model=identity(vectors.plan.model),
        dim=vectors.dim,
        lists=quantizer.lists,
        trained_rows=trained_rows,
        quantizer=manifest_quantizer,
        run=vectors.url,
        version=vectors.version,
        segments=tuple(segments.values()),
    )
    number = _append(directory, manifest, found)
    return IndexResult(
        to=directory.url,
        manifest=number,
        rows=manifest.rows,
        lists=manifest.lists,
        segments=len(manifest.segments),
        segments_new=len(set(segments) - set(have)),
        segments_dropped=len(set(have) - set(segments)),
        bytes=manifest.quantizer["bytes"] + sum(segment.bytes for segment in manifest.segments),
        retrained=old is None,
    )


def _segments(
    vectors: RunVectors,
    quantizer: Quantizer,
    directory: Directory,
    have: dict[str, Segment],
    on_rows: Callable[[int, int], None] | None,
) -> dict[str, Segment]:
    """The segments of the run's shards, by the sha256 of their embeddings; those that are not in `have` are made."""
    todo = sum(shard.rows for shard in vectors.shards if shard.embeddings.sha256 not in have)
    done = 0
    segments: dict[str, Segment] = {}
    for number, shard in enumerate(vectors.shards):
        key = shard.embeddings.sha256
        if key in have:
            segments[key] = have[key]
            continue
        if key not in segments:
            segments[key] = _segment(vectors, number, quantizer, directory)
        done += shard.rows
        if on_rows is not None:
            on_rows(done, todo)
    return segments


def _existing(vectors: RunVectors, directory: Directory, rebuild: bool) -> tuple[int, Manifest] | None:
    """The manifest to go on from. Raises RefusedError for an index of another model, or a folder that is none."""
    try:
        found = latest_manifest(directory)
    except IndexUnusableError as error:
        if rebuild:
            return None
        raise RefusedError(str(error)) from error
    if found is None:
        others = directory.names("")
        if others and others != ["segments"]:
            raise RefusedError(
                f"{directory.url} holds other files ({', '.join(others[:3])}) and no index; choose a new or empty directory."
            )
        return None
    theirs, ours = found[1].model, identity(vectors.plan.model)
    if theirs != ours or found[1].dim != vectors.dim:
        raise RefusedError(
            f"{directory.url} is an index of embeddings by {_named(theirs)}, and {vectors.url} was embedded by "
            f"{_named(ours)}; choose another --index."
        )
    return found


def _named(model: dict[str, Any]) -> str:
    return f"{model.get('model')} (weights {str(model.get('weights_sha256'))[:12]})"


def _append(directory: Directory, manifest: Manifest, found: tuple[int, Manifest] | None) -> int:
    """Write the next manifest unless the newest already says the same; another process may have been first."""
    number, newest = found or (0, None)
    if newest == manifest:
        return number
    while not directory.create(f"manifests/{number + 1:06d}.json", manifest.to_bytes()):
        number += 1
    return number + 1


def default_lists(rows: int) -> int:
    """How many lists: the power of two nearest to twice the root of the rows, 16 or more."""
    return int(min(max(2 ** round(np.log2(2 * np.sqrt(rows))), 16), _MOST_LISTS))


@contextlib.contextmanager
def verified(directory: Directory, file: dict[str, Any]) -> Iterator[Path]:
    """A local path of an index file whose size and sha256 are those of its manifest; remote files are kept in the cache.

    Raises IndexUnusableError when it is missing or another.
    """
    name = file["name"]
    if directory.local:
        path = Path(directory.path(name))
    else:
        # Names hold the content's hash, so a copy is good for ever; whoever needs the space may delete it.
        path = cache_folder().parent / "index" / name.rsplit("/", 1)[-1]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f"{path.name}.{os.getpid()}.part")
            with contextlib.suppress(FileNotFoundError):
                directory.fs.get_file(directory.path(name), str(partial))
                partial.replace(path)
    if not path.exists():
        raise IndexUnusableError(f"{name} is missing from the index in {directory.url}; {ANEW}.")
    if path.stat().st_size != file["bytes"] or file_sha256(path) != file["sha256"]:
        if not directory.local:
            path.unlink()
        raise IndexUnusableError(f"{name} of the index in {directory.url} is not what its manifest says; {ANEW}.")
    yield path


class Quantizer:
    """Which list a vector belongs to, and its code: centroids float32 [lists, dim], unit norm; span float32 [2, dim], the
    lowest value and the width of the range that each dimension's byte divides."""

    def __init__(self, centroids: np.ndarray, span: np.ndarray) -> None:
        faiss = require_faiss()
        self.centroids = np.ascontiguousarray(centroids, np.float32)
        self.span = np.ascontiguousarray(span, np.float32)
        self.lists, self.dim = self.centroids.shape
        self.coarse = faiss.IndexFlatIP(self.dim)
        self.coarse.add(self.centroids)
        self.scalar = faiss.ScalarQuantizer(self.dim, faiss.ScalarQuantizer.QT_8bit)
        faiss.copy_array_to_vector(self.span.reshape(-1), self.scalar.trained)

    @classmethod
    def train(cls, vectors: RunVectors, lists: int) -> Quantizer:
        """Spherical k-means on rows taken evenly from the run."""
        faiss = require_faiss()
        lists = min(lists, max(1, vectors.rows // 2))
        count = min(vectors.rows, _TRAINING_ROWS * lists)
        places = np.unique(np.linspace(0, vectors.rows - 1, count).astype(np.int64))
        sample = vectors.vectors_at(places).astype(np.float32)
        kmeans = faiss.Kmeans(
            vectors.dim, lists, niter=_ITERATIONS, spherical=True, seed=_SEED, min_points_per_centroid=1,
            max_points_per_centroid=_TRAINING_ROWS,
        )  # fmt: skip
        kmeans.train(sample)
        low, high = sample.min(axis=0), sample.max(axis=0)
        return cls(kmeans.centroids, np.stack([low, np.maximum(high - low, 1e-6)]))

    @classmethod
    def read(cls, directory: Directory, manifest: Manifest) -> Quantizer:
        """Raises IndexUnusableError when the file is not what the manifest says."""
        with verified(directory, manifest.quantizer) as path, pa.memory_map(str(path)) as handle:
            table = pa.ipc.open_file(handle).read_all()
            expected = pa.schema([("kind", pa.string()), ("values", pa.list_(pa.float32(), manifest.dim))])
            kinds = ["centroid"] * manifest.lists + ["low", "span"]
            if table.schema != expected or table["kind"].to_pylist() != kinds:
                raise IndexUnusableError(f"{manifest.quantizer['name']} is not the quantizer its manifest describes.")
            values = table["values"].combine_chunks().flatten().to_numpy().reshape(-1, manifest.dim).copy()
        if not np.isfinite(values).all():
            raise IndexUnusableError(f"{manifest.quantizer['name']} holds values that are no numbers.")
        return cls(values[:-2], values[-2:])

    def write(self, directory: Directory) -> dict[str, Any]:
        """Publish as a content-named file; name, bytes and sha256."""
        values = np.concatenate([self.centroids, self.span])
        kinds = ["centroid"] * self.lists + ["low", "span"]
        table = pa.table(
            {
                "kind": pa.array(kinds, pa.string()),
                "values": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), self.dim),
            },
            schema=pa.schema([("kind", pa.string()), ("values", pa.list_(pa.float32(), self.dim))]),
        )
        return _publish(directory, table, "quantizer")

    def encode(self, block: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(list int32 [n], codes uint8 [n, dim]) of float16 [n, dim]."""
        rows = block.astype(np.float32)
        return self.coarse.search(rows, 1)[1][:, 0].astype(np.int32), self.scalar.compute_codes(rows)


def _segment(vectors: RunVectors, number: int, quantizer: Quantizer, directory: Directory) -> Segment:
    """Encode one shard and publish its segment, sorted by list and row."""
    shard = vectors.shards[number]
    parts = [quantizer.encode(block) for _, block in vectors.shard_blocks(number)]
    lists, codes = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    order = np.argsort(lists, kind="stable").astype(np.int32)
    flat = pa.py_buffer(np.ascontiguousarray(codes[order]))
    table = pa.table(
        {
            "list": pa.array(lists[order]),
            "row": pa.array(order),
            "code": pa.FixedSizeBinaryArray.from_buffers(pa.binary(quantizer.dim), len(order), [None, flat]),
        }
    )
    file = _publish(directory, table, f"segments/{shard.shard.id}")
    return Segment(commit=shard.name, embeddings=shard.embeddings.sha256, rows=shard.rows, **file)


def _publish(directory: Directory, table: pa.Table, stem: str) -> dict[str, Any]:
    path = directory.scratch() / stem.replace("/", "-")
    with pa.OSFile(str(path), "wb") as handle, pa.ipc.new_file(handle, table.schema) as writer:
        writer.write_table(table)
    sha256, size = file_sha256(path), path.stat().st_size
    name = f"{stem}-{sha256[:HASH_LENGTH]}.arrow"
    directory.publish(path, name)
    path.unlink(missing_ok=True)
    return {"name": name, "bytes": size, "sha256": sha256}


def has_index(run_url: str, to: str | None) -> bool:
    """Whether there is an index to update."""
    return bool(Directory(index_url(run_url, to)).names("manifests"))
