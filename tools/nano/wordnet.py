"""Read WordNet 3.0's nouns from the database files of Debian's `wordnet-base` (see wndb(5WN))."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

# Lexicographer files (lexnames(5WN)) of things a camera can see, and the share of their synsets that is used.
VISIBLE = {
    5: 1.0,
    6: 1.0,
    8: 1.0,
    13: 1.0,
    17: 1.0,
    18: 0.25,
    20: 0.25,
}  # animal artifact body food object person plant
TEMPLATES = ("{}", "a {}", "a photo of a {}", "a photo of a {}.", "a picture of a {}.", "a drawing of a {}")
LONGEST_PATH = 20


@dataclass(frozen=True)
class Synset:
    """kind: lexicographer file. words: with spaces. hypernyms: offsets of broader synsets."""

    kind: int
    words: tuple[str, ...]
    hypernyms: tuple[int, ...]


@dataclass(frozen=True)
class Noun:
    """text: the word, perhaps in a template. path: offsets from WordNet's root down to the word's synset."""

    word: str
    text: str
    path: tuple[int, ...]


def read_nouns(folder: Path) -> dict[int, Synset]:
    """Every noun synset by its offset, which is also the number in an ImageNet id (n02123045 is 2123045)."""
    synsets = {}
    with (folder / "data.noun").open(encoding="latin-1") as file:
        for line in file:
            if line.startswith("  "):
                continue  # the licence
            fields = line.partition(" | ")[0].split()
            count = int(fields[3], 16)
            words = tuple(fields[4 + 2 * i].replace("_", " ") for i in range(count))
            first = 4 + 2 * count
            pointers = [fields[first + 1 + 4 * i : first + 5 + 4 * i] for i in range(int(fields[first]))]
            broader = tuple(int(p[1]) for p in pointers if p[0] in ("@", "@i") and p[2] == "n")
            synsets[int(fields[0])] = Synset(int(fields[1]), words, broader)
    return synsets


def path_to(synsets: dict[int, Synset], offset: int) -> tuple[int, ...]:
    """From the root to this synset along first hypernyms, at most LONGEST_PATH long."""
    path = [offset]
    while synsets[path[-1]].hypernyms:
        path.append(synsets[path[-1]].hypernyms[0])
    return tuple(reversed(path))[:LONGEST_PATH]


def class_names(synsets: dict[int, Synset], imagenet_ids: list[str]) -> list[list[str]]:
    """For each ImageNet class its words, bare and in two templates."""
    return [
        [t.format(word.lower()) for word in synsets[int(name[1:])].words for t in ("{}", "a photo of a {}", "a {}")]
        for name in imagenet_ids
    ]


def visible_nouns(synsets: dict[int, Synset], imagenet_ids: list[str], seed: int = 0) -> list[Noun]:
    """One or two words of every visible synset (and every ImageNet class), each in a random template."""
    draw = random.Random(seed)
    wanted = {int(name[1:]) for name in imagenet_ids}
    for offset, synset in synsets.items():
        share = VISIBLE.get(synset.kind, 0.0)
        if share and (share == 1 or draw.random() < share) and synset.words[0][0].islower():
            wanted.add(offset)
    nouns = []
    for offset in sorted(wanted):
        path = path_to(synsets, offset)
        for i, word in enumerate(synsets[offset].words[:2]):
            if i == 0 or draw.random() < 0.5:
                nouns.append(Noun(word.lower(), draw.choice(TEMPLATES).format(word.lower()), path))
    return nouns
