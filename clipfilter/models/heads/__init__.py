"""Heads: small models on CLIP image embeddings, published ones by name and anybody's own by file."""

from __future__ import annotations

from clipfilter.models.heads.convert import convert
from clipfilter.models.heads.file import HeadFile, read_head_file
from clipfilter.models.heads.head import Head
from clipfilter.models.heads.load import cache_folder, check_file, file_path, load_head
from clipfilter.models.heads.network import Layers, SafetyChecker
from clipfilter.models.heads.registry import FILE, HEADS, check_name, same_embeddings

__all__ = [
    "FILE",
    "HEADS",
    "Head",
    "HeadFile",
    "Layers",
    "SafetyChecker",
    "cache_folder",
    "check_file",
    "check_name",
    "convert",
    "file_path",
    "load_head",
    "read_head_file",
    "same_embeddings",
]
