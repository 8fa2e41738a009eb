"""Read a checkpoint file without running anything it contains."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipfilter.errors import RefusedError, reason

if TYPE_CHECKING:
    from torch import Tensor, nn

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a torch checkpoint (.pt, .pth, .bin), on the CPU.

    Torch checkpoints are read with `weights_only`: code in a pickle is refused, never run. Of a TorchScript archive
    (OpenAI's own files) only the tensors are read, by an unpickler that knows nothing else. A checkpoint of a training
    run (`{"state_dict": ...}`, names beginning with `module.`) is unwrapped. Raises RefusedError.
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
    if is_torchscript(path):
        return _read_torchscript(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise RefusedError(
            f"the checkpoint {path} holds more than weights (pickled code or objects) and was not loaded: convert its "
            "state dict to .safetensors on a machine where you trust it"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise RefusedError(f"the checkpoint {path} is damaged or no torch checkpoint ({reason(error)})") from None
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    tensors = isinstance(loaded, dict) and all(isinstance(v, torch.Tensor) for v in loaded.values())
    if not loaded or not tensors or not all(isinstance(name, str) for name in loaded):
        raise RefusedError(f"the checkpoint {path} does not hold a state dict (names to tensors)")
    return {name.removeprefix("module."): tensor for name, tensor in loaded.items()}


def load_strictly(module: nn.Module, state: dict[str, Tensor], refusal: str) -> None:
    """Copy `state` into `module`, every tensor of the same name and shape; RefusedError, `refusal: why`, otherwise.

    Temperature and bias may be written as a scalar or as one element.
    """
    expected = module.state_dict()
    for name in ("logit_scale", "logit_bias"):
        if name in state and name in expected and state[name].numel() == expected[name].numel():
            state[name] = state[name].reshape(expected[name].shape)
    try:
        module.load_state_dict(state, strict=True)
    except RuntimeError as error:
        details = [line.strip() for line in str(error).splitlines()[1:]]
        raise RefusedError(f"{refusal}: {(details[0] if details else str(error))[:200]}") from None


# --- TorchScript ------------------------------------------------------------------------------------------------------


def is_torchscript(path: Path) -> bool:
    """Whether the file is an archive of `torch.jit.save` (a zip file that holds code beside its tensors)."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return any(name.endswith("/constants.pkl") for name in names) and any("/code/" in name for name in names)


class _Module:
    """Stands for every scripted class: holds the attributes it was pickled with, and nothing of its code."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Tensors(pickle.Unpickler):
    """Builds modules as `_Module` and tensors from the archive's raw numbers; refuses everything else."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self._archive, self._root = archive, root
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module.startswith("__torch__"):
            return _Module
        if module == "torch" and name.endswith("Storage"):
            return name
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
            ("torch.jit._pickle", "build_tensorlist"): list,
            ("torch.jit._pickle", "build_intlist"): list,
            ("torch.jit._pickle", "build_doublelist"): list,
            ("torch.jit._pickle", "build_boollist"): list,
            ("torch.jit._pickle", "restore_type_tag"): lambda value, _: value,
            ("torch", "device"): torch.device,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"it wants {module}.{name}")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Tensor:
        import torch

        _, kind, key, _, count = pid
        dtypes = {
            "FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16,
            "DoubleStorage": torch.float64, "LongStorage": torch.int64, "IntStorage": torch.int32,
            "BoolStorage": torch.bool, "ByteStorage": torch.uint8,
        }  # fmt: skip
        if kind not in dtypes:
            raise pickle.UnpicklingError(f"it holds numbers of the unknown kind {kind}")
        if key not in self._storages:
            entry = self._archive.getinfo(f"{self._root}/data/{key}")
            if entry.compress_type != zipfile.ZIP_STORED:  # torch never compresses; a bomb does
                raise pickle.UnpicklingError(f"its tensor {key} is compressed")
            data = bytearray(self._archive.read(entry))
            numbers = torch.frombuffer(data, dtype=dtypes[kind]) if data else torch.empty(0, dtype=dtypes[kind])
            if numbers.numel() < count:
                raise pickle.UnpicklingError(f"its tensor {key} is too short")
            self._storages[key] = numbers
        return self._storages[key]

    @staticmethod
    def _tensor(storage: Tensor, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        return storage.as_strided(tuple(size), tuple(stride), offset)


def _read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the archived module by their names, as its `state_dict()` has them."""
    try:
        with zipfile.ZipFile(path) as archive:
            data = next(name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl"))
            loaded = _Tensors(archive, data.removesuffix("/data.pkl")).load()
        state = dict(_named_tensors(loaded, ""))
    except Exception as error:  # a damaged pickle raises anything at all
        raise RefusedError(
            f"the TorchScript archive {path} cannot be read without running its code ({reason(error)}): on a machine where you "
            "trust it, save `torch.jit.load(FILE).state_dict()` with safetensors.torch.save_file"
        ) from None
    if not state:
        raise RefusedError(f"the TorchScript archive {path} holds no tensors")
    return state


def _named_tensors(value: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    import torch

    for name, item in getattr(value, "attributes", {}).items():
        if isinstance(item, torch.Tensor):
            yield prefix + name, item
        elif isinstance(item, _Module):
            yield from _named_tensors(item, f"{prefix}{name}.")
