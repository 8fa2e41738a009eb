"""Policies that only score: named concepts, heads, or the rules of a policy, as columns without thresholds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import ValidationError

from clipfilter.errors import RefusedError
from clipfilter.models import heads as head_models
from clipfilter.policies.kinds.concept import Concept
from clipfilter.policies.kinds.head import Head
from clipfilter.policies.kinds.registry import KINDS, measure_in
from clipfilter.policies.language.load import sentence_of
from clipfilter.policies.language.schema import Policy
from clipfilter.policies.language.yaml_nodes import Node, read_yaml_file


class ScorePolicy(Policy):
    """A policy whose rules need no bands: each adds its column `cf_score.<rule>`, and nothing is decided."""

    decides: ClassVar[bool] = False


def scores_of(policy: Policy) -> ScorePolicy:
    """The scores of a policy: what its rules measure, without bands, conditions, calibrations, overrides and rules that
    measure nothing themselves (fractions, known pictures).

    So the same columns stay valid when only thresholds change. Raises RefusedError where nothing is left.
    """
    data = policy.canonical()
    kept = ("id", "templates", *KINDS)
    rules = [
        {key: value for key, value in rule.items() if key in kept}
        for rule in data["rules"]
        if measure_in(rule).measures
    ]
    if not rules:
        raise RefusedError(f"policy {policy.name!r} has no rule with a score of its own.")
    return ScorePolicy.from_canonical({"policy": policy.name, "version": policy.version, "rules": rules})


def named_scores(heads: Sequence[str] = (), concepts: str | None = None) -> ScorePolicy:
    """A column for each head (a published name, or file:/path) and for each concept of a file.

    concepts: YAML, `name: [phrases]` or `name: {any_of: [...], but_not: [...], score: ...}` for each column, as in a
    policy's rules; `templates:` beside them is for all.

    Raises RefusedError with file, line and column.
    """
    root = _concepts(concepts) if concepts is not None else _map({})
    rules = [_map({"id": Node(_head_id(name), 1, 1), Head.kind: Node(name, 1, 1)}) for name in heads]
    whole = {"policy": Node("scores", 1, 1), "version": Node(0, 1, 1)}
    if "templates" in root.data:
        whole["templates"] = root.data.pop("templates")
    for name, node in root.data.items():
        concept = _map({"any_of": node}) if isinstance(node.data, list) else node
        at = root.keys[name]
        rules.append(_map({"id": Node(name, at.line, at.column, file=at.file), Concept.kind: concept}))
    policy = _map({**whole, "rules": Node(rules, 1, 1)})
    try:
        return ScorePolicy.model_validate(policy.plain())
    except ValidationError as error:
        raise RefusedError(sentence_of(error, policy, concepts or "--heads")) from None


def _map(data: dict[str, Node]) -> Node:
    """A map whose keys stand where their values do."""
    first = next(iter(data.values()), Node(None, 1, 1))
    return Node(data, first.line, first.column, keys={key: node.at for key, node in data.items()}, file=first.file)


def _head_id(name: str) -> str:
    """The column's name: that of the head, or of its file."""
    stem = Path(name.removeprefix(head_models.FILE)).stem if name.startswith(head_models.FILE) else name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:64] or "head"


def _concepts(path: str) -> Node:
    root = read_yaml_file(path, f"--concepts {path}")
    if not isinstance(root.data, dict) or not (set(root.data) - {"templates"}):
        raise RefusedError(f"{path}: concepts are a map of names to phrases, for example `zebra: [a zebra, zebras]`.")
    if set(root.data) >= {"policy", "rules"}:
        raise RefusedError(f"{path} is a policy; give it with --policy instead of --concepts.")
    return root
