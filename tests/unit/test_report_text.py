"""Text on the report: escaped, without control characters, numbers that do not lie by rounding."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfilter import text
from clipfilter.policies.language.load import parse_policy
from clipfilter.policies.language.schema import Policy
from clipfilter.report.html import environment
from clipfilter.report.reproduce import policy_yaml


def assert_it_stays_in_its_place(shown: str) -> None:
    assert not set(shown) & set("<>\"'")
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in shown)
    assert not any(unicodedata.category(c) == "Cf" and c not in "\u200c\u200d" for c in shown)
    shown.encode()


@given(st.text(max_size=300))
def test_no_text_can_leave_its_place(value: str) -> None:
    made = environment().from_string("{{ value|short }}\n{{ value }}").render(value=value)
    first, _, whole = made.partition("\n")
    assert_it_stays_in_its_place(first)
    assert_it_stays_in_its_place(whole.replace("\n", ""))  # a policy's text has lines
    assert whole.count("\n") == value.count("\n")


def test_direction_changes_and_escape_sequences_become_visible() -> None:
    assert text.clean("safe\u202egpj.exe\x1b[31m") == "safe\ufffdgpj.exe\ufffd[31m"
    assert text.clean("two\nlines\u2028three\tfour") == "two lines three four"
    assert text.clean("x" * 500, 10) == "xxxxxxxxx…"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/data", "s3://bucket/data"),
        ("https://host/data?sig=abc&se=2026#x", "https://host/data"),
        ("/data/what?/run #2", "/data/what?/run #2"),
    ],
)
def test_places_are_shown_without_secrets(url: str, shown: str) -> None:
    assert text.place(url) == shown


def test_shares_never_round_to_nothing_or_everything() -> None:
    assert text.share(1, 1_000_000) == "<0.1%"
    assert text.share(999_999, 1_000_000) == ">99.9%"
    assert (text.share(0, 7), text.share(7, 7), text.share(1, 0)) == ("0.0%", "100.0%", "–")


def test_scores_show_on_which_side_of_the_threshold_they_are() -> None:
    assert text.score(0.09996, 0.1) == "0.09996"
    assert text.score(0.8500001, 0.85) != text.score(0.85)
    assert text.score(0.5) == "0.500"
    assert text.score(224.0, 100.0) == "224"
    assert text.score(0.00001, 0.5) == "<0.001"
    assert text.score(-0.25) == "−0.250"
    assert text.score(None) == text.score(float("nan")) == "none"


def test_the_policy_text_is_the_policy() -> None:
    """What the page shows can be saved and used: it parses to the very same policy."""
    policy = parse_policy(
        b"""
policy: a-b
version: 2
rules:
  - id: weapons
    concept:
      any_of: ["a handgun", "yes", "it's: #1", "caf\xc3\xa9 \\u202e", "- x", "null", "12"]
      but_not: ["a \\"toy\\" gun"]
    review: {above: 0.5}
    reject: {above: 0.85}
  - id: fit
    alignment: {}
    reject: {below: 0.2}
  - id: best
    fraction: {of: fit}
    reject: {outside_top: 0.3}
""",
        "p.yaml",
    )
    assert isinstance(policy, Policy)
    written = policy_yaml(policy.canonical())
    assert text.clean_block(written, 10_000) == written
    again = parse_policy(written, "again.yaml")
    assert again.canonical() == policy.canonical()
