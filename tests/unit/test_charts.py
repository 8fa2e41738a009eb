"""The chart kit: what it draws lies where the numbers say, and text in it stays text."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipfilter.charts import (
    Axis,
    Histogram,
    Limit,
    Panel,
    bars,
    dot,
    element,
    histogram_svg,
    label,
    stacked_bar,
    ticks,
)


@given(st.text(alphabet=st.characters(exclude_categories=("Cc", "Cs")), max_size=40))
def test_text_stays_text(value: str) -> None:
    read = ElementTree.fromstring(element("text", value, aria_label=value, class_="x"))
    assert (read.text or "") == value
    assert read.attrib == {"aria-label": value.replace("\n", " "), "class": "x"}
    assert ElementTree.fromstring(label(0, 0, value)).text == (value or None)


def test_an_element_without_content_is_closed_and_drawings_are_not_escaped_twice() -> None:
    assert element("g", element("rect", stroke_width=2), "<") == '<g><rect stroke-width="2"/>&lt;</g>'
    assert ElementTree.fromstring(dot("keep"))[0].get("class") == "keep"


def test_an_axis_is_linear() -> None:
    axis = Axis(10.0, 20.0, 400.0, 100.0)
    assert (axis(10.0), axis(15.0), axis(20.0), axis(25.0)) == (400.0, 250.0, 100.0, -50.0)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3.0, 2.0, [-3, -2, -1, 0, 1, 2]), (0.1, 0.1, [])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == pytest.approx(expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_few_and_inside(low: float, width: float) -> None:
    found = ticks(low, low + width, 6)
    assert len(found) <= 7
    assert all(low - width * 1e-6 <= value <= low + width * (1 + 1e-6) for value in found)


def test_a_stacked_bar_is_full_and_shows_slivers() -> None:
    drawn = ElementTree.fromstring(stacked_bar([("keep", 1_000_000), ("review", 1), ("reject", 0)], label="a & b"))
    widths = {part.get("class"): float(part.get("width", "").rstrip("%")) for part in drawn[1:]}
    assert set(widths) == {"keep", "review"}
    assert sum(widths.values()) == pytest.approx(100)
    assert widths["review"] > 0.3
    assert drawn.get("aria-label") == "a & b"
    assert len(ElementTree.fromstring(stacked_bar([("keep", 0)], label=""))) == 1


def test_a_histogram_is_coloured_up_to_its_thresholds() -> None:
    counted = Histogram()
    counted.add(np.linspace(0.0, 1.0, 1001, dtype=np.float32))
    limits = [Limit("review", "above", 0.5), Limit("reject", "above", 0.812)]
    drawn = ElementTree.fromstring(histogram_svg(bars(counted, [0.5, 0.812], (0.0, 1.0)), limits, label="x"))
    edges: dict[str, list[float]] = {}
    for rect in drawn.iter("rect"):
        kind, look = rect.get("class", "").split()
        if kind == "bar":
            left = float(rect.get("x", "").rstrip("%"))
            edges.setdefault(look, []).extend([left, left + float(rect.get("width", "").rstrip("%"))])
    assert (min(edges["keep"]), max(edges["keep"])) == (0.0, 50.0)
    assert (min(edges["review"]), max(edges["review"])) == (50.0, pytest.approx(81.2))
    assert (min(edges["reject"]), max(edges["reject"])) == (pytest.approx(81.2), pytest.approx(100.0))
    said = sum(
        int(words.replace(",", ""))
        for words in re.findall(r": ([\d,]+) images", ElementTree.tostring(drawn, "unicode"))
    )
    assert said == 1001
    marks = [mark.text for mark in drawn.iter("text") if "mark" in mark.get("class", "")]
    assert marks == ["reject above 0.812", "review above 0.5"]


def test_an_escalating_limit_colours_nothing() -> None:
    counted = Histogram()
    counted.add(np.array([0.0, 1.0], np.float32))
    drawn = histogram_svg(bars(counted, [0.0]), [Limit("escalate", "above", 0.0)], label="")
    assert set(re.findall(r'class="bar (\w+)"', drawn)) == {"keep"}


def test_a_panel_draws_in_its_square() -> None:
    panel = Panel(Axis(0.0, 2.0, 100.0, 300.0), Axis(0.0, 1.0, 250.0, 50.0))
    assert 'points="100.0,250.0 200.0,150.0 300.0,50.0"' in panel.curve([0, 1, 2], [0, 0.5, 1], "#000000")
    assert 'points="100.0,50.0 300.0,50.0 300.0,250.0 100.0,250.0"' in panel.area([0, 2], [1, 1], [0, 0], "#000000")
    assert 'd="M200.0 240v6"' in panel.rug([1.0], 240, "#000000")
    line, words = panel.upright(1.9, "here", 80, "#000000")
    assert 'd="M290.0 50V250"' in line
    assert 'text-anchor="end"' in words
    assert 'text-anchor="start"' in panel.upright(0.1, "here", 80, "#000000")[1]
    assert "M150.0 230.0V70.0" in panel.whisker(150, 0.1, 0.9, 0.5, "#000000")
    assert [part for part in panel.frame("across", "title", [1.0]) if ">title<" in part or ">across<" in part]
