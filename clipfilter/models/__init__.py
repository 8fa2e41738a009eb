"""Encoders: a model's name becomes something that puts images and texts into one vector space."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clipfilter.faces import lazily
from clipfilter.models.catalog import OTHER_NAMES, download_model, find_model, list_models
from clipfilter.models.interface import Encoder
from clipfilter.models.load import load_encoder

if TYPE_CHECKING:
    from clipfilter.models._torch import torch_with_torchvision
    from clipfilter.models.encoder import TorchEncoder
    from clipfilter.models.nano import NANO_CONFIG, nano_config_text
    from clipfilter.models.nano.network import Nano, pack_nano
    from clipfilter.models.onnx import ONNX_PREFIX, folder_size, loss_note, read_folder
    from clipfilter.models.onnx_export import Calibration, export_onnx, weight_size

__all__ = [
    "NANO_CONFIG",
    "ONNX_PREFIX",
    "OTHER_NAMES",
    "Calibration",
    "Encoder",
    "Nano",
    "TorchEncoder",
    "download_model",
    "export_onnx",
    "find_model",
    "folder_size",
    "list_models",
    "load_encoder",
    "loss_note",
    "nano_config_text",
    "pack_nano",
    "read_folder",
    "torch_with_torchvision",
    "weight_size",
]

__getattr__ = lazily(
    __name__,
    {
        "Calibration": "onnx_export",
        "NANO_CONFIG": "nano",
        "Nano": "nano.network",
        "ONNX_PREFIX": "onnx",
        "TorchEncoder": "encoder",
        "export_onnx": "onnx_export",
        "folder_size": "onnx",
        "loss_note": "onnx",
        "nano_config_text": "nano",
        "pack_nano": "nano.network",
        "read_folder": "onnx",
        "torch_with_torchvision": "_torch",
        "weight_size": "onnx_export",
    },
)
