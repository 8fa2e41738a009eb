"""Puts a policy together from the files it extends and its variables; every value keeps its file, line and column.

`extends` names packs or files relative to the file that says so. Their rules come first, merged by id; what the
extending file says itself wins. `variables` stand for values ("${name}" alone) or parts of texts. Nothing is
evaluated, and the number, depth and size of what is put together are limited, since policies come from strangers.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NoReturn

from clipfilter.decisions import LIMITS
from clipfilter.errors import RefusedError
from clipfilter.policies.kinds.registry import KINDS
from clipfilter.policies.language.files import SUFFIXES, pack_path, read_policy_file
from clipfilter.policies.language.yaml_nodes import MAX_NODES, Node, Place, YamlRefusedError, read_yaml
from clipfilter.policies.parts.fields import suggest

KEYS = ("extends", "variables", "remove")
#: What a file says about itself; an extending file says it anew or goes without.
_OWN = ("policy", "version", "description", "card", "tests")
#: Values in which `${` means nothing.
_LITERAL = ("policy", "version", "calibrations")

MAX_DEPTH = 8
MAX_FILES = 32
MAX_VARIABLES = 200
MAX_VARIABLE_CHARS = 2000
MAX_VARIABLE_ITEMS = 256
MAX_EXPANDED_CHARS = 1_000_000

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}\Z")
_USE = re.compile(r"\$?\$\{([^{}]*)(\}?)")


def read_document(raw: bytes, source: str) -> Node:
    """The map in this YAML text. Raises RefusedError with `source`, line and column."""
    try:
        root = read_yaml(raw, source)
    except YamlRefusedError as error:
        refuse(Place(error.line, error.column, source), error.message)
    if not isinstance(root.data, dict):
        refuse(root.at, f"a policy is a map with the keys policy, version and rules, not {kind(root.data)}")
    return root


def resolve(root: Node) -> Node:
    """`root` with everything it extends merged in and its variables put in place; without the keys of this module.

    Calibrations of extended files come after the file's own; whether they still fit is for the caller to find out.
    Raises RefusedError with file, line and column.
    """
    merged = _merged(root, (), [])
    data = {key: node for key, node in merged.data.items() if key not in KEYS}
    variables = _variables(merged.data["variables"]) if "variables" in merged.data else {}
    expansion = _Expansion(variables)
    data = {key: node if key in _LITERAL else expansion.expand(node) for key, node in data.items()}
    for name, node in variables.items():
        # A base may define what the extending file has no use for any more.
        if node.file == root.file and name not in expansion.used:
            refuse(merged.data["variables"].keys[name], f"the variable {name!r} is never used; remove it or its typo")
    return merged.put(_with_files(data, root.file))


def _with_files(data: dict[str, Node], file: str) -> dict[str, Node]:
    """Names of files in what was inherited, written as they are seen from the folder of `file`."""
    here = os.path.dirname(os.path.abspath(file))

    def seen(node: Node) -> Node:
        if isinstance(node.data, dict) and "file" in node.data:
            return node.put(node.data | {"file": seen(node.data["file"])})
        there = os.path.dirname(os.path.abspath(node.file))
        if not isinstance(node.data, str) or there == here or os.path.isabs(node.data) or node.data.startswith("~"):
            return node
        return node.put(os.path.relpath(os.path.join(there, node.data), here))

    def rule(node: Node) -> Node:
        for kind, measure in KINDS.items():
            part = node.get(kind)
            named = {key: seen(file) for key in measure.file_keys if part and (file := part.get(key)) is not None}
            if part and named:
                node = node.put(node.data | {kind: part.put(part.data | named)})
        return node

    rules = data.get("rules")
    if rules is not None and isinstance(rules.data, list):
        data = data | {"rules": rules.put([rule(node) for node in rules.data])}
    if "overrides" in data:
        data = data | {"overrides": seen(data["overrides"])}
    return data


def refuse(place: Place, message: str) -> NoReturn:
    raise RefusedError(f"{place.file}:{place.line}:{place.column}: {message}")


def kind(value: Any) -> str:
    """What a value is, in the words of the language."""
    names = {dict: "a map", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


def _merged(root: Node, chain: tuple[str, ...], files: list[Path]) -> Node:
    """`root` on top of what it extends, depth first. chain: the files that led here; files: all that were read."""
    here = (*chain, os.path.realpath(root.file))
    bases: Node | None = None
    for entry in _names(root):
        place = entry.at
        found = _find(entry)
        if os.path.realpath(found) in here:
            names = [*(os.path.basename(name) for name in here), found.name]
            refuse(place, f"extends leads in a circle: {' extends '.join(names[-4:])}")
        files.append(found)
        if len(here) >= MAX_DEPTH or len(files) > MAX_FILES:
            refuse(place, f"extends goes more than {MAX_DEPTH} files deep or names more than {MAX_FILES} files")
        try:
            raw = read_policy_file(found)
        except FileNotFoundError:
            refuse(place, f"there is no file {entry.data!r} beside this one to extend")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            refuse(place, f"{entry.data!r}, which this extends, cannot be read: {reason}")
        base = _merged(read_document(raw, str(found)), here, files)
        bases = base if bases is None else _merge(bases, base)
    if bases is None and "remove" in root.data:
        refuse(root.keys["remove"], "remove takes away rules of another policy; it belongs beside extends")
    return root if bases is None else _merge(bases, root)


def _names(root: Node) -> list[Node]:
    """The entries of `extends`, in order."""
    node = root.data.get("extends")
    if node is None:
        return []
    entries = node.data if isinstance(node.data, list) else [node]
    for entry in entries:
        if not isinstance(entry.data, str) or not entry.data.strip():
            refuse(
                entry.at if entry.data is not None else root.keys["extends"],
                f"extends is the name of a pack, the path of a .yaml file, or a list of these, not {kind(entry.data or None)}",
            )
    if not entries:
        refuse(node.at, "extends is an empty list; name a pack or a file, or remove the line")
    return list(entries)


def _find(entry: Node) -> Path:
    """The file that an entry of `extends` means."""
    name = str(entry.data)
    shown = repr(name[:80])
    if len(name) > 300 or not name.isprintable():
        refuse(entry.at, f"{shown} is no path of a policy to extend")
    if not name.lower().endswith(SUFFIXES):
        if "/" in name or "\\" in name:
            refuse(entry.at, f"{shown} is no policy to extend: a file ends in .yaml, a pack has no folder")
        try:
            return pack_path(name)
        except RefusedError as error:
            refuse(entry.at, str(error))
    elsewhere = PurePosixPath(name).is_absolute() or PureWindowsPath(name).drive or name[0] == "~"
    if elsewhere or "\\" in name or "://" in name:
        refuse(entry.at, f"{shown} must be a path relative to this file, with forward slashes")
    return Path(os.path.normpath(Path(entry.file).parent / name))


def _merge(base: Node, child: Node) -> Node:
    """`child` on top of `base`."""
    data = {key: node for key, node in base.data.items() if key not in _OWN}
    keys = dict(base.keys)
    removed = _removed(data.get("rules"), child.data.get("remove"))
    if removed:
        _take_away(data, removed)
    for key, node in child.data.items():
        keys[key] = child.keys[key]
        before = data.get(key)
        if before is not None and key == "rules":
            node = _merged_rules(before, node)
        elif before is not None and key in ("variables", "interchange"):
            node = _merged_map(before, node)
        if key not in ("extends", "remove", "calibrations"):
            data[key] = node
    _merge_calibrations(data, child, removed)
    keys.setdefault("calibrations", child.at)
    return child.put(data, keys)


def _merged_map(base: Node, child: Node) -> Node:
    """The map `child` on top of the map `base`, key by key; `child` alone where they are no maps."""
    if not isinstance(base.data, dict) or not isinstance(child.data, dict):
        return child
    return child.put(base.data | child.data, base.keys | child.keys)


def _rule_id(node: Node) -> str | None:
    found = node.get("id")
    return found.data if found is not None and isinstance(found.data, str) else None


def _ids(rules: Node | None) -> list[str]:
    return [name for name in map(_rule_id, rules.items() if rules else []) if name is not None]


def _removed(rules: Node | None, remove: Node | None) -> set[str]:
    if remove is None:
        return set()
    if not isinstance(remove.data, list):
        refuse(remove.at, f"remove is a list of rule ids, not {kind(remove.data)}")
    known = _ids(rules)
    for entry in remove.data:
        if not isinstance(entry.data, str):
            refuse(entry.at, f"remove is a list of rule ids, and this is {kind(entry.data)}")
        if entry.data not in known:
            refuse(
                entry.at,
                f"there is no rule {entry.data[:60]!r} to remove in what this extends{suggest(entry.data, known)}",
            )
    return {entry.data for entry in remove.data}


def _take_away(data: dict[str, Node], removed: set[str]) -> None:
    """Leave the removed rules out of the base's rules and mappings."""
    data["rules"] = data["rules"].put([node for node in data["rules"].data if _rule_id(node) not in removed])
    mapping = data.get("interchange")
    if mapping is None or not isinstance(mapping.data, dict):
        return
    services: dict[str, Node] = {}
    for service, categories in mapping.data.items():
        if not isinstance(categories.data, dict):
            services[service] = categories
            continue
        kept = {}
        for name, ids in categories.data.items():
            left = [node for node in ids.items() if node.data not in removed]
            if left or not isinstance(ids.data, list):
                kept[name] = ids.put(left) if left else ids
        if kept:
            services[service] = categories.put(kept)
    if services:
        data["interchange"] = mapping.put(services)
    else:
        del data["interchange"]


def _merged_rules(base: Node, child: Node) -> Node:
    """Rules of the child replace keys of the base's rules with their id; others follow at the end."""
    if not isinstance(base.data, list) or not isinstance(child.data, list):
        return child
    rules = list(base.data)
    open_ids = {name: place for place, name in enumerate(_ids(base))} if len(_ids(base)) == len(rules) else {}
    for node in child.data:
        place = open_ids.pop(_rule_id(node) or "", None)
        if place is None:
            rules.append(node)
            continue
        before = rules[place]
        merged = _merged_map(before, node)
        for kind in (kind for kind, measure in KINDS.items() if measure.merges):
            old, new = before.get(kind), node.get(kind)
            if old is not None and new is not None:
                merged.data[kind] = _merged_map(old, new)
        rules[place] = merged
    return child.put(rules)


def _merge_calibrations(data: dict[str, Node], child: Node, removed: set[str]) -> None:
    """The child's own entries, then those of the base for other weights, without rules whose bands the child sets."""
    own, inherited = child.data.get("calibrations"), data.get("calibrations")
    if inherited is None or not all(isinstance(node.data, list) for node in (inherited, own) if node is not None):
        if own is not None:
            data["calibrations"] = own
        return
    entries = [*own.items()] if own is not None else []
    rules = child.get("rules")
    changed = removed | {
        _rule_id(node) or "" for node in (rules.items() if rules else ()) if any(node.get(limit) for limit in LIMITS)
    }
    taken = {_weights(entry) for entry in entries}
    for entry in inherited.data:
        bands = entry.get("rules")
        if bands is None or not isinstance(bands.data, dict) or _weights(entry) in taken:
            continue
        kept = {name: node for name, node in bands.data.items() if name not in changed}
        if kept:
            entries.append(entry.put(entry.data | {"rules": bands.put(kept)}))
    if entries:
        data["calibrations"] = child.put(entries)
    else:
        del data["calibrations"]


def _weights(entry: Node) -> Any:
    node = entry.get("weights_sha256")
    return node.data if node is not None else None


def _variables(node: Node) -> dict[str, Node]:
    if not isinstance(node.data, dict):
        refuse(node.at, f"variables is a map of name to value, not {kind(node.data)}")
    if len(node.data) > MAX_VARIABLES:
        refuse(node.at, f"there are {len(node.data)} variables, more than the {MAX_VARIABLES} allowed")
    for name, value in node.data.items():
        if not _NAME.match(name):
            refuse(node.keys[name], f"{name[:60]!r} is not a name for a variable: use letters, digits, '-' and '_'")
        items = value.data if isinstance(value.data, list) else [value]
        if len(items) > MAX_VARIABLE_ITEMS:
            refuse(
                value.at, f"the variable {name!r} has {len(items)} items, more than the {MAX_VARIABLE_ITEMS} allowed"
            )
        for item in items:
            at = item.at if item.data is not None else node.keys[name]
            if item.data is None or isinstance(item.data, dict | list):
                refuse(
                    at,
                    f"the variable {name!r} is text, a number, true or false, or a list of these, not {kind(item.data)}",
                )
            if isinstance(item.data, str) and "${" in item.data:
                refuse(at, f"the variable {name!r} uses another one; write its value out")
            if isinstance(item.data, str) and len(item.data) > MAX_VARIABLE_CHARS:
                refuse(at, f"the variable {name!r} has more than the {MAX_VARIABLE_CHARS:,} characters allowed")
    return dict(node.data)


class _Expansion:
    """Puts variables into a tree, within limits on how much may come of it."""

    def __init__(self, variables: dict[str, Node]) -> None:
        self._variables = variables
        self._nodes = self._chars = 0
        self.used: set[str] = set()

    def expand(self, node: Node) -> Node:
        self._count(node, 1)
        if isinstance(node.data, dict):
            return node.put({key: self.expand(child) for key, child in node.data.items()})
        if isinstance(node.data, list):
            items: list[Node] = []
            for child in node.data:
                made = self.expand(child)
                spliced = isinstance(child.data, str) and isinstance(made.data, list)
                items += made.data if spliced else [made]
            return node.put(items)
        if isinstance(node.data, str) and "${" in node.data:
            return self._replaced(node, node.data)
        return node

    def _count(self, at: Node, nodes: int, chars: int = 0) -> None:
        self._nodes += nodes
        self._chars += chars
        if self._nodes > MAX_NODES or self._chars > MAX_EXPANDED_CHARS:
            refuse(at.at, "the policy and what it extends come to too much; write less, or several policies")

    def _replaced(self, node: Node, text: str) -> Node:
        whole = _USE.fullmatch(text)
        if whole is not None and not text.startswith("$$"):
            value = self._value(node, whole)
            if isinstance(value.data, list):
                self._count(node, len(value.data), sum(len(str(item.data)) for item in value.data))
                return node.put([node.put(item.data) for item in value.data])
            return node.put(value.data)

        def put(match: re.Match[str]) -> str:
            if match[0].startswith("$$"):
                return match[0][1:]
            value = self._value(node, match).data
            if isinstance(value, bool | list):
                refuse(node.at, f"${{{match[1]}}} is {kind(value)} and cannot be part of a text")
            return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)

        made = _USE.sub(put, text)
        self._count(node, 0, len(made))
        return node.put(made)

    def _value(self, node: Node, match: re.Match[str]) -> Node:
        name = match[1]
        if not match[2]:
            refuse(node.at, "this text has a `${` without its `}`; write `$${` where no variable is meant")
        if name not in self._variables:
            hint = suggest(name, self._variables) or "; write `$${` where no variable is meant"
            refuse(node.at, f"there is no variable {name[:60]!r}{hint}")
        self.used.add(name)
        return self._variables[name]
