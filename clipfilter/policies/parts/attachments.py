"""Files that belong to a policy: named by their sha256, found where they were seen or in the run that keeps a copy.

Lists of hashes, overrides and learned vectors may be large, so a policy holds only their sha256. A run copies them to
`policy/<sha256>`, where each of its workers, and whoever asks a year later, finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ValidationInfo, WithJsonSchema, model_serializer

from clipfilter.errors import RefusedError
from clipfilter.policies.parts.fields import FILE, Model, Sha256, fail, shown
from clipfilter.storage import Directory, file_sha256

ATTACHMENTS_FOLDER = "policy"
MAX_BYTES = 512 * 1024 * 1024

#: Where this process has seen the file of a hash.
_seen: dict[str, Path] = {}


class Attachment(Model):
    """A file of this content."""

    sha256: Sha256


def attach(value: Any, info: ValidationInfo) -> Any:
    """A path (relative ones lie beside the policy), {file, sha256}, or {sha256} alone, as a run keeps it."""
    if isinstance(value, str):
        value = {"file": value}
    if not isinstance(value, dict):
        fail(f"this must be the path of a file, not {shown(value)}")
    named = dict(value)
    file = named.pop("file", None)
    if file is None:
        return named
    if not isinstance(file, str) or not file.strip() or "\0" in file:
        fail(f"{shown(file)} is not the path of a file", "file")
    folder = (info.context or {}).get("folder", ".")
    path = Path(folder, Path(file).expanduser())
    try:
        found = remember(path)
    except RefusedError as error:
        fail(str(error))
    if named.setdefault("sha256", found) != found:
        fail(f"the file {path} has the sha256 {found[:12]}..., which is not the one given", "sha256")
    return named


Attached = Annotated[Attachment, BeforeValidator(attach), WithJsonSchema(FILE)]


def remember(path: Path) -> str:
    """The sha256 of a file, which is found by it from now on. Raises RefusedError."""
    try:
        if not path.is_file():
            raise RefusedError(f"the file {path} does not exist or is no file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RefusedError(f"the file {path} has {size:,} bytes, more than the {MAX_BYTES // 2**20} MiB allowed")
        sha256 = file_sha256(path)
    except OSError as error:
        raise RefusedError(f"the file {path} cannot be read: {error.strerror}") from None
    _seen[sha256] = path.absolute()
    return sha256


class Attachments:
    """Where the files of policies are: where this process saw them, else in the run directory given."""

    def __init__(self, directory: Directory | None = None) -> None:
        self._directory = directory

    def path(self, wanted: Attachment) -> Path:
        """A local file of this content. Raises RefusedError where there is none any more."""
        seen = _seen.get(wanted.sha256)
        if seen is not None and seen.is_file() and file_sha256(seen) == wanted.sha256:
            return seen
        name = f"{ATTACHMENTS_FOLDER}/{wanted.sha256}"
        if self._directory is not None and self._directory.exists(name):
            copy = Path(self._directory.path(name))
            if not self._directory.local:
                copy = self._directory.scratch() / wanted.sha256
                self._directory.fs.get_file(self._directory.path(name), str(copy))
            if file_sha256(copy) == wanted.sha256:
                _seen[wanted.sha256] = copy
                return copy
        where = f"{seen} has changed or is gone" if seen is not None else "nobody said where it is"
        raise RefusedError(
            f"a file of the policy with the sha256 {wanted.sha256[:12]}... cannot be found ({where}); "
            "bring it back, or load the policy from its own file"
        )


def keep_copies(directory: Directory, attachments: Iterable[Attachment]) -> None:
    """Put a copy of each file into the run, create-only. Raises RefusedError."""
    finder = Attachments(directory)
    for wanted in attachments:
        name = f"{ATTACHMENTS_FOLDER}/{wanted.sha256}"
        if not directory.exists(name):
            directory.create(name, finder.path(wanted).read_bytes())


#: Reads the list in a file of this sha256. Raises RefusedError.
Reader = Callable[[Path, str], tuple[str, ...]]


class Listed(Model):
    """A list written in the policy, or in a file beside it."""

    rows: tuple[str, ...] | None = None
    source: Attachment | None = None

    @model_serializer
    def _plain(self) -> Any:
        return list(self.rows) if self.rows is not None else {"sha256": self.source.sha256 if self.source else None}

    def read(self, files: Attachments, reader: Reader) -> tuple[str, ...]:
        """Its entries. Raises RefusedError."""
        if self.rows is not None:
            return self.rows
        assert self.source is not None
        return reader(files.path(self.source), self.source.sha256)


def filed(value: Any, info: ValidationInfo, read: Callable[[Path, str], object]) -> Any:
    """The file's hash, after its content was found good where the file is here."""
    source = attach(value, info)
    if isinstance(value, str) or "file" in value:
        attachment = Attachment.model_validate(source)
        try:
            read(Attachments().path(attachment), attachment.sha256)
        except RefusedError as error:
            fail(str(error))
    return {"source": source}
