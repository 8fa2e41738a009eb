"""Which rows the page shows, and in which order: filters, a search, or a score; positions only, page by page."""

from __future__ import annotations

import base64
import binascii
import secrets
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from clipfilter.decisions import DECISIONS, Decision, Limit
from clipfilter.errors import RefusedError
from clipfilter.search import parse_where, query_vector, top_k
from clipfilter.serve.columns import BANDS, SIMILARITY
from clipfilter.serve.labels import LabelFile
from clipfilter.serve.run import ServedRun

#: The most rows one search finds; a page of it is then a slice.
MOST_FOUND = 1000
MOST_ROWS = 200
_REMEMBERED, _REMEMBERED_IMAGES = 16, 32

Name = Annotated[str, Field(max_length=200)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Changes = Annotated[dict[Name, dict[Name, Number]], Field(max_length=200)]


class RowsRequest(BaseModel):
    """What the page asks for. changes: moved thresholds; flips: only rows that they change. labels: only rows of the rule's
    random sample, in drawing order, or those with a label. image: the name of an uploaded picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    decision: Literal["", Decision] = ""
    rule: Name = ""
    band: Literal["", Limit, "missing", "escalate", "tighten"] = ""
    where: Annotated[str, Field(max_length=10_000)] = ""
    labels: Literal["", "sample", "labelled"] = ""
    label_rule: Name = ""
    changes: Changes = {}
    flips: bool = False
    text: Annotated[str, Field(max_length=1000)] = ""
    image: Name = ""
    like: Annotated[int, Field(ge=-1)] = -1
    sort: Name = ""
    descending: bool = False
    offset: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 60


@dataclass(frozen=True)
class Found:
    """positions: int32 [m] in the order to show; cosines: float32 [m] of a search, else None."""

    positions: np.ndarray
    cosines: np.ndarray | None


class Queries:
    """Answers requests for rows; the newest answers stay, so that paging costs nothing."""

    def __init__(self, run: ServedRun, labels: LabelFile) -> None:
        self._run = run
        self._labels = labels
        self._remembered = lru_cache(_REMEMBERED)(lambda asked: self._find(RowsRequest.model_validate_json(asked)))
        self._images: OrderedDict[str, np.ndarray] = OrderedDict()
        self._mask_where = lru_cache(_REMEMBERED)(self._where)
        self._lock = threading.Lock()

    def add_image(self, data: bytes) -> str:
        """A picture to search with, under a name for requests. Raises RefusedError where it cannot be decoded."""
        vector = self._run.on_encoder(lambda encoder: query_vector(encoder, image=[data], **self._decoding))
        name = secrets.token_urlsafe(9)
        with self._lock:
            self._images[name] = vector
            while len(self._images) > _REMEMBERED_IMAGES:
                self._images.popitem(last=False)
        return name

    def find(self, request: RowsRequest) -> Found:
        """All rows of a request (of a search the nearest `MOST_FOUND`), in order.

        Raises RefusedError for unknown names and conditions that cannot be read.
        """
        if request.labels:  # which rows these are changes with every label
            return self._find(request)
        # Pages of one answer differ in these; which rule is labelled matters to the cards alone.
        return self._remembered(request.model_dump_json(exclude={"offset", "limit", "label_rule"}))

    @property
    def _decoding(self) -> dict[str, Any]:
        options = self._run.plan.options
        return {"decode": options.get("decode", "fast"), "color": options.get("color", "ignore")}

    def _find(self, request: RowsRequest) -> Found:
        mask = self._mask(request)
        if request.labels:
            return Found(self._labelled(request, mask), None)
        query = self._query(request)
        if query is not None:
            positions, cosines = top_k(self._run.vectors, query, MOST_FOUND, mask)
            return Found(positions.astype(np.int32), cosines)
        return Found(self._sorted(request, mask), None)

    def _mask(self, request: RowsRequest) -> np.ndarray | None:
        """bool [n] of the rows that pass all filters, None when there is no filter."""
        columns, parts = self._run.columns, []
        if request.decision:
            parts.append(columns.decision == DECISIONS.index(request.decision))
        if request.rule:
            if request.rule not in columns.rules:
                raise RefusedError(f"the run's policy has no rule {request.rule!r}.")
            own = columns.band[columns.rules.index(request.rule)]
            parts.append(own == BANDS.index(request.band) if request.band else own != 0)
        if request.where.strip():
            parts.append(self._mask_where(request.where.strip()))
        if request.flips:
            effect = self._run.effects.of(request.changes, exact=True)
            flips = np.zeros(columns.rows, bool)
            flips[effect.rows] = True
            parts.append(flips)
        return np.logical_and.reduce(parts) if parts else None

    def _where(self, text: str) -> np.ndarray:
        return self._run.vectors.mask(parse_where(text, self._run.vectors.schema))

    def _labelled(self, request: RowsRequest, mask: np.ndarray | None) -> np.ndarray:
        wanted = (
            self._labels.sample(request.label_rule)
            if request.labels == "sample"
            else list(self._labels.labelled(request.label_rule))
        )
        places = [place for place in self._run.positions_of(wanted) if place is not None]
        positions = np.array(places, np.int32)
        return positions if mask is None else positions[mask[positions]]

    def _query(self, request: RowsRequest) -> np.ndarray | None:
        """The vector to search with, None where nothing is searched."""
        vectors = []
        if request.image:
            with self._lock:
                if request.image not in self._images:
                    raise RefusedError("that picture is no longer here; choose it again.")
                vectors.append(self._images[request.image])
        if request.like >= 0:
            if request.like >= self._run.columns.rows:
                raise RefusedError(f"there is no row {request.like}.")
            vectors.append(self._run.vectors.vectors_at([request.like])[0].astype(np.float32))
        text = [request.text.strip()] if request.text.strip() else []
        if not text and not vectors:
            return None
        stacked = np.stack(vectors) if vectors else None
        if not text:
            return query_vector(None, vectors=stacked)
        return np.asarray(self._run.on_encoder(lambda encoder: query_vector(encoder, text=text, vectors=stacked)))

    def _sorted(self, request: RowsRequest, mask: np.ndarray | None) -> np.ndarray:
        columns = self._run.columns
        if not request.sort:
            return np.arange(columns.rows, dtype=np.int32) if mask is None else np.flatnonzero(mask).astype(np.int32)
        if request.sort not in columns.scores:
            raise RefusedError(
                f"there is no score {request.sort!r}; sort by {', '.join([*columns.rules, SIMILARITY])}."
            )
        order = columns.ascending(request.sort)[0]
        order = order[::-1] if request.descending else order
        unscored = np.flatnonzero(np.isnan(columns.scores[request.sort])).astype(np.int32)
        order = np.concatenate([order, unscored])
        return order if mask is None else order[mask[order]]


def decode_picture(encoded: str) -> bytes:
    """The bytes of an uploaded picture. Raises RefusedError where this is not base64."""
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError("the picture did not arrive whole; choose it again.") from None
