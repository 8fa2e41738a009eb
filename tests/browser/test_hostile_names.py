"""Names and texts of strangers in a real browser: in the report, on the page over a run, in its answers; none becomes markup."""

from __future__ import annotations

import asyncio
import csv
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clipfilter.engine.job import JobRequest, run_job
from clipfilter.report import write_report
from tests.browser.devtools import Tab, chromium
from tests.browser.test_report_page import visit as look_at
from tests.browser.test_serve import ask, press, until, visit
from tests.support.engine import photos, policy_file
from tests.support.serve import Served, served

_BINARY = chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(_BINARY is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]
_RUN = "window.pwned=1"
#: Paths of pictures: a slash makes folders, so that every closing tag can be spelled.
NAMES = [
    f"<script>{_RUN}</script>.jpg",
    f"</style><script>{_RUN}</script>.jpg",
    f"\"><img src=x onerror='{_RUN}'>.jpg",
    f"'><svg onload={_RUN}>.jpg",
    f"javascript:{_RUN}.jpg",
    f"=cmd|'{_RUN}'!A0.jpg",
    f"{{{{ {_RUN} }}}}${{{_RUN}}}.jpg",
    "two\nlines\tand \x07 a bell.jpg",
    "\u202egpj.exe\u2066.jpg",
    "no\udcff utf-8.jpg",
    "l" * 240 + ".jpg",
    f"<!--{_RUN}-->&lt;script&gt;.jpg",
]
_TAKEN = "'pwned' in window || !!document.querySelector('[onerror],[onload],iframe,object,main svg[onload]')"
POLICY = """
policy: hostile
version: 1
rules:
  - id: words
    concept: {any_of: ["</script><script>window.pwned=1</script>"], but_not: ["\\"><img src=x onerror=window.pwned=1>"]}
    review: {above: 0.5}
  - id: column
    metadata: "<img src=x onerror=window.pwned=1>"
    reject: {above: 1000}
    on_missing: keep
"""


@dataclass
class Hostile:
    run: Path
    server: Served


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hostile]:
    """A run over pictures with such names and captions, with a column of such a name, decided by rules with such phrases."""
    folder = tmp_path_factory.mktemp("hostile")
    lines = []
    for name, (_, data, _) in zip(NAMES, photos(), strict=False):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        caption = f"{name} \x00 \u202e {name}"
        lines.append({"file_name": name, "text": caption, "<img src=x onerror=window.pwned=1>": 7})
    table = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "photos/metadata.jsonl").write_text(table)
    out = folder / "out"
    policy = policy_file(folder, POLICY)
    result = run_job(
        JobRequest("run", str(folder / "photos"), str(out), policy=policy, engine="local", max_failures=1.0)
    )
    assert result.totals.decided == len(NAMES)
    write_report(str(out), thumbnails="show")
    with served(str(out), folder / "labels.csv") as server:
        yield Hostile(out, server)


def test_no_name_becomes_markup_in_the_report(hostile: Hostile) -> None:
    async def question(page: Tab) -> dict[str, Any]:
        await page.open((hostile.run / "report.html").as_uri())
        return {
            "taken": await page.ask(_TAKEN),
            "scripts": await page.ask("document.scripts.length"),
            "links": await page.ask("[...document.querySelectorAll('a')].some(a => a.protocol == 'javascript:')"),
            "text": await page.ask("document.body.textContent"),
            "complaints": page.complaints(),
            "requests": page.requests(),
        }

    found = look_at(question)
    assert (found["taken"], found["scripts"], found["links"]) == (False, 0, False)
    assert found["complaints"] == []
    assert len(found["requests"]) == 1
    assert f"<script>{_RUN}</script>.jpg" in found["text"]
    assert "\u202e" not in found["text"]


def test_no_name_becomes_markup_on_the_page_over_a_run(hostile: Hostile) -> None:
    async def question(page: Tab) -> dict[str, Any]:
        details = ""
        for card in range(await page.ask("document.querySelectorAll('#grid .card').length")):
            await page.ask(f"document.querySelectorAll('#grid .card')[{card}].focus()")
            await press(page, "Enter")
            await until(page, "document.getElementById('detail').open")
            await asyncio.sleep(0.1)
            details += await page.ask("document.getElementById('detail').textContent")
            await page.ask("document.getElementById('detail').close()")
        return {
            "taken": await page.ask(_TAKEN),
            "scripts": await page.ask("document.scripts.length"),
            "links": await page.ask("[...document.querySelectorAll('a')].some(a => a.protocol == 'javascript:')"),
            "text": details,
            "complaints": page.complaints(),
            "elsewhere": [url for url in page.requests() if not url.startswith(hostile.server.base + "/")],
        }

    found = visit(hostile.server.address, question)
    assert (found["taken"], found["scripts"], found["links"]) == (False, 1, False)
    assert found["complaints"] == found["elsewhere"] == []
    assert f"</style><script>{_RUN}</script>.jpg" in found["text"]


def test_answers_are_json_that_no_browser_takes_for_a_page(hostile: Hostile) -> None:
    server = hostile.server
    for path, data in (
        ("/api/run", None),
        ("/api/row/1", None),
        ("/api/rows", b"{}"),
        ("/api/rows", b'{"sort": "<b>"}'),
    ):
        headers = {"Cookie": f"clipfilter-{server.base.rsplit(':', 1)[1]}={server.token}", "Origin": server.base}
        request = urllib.request.Request(server.base + path, data, headers)
        try:
            answer = urllib.request.urlopen(request, timeout=30)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            json.loads(answer.read())
            assert answer.headers["Content-Type"].startswith("application/json")
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    for path in (
        "/static/..%2f..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/api/picture/..%2f1",
        "/api/picture/-1",
        "/api/picture/1%00",
    ):
        assert ask(server, path)[0] == 404, path
    # A label file that somebody opens in a spreadsheet holds no formula.
    position = next(row["position"] for row in rows(server) if row["key"].startswith("=cmd"))
    assert ask(server, "/api/label", json.dumps({"position": position, "rule": "words", "label": 1}).encode())[0] == 200
    with open(server.labels, newline="", encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    assert line["cf_key"].startswith("'=cmd")
    assert not any(cell[:1] in ("=", "+", "@", "\t") for cell in line.values())


def rows(server: Served) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(ask(server, "/api/rows", b"{}")[1])["rows"]
    return found


def test_absurd_conditions_and_numbers_get_a_sentence(hostile: Hostile) -> None:
    """Each is answered at once with 400; none costs more than its length."""
    digits = "9" * 9000
    for where in (
        f"cf_width > {digits}", f"cf_width in (-{digits})", f"cf_similarity between 1 and {digits}.5", "cf_width > 1e999999",
        "cf_width > 1" + "1" * 9900 + "x", "(" * 9999, "(" * 4000 + "cf_width = 1" + ")" * 4000, "x" * 9999 + " = 1", "\x00",
        "cf_width in (" + "1," * 4000 + "1)", "cf_key = '" + "'" * 4998, "cf_key " * 1400, "cf_width = '\ud800'",
    ):  # fmt: skip
        status, body = ask(hostile.server, "/api/rows", json.dumps({"where": where}).encode())
        assert status == 400, (where[:40], status)
        sentence = json.loads(body)["error"]
        assert len(sentence) < 800, (where[:40], sentence)
    for body in (
        b'{"offset": ' + digits.encode() + b"}", b'{"offset": 1e999}', b'{"like": 99999999999999999999}', b"[" * 100_000,
        b'{"where": "' + b"a" * 20_000 + b'"}', b'{"where": "\\ud800"}', b'{"changes": {"words": {"review": 1e400}}}', b"\xff",
    ):  # fmt: skip
        status, answer = ask(hostile.server, "/api/rows", body)
        assert status == 400, (body[:40], status, answer[:200])
        assert json.loads(answer)["error"]
