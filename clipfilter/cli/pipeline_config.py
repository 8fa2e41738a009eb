"""The shared part of the pipelines: a typed config file, what a job needs, and what the work will cost."""

from __future__ import annotations

import argparse
import json
import sys
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from clipfilter import defaults
from clipfilter.cli import jobs
from clipfilter.cli.guard import guard
from clipfilter.cli.options import Columns
from clipfilter.cli.printing import print_json, print_overview
from clipfilter.errors import RefusedError
from clipfilter.operations import CostConfig, Estimate, estimate_lines
from clipfilter.policies import Node, read_yaml_file, suggest

if TYPE_CHECKING:
    from clipfilter.engine import JobRequest
    from clipfilter.runs import Job


class Config(BaseModel):
    """Base of every pipeline's config: unknown keys are errors, values are not converted from other types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


C = TypeVar("C", bound=Config)


def load_config(path: str | Path, kind: type[C]) -> C:
    """The config file at `path` as `kind`; YAML, read by the same safe loader as policies.

    Paths inside it are relative to the working directory, as on the command line. Raises RefusedError with file, line,
    column and, for a misspelt key, a suggestion.
    """
    root = read_yaml_file(path, f"the config file {str(path)!r}")
    if not isinstance(root.data, dict):
        raise RefusedError(f"{path}:1:1: a config is a map of keys: {', '.join(kind.model_fields)}")
    try:
        return kind.model_validate_json(
            json.dumps(root.plain())
        )  # JSON: lists may become tuples, nothing else converts
    except ValidationError as error:
        raise RefusedError(_sentence(error, root, str(path), kind)) from None


def _sentence(error: ValidationError, root: Node, path: str, kind: type[Config]) -> str:
    """The first problem as a sentence; misspelt keys before the keys that are missing because of them."""
    items = error.errors(include_url=False)
    item = min(items, key=lambda item: {"extra_forbidden": 0, "missing": 2}.get(item["type"], 1))
    place = tuple(item["loc"])
    unknown, missing = item["type"] == "extra_forbidden", item["type"] == "missing"
    line, column = root.place(place[:-1] if missing else place, key=unknown)[:2]
    name = ".".join(str(part) for part in place)
    if unknown:
        known = _keys_at(kind, place[:-1])
        hint = suggest(place[-1], known) or f"; the keys here are {', '.join(known)}"
        problem = f"unknown key {name!r}{hint}"
    elif missing:
        problem = f"the key {name!r} is missing"
    else:
        problem = f"{name or 'the config'!r} is not valid: {item['msg'][:200]}"
    return f"{path}:{line}:{column}: {problem}"


def _keys_at(kind: type[BaseModel], place: Sequence[Any]) -> list[str]:
    for part in place:
        field = kind.model_fields.get(str(part))
        found = [field.annotation, *typing.get_args(field.annotation)] if field is not None else []
        kind = next((a for a in found if isinstance(a, type) and issubclass(a, BaseModel)), kind)
    return list(kind.model_fields)


class SourceConfig(Config):
    """What to read, and which of its columns mean what, where guessing is not enough."""

    url: str
    image_column: str | None = None
    caption_column: str | None = None
    uid_column: str | None = None
    pictures: defaults.Pictures = defaults.PICTURES
    private: bool = False
    captions: defaults.Captions = defaults.CAPTIONS


class ModelConfig(Config):
    """Which model embeds, and how."""

    name: str = defaults.MODEL
    dtype: defaults.Dtype | None = None
    batch_size: int | None = Field(default=None, ge=1)
    decode: defaults.Decode = defaults.DECODE
    color: defaults.Color = defaults.COLOR


class EngineConfig(Config):
    """Where the work runs."""

    name: defaults.Engine = defaults.ENGINE
    address: str | None = None
    workers: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    device: str = defaults.DEVICE


class JobConfig(Config):
    """The keys of every pipeline that processes images: extend it with the pipeline's own."""

    source: SourceConfig
    out: str
    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    max_failures: float = Field(default=defaults.MAX_FAILURES, ge=0, le=1)
    cost: CostConfig = CostConfig()


def job_request(
    config: JobConfig, job: Job, *, policy: str | None = None, copy_images: bool = True, retry_failed: bool = False
) -> JobRequest:
    """The config as the engine takes it; `copy_images` writes kept and review images beside the decisions."""
    source, model, engine = config.source, config.model, config.engine
    return jobs.job_request(
        job,
        source.url,
        config.out,
        Columns(**source.model_dump(exclude={"url"})),
        policy=policy,
        model=model.name,
        engine=engine.name,
        copy=copy_images,
        retry_failed=retry_failed,
        max_failures=config.max_failures,
        **model.model_dump(exclude={"name"}),
        **engine.model_dump(exclude={"name"}),
    )


def show_plan(overview: dict[str, Any], estimate: Estimate | None, as_json: bool) -> None:
    """Print what `--dry-run` shows: the checked plan, then the estimate."""
    if as_json:
        print_json({**overview, "estimate": asdict(estimate) if estimate else None})
    else:
        print_overview(overview, estimate_lines(estimate) if estimate else ())


def arguments(description: str | None, given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line of a pipeline: CONFIG [--dry-run] [--json]; `config`, `dry_run`, `as_json`."""
    parser = argparse.ArgumentParser(description=(description or "").strip().split("\n")[0])
    parser.add_argument("config", help="YAML file")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print plan and cost, do nothing")
    parser.add_argument("--json", action="store_true", dest="as_json", help="print the result as JSON")
    return parser.parse_args(given)


def start(main: Callable[[], int]) -> None:
    """Run a pipeline as a program: errors become one sentence and an exit code, as on clipfilter's command line."""
    guard(lambda: sys.exit(main()))
