"""Damaged policy files, made from the packs, the same ones every time: what strangers, typos and attackers send."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from clipfilter.policies.language.extends import KEYS
from clipfilter.policies.language.files import pack_names, packs_folder
from clipfilter.policies.language.yaml_nodes import read_yaml

CANARY = "code-ran"
#: Maps whose keys are names that the writer of a policy chooses.
_FREE = ("variables", "openai", "rekognition")


class Mutant(NamedTuple):
    """name: what was done. files: name to content; the first one is loaded."""

    name: str
    files: dict[str, bytes]


def mutants() -> list[Mutant]:
    """Every one of them must be refused."""
    found = [
        mutant
        for make in (_typos, _types, _missing, _bytes, _tags, _bombs, _numbers, _extends, _variables)
        for mutant in make()
    ]
    assert len({mutant.name for mutant in found}) == len(found)
    return found


def _packs() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    for name in pack_names():
        raw = (packs_folder() / f"{name}.yaml").read_bytes()
        yield name, raw, read_yaml(raw).plain()


def _walk(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """(path, value) of everything below `value`, the first two items of every list."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, child in items:
        yield (*path, key), child
        yield from _walk(child, (*path, key))


def _edited(data: dict[str, Any], path: tuple[str | int, ...], **change: Any) -> bytes:
    """JSON (which is YAML) with the value at `path` replaced (`to`), its key renamed (`key`), or both gone."""
    data = copy.deepcopy(data)
    at: Any = data
    for name in path[:-1]:
        at = at[name]
    if "key" in change:
        renamed = {change["key"] if name == path[-1] else name: value for name, value in at.items()}
        at.clear()
        at.update(renamed)
    elif "to" in change:
        at[path[-1]] = change["to"]
    else:
        del at[path[-1]]
    return json.dumps(data, indent=1).encode()


def _kind(path: tuple[str | int, ...]) -> str:
    """The place in the language: names that the writer chose (rules in tests, categories) are all alike."""
    parts = [part for part in path if isinstance(part, str)]
    chosen = {"openai", "rekognition", "safesearch"} | ({"rules"} if path[0] == "tests" else set())
    return ".".join("*" if before in chosen else part for before, part in zip(["", *parts], parts, strict=False))


def _named_by_the_writer(path: tuple[str | int, ...]) -> bool:
    return any(part in _FREE for part in path[:-1])


def _typos() -> Iterator[Mutant]:
    """Every key of the language that the packs use, misspelt."""
    seen = set()
    for pack, _, data in _packs():
        for path, _ in _walk(data):
            key = path[-1]
            if not isinstance(key, str) or _named_by_the_writer(path) or _kind(path) in seen:
                continue
            seen.add(_kind(path))
            typo = key[:-2] + key[-1] + key[-2] if key[-1] != key[-2:-1] else key + "s"
            for number, wrong in enumerate((typo, key.upper() + "_", f" {key}")):
                yield Mutant(f"typo {number} {pack} {_kind(path)}", {"p.yaml": _edited(data, path, key=wrong)})


def _types() -> Iterator[Mutant]:
    """Every value of another type than it must have."""
    seen = set()
    for pack, _, data in _packs():
        for path, value in _walk(data):
            name = f"{_kind(path)} {type(value).__name__}"
            if name in seen:
                continue
            seen.add(name)
            wrong: list[Any] = [{"a": 1}, [[1]], None]
            wrong += [7.5] if isinstance(value, str | list | dict) else ["many", 7.5 if value is False else True]
            if _kind(path) == "variables" or _named_by_the_writer(path):
                wrong = [{"a": 1}, None]
            for number, other in enumerate(wrong):
                yield Mutant(f"type {number} {pack} {name}", {"p.yaml": _edited(data, path, to=other)})


def _whole_packs() -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """A few packs that extend no other."""
    return islice((pack for pack in _packs() if "extends" not in pack[2]), 4)


def _missing() -> Iterator[Mutant]:
    for pack, _, data in _whole_packs():
        for key in ("policy", "version", "rules"):
            yield Mutant(f"missing {pack} {key}", {"p.yaml": _edited(data, (key,))})
        yield Mutant(f"missing {pack} rule id", {"p.yaml": _edited(data, ("rules", 0, "id"))})


def _bytes() -> Iterator[Mutant]:
    """Bytes that are no plain text, or too many of them."""
    for pack, raw, _ in _whole_packs():
        at = raw.index(b"version:")
        for name, made in {
            "null": raw[:at] + b"\0" + raw[at:],
            "bell": raw[:at] + b"x: \x07\n" + raw[at:],
            "escape": raw[:at] + b"x: \x1b[31m\n" + raw[at:],
            "delete": raw[:at] + b"x: \x7f\n" + raw[at:],
            "latin-1": raw[:at] + b"x: \xe9t\xe9\n" + raw[at:],
            "overlong": raw[:at] + b"x: \xc0\xaf\n" + raw[at:],
            "surrogate": raw[:at] + b"x: \xed\xa0\x80\n" + raw[at:],
            "cut character": raw + b"x: \xf0\x9f",
            "utf-16": raw.decode().encode("utf-16"),
            "utf-32": raw.decode().encode("utf-32"),
            "duplicate": raw + b"\nversion: 2\n",
            "tab": raw[:at] + b"\tx: 1\n" + raw[at:],
            "two documents": raw + b"\n---\n" + raw,
            "megabyte value": raw[:at] + b"description: " + b"x" * 1_000_000 + b"\n" + raw[at:],
            "megabyte key": raw[:at] + b"k" * 1_000_000 + b": 1\n" + raw[at:],
            "megabyte comment": raw + b"\n# " + b"x" * 1_000_000,
            "large value": raw[:at] + b"title: " + b"x" * 100_000 + b"\n" + raw[at:],
        }.items():
            yield Mutant(f"bytes {pack} {name}", {"p.yaml": made})


def _tags() -> Iterator[Mutant]:
    for pack, raw, _ in _whole_packs():
        for number, tag in enumerate(
            (
                f"!!python/object/apply:os.system ['touch {CANARY}']",
                f"!!python/object/new:subprocess.Popen [['touch', '{CANARY}']]",
                "!!python/name:os.system",
                f"!include {CANARY}",
                "!!binary aGVsbG8=",
                "!!set {a}",
                "!<tag:example.com,2000:x> y",
            )
        ):
            yield Mutant(f"tag {pack} {number}", {"p.yaml": raw + f"\nx: {tag}\n".encode()})


def _bombs() -> Iterator[Mutant]:
    def document(text: str) -> dict[str, bytes]:
        return {"p.yaml": ("policy: p\nversion: 1\nrules: []\n" + text).encode()}

    letters = "abcdefghij"
    lists = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    maps = "a: &a {x: 1, y: 1, z: 1}\n"
    for before, name in pairwise(letters):
        lists += f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
        maps += f"{name}: &{name} {{{','.join(f'{key}: *{before}' for key in letters)}}}\n"
    yield Mutant("bomb of lists", document(lists))
    yield Mutant("bomb of maps", document(maps))
    yield Mutant("alias of itself", document("x: &x [*x]\n"))
    yield Mutant("unknown alias", document("x: *nobody\n"))
    yield Mutant("merge key", document("x: &x {a: 1}\ny: {<<: *x}\n"))
    for depth in (13, 200, 50_000):
        yield Mutant(f"nested lists {depth}", document("x: " + "[" * depth + "]" * depth))
        yield Mutant(f"nested open {depth}", document("x: " + "[" * depth))
        yield Mutant(f"nested maps {depth}", document("x: " + "{a: " * depth))
        yield Mutant(f"nested dashes {depth}", document("x:\n" + "- " * depth + "y"))
    yield Mutant("many entries", document("x: [" + "1," * 30_000 + "]"))
    yield Mutant("many rules", {"p.yaml": json.dumps({"policy": "p", "version": 1, "rules": [{"id": f"r{n}"} for n in range(3000)]}).encode()})  # fmt: skip # noqa: E501
    yield Mutant("list as key", document("? [a, b]\n: 1\n"))


def _numbers() -> Iterator[Mutant]:
    for value in (
        "9" * 400,
        "1e999",
        "-1e999",
        ".nan",
        "-.inf",
        "0x" + "f" * 15,
        "1" * 19,
        "-1",
        "1.5",
        "1e3000",
        "true",
    ):
        text = f"policy: p\nversion: {value}\nrules: [{{id: a, metadata: width, reject: {{below: 1}}}}]\n"
        yield Mutant(f"version {value[:10]}", {"p.yaml": text.encode()})
    for value in ("1e400", "-1e400", ".nan", ".inf", "1e39", "'1'", "[1]", "null", "1_000", "0b1", "1,5"):
        text = f"policy: p\nversion: 1\nrules: [{{id: a, metadata: width, reject: {{below: {value}}}}}]\n"
        yield Mutant(f"threshold {value}", {"p.yaml": text.encode()})


BASE = b"policy: base\nversion: 1\nrules: [{id: a, metadata: width, reject: {below: 1}}]\n"


def _extending(extends: str, **more: bytes) -> dict[str, bytes]:
    text = f"policy: p\nversion: 1\nextends: {extends}\nrules: [{{id: b, metadata: width, reject: {{below: 1}}}}]\n"
    return {"p.yaml": text.encode(), **{name.replace("_yaml", ".yaml"): raw for name, raw in more.items()}}


def _extends() -> Iterator[Mutant]:
    def chain(names: str, last: str) -> dict[str, bytes]:
        """a.yaml extends b.yaml extends ... extends `last`."""
        nexts = [f"{name}.yaml" for name in names[1:]] + [last]
        return {f"{name}_yaml": BASE + f"extends: {then}\n".encode() for name, then in zip(names, nexts, strict=True)}

    yield Mutant("extends itself", _extending("p.yaml"))
    for count in range(1, 6):
        yield Mutant(f"extends cycle of {count + 1}", _extending("a.yaml", **chain("abcde"[:count], "p.yaml")))
        yield Mutant(f"extends cycle behind {count}", _extending("a.yaml", **chain("abcde"[:count], "a.yaml")))
    yield Mutant("extends deep", _extending("a.yaml", **chain("abcdefghijkl", "marketplace-safety")))
    both = {f"{name}_yaml": BASE + f"extends: [{then}.yaml, {then}.yaml]\n".encode() for name, then in zip("abcdef", "bcdefg", strict=True)}  # fmt: skip # noqa: E501
    yield Mutant("extends bomb", _extending("[a.yaml, a.yaml]", **both, g_yaml=BASE))
    yield Mutant("extends many", _extending("[" + "a.yaml, " * 100 + "]", a_yaml=BASE))
    for number, path in enumerate(
        (
            "/etc/passwd", "/etc/x.yaml", "../../../../../etc/passwd", "../../../../../../etc/hostname", "~/x.yaml",
            "~root/x.yaml", "file:///etc/x.yaml", "http://127.0.0.1/x.yaml", "s3://bucket/x.yaml", "..\\x.yaml",
            "'C:\\x.yaml'", "C:/x.yaml", '"a\\0.yaml"', '"a\\n.yaml"', "none.yaml", "no-such-pack", "folder/pack",
            "marketplace-safty", "/dev/zero", "/dev/stdin.yaml", "./", ".", "..", "$HOME/x.yaml", "x.yaml.exe",
            "x" * 5000 + ".yaml", "sub/none.yaml", "5", "true", "null", "[]", "{a: 1}", "[1]", "[[a.yaml]]", "''", "' '",
        )
    ):  # fmt: skip
        yield Mutant(f"extends path {number}", _extending(path, a_yaml=BASE))
    for name, raw in {
        "empty": b"",
        "list": b"- a\n",
        "typo": BASE + b"rulez: []\n",
        "tag": BASE + b"x: !!python/name:os.system\n",
        "not text": b"\xff\xfe\x00",
        "large": BASE + b"# " + b"x" * 1_000_000,
        "unknown rule kind": BASE.replace(b"metadata", b"metdata"),
    }.items():
        yield Mutant(f"extends base {name}", _extending("a.yaml", a_yaml=raw))
    for number, remove in enumerate(("[b]", "[aa]", "a", "[1]", "{a: 1}", "[[a]]")):
        files = _extending("a.yaml", a_yaml=BASE)
        yield Mutant(f"remove {number}", {**files, "p.yaml": files["p.yaml"] + f"remove: {remove}\n".encode()})
    yield Mutant("remove without extends", {"p.yaml": BASE + b"remove: [a]\n"})
    for key in KEYS:
        yield Mutant(f"{key} without value", {"p.yaml": BASE + f"{key}:\n".encode()})


def _variables() -> Iterator[Mutant]:
    rule = "policy: p\nversion: 1\nrules: [{id: a, concept: {any_of: [%s]}, reject: {above: 0.5}}]\nvariables: %s\n"
    for number, (phrase, variables) in enumerate(
        (
            ('"${nme}"', "{name: x}"), ('"${name}"', "{}"), ('"a ${nme} b"', "{name: x}"), ("x", "{name: x}"),
            ('"${name"', "{name: x}"), ('"a ${"', "{name: x}"), ('"${a.b}"', "{name: x}"), ('"${name}"', "{name: null}"),
            ('"${name}"', "{name: {a: 1}}"), ('"${name}"', "{name: [[1]]}"), ('"${name}"', "[name]"), ('"${name}"', "5"),
            ('"${a}"', '{a: "${b}", b: "${a}"}'), ('"a ${l}"', "{l: [a, b]}"), ('"a ${t}"', "{t: true}"),
            ('"${n}"', "{n: 5}"), ('"${l}"', "{l: []}"), ('"${ name }"', "{name: x}"), ('"${__import__}"', "{name: x}"),
            ('"${name}"', "{name: ''}"), ('"${name}"', '{"a b": x}'), ('"${l}", "${l}"', "{l: [a]}"),
            ('"${name.__class__}"', "{name: x}"), ('"${{name}}"', "{name: x}"), ('"$($name) ${x}"', "{name: x}"),
        )
    ):  # fmt: skip
        yield Mutant(f"variable {number}", {"p.yaml": (rule % (phrase, variables)).encode()})
    large = "{" + ", ".join(f"v{n}: {'x' * 1999}" for n in range(100)) + "}"
    yield Mutant("variables bomb", {"p.yaml": (rule % (", ".join(['"${v1} ${v2}"'] * 250), large)).encode()})
    lists = "{l: [" + ", ".join(f"p{n}" for n in range(250)) + "]}"
    yield Mutant("variables list bomb", {"p.yaml": (rule % (", ".join(['"${l}"'] * 250), lists)).encode()})
    many = "{" + ", ".join(f"v{n}: x" for n in range(1000)) + "}"
    yield Mutant("many variables", {"p.yaml": (rule % ('"${v1}"', many)).encode()})


def write(mutant: Mutant, folder: Path) -> Path:
    """The files of a mutant in a folder; the path of the one to load."""
    for name, raw in mutant.files.items():
        (folder / name).write_bytes(raw)
    return folder / next(iter(mutant.files))
