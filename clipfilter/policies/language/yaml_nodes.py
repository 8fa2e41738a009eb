"""Reads one small YAML document into plain data, knowing the line and column of every key and value.

Policies come from strangers (pull requests, shared folders), so only the harmless part of YAML 1.2 is
accepted: maps with text keys, lists, text, numbers, true/false. Tags, merge keys, several documents and
duplicate keys are refused, and size, depth and the growth by aliases are limited. The document is built from
parser events on an explicit stack: nothing recurses while the input is untrusted, and no constructor of the
YAML library ever runs.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml import events as ev
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.reader import ReaderError

from clipfilter.errors import RefusedError

MAX_YAML_BYTES = 256 * 1024
MAX_DEPTH = 12
MAX_NODES = 20_000  # after aliases are followed

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]{1,18}\Z")
_RADIX = re.compile(r"0o[0-7]{1,18}\Z|0x[0-9a-fA-F]{1,15}\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]{1,400}|[0-9]{1,400}(?:\.[0-9]{0,400})?)(?:[eE][-+]?[0-9]{1,4})?\Z")
_SPECIAL: dict[str, Any] = {
    "": None, "~": None, "null": None, "Null": None, "NULL": None,
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
    ".inf": float("inf"), ".Inf": float("inf"), ".INF": float("inf"),
    "+.inf": float("inf"), "+.Inf": float("inf"), "+.INF": float("inf"),
    "-.inf": float("-inf"), "-.Inf": float("-inf"), "-.INF": float("-inf"),
    ".nan": float("nan"), ".NaN": float("nan"), ".NAN": float("nan"),
}  # fmt: skip


class YamlRefusedError(Exception):
    """The document is not acceptable; `line` and `column` (from 1) say where."""

    def __init__(self, message: str, line: int, column: int) -> None:
        super().__init__(message)
        self.message, self.line, self.column = message, line, column


class Place(NamedTuple):
    """Where a key or value stands; line and column count from 1, `file` is the name the document was read under."""

    line: int
    column: int
    file: str = ""


@dataclass(slots=True)
class Node:
    """A value with its place. `data` is a scalar, a list of nodes or a dict of text key to node."""

    data: Any
    line: int
    column: int
    size: int = 1
    depth: int = 1
    keys: dict[str, Place] = field(default_factory=dict)
    open_key: str | None = None
    file: str = ""

    @property
    def at(self) -> Place:
        return Place(self.line, self.column, self.file)

    def put(self, data: Any, keys: dict[str, Place] | None = None) -> Node:
        """Other data in this place. keys: where the keys of a map stand, by default as in this one."""
        known = self.keys if keys is None else keys
        places = {key: known[key] for key in data} if isinstance(data, dict) else {}
        return Node(data, self.line, self.column, keys=places, file=self.file)

    def items(self) -> list[Node]:
        """The items of a list, none of anything else."""
        return self.data if isinstance(self.data, list) else []

    def get(self, key: str) -> Node | None:
        """The value of this key of a map, None where there is none."""
        return self.data.get(key) if isinstance(self.data, dict) else None

    def plain(self) -> Any:
        """The value as Python data without places; its depth and size were limited while it was read."""
        if isinstance(self.data, dict):
            return {key: node.plain() for key, node in self.data.items()}
        if isinstance(self.data, list):
            return [node.plain() for node in self.data]
        return self.data

    def place(self, path: Path, *, key: bool = False) -> Place:
        """Where the value at `path` (or its key) stands, or its nearest existing parent if it is not there."""
        node, place = self, self.at
        for step, name in enumerate(path):
            if isinstance(node.data, dict) and name in node.data:
                last = step == len(path) - 1
                child = node.data[name]
                # An empty value sits at the end of its key; the key is the better place to point at.
                at_key = (key and last) or child.data is None
                place = node.keys[str(name)] if at_key else child.at
            elif isinstance(node.data, list) and isinstance(name, int) and name < len(node.data):
                child = node.data[name]
                place = child.at
            else:
                break
            node = child
        return place


def scalar(text: str) -> Any:
    """A plain (unquoted) scalar by the YAML 1.2 core schema: None, bool, int, float or text."""
    if text in _SPECIAL:
        return _SPECIAL[text]
    if _INT.match(text):
        return int(text)
    if _RADIX.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    return text


def read_yaml(raw: bytes, file: str = "") -> Node:
    """The document in `raw` (UTF-8) as a tree of nodes, each of which knows that it is from `file`.

    Raises YamlRefusedError with a place for everything that is not one small, plain YAML document.
    """
    if len(raw) > MAX_YAML_BYTES:
        line = raw.count(b"\n", 0, MAX_YAML_BYTES) + 1
        raise YamlRefusedError(
            f"the file has {len(raw):,} bytes, more than the {MAX_YAML_BYTES:,} a policy may have", line, 1
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", "replace")
        line, column = _place_of(before, len(before))
        raise YamlRefusedError(
            f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8 text", line, column
        ) from None
    try:
        return _build(text, file)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(str(error.problem or error.context or "it cannot be read").split())
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise YamlRefusedError(f"this is not valid YAML: {problem[:200]}", line, column) from None
    except ReaderError as error:
        line, column = _place_of(text, error.position)
        raise YamlRefusedError(
            "this is not valid YAML: a control character that text may not contain", line, column
        ) from None


def read_yaml_file(path: str | os.PathLike[str], called: str) -> Node:
    """The document in a file. `called`: what a sentence calls the file. Raises RefusedError with file, line and column."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise RefusedError(f"{called} cannot be read: {error.strerror}.") from None
    try:
        return read_yaml(raw)
    except YamlRefusedError as error:
        raise RefusedError(f"{path}:{error.line}:{error.column}: {error.message}") from None


def _place_of(text: str, position: int) -> tuple[int, int]:
    before = text[:position]
    return before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1


def _build(text: str, file: str) -> Node:
    """The one document of the text, from the events of the parser."""
    builder = _Builder(file)
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, ev.DocumentStartEvent):
            builder.begin(event)
        elif isinstance(event, ev.CollectionEndEvent):
            builder.close()
        elif isinstance(event, ev.NodeEvent):
            builder.add(event)
    if builder.root is None or builder.root.data is None:
        raise YamlRefusedError("the file is empty; a policy needs at least `policy`, `version` and `rules`", 1, 1)
    return builder.root


class _Builder:
    """The tree that grows with every event; nothing recurses."""

    def __init__(self, file: str) -> None:
        self.root: Node | None = None
        self._file = file
        self._stack: list[Node] = []  # the collections that are open
        self._anchors_open: list[str | None] = []
        self._anchors: dict[str, Node] = {}
        self._documents = self._nodes = 0

    def begin(self, event: ev.DocumentStartEvent) -> None:
        self._documents += 1
        if self._documents > 1:
            raise YamlRefusedError("a policy file holds one document; remove the second `---`", *_at(event))

    def close(self) -> None:
        """The innermost open collection is complete."""
        node = self._stack.pop()
        anchor = self._anchors_open.pop()
        if anchor is not None:
            self._anchors[anchor] = node
        if self._stack:
            _measure(self._stack[-1], node, node.line, node.column)

    def add(self, event: ev.NodeEvent) -> None:
        """A key, a value, or the beginning of a collection."""
        line, column = _at(event)
        node = self._node(event, line, column)
        if not self._stack:
            self.root = node
        else:
            _attach(self._stack[-1], node, event)
        if isinstance(event, ev.CollectionStartEvent):
            self._stack.append(node)
            self._anchors_open.append(event.anchor)
            if len(self._stack) > MAX_DEPTH:
                raise YamlRefusedError(f"the policy is nested more than {MAX_DEPTH} levels deep", line, column)
        elif self._stack and self._stack[-1].open_key is None:
            _measure(self._stack[-1], node, line, column)

    def _node(self, event: ev.NodeEvent, line: int, column: int) -> Node:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise YamlRefusedError(f"the policy has more than {MAX_NODES:,} entries", line, column)
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise YamlRefusedError(
                f"the tag {str(tag)[:60]!r} is not allowed; policies are plain text, numbers, lists and maps",
                line,
                column,
            )
        if isinstance(event, ev.AliasEvent):
            if event.anchor not in self._anchors:
                raise YamlRefusedError(f"the alias *{event.anchor} has no finished anchor before it", line, column)
            target = self._anchors[event.anchor]
            return Node(target.data, line, column, target.size, target.depth, target.keys, file=self._file)
        if isinstance(event, ev.ScalarEvent):
            value = scalar(event.value) if event.implicit[0] and event.style is None else event.value
            node = Node(value, line, column, file=self._file)
            if event.anchor is not None:
                self._anchors[event.anchor] = node
            return node
        return Node({} if isinstance(event, ev.MappingStartEvent) else [], line, column, file=self._file)


def _attach(parent: Node, node: Node, event: ev.NodeEvent) -> None:
    """Put `node` into its parent: as the next list item, the next key, or the value of the key before."""
    if isinstance(parent.data, list):
        parent.data.append(node)
        return
    if parent.open_key is not None:
        parent.data[parent.open_key] = node
        parent.open_key = None
        return
    key = event.value if isinstance(event, ev.ScalarEvent) else None
    if key is None:
        raise YamlRefusedError("a key must be plain text", node.line, node.column)
    if key == "<<":
        raise YamlRefusedError("merge keys (`<<`) are not supported; write the keys out", node.line, node.column)
    if key in parent.data:
        first = parent.keys[key][0]
        raise YamlRefusedError(
            f"the key {key[:60]!r} is given twice; the first one is on line {first}", node.line, node.column
        )
    parent.keys[key] = node.at
    parent.data[key] = node
    parent.open_key = key


def _measure(parent: Node, child: Node, line: int, column: int) -> None:
    """Count a finished child into its parent, so that aliases cannot multiply into a huge or deep document."""
    parent.size += child.size
    parent.depth = max(parent.depth, child.depth + 1)
    if parent.size > MAX_NODES or parent.depth > MAX_DEPTH:
        raise YamlRefusedError("the aliases of this file expand to too much; write the values out", line, column)


def _at(event: Any) -> tuple[int, int]:
    mark = event.start_mark
    return mark.line + 1, mark.column + 1
