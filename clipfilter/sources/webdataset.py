"""Webdataset tars, img2dataset's among them: rows with their captions and JSON fields, and copies of chosen rows."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from clipfilter.errors import IMAGE_TOO_LARGE, MISSING_IMAGE, READ_ERROR, RefusedError, ShardError
from clipfilter.sources import img2dataset
from clipfilter.sources.discover import TAR_SUFFIXES, ZIP_SUFFIXES, Found, Location, refusing
from clipfilter.sources.fetch import LARGEST_IMAGE
from clipfilter.sources.model import ReadStats, Shard, SourceOptions, row_uid, shard_id
from clipfilter.sources.records import (
    Row,
    batches,
    caption_fields,
    check_field,
    chosen_rows,
    decode_text,
    parse_json,
    record_captions,
    record_uid,
    travelling,
)
from clipfilter.sources.seen import Seen
from clipfilter.sources.spool import Archive, TarCache, read_prefix
from clipfilter.sources.tar import (
    CAPTION_EXTENSIONS,
    Member,
    TarIndex,
    Wanted,
    index_tar,
    is_image,
    write_end,
    write_member,
    written_extension,
)

_SAMPLE_BYTES = 16 << 20  # of each sampled tar
_SAMPLE_ROWS = 1000
_SAMPLE_TARS = 4
_SIDECAR_LIMIT = 64 << 20  # a text or JSON member larger than this is not read


class Webdataset:
    """A source of tars. `plan` holds what was found out once: which members and fields mean what."""

    def __init__(self, location: Location, options: SourceOptions, columns: pa.Schema, plan: dict[str, Any]) -> None:
        self.location, self.options, self.columns, self.plan = location, options, columns, plan
        self._tars = TarCache(Wanted(plan["image_extension"], options.pictures))

    @classmethod
    def infer(cls, location: Location, options: SourceOptions, found: Found) -> Webdataset:
        """Freeze columns from the first tars (at most 16 MiB of each); raises RefusedError."""
        wanted = options.image_column.lower().lstrip(".") if options.image_column else None
        sample = _Sample.of(location, found, Wanted(wanted, options.pictures))
        where = location.url((found.zips if found.kind == "zip" else found.tars)[0][0])
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
        guessed = caption_fields(fields)
        captioned = sample.captioned or any(record_captions(record, [], None, guessed) for record in sample.records)
        plan = {
            "kind": found.kind if found.kind != "zip" and (sidecar is not None or found.stats) else "webdataset",
            "image_extension": wanted,
            "each_picture": True,
            "zip": found.kind == "zip",
            "text_extension": texts_named,
            "caption_field": caption if caption and not texts_named else None,
            "caption_guesses": [] if texts_named else guessed,
            "sidecar": sidecar is not None,
            "stats": found.stats,
            "has_captions": bool(captioned or caption) if sample.records else None,
        }
        return cls(location, options, columns, plan)

    def iter_shards(self, listing: Seen) -> Iterator[Shard]:
        # Tars beside zips would have been taken in place of them: those here are copies that a run made.
        suffixes = (*ZIP_SUFFIXES, *TAR_SUFFIXES) if self.plan.get("zip") else TAR_SUFFIXES
        for path, entry in self.location.containers(suffixes, listing, img2dataset.is_sidecar):
            yield Shard(shard_id(path), path, "tar", size=entry.size, etag=entry.etag)

    def read(
        self, shard: Shard, rows: Sequence[int] | None, images: bool, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]:
        tar = self._open(shard)
        index = tar.index
        stats.damaged, stats.bytes_unread = index.damaged, index.bytes_unread
        stats.duplicate_keys, stats.clashes = index.duplicate_keys, index.clashes
        stats.seen.add(index.seen)
        sidecar = None
        if self.plan["sidecar"] or self.plan["stats"]:
            sidecar = img2dataset.Sidecar.open(self.location, shard.path, self.plan["stats"])
            stats.not_downloaded, stats.unfinished = sidecar.not_downloaded, sidecar.unfinished
        numbers: Iterable[int] = range(len(index)) if rows is None else chosen_rows(rows, len(index))
        found = (self._row(tar, index, number, images, shard.path, sidecar) for number in numbers)
        yield from batches(found, self.columns, self.options, stats)

    def _open(self, shard: Shard) -> Archive:
        url = self.location.url(shard.path)
        tar = self._tars.open(url, shard.etag)
        if "each_picture" not in self.plan and (tar.index.several or tar.index.by_content):
            raise ShardError(
                f"{url} was read by an earlier clipfilter, which took one picture of each key; run it again in a new "
                "directory, where every picture is a row."
            )
        return tar

    def _row(
        self, tar: Archive, index: TarIndex, number: int, images: bool, path: str, sidecar: img2dataset.Sidecar | None
    ) -> Row:
        key, occurrence = index.keys[number], index.occurrences[number]
        record: dict[str, Any] = {}
        unfit: dict[str, Any] | None = None
        texts: list[str] = []
        image, error_class, error = None, None, None
        try:
            member = index.image(number)
            record, unfit, texts = _sidecars(index.members(number), member, tar.read, self.plan["text_extension"])
            if images:
                if member is None:
                    error_class, error = MISSING_IMAGE, "the archive has no image for this key"
                elif member.size > LARGEST_IMAGE:
                    error_class, error = IMAGE_TOO_LARGE, f"the member is larger than {LARGEST_IMAGE >> 20} MiB"
                else:
                    image = tar.read(member)
        except OSError as problem:
            error_class, error = READ_ERROR, f"the archive cannot be read here: {problem}"
        if sidecar is not None and not record and unfit is None:
            record = sidecar.record(key.rpartition("/")[2])
        captions = record_captions(record, texts, self.plan["caption_field"], self.plan["caption_guesses"])
        sample, part = index.several.get(number, (key, ""))
        uid = record_uid(record, self.options.uid_column, path, sample, occurrence)
        if part:  # what it was made of belongs to the other pictures of the sample, too
            uid = row_uid(uid, part)
        return Row(number, key, uid, image, captions, record, error_class, error, unfit)

    def copy_rows(self, shard: Shard, rows: Sequence[int], target: Path) -> int:
        """Write these rows as a tar: every member of a row, bytes and names as they are, members adjacent.

        Times and owners are zero, so that two calls give the same bytes. Each row has a key of its own: one that repeats an
        earlier key gets `~2` (`~3`, ...) behind it, and of several pictures under one key each what told it from the
        others. Leading slashes and `..` are taken out of names.
        """
        tar = self._open(shard)
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
    def of(cls, location: Location, found: Found, wanted: Wanted) -> _Sample:
        """Raises RefusedError where none of the tars can be read, or none has an image."""
        sample = cls()
        refused: RefusedError | None = None
        pictured = False
        archives = found.zips if found.kind == "zip" else found.tars
        for path, _ in archives[:_SAMPLE_TARS]:
            try:
                with refusing(location.url(path)):
                    index, read = _beginning(location.url(path), wanted, found.kind == "zip")
            except RefusedError as error:
                refused = refused or error
                continue
            pictured |= any(number >= 0 for number in index.images)
            sample._add(index, read)
            if len(sample.records) >= _SAMPLE_ROWS // 2:
                break
        if refused is not None and not sample.extensions:
            raise refused
        if (
            sample.extensions
            and not pictured
            and not any(is_image(name, wanted.extension) for name in sample.extensions)
        ):
            listed = ", ".join(sorted(sample.extensions)[:20])
            raise RefusedError(
                f"{location.url(archives[0][0])} has no image members; its extensions are: {listed} (name the right one "
                "with --image-column)."
            )
        return sample

    def _add(self, index: TarIndex, read: Callable[[Member], bytes]) -> None:
        self.extensions.update(index.extensions)
        for row in range(min(len(index), _SAMPLE_ROWS - len(self.records))):
            members = index.members(row)
            self.extensions.update(member.extension for member in members)
            record, _, texts = _sidecars(members, index.image(row), read, None)
            self.records.append(record)
            self.captioned |= any(text.strip() for text in texts)


def _beginning(url: str, wanted: Wanted, whole: bool) -> tuple[TarIndex, Callable[[Member], bytes]]:
    """The index of the first megabytes of a tar, or of a whole zip, and a reader of its members; raises RefusedError."""
    if whole:
        try:
            archive = TarCache(wanted).open(url, "")
        except ShardError as error:
            raise RefusedError(f"{str(error).rstrip('.')}; copy or pack it again.") from error
        return archive.index, archive.read
    data = read_prefix(url, _SAMPLE_BYTES)
    return index_tar(partial(_slice, data), len(data), wanted), partial(_member, data)


def _slice(data: bytes, size: int, offset: int) -> bytes:
    return data[offset : offset + size]


def _member(data: bytes, member: Member) -> bytes:
    return data[member.offset : member.offset + member.size]


def _sidecars(
    members: Sequence[Member], image: Member | None, read: Any, text_extension: str | None
) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
    """(JSON and cls fields, what could not be parsed, caption texts) of one row's members."""
    record: dict[str, Any] = {}
    unfit: dict[str, Any] | None = None
    texts: list[str] = []
    document: Member | None = None
    for member in members:
        extension = member.extension
        last = extension.rpartition(".")[2]
        if (image is not None and member.start == image.start) or member.size > _SIDECAR_LIMIT:
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


def _copy_row(tar: Archive, number: int, output: io.BufferedWriter, taken: set[bytes]) -> None:
    members = tar.index.members(number)
    written = [tar.name(member) for member in members]
    key, occurrence = _safe_key(written[0], tar.index.several.get(number)), tar.index.occurrences[number]
    unique = key if occurrence == 1 else b"%s~%d" % (key, occurrence)
    while unique in taken:
        occurrence += 1
        unique = b"%s~%d" % (key, occurrence)
    taken.add(unique)
    for name, member in zip(written, members, strict=True):
        extension = written_extension(name, member)
        whole = unique.decode("utf-8", "surrogateescape") + ("." + extension if extension else "")
        write_member(output, whole, member.size, tar.pieces(member))


def _safe_key(name: bytes, several: tuple[str, str] | None) -> bytes:
    """The key of a row in a copy, from the name of one of its members."""
    *folders, base = [part for part in name.split(b"/") if part not in (b"", b"..")]
    stem = base.partition(b".")[0]
    own = several[1].rpartition(".")[0].replace(".", "_") if several else ""
    return b"/".join([*folders, stem + b"~" + own.encode() if own else stem])
