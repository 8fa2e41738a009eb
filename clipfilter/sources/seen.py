"""The account of everything seen: each file, archive member or table row of a source is a row, a part of one (a caption, a
sidecar), a container of others, or passed over for a reason that is counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from clipfilter import text

#: Why something was passed over. `unknown_type`: neither its name nor its content is that of a picture, a part or a
#: container. `unsupported`: a picture or film of a format that is not read. `other_kind`: a picture or container beside
#: containers of the kind that is read. `by_name`: a picture beside tables, read where a row names it. `not_a_file`: a
#: link, device or sparse file. `hidden`: hidden, temporary and system files. `pickle`: never opened. `unclaimed`: a
#: caption file, sidecar or table that speaks of no picture here. `other_picture`: left out because other pictures were
#: asked for. `not_chosen`: left out by --limit or --sample. `not_downloaded`: a row that never had a picture. `empty`: no
#: bytes. `unread`: behind damage, or in a shard that failed. `forgotten`: taken out since.
Reason = Literal[
    "unknown_type", "unsupported", "other_kind", "by_name", "not_a_file", "hidden", "pickle", "unclaimed",
    "other_picture", "not_chosen", "not_downloaded", "empty", "unread", "forgotten",
]  # fmt: skip
REASONS: tuple[Reason, ...] = get_args(Reason)
_WORDS: dict[Reason, str] = {
    "unknown_type": "of unknown type",
    "unsupported": "of a format that is not read",
    "other_kind": "beside files of another kind",
    "by_name": "read where a row names them",
    "not_a_file": "no regular files",
    "hidden": "hidden",
    "pickle": "pickles, never opened",
    "unclaimed": "about no picture here",
    "other_picture": "not the pictures that were asked for",
    "not_chosen": "left out by --limit or --sample",
    "not_downloaded": "never downloaded",
    "empty": "empty",
    "unread": "not readable",
    "forgotten": "forgotten",
}
_EXAMPLES = 3  # names kept per reason
_TABLES = 20  # names of tables kept; the captions of further ones are counted together
_OTHERS = "other tables"


@dataclass
class Seen:
    """What was seen: `things` = rows + parts + containers + passed over, which `verify` counts again.

    A source's listing counts every file but those that its shards are made of (an image folder's pictures), and the read
    of a shard counts what is inside of it: an archive's members, a table's rows, a folder's pictures.

    `examples` are the first few names that were passed over, per reason. captions: table, or what else gives captions ->
    rows it gave one. not_read: caption table -> why nothing was read of it.
    """

    rows: int = 0
    parts: int = 0
    containers: int = 0
    passed: Counter[Reason] = field(default_factory=Counter)
    examples: dict[Reason, list[str]] = field(default_factory=dict)
    captions: dict[str, int] = field(default_factory=dict)
    not_read: dict[str, str] = field(default_factory=dict)

    @property
    def things(self) -> int:
        return self.rows + self.parts + self.containers + self.passed.total()

    def pass_over(self, reason: Reason, name: str = "", count: int = 1) -> None:
        """Count `count` things as passed over; `name` is shown as an example."""
        self.passed[reason] += count
        self._exemplify(reason, [_plain(name)] if name else [])

    def judged(self, rows: int) -> None:
        """Of the rows that were seen this many were judged, the others not chosen."""
        if self.rows > rows:
            self.pass_over("not_chosen", count=self.rows - rows)
        self.rows = rows

    def forgotten(self, rows: int) -> Seen:
        """The same after this many rows were forgotten: none of the names that could be theirs."""
        passed: Counter[Reason] = Counter(self.passed)
        passed["forgotten"] += rows
        return replace(self, rows=self.rows - rows, passed=passed, examples={})

    def caption(self, table: str, rows: int = 1) -> None:
        """Count rows that have their captions from `table`."""
        table = _plain(table)
        name = table if table in self.captions or len(self.captions) < _TABLES else _OTHERS
        self.captions[name] = self.captions.get(name, 0) + rows

    def leave(self, table: str, why: str) -> None:
        """Note a table of which nothing was read. why: half a sentence, "no column names a picture"."""
        if len(self.not_read) < _TABLES:
            self.not_read.setdefault(_plain(table), why)

    def add(self, other: Seen) -> None:
        """Add what was seen elsewhere."""
        self.rows += other.rows
        self.parts += other.parts
        self.containers += other.containers
        self.passed.update(other.passed)
        for reason, names in other.examples.items():
            self._exemplify(reason, names)
        for table, rows in other.captions.items():
            self.caption(table, rows)
        for table, why in other.not_read.items():
            self.leave(table, why)

    def pass_over_unread_tables(self) -> None:
        """Tables of which nothing was read speak of no picture; their listing could only take them for parts."""
        for table in self.not_read:
            if self.parts and not self.captions.get(table):
                self.parts -= 1
                self.pass_over("unclaimed", table)

    def _exemplify(self, reason: Reason, names: list[str]) -> None:
        known = self.examples.get(reason, [])
        known += [name for name in names if name not in known][: _EXAMPLES - len(known)]
        if known:
            self.examples[reason] = known

    def counts(self) -> tuple[int, int, int, dict[Reason, int]]:
        """All numbers: rows, parts, containers, and what was passed over by reason."""
        return self.rows, self.parts, self.containers, {name: count for name, count in self.passed.items() if count}

    def told(self) -> list[str]:
        """The account in lines for people: the sum, what was passed over and why, where captions are from."""
        rest = self.passed.total()
        parts, containers = text.plural(self.parts, "part"), text.plural(self.containers, "container")
        lines = [f"seen: {text.plural(self.rows, 'row')}, {parts} of rows, {containers}, {rest:,} passed over"]
        if rest:
            lines.append(f"passed over: {self.passed_in_words()}")
        given = [f"{_shown(name)} for {rows:,}" for name, rows in self.captions.items() if rows]
        if given:
            lines.append(f"captions from {', '.join(given)} of {text.plural(self.rows, 'row')}")
        if self.not_read:
            lines.append(
                "not read: " + "; ".join(f"{_shown(name)}, {text.clean(why)}" for name, why in self.not_read.items())
            )
        return lines

    def passed_in_words(self) -> str:
        """ "3 of unknown type (a, b, c), 1 hidden (.x)"; the reasons with most things first."""
        found = []
        for reason, count in self.passed.most_common():
            names = ", ".join(map(_shown, self.examples.get(reason, ())))
            found.append(f"{count:,} {_WORDS[reason]}" + (f" ({names})" if names else ""))
        return ", ".join(found)

    def to_json(self) -> dict[str, Any]:
        """Reasons in the order of `REASONS`; reasons without a count, and what is empty beside them, left out."""
        named = {
            "examples": {reason: self.examples[reason] for reason in REASONS if self.examples.get(reason)},
            "captions": dict(self.captions),
            "not_read": dict(self.not_read),
        }
        return {
            "rows": self.rows,
            "parts": self.parts,
            "containers": self.containers,
            "passed": {reason: self.passed[reason] for reason in REASONS if self.passed[reason]},
        } | {name: value for name, value in named.items() if value}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Seen:
        """Raises KeyError or TypeError for what `to_json` does not write."""
        return cls(**{**data, "passed": Counter(data["passed"])})


def _shown(name: str) -> str:
    return text.clean(name, 60)


def _plain(name: str) -> str:
    """A name that JSON can hold: bytes that are not UTF-8 are shown as \\xNN."""
    return name[:200].encode("utf-8", "backslashreplace").decode()
