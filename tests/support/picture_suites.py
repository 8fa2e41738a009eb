"""Pictures of other projects' test suites, fetched as source packages by the package managers into a cache, never committed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import PIL

#: Where archives stay between runs.
CACHE = Path(os.environ.get("CLIPFILTER_SUITES") or Path.home() / ".cache" / "clipfilter-suites")
_SECONDS = 600
_ENDINGS = re.compile(
    r"\.(jpe?g|jpe|mpo|a?png|webp|gif|bmp|dib|rle|tiff?|avif|ico|cur|tga|icb|vda|vst|jp2|j2k|jpx|jpc|j2c|ppm|pgm|pbm|pnm|pfm"
    r"|hei[cf]|psd|svg|jxl|qoi|dds|exr|hdr|xcf|pcx|sgi|ras|xbm|xpm|icns|eps|pdf)$",
    re.IGNORECASE,
)


class Unavailable(Exception):
    """The suite cannot be had here: no network, no package manager."""


class Suite(NamedTuple):
    """package: of `manager`, which is pip or apt. folder: what its members' names begin with, below the archive's own."""

    package: str
    manager: str
    folder: str = ""


SUITES = {
    "pillow": Suite(f"pillow=={PIL.__version__}", "pip", "Tests/images"),
    "libpng": Suite("libpng1.6", "apt", "contrib"),  # with Willem van Schaik's PngSuite
    "libwebp": Suite("libwebp", "apt"),
    "libheif": Suite("libheif", "apt"),
    "libjpeg-turbo": Suite("libjpeg-turbo", "apt", "testimages"),
    "giflib": Suite("giflib", "apt"),
    "libgd": Suite("libgd2", "apt", "tests"),
    "netsurf": Suite("netsurf", "apt", "lib"),  # with Jason Summers' bmpsuite, and thousands that a fuzzer made
    "kimageformats": Suite("kimageformats", "apt", "autotests"),
    "openjpeg": Suite("openjpeg2", "apt"),
    "libtiff": Suite("tiff", "apt", "test"),
}


def pictures(name: str) -> Iterator[tuple[str, bytes]]:
    """(path in the suite, bytes) of every picture, in order. Raises Unavailable."""
    suite = SUITES[name]
    with tarfile.open(archive(name)) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            path = member.name.partition("/")[2]
            if member.isfile() and path.startswith(suite.folder) and _ENDINGS.search(path):
                data = tar.extractfile(member)
                assert data is not None
                yield path, data.read()


def archive(name: str) -> Path:
    """The suite's source archive, fetched when it is not in the cache. Raises Unavailable."""
    folder = CACHE / name
    if not (found := _archives(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        suite = SUITES[name]
        try:
            _by_pip(suite.package, folder) if suite.manager == "pip" else _by_apt(suite.package, folder)
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"{name}: {error}") from error
        if not (found := _archives(folder)):
            raise Unavailable(f"{suite.manager} gave no source archive of {suite.package}")
    return found[0]


def _archives(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.tar.*")) if "debian" not in path.name and path.suffix != ".asc"]


def _by_pip(package: str, folder: Path) -> None:
    options = ("--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(folder))
    _run([sys.executable, "-m", "pip", "download", *options, package], folder)


def _by_apt(package: str, folder: Path) -> None:
    """With lists of its own, made of the machine's: most machines name no sources of sources."""
    if shutil.which("apt-get") is None:
        raise Unavailable("no apt-get on this machine")
    lists = CACHE / "apt"
    options = []
    for option, place in (("Dir::Etc::SourceParts", "parts"), ("Dir::State::Lists", "lists"), ("Dir::Cache", "cache")):
        (lists / place).mkdir(parents=True, exist_ok=True)
        options += ["-o", f"{option}={lists / place}"]
    options += ["-o", "Dir::Etc::SourceList=/dev/null"]
    for path in [Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]:
        if path.is_file() and path.suffix in (".list", ".sources") and "debian" in (text := path.read_text()):
            text = re.sub(r"^(Types: )?deb\b(?!-)", r"\1deb-src", text, flags=re.MULTILINE)
            (lists / "parts" / path.name).write_text(text)
    if not any((lists / "lists").glob("*Sources*")):
        _run(["apt-get", *options, "-qq", "update"], folder)
    _run(["apt-get", *options, "-qq", "source", "--download-only", "--tar-only", package], folder)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        raise OSError(f"{command[0]} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
