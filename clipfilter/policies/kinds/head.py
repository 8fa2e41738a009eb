"""Heads: small models on the image embedding, published ones by name or one's own by file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import BeforeValidator, model_validator

from clipfilter.errors import RefusedError
from clipfilter.models import heads
from clipfilter.models.heads import Layers, load_head
from clipfilter.policies.arithmetic import RECHECK, Recheck, settle
from clipfilter.policies.kinds.base import (
    Block,
    CompiledRule,
    Found,
    Measure,
    Words,
    Written,
    check_probability,
    naming,
)
from clipfilter.policies.parts.attachments import Attachments
from clipfilter.policies.parts.bands import Band
from clipfilter.policies.parts.fields import TEXT, Sha256, fail, shown, text, written_as
from clipfilter.policies.texts import TextEncoder

_OPENED_NEAR = 0.02  # where an error could move a score further than this, too many rows would be computed twice


class Head(Measure):
    """A small model on the image embedding: a published one by name, or `file:/path` with the sha256 of that file."""

    kind = "head"
    about = "A small model on the embedding, by name or file:/path."
    needs_model = True
    judged_by = "heads"

    model_config = written_as(lambda own: {"anyOf": [TEXT, own]})

    name: Annotated[str, BeforeValidator(text("name", 1000))]
    sha256: Sha256 | None = None

    @model_validator(mode="before")
    @classmethod
    def _read(cls, value: Any) -> Any:
        """A name, or {name, sha256}; a head of one's own is read here once, so that the policy holds what it must be."""
        if not isinstance(value, str | dict):
            fail(f"head must be the name of a head, not {shown(value)}")
        named = {"name": value} if isinstance(value, str) else dict(value)
        name = named.get("name")
        if not isinstance(name, str):
            fail("head needs a name; write for example `head: laion-aesthetic-v2`")
        try:
            heads.check_name(name)
            if name.startswith(heads.FILE):
                path = heads.file_path(name)
                named["name"] = f"{heads.FILE}{path}"
                if named.get("sha256") is None:
                    named["sha256"] = heads.check_file(path)
        except RefusedError as error:
            fail(str(error))
        return named

    def plain(self) -> Any:
        return self.name if self.sha256 is None else super().plain()

    def check_band(self, band: Band, *at: str | int) -> None:
        if self.has_probability:
            check_probability(band, *at)

    def identity(self, templates: Sequence[str]) -> Any:
        """The hash of a head's own file, or those behind a name."""
        if self.name in heads.HEADS:
            originals = heads.HEADS[self.name].originals
            return {"head": self.name, "files": {model: original.sha256 for model, original in originals.items()}}
        return {"head": heads.FILE, "sha256": self.sha256}

    @classmethod
    def plan(cls, rules: Sequence[CompiledRule], encoder: TextEncoder, files: Attachments) -> HeadPlan | None:
        """The heads that the rules name, each loaded once."""
        loaded: dict[tuple[str, str | None], heads.Head] = {}
        for rule in rules:
            assert isinstance(rule.measure, cls)
            key = (rule.measure.name, rule.measure.sha256)
            with naming(rule.id):
                if key not in loaded:
                    loaded[key] = load_head(key[0], encoder.fingerprint, encoder.dim, sha256=key[1])
        members = [(rule, loaded[rule.measure.name, rule.measure.sha256]) for rule in rules]  # type: ignore[attr-defined]
        return HeadPlan.build(members, encoder.dim) if rules else None

    @classmethod
    def meaning(cls, spec: Any) -> Words:
        name = _name(spec)
        known = heads.HEADS.get(name)
        more: list[str | Written] = [" (", Written(known.meaning), ")"] if known is not None and known.meaning else []
        return ["The score of the head ", Written(name, 120, isolated=True), *more, " on the embedding of the picture."]

    @classmethod
    def measured(cls, spec: Any) -> Words:
        return [f"the score of {_name(spec)}"]

    @classmethod
    def is_probability(cls, spec: Any) -> bool:
        known = heads.HEADS.get(_name(spec))
        return known is not None and known.score == "probability"

    @classmethod
    def reach(cls, threshold: float) -> float:
        # The reach of a recheck grows with the weights, which a run does not record.
        return 1e-3 * max(1.0, abs(threshold))


def _name(spec: Any) -> str:
    return str(spec if isinstance(spec, str) else spec["name"])


@dataclass(frozen=True)
class LinearHead:
    """A head that is one affine map. How near to its thresholds a float32 score is computed again: the rounding of a
    product grows with the length of its factors, and the weights of a head are no unit vector."""

    width: ClassVar[int] = 1

    weight: np.ndarray  # float32 [dim]
    bias: float
    recheck: Recheck

    @classmethod
    def of(cls, weight: np.ndarray, bias: float, thresholds: Sequence[float]) -> LinearHead:
        near = RECHECK * max(1.0, float(np.linalg.norm(weight)), abs(bias))
        return cls(weight, bias, Recheck.of([thresholds], [near]))

    def scores(self, block: Block, product: np.ndarray) -> np.ndarray:
        half = block.half
        values = np.where(block.valid, product[:, : len(half)] + np.float32(self.bias), np.float32(np.nan))
        wide = self.weight.astype(np.float64)
        self.recheck.settle(
            values, lambda rows: np.array([[half[row].astype(np.float64) @ wide + self.bias for row in rows]])
        )
        return values


@dataclass(frozen=True)
class OpenedHead:
    """A head of several layers whose first one is part of the policy's matrix. It is computed again where an error in that
    product could move its score across a threshold."""

    network: Layers
    recheck: Recheck

    @property
    def width(self) -> int:
        return len(self.network.first[0])

    @classmethod
    def near(cls, network: Layers) -> float:
        """How far an error in the product of the first layer can move the score."""
        lengths = np.maximum(1.0, np.linalg.norm(network.first[0], axis=1))
        return RECHECK * float(np.linalg.norm(lengths)) * network.steepest

    def scores(self, block: Block, product: np.ndarray) -> np.ndarray:
        network, half = self.network, block.half
        hidden = product[:, : len(half)].T.astype(np.float64)
        hidden += network.first[1]
        hidden += network.words(half)
        values = network.rest(hidden).astype(np.float32)[None]
        values[:, ~block.valid] = np.nan
        self.recheck.settle(
            values, lambda rows: np.array([np.concatenate([network.exact(half[r : r + 1]) for r in rows])])
        )
        return values


@dataclass(frozen=True)
class CurvedHead:
    """Any other head: computed in float64 from the start, since an error in float32 would grow through its layers by a
    factor that nobody knows."""

    width: ClassVar[int] = 0

    head: heads.Head
    thresholds: tuple[float, ...]

    def scores(self, block: Block, product: np.ndarray) -> np.ndarray:
        wide, valid = block.wide, block.valid
        if not valid.all():
            wide = wide.copy()
            wide[: len(valid)][~valid] = 0.0
        values = settle(self.head.exact(wide)[: len(valid)], self.thresholds)
        values[~valid] = np.nan
        return values[None]


#: One head of the plan. width: how many columns of the matrix it has; scores: float32 [1, m] of a block, close ones settled,
#: product: float32 [width, 1024] of its columns.
_Member = LinearHead | OpenedHead | CurvedHead


@dataclass(frozen=True)
class HeadPlan:
    """The head rules of a policy: linear heads, then heads of several layers by their first, then all others."""

    names: ClassVar[int] = 0
    labels: ClassVar[tuple[str, ...]] = ()
    prompts: ClassVar[tuple[str, ...]] = ()

    rules: tuple[str, ...]
    members: tuple[_Member, ...]  # in the order of the rules, and of their columns
    weights: np.ndarray  # float32 [h, dim]

    @classmethod
    def build(cls, members: Sequence[tuple[CompiledRule, heads.Head]], dim: int) -> HeadPlan:
        linear: list[tuple[str, _Member, np.ndarray]] = []
        opened, curved = linear.copy(), linear.copy()
        for rule, head in members:
            near = OpenedHead.near(head.network) if isinstance(head.network, Layers) else np.inf
            if head.linear is not None:
                weight, bias = head.linear
                linear.append((rule.id, LinearHead.of(weight, bias, rule.thresholds), weight[None]))
            elif isinstance(head.network, Layers) and near <= _OPENED_NEAR:
                made = OpenedHead(head.network, Recheck.of([rule.thresholds], [near]))
                opened.append((rule.id, made, head.network.first[0].astype(np.float32)))
            else:
                curved.append((rule.id, CurvedHead(head, rule.thresholds), np.zeros((0, dim), dtype=np.float32)))
        rules, placed, rows = zip(*linear, *opened, *curved, strict=True)
        return cls(rules, placed, np.concatenate(rows))

    def score(self, block: Block, products: np.ndarray, out: Found) -> None:
        """Scores of one block."""
        start = 0
        for place, member in enumerate(self.members):
            stop = start + member.width
            out.values[place] = member.scores(block, products[start:stop])[0]
            start = stop
