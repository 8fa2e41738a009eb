"""Finds a head's file (given, cached, or downloaded once with its sha256 checked) and loads it for one model."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from clipfilter.errors import RefusedError
from clipfilter.models.heads.convert import convert
from clipfilter.models.heads.file import FORMAT, HeadFile, read_head_file
from clipfilter.models.heads.head import Head
from clipfilter.models.heads.registry import FILE, HEADS, Original, check_name, same_embeddings
from clipfilter.storage import file_sha256, local_path, replacing

FOLDER_VARIABLE = "CLIPFILTER_HEADS"
_MAX_DOWNLOAD_BYTES = 64 * 1024 * 1024
_TIMEOUT_SECONDS = 30


def cache_folder() -> Path:
    """Where heads are kept: `$XDG_CACHE_HOME/clipfilter/heads`, by default below `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "clipfilter" / "heads"


def load_head(name: str, fingerprint: dict[str, Any], dim: int, *, sha256: str | None = None) -> Head:
    """The head called `name` for the model with this fingerprint, whose embeddings have `dim` numbers.

    name: a published head (`heads.HEADS`) or `file:/path/to/head.safetensors`; sha256: what the file must hash to.
    A published head is looked for in the cache, in the folder named by CLIPFILTER_HEADS, and at its publisher's.
    Raises RefusedError where there is no such head, it is for other embeddings, or its file cannot be had or used.
    """
    check_name(name)
    shown = str(fingerprint.get("model"))
    if name.startswith(FILE):
        return _own(name, shown, fingerprint, dim, sha256)
    published = HEADS[name].originals
    model = next((model for model in published if same_embeddings(model, fingerprint)), None)
    if model is None:
        raise RefusedError(
            f"the head {name} is for embeddings of {' or '.join(published)}, not of {shown}: "
            f"use --model {next(iter(published))}, or a head made for {shown}"
        )
    original = published[model]
    if sha256 is not None and sha256 != original.sha256:
        raise RefusedError(f"the head {name} for {model} has the sha256 {original.sha256[:12]}, not {sha256[:12]}")
    return _checked(name, original.sha256, model, _published(name, model, original), dim)


def file_path(name: str) -> Path:
    """The absolute path of `file:/path`."""
    return local_path(name.removeprefix(FILE))


def check_file(path: Path) -> str:
    """sha256 of the head in this file, after it was found to be one. Raises RefusedError."""
    read_head_file(path).network(str(path))
    return file_sha256(path)


def _own(name: str, shown: str, fingerprint: dict[str, Any], dim: int, sha256: str | None) -> Head:
    path = file_path(name)
    content = read_head_file(path)
    found = file_sha256(path)
    if sha256 is not None and found != sha256:
        raise RefusedError(
            f"the head {path} is not the file it was ({found[:12]}, before {sha256[:12]}): "
            "bring that file back, or begin with the policy anew"
        )
    model = content.metadata.get("model", "")
    weights = content.metadata.get("weights_sha256")
    named = same_embeddings(model, fingerprint)
    if not (named if weights is None else weights == fingerprint.get("weights_sha256")):
        other = "other weights of " if named else ""
        raise RefusedError(f"the head {path} is for embeddings of {other}{model[:80] or 'no model'}, not of {shown}")
    return _checked(name, found, model, content, dim)


def _checked(name: str, sha256: str, model: str, content: HeadFile, dim: int) -> Head:
    network = content.network(name)
    if network.dim != dim:
        raise RefusedError(f"the head {name} reads embeddings of {network.dim} numbers, {model} makes {dim}")
    return Head.of(name, sha256, model, network)


def _published(name: str, model: str, original: Original) -> HeadFile:
    """From the cache, else converted from the original and put there."""
    cached = cache_folder() / f"{original.sha256[:32]}-{FORMAT}.safetensors"
    if cached.is_file():
        with contextlib.suppress(RefusedError):  # a damaged cache is only made anew
            content = read_head_file(cached)
            if content.metadata.get("source_sha256") == original.sha256:
                return content
    path = _original(name, model, original)
    content = convert(path, original.format, model)
    content.metadata["source_sha256"] = original.sha256
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs the time
        content.write(cached)
    return content


def _original(name: str, model: str, original: Original) -> Path:
    """The published file, its sha256 checked: from CLIPFILTER_HEADS, from the cache, or downloaded."""
    given = os.environ.get(FOLDER_VARIABLE, "")
    cached = cache_folder() / original.file
    for path in (Path(given) / original.file if given else None, cached):
        if path is not None and path.is_file():
            if file_sha256(path) != original.sha256:
                raise RefusedError(
                    f"{path} is not the head {name} as it was published (its sha256 is not {original.sha256[:12]}...): "
                    f"remove it, or replace it by {original.url}"
                )
            return path
    try:
        content = _download(original.url)
    except (OSError, ValueError) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise RefusedError(
            f"the head {name} for {model} is not in the cache and cannot be downloaded ({str(reason)[:120]}); on a machine "
            f"with a network, download {original.url} and put it here as {cached}, or into a folder named by {FOLDER_VARIABLE}"
        ) from None
    if hashlib.sha256(content).hexdigest() != original.sha256:
        raise RefusedError(
            f"{original.url} is not the file it was (its sha256 is not {original.sha256[:12]}...), so it was not used: "
            f"put the published file as {cached} if you have it"
        )
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with replacing(cached, shared=True) as unfinished:
            unfinished.write_bytes(content)
    except OSError as error:
        raise RefusedError(
            f"the head {name} cannot be kept in {cached.parent} ({error.strerror}): set XDG_CACHE_HOME to a writable folder"
        ) from None
    return cached


def _download(url: str) -> bytes:
    """The content behind an https URL; OSError where it cannot be had, is too large, or leads away from https."""
    request = Request(url, headers={"User-Agent": "clipfilter"})  # noqa: S310  (https, from the registry)
    with urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310
        if urlsplit(response.url).scheme != "https":
            raise OSError("it leads away from https")
        content: bytes = response.read(_MAX_DOWNLOAD_BYTES + 1)
    if len(content) > _MAX_DOWNLOAD_BYTES:
        raise OSError(f"it is larger than {_MAX_DOWNLOAD_BYTES // 2**20} MiB")
    return content
