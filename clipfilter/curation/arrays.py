"""Matrices from .npy files and folders, without pickle."""

from __future__ import annotations

import numpy as np

from clipfilter.errors import RefusedError
from clipfilter.storage import directory_of


def load_matrix(url: str) -> np.ndarray:
    """float32 [n, d] of a .npy file (path or URL). Raises RefusedError when it holds anything else."""
    directory, name = directory_of(url)
    try:
        with directory.open(name) as handle:
            values = np.load(handle, allow_pickle=False)
    except FileNotFoundError as error:
        raise RefusedError(f"{url} does not exist; check the spelling.") from error
    except (ValueError, EOFError, OSError) as error:
        raise RefusedError(f"{url} is not a .npy array that can be read safely ({error}).") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f" or not len(values):
        raise RefusedError(f"{url} must hold a matrix of floats, one row per embedding.")
    if not np.isfinite(values).all():
        raise RefusedError(f"{url} holds numbers that are not finite.")
    return np.ascontiguousarray(values, np.float32)
