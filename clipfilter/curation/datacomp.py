"""DataComp's filtering baselines on DataComp's own metadata, and the uid subset they keep.

Source of every rule: mlfoundations/datacomp, baselines/apply_filter.py (Gadre et al. 2023, arXiv 2304.14108). The one
difference: the language of a caption is a column of the metadata where it has one, so that results can be exact
whatever detector made it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter.curation.arrays import load_matrix
from clipfilter.curation.clusters import nearest_centroids
from clipfilter.curation.language import is_english
from clipfilter.curation.uids import HALVES, uid_halves
from clipfilter.curation.wordnet import WordNet, read_entities
from clipfilter.errors import RefusedError
from clipfilter.policies import Threshold, fraction_threshold
from clipfilter.storage import Directory, directory_of, normalise

Arch = Literal["l14", "b32"]
SCORE_COLUMN: dict[Arch, str] = {"l14": "clip_l14_similarity_score", "b32": "clip_b32_similarity_score"}
#: Published thresholds of the clip score baseline.
PUBLISHED_THRESHOLD: dict[Arch, float] = {"l14": 0.3, "b32": 0.25}
LAION2B_THRESHOLD = 0.28
_BATCH = 65_536


class Baseline(Protocol):
    """A rule on metadata rows. `columns` is what it reads; `embeddings` names an array of the npz beside, or is None."""

    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def embeddings(self) -> str | None: ...

    def mask(self, rows: pa.Table, embeddings: np.ndarray | None) -> np.ndarray:
        """bool [n]: the rows it keeps. rows: its columns, and the language column where there is one."""
        ...


@dataclass(frozen=True)
class Basic:
    """English, more than 2 words (at white space) and 5 characters, shorter side >= 200, longer/shorter <= 3."""

    language_column: str = "language"
    columns: tuple[str, ...] = ("text", "original_width", "original_height")
    embeddings: None = None

    def mask(self, rows: pa.Table, embeddings: np.ndarray | None) -> np.ndarray:
        texts = rows["text"].to_pylist()
        words = np.array([len(text.split()) if text else 0 for text in texts], np.int64)
        width, height = _floats(rows["original_width"]), _floats(rows["original_height"])
        shorter, longer = np.minimum(width, height), np.maximum(width, height)
        with np.errstate(divide="ignore", invalid="ignore"):
            keep = (words > 2) & (_characters(texts) > 5) & (shorter >= 200) & (longer / shorter <= 3.0)
        return _and_english(keep, texts, _language(rows, self.language_column))


@dataclass(frozen=True)
class ClipScore:
    """CLIP score >= threshold."""

    arch: Arch
    threshold: float
    embeddings: None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return (SCORE_COLUMN[self.arch],)

    def mask(self, rows: pa.Table, embeddings: np.ndarray | None) -> np.ndarray:
        # A Python float takes the column's own precision, as in pandas: 0.3 is float32(0.3) beside float32 scores.
        return np.asarray(_numbers(rows[SCORE_COLUMN[self.arch]]) >= self.threshold)


@dataclass(frozen=True)
class Laion2B:
    """LAION-2B's own rule: English (gcld3 in the original) and B/32 score >= 0.28."""

    language_column: str = "language"
    columns: tuple[str, ...] = ("text", SCORE_COLUMN["b32"])
    embeddings: None = None

    def mask(self, rows: pa.Table, embeddings: np.ndarray | None) -> np.ndarray:
        keep = ClipScore("b32", LAION2B_THRESHOLD).mask(rows, None)
        return _and_english(keep, rows["text"].to_pylist(), _language(rows, self.language_column))


@dataclass(frozen=True)
class ImageBased:
    """A caption filter, and the nearest pool centroid must be the nearest of some target embedding too.

    centroids: float32 [k, d]. targets: int64, the centroids that are nearest to a target (`target_centroids`).
    The caption filter is English, more than one token of fastText and more than 5 characters.
    """

    centroids: np.ndarray
    targets: np.ndarray
    language_column: str = "language"
    columns: tuple[str, ...] = ("text",)
    embeddings: str = "l14_img"

    def mask(self, rows: pa.Table, embeddings: np.ndarray | None) -> np.ndarray:
        assert embeddings is not None
        texts = rows["text"].to_pylist()
        keep = (_fasttext_tokens(rows["text"]) > 1) & (_characters(texts) > 5)
        keep = _and_english(keep, texts, _language(rows, self.language_column))
        places = np.flatnonzero(keep)
        keep[places] = np.isin(nearest_centroids(embeddings[places], self.centroids), self.targets)
        return keep


def target_centroids(target: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int64, sorted: the centroids [k, d] that are nearest (dot product) to some row of `target` [t, d]."""
    return np.unique(nearest_centroids(target, centroids))


@dataclass(frozen=True)
class TextBased:
    """English, and the first WordNet synset of some word (at white space) is one of the `entities` (ImageNet-21k)."""

    wordnet: WordNet
    entities: frozenset[int]
    language_column: str = "language"
    columns: tuple[str, ...] = ("text",)
    embeddings: None = None

    def mask(self, rows: pa.Table, embeddings: np.ndarray | None) -> np.ndarray:
        texts = rows["text"].to_pylist()
        keep = np.array(
            [
                any(self.wordnet.first_synset(w) in self.entities for w in text.split()) if text else False
                for text in texts
            ],
            bool,
        )
        return _and_english(keep, texts, _language(rows, self.language_column))


@dataclass(frozen=True)
class Selection:
    """uids: `HALVES` [kept], sorted, repeated uids as often as they occur; `rows` were read."""

    uids: np.ndarray
    rows: int


def select(metadata: str, baselines: Sequence[Baseline], language_column: str = "language") -> Selection:
    """The uids of the rows that every baseline keeps; none keeps all rows.

    metadata: folder (path or URL) of `*.parquet` with `uid`, and `*.npz` of the same names where a baseline reads
    embeddings. Streams: one batch of rows and one array of an npz at a time, and 16 bytes per kept row. Raises
    RefusedError for missing columns or arrays and for uids that are not 32 hex digits.
    """
    wanted = tuple(dict.fromkeys(name for baseline in baselines for name in baseline.columns))
    arrays = {baseline.embeddings for baseline in baselines} - {None}
    parts: list[np.ndarray] = []
    rows = 0
    directory = Directory(metadata)
    for file in metadata_files(directory):
        held = {name: _array(directory, file, name) for name in arrays if name is not None}
        first = 0
        for table in _tables(directory, file, ("uid", *wanted), (language_column,)):
            keep = np.ones(table.num_rows, bool)
            for baseline in baselines:
                own = held.get(baseline.embeddings) if baseline.embeddings else None
                if own is not None and first + table.num_rows > len(own):
                    raise RefusedError(f"{file} has more rows than its npz has embeddings; they must be aligned.")
                keep &= baseline.mask(table, None if own is None else own[first : first + table.num_rows])
            parts.append(uid_halves(table["uid"].filter(pa.array(keep))))
            first += table.num_rows
        if any(len(own) != first for own in held.values()):
            raise RefusedError(
                f"{file} has {first:,} rows, its npz another number of embeddings; they must be aligned."
            )
        rows += first
    uids = np.concatenate(parts) if parts else np.empty(0, HALVES)
    return Selection(_sorted(uids), rows)


def _sorted(uids: np.ndarray) -> np.ndarray:
    halves = uids.view(np.uint64).reshape(-1, 2)  # comparing a structured type field by field is ten times slower
    return np.asarray(uids[np.lexsort((halves[:, 1], halves[:, 0]))])


def score_threshold(metadata: str, arch: Arch, fraction: float) -> Threshold:
    """The threshold of the best `fraction` of all rows by CLIP score, ties as DataComp's rule; exact for float32 columns."""
    directory = Directory(metadata)

    def chunks() -> Iterator[np.ndarray]:
        for file in metadata_files(directory):
            for table in _tables(directory, file, (SCORE_COLUMN[arch],), ()):
                yield np.asarray(_numbers(table.column(0)), np.float32)

    return fraction_threshold(chunks, fraction)


def metadata_files(directory: Directory) -> list[str]:
    """The Parquet files of a metadata folder, sorted. Raises RefusedError where there are none."""
    names = [name for name in directory.names("") if name.endswith(".parquet")]
    if not names:
        raise RefusedError(f"{directory.url} holds no .parquet files; give the folder of DataComp's metadata.")
    return names


def _tables(directory: Directory, file: str, columns: tuple[str, ...], optional: tuple[str, ...]) -> Iterator[pa.Table]:
    with directory.open(file) as handle:
        parquet = pq.ParquetFile(handle)
        present = set(parquet.schema_arrow.names)
        missing = [name for name in columns if name not in present]
        if missing:
            raise RefusedError(
                f"{file} has no column {missing[0]!r}, which this baseline reads; is it DataComp's metadata?"
            )
        names = [*dict.fromkeys(columns), *(name for name in optional if name in present and name not in columns)]
        for batch in parquet.iter_batches(_BATCH, columns=names):
            yield pa.Table.from_batches([batch])


def _array(directory: Directory, file: str, name: str) -> np.ndarray:
    beside = file.removesuffix(".parquet") + ".npz"
    try:
        with directory.open(beside) as handle, np.load(handle, allow_pickle=False) as arrays:
            return np.asarray(arrays[name])
    except FileNotFoundError as error:
        raise RefusedError(f"{beside} is not there; this baseline reads its array {name}.") from error
    except KeyError as error:
        raise RefusedError(f"{beside} has no array {name}, which this baseline reads.") from error
    except ValueError as error:
        raise RefusedError(f"{beside} cannot be read ({error}).") from error


def _language(rows: pa.Table, column: str) -> pa.ChunkedArray | None:
    return rows[column] if column in rows.column_names else None


def _and_english(keep: np.ndarray, texts: list[str | None], column: pa.ChunkedArray | None) -> np.ndarray:
    """`keep` less the rows that are not English; the language is asked for only where it still matters."""
    places = np.flatnonzero(keep)
    chosen = None if column is None else column.take(pa.array(places))
    keep[places] = is_english([texts[place] for place in places.tolist()], chosen)
    return keep


def _characters(texts: list[str | None]) -> np.ndarray:
    return np.array([len(text) if text else 0 for text in texts], np.int64)


def _fasttext_tokens(texts: pa.ChunkedArray) -> np.ndarray:
    """int64 [n]: tokens as fastText counts them: separated by ASCII white space or NUL, and each line break is one."""
    words = pc.count_substring_regex(texts, r"[^ \n\r\t\x0b\x0c\x00]+")
    tokens = pc.add(words, pc.count_substring(texts, "\n"))
    return np.asarray(pc.fill_null(tokens, 0), np.int64)


def _floats(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), np.float64)


def _numbers(column: pa.ChunkedArray) -> Any:
    """The column as floats of its own precision, null as NaN."""
    return np.asarray(column.to_numpy())


def make_baselines(
    names: Sequence[str],
    metadata: str,
    *,
    arch: Arch = "l14",
    threshold: float | None = None,
    fraction: float | None = None,
    centroids: str | None = None,
    target: str | None = None,
    wordnet: str | None = None,
    entities: str | None = None,
    language_column: str = "language",
) -> list[Baseline]:
    """Baselines by name (basic, clip-score, laion2b, image-based, text-based) with their input files.

    centroids, target: .npy files of float [k, d] and [t, d]. Raises RefusedError where an input is missing or unfit.
    """
    kinds: dict[str, Callable[[], Baseline]] = {
        "basic": lambda: Basic(language_column),
        "clip-score": lambda: _clip_score(metadata, arch, threshold, fraction),
        "laion2b": lambda: Laion2B(language_column),
        "image-based": lambda: _image_based(centroids, target, language_column),
        "text-based": lambda: _text_based(wordnet, entities, language_column),
    }
    return [kinds[name]() for name in dict.fromkeys(names)]


def _image_based(centroids: str | None, target: str | None, language_column: str) -> ImageBased:
    if centroids is None or target is None:
        raise RefusedError("image-based needs --centroids (.npy, of the pool) and --target (.npy, embeddings).")
    pool, wanted = load_matrix(centroids), load_matrix(target)
    if pool.shape[1] != wanted.shape[1]:
        raise RefusedError(f"--centroids have {pool.shape[1]} numbers, --target {wanted.shape[1]}; they must match.")
    return ImageBased(pool, target_centroids(wanted, pool), language_column)


def _text_based(wordnet: str | None, entities: str | None, language_column: str) -> TextBased:
    if wordnet is None or entities is None:
        raise RefusedError("text-based needs --wordnet (its dict/ folder) and --entities (a file of synset ids).")
    directory, name = directory_of(entities)
    return TextBased(WordNet(wordnet), read_entities(directory.read_bytes(name), entities), language_column)


def _clip_score(metadata: str, arch: Arch, threshold: float | None, fraction: float | None) -> ClipScore:
    if threshold is not None and fraction is not None:
        raise RefusedError("clip-score takes --threshold or --fraction, not both.")
    if fraction is None:
        return ClipScore(arch, PUBLISHED_THRESHOLD[arch] if threshold is None else threshold)
    value = score_threshold(metadata, arch, fraction).value
    if value is None:
        raise RefusedError(f"no row of {metadata} has a {SCORE_COLUMN[arch]}; there is nothing to rank.")
    return ClipScore(arch, value)


def write_subset(uids: np.ndarray, url: str) -> str:
    """Write a subset file (.npy of `HALVES`) atomically; its place. Raises RefusedError for another ending."""
    directory, name = directory_of(normalise(url))
    if not name.endswith(".npy"):
        raise RefusedError(f"{url} must end with .npy, as DataComp's resharder expects.")
    buffer = io.BytesIO()
    np.save(buffer, uids, allow_pickle=False)
    directory.replace(name, buffer.getvalue())
    directory.clean_scratch(stale_only=False)
    return f"{directory.url}/{name}"
