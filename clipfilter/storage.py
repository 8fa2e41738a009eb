"""Files on local disks and object stores through fsspec: open, list, and publish so that the first writer wins."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.config import conf
from fsspec.core import url_to_fs

from clipfilter.errors import RefusedError
from clipfilter.scratch import STALE_SECONDS, Scratch, one_after_another, remove_stale

SCRATCH = ".tmp-"  # how the names of folders for unfinished files begin
_LOCAL_SCHEME = re.compile(r"(?:file|local):(?://)?(?:localhost(?=/))?(?=.)", re.IGNORECASE)

#: Seconds that a server may say nothing, and how often botocore asks; s3fs asks five times around that, so that a server
#: which accepts and never answers is given up after four minutes.
_S3_REQUESTS: dict[str, Any] = {"connect_timeout": 5, "read_timeout": 15, "retries": {"total_max_attempts": 3}}
_S3_PROTOCOLS = frozenset({"s3", "s3a"})


def is_local(url: str) -> bool:
    """True for a plain path or a `file:` URL."""
    return "://" not in url or _LOCAL_SCHEME.match(url) is not None


def local_path(url: str) -> Path:
    """The absolute path of a local URL (symbolic links are kept)."""
    scheme = _LOCAL_SCHEME.match(url)
    return Path(os.path.abspath(os.path.expanduser(url[scheme.end() :] if scheme else url)))


def normalise(url: str) -> str:
    """One spelling per place: absolute local paths, no trailing slash."""
    return str(local_path(url)) if is_local(url) else url.rstrip("/")


def same_place(one: str, other: str) -> bool:
    """Whether two paths or URLs spell one place: relative or absolute, through links, with or without scheme."""
    return is_within(one, other) and is_within(other, one)


def is_within(url: str, folder: str) -> bool:
    """Whether a place is `folder` or lies below it, however the two are spelled or reached (links, `..`, bind mounts)."""
    if is_local(url) != is_local(folder):
        return False
    if not is_local(url):
        (fs, path), (there, root) = filesystem(url), filesystem(folder)
        return type(fs) is type(there) and f"{path}/".startswith(f"{root.rstrip('/')}/")
    path_here, wanted = (Path(os.path.realpath(local_path(place))) for place in (url, folder))
    above = [path_here, *path_here.parents]
    if wanted in above:
        return True
    with contextlib.suppress(OSError):
        status = wanted.stat()
        return any(os.path.samestat(place.stat(), status) for place in above if place.exists())
    return False


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of `url` and the path inside it. Object stores are listed afresh each time."""
    if is_local(url):
        return fsspec.filesystem("file"), str(local_path(url))
    try:
        fs, path = url_to_fs(url, use_listings_cache=False, **_deadlines(url))
    except ImportError as error:
        scheme = url.split("://", 1)[0]
        raise RefusedError(
            f"{url} needs a package that is not installed ({error}); install it, e.g. `pip install clipfilter[{scheme}]`."
        ) from error
    except ValueError as error:
        raise RefusedError(f"{url} is not a location clipfilter knows: {error}.") from error
    return fs, path.rstrip("/")


def _deadlines(url: str) -> dict[str, Any]:
    """What bounds the requests of a URL's file systems, but for what the user's configuration of fsspec says."""
    protocols = {part.partition("://")[0] for part in url.split("::")} & _S3_PROTOCOLS
    return {name: {"config_kwargs": _S3_REQUESTS | conf.get(name, {}).get("config_kwargs", {})} for name in protocols}


def join(url: str, *parts: str) -> str:
    """`url` with `parts` appended, one slash between each."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def etag(info: dict[str, Any]) -> str:
    """What changes when the file changes: the store's entity tag, else size and modification time (ns)."""
    for name in ("ETag", "etag", "md5Hash", "content_md5"):
        if info.get(name):
            return str(info[name]).strip('"')
    modified = info.get("mtime") or info.get("LastModified") or info.get("last_modified") or info.get("updated") or ""
    stamp = str(int(modified * 1e9)) if isinstance(modified, float) else str(modified)
    return f"{info.get('size')}-{stamp}"


class Directory:
    """One directory tree on any filesystem, with atomic and create-only publication.

    A file becomes visible under its final name only when it is whole. Local files are written beside their
    destination in a hidden folder of this process, flushed to disk and renamed or linked; remote ones are written to
    such a folder below the local temporary folder and uploaded whole.
    """

    def __init__(self, url: str) -> None:
        self.url = normalise(url)
        self.fs, self.root = filesystem(self.url)
        self.local = is_local(self.url)
        self._scratch: Scratch | None = None

    def __enter__(self) -> Directory:
        """At the end of the block this process's unfinished files are removed."""
        return self

    def __exit__(self, *raised: object) -> None:
        self.clean_scratch(stale_only=False)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def names(self, folder: str) -> list[str]:
        """Names directly in `folder` ("" is the directory itself), sorted, hidden ones left out; empty without folder."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.invalidate_cache()
            entries = self.fs.ls(self.path(folder).rstrip("/"), detail=False)
            names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
            return sorted(name for name in names if name and not name.startswith("."))
        return []

    def walk(self, folder: str) -> list[str]:
        """Relative names of all files below `folder` ("" is the directory itself), sorted; without unfinished ones."""
        self.fs.invalidate_cache()
        base = self.path(folder)
        found = self.fs.find(base)
        names = sorted(folder + "/" + name[len(base) :].lstrip("/") for name in found)
        return [name for name in names if not name.startswith(f"/{SCRATCH}")]

    def read_bytes(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(self.path(name)))

    def read_json(self, name: str) -> Any:
        return json.loads(self.read_bytes(name))

    def open(self, name: str) -> Any:
        """A readable, seekable binary file."""
        return self.fs.open(self.path(name), "rb")

    @contextlib.contextmanager
    def fetched(self, name: str, folder: Path | None = None) -> Iterator[Path]:
        """A local path of a file; of a remote one a copy in `folder` (None: `scratch`), there until the block ends."""
        if self.local:
            yield Path(self.path(name))
            return
        copy = (folder or self.scratch()) / f"{threading.get_ident()}-{name.replace('/', '-')}"
        try:
            self.fs.get_file(self.path(name), str(copy))
            yield copy
        finally:
            copy.unlink(missing_ok=True)

    def scratch(self) -> Path:
        """This process's own private folder for unfinished files, on the same disk as a local directory."""
        if self._scratch is None or not self._scratch.path.exists():
            self._scratch = Scratch(*self._scratch_place())
        self._scratch.touch()
        return self._scratch.path

    def unfinished(self) -> list[str]:
        """Names of the folders for unfinished files that lie in a local directory."""
        return sorted(path.name for path in Path(self.root).glob(f"{SCRATCH}*")) if self.local else []

    def _scratch_place(self) -> tuple[Path, str]:
        return (Path(self.root), SCRATCH) if self.local else (Path(tempfile.gettempdir()), "clipfilter-scratch-")

    def _target(self, name: str) -> Path:
        """The place of a local file, its folder made."""
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _unfinished(self, name: str, data: bytes) -> Path:
        """`data` on disk, not yet under its name."""
        path = self.scratch() / f"{name.rpartition('/')[2]}.{time.monotonic_ns()}"
        _write_flushed(path, data)
        return path

    def create(self, name: str, data: bytes) -> bool:
        """Write `data` under `name` unless something is already there; True when this call created it."""
        if not self.local:
            try:
                self.fs.pipe_file(self.path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno == errno.EEXIST or "PreconditionFailed" in repr(error):
                    return False
                raise
            return True
        target, temporary = self._target(name), self._unfinished(name, data)
        try:
            os.link(temporary, target)
        except FileExistsError:
            # A network mount may have made the link and lost the answer.
            created = os.path.samefile(temporary, target)
        except OSError:
            # No hard links here (exFAT, some network mounts): one writer after another looks, then renames.
            with one_after_another(Path(self.root)):
                created = not os.path.lexists(target)
                if created:
                    os.rename(temporary, target)
        else:
            created = True
        finally:
            temporary.unlink(missing_ok=True)
        if created:
            flush(target.parent)
        return created

    def replace(self, name: str, data: bytes) -> None:
        """Write a derived file (a report, a summary) atomically over an earlier one."""
        if not self.local:
            self.fs.pipe_file(self.path(name), data)
            return
        target = self._target(name)
        os.replace(self._unfinished(name, data), target)

    def publish(self, source: Path, name: str) -> None:
        """Move a finished local file or folder to its final, content-named place.

        The name holds a hash of the content, so an earlier copy of it is the same file and is left alone.
        """
        if source.is_dir():
            self._publish_folder(source, name)
            return
        if not self.local:
            if self.fs.exists(self.path(name)) and self.fs.size(self.path(name)) == source.stat().st_size:
                return
            self.fs.put_file(str(source), self.path(name))
            return
        target = self._target(name)
        flush(source)
        os.replace(source, target)
        flush(target.parent)

    def _publish_folder(self, source: Path, name: str) -> None:
        files = sorted(path for path in source.rglob("*") if path.is_file())
        if not self.local:
            for path in files:
                self.fs.put_file(str(path), self.path(f"{name}/{path.relative_to(source).as_posix()}"))
            return
        target = self._target(name)
        for path in (source, *source.rglob("*")):
            flush(path)
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        flush(target.parent)

    def clean_scratch(self, *, stale_only: bool) -> None:
        """Remove this process's unfinished files, or (`stale_only`) those that dead processes left."""
        if stale_only:
            remove_stale(*self._scratch_place())
        elif self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    def abort_stale_uploads(self, older_than: float = STALE_SECONDS) -> int:
        """Abort multipart uploads below this directory begun more than `older_than` seconds ago; how many."""
        if not hasattr(self.fs, "call_s3"):
            return 0
        bucket, _, prefix = self.root.partition("/")
        aborted = 0
        with contextlib.suppress(NotImplementedError, PermissionError, FileNotFoundError):
            answer = self.fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix + "/")
            for upload in answer.get("Uploads", []):
                if time.time() - upload["Initiated"].timestamp() >= older_than:
                    self.fs.call_s3(
                        "abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                    )
                    aborted += 1
        return aborted


def directory_of(url: str) -> tuple[Directory, str]:
    """The directory that a file lies in, and its name there."""
    folder, slash, name = url.rpartition("/")
    return Directory(folder or slash or "."), name


def file_sha256(path: Path) -> str:
    """Hex sha256 of a local file; of a folder, the sha256 over its sorted relative names and file hashes."""
    if path.is_dir():
        digest = hashlib.sha256()
        for item in sorted(p for p in path.rglob("*") if p.is_file()):
            digest.update(
                f"{item.relative_to(path).as_posix()}\0{file_sha256(item)}\n".encode("utf-8", "surrogateescape")
            )
        return digest.hexdigest()
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_chunks(handle: Any, size: int = 8 << 20) -> Iterator[bytes]:
    """The rest of an open binary file in pieces of `size` bytes."""
    while chunk := handle.read(size):
        yield chunk


def flush(path: Path) -> None:
    """Have the content of a local file, or the names in a local folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network mounts flush files and have no such call for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A file beside `path` to write to, which takes its place, flushed, when the block ends well.

    shared: several processes may do so at once, and the last one wins.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}" if shared else f"{path.name}.part")
    try:
        yield unfinished
        flush(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def _write_flushed(path: Path, data: bytes) -> None:
    with open(path, "xb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
