"""The page of `clipfilter serve` in a real browser: on the sample photographs, and on 7 000 rows of Flickr8k."""

from __future__ import annotations

import asyncio
import base64
import csv
import json
import shutil
import signal
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.calibration import read_labels
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.errors import RefusedError
from clipfilter.operations.compare import compare_policies
from clipfilter.policies import load_policy
from tests.browser.devtools import Tab, chromium, tab
from tests.browser.test_report_page import contrast
from tests.support.edition import DEMO_BANDS
from tests.support.engine import PHOTOS, REPO, SHARED
from tests.support.serve import Served, served

_BINARY = chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(_BINARY is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]
SCRIPT = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'> & a chimney"
_TAKEN = (
    "'pwned' in window || document.scripts.length !== 1 || !!document.querySelector('[onerror],iframe,object,[style]')"
)


@dataclass
class Page:
    """A page of a run: who serves it, and the run's directory and policy."""

    server: Served
    run: str
    policy: str


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The sample photographs, one with a script for a caption, decided by the demo's policy."""
    folder = tmp_path_factory.mktemp("served")
    photos = folder / "photos"
    photos.mkdir()
    for path in PHOTOS.iterdir():
        (photos / path.name).symlink_to(path)
    lines = [json.loads(line) for line in (PHOTOS / "captions.jsonl").read_text().splitlines()]
    for line in lines:
        line["caption"] = SCRIPT if line["file_name"] == "koala.jpg" else line["caption"]
    (photos / "captions.jsonl").unlink()
    (photos / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = str(folder / "out")
    run_job(JobRequest("run", str(photos), out, policy="demo", engine="local", copy=False, max_failures=1.0))
    with served(out, folder / "labels.csv") as server:
        yield Page(server, out, "demo")


@pytest.fixture(scope="module")
def flickr(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """Flickr8k, embedded once for all sessions (it takes minutes) and decided anew; one caption is a script."""
    source = SHARED / "data" / "flickr8k"
    if not source.is_dir():
        pytest.skip("Flickr8k is not in CLIPFILTER_SHARED/data/flickr8k (or ../shared/data/flickr8k)")
    folder = request.config.cache.mkdir("flickr8k-embedded") if request.config.cache else tmp_path_factory.mktemp("f")
    embed = JobRequest("embed", str(source), str(folder / "run"), engine="local")
    try:
        run_job(embed)
    except RefusedError:  # embedded by other code or another model
        shutil.rmtree(folder / "run")
        run_job(embed)
    own = tmp_path_factory.mktemp("flickr")
    out = own / "out"
    result = run_job(JobRequest("filter", str(folder / "run"), str(out), policy="demo", engine="local"))
    assert result.totals["rows"] == 7000
    first = min(out.glob("annotated/*.parquet"), key=lambda path: pq.read_table(path, columns=["cf_key"])[0][0].as_py())
    table = pq.read_table(first)
    place = table.schema.get_field_index("cf_caption")
    captions = [SCRIPT, *table["cf_caption"].to_pylist()[1:]]
    pq.write_table(table.set_column(place, "cf_caption", pa.array(captions, pa.string())), first)
    with served(str(out), own / "labels.csv") as server:
        yield Page(server, str(out), "demo")


def visit(address: str, question: Callable[[Tab], Awaitable[Any]], **look: Any) -> Any:
    """Ask something of a browser of its own, once the first pictures are there."""

    async def run() -> Any:
        assert _BINARY is not None
        async with tab(_BINARY) as page:
            await page.open(address, **look)
            await until(page, "document.querySelectorAll('#grid .card').length > 0")
            return await question(page)

    return asyncio.run(run())


async def until(page: Tab, expression: str, seconds: float = 60) -> Any:
    """Wait until an expression (whose value is no element) is true; its value."""
    for _ in range(int(seconds / 0.1)):
        value = await page.ask(expression)
        if value:
            return value
        await asyncio.sleep(0.1)
    raise TimeoutError(f"{expression} stayed false; the page says {await page.ask('document.body.innerText')!r}")


async def press(page: Tab, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
        await page.call("Input.dispatchKeyEvent", type=kind, key=key, **text)


async def settled(page: Tab) -> None:
    """Wait until no rows are being loaded."""
    await asyncio.sleep(0.05)
    await until(page, "!document.getElementById('grid').hasAttribute('aria-busy')")


async def choose(page: Tab, name: str, value: str) -> None:
    await page.ask(
        f"(() => {{ const e = document.getElementById({name!r}); e.value = {value!r};"
        " e.dispatchEvent(new Event('change')); })()"
    )


async def slide(page: Tab, band: str, value: float) -> None:
    """Drag a slider: as the browser does, `input` while it moves and `change` at the end."""
    await page.ask(
        f"(() => {{ const e = document.getElementById('slider-{band}'); e.value = {value};"
        " e.dispatchEvent(new Event('input')); e.dispatchEvent(new Event('change')); })()"
    )


async def search(page: Tab, text: str) -> list[str]:
    """The captions of the first page of a search, nearest first."""
    await page.ask(
        f"(() => {{ document.getElementById('text').value = {json.dumps(text)};"
        " document.getElementById('search').requestSubmit(); })()"
    )
    await until(page, f"document.getElementById('active').textContent.includes({json.dumps(text)})")
    await settled(page)
    return list(await page.ask("[...document.querySelectorAll('.card .caption')].map(e => e.textContent)"))


async def flipped(page: Tab) -> tuple[int, dict[str, str], str]:
    """How many rows the page says change; of the page shown, uid -> new decision; the changed policy's text."""
    await until(page, "!!document.getElementById('flipped')")
    view = "JSON.parse(sessionStorage.getItem('clipfilter-view')).view"
    rows = await page.call(
        "Runtime.evaluate",
        expression=f"""(async () => {{
          const ask = async (path, body) => (await fetch('/api/' + path, {{method: 'POST', body: JSON.stringify(body)}})).json();
          const changes = {view}.changes;
          const effect = await ask('effect', {{changes, exact: true}});
          const found = await ask('rows', {{changes, flips: true, limit: 200}});
          const text = (await ask('export', {{changes}})).text;
          return {{flipped: effect.flipped, rows: found.rows.map(row => [row.uid, row.after]), text}};
        }})()""",
        awaitPromise=True,
        returnByValue=True,
    )
    answer = rows["result"]["value"]
    shown = f"document.getElementById('flipped').textContent.replace(/,/g, '') === '{answer['flipped']}'"
    await until(page, shown)
    return answer["flipped"], dict(answer["rows"]), answer["text"]


def diff(page: Page, text: str, folder: Path) -> Any:
    """What `policy diff` finds between the run's policy and the one that the page saved."""
    path = folder / "changed.yaml"
    path.write_text(text)
    return compare_policies(load_policy(page.policy), load_policy(str(path)), page.run, examples=200)


# ---------------------------------------------------------------- on the sample photographs


def test_it_loads_in_silence_searches_and_shows_text_as_text(samples: Page) -> None:
    async def question(page: Tab) -> dict[str, Any]:
        found = {"castle": await search(page, "a castle"), "koala": await search(page, "a koala")}
        await asyncio.sleep(0.5)
        await page.ask("document.querySelector('#grid .card').focus()")
        await press(page, "Enter")
        await until(page, "document.getElementById('detail').open")
        return found | {
            "detail": await page.ask("document.getElementById('detail').textContent"),
            "body": await page.ask("document.body.textContent"),
            "taken": await page.ask(_TAKEN),
            "address": await page.ask("location.href"),
            "complaints": page.complaints(),
            "elsewhere": [url for url in page.requests() if not url.startswith(samples.server.base + "/")],
            "seen": await page.ask("[...document.images].some(i => i.complete && i.naturalWidth > 0)"),
        }

    found = visit(samples.server.address, question)
    assert any("castle" in caption.lower() for caption in found["castle"][:3])
    assert SCRIPT in found["koala"][:3]
    assert SCRIPT in found["body"]
    assert "passes" in found["detail"]
    assert found["taken"] is False
    assert found["address"] == samples.server.base + "/"  # the token is gone from the address bar
    assert found["complaints"] == []
    assert found["elsewhere"] == []
    assert found["seen"] is True


def test_the_slider_counts_what_policy_diff_counts(samples: Page, tmp_path: Path) -> None:
    async def question(page: Tab) -> tuple[int, dict[str, str], str]:
        await choose(page, "rule", "dangerous-animal")
        await slide(page, "review", 0.3)
        await slide(page, "reject", 0.5)
        return await flipped(page)

    count, rows, text = visit(samples.server.address, question)
    original = (REPO / "policies" / "demo.yaml").read_text()
    assert text == original.replace(DEMO_BANDS, "    review: {above: 0.3}\n    reject: {above: 0.5}", 1)
    found = diff(samples, text, tmp_path)
    assert count == found.flipped > 5
    assert rows == {flip.uid: flip.after for flip in found.flips}


def test_labels_by_key_survive_a_reload_and_are_a_labels_file(samples: Page) -> None:
    marks = "[...document.querySelectorAll('#grid .card')].slice(0, 4).map(e => e.querySelector('.mark')?.textContent ?? '')"

    async def question(page: Tab) -> list[list[str]]:
        await choose(page, "rule", "dangerous-animal")
        await settled(page)
        await page.ask("document.querySelector('#grid .card').focus()")
        seen = []
        for number, key in enumerate(("r", "k", "x", "r"), 1):  # x on a picture without a label skips it
            await press(page, key)
            await until(page, f"document.activeElement === document.querySelectorAll('#grid .card')[{number}]")
        seen.append(await page.ask(marks))
        await page.open(samples.server.base + "/")
        await until(page, "document.querySelectorAll('#grid .card').length > 0")
        seen.append(await page.ask(marks))
        await page.ask("document.querySelector('#grid .card').focus()")
        await press(page, "x")
        await until(page, "!document.querySelector('#grid .card').querySelector('.mark')")
        seen.append(await page.ask(marks))
        return seen

    before, after, undone = visit(samples.server.address, question)
    assert before == after == ["r", "k", "", "r"]
    assert undone == ["", "k", "", "r"]
    stored = read_labels(str(samples.server.labels))
    assert [(label.true, label.rule) for label in stored] == [(False, "dangerous-animal"), (True, "dangerous-animal")]


def test_a_random_sample_is_labelled_in_its_order(samples: Page) -> None:
    async def question(page: Tab) -> tuple[list[str], str]:
        await choose(page, "rule", "document")
        await settled(page)
        await page.ask("document.getElementById('sample-size').value = 12")
        await page.ask("[...document.querySelectorAll('#labels button')].find(b => b.textContent === 'Draw').click()")
        await until(page, "document.getElementById('active').textContent.includes('random sample')")
        await settled(page)
        await page.ask("document.querySelector('#grid .card').focus()")
        for number in range(1, 4):
            await press(page, "k")
            await until(page, f"document.activeElement === document.querySelectorAll('#grid .card')[{number}]")
        return (
            await page.ask("[...document.querySelectorAll('#grid .card .caption')].map(e => e.textContent)"),
            await page.ask("document.getElementById('labels').textContent"),
        )

    captions, said = visit(samples.server.address, question)
    with open(samples.server.labels, newline="") as file:
        drawn = [row for row in csv.DictReader(file) if row["rule"] == "document"]
    assert len(drawn) == len(captions) == 12
    assert {row["sample_design"] for row in drawn} == {"uniform seed 0"}
    assert [row["label"] for row in drawn] == ["0"] * 3 + [""] * 9
    assert "3 of 12 labelled" in said


def test_what_was_not_kept_is_blurred_in_its_pixels_until_it_is_asked_for(samples: Page) -> None:
    async def question(page: Tab) -> list[list[str]]:
        await page.ask("[...document.querySelectorAll('.decision')].find(b => b.classList.contains('reject')).click()")
        await until(page, "[...document.querySelectorAll('#grid .card')].every(e => e.querySelector('.reveal'))")
        images = "[...document.querySelectorAll('#grid img')].slice(0, 2).map(i => i.getAttribute('src'))"
        before = await page.ask(images)
        await page.ask("document.querySelector('#grid .card').focus()")
        await press(page, "v")
        return [before, await page.ask(images)]

    before, after = visit(samples.server.address, question)
    assert not any("clear" in url for url in before)
    assert "clear=1" in after[0]
    assert after[1] == before[1]

    def detail(url: str) -> float:
        """How much a picture changes from one pixel to the next."""
        import io

        import numpy as np
        from PIL import Image

        status, body = ask(samples.server, url)
        assert status == 200
        return float(np.abs(np.diff(np.asarray(Image.open(io.BytesIO(body)).convert("L"), float))).mean())

    assert detail(before[0]) < 0.5 * detail(after[0])


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (820, False), (1440, True)])
def test_it_fits_and_can_be_read(samples: Page, width: int, dark: bool) -> None:
    colours = """(() => {
      const rgb = (q, p) => getComputedStyle(document.querySelector(q))[p].match(/\\d+/g).slice(0, 3).map(Number);
      const page = rgb('body', 'backgroundColor');
      return {body: [rgb('body', 'color'), page], kicker: [rgb('.kicker', 'color'), page],
        caption: [rgb('.card .caption', 'color'), page], value: [rgb('.card .value', 'color'), page],
        count: [rgb('#count', 'color'), page],
        search: [rgb('#search .primary', 'color'), rgb('#search .primary', 'backgroundColor')],
        note: [rgb('.panel .note', 'color'), rgb('.panel', 'backgroundColor')],
        keep: [rgb('.chip.keep', 'color'), rgb('.chip.keep', 'backgroundColor')]};
    })()"""
    nameless = """[...document.querySelectorAll('button, input, select, [tabindex="0"]')].filter(e => e.offsetParent
      && !(e.getAttribute('aria-label') || e.labels?.length || e.textContent.trim())).map(e => e.outerHTML)"""

    async def question(page: Tab) -> tuple[int, Any, list[str]]:
        await page.ask("document.getElementById('side').open = true")
        needed = await page.ask("document.documentElement.scrollWidth")
        return needed, await page.ask(colours), await page.ask(nameless)

    needed, found, silent = visit(samples.server.address, question, width=width, dark=dark)
    assert needed <= width
    for name, (front, back) in found.items():
        assert contrast(front, back) >= 4.5, (name, front, back)
    assert silent == []


# ---------------------------------------------------------------- who may ask


def ask(server: Served, path: str, data: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    """A request with the cookie, unless `Cookie` says otherwise."""
    port = server.base.rsplit(":", 1)[1]
    given = {"Cookie": f"clipfilter-{port}={server.token}", "Origin": server.base} | headers
    given = {name.replace("_", "-"): value for name, value in given.items() if value}
    request = urllib.request.Request(server.base + path, data=data, headers=given)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_only_the_page_itself_may_ask(samples: Page) -> None:
    server = samples.server
    label = json.dumps({"position": 1, "rule": "document", "label": 1}).encode()
    before = server.labels.read_bytes() if server.labels.exists() else None
    port = server.base.rsplit(":", 1)[1]
    refused = [
        ask(server, "/", Cookie=""),
        ask(server, "/?token=wrong", Cookie=""),
        ask(server, "/api/run", Cookie=""),
        ask(server, "/static/app.js", Cookie=""),
        ask(server, "/api/picture/1", Cookie=f"clipfilter-{port}=x"),
        ask(server, "/api/run", Host="evil.example"),
        ask(server, "/api/run", Host=f"evil.example:{port}"),
        ask(server, "/api/label", label, Cookie=""),
        ask(server, "/api/label", label, Origin="http://evil.example"),
        ask(server, "/api/label", label, Origin="null"),
        ask(server, "/api/label", label, Origin=""),
    ]
    assert [status for status, _ in refused] == [403] * len(refused)
    assert all(body.decode().count(".") >= 1 and body.count(b"\n") == 1 for _, body in refused)
    assert (server.labels.read_bytes() if server.labels.exists() else None) == before
    assert ask(server, "/api/run")[0] == 200
    assert ask(server, "/api/run", Host=f"localhost:{port}", Origin=f"http://localhost:{port}")[0] == 200


def test_answers_forbid_all_that_the_page_does_not_need(samples: Page) -> None:
    with urllib.request.urlopen(samples.server.address, timeout=30) as answer:
        headers = answer.headers
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert "HttpOnly" in headers["Set-Cookie"]
    assert "SameSite=Strict" in headers["Set-Cookie"]
    assert headers["Access-Control-Allow-Origin"] is None
    for path, data in (
        ("/static/../app.py", None),
        ("/static/index.html", None),
        ("/api/row/999999", None),
        ("/api/rows", b"{"),
        ("/api/rows", b'{"where": "nothing = 1"}'),
        ("/api/rows", b'{"extra": 1}'),
        ("/api/rows", b'{"limit": 100000}'),
        ("/api/effect", b'{"changes": {"document": {"reject": 7}}}'),
        ("/api/image", b'{"data": "bm8gaW1hZ2U="}'),
    ):
        status, body = ask(samples.server, path, data)
        assert status in (400, 404), (path, status, body)
        assert b"Traceback" not in body


def test_a_picture_finds_its_like(samples: Page) -> None:
    picture = base64.b64encode((PHOTOS / "kitten.jpg").read_bytes()).decode()
    status, body = ask(samples.server, "/api/image", json.dumps({"data": picture}).encode())
    assert status == 200
    wanted = json.dumps({"image": json.loads(body)["image"], "limit": 3}).encode()
    rows = json.loads(ask(samples.server, "/api/rows", wanted)[1])["rows"]
    assert rows[0]["key"] == "kitten.jpg"
    assert rows[0]["cosine"] > 0.99


def test_ctrl_c_ends_it_and_one_labels_file_has_one_server(samples: Page, tmp_path: Path) -> None:
    with served(samples.run, tmp_path / "own.csv") as first:
        with (
            pytest.raises(AssertionError, match="another `clipfilter serve`"),
            served(samples.run, tmp_path / "own.csv"),
        ):
            pass
        code, said = first.stop(signal.SIGINT)
    assert (code, said.strip()) == (0, "stopped")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- on 7 000 rows


@pytest.mark.soak("test_the_slider_counts_what_policy_diff_counts")
def test_seven_thousand_rows(flickr: Page, tmp_path: Path) -> None:
    """Search finds, the slider's count is that of `policy diff`, labels survive a reload, a script stays text."""

    async def question(page: Tab) -> dict[str, Any]:
        found: dict[str, Any] = {"dogs": await search(page, "a dog running through the snow")}
        found["bikes"] = await search(page, "a man riding a bicycle")
        await page.ask("document.querySelector('#active button').click()")
        await until(page, "document.getElementById('count').textContent.startsWith('7,000')")
        found["body"] = await page.ask("document.body.textContent")
        found["taken"] = await page.ask(_TAKEN)
        await choose(page, "rule", "off-caption")
        await slide(page, "reject", 0.233)
        found["moved"] = await flipped(page)
        await choose(page, "rule", "dangerous-animal")
        await slide(page, "review", 0.41)
        await slide(page, "reject", 0.6127)
        found["both"] = await flipped(page)
        await choose(page, "rule", "weakest-captions")
        await slide(page, "review", 0.8)
        found["all three"] = await flipped(page)
        await choose(page, "rule", "dangerous-animal")
        await settled(page)
        await page.ask("document.querySelector('#grid .card').focus()")
        for number, key in enumerate("rkr", 1):
            await press(page, key)
            await until(page, f"document.activeElement === document.querySelectorAll('#grid .card')[{number}]")
        await page.open(flickr.server.base + "/")
        await until(page, "document.querySelectorAll('#grid .mark').length === 3")
        found["marks"] = await page.ask(
            "[...document.querySelectorAll('#grid .mark')].map(e => e.textContent).join('')"
        )
        found["complaints"] = page.complaints()
        return found

    found = visit(flickr.server.address, question)
    assert sum("dog" in caption.lower() for caption in found["dogs"][:10]) >= 8
    assert sum("bi" in caption.lower() for caption in found["bikes"][:10]) >= 7
    assert SCRIPT in found["body"]
    assert found["taken"] is False
    assert found["complaints"] == []
    for count, rows, text in (found["moved"], found["both"], found["all three"]):
        expected = diff(flickr, text, tmp_path)
        assert count == expected.flipped > 100
        if expected.flipped <= 200:
            assert rows == {flip.uid: flip.after for flip in expected.flips}
    assert found["marks"] == "rkr"
    assert [label.true for label in read_labels(str(flickr.server.labels))] == [True, False, True]
    status, body = ask(flickr.server, "/", Cookie="")
    assert (status, body.count(b"\n")) == (403, 1)
