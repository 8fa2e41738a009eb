"""The changed policy: new thresholds put into the policy's own text, where nothing else moves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipfilter.errors import RefusedError
from clipfilter.policies import (
    Policy,
    load_policy,
    pack_names,
    parse_policy,
    policy_file,
    read_document,
    resolve,
    scalar,
)
from clipfilter.report import policy_yaml
from clipfilter.runs import Plan

_SCALAR = re.compile(r"[^\s,}\]#]+")
_MAP = re.compile(r"\{[^{}]*\}")


@dataclass(frozen=True)
class PolicyText:
    """The text of a run's policy: the file it came from where that is known, else written anew without comments."""

    raw: bytes
    source: str
    original: bool


def find_text(plan: Plan, given: str | None) -> PolicyText:
    """The text behind the policy of a run: the file `given`, the pack of its name, or what the plan says.

    Raises RefusedError where `given` is not the policy of the run.
    """
    assert plan.policy is not None
    if given is not None:
        if load_policy(given).sha256 != plan.policy_sha256:
            raise RefusedError(
                f"{given} is not the policy that decided this run; decide it with `clipfilter filter`, or leave --policy out."
            )
        return PolicyText(policy_file(given).read_bytes(), str(policy_file(given)), True)
    name = str(plan.policy["policy"])
    if name in pack_names() and load_policy(name).sha256 == plan.policy_sha256:
        return PolicyText(policy_file(name).read_bytes(), str(policy_file(name)), True)
    return PolicyText(policy_yaml(plan.policy).encode(), f"{name}.yaml", False)


def changed_policy(plan: Plan, changes: Mapping[str, Mapping[str, float]]) -> Policy:
    """The run's policy with other thresholds: calibrated for the run's model where they were, else as the rule writes them.

    changes: rule -> band -> value as a policy writes it. Raises RefusedError where the policy language forbids it.
    """
    assert plan.policy is not None
    canonical = json.loads(json.dumps(plan.policy))
    for rule, bands in changes.items():
        for band, value in bands.items():
            place = canonical
            for step in (path := _place(canonical, plan.model.get("weights_sha256"), rule, band)):
                place = place[step]
            direction = _direction(place)
            if path[0] == "calibrations":
                place.clear()
                place.update({direction: value, **_BY_HAND})
            else:
                place[direction] = value
    try:
        return Policy.from_canonical(canonical)
    except RefusedError as error:
        raise RefusedError(str(error).removeprefix("the stored policy cannot be used: ")) from None


def changed_text(text: PolicyText, plan: Plan, changes: Mapping[str, Mapping[str, float]]) -> bytes:
    """The text with the new thresholds; every other byte stays. A calibrated threshold that is moved loses its evidence.

    Raises RefusedError where a threshold does not stand in this text (it comes from another file, or a variable).
    """
    wanted = changed_policy(plan, changes)
    if not text.original:
        return (policy_yaml(wanted.canonical()) + "\n").encode()
    root = resolve(read_document(text.raw, text.source))
    lines = text.raw.decode("utf-8").splitlines(keepends=True)
    edits: list[tuple[int, int, int, str]] = []  # line, first and last column (from 0), new text
    for rule, bands in changes.items():
        for band, value in bands.items():
            data: Any = root.plain()
            path = _place(data, plan.model.get("weights_sha256"), rule, band)
            for step in path:
                data = data[step]
            direction = _direction(data)
            calibrated = path[0] == "calibrations"
            at = root.place(path if calibrated else (*path, direction))
            start = at.column - 1
            end = _end(lines[at.line - 1], start, calibrated) if at.file in ("", text.source) else None
            if end is None:
                raise RefusedError(
                    f"the {band} threshold of {rule!r} stands in {at.file or text.source}, line {at.line}, in a form that is "
                    "not changed from here (another file, a variable, or a map over several lines); change it there."
                )
            new = {direction: value, **_BY_HAND} if calibrated else value
            edits.append((at.line - 1, start, end, _yaml(new)))
    for line, start, end, written in sorted(edits, reverse=True):
        lines[line] = lines[line][:start] + written + lines[line][end:]
    result = "".join(lines).encode("utf-8")
    if parse_policy(result, text.source).canonical() != wanted.canonical():
        raise RefusedError(f"{text.source} cannot be changed in place; write the new thresholds into it by hand.")
    return result


#: What a calibrated threshold says after a person moved it: its evidence was about another number.
_BY_HAND: dict[str, Any] = {"target": "moved by hand", "guarantee": False}


def _place(policy: Mapping[str, Any], weights: str | None, rule: str, band: str) -> tuple[str | int, ...]:
    """Where the threshold that decides stands: the calibration of these weights, else the rule."""
    for number, entry in enumerate(policy.get("calibrations") or []):
        if entry.get("weights_sha256") == weights and band in (entry.get("rules", {}).get(rule) or {}):
            return ("calibrations", number, "rules", rule, band)
    for number, entry in enumerate(policy.get("rules") or []):
        if entry.get("id") == rule and band in entry:
            return ("rules", number, band)
    raise RefusedError(f"the rule {rule[:80]!r} has no {band[:40]} band.")


def _direction(band: Mapping[str, Any]) -> str:
    return next(name for name in ("above", "below", "outside_top", "outside_bottom") if name in band)


def _end(line: str, start: int, whole_map: bool) -> int | None:
    """Where the number (or, of a calibration, the map in braces) that begins here ends; None where there is none."""
    if whole_map:
        match = _MAP.match(line, start)
        return match.end() if match else None
    match = _SCALAR.match(line, start)
    return match.end() if match and isinstance(scalar(match[0]), int | float) else None


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_yaml(item)}" for name, item in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)
