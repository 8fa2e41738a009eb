"""The report in a real browser: loads alone and in silence, hostile text stays text, light, dark, narrow, printed."""

from __future__ import annotations

import asyncio
import base64
import functools
import http.server
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clipfilter.report import write_report
from tests.browser.devtools import Tab, chromium, tab
from tests.support.report import IMG, SCRIPT, build_run

_BINARY = chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(_BINARY is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]

# What someone who got markup into the page would try first; must be false everywhere.
_TAKEN = (
    "'pwned' in window || document.scripts.length > 0 || !!document.querySelector('[onerror],[onload],iframe,object')"
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, list[str]]]:
    """The address of a report and the paths that were asked of its server."""
    folder = tmp_path_factory.mktemp("browser")
    built = build_run(folder, failed_shards=1, damaged=True)
    write_report(built.url, thumbnails="blur")
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=str(Path(built.url).parent))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()


def visit(question: Callable[[Tab], Awaitable[Any]]) -> Any:
    """Ask something of a browser of its own."""

    async def run() -> Any:
        assert _BINARY is not None
        async with tab(_BINARY) as page:
            return await question(page)

    return asyncio.run(run())


def test_it_loads_in_silence_and_asks_for_nothing(served: tuple[str, list[str]]) -> None:
    address, asked = served
    asked.clear()

    async def question(page: Tab) -> tuple[list[str], list[str], bool, int, int]:
        await page.open(f"{address}/out/report.html")
        pictures = "[...document.images].filter(i => i.loading = 'eager').length"
        await page.ask(pictures)
        await asyncio.sleep(0.5)
        broken = await page.ask("[...document.images].filter(i => !i.complete || i.naturalWidth == 0).length")
        return page.complaints(), page.requests(), await page.ask(_TAKEN), await page.ask(pictures), broken

    complaints, requests, taken, pictures, broken = visit(question)
    assert complaints == []
    assert requests == [f"{address}/out/report.html"]
    assert asked == ["/out/report.html"]
    assert taken is False
    assert pictures > 10
    assert broken == 0


def test_the_instrument_notices_what_it_should(served: tuple[str, list[str]], tmp_path: Path) -> None:
    """The same questions of a page that does all that is forbidden get other answers."""
    address, _ = served
    bad = tmp_path / "bad.html"
    bad.write_text(f"<img src='{address}/nothing.png'><script>window.pwned = 1; console.error('no')</script>")

    async def question(page: Tab) -> tuple[list[str], list[str], bool]:
        await page.open(bad.as_uri())
        return page.complaints(), page.requests(), await page.ask(_TAKEN)

    complaints, requests, taken = visit(question)
    assert complaints
    assert f"{address}/nothing.png" in requests
    assert taken is True


def test_its_policy_stops_markup_that_slipped_through(served: tuple[str, list[str]], tmp_path: Path) -> None:
    """Defence in depth: the page with a script and a remote picture put into it runs and loads neither."""
    address, _ = served

    async def question(page: Tab) -> tuple[list[str], bool, list[str]]:
        await page.open(f"{address}/out/report.html")
        html = await page.ask("document.documentElement.outerHTML")
        hacked = html.replace("<main>", f"<main><script>window.pwned = 1</script><img src='{address}/x.png'>", 1)
        (tmp_path / "hacked.html").write_text(hacked, encoding="utf-8")
        await page.open((tmp_path / "hacked.html").as_uri())
        blocked = [event["requestId"] for event in page.seen("Network.loadingFailed")]
        done = [e["request"]["url"] for e in page.seen("Network.requestWillBeSent") if e["requestId"] not in blocked]
        return page.complaints(), await page.ask("'pwned' in window"), done

    complaints, ran, done = visit(question)
    assert ran is False
    assert sum("Content Security Policy" in said for said in complaints) >= 2
    assert not [url for url in done if url.endswith("x.png")]


def test_hostile_text_is_shown_as_text(served: tuple[str, list[str]]) -> None:
    address, _ = served

    async def question(page: Tab) -> str:
        await page.open(f"{address}/out/report.html")
        return str(await page.ask("document.body.textContent"))

    shown = visit(question)
    assert SCRIPT in shown
    assert IMG in shown


def test_light_and_dark_differ_and_both_can_be_read(served: tuple[str, list[str]]) -> None:
    address, _ = served
    colours = """(() => {
      const style = (q, p) => getComputedStyle(document.querySelector(q))[p].match(/\\d+/g).slice(0, 3).map(Number);
      const page = style('body', 'backgroundColor'), card = style('.rule', 'backgroundColor');
      return {page, body: [style('body', 'color'), page], note: [style('.note', 'color'), page],
        link: [style('td a, th a', 'color'), page], facts: [style('.facts ul', 'color'), page],
        small: [style('.cards .key', 'color'), card],
        comment: [style('.comment', 'color'), style('pre', 'backgroundColor')],
        keep: [style('.chip.keep', 'color'), style('.chip.keep', 'backgroundColor')],
        review: [style('.chip.review', 'color'), style('.chip.review', 'backgroundColor')],
        reject: [style('.chip.reject', 'color'), style('.chip.reject', 'backgroundColor')],
        mark: [style('.chart .mark.reject', 'fill'), card]};
    })()"""

    def answer(dark: bool) -> dict[str, Any]:
        async def question(page: Tab) -> Any:
            await page.open(f"{address}/out/report.html", dark=dark)
            return await page.ask(colours)

        return dict(visit(question))

    light, dark = answer(False), answer(True)
    assert sum(light.pop("page")) > 700
    assert sum(dark.pop("page")) < 100
    for scheme in (light, dark):
        for name, (front, back) in scheme.items():
            assert contrast(front, back) >= 4.5, (name, front, back)


def contrast(one: list[int], other: list[int]) -> float:
    """WCAG 2 contrast ratio of two sRGB colours."""

    def luminance(colour: list[int]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [320, 400, 820, 1600])
def test_it_never_scrolls_sideways(served: tuple[str, list[str]], width: int) -> None:
    address, _ = served
    outside = """[...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.scroll, pre, svg')
      && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className)"""

    async def question(page: Tab) -> tuple[int, int, list[str]]:
        await page.open(f"{address}/out/report.html", width=width)
        seen = await page.ask("innerWidth")
        return await page.ask("document.documentElement.scrollWidth"), seen, await page.ask(outside)

    needed, seen, outside_elements = visit(question)
    assert seen == width
    assert needed <= width
    assert outside_elements == []


def test_headings_tables_and_pictures_are_told_to_those_who_cannot_see(served: tuple[str, list[str]]) -> None:
    address, _ = served
    questions = {
        "pictures without words": "[...document.images].filter(i => !i.alt.trim()).length",
        "charts without words": "document.querySelectorAll('svg:not([aria-hidden]):not([aria-label])').length",
        "headings that skip a level": """[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])
          .filter((level, i, all) => i && level > all[i - 1] + 1).length""",
        "cells of heads without a scope": "document.querySelectorAll('th:not([scope])').length",
        "links to nowhere": """[...document.querySelectorAll('a')]
          .filter(a => !document.getElementById(a.getAttribute('href').slice(1))).length""",
        "names used twice": """[...document.querySelectorAll('[id]')].map(e => e.id)
          .filter((id, i, all) => all.indexOf(id) != i).length""",
    }

    async def question(page: Tab) -> dict[str, int]:
        await page.open(f"{address}/out/report.html")
        return {name: await page.ask(expression) for name, expression in questions.items()}

    assert visit(question) == dict.fromkeys(questions, 0)


def test_it_prints_in_light_without_scroll_bars(served: tuple[str, list[str]]) -> None:
    address, _ = served

    async def question(page: Tab) -> tuple[bytes, str, int]:
        await page.open(f"{address}/out/report.html", dark=True)
        printed = await page.call("Page.printToPDF", printBackground=True)
        await page.call("Emulation.setEmulatedMedia", media="print")
        hidden = """[...document.querySelectorAll('pre, .scroll')]
          .filter(e => getComputedStyle(e).overflowX != 'visible').length"""
        colour = await page.ask("getComputedStyle(document.body).backgroundColor")
        return base64.b64decode(printed["data"]), colour, await page.ask(hidden)

    pdf, colour, hidden = visit(question)
    assert pdf.startswith(b"%PDF")
    assert colour == "rgb(255, 255, 255)"
    assert hidden == 0
