"""Files that appear whole or not at all, and nothing unfinished left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipfilter.errors import RefusedError
from clipfilter.storage import Directory, directory_of, only_one, replacing


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


def test_what_a_process_left_goes_though_nobody_has_waited_for_it_yet(tmp_path: Path) -> None:
    code = f"import os; from clipfilter.storage import Directory; Directory({str(tmp_path)!r}).scratch(); os._exit(0)"
    ended = subprocess.Popen([sys.executable, "-c", code])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert [path.is_dir() for path in (tmp_path / ".tmp").iterdir()] == [True]
    Directory(str(tmp_path)).clean_scratch(stale_only=True)
    assert not (tmp_path / ".tmp").exists()
    ended.wait()
