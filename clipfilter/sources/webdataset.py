"""Webdataset tars, img2dataset's among them: rows with their captions and JSON fields, and copies of chosen rows."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipfilter.errors import MISSING_IMAGE, READ_ERROR, RefusedError
from clipfilter.sources import img2dataset
from clipfilter.sources.discover import TAR_SUFFIXES, Found, Location, refusing
from clipfilter.sources.model import ReadStats, Shard, SourceOptions, shard_id
from clipfilter.sources.records import (
    CAPTION_NAMES,
    Row,
    batches,
    check_field,
    chosen_rows,
    decode_text,
    parse_json,
    record_captions,
    record_uid,
    travelling,
)
from clipfilter.sources.seen import Seen
from clipfilter.sources.spool import TarCache, read_prefix
from clipfilter.sources.tar import (
    CAPTION_EXTENSIONS,
    Member,
    TarFile,
    TarIndex,
    index_tar,
    is_image,
    member_name,
    write_end,
    write_member,
)

_SAMPLE_BYTES = 16 << 20  # of each sampled tar
_SAMPLE_ROWS = 1000
_SAMPLE_TARS = 4
_SIDECAR_LIMIT = 64 << 20  # a text or JSON member larger than this is not read


class Webdataset:
    """A source of tars. `plan` holds what was found out once: which members and fields mean what."""

    def __init__(self, location: Location, options: SourceOptions, columns: pa.Schema, plan: dict[str, Any]) -> None:
        self.location, self.options, self.columns, self.plan = location, options, columns, plan
        self._tars = TarCache(plan["image_extension"])

    @classmethod
    def infer(cls, location: Location, options: SourceOptions, found: Found) -> Webdataset:
        """Freeze columns from the first tars (at most 16 MiB of each); raises RefusedError."""
        wanted = options.image_column.lower().lstrip(".") if options.image_column else None
        sample = _Sample.of(location, found, wanted)
        where = location.url(found.tars[0][0])
        sidecar = None
        if found.kind.startswith("img2dataset"):
            sidecar = img2dataset.sidecar_schema(location, [path for path, _ in found.tars[:_SAMPLE_TARS]])
        columns, fields = travelling(sample.records, sidecar)
        caption = options.caption_column
        texts_named = caption.lower().lstrip(".") if caption and caption not in fields else None
        if texts_named and texts_named not in sample.extensions:
            known = fields | (sample.extensions & set(CAPTION_EXTENSIONS))
            check_field(caption, "--caption-column", known, where)
        check_field(options.uid_column, "--uid-column", fields, where)
        guessed = [name for name in CAPTION_NAMES if name in fields]
        captioned = sample.captioned or any(record_captions(record, [], None, guessed) for record in sample.records)
        plan = {
            "kind": found.kind if sidecar is not None or found.stats else "webdataset",
            "image_extension": wanted,
            "text_extension": texts_named,
            "caption_field": caption if caption and not texts_named else None,
            "caption_guesses": [] if texts_named else guessed,
            "sidecar": sidecar is not None,
            "stats": found.stats,
            "has_captions": bool(captioned or caption) if sample.records else None,
        }
        return cls(location, options, columns, plan)

    def iter_shards(self, listing: Seen) -> Iterator[Shard]:
        for path, entry in self.location.containers(TAR_SUFFIXES, listing, img2dataset.is_sidecar):
            yield Shard(shard_id(path), path, "tar", size=entry.size, etag=entry.etag)

    def read(
        self, shard: Shard, rows: Sequence[int] | None, images: bool, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]:
        tar = self._tars.open(self.location.url(shard.path), shard.etag)
        index = tar.index
        stats.damaged, stats.bytes_unread = index.damaged, index.bytes_unread
        stats.seen.rows = len(index)
        stats.duplicate_keys, stats.clashes, stats.ignored = index.duplicate_keys, index.clashes, index.ignored
        sidecar = None
        if self.plan["sidecar"] or self.plan["stats"]:
            sidecar = img2dataset.Sidecar.open(self.location, shard.path, self.plan["stats"])
            stats.not_downloaded, stats.unfinished = sidecar.not_downloaded, sidecar.unfinished
        numbers: Iterable[int] = range(len(index)) if rows is None else chosen_rows(rows, len(index))
        found = (self._row(tar, index, number, images, shard.path, sidecar) for number in numbers)
        yield from batches(found, self.columns, self.options, stats)

    def _row(
        self, tar: TarFile, index: TarIndex, number: int, images: bool, path: str, sidecar: img2dataset.Sidecar | None
    ) -> Row:
        key, occurrence = index.keys[number], index.occurrences[number]
        record: dict[str, Any] = {}
        unfit: dict[str, Any] | None = None
        texts: list[str] = []
        image, error_class, error = None, None, None
        try:
            members = index.members(number)
            record, unfit, texts = _sidecars(
                members, tar.read, self.plan["image_extension"], self.plan["text_extension"]
            )
            if images:
                member = index.image(number)
                if member is None:
                    error_class, error = MISSING_IMAGE, "the tar has no image for this key"
                else:
                    image = tar.read(member)
        except OSError as problem:
            error_class, error = READ_ERROR, f"the tar cannot be read here: {problem}"
        if sidecar is not None and not record and unfit is None:
            record = sidecar.record(key.rpartition("/")[2])
        captions = record_captions(record, texts, self.plan["caption_field"], self.plan["caption_guesses"])
        uid = record_uid(record, self.options.uid_column, path, key, occurrence)
        return Row(number, key, uid, image, captions, record, error_class, error, unfit)

    def copy_rows(self, shard: Shard, rows: Sequence[int], target: Path) -> int:
        """Write these rows as a tar: every member of a row, bytes and names as they are, members adjacent.

        Times and owners are zero, so that two calls give the same bytes. A row that repeats an earlier key gets
        `~2` (`~3`, ...) behind its key; leading slashes and `..` are taken out of names.
        """
        tar = self._tars.open(self.location.url(shard.path), shard.etag)
        taken: set[bytes] = set()
        count = 0
        with open(target, "wb") as output:
            for number in chosen_rows(rows, len(tar.index)):
                _copy_row(tar, number, output, taken)
                count += 1
            write_end(output)
        return count


@dataclass
class _Sample:
    """What the first rows of the first tars hold: their records, all extensions, whether there is caption text."""

    records: list[dict[str, Any]] = field(default_factory=list)
    extensions: set[str] = field(default_factory=set)
    captioned: bool = False

    @classmethod
    def of(cls, location: Location, found: Found, wanted: str | None) -> _Sample:
        """Raises RefusedError where none of the tars can be read, or none has an image."""
        sample = cls()
        refused: RefusedError | None = None
        pictured = False
        for path, _ in found.tars[:_SAMPLE_TARS]:
            url = location.url(path)
            try:
                with refusing(url):
                    data = read_prefix(url, _SAMPLE_BYTES)
            except RefusedError as error:
                refused = refused or error
                continue
            index = index_tar(partial(_slice, data), len(data), wanted)
            pictured |= any(number >= 0 for number in index.images)
            sample._add(index, data, wanted)
            if len(sample.records) >= _SAMPLE_ROWS // 2:
                break
        if refused is not None and not sample.extensions:
            raise refused
        if sample.extensions and not pictured and not any(is_image(name, wanted) for name in sample.extensions):
            listed = ", ".join(sorted(sample.extensions)[:20])
            raise RefusedError(
                f"{location.url(found.tars[0][0])} has no image members; its extensions are: {listed} (name the right one "
                "with --image-column)."
            )
        return sample

    def _add(self, index: TarIndex, data: bytes, wanted: str | None) -> None:
        self.extensions.update(index.extensions)
        for row in range(min(len(index), _SAMPLE_ROWS - len(self.records))):
            record, _, texts = _sidecars(index.members(row), partial(_member, data), wanted, None)
            self.records.append(record)
            self.captioned |= any(text.strip() for text in texts)


def _slice(data: bytes, size: int, offset: int) -> bytes:
    return data[offset : offset + size]


def _member(data: bytes, member: Member) -> bytes:
    return data[member.offset : member.offset + member.size]


def _sidecars(
    members: Sequence[Member], read: Any, image_extension: str | None, text_extension: str | None
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """(JSON and cls fields, what could not be parsed, caption texts) of one row's members."""
    record: dict[str, Any] = {}
    unfit: dict[str, Any] | None = None
    texts: list[str] = []
    document: Member | None = None
    for member in members:
        extension = member.extension
        last = extension.rpartition(".")[2]
        if is_image(extension, image_extension) or member.size > _SIDECAR_LIMIT:
            continue
        if extension == text_extension or (text_extension is None and last in CAPTION_EXTENSIONS):
            texts.append(decode_text(read(member)))
        elif last == "json" and (document is None or extension == "json"):
            document = member
        elif extension == "cls":
            text = decode_text(read(member)).strip()
            record["cls"] = int(text) if text.isascii() and text.isdigit() and len(text) < 19 else text
    if document is not None:
        fields, unfit = parse_json(read(document))
        record = {**record, **fields}
    return record, unfit, texts


def _copy_row(tar: TarFile, number: int, output: io.BufferedWriter, taken: set[bytes]) -> None:
    members = tar.index.members(number)
    names = [_safe_name(member_name(tar.read_at, member)) for member in members]
    suffix = tar.index.occurrences[number]
    renamed = names if suffix == 1 else [_marked(name, suffix) for name in names]
    while not taken.isdisjoint(renamed) or len(set(renamed)) < len(renamed):
        suffix += 1
        renamed = [_marked(name, suffix) for name in names]
        if len(set(names)) < len(names):  # names that differed only by what was taken out
            renamed = [_marked(name, suffix + place) for place, name in enumerate(names)]
    taken.update(renamed)
    for name, member in zip(renamed, members, strict=True):
        write_member(output, name.decode("utf-8", "surrogateescape"), member.size, tar.pieces(member))


def _safe_name(name: bytes) -> bytes:
    parts = [part for part in name.split(b"/") if part not in (b"", b"..")]
    return b"/".join(parts)


def _marked(name: bytes, number: int) -> bytes:
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    return folder + slash + stem + b"~%d" % number + dot + extension
