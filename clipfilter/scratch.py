"""Private folders for unfinished files, each alive for as long as a process holds its lock."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from clipfilter.errors import RefusedError

STALE_SECONDS = 24 * 3600
_LOCK = ".lock"


class Scratch:
    """A new folder in `parent` that no other user can enter. Whether its owner lives is told by the lock of a file in it.

    Its name holds `prefix` and which file system this is to which kernel: locks are seen by all processes that share both.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f"{prefix}{_place(parent)}-", dir=parent))
            try:
                self._lock = _opened(self.path / _LOCK)
            except FileNotFoundError:
                continue  # another process took the folder for left over before it was locked, and removed it
            except OSError:
                os.rmdir(self.path)
                raise
            if lock(self._lock) is not False and (self.path / _LOCK).exists():
                return
            os.close(self._lock)

    def touch(self) -> None:
        """Say that the owner lives, to those who cannot see its lock."""
        with contextlib.suppress(OSError):
            os.utime(self._lock)

    def remove(self) -> None:
        os.close(self._lock)  # first: network mounts keep a file that is open, and with it the folder
        shutil.rmtree(self.path, ignore_errors=True)


def remove_stale(parent: Path, prefix: str) -> None:
    """Remove the folders that dead processes of this user left in `parent`; links are neither followed nor removed.

    Nobody holds the lock of a dead process's folder. Where locks do not tell (another machine may hold it on a network
    mount, or the file system has none) a folder is dead that has not been touched for a day.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        here = f"{prefix}{_place(parent)}-"
        for name in sorted(name for name in os.listdir(parent) if name.startswith(prefix)):
            with contextlib.suppress(OSError):
                _remove_if_dead(parent / name, trusted=name.startswith(here))


def _remove_if_dead(path: Path, *, trusted: bool) -> None:
    found = os.lstat(path)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        return
    if trusted:
        with contextlib.suppress(OSError):
            os.rmdir(path)  # empty: its owner died before it locked it, or makes another when it finds it gone
            return
    with contextlib.ExitStack() as stack:
        free: bool | None = None
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            found, free = os.fstat(descriptor), lock(descriptor)
        old = time.time() - found.st_mtime > STALE_SECONDS
        dead = free is not False and (old or bool(free and trusted))
        if dead and free is not None:
            os.unlink(path / _LOCK)  # while it is held: an owner who comes to lock it now sees that, and makes another
    if dead:
        shutil.rmtree(path, ignore_errors=True)  # never follows a link


def lock(descriptor: int) -> bool | None:
    """Lock an open file: True when this call did, False while another holds it, None where the file system cannot tell."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def only_one(folder: Path, refusal: str) -> Iterator[None]:
    """Hold the lock of a local folder, the file `.lock` in it; RefusedError with this text while another process has it.

    Where the file system has no locks, nobody is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = _opened(folder / _LOCK)
    try:
        if lock(descriptor) is False:
            raise RefusedError(refusal)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def one_after_another(folder: Path) -> Iterator[None]:
    """Wait for the lock of a local folder itself, which leaves no file; without effect where there are no locks."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def _place(parent: Path) -> str:
    """8 hex digits for (this boot of this kernel, this mount): who sees each other's locks even without a lock server."""
    boot = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    # Without a boot id nobody's locks are trusted: a name that is never met again.
    boot = boot or str(time.monotonic_ns())
    return hashlib.sha256(f"{boot}{os.stat(parent).st_dev}".encode()).hexdigest()[:8]
