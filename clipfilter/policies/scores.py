"""Policies that only score: named concepts, heads, or the rules of a policy, as columns without thresholds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import ValidationError

from clipfilter.errors import RefusedError
from clipfilter.models import heads as head_models
from clipfilter.policies.load import sentence_of
from clipfilter.policies.schema import Policy
from clipfilter.policies.yaml_nodes import MAX_BYTES, Node, YamlRefusedError, read_yaml


class ScorePolicy(Policy):
    """A policy whose rules need no bands: each adds its column `cf_score.<rule>`, and nothing is decided."""

    decides: ClassVar[bool] = False


def scores_of(policy: Policy) -> ScorePolicy:
    """The scores of a policy: its rules without bands, calibrations and dataset-level rules.

    So the same columns stay valid when only thresholds change. Raises RefusedError where nothing is left.
    """
    data = policy.canonical()
    rules = [
        {key: value for key, value in rule.items() if key not in ("review", "reject", "on_missing")}
        for rule in data["rules"]
        if "fraction" not in rule
    ]
    if not rules:
        raise RefusedError(f"policy {policy.name!r} has no rule with a score of its own.")
    return ScorePolicy.from_canonical({**data, "rules": rules, "calibrations": []})


def named_scores(heads: Sequence[str] = (), concepts: str | None = None) -> ScorePolicy:
    """A column for each head (a published name, or file:/path) and for each concept of a file.

    concepts: YAML, `name: [phrases]` or `name: {any_of: [...], but_not: [...], score: ...}` for each column, as in a
    policy's rules; `templates:` beside them is for all.

    Raises RefusedError with file, line and column.
    """
    rules: list[dict[str, object]] = [{"id": _head_id(name), "head": name} for name in heads]
    root = Node({}, 1, 1)
    if concepts is not None:
        root = _concepts(concepts)
    nodes = [_given(rule) for rule in rules]
    templates = root.data.pop("templates", None)
    for name, node in root.data.items():
        concept = Node({"any_of": node}, node.line, node.column, keys={"any_of": (node.line, node.column)})
        wanted = concept if isinstance(node.data, list) else node
        place = root.keys[name]
        rule = Node({"id": Node(name, *place), "concept": wanted}, *place, keys={"id": place, "concept": place})
        nodes.append(rule)
    whole = Node({"policy": Node("scores", 1, 1), "version": Node(0, 1, 1), "rules": Node(nodes, 1, 1)}, 1, 1)
    whole.keys = dict.fromkeys(whole.data, (1, 1))
    if templates is not None:
        whole.data["templates"], whole.keys["templates"] = templates, root.keys["templates"]
    try:
        return ScorePolicy.model_validate(whole.plain())
    except ValidationError as error:
        raise RefusedError(sentence_of(error, whole, concepts or "--heads")) from None


def _given(rule: dict[str, object]) -> Node:
    return Node({key: Node(value, 1, 1) for key, value in rule.items()}, 1, 1, keys=dict.fromkeys(rule, (1, 1)))


def _head_id(name: str) -> str:
    """The column's name: that of the head, or of its file."""
    stem = Path(name.removeprefix(head_models.FILE)).stem if name.startswith(head_models.FILE) else name
    return re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-_")[:64] or "head"


def _concepts(path: str) -> Node:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RefusedError(f"--concepts {path} cannot be read: {error.strerror}.") from None
    try:
        root = read_yaml(raw)
    except YamlRefusedError as error:
        raise RefusedError(f"{path}:{error.line}:{error.column}: {error.message}") from None
    if not isinstance(root.data, dict) or not (set(root.data) - {"templates"}):
        raise RefusedError(f"{path}: concepts are a map of names to phrases, for example `zebra: [a zebra, zebras]`.")
    if set(root.data) >= {"policy", "rules"}:
        raise RefusedError(f"{path} is a policy; give it with --policy instead of --concepts.")
    return root
