"""The one way from data to HTML: the templates in `templates/`, always escaped, without a character that cannot be seen."""

from __future__ import annotations

import base64
import hashlib
import time
from functools import cache
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from clipfilter import charts, text
from clipfilter.version import __version__


def page(template: str, **values: object) -> str:
    """A whole document of a template that extends `base.html`.

    values: plain text, numbers and containers of them, drawings of the chart kit; all else is escaped.
    """
    style = files("clipfilter.report").joinpath("style.css").read_text(encoding="utf-8")
    # The style's own hash instead of 'unsafe-inline': even markup that slipped through could not style anything.
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    made = {"style": Markup(style), "digest": digest, "written_by": f"clipfilter {__version__}"}  # noqa: S704  (it is ours)
    return environment().get_template(template).render(**made, now=text.moment(time.time()), **values)


@cache
def environment() -> Environment:
    """The environment of all templates; an undefined name is an error, never an empty place."""
    made = Environment(
        loader=PackageLoader("clipfilter.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finished,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        name: getattr(text, name) for name in ("duration", "number", "place", "plural", "score", "share", "size")
    }
    made.filters["short"] = text.clean
    made.globals["dot"] = charts.dot
    return made


def _finished(value: object) -> object:
    return value if isinstance(value, Markup) else text.visible(value)
