"""Writes calibrated thresholds into a policy file: only the lines of `calibrations:` change, all others stay as they are."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import YAMLError
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from clipfilter.calibration.calibrate import Calibrated
from clipfilter.errors import RefusedError
from clipfilter.policies import Policy, load_policy, pack_names, packs_folder, parse_policy, read_yaml
from clipfilter.storage import replacing

_KEY = "calibrations"


def policy_path(given: str, out: str | None) -> tuple[Path, Path]:
    """(file to read, file to write) for a policy as `load_policy` takes it.

    Raises RefusedError for a pack without `out`: packs belong to the installation.
    """
    source = Path(given)
    if not source.is_file() and given in pack_names():
        source = packs_folder() / f"{given}.yaml"
    packed = packs_folder() / f"{source.stem}.yaml"
    if out is None and packed.exists() and source.exists() and packed.samefile(source):
        raise RefusedError(
            f"{given} is a pack that came with clipfilter; give --out FILE.yaml to write a calibrated copy of it."
        )
    target = Path(out) if out is not None else source
    if target.suffix.lower() not in (".yaml", ".yml"):
        raise RefusedError(f"{target} must end in .yaml.")
    if out is not None and target.exists() and not target.samefile(source):
        raise RefusedError(f"--out {out} exists; name a new file, or calibrate that one.")
    if not target.parent.is_dir():
        raise RefusedError(f"there is no folder {target.parent}.")
    return source, target


def calibrated_text(raw: bytes, source: str, found: Calibrated, date: str) -> bytes:
    """The policy file with the thresholds of `found` in it; comments, order and layout of all else are untouched.

    Raises RefusedError where the result would not load, or the file is not written in block style.
    """
    before = parse_policy(raw, source)
    node = read_yaml(raw)
    lines = raw.decode("utf-8").splitlines(keepends=True)
    newline = "\r\n" if lines and lines[0].endswith("\r\n") else "\n"
    start, stop = _block(lines, {key: place.line - 1 for key, place in node.keys.items()})
    if lines[0].lstrip("\ufeff \t").startswith("{"):
        raise RefusedError(
            f"{source} is written in braces (JSON); write it in YAML's block style to have it calibrated."
        )
    block = _edited("".join(lines[start:stop]), source, found, date)
    if start == len(lines) and lines and not lines[-1].endswith(("\n", "\r")):
        lines[-1] += newline
    text = "".join([*lines[:start], block.replace("\n", newline), *lines[stop:]])
    result = text.encode("utf-8")
    after = parse_policy(result, source)
    _refuse_changed(before, after, source)
    return result


def _block(lines: list[str], keys: dict[str, int]) -> tuple[int, int]:
    """First line of `calibrations:` and the line after its last; the end of the document where there is none yet."""
    end = next((i for i, line in enumerate(lines) if re.match(r"\.\.\.\s*$", line)), len(lines))
    if _KEY not in keys:
        return end, end
    start = keys[_KEY]
    stop = min([line for line in keys.values() if line > start], default=end)
    # Comments at the margin before the next key belong to that key.
    while stop > start + 1 and (not lines[stop - 1].strip() or lines[stop - 1].startswith("#")):
        stop -= 1
    return start, stop


def _edited(block: str, source: str, found: Calibrated, date: str) -> str:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # a flow map broken over lines is hard to read
    yaml.indent(mapping=2, sequence=4, offset=2)
    try:
        document = yaml.load(block) if block.strip() else CommentedMap()
        entries = document.setdefault(_KEY, CommentedSeq())
        if entries is None:
            entries = document[_KEY] = CommentedSeq()
        entry = next((e for e in entries if e["weights_sha256"] == found.weights_sha256), None)
        if entry is None:
            entry = CommentedMap()
            entries.append(entry)
            entry["model"] = found.model
        for name in ("weights_sha256", "prompts_sha256", "preprocess_sha256"):
            entry[name] = DoubleQuotedScalarString(getattr(found, name))
        entry["decode"] = found.decode
        rules = entry.setdefault("rules", CommentedMap())
        rule = rules.setdefault(found.rule, CommentedMap())
        for threshold in found.thresholds:
            rule[threshold.band] = _flow(threshold.entry(date))
        if found.fitted is not None:
            rule["probability"] = _probability(found)
        text = io.StringIO()
        yaml.dump(document, text)
    except YAMLError as error:
        raise RefusedError(
            f"{source}: `calibrations` cannot be edited in place ({str(error).splitlines()[0][:100]}); write it without "
            "anchors from elsewhere in the file."
        ) from None
    return text.getvalue()


def _probability(found: Calibrated) -> CommentedMap:
    fitted = found.fitted
    assert fitted is not None
    entry = CommentedMap()
    entry["n"] = fitted.n
    score = {name: {"brier": round(fitted.brier[name], 4), "ece": round(fitted.ece[name], 4)} for name in fitted.brier}
    entry["platt"] = _flow({"a": _short(fitted.platt.a), "b": _short(fitted.platt.b), **score["platt"]})
    curve = fitted.isotonic
    points = {
        "scores": [float(f"{value:.9g}") for value in curve.scores],
        "probabilities": [_short(value) for value in curve.probabilities],
    }
    entry["isotonic"] = CommentedMap({name: _flow_list(values) for name, values in points.items()} | score["isotonic"])
    return entry


def _flow(values: dict[str, Any]) -> CommentedMap:
    made = CommentedMap(values)
    made.fa.set_flow_style()
    return made


def _flow_list(values: list[float]) -> CommentedSeq:
    made = CommentedSeq(values)
    made.fa.set_flow_style()
    return made


def _short(value: float) -> float:
    return float(f"{value:.6g}")


def _refuse_changed(before: Policy, after: Policy, source: str) -> None:
    """Nothing but calibrations may differ."""
    old, new = before.canonical(), after.canonical()
    if {**old, _KEY: None} != {**new, _KEY: None}:
        raise RefusedError(
            f"{source} cannot be calibrated in place: its other keys would change; write it in block style."
        )


def write_policy(path: Path, text: bytes, *, expected: bytes | None) -> None:
    """Replace a file atomically; `expected` is what it must still hold (None: it must not exist).

    Raises RefusedError where it has changed meanwhile or cannot be written.
    """
    path = path.resolve()
    try:
        current = path.read_bytes() if path.exists() else None
        if current != expected:
            raise RefusedError(f"{path} changed while it was calibrated; repeat the command.")
        with replacing(path, shared=True) as unfinished:
            unfinished.write_bytes(text)
            unfinished.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
    except OSError as error:
        raise RefusedError(f"{path} cannot be written: {error.strerror or error}.") from None
    load_policy(str(path))
