"""The account of everything seen: each file, archive member or table row of a source is a row, a part of one (a caption, a
sidecar), a container of others, or passed over for a reason that is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

#: Why something was passed over. `unknown_type`: neither its name nor its content is that of a picture, a part or a
#: container. `unsupported`: a picture or film of a format that is not read. `not_a_file`: a link, device or sparse file.
#: `hidden`: hidden, temporary and system files. `pickle`: never opened. `unclaimed`: a caption file, sidecar or table
#: that speaks of no picture here. `other_picture`: left out because other pictures were asked for. `empty`: no bytes.
#: `unread`: behind damage.
Reason = Literal[
    "unknown_type", "unsupported", "not_a_file", "hidden", "pickle", "unclaimed", "other_picture", "empty", "unread"
]
REASONS: tuple[Reason, ...] = get_args(Reason)
_EXAMPLES = 3  # names kept per reason


@dataclass
class Seen:
    """What was seen: `things` = rows + parts + containers + passed over, which `verify` counts again.

    `examples` are the first few names that were passed over, per reason.
    """

    rows: int = 0
    parts: int = 0
    containers: int = 0
    passed: Counter[Reason] = field(default_factory=Counter)
    examples: dict[Reason, list[str]] = field(default_factory=dict)

    @property
    def things(self) -> int:
        return self.rows + self.parts + self.containers + self.passed.total()

    def pass_over(self, reason: Reason, name: str, count: int = 1) -> None:
        """Count `count` things as passed over; `name` is shown as an example."""
        self.passed[reason] += count
        names = self.examples.setdefault(reason, [])
        if len(names) < _EXAMPLES and name not in names:
            names.append(name)

    def add(self, other: Seen) -> None:
        """Add what was seen elsewhere."""
        self.rows += other.rows
        self.parts += other.parts
        self.containers += other.containers
        for reason, count in other.passed.items():
            self.passed[reason] += count
        for reason, names in other.examples.items():
            known = self.examples.setdefault(reason, [])
            known += [name for name in names if name not in known][: _EXAMPLES - len(known)]

    def to_json(self) -> dict[str, Any]:
        """Reasons in the order of `REASONS`, those without a count left out."""
        return {
            "rows": self.rows,
            "parts": self.parts,
            "containers": self.containers,
            "passed": {reason: self.passed[reason] for reason in REASONS if self.passed[reason]},
            "examples": {reason: self.examples[reason] for reason in REASONS if self.examples.get(reason)},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Seen:
        return cls(data["rows"], data["parts"], data["containers"], Counter(data["passed"]), dict(data["examples"]))
