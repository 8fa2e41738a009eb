"""Finds a policy by path or pack name and loads it; every refusal is one sentence with file, line and column."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from clipfilter.errors import RefusedError
from clipfilter.policies.schema import Policy, suggest
from clipfilter.policies.yaml_nodes import MAX_BYTES, Node, YamlRefusedError, read_yaml

_SUFFIXES = (".yaml", ".yml")
_EXPECTED = {dict: "a map", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


def packs_folder() -> Path:
    """Where the packs lie: inside the package when installed, else the repository's top-level `policies/`."""
    inside = Path(__file__).parent / "packs"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "policies"


def pack_names() -> list[str]:
    """Names of the policy packs that come with clipfilter, sorted."""
    folder = packs_folder()
    return sorted(path.stem for path in folder.glob("*.yaml")) if folder.is_dir() else []


def load_policy(path_or_pack_name: str | Path) -> Policy:
    """The policy in this file, or the pack of this name.

    Raises RefusedError with file, line, column and, where there is one, a suggestion.
    """
    given = str(path_or_pack_name)
    path = Path(given)
    if path.suffix.lower() not in _SUFFIXES and len(path.parts) == 1 and not path.is_file():
        packs = pack_names()
        if given not in packs:
            raise RefusedError(
                f"there is no policy pack {given[:80]!r} (packs: {', '.join(packs) or 'none'}; "
                f"or give the path of a .yaml file){suggest(given, packs)}"
            )
        path = packs_folder() / f"{given}.yaml"
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        packs = pack_names()
        raise RefusedError(
            f"there is no policy file {given!r} (packs that need no file: {', '.join(packs) or 'none'})"
            f"{suggest(path.stem, packs)}"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RefusedError(f"the policy file {given!r} cannot be read: {reason}") from None
    return parse_policy(raw, str(path))


def parse_policy(raw: bytes | str, source: str = "policy") -> Policy:
    """The policy in this YAML (or JSON, which is YAML) text; `source` is named in refusals. Raises RefusedError."""
    if isinstance(raw, str):
        raw = raw.encode("utf-8", "surrogatepass")
    try:
        root = read_yaml(raw)
    except YamlRefusedError as error:
        raise RefusedError(f"{source}:{error.line}:{error.column}: {error.message}") from None
    if not isinstance(root.data, dict):
        raise RefusedError(
            f"{source}:{root.line}:{root.column}: a policy is a map with the keys policy, version and rules, "
            f"not {_kind(root.data)}"
        )
    empty = _first_empty(root)
    if empty is not None:
        key, line, column = empty
        fix = "; write `alignment: {}`" if key == "alignment" else "; give it one or remove the line"
        raise RefusedError(f"{source}:{line}:{column}: {key!r} has no value{fix}")
    try:
        # Files that the policy names lie beside it.
        return Policy.model_validate(root.plain(), context={"folder": str(Path(source).parent)})
    except ValidationError as error:
        raise RefusedError(sentence_of(error, root, source)) from None


def _kind(value: Any) -> str:
    return "nothing" if value is None else _EXPECTED.get(type(value), type(value).__name__)


def _first_empty(node: Node) -> tuple[str, int, int] | None:
    children = (
        node.data.items()
        if isinstance(node.data, dict)
        else enumerate(node.data if isinstance(node.data, list) else ())
    )
    for name, child in children:
        if child.data is None:
            line, column = node.place((name,), key=True)
            return (str(name)[:60] if isinstance(node.data, dict) else "a list item"), line, column
        found = _first_empty(child)
        if found is not None:
            return found
    return None


def sentence_of(error: ValidationError, root: Node, source: str) -> str:
    """The most telling of pydantic's errors as one sentence: unknown keys first, then by place in the file."""
    found = []
    for item in error.errors(include_url=False):
        context = item.get("ctx", {})
        path = _real_path(root, (*item["loc"], *context.get("at", ())))
        rank = {"extra_forbidden": 0, "missing": 2}.get(item["type"], 1)
        line, column = root.place(path, key=item["type"] == "extra_forbidden" or bool(context.get("at_key")))
        found.append((rank, line, column, item, path))
    _, line, column, item, path = min(found, key=lambda entry: entry[:3])
    return f"{source}:{line}:{column}: {_message(item, path, root)}"


def _real_path(root: Node, path: tuple[Any, ...]) -> tuple[Any, ...]:
    """`path` without what pydantic adds to it (names of validators), stopping at the first name the file lacks."""
    node, real = root, []
    for name in path:
        child = None
        if isinstance(node.data, dict):
            child = node.data.get(name)
        elif isinstance(node.data, list) and isinstance(name, int) and name < len(node.data):
            child = node.data[name]
        elif isinstance(name, str):
            continue
        real.append(name)
        if child is None:
            break
        node = child
    return tuple(real)


def _message(item: Any, path: tuple[Any, ...], root: Node) -> str:
    kind = item["type"]
    if kind == "policy":
        return str(item["ctx"]["message"])
    if kind == "extra_forbidden":
        known = _keys_at(path[:-1])
        hint = suggest(path[-1], known) or f"; the keys here are {', '.join(known)}"
        return f"unknown key {str(path[-1])[:60]!r} in {_owner(path[:-1])}{hint}"
    if kind == "missing":
        name = item["loc"][-1]
        return f"{_owner(path[:-1] if path and path[-1] == name else path)} needs the key {str(name)!r}"
    value = item.get("input")
    name = next((str(part) for part in reversed(path) if isinstance(part, str)), "the policy")
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"{name!r} must be a map of keys, not {_kind(value)}"
    if kind in ("tuple_type", "list_type"):
        return f"{name!r} must be a list, not {_kind(value)}"
    return f"{name!r} is not valid: {item['msg'][:200]}"


def _owner(path: tuple[Any, ...]) -> str:
    if not path:
        return "the policy"
    if isinstance(path[-1], int):
        return {"rules": "a rule", "calibrations": "a calibration"}.get(str(path[-2]), "an entry")
    return f"{path[-1]!r}"


def _keys_at(path: tuple[Any, ...]) -> list[str]:
    """The keys the language knows at `path`."""
    at: Any = Policy
    for name in path:
        if isinstance(at, type) and issubclass(at, BaseModel) and name in at.model_fields:
            at = _model_in(at.model_fields[name].annotation)
        # An index or the name of a calibrated rule: the model inside was found already.
    return list(at.model_fields) if isinstance(at, type) and issubclass(at, BaseModel) else []


def _model_in(annotation: Any) -> Any:
    """The model inside Optional[...], Annotated[...], tuple[...] or dict[str, ...]."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return annotation
    for part in typing.get_args(annotation):
        model = _model_in(part)
        if model is not None:
            return model
    return None
