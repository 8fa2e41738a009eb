"""Finds a policy by path or pack name and loads it; every refusal is one sentence with file, line and column."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from clipfilter.errors import RefusedError
from clipfilter.policies.kinds.registry import KINDS
from clipfilter.policies.language.extends import KEYS, kind, read_document, refuse, resolve
from clipfilter.policies.language.files import SUFFIXES, pack_path, read_policy_file
from clipfilter.policies.language.files import pack_names as pack_names
from clipfilter.policies.language.files import packs_folder as packs_folder
from clipfilter.policies.language.schema import Policy, json_sha256, rule_prompts_sha256
from clipfilter.policies.language.yaml_nodes import Node, Place
from clipfilter.policies.parts.fields import suggest


def load_policy(path_or_pack_name: str | Path) -> Policy:
    """The policy in this file, or the pack of this name, with all that it extends.

    Raises RefusedError with file, line, column and, where there is one, a suggestion.
    """
    path = policy_file(path_or_pack_name)
    try:
        raw = read_policy_file(path)
    except FileNotFoundError:
        packs = pack_names()
        raise RefusedError(
            f"there is no policy file {str(path_or_pack_name)!r} (packs that need no file: {', '.join(packs) or 'none'})"
            f"{suggest(path.stem, packs)}"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RefusedError(f"the policy file {str(path_or_pack_name)!r} cannot be read: {reason}") from None
    return parse_policy(raw, str(path))


def policy_file(path_or_pack_name: str | Path) -> Path:
    """The file that a policy argument means; it need not be there. Raises RefusedError for an unknown pack."""
    given = str(path_or_pack_name)
    path = Path(given)
    is_name = path.suffix.lower() not in SUFFIXES and len(path.parts) == 1 and not path.is_file()
    return pack_path(given) if is_name else path


def parse_policy(raw: bytes | str, source: str = "policy") -> Policy:
    """The policy in this YAML (or JSON, which is YAML) text.

    source: its path, which refusals name and from whose folder other files are found. Raises RefusedError with file, line
    and column.
    """
    if isinstance(raw, str):
        raw = raw.encode("utf-8", "surrogatepass")
    root = resolve(read_document(raw, source))
    policy = _validated(root, source)
    node = root.data.get("calibrations")
    if node is None or all(entry.file == source for entry in node.data):
        return policy
    # An inherited calibration with other prompts belongs to another policy.
    prompts = json_sha256(rule_prompts_sha256(policy))
    pairs = zip(node.data, policy.calibrations, strict=True)
    fitting = [item for item, entry in pairs if entry.prompts_sha256 == prompts or item.file == source]
    root.data["calibrations"] = node.put(fitting)
    return _validated(root, source)


def _validated(root: Node, source: str) -> Policy:
    empty = _first_empty(root)
    if empty is not None:
        key, place = empty
        empty_map = key in KINDS and not KINDS[key].model_fields
        fix = f"; write `{key}: {{}}`" if empty_map else "; give it one or remove the line"
        refuse(place, f"{key!r} has no value{fix}")
    try:
        # Files that the policy names lie beside it.
        return Policy.model_validate(root.plain(), context={"folder": str(Path(source).parent)})
    except ValidationError as error:
        raise RefusedError(sentence_of(error, root, source)) from None


def _first_empty(node: Node) -> tuple[str, Place] | None:
    children = node.data.items() if isinstance(node.data, dict) else enumerate(node.items())
    for name, child in children:
        if child.data is None:
            return (str(name)[:60] if isinstance(node.data, dict) else "a list item"), node.place((name,), key=True)
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
        place = root.place(path, key=item["type"] == "extra_forbidden" or bool(context.get("at_key")))
        found.append((rank, place, item, path))
    _, place, item, path = min(found, key=lambda entry: entry[:2])
    return f"{place.file or source}:{place.line}:{place.column}: {_message(item, path)}"


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


def _message(item: Any, path: tuple[Any, ...]) -> str:
    error = item["type"]
    if error == "policy":
        return str(item["ctx"]["message"])
    if error == "extra_forbidden":
        known = _keys_at(path[:-1])
        hint = suggest(path[-1], known) or f"; the keys here are {', '.join(known) or 'none'}"
        return f"unknown key {str(path[-1])[:60]!r} in {_owner(path[:-1])}{hint}"
    if error == "missing":
        name = item["loc"][-1]
        return f"{_owner(path[:-1] if path and path[-1] == name else path)} needs the key {str(name)!r}"
    value = item.get("input")
    name = next((str(part) for part in reversed(path) if isinstance(part, str)), "the policy")
    if error in ("model_type", "dict_type", "model_attributes_type"):
        return f"{name!r} must be a map of keys, not {kind(value)}"
    if error in ("tuple_type", "list_type"):
        return f"{name!r} must be a list, not {kind(value)}"
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
    if not path:
        return [*Policy.model_fields, *KEYS]
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
