"""Image folders, and img2dataset's `files` output: captions from files beside the image or from a table."""

from __future__ import annotations

import hashlib
import itertools
import shutil
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from clipfilter import storage
from clipfilter.errors import MISSING_IMAGE, ClipfilterError, RefusedError, RowError, ShardError
from clipfilter.sources import img2dataset, tables
from clipfilter.sources.discover import Entry, Folder, Found, Location, below, is_image_name, look_into, why_passed
from clipfilter.sources.fetch import Fetched, fetch_in_order, fetch_url, read_url
from clipfilter.sources.model import ReadStats, Shard, SourceOptions, shard_id
from clipfilter.sources.names import PathIndex
from clipfilter.sources.records import (
    Row,
    batches,
    caption_fields,
    check_field,
    chosen_rows,
    clean_captions,
    decode_text,
    parse_json,
    record_captions,
    record_uid,
    travelling,
)
from clipfilter.sources.schema import infer_record_schema
from clipfilter.sources.seen import Seen

_TEXT_SUFFIXES = (".txt", ".caption")
_SIDECAR_SUFFIXES = (*_TEXT_SUFFIXES, ".json")
_SAMPLE_IMAGES = 200
_SAMPLE_TABLE_ROWS = 1000
_REMEMBERED_FOLDERS = 1000
_LOOKS_AT_ONCE = 16
_REMEMBERED_TABLES = 100


class _Job(NamedTuple):
    """An image to read: its path below the root, the files of its stem, and what caption tables say: by path, records."""

    number: int
    path: str
    files: list[str]
    said: dict[str, list[dict[str, Any]]]


class _Listed(NamedTuple):
    """The names in a folder that may speak of its images: files of an image's stem, and caption tables by their path."""

    files: set[str]
    tables: list[str]


class _Loaded(NamedTuple):
    job: _Job
    image: Fetched
    record: dict[str, Any]
    unfit: dict[str, Any] | None
    texts: list[str]


class ImageFolder:
    """A tree of image files. The key is the path below the root (img2dataset: the basename up to its first dot)."""

    def __init__(self, location: Location, options: SourceOptions, columns: pa.Schema, plan: dict[str, Any]) -> None:
        self.location, self.options, self.columns, self.plan = location, options, columns, plan
        self._listed: OrderedDict[str, _Listed] = OrderedDict()
        self._tables: OrderedDict[str, tables.Table] = OrderedDict()
        self._pictures: OrderedDict[str, PathIndex] = OrderedDict()

    @classmethod
    def infer(cls, location: Location, options: SourceOptions, found: Found) -> ImageFolder:
        """Freeze columns from the first images' sidecars and the tables beside them; raises RefusedError."""
        if options.image_column is not None:
            raise RefusedError("--image-column does not apply to an image folder: every image file in it is a row.")
        downloaded = found.kind == "img2dataset-files"
        plan: dict[str, Any] = {
            "kind": found.kind,
            "img2dataset": downloaded,
            "stats": found.stats,
            "caption_guesses": [],
            "has_captions": None,
            **({"nameless": True} if found.nameless else {}),
        }
        source = cls(location, options, pa.schema([]), plan)
        records: list[dict[str, Any]] = []
        captioned = False
        sampled = found.images[:_SAMPLE_IMAGES]
        for table in (
            {} if downloaded else dict.fromkeys(table for image in sampled for _, table in source._tables_over(image))
        ):
            records += table.sample(_SAMPLE_TABLE_ROWS)
        source.columns = infer_record_schema(records)  # the csv columns' types, for what follows
        for number, image in enumerate(sampled):
            job = source._job(number, image, Seen())
            own, _, texts = source._read_beside(job)
            records.append(_merged(job, own))
            captioned |= any(text.strip() for text in texts)
        stems = [path.rpartition(".")[0] for path, _ in found.parquets] if downloaded else []
        columns, fields = travelling(records, img2dataset.sidecar_schema(location, stems))
        check_field(options.caption_column, "--caption-column", fields, location.root)
        check_field(options.uid_column, "--uid-column", fields, location.root)
        guesses = caption_fields(fields)
        source.plan["caption_guesses"] = guesses
        source.plan["has_captions"] = bool(
            captioned or options.caption_column or any(record_captions(record, [], None, guesses) for record in records)
        )
        source.columns = columns
        return source

    # --- planning ---------------------------------------------------------------------------------------------------

    def iter_shards(self, listing: Seen) -> Iterator[Shard]:
        """Pictures are counted where their shard is read, all other files here: what speaks of a picture is a part."""
        if self.plan["img2dataset"]:
            yield from self._downloaded_shards(listing)
            return
        size = self.options.rows_per_shard
        pending: list[tuple[str, Entry]] = []
        extra: dict[str, str] = {}  # the tables and sidecars of the pending images, with their etags
        tables_of: dict[str, dict[str, str]] = {}
        claimed: set[str] = set()
        count = 0
        for folder in self.location.walk(listing):
            own = _tables_with_etags(self.location, folder)
            if own:
                tables_of[folder.path] = own
                claimed.update(own)
            sidecars = _sidecar_etags(folder)
            for entry in self._pictures_of(folder, claimed, listing):
                path = below(folder.path, entry.name)
                pending.append((path, entry))
                extra.update(sidecars.get(below(folder.path, _stem(entry.name)), {}))
                for place in _upwards(folder.path):
                    extra.update(tables_of.get(place, {}))
                if len(pending) == size:
                    yield _chunk(".", pending, extra, count, size)
                    count += size
                    pending, extra = [], {}
        if pending:
            yield _chunk(".", pending, extra, count, size)

    def _downloaded_shards(self, listing: Seen) -> Iterator[Shard]:
        """img2dataset's `files`: one shard per folder with images or with a sidecar; larger ones in chunks."""
        size = self.options.rows_per_shard
        expected: set[str] = set()
        for folder in self.location.walk(listing):
            names = {entry.name for entry in folder.files}
            around = names.union(folder.folders)
            own = {below(folder.path, name) for name in names if img2dataset.is_sidecar(around, name)}
            expected.update(below(folder.path, name) for name in folder.folders if name + ".parquet" in names)
            images = [(entry.name, entry) for entry in self._pictures_of(folder, own, listing)]
            sidecars = _sidecar_etags(folder)
            if not images and folder.path in expected:  # nothing could be downloaded; its failures still count
                yield _chunk(folder.path, [], {}, 0, size)
            for start in range(0, len(images), size):
                part = images[start : start + size]
                extra: dict[str, str] = {}
                for name, _ in part:
                    extra.update(sidecars.get(below(folder.path, _stem(name)), {}))
                yield _chunk(folder.path or ".", part, extra, start, size)

    def _pictures_of(self, folder: Folder, own: Collection[str], listing: Seen) -> list[Entry]:
        """A folder's pictures, by name or content; `listing` counts its other files. own: tables and sidecars, by path."""
        unsure = [
            path
            for entry in folder.files
            if why_passed(entry) == "unknown_type" and (path := below(folder.path, entry.name)) not in own
        ]
        told = self._look_into(unsure)
        pictures: list[Entry] = []
        others: list[Entry] = []
        for entry in folder.files:
            known = is_image_name(entry.name) or told.get(below(folder.path, entry.name)) == "picture"
            (pictures if known else others).append(entry)
        stems = {_stem(entry.name) for entry in pictures}
        for entry in others:
            path = below(folder.path, entry.name)
            if path in own or (entry.name.endswith(_SIDECAR_SUFFIXES) and _stem(entry.name) in stems):
                listing.parts += 1
            else:
                listing.pass_over(told.get(path) or why_passed(entry), path)
        return pictures

    def _look_into(self, paths: list[str]) -> dict[str, Any]:
        """What the content of files says that have no telling name. On an object store each costs a request, so it is asked
        only where no name in the source told of a picture."""
        if storage.is_local(self.location.root):
            return {path: look_into(self.location, path) for path in paths}
        if not self.plan.get("nameless"):
            return {}
        with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
            return dict(zip(paths, pool.map(partial(look_into, self.location), paths), strict=True))

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(
        self, shard: Shard, rows: Sequence[int] | None, images: bool, stats: ReadStats
    ) -> Iterator[pa.RecordBatch]:
        sidecar = None
        if self.plan["img2dataset"]:
            sidecar = img2dataset.Sidecar.open(self.location, shard.path, self.plan["stats"])
            stats.unfinished = sidecar.unfinished
            if shard.start == 0:  # the first chunk of the folder speaks for all of it
                stats.not_downloaded = sidecar.not_downloaded
        stats.seen.rows = len(shard.members)
        numbers = range(len(shard.members)) if rows is None else chosen_rows(rows, len(shard.members))
        yield from batches(self._rows(shard, numbers, images, sidecar, stats), self.columns, self.options, stats)

    def _rows(
        self,
        shard: Shard,
        numbers: Sequence[int],
        images: bool,
        sidecar: img2dataset.Sidecar | None,
        stats: ReadStats,
    ) -> Iterator[Row]:
        occurrences = _occurrences(shard.members) if sidecar is not None else {}
        stats.duplicate_keys = len(occurrences)

        def load(job: _Job) -> _Loaded:
            image = fetch_url(self.location.url(job.path)) if images else Fetched(None)
            return _Loaded(job, image, *self._read_beside(job))

        jobs = (self._job(number, self._path(shard, number), stats.seen) for number in numbers)
        size = self.options.max_batch_bytes
        for job, image, own, unfit, texts in fetch_in_order(jobs, load, size, lambda row: len(row.image.data or b"")):
            key = job.path
            if sidecar is not None:
                key = _key(job.path)
                if not own and unfit is None:
                    own = sidecar.record(key)
            record = _merged(job, own)
            captions = self._captions(own, texts)
            for table, records in job.said.items():
                told = [self._captions(one, []) or [] for one in records]  # an image may be named once per caption
                stats.seen.caption(table, int(captions is None and any(told)))
                captions = captions or clean_captions(itertools.chain.from_iterable(told))
            uid = record_uid(record, self.options.uid_column, shard.path, key, occurrences.get(job.number, 1))
            key = key.encode("utf-8", "backslashreplace").decode("utf-8")
            yield Row(job.number, key, uid, image.data, captions, record, image.error_class, image.error, unfit)

    def _path(self, shard: Shard, number: int) -> str:
        member = shard.members[number]
        return member if shard.path == "." else below(shard.path, member)

    def _captions(self, record: dict[str, Any], texts: Sequence[str]) -> list[str] | None:
        return record_captions(record, texts, self.options.caption_column, self.plan["caption_guesses"])

    def _job(self, number: int, path: str, seen: Seen) -> _Job:
        """What is known of an image from listings and tables, before any of its files is opened."""
        return _Job(number, path, self._files_of(path), self._said(path, seen))

    def _files_of(self, path: str) -> list[str]:
        """The text and JSON files of an image's stem."""
        folder, _, base = path.rpartition("/")
        stem = _stem(base)
        beside = self._list(folder).files
        return [below(folder, stem + suffix) for suffix in _SIDECAR_SUFFIXES if stem + suffix in beside]

    def _read_beside(self, job: _Job) -> tuple[dict[str, Any], dict[str, Any] | None, list[str]]:
        """(fields, what could not be parsed, caption texts) from the files of the image's stem."""
        record: dict[str, Any] = {}
        unfit: dict[str, Any] | None = None
        texts: list[str] = []
        for path in job.files:
            data = self._file(path)
            if path.endswith(".json"):
                record, unfit = parse_json(data)
            else:
                texts.append(decode_text(data))
        return record, unfit, texts

    def _said(self, image: str, seen: Seen) -> dict[str, list[dict[str, Any]]]:
        """What tables say of an image: by the table's path, that in the nearest folder first, the records."""
        said = {}
        numeric = [
            item.name for item in self.columns if pa.types.is_integer(item.type) or pa.types.is_floating(item.type)
        ]
        for reach, table in [] if self.plan["img2dataset"] else self._tables_over(image):
            found = table.find(_inside(reach, image), partial(self._pictures_below, reach))
            if found.records:
                said[table.path] = table.records(found.records, numeric)
            if found.doubt or table.note:
                seen.leave(table.path, found.doubt or table.note)
            elif not found.records:
                seen.caption(table.path, 0)
        return said

    def _tables_over(self, image: str) -> Iterator[tuple[str, tables.Table]]:
        """The tables that may speak of an image, each with the folder in which it may: those of the image's folder and
        the folders above it, and of the folders beside these whose name says so."""
        for reach in _upwards(image.rpartition("/")[0]):
            for path in self._list(reach).tables:
                if not image.startswith(path.rpartition("/")[0] + "/") or path.rpartition("/")[0] == reach:
                    yield reach, self._table(path)

    def _table(self, path: str) -> tables.Table:
        found = self._tables.get(path)
        if found is None:
            found = self._tables[path] = tables.Table(self.location.root, path)
        _keep(self._tables, path, _REMEMBERED_TABLES)
        return found

    def _pictures_below(self, folder: str) -> PathIndex:
        """All images below a folder, to see whether a name in a table could mean several."""
        found = self._pictures.get(folder)
        if found is None:
            found = self._pictures[folder] = PathIndex()
            whole = self.location.pattern is not None
            location = self.location if whole else Location(self.location.url(folder))
            for place in location.walk():
                for entry in place.files:
                    path = below(place.path, entry.name)
                    if is_image_name(entry.name) and (not whole or not folder or path.startswith(folder + "/")):
                        found.add(_inside(folder, path) if whole else path)
        _keep(self._pictures, folder, 2)
        return found

    def _list(self, folder: str) -> _Listed:
        """What may speak of the images in `folder`, listed once."""
        found = self._listed.get(folder)
        if found is None:
            names = self._names(folder)
            found = _Listed(
                {name for name in names if name.lower().endswith(_SIDECAR_SUFFIXES)}, tables.tables_of(folder, names)
            )
            for place in tables.speaking_folders(folder, [name for name in names if not is_image_name(name)]):
                found.tables.extend(tables.tables_of(place, self._names(place, optional=True)))
            self._listed[folder] = found
        _keep(self._listed, folder, _REMEMBERED_FOLDERS)
        return found

    def _names(self, folder: str, optional: bool = False) -> list[str]:
        """The visible names in a folder, sorted; `optional`: none where it is no folder."""
        fs, path = storage.filesystem(self.location.url(folder))
        try:
            entries = [entry.rstrip("/") for entry in fs.ls(path, detail=False)]
        except Exception as error:  # every filesystem has exceptions of its own
            if optional and not fs.isdir(path):
                return []
            raise ShardError(f"{self.location.url(folder)} cannot be listed: {error}") from error
        names = {entry.rpartition("/")[2] for entry in entries if entry != path}  # a file lists itself
        return sorted(name for name in names if name[:1] not in ("", "."))

    def _file(self, path: str) -> bytes:
        try:
            return read_url(self.location.url(path))
        except RowError as error:
            if error.error_class == MISSING_IMAGE:
                return b""
            raise ShardError(f"{self.location.url(path)} cannot be read: {error.message}") from error

    # --- copying ----------------------------------------------------------------------------------------------------

    def copy_rows(self, shard: Shard, rows: Sequence[int], target: Path) -> int:
        """Copy these images below the folder `target`, their paths kept, with their text and JSON files and with the
        lines of the caption tables that speak of them."""
        chosen = [self._path(shard, number) for number in chosen_rows(rows, len(shard.members))]
        for name in dict.fromkeys(name for path in chosen for name in (path, *self._files_of(path))):
            self._copy(name, target / name)
        lines: dict[str, dict[int, set[str]]] = {}
        for path in [] if self.plan["img2dataset"] else chosen:
            for reach, table in self._tables_over(path):
                found = table.find(_inside(reach, path), partial(self._pictures_below, reach))
                speaking = lines.setdefault(table.path, {})
                for line, names in found.records.items():
                    speaking.setdefault(line, set()).update(names)
        for name, speaking in lines.items():
            self._table(name).copy(speaking, target / name)
        return len(chosen)

    def _copy(self, name: str, target: Path) -> None:
        fs, path = storage.filesystem(self.location.url(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with fs.open(path, "rb") as source, open(target, "wb") as output:
                shutil.copyfileobj(source, output, 1 << 20)
        except ClipfilterError:
            raise
        except Exception as error:  # every filesystem has exceptions of its own
            raise ShardError(f"{self.location.url(name)} cannot be copied: {error}") from error


def _upwards(folder: str) -> Iterator[str]:
    """`a/b`, `a`, "" (the root)."""
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]
    yield ""


def _merged(job: _Job, own: dict[str, Any]) -> dict[str, Any]:
    """All that is known of an image: from its own JSON file, else from the nearest table that has the field."""
    fields: dict[str, Any] = {}
    for records in job.said.values():
        fields = {**records[0], **fields}
    return {**fields, **own}


def _inside(folder: str, path: str) -> str:
    """A path below the root as the path below a folder that it lies in."""
    return path[len(folder) + 1 :] if folder else path


def _keep(held: OrderedDict[str, Any], key: str, most: int) -> None:
    """Note that `key` was used, and let go of what was not for longest where there are more than `most`."""
    held.move_to_end(key)
    while len(held) > most:
        held.popitem(last=False)


def _key(path: str) -> str:
    """img2dataset's key: the basename up to its first dot."""
    return path.rpartition("/")[2].partition(".")[0]


def _occurrences(members: Sequence[str]) -> dict[int, int]:
    """Member number -> how often its key was there up to it, for keys that occur again."""
    seen: dict[str, int] = {}
    again = {}
    for number, name in enumerate(members):
        key = _key(name)
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1:
            again[number] = seen[key]
    return again


def _chunk(path: str, images: list[tuple[str, Entry]], extra: dict[str, str], start: int, size: int) -> Shard:
    """A shard of listed images. Its id names the full range, so that files added at the end change its etag alone."""
    digest = hashlib.sha256()
    for name, entry in images:
        digest.update(f"{name}\0{entry.size}\0{entry.etag}\n".encode("utf-8", "surrogateescape"))
    for name, etag in sorted(extra.items()):
        digest.update(f"{name}\0{etag}\n".encode("utf-8", "surrogateescape"))
    return Shard(
        shard_id(path, start, start + size),
        path,
        "folder",
        start,
        start + len(images),
        members=tuple(name for name, _ in images),
        size=sum(entry.size for _, entry in images),
        etag=digest.hexdigest()[:32],
    )


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def _tables_with_etags(location: Location, folder: Folder) -> dict[str, str]:
    """The tables that may speak of images in a listed folder and below it, with etags."""
    listed = [folder]
    for path in tables.speaking_folders(folder.path, folder.folders):
        beside = next(Location(location.url(path)).walk())
        listed.append(beside._replace(path=path))
    etags = {below(place.path, entry.name): entry.etag for place in listed for entry in place.files}
    found = [tables.tables_of(place.path, [entry.name for entry in place.files]) for place in listed]
    return {path: etags[path] for paths in found for path in paths}


def _sidecar_etags(folder: Folder) -> dict[str, dict[str, str]]:
    """Image path without its ending -> the text and JSON files of that stem, with etags."""
    found: dict[str, dict[str, str]] = {}
    for entry in folder.files:
        if entry.name.lower().endswith(_SIDECAR_SUFFIXES):
            path = below(folder.path, entry.name)
            found.setdefault(path.rpartition(".")[0], {})[path] = entry.etag
    return found
