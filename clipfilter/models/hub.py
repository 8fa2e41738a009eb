"""Files of model repositories on the Hugging Face hub: from its cache, else from the network, quickly refused without."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from clipfilter.errors import reason
from clipfilter.storage import local_path

#: Seconds to wait for a connection to the hub, and for how long the answer is believed.
_CONNECT_SECONDS = 5
_BELIEVED_SECONDS = 60

INSTALL = "pip install 'clipfilter[hf]'"


class Unavailable(Exception):
    """A file can neither be found in the cache nor downloaded; the text says why."""


def is_folder(place: str) -> bool:
    """Whether what follows a prefix names a folder of this machine and not a hub repository."""
    return place.startswith(("/", ".", "~")) or local_path(place).is_dir()


def cached(repo: str, file: str, revision: str | None = None) -> Path | None:
    """The local copy of a repository's file, or None; asks no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def fetch(repo: str, file: str, revision: str | None = None) -> Path | None:
    """The local copy of a repository's file, from the cache or downloaded; None where the repository has no such file.

    What is in the cache is used as it is: weights do not change between two runs because their publisher changed them.
    Raises Unavailable.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    known = try_to_load_from_cache(repo, file, revision=revision)
    if known is not None:  # a path, or the mark that this commit has no such file
        return Path(known) if isinstance(known, str) else None
    try:
        with offline_if_unreachable():
            return Path(hf_hub_download(repo, file, revision=revision))
    except LocalEntryNotFoundError:
        raise Unavailable("it is not in the cache and the hub cannot be reached") from None
    except EntryNotFoundError:
        return None
    except GatedRepoError:
        raise Unavailable("its terms must be accepted on its page first, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise Unavailable("the hub has no such repository, or it is private: `hf auth login`") from None
    except Exception as error:  # the client has dozens of classes; all mean that the file could not be had
        raise Unavailable(reason(error)) from None


def fetch_first(repo: str, files: Sequence[str], revision: str | None = None) -> Path | None:
    """The first of `files` that is in the cache, else the first that the repository has; None. Raises Unavailable."""
    found = next((path for file in files if (path := cached(repo, file, revision)) is not None), None)
    if found is not None:
        return found
    return next((path for file in files if (path := fetch(repo, file, revision)) is not None), None)


def fetch_optional(repo: str, file: str, revision: str | None = None) -> None:
    """Fetch a file that may be missing: a cache filled by another program, without a network, has what it needed."""
    with suppress(Unavailable):
        fetch(repo, file, revision)


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Ask only the cache where the hub cannot be reached; its client would retry every file for most of a minute."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before and not is_reachable():
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


_answers: dict[str, tuple[float, bool]] = {}


def is_reachable() -> bool:
    """Whether something answers at the hub's address, or there is a proxy to ask; remembered for a minute."""
    from huggingface_hub import constants

    endpoint = constants.ENDPOINT
    if getproxies():
        return True
    asked, answer = _answers.get(endpoint, (0.0, False))
    if not asked or time.monotonic() - asked > _BELIEVED_SECONDS:
        url = urlsplit(endpoint)
        try:
            socket.create_connection((url.hostname or "", url.port or 443), timeout=_CONNECT_SECONDS).close()
            answer = True
        except OSError:
            answer = False
        _answers[endpoint] = (time.monotonic(), answer)
    return answer
