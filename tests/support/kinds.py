"""Tries a kind of rule out beside those of the registry."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from clipfilter.policies import Measure, Policy, Rule
from clipfilter.policies.kinds.registry import KINDS


@contextmanager
def trial_kind(measure: type[Measure]) -> Iterator[None]:
    """A kind of rule beside those of the registry while this lasts, in one thread."""

    def rebuild() -> None:
        models: list[type[BaseModel]] = [Rule, Policy, *Policy.__subclasses__()]
        for model in models:
            model.model_rebuild(force=True)

    KINDS[measure.kind] = measure
    Rule.__pydantic_fields__[measure.kind] = FieldInfo(
        annotation=measure | None,  # type: ignore[arg-type]
        default=None,
        description=measure.about,
    )
    rebuild()
    try:
        yield
    finally:
        del KINDS[measure.kind], Rule.__pydantic_fields__[measure.kind]
        rebuild()
