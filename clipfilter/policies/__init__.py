"""Policies: plain-text rules, loaded strictly, compiled once per model, evaluated on columns."""

from __future__ import annotations

from clipfilter.policies.compile import CompiledPolicy, compile_policy
from clipfilter.policies.evaluate import Decisions, Scores
from clipfilter.policies.load import load_policy, pack_names, parse_policy
from clipfilter.policies.schema import Policy

__all__ = [
    "CompiledPolicy",
    "Decisions",
    "Policy",
    "Scores",
    "compile_policy",
    "load_policy",
    "pack_names",
    "parse_policy",
]
