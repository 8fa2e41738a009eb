"""The templates: nothing leaves them unescaped, and only the chart kit and the stylesheet are markup to begin with."""

from __future__ import annotations

import ast
import re
from importlib.resources import files
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from markupsafe import Markup

import clipfilter
from clipfilter.policies import Written
from clipfilter.report.html import environment

PRODUCT = Path(clipfilter.__file__).parent
#: Where text becomes markup without being escaped: what the chart kit draws, and the stylesheet.
ALLOWED = {"charts/svg.py", "calibration/plot.py", "report/html.py"}


def test_only_drawings_and_the_stylesheet_are_markup_to_begin_with() -> None:
    found: dict[str, list[ast.Call]] = {}
    for path in PRODUCT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Markup":
                found.setdefault(path.relative_to(PRODUCT).as_posix(), []).append(node)
    assert set(found) == ALLOWED
    others = [call for name, calls in found.items() for call in calls if not isinstance(call.args[0], ast.Constant)]
    assert [ast.unparse(call) for call in others] == ["Markup(style)"]


def test_no_template_says_that_anything_is_safe() -> None:
    folder = files("clipfilter.report").joinpath("templates")
    texts = {item.name: item.read_text(encoding="utf-8") for item in folder.iterdir()}
    assert {"base.html", "report.html", "diff.html"} <= set(texts)
    for name, text in texts.items():
        assert not re.search(r"\|\s*safe|autoescape|forceescape|Markup", text), name
        assert not re.search(r"\son\w+=|<script|style=", text), name
    assert environment().autoescape is True


def test_what_goes_in_is_text() -> None:
    shown = environment().from_string('<p title="{{ value }}">{{ value }}</p>')
    escaped = "&#34;&#39;&lt;b&gt;&amp;\ufffd\ufffd"
    assert shown.render(value="\"'<b>&\u202e\x00") == f'<p title="{escaped}">{escaped}</p>'
    assert shown.render(value=Markup("<b>")) == '<p title="<b>"><b></p>'


@pytest.mark.parametrize("asked", ["{{ nothing }}", "{% if nothing %}{% endif %}", "{{ nothing|short }}"])
def test_a_name_that_is_missing_is_an_error(asked: str) -> None:
    with pytest.raises(UndefinedError, match="nothing"):
        environment().from_string(asked).render(something=1)


def test_what_others_wrote_in_a_sentence_is_short_and_set_apart() -> None:
    made = environment().from_string('{% from "parts.html" import said %}{{ said(parts) }}')
    parts = ["Looks for “", Written("<i>", isolated=True), "” & ", Written("y" * 9, 5)]
    assert made.render(parts=parts) == "Looks for “<bdi>&lt;i&gt;</bdi>” &amp; yyyy…"


def test_every_filter_and_every_drawing_is_there() -> None:
    made = environment().from_string("{{ 1234|number }} {{ 1|plural('row') }} {{ 1|share(3) }} {{ dot('keep') }}")
    assert made.render().startswith('1,234 1 row 33.3% <svg class="dot"')
