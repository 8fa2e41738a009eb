"""Finds and reads policy files: packs by name, others by path; only small regular files are opened."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from clipfilter.errors import RefusedError
from clipfilter.policies.language.yaml_nodes import MAX_YAML_BYTES
from clipfilter.policies.parts.fields import suggest

SUFFIXES = (".yaml", ".yml")


def packs_folder() -> Path:
    """Where the packs lie: inside the package when installed, else the repository's top-level `policies/`."""
    inside = Path(__file__).parents[1] / "packs"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "policies"


def pack_names() -> list[str]:
    """Names of the policy packs that come with clipfilter, sorted."""
    folder = packs_folder()
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder.is_dir() else []


def pack_path(name: str) -> Path:
    """The file of a pack. Raises RefusedError, with the nearest name, where there is none."""
    packs = pack_names()
    if name not in packs:
        raise RefusedError(
            f"there is no policy pack {name[:80]!r} (packs: {', '.join(packs) or 'none'}; "
            f"or give the path of a .yaml file){suggest(name, packs)}"
        )
    return packs_folder() / f"{name}.yaml"


def read_policy_file(path: Path) -> bytes:
    """At most MAX_BYTES + 1 bytes of a regular file; one more than allowed shows that it is too large.

    Raises OSError or ValueError where there is no such file, or it is a device or pipe (which could block for ever).
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("it is not a regular file")
        return file.read(MAX_YAML_BYTES + 1)
