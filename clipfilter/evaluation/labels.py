"""What classes are called: names from the data or from a file, and the prompt templates they are put into."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from clipfilter.errors import RefusedError
from clipfilter.policies import TEMPLATES

#: A list gives class names by number (0 first) and the set of classes; a mapping gives a name for each label.
LabelNames = list[str] | dict[str, str]
Style = Literal["as-is", "words"]


def read_labels(path: str, option: str = "--labels") -> LabelNames:
    """A labels file: a JSON list of names, a JSON object label -> name, or text with one name per line.

    Raises RefusedError for anything else.
    """
    text = _read(path, option)
    if not path.lower().endswith(".json"):
        names = [line.strip() for line in text.splitlines() if line.strip()]
        if not names:
            raise RefusedError(f"{option} {path} is empty; write one class name per line.")
        return names
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RefusedError(f"{option} {path} is not JSON ({error}); correct it, or write one name per line.") from None
    found = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(found, list) or not found or not all(isinstance(n, str) and n.strip() for n in found):
        raise RefusedError(f"{option} {path} must hold a list of class names, or an object from labels to names.")
    return value if isinstance(value, dict) else found


def read_templates(name: str) -> tuple[str, ...]:
    """The templates of a named ensemble, or of a file with one per line; raises RefusedError."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not Path(name).is_file():
        raise RefusedError(f"--templates {name} is neither a file nor one of {', '.join(TEMPLATES)}.")
    templates = tuple(line.strip() for line in _read(name, "--templates").splitlines() if line.strip())
    for template in templates:
        if template.count("{}") != 1:
            raise RefusedError(
                f"the template {template!r} in {name} must hold {{}} exactly once, where the class goes."
            )
    if not templates:
        raise RefusedError(f"--templates {name} is empty; write one template per line, such as: a photo of a {{}}.")
    return templates


def name_classes(
    labels: Sequence[str | int], names: LabelNames | None, style: Style = "as-is"
) -> tuple[list[str], np.ndarray]:
    """(class names, int [labels]: the class of each label) for the different labels of a dataset.

    names: a list makes its names the classes: a number is a position in it, a text one of its names. A mapping renames
    labels, and all its names are classes. Names are taken as written. Text labels without one are their own name, in
    the given style: "words" puts spaces for underscores and writes lower case. Labels with the same name are one class.

    Raises RefusedError for a label that has no name.
    """
    named: list[str] = []
    for label in labels:
        if isinstance(names, list) and isinstance(label, int):
            if not 0 <= label < len(names):
                raise RefusedError(f"the label {label} has no name: --labels has {len(names)} names, 0 the first.")
            named.append(names[label])
        elif isinstance(names, list):
            if label not in names:
                raise RefusedError(f"the label {label!r} is not in the list of --labels; add it, or give a mapping.")
            named.append(str(label))
        elif names is not None and str(label) in names:
            named.append(names[str(label)])
        elif isinstance(label, int):
            raise RefusedError(f"the label {label} has no name; add it to --labels.")
        else:
            named.append(label.replace("_", " ").lower() if style == "words" else label)
    given = list(names.values()) if isinstance(names, dict) else names or []
    classes = list(dict.fromkeys([*given, *sorted(named)]))
    position = {name: index for index, name in enumerate(classes)}
    return classes, np.array([position[name] for name in named], np.int64)


def _read(path: str, option: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{option} {path} cannot be read ({error}); give a UTF-8 text file.") from None
