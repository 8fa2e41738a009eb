"""Read a checkpoint file without running anything it contains, and name its bytes."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

from clipfilter.errors import RefusedError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch checkpoint (.pt, .pth, .bin), on the CPU.

    Torch checkpoints are read with `weights_only`: code in a pickle is refused, never run. A checkpoint of a
    training run (`{"state_dict": ...}`, names beginning with `module.`) is unwrapped. Raises RefusedError.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise RefusedError(f"the checkpoint {path} does not exist")
    if path.suffix not in SUFFIXES:
        raise RefusedError(f"the checkpoint {path} is of an unknown kind: use one of {', '.join(SUFFIXES)}")
    if path.suffix == ".safetensors":
        try:
            state: dict[str, Tensor] = load_file(path)
            return state
        except (SafetensorError, OSError, ValueError) as error:
            raise RefusedError(f"the checkpoint {path} is damaged or no safetensors file ({error})") from None
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RefusedError(
            f"the checkpoint {path} holds more than weights (pickled code or objects, or TorchScript) and was "
            "not loaded: convert its state dict to .safetensors on a machine where you trust it"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RefusedError(f"the checkpoint {path} is damaged or no torch checkpoint ({reason})") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not loaded or not all(isinstance(v, torch.Tensor) for v in loaded.values()):
        raise RefusedError(f"the checkpoint {path} does not hold a state dict (names to tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def file_sha256(path: Path) -> str:
    """sha256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
