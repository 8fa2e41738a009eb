"""How to check, use and repeat a run: its commands, and its policy as a file that can be used again."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from clipfilter import defaults, text
from clipfilter.report.data import RunData

_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_ -]{0,200}\Z")
_RESERVED = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}
#: Options whose default needs no mention, as (option of the plan, flag, default).
_FLAGS = (
    ("decode", "--decode", defaults.DECODE),
    ("color", "--color", defaults.COLOR),
    ("captions", "--captions", defaults.CAPTIONS),
    ("max_pixels", "--max-pixels", defaults.MAX_PIXELS),
    ("limit", "--limit", None),
    ("sample", "--sample", None),
)
_SOURCE_OPTIONS = ("image_column", "caption_column", "uid_column", "pictures")


def commands(data: RunData) -> list[tuple[str, str]]:
    """(what it does, command line) in the order in which a reader would use them."""
    out = _quote(data.run.url)
    found = [("Prove from the files that every image is accounted for", f"clipfilter verify {out}")]
    if data.plan.policy is not None:
        found.append(("Write the kept images as a dataset, bytes unchanged", f"clipfilter export {out} --to DATASET"))
        found.append(("Write the review queue", f"clipfilter export {out} --what review --to QUEUE"))
    again = f"clipfilter filter {out} --policy POLICY --out OUT2"
    found.append(("Decide again with another policy, without reading any image", again))
    found.append(("Repeat this run (the policy is above)" if data.plan.policy else "Repeat this run", _again(data)))
    return found


def _again(data: RunData) -> str:
    plan = data.plan
    words = ["clipfilter", plan.job]
    if plan.job == "filter":
        words += [_quote(plan.source["run"]), "--policy", "policy.yaml"]
        return " ".join([*words, "--out", "OUT"])
    words.append(_quote(plan.source.get("url", "SOURCE")))
    words += ["--policy", "policy.yaml"] if plan.policy is not None else []
    words += [
        "--model",
        _quote(plan.model.get("model", defaults.MODEL)),
        "--dtype",
        _quote(plan.model.get("dtype", "fp32")),
    ]
    words += ["--batch-size", str(plan.options.get("batch_size"))] if plan.options.get("batch_size") else []
    for name, flag, default in _FLAGS:
        value = plan.options.get(name, default)
        if value != default:
            words += [flag, _quote(value)]
    for name in _SOURCE_OPTIONS:
        value = (plan.source.get("options") or {}).get(name)
        words += ["--" + name.replace("_", "-"), _quote(value)] if value else []
    words += ["--private"] if (plan.source.get("options") or {}).get("private") else []
    return " ".join([*words, "--out", "OUT"])


def _quote(value: object) -> str:
    return shlex.quote(text.place(value))


def policy_yaml(value: Any, indent: int = 0) -> str:
    """JSON data as block YAML; every scalar that is not a plain word is written as JSON, which YAML reads alike."""
    pad = "  " * indent
    lines = []
    for key, item in value.items():
        name = _scalar(key)
        if isinstance(item, dict) and item:
            lines.append(f"{pad}{name}:\n{policy_yaml(item, indent + 1)}")
        elif isinstance(item, list) and item and all(isinstance(one, dict) for one in item):
            lines.append(f"{pad}{name}:")
            for one in item:
                block = policy_yaml(one, indent + 2)
                lines.append(f"{pad}  - {block.lstrip()}")
        elif isinstance(item, list):
            flow = "[" + ", ".join(_scalar(one, flow=True) for one in item) + "]"
            if len(flow) + len(pad) + len(name) > 110 and item:
                flow = "\n" + "\n".join(f"{pad}  - {_scalar(one)}" for one in item)
                lines.append(f"{pad}{name}:{flow}")
            else:
                lines.append(f"{pad}{name}: {flow}")
        else:
            lines.append(f"{pad}{name}: {_scalar(item)}")
    return "\n".join(lines)


def _scalar(value: Any, *, flow: bool = False) -> str:
    plain = isinstance(value, str) and not flow and _PLAIN.match(value) is not None and value == value.strip()
    if plain and value.lower() not in _RESERVED:
        return str(value)
    # Characters that the page would not show are written as YAML escapes, so that the text stays the policy.
    return "".join(c if text.shown(c) else f"\\U{ord(c):08X}" for c in json.dumps(value, ensure_ascii=False))
