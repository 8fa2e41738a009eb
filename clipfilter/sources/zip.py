"""Zip archives with random access: members become rows by the rules of tars; nothing is extracted."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

from clipfilter import egress
from clipfilter.sources.tar import Member, RawMember, TarIndex, Wanted, index_members

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
_PIECE = 4 << 20


class ZipArchive:
    """An open zip with its index, with the interface of a TarFile. A member's `start` and `offset` are its number.

    Raises zipfile.BadZipFile where the directory at its end cannot be read, and FetchError for what unzips to far too much.
    """

    def __init__(self, file: Any, wanted: Wanted) -> None:
        self._zip = zipfile.ZipFile(file)
        self._members = self._zip.infolist()
        size = os.stat(file).st_size if isinstance(file, str) else os.fstat(file.fileno()).st_size
        egress.judge_unzipped(size, sum(info.file_size for info in self._members))
        self.index: TarIndex = index_members(self._listed(), self.read_at, wanted)

    def _listed(self) -> Iterator[RawMember]:
        for number, info in enumerate(self._members):
            mode = info.external_attr >> 16
            regular = not stat.S_IFMT(mode) or stat.S_ISREG(mode)
            if not info.is_dir():
                yield RawMember(self._name(info), number, number, info.file_size, regular)

    def read_at(self, size: int, number: int) -> bytes:
        """The first bytes of a member; none where they cannot be had."""
        try:
            with self._zip.open(self._members[number]) as member:
                return member.read(size)
        except _BROKEN:
            return b""

    def name(self, member: Member) -> bytes:
        return self._name(self._members[member.start])

    def read(self, member: Member) -> bytes:
        return b"".join(self.pieces(member))

    def pieces(self, member: Member) -> Iterator[bytes]:
        """The bytes of a member, some megabytes at a time; raises OSError where it is damaged or encrypted."""
        info = self._members[member.start]
        try:
            with self._zip.open(info) as opened:
                while piece := opened.read(_PIECE):
                    yield piece
        except _BROKEN as error:
            raise OSError(f"{info.filename} in the zip cannot be read: {error}") from error

    @staticmethod
    def _name(info: zipfile.ZipInfo) -> bytes:
        return info.filename.replace("\\", "/").encode("utf-8", "surrogateescape")


# zipfile's own errors: RuntimeError for an encrypted member, NotImplementedError for a method that it lacks.
_BROKEN = (OSError, EOFError, RuntimeError, NotImplementedError, zlib.error, zipfile.BadZipFile, ValueError)
