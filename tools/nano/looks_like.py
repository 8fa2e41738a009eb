"""Read the visual thesaurus looks_like.tsv: everyday terms, and the ImageNet classes that photos of them light up."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import timm.data

FILE = Path(__file__).with_name("looks_like.tsv")
GROUPS = {"@dog": range(151, 269), "@snake": range(52, 69)}
SAME_NAME = {  # classes that share their first name with another one
    "crane bird": 134,
    "crane": 517,
    "cardigan sweater": 474,
    "maillot tank suit": 638,
    "maillot": 639,
}
TEMPLATES = (
    "{}",
    "a photo of {}",
    "a photo of {}.",
    "a picture of {}.",
    "a close-up photo of {}",
    "a drawing of {}",
    "an image with {} in it",
    "there is {} here.",
)


@dataclass(frozen=True)
class Look:
    """One line. terms: words or short phrases for it. classes: share of each ImageNet class, of sum 1."""

    terms: tuple[str, ...]
    classes: dict[int, float]


def class_indices() -> dict[str, int]:
    """Index of each class by its first name in lower case; names of more than one class only as in SAME_NAME."""
    info = timm.data.ImageNetInfo()
    named = defaultdict(list)
    for index in range(1000):
        named[info.index_to_description(index).split(",")[0].lower()].append(index)
    return {name: found[0] for name, found in named.items() if len(found) == 1} | SAME_NAME


def read_looks(path: Path = FILE) -> list[Look]:
    """Every line of the thesaurus; SystemExit where a name is no class or a term stands twice."""
    indices = class_indices()
    looks, seen = [], set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#"):
            continue
        left, _, right = line.partition("\t")
        terms = tuple(left.split("; "))
        shares: dict[int, float] = defaultdict(float)
        for item in right.split(", "):
            name, _, weight = item.partition("*")
            if name not in GROUPS and name.lower() not in indices:
                raise SystemExit(f"{path.name}, line {number}: {name!r} is no ImageNet class")
            members = GROUPS.get(name) or [indices[name.lower()]]
            for index in members:
                shares[index] += float(weight or 1) / len(members)
        if repeated := seen.intersection(terms):
            raise SystemExit(f"{path.name}, line {number}: {repeated} stands twice")
        seen.update(terms)
        total = sum(shares.values())
        looks.append(Look(terms, {index: share / total for index, share in shares.items()}))
    return looks


def phrases(term: str, draw: random.Random) -> list[str]:
    """A term as it stands, and in three of the templates, mostly with an article."""
    said = term
    if not term.startswith(("a ", "an ", "the ", "people")) and draw.random() < 0.7:
        said = f"{'an' if term[0] in 'aeiou' else 'a'} {term}"
    return [term, *(template.format(said) for template in draw.sample(TEMPLATES, 3))]
