"""Files that appear whole or not at all, and nothing unfinished left behind."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clipfilter import scratch, storage
from clipfilter.errors import RefusedError
from clipfilter.scratch import only_one
from clipfilter.storage import Directory, directory_of, replacing


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_takes_the_place_of_another_when_all_went_well(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with replacing(path, shared=shared) as unfinished:
        unfinished.write_bytes(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("shared", [False, True])
def test_trouble_leaves_the_file_as_it_was(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"before")
    with pytest.raises(KeyError), replacing(path, shared=shared) as unfinished:  # noqa: PT012
        unfinished.write_bytes(b"half")
        raise KeyError
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_a_shared_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with replacing(path, shared=True) as first, replacing(path, shared=True) as second:
        assert first != second
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert path.read_bytes() == b"first"


@pytest.mark.parametrize(
    ("url", "folder", "name"),
    [
        ("/a/b.npy", "/a", "b.npy"),
        ("/b.npy", "/", "b.npy"),
        ("b.npy", str(Path.cwd()), "b.npy"),
        ("a/b.npy", str(Path("a").absolute()), "b.npy"),
    ],
)
def test_the_directory_of_a_file(url: str, folder: str, name: str) -> None:
    directory, found = directory_of(url)
    assert (directory.url, found) == (folder, name)


def test_a_local_file_is_read_where_it_is_and_a_remote_one_from_a_copy(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"here")
    with Directory(str(tmp_path)).fetched("a.bin") as path:
        assert path == tmp_path / "a.bin"
    assert path.exists()
    there = Directory("memory://fetched")
    there.create("folder/a.bin", b"there")
    with there.fetched("folder/a.bin", tmp_path) as path:
        assert (path.parent, path.read_bytes()) == (tmp_path, b"there")
    with there, there.fetched("folder/a.bin") as own:
        assert own.read_bytes() == b"there"
    assert not path.exists()
    assert not own.exists()


def test_a_directory_in_a_block_leaves_nothing_unfinished(tmp_path: Path) -> None:
    with pytest.raises(KeyError), Directory(str(tmp_path)) as directory:  # noqa: PT012
        directory.replace("kept.json", b"{}")
        (directory.scratch() / "half").write_bytes(b"x")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with only_one(tmp_path / "out", "taken"):  # noqa: SIM117
        with pytest.raises(RefusedError, match="taken"), only_one(tmp_path / "out", "taken"):
            pass
    with only_one(tmp_path / "out", "taken"):
        pass


def test_the_lock_of_a_folder_is_never_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"), only_one(tmp_path, "taken"):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def failing(code: int) -> Callable[..., None]:
    def fail(*given: Any, **named: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


# --- folders for unfinished files --------------------------------------------------------------------------------------


def test_what_a_process_left_goes_though_nobody_has_waited_for_it_yet(tmp_path: Path) -> None:
    code = f"import os; from clipfilter.storage import Directory; Directory({str(tmp_path)!r}).scratch(); os._exit(0)"
    ended = subprocess.Popen([sys.executable, "-c", code])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    directory = Directory(str(tmp_path))
    assert len(directory.unfinished()) == 1
    directory.clean_scratch(stale_only=True)
    assert list(tmp_path.iterdir()) == []
    ended.wait()


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds a folder in `tmp_path`; as in a pod, its id says nothing here."""
    code = (
        f"from clipfilter.storage import Directory; print(Directory({str(tmp_path)!r}).scratch(), flush=True); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_folder_lives_while_its_lock_is_held_and_not_by_ids_or_names(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert holder.stdout is not None
    theirs = Path(holder.stdout.readline().strip())
    (theirs / "half").write_bytes(b"x")
    ours = Directory(str(tmp_path))
    mine = ours.scratch()
    monkeypatch.setattr(os, "kill", lambda pid, number: (_ for _ in ()).throw(ProcessLookupError()))
    os.utime(theirs / ".lock", (0, 0))  # nothing written for a day: it may compute for a day
    Directory(str(tmp_path)).clean_scratch(stale_only=True)
    assert (theirs / "half").exists()
    assert mine.exists(), "nor one's own, found by another object"
    monkeypatch.undo()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    ours.clean_scratch(stale_only=True)
    assert not theirs.exists()
    assert mine.exists()
    ours.clean_scratch(stale_only=False)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_goes_at_once_and_an_owner_who_comes_to_lock_it_makes_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, removed = scratch._opened, []

    def late(path: Path) -> int:
        if not removed:
            removed.append(path.parent)
            Directory(str(tmp_path)).clean_scratch(stale_only=True)
        return opened(path)

    monkeypatch.setattr(scratch, "_opened", late)
    made = Directory(str(tmp_path)).scratch()
    assert list(tmp_path.iterdir()) == [made]
    assert made not in removed


@pytest.mark.parametrize("trouble", ["other machine", "no locks", "no lock file yet"])
def test_where_locks_do_not_tell_a_day_without_writing_does(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as there:
        if trouble == "other machine":  # its locks are not seen here
            there.setattr(scratch, "_place", lambda parent: "0badcafe")
        folder = Directory(str(tmp_path)).scratch()
    if trouble == "other machine":
        folder = Path(shutil.copytree(folder, tmp_path / (folder.name + "x")))  # one whose lock is not held here
    elif trouble == "no locks":
        monkeypatch.setattr(scratch.fcntl, "flock", failing(errno.ENOLCK))
    touched = folder / ".lock"
    if trouble == "no lock file yet":
        touched.unlink()
        (folder / "half").touch()
        touched = folder
    Directory(str(tmp_path)).clean_scratch(stale_only=True)
    assert folder.exists()
    yesterday = time.time() - scratch.STALE_SECONDS - 60
    os.utime(touched, (yesterday, yesterday))
    Directory(str(tmp_path)).clean_scratch(stale_only=True)
    assert not folder.exists()


def test_writing_says_that_the_owner_lives(tmp_path: Path) -> None:
    directory = Directory(str(tmp_path))
    touched = directory.scratch() / ".lock"
    os.utime(touched, (0, 0))
    directory.create("a", b"x")
    assert time.time() - touched.stat().st_mtime < 3600


def test_a_folder_taken_for_left_over_while_it_was_made_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cleaning process comes between the making of the folder and its lock, or takes the lock itself."""
    made: list[Path] = []
    original = tempfile.mkdtemp

    def removed_at_once(**named: Any) -> str:
        path = Path(original(**named))
        made.append(path)
        if len(made) == 1:
            path.rmdir()
        elif len(made) == 2:
            other = scratch._opened(path / ".lock")
            assert scratch.lock(other)
        return str(path)

    monkeypatch.setattr(tempfile, "mkdtemp", removed_at_once)
    assert Directory(str(tmp_path)).scratch() == made[2]


@pytest.mark.parametrize("stale_only", [True, False])
def test_a_file_that_is_open_does_not_keep_its_folder(
    stale_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NFS and FUSE give an open file that is removed another name in its folder until it is closed."""
    original = os.unlink

    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        inode = os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_ino
        mine = [
            os.stat(f"/proc/self/fd/{name}")
            for name in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{name}")
        ]
        if Path(path).name == ".lock" and any(found.st_ino == inode for found in mine):
            os.rename(path, Path(path).with_name(".hidden"), src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
        else:
            original(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    directory = Directory(str(tmp_path))
    folder = directory.scratch()
    if stale_only:
        shutil.copytree(folder, tmp_path / (folder.name + "x"))
    directory.clean_scratch(stale_only=stale_only)
    assert [path.name for path in tmp_path.iterdir()] == ([folder.name] if stale_only else [])


@pytest.mark.parametrize("url", ["memory://private", "local"])
def test_folders_are_private_and_nobody_elses_is_used(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    base = Path(url if "://" in url else shared)
    (tmp_path / "precious" / "-x").mkdir(parents=True)
    (tmp_path / "precious" / "mine.txt").write_text("mine")
    planted = [".tmp", f"clipfilter-{os.getuid()}", ".tmp-00000000-x", "clipfilter-scratch-00000000-x"]
    for name in planted:
        (shared / name).symlink_to(tmp_path / "precious")
        os.utime(shared / name, (0, 0), follow_symlinks=False)
    directory = Directory(url if "://" in url else str(base))
    folder = directory.scratch()
    assert folder.parent == shared
    assert folder.name not in planted
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    directory.create("a", b"x")
    directory.clean_scratch(stale_only=True)
    directory.clean_scratch(stale_only=False)
    assert (tmp_path / "precious" / "mine.txt").read_text() == "mine"
    assert sorted(path.name for path in shared.iterdir() if path.is_symlink()) == sorted(planted)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user")
def test_folders_of_other_users_are_not_removed(tmp_path: Path) -> None:
    theirs = Directory(str(tmp_path)).scratch()
    other = tmp_path / (theirs.name + "x")
    shutil.copytree(theirs, other)
    os.chown(other, 12345, 12345)
    os.utime(other / ".lock", (0, 0))
    Directory(str(tmp_path)).clean_scratch(stale_only=True)
    assert other.exists()


# --- a name is given once, to a whole file -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EXDEV, errno.EACCES])
def test_without_hard_links_files_appear_whole_and_the_first_wins(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(code))
    seen = []
    original = os.rename

    def rename(source: Any, target: Any) -> None:
        seen.append((Path(source).read_bytes(), Path(target).exists()))
        original(source, target)

    monkeypatch.setattr(os, "rename", rename)
    directory = Directory(str(tmp_path))
    assert directory.create("commits/a.json", b"first")
    assert not directory.create("commits/a.json", b"second")
    assert seen == [(b"first", False)]
    assert (tmp_path / "commits" / "a.json").read_bytes() == b"first"
    directory.clean_scratch(stale_only=False)
    assert [path.name for path in tmp_path.rglob("*")] == ["commits", "a.json"]


@pytest.mark.parametrize("code", [errno.EIO, errno.EPERM, errno.ENOSPC])
def test_where_renaming_fails_too_nothing_stands_under_the_name(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = Directory(str(tmp_path))
    with monkeypatch.context() as broken:
        broken.setattr(os, "link", failing(errno.EPERM))
        broken.setattr(os, "rename", failing(code))
        with pytest.raises(OSError, match=os.strerror(code)):
            directory.create("a.json", b"x" * 100_000)
    assert not (tmp_path / "a.json").exists()
    assert [path.name for path in directory.scratch().iterdir()] == [".lock"]
    assert directory.create("a.json", b"whole")


def test_a_link_whose_answer_was_lost_is_still_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS asks again when no answer comes, and hears that the name is taken: by itself."""
    original = os.link

    def link(source: Any, target: Any) -> None:
        original(source, target)
        original(source, target)

    monkeypatch.setattr(os, "link", link)
    directory = Directory(str(tmp_path))
    assert directory.create("a.json", b"x")
    monkeypatch.undo()
    assert not directory.create("a.json", b"y")


def _create_many(url: str, number: int, links: bool, count: int, start: Any, told: Any) -> None:
    if not links:
        os.link = failing(errno.EPERM)  # type: ignore[assignment]
    directory = Directory(url)
    start.wait()
    told.put([name for name in range(count) if directory.create(f"c/{name}", f"{number} ".encode() * 10_000)])
    directory.clean_scratch(stale_only=False)


@pytest.mark.parametrize("links", [True, False])
def test_of_several_processes_one_is_first_at_each_name(links: bool, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, told = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_create_many, args=(str(tmp_path), number, links, 40, start, told))
        for number in range(3)
    ]
    for process in processes:
        process.start()
    created = sorted(name for _ in processes for name in told.get(timeout=120))
    for process in processes:
        process.join()
    assert created == list(range(40))
    for name in range(40):
        data = (tmp_path / "c" / str(name)).read_bytes()
        assert len(data) == 20_000
        assert len(set(data.split())) == 1


def test_a_reader_never_sees_half_a_file_where_there_are_failing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    done = threading.Event()
    sizes: set[int] = set()

    def look() -> None:
        while not done.is_set():
            for name in Directory(str(tmp_path)).names("c"):
                sizes.add((tmp_path / "c" / name).stat().st_size)

    reader = threading.Thread(target=look)
    reader.start()
    directory = Directory(str(tmp_path))
    for name in range(30):
        directory.create(f"c/{name}", bytes(300_000))
    done.set()
    reader.join()
    assert sizes <= {300_000}


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_mounts_that_cannot_flush_folders_are_used_all_the_same(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        original(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    directory = Directory(str(tmp_path))
    assert directory.create("a", b"x")
    (directory.scratch() / "b").write_bytes(b"y")
    directory.publish(directory.scratch() / "b", "b")
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        storage.flush(tmp_path / "a")
