"""The first WordNet synset of a word, from WordNet's own database files, looked up as nltk does it."""

from __future__ import annotations

from functools import lru_cache

from clipfilter.errors import RefusedError
from clipfilter.storage import Directory

_PARTS = ("noun", "verb", "adj", "adv")
# Morphy's detachment rules (WordNet manual, morphy(7WN)), in nltk's order.
_ENDINGS = {
    "noun": (("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"),
             ("men", "man"), ("ies", "y")),
    "verb": (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    "adj": (("er", ""), ("est", ""), ("er", "e"), ("est", "e")),
    "adv": (),
}  # fmt: skip


class WordNet:
    """`index.{noun,verb,adj,adv}` and `{noun,verb,adj,adv}.exc` of a WordNet database folder (dict/)."""

    def __init__(self, folder: str) -> None:
        directory = Directory(folder)
        self._first: dict[str, dict[str, int]] = {}
        self._exceptions: dict[str, dict[str, list[str]]] = {}
        for part in _PARTS:
            try:
                index = directory.read_bytes(f"index.{part}").decode("utf-8")
                special = directory.read_bytes(f"{part}.exc").decode("utf-8")
            except FileNotFoundError as error:
                raise RefusedError(
                    f"{folder} is no WordNet database (no index.{part} or {part}.exc in it); give the dict/ folder."
                ) from error
            # lemma pos n_synsets n_pointers pointers... n_senses n_tagged offsets...; the licence begins with a space.
            lines = (line.split() for line in index.splitlines() if line and not line.startswith(" "))
            self._first[part] = {fields[0]: int(fields[-int(fields[2])]) for fields in lines}
            self._exceptions[part] = {w[0]: w[1:] for w in map(str.split, special.splitlines()) if w}
        self.first_synset = lru_cache(maxsize=1 << 18)(self._first_synset)

    def _first_synset(self, word: str) -> int | None:
        """The offset of `wordnet.synsets(word)[0]`; None for a word that WordNet does not know."""
        word = word.lower()
        for part in _PARTS:
            for form in self._forms(word, part):
                return self._first[part][form]
        return None

    def _forms(self, word: str, part: str) -> list[str]:
        """Morphy as nltk has it since 3.6.6: the word, then its exceptions or what one detachment makes of it."""
        known, exceptions = self._first[part], self._exceptions[part]
        forms = exceptions.get(word)
        if forms is None:
            forms = [word.removesuffix(old) + new for old, new in _ENDINGS[part] if word.endswith(old)]
        return [form for form in (word, *forms) if form in known]


def read_entities(data: bytes, name: str) -> frozenset[int]:
    """Offsets from a list of synset ids such as `n02084071`, one per line. Raises RefusedError for anything else."""
    lines = data.decode("utf-8", "replace").split()
    try:
        return frozenset(int(line[1:]) for line in lines)
    except ValueError as error:
        raise RefusedError(f"{name} must hold synset ids such as n02084071, one per line ({error}).") from error
