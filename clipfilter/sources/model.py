"""What a source hands out: options, shards, and a reader with its counts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pyarrow as pa

from clipfilter import defaults
from clipfilter.sources.seen import Seen

CaptionChoice = Literal["first", "max", "mean"]
ShardFormat = Literal["tar", "parquet", "folder"]


@dataclass(frozen=True)
class SourceOptions:
    """What the user said about a source; None means: find out.

    `image_column`, `caption_column`, `uid_column` name a Parquet column, a JSON field or (tars) a member extension.
    `pictures`: of a sample with several pictures all are rows, or the first is. `captions` is carried for the engine; a
    source always delivers every caption it has. `rows_per_shard` bounds Parquet and folder shards (a tar is one shard
    whatever its size); `max_batch_bytes` counts image bytes, and one image larger than it makes a batch of its own. `private`:
    images that are named by URL may lie at addresses that are not public.
    """

    image_column: str | None = None
    caption_column: str | None = None
    uid_column: str | None = None
    pictures: defaults.Pictures = defaults.PICTURES
    captions: CaptionChoice = "first"
    rows_per_shard: int = defaults.ROWS_PER_SHARD
    max_batch_bytes: int = 64 << 20
    max_batch_rows: int = 256
    private: bool = False

    def __post_init__(self) -> None:
        for name in ("rows_per_shard", "max_batch_bytes", "max_batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        """Newer options are left out where they are the default, as in the plans of runs that are older than them."""
        newer = {"pictures": defaults.PICTURES, "private": False}
        return {name: value for name, value in asdict(self).items() if name not in newer or value != newer[name]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SourceOptions:
        return cls(**data)


@dataclass(frozen=True)
class Shard:
    """One unit of work: a tar, a range of Parquet rows, or a chunk of an image folder.

    `path` is relative to the source's root, with "/" separators. `start`/`stop` are row numbers in the file (Parquet)
    or positions in the sorted listing (folder); `stop` is None where only reading tells (tar, broken Parquet).
    `members` (folder) are image paths relative to `path`.
    """

    id: str
    path: str
    format: ShardFormat
    start: int = 0
    stop: int | None = None
    row_groups: tuple[int, ...] = ()
    members: tuple[str, ...] = ()
    size: int = 0
    etag: str = ""

    @property
    def known_rows(self) -> int:
        """How many rows it has, as far as that is known before it is read; else 0."""
        return 0 if self.stop is None else self.stop - self.start

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Shard:
        return cls(**{**data, "row_groups": tuple(data["row_groups"]), "members": tuple(data["members"])})


def shard_id(path: str, start: int = 0, stop: int | None = None) -> str:
    """16 hex digits: the beginning of sha256 of the relative path and the row range."""
    return hashlib.sha256(
        f"{path}\0{start}-{'' if stop is None else stop}".encode("utf-8", "surrogatepass")
    ).hexdigest()[:16]


def row_uid(path: str, key: str, occurrence: int = 1) -> str:
    """32 hex digits: the first 128 bits of sha256 of (relative path, key).

    A later row with the same key in the same file adds its `occurrence`, so that two rows never share a uid.
    """
    text = f"{path}\0{key}" if occurrence == 1 else f"{path}\0{key}\0{occurrence}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


@dataclass
class ReadStats:
    """What one read of a shard met; complete once the reader is exhausted.

    `rows` delivered; `damaged` and `bytes_unread` of a tar that breaks off; `not_downloaded` sidecar rows without an
    image (not rows); `duplicate_keys` rows whose key an earlier row has; `clashes` members passed over because their
    row already has an image (or such a sidecar); `misfits` rows with something in cf_source_json; `unfinished`: an
    img2dataset shard without the `_stats.json` that marks it as done. `seen`: what became of everything inside the shard;
    where that is known beforehand its `rows` count all of the shard's, so that those that --limit or --sample leave out
    are counted too.
    """

    rows: int = 0
    damaged: bool = False
    bytes_unread: int = 0
    not_downloaded: int = 0
    duplicate_keys: int = 0
    clashes: int = 0
    misfits: int = 0
    unfinished: bool = False
    seen: Seen = field(default_factory=Seen)


@dataclass
class ShardReader:
    """An iterable of record batches (see `schema.PREFIX` for their first columns); read it once."""

    batches: Callable[[ReadStats], Iterator[pa.RecordBatch]]
    stats: ReadStats = field(default_factory=ReadStats)

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        for batch in self.batches(self.stats):
            self.stats.rows += batch.num_rows
            yield batch
