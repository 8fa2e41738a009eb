"""Where a source is and what lies there: walking, globs, `{00000..00010}`, and telling the formats apart."""

from __future__ import annotations

import itertools
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal, NamedTuple

from clipfilter import storage
from clipfilter.errors import ClipfilterError, RefusedError, one_line
from clipfilter.sources.contents import HEAD_BYTES, told_by_content
from clipfilter.sources.seen import Reason, Seen
from clipfilter.sources.tar import CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, PICKLE_EXTENSIONS

# fmt: off
TAR_SUFFIXES = (
    ".tar", ".tar.gz", ".tgz", ".tar.zst", ".tar.zstd", ".tzst", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz",
)
# fmt: on
PARQUET_SUFFIXES = (".parquet", ".pq", ".parq")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".token", ".txt")  # of rows that name pictures
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")
ZIP_SUFFIXES = (".zip",)
CONTAINER_SUFFIXES = (*TAR_SUFFIXES, *PARQUET_SUFFIXES, *ARROW_SUFFIXES, *ZIP_SUFFIXES)
_SKIPPED_FOLDERS = frozenset({"__MACOSX", "_tmp", "_temporary", "_delta_log", "_ingest"})
_SKIPPED_FILES = frozenset({"thumbs.db", "desktop.ini"})
# Pictures and films that are not read, and what may speak of pictures.
# fmt: off
_UNSUPPORTED = frozenset({
    "jxl", "svg", "svgz", "psd", "psb", "xcf", "ai", "eps", "wmf", "emf", "cr2", "cr3", "nef", "arw", "dng", "orf",
    "rw2", "raf", "exr", "hdr", "pfm", "fits", "dds", "ktx", "ktx2", "qoi", "pcx", "sgi", "xbm", "xpm", "mp4", "m4v",
    "mov", "avi", "mkv", "webm", "mpg", "mpeg", "wmv", "flv",
})
# fmt: on
_SPEAKING = frozenset({*CAPTION_EXTENSIONS, "json", "jsonl", "ndjson", "csv", "tsv", "token"})
_WEB = ("http://", "https://")
_LOOK_INTO = 64  # files, where no name says what they are
_LOOK_AT = 100_000  # files, before deciding what a folder without tars or Parquet holds


class Entry(NamedTuple):
    """One listed file: its name within its folder, size in bytes, and etag."""

    name: str
    size: int
    etag: str


class Folder(NamedTuple):
    """One listed folder: its path below the root ("" for the root), subfolder names, and files; both sorted.

    passed: what is never looked at here, as reason, name (of a folder for all below it) and number of files.
    """

    path: str
    folders: list[str]
    files: list[Entry]
    passed: Sequence[tuple[Reason, str, int]] = ()


@dataclass(frozen=True)
class Location:
    """A source's root and, when not everything below it belongs to the source, the pattern of the files that do."""

    root: str
    pattern: str | None = None

    def url(self, relative: str) -> str:
        return self.root if relative in ("", ".") else storage.join(self.root, relative)

    def walk(self, listing: Seen | None = None) -> Iterator[Folder]:
        """Folders with their files, a folder before its subfolders, names in order; skips hidden and temporary ones.

        listing: where that which is skipped is counted.
        """
        if self.pattern is not None:
            folders = _walk_pattern(self)
        elif storage.is_local(self.root):
            folders = _walk_local(str(storage.local_path(self.root)), "", set())
        else:
            folders = _walk_remote(self.root)
        for folder in folders:
            if listing is not None:
                for reason, name, count in folder.passed:
                    listing.pass_over(reason, below(folder.path, name), count)
            yield folder

    def containers(
        self, suffixes: tuple[str, ...], listing: Seen, is_part: Callable[[Collection[str], str], bool]
    ) -> Iterator[tuple[str, Entry]]:
        """(path below the root, entry) of every file with one of these endings; `listing` counts them and all others.

        is_part: whether, among the names of a folder's files and folders, a file belongs to a container.
        """
        for folder in self.walk(listing):
            names = {*folder.folders, *(entry.name for entry in folder.files)}
            for entry in folder.files:
                path = below(folder.path, entry.name)
                if entry.name.lower().endswith(suffixes):
                    listing.containers += 1
                    yield path, entry
                elif is_part(names, entry.name):
                    listing.parts += 1
                else:
                    listing.pass_over(why_passed(entry), path)


def why_passed(entry: Entry) -> Reason:
    """Why a file is passed over that is nothing to its source, by its name and size."""
    name = entry.name.lower()
    ending = name.rpartition(".")[2]
    if is_image_name(name) or name.endswith(CONTAINER_SUFFIXES):
        return "other_kind"
    if ending in PICKLE_EXTENSIONS:
        return "pickle"
    if ending in _UNSUPPORTED:
        return "unsupported"
    if ending in _SPEAKING:
        return "unclaimed"
    return "unknown_type" if entry.size else "empty"


def look_into(location: Location, path: str) -> Literal["picture", "unsupported", "unread", ""]:
    """What a file is by its first bytes: "" for nothing of interest, "unread" where they cannot be had."""
    fs, inside = storage.filesystem(location.url(path))
    try:
        return told_by_content(fs.cat_file(inside, 0, HEAD_BYTES))
    except Exception:  # every filesystem has exceptions of its own
        return "unread"


def below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


@contextmanager
def refusing(url: str) -> Iterator[None]:
    """Turn whatever a filesystem raises while a source is first looked at into one sentence with the fix."""
    try:
        yield
    except ClipfilterError:
        raise
    except FileNotFoundError as error:
        raise RefusedError(f"{url} does not exist; check the spelling of the path or URL.") from error
    except PermissionError as error:
        raise RefusedError(
            f"{url} may not be read ({one_line(error).rstrip('.')}); check its permissions or your credentials."
        ) from error
    except Exception as error:  # every filesystem has exceptions of its own (botocore, aiohttp, gcsfs)
        if "credential" in repr(error).lower() or "token" in repr(error).lower():
            fix = "set the credentials of this store in the environment"
        else:
            fix = "check the address, the network and your credentials"
        raise RefusedError(f"{url} cannot be read ({one_line(error).rstrip('.')}); {fix}.") from error


def locate(url: str) -> Location:
    """The root and pattern that `url` means; raises RefusedError when nothing is there."""
    if url.startswith("pipe:"):
        raise RefusedError(f"{url} would start a program; give a path or an fsspec URL such as s3://bucket/folder.")
    url = storage.normalise(url)
    fs, path = storage.filesystem(url)
    with refusing(url):
        special = re.search(r"[*?\[{]", path)
        if special and not fs.exists(path):
            fixed = special.start() - len(path)  # counted from the end: url and path share their tail
            head = url[: len(url) + fixed]
            root, _, _ = head.rpartition("/")
            return Location(root or "/", url[len(root) + 1 :])
        if url.startswith(_WEB):  # a web server has no folders, but it may list one
            is_folder = not url.lower().endswith(CONTAINER_SUFFIXES) and fs.isdir(url + "/")
        else:
            is_folder = fs.info(path)["type"] == "directory"
    if is_folder:
        return Location(url)
    root, _, name = url.rpartition("/")
    return Location(root or "/", name)


def holds(source: str, url: str) -> bool:
    """Whether files below `url` would be read as those of a source: it is in the source's folder, or where its pattern looks."""
    if storage.is_within(url, source):
        return True
    path = storage.normalise(source)
    special = re.search(r"[*?\[{]", path)
    if not special:
        return False
    root = path[: special.start()].rpartition("/")[0] or "/"
    if not storage.is_within(url, root):
        return False
    local = storage.is_local(url)
    inside = (
        os.path.relpath(os.path.realpath(storage.local_path(url)), os.path.realpath(root))
        if local
        else url[len(root) :]
    )
    wanted = re.sub(r"\{[^{}]*\}", "*", path[len(root) :]).strip("/").split("/")
    parts = inside.strip("/").split("/")
    return "**" in wanted or (len(wanted) > len(parts) and all(map(fnmatch, parts, wanted)))


def expand_braces(pattern: str) -> Iterator[str]:
    """`a{00..02}b` and `{x,y}` as bash and webdataset write them, lazily; a brace with neither `..` nor `,` stays."""
    opening = pattern.find("{")
    while opening >= 0:
        closing = _closing(pattern, opening)
        choices = _choices(pattern[opening + 1 : closing]) if closing > 0 else None
        if choices is not None:
            head, tail = pattern[:opening], pattern[closing + 1 :]
            for choice in choices:
                for rest in expand_braces(tail):
                    yield head + choice + rest
            return
        opening = pattern.find("{", opening + 1)
    yield pattern


def _closing(pattern: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(pattern)):
        if pattern[place] == "{":
            depth += 1
        elif pattern[place] == "}":
            depth -= 1
            if not depth:
                return place
    return -1


def _choices(inner: str) -> Iterator[str] | None:
    span = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", inner)
    if span:
        first, last = span.groups()
        padded = any(len(digits) > 1 and digits.startswith("0") for digits in (first, last))
        width = max(len(first), len(last)) if padded else 0
        low, high = int(first), int(last)
        numbers = range(low, high + 1) if low <= high else range(low, high - 1, -1)
        return (str(number).zfill(width) for number in numbers)
    parts: list[str] = [""]
    depth = 0
    for letter in inner:
        if letter == "," and not depth:
            parts.append("")
            continue
        depth += {"{": 1, "}": -1}.get(letter, 0)
        parts[-1] += letter
    if len(parts) < 2:
        return None
    return itertools.chain.from_iterable(expand_braces(part) for part in parts)


def _walk_local(root: str, path: str, above: set[tuple[int, int]]) -> Iterator[Folder]:
    here = os.path.join(root, path)
    status = os.stat(here)
    if (status.st_dev, status.st_ino) in above:  # a symbolic link that leads back up
        yield Folder(path, [], [], [("not_a_file", "", 1)])
        return
    above = above | {(status.st_dev, status.st_ino)}
    folders: list[str] = []
    files: list[Entry] = []
    passed: list[tuple[Reason, str, int]] = []
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.is_dir():
                if _skipped(entry.name) or entry.name in _SKIPPED_FOLDERS:
                    passed.append(("hidden", entry.name + "/", _files_below(entry)))
                else:
                    folders.append(entry.name)
                continue
            if _skipped(entry.name):
                passed.append(("hidden", entry.name, 1))
                continue
            try:
                found = entry.stat()
            except OSError:  # a dangling link, one that leads to itself, or deleted just now
                found = None
            if found is None or not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
                passed.append(("not_a_file", entry.name, 1))
                continue
            files.append(
                Entry(entry.name, found.st_size, storage.etag({"size": found.st_size, "mtime": found.st_mtime}))
            )
    folders.sort()
    yield Folder(path, folders, sorted(files), sorted(passed))
    for name in folders:
        yield from _walk_local(root, below(path, name), above)


def _files_below(folder: os.DirEntry[str]) -> int:
    """How many files a hidden folder has; 1 for a link, which is not followed, and for one that may not be read."""
    if folder.is_symlink():
        return 1
    return sum(len(files) for _, _, files in os.walk(folder, onerror=None))


def count_files(url: str) -> int | None:
    """How many files a folder has, hidden ones too; None where it has links to folders."""
    fs, root = storage.filesystem(url)
    if not storage.is_local(url):
        return len(fs.find(root + "/" if root.startswith(_WEB) else root))
    count = 0
    for here, folders, files in os.walk(storage.local_path(url)):
        if any(os.path.islink(os.path.join(here, name)) for name in folders):
            return None
        count += len(files)
    return count


def _walk_remote(url: str) -> Iterator[Folder]:
    fs, root = storage.filesystem(url)
    found: dict[tuple[str, ...], list[Entry]] = {(): []}
    hidden: dict[tuple[str, ...], Counter[str]] = {}  # folder -> what is hidden in it, with the number of files
    for path, info in fs.find(root + "/" if root.startswith(_WEB) else root, detail=True).items():
        parts = path[len(root) :].strip("/").split("/")
        place = next((i for i, part in enumerate(parts) if _skipped(part) or part in _SKIPPED_FOLDERS), len(parts))
        if place < len(parts) - 1 or (place < len(parts) and _skipped(parts[place])):
            name = parts[place] + "/" * (place < len(parts) - 1)
            hidden.setdefault(tuple(parts[:place]), Counter())[name] += 1
            continue
        for depth in range(1, len(parts)):
            found.setdefault(tuple(parts[:depth]), [])
        found.setdefault(tuple(parts[:-1]), []).append(Entry(parts[-1], info.get("size") or 0, _etag(info)))
    children: dict[tuple[str, ...], list[str]] = {}
    for parents in found:
        if parents:
            children.setdefault(parents[:-1], []).append(parents[-1])
    for parents in sorted(found):
        passed: list[tuple[Reason, str, int]] = [
            ("hidden", name, count) for name, count in sorted(hidden.pop(parents, Counter()).items())
        ]
        yield Folder("/".join(parents), sorted(children.get(parents, [])), sorted(found[parents]), passed)
    for parents, names in sorted(hidden.items()):  # of folders with nothing else
        yield Folder("/".join(parents), [], [], [("hidden", name, count) for name, count in sorted(names.items())])


def _walk_pattern(location: Location) -> Iterator[Folder]:
    """One Folder per run of matches in the same folder; brace expansions in the order written, globs sorted."""
    fs, root = storage.filesystem(location.root)
    assert location.pattern is not None
    listed: tuple[str, list[Entry]] | None = None
    for name, info in _matches(fs, root, location.pattern):
        folder, _, base = name.rpartition("/")
        entry = Entry(base, info.get("size") or 0, _etag(info))
        if listed is not None and listed[0] == folder and len(listed[1]) < 1000:
            listed[1].append(entry)
            continue
        if listed is not None:
            yield Folder(listed[0], [], listed[1])
        listed = (folder, [entry])
    if listed is not None:
        yield Folder(listed[0], [], listed[1])


def _matches(fs: Any, root: str, pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in expand_braces(pattern):
        path = f"{root.rstrip('/')}/{name}"
        if not re.search(r"[*?\[]", name) or fs.exists(path):
            try:
                yield name, fs.info(path)
            except FileNotFoundError:
                yield name, {}  # a shard that is listed but missing must show up as failed, not vanish
            continue
        for match, info in sorted(fs.glob(path, detail=True).items()):
            relative = match[len(root) :].lstrip("/")
            if info.get("type") != "directory" and not any(_skipped(part) for part in relative.split("/")):
                yield relative, info


def _etag(info: dict[str, Any]) -> str:
    """The etag of a listed file; "" where the listing does not tell (web servers' index pages)."""
    return storage.etag(info) if info.get("size") is not None else ""


def _skipped(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SKIPPED_FILES


def is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and not name.startswith(".")


@dataclass
class Found:
    """What the first folders of a source hold: enough to tell its format and to draw a bounded sample."""

    kind: str
    tars: list[tuple[str, Entry]] = field(default_factory=list)
    parquets: list[tuple[str, Entry]] = field(default_factory=list)
    zips: list[tuple[str, Entry]] = field(default_factory=list)
    arrows: list[tuple[str, Entry]] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # what may be a table
    stats: bool = False  # some _stats.json of img2dataset
    others: list[str] = field(default_factory=list)
    nameless: bool = False  # pictures are told by their content, for no name says that it is one
    sidecar_folders: bool = False  # a Parquet file is the sidecar of a folder of the same name

    def add(self, folder: Folder, entry: Entry, most_images: int) -> None:
        """Note one listed file."""
        name, path = entry.name.lower(), below(folder.path, entry.name)
        if name.endswith(TAR_SUFFIXES):
            self.tars.append((path, entry))
        elif name.endswith(PARQUET_SUFFIXES):
            self.parquets.append((path, entry))
            self.sidecar_folders |= entry.name.rpartition(".")[0] in folder.folders
        elif name.endswith(ZIP_SUFFIXES):
            self.zips.append((path, entry))
        elif name.endswith(ARROW_SUFFIXES):
            self.arrows.append((path, entry))
        elif is_image_name(entry.name):
            if len(self.images) < most_images:
                self.images.append(path)
        elif name.endswith("_stats.json"):
            self.stats = True
        elif name.endswith(TABLE_SUFFIXES):
            if len(self.tables) < most_images:
                self.tables.append(path)
        elif len(self.others) < _LOOK_INTO:
            self.others.append(path)

    def format(self) -> str:
        """The format that this adds up to, "" for none."""
        if self.tars:
            stems = {path.rpartition(".")[0] for path, _ in self.parquets}
            paired = any(path.partition(".tar")[0] in stems for path, _ in self.tars)
            return "img2dataset-webdataset" if self.stats or paired else "webdataset"
        if self.sidecar_folders and self.images:
            return "img2dataset-files"
        kinds = {"parquet": self.parquets, "arrow": self.arrows, "folder": self.images, "zip": self.zips}
        return next((kind for kind, found in kinds.items() if found), "")

    def by_content(self, location: Location) -> str:
        """The format where only what is in the files tells that they are pictures."""
        self.images = [path for path in self.others if look_into(location, path) == "picture"]
        self.nameless = bool(self.images)
        return "folder" if self.images else ""


def detect(location: Location, sample: int = 8, images: int = 200) -> Found:
    """Look at a source's listing until its format is clear; raises RefusedError when there is nothing to read.

    Tars win over Parquet (img2dataset's sidecars), Parquet over images, except where a Parquet file is the sidecar of
    a folder of the same name (img2dataset's `files`).
    """
    found = Found("")
    seen = 0
    for folder in location.walk():
        seen += len(folder.files)
        for entry in folder.files:
            found.add(folder, entry, images)
        beside = found.sidecar_folders
        if found.tars or (found.parquets and not beside) or (beside and found.images):
            break
        if seen > _LOOK_AT or (found.images and len(found.images) >= images and not beside):
            break
    found.kind = found.format() or found.by_content(location)
    if found.tables and not found.kind and location.pattern is not None:
        found.kind = "table"
    if not found.kind:
        raise RefusedError(
            f"{_nothing(location, found, seen)}; give webdataset tars, Parquet files, an image folder, img2dataset's output "
            "folder, or the very csv or JSON file that names images."
        )
    del found.tars[sample:], found.parquets[sample:], found.arrows[sample:], found.zips[sample:]
    return found


def _nothing(location: Location, found: Found, seen: int) -> str:
    where = location.url(location.pattern or "")
    if seen:
        examples = ", ".join(path.rpartition("/")[2] for path in (found.tables + found.others)[:3])
        return f"{where} holds no tar, Parquet or image file (but {examples})"
    return f"No file matches {where}" if location.pattern else f"{where} is empty"
