"""The report page: its numbers are those of the files, nothing hostile gets through, blurred pictures are gone."""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipfilter.errors import RefusedError
from clipfilter.operations.verify import verify_run
from clipfilter.report import examples as report_examples
from clipfilter.report import write_report
from clipfilter.report.data import gather
from clipfilter.report.thumbnails import MAX_BYTES, SIDE, thumbnail
from clipfilter.runs import Run
from tests.support import report as build
from tests.support.report import Built, build_run


class Page(HTMLParser):
    """The elements of the page, its text, and the cells of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.rows: list[list[str]] = []
        self._cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.rows[-1][-1] += data

    def table_row(self, first: str, columns: int) -> list[str]:
        return next(row for row in self.rows if row and row[0].strip() == first and len(row) == columns)

    def images(self, alt: str) -> list[np.ndarray]:
        found = []
        for tag, attributes in self.elements:
            if tag == "img" and attributes["alt"].startswith(alt):
                data = base64.b64decode(attributes["src"].removeprefix("data:image/jpeg;base64,"))
                found.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64))
        return found


def read(built: Built, thumbnails: str = "blur") -> Page:
    path = write_report(built.url, thumbnails=thumbnails)
    assert path == f"{built.url}/report.html"
    return Page(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_run(tmp_path_factory.mktemp("run"), failed_shards=2, damaged=True)


@pytest.fixture(scope="module")
def page(built: Built) -> Page:
    return read(built)


def test_the_run_used_here_is_a_valid_run(built: Built) -> None:
    assert verify_run(built.url).problems == []


def test_every_total_is_that_of_the_files(built: Built, page: Page) -> None:
    decisions = Counter(row["cf_decision"] for row in built.rows)
    assert min(decisions.values()) > 0
    assert len(decisions) == 3
    tiles = re.findall(r'<dt>(?:<svg.*?</svg>)?([^<]+)</dt><dd class="count">([\d,]+)</dd>', page.html)
    assert {name: int(count) for name, count in tiles} == {
        "Images in": len(built.rows) + built.failed,
        "Kept": decisions["keep"],
        "To review": decisions["review"],
        "Rejected": decisions["reject"],
        "Failed": built.failed,
    }
    share = decisions["keep"] / (len(built.rows) + built.failed)
    assert f"{decisions['keep']} ({share:.1%}) are kept" in page.text
    assert "do not agree" not in page.text


def test_every_rule_count_is_that_of_the_files(built: Built, page: Page) -> None:
    severity = {"review": 1, "reject": 2}
    for rule in build.POLICY["rules"]:
        counts: Counter[str] = Counter()
        alone = 0
        for row in built.rows:
            mine = [reason for reason in row["cf_reasons"] if reason["rule"] == rule["id"]]
            counts.update(reason["band"] for reason in mine)
            # The definition: without this rule the row would have been decided more mildly.
            rest = [severity.get(r["band"], 1) for r in row["cf_reasons"] if r not in mine]
            alone += ("keep", "review", "reject").index(row["cf_decision"]) > max(rest, default=0)
        cells = page.table_row(rule["id"], 7)
        assert [int(cell) for cell in cells[1:4]] == [counts["reject"], counts["review"], counts["missing"]]
        assert int(cells[5]) == alone


def test_thresholds_with_the_rows_beyond_them(built: Built, page: Page) -> None:
    scores = np.array([row["cf_score.weapons"] for row in built.rows], np.float32)
    fit = np.array([row["cf_similarity"] for row in built.rows if row["cf_similarity"] is not None], np.float32)
    small = np.array([row["cf_score.small"] for row in built.rows], np.float32)
    bands = [row for row in page.rows if len(row) == 5 and row[0] in ("reject", "review")]
    expected = [
        ("reject", "above 0.800", (scores > np.float32(0.8)).sum(), len(scores)),
        ("review", "above 0.500", (scores > np.float32(0.5)).sum(), len(scores)),
        ("reject", "below 0.100", (fit < np.float32(0.1)).sum(), len(fit)),
        ("review", "below 100", (small < 100).sum(), len(small)),
        ("reject", "below 0.300", (fit < np.float32(0.3)).sum(), len(fit)),
    ]
    assert [tuple(row[:4]) for row in bands] == [(a, b, f"{c}", f"{c / n:.1%}") for a, b, c, n in expected]
    assert "Calibrated for this model: target precision>=0.95, 400 labelled examples" in bands[0][4]
    assert bands[2][4] == "Written in the policy, not calibrated for this model"
    assert bands[3][4] == "Written in the policy"
    assert bands[4][4] == "Fixed over the whole dataset: outside the top 50% of the ranked images"


def test_histograms_hold_every_scored_row(built: Built, page: Page) -> None:
    charts = re.findall(r'<svg class="chart".*?</svg>', page.html, re.S)
    assert len(charts) == len(build.POLICY["rules"])
    for rule, chart in zip(build.POLICY["rules"], charts, strict=True):
        drawn = sum(int(count.replace(",", "")) for count in re.findall(r"([\d,]+) images</title>", chart))
        assert drawn == sum(row[f"cf_score.{rule['id']}"] is not None for row in built.rows)


def test_what_is_uncalibrated_damaged_or_failed_is_said_plainly(built: Built, page: Page) -> None:
    assert "The thresholds of off-caption are not calibrated for this model" in page.text
    assert "2 shards could not be read at all" in page.text
    assert "3 shards damaged: 4.5 kB at the end could not be read" in page.text
    assert "15 rows of the source were never downloaded" in page.text
    failures = {row[0]: int(row[1]) for row in page.rows if len(row) == 5 and row[0] in ("decode_error", "read_error")}
    failed = [row[0] for row in map(tuple, _failed(built))]
    assert failures == dict(Counter(failed))


def _failed(built: Built) -> list[list[Any]]:
    files = sorted(Path(built.url, "failed").glob("*.parquet"))
    return [[row["cf_error_class"], row["cf_error"]] for file in files for row in pq.read_table(file).to_pylist()]


def test_throughput_and_fingerprints(built: Built, page: Page) -> None:
    plan = gather(Run.open(built.url)).plan
    assert "48 images in 10 s: 4.8 images a second" in page.text
    assert page.table_row("Embedding images", 3)[1:] == ["7.5 s", "58.8%"]
    for value in ("ab" * 32, "ef" * 32, plan.sha256, "made of 3 commits", "nano@1"):
        assert value in page.text
    assert f"clipfilter verify {built.url}" in page.text
    assert "--policy policy.yaml --model nano@1" in page.text


def test_nothing_hostile_is_markup(page: Page) -> None:
    allowed = "html head meta link title style body header main footer nav section article aside h1 h2 h3 h4 p ul li"
    allowed += " dl dt dd div span b a bdi br code pre table caption thead tbody tr th td img"
    allowed += " svg g rect line circle text"
    assert {tag for tag, _ in page.elements} <= set(allowed.split())
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], (tag, attributes)
        assert attributes.get("href", "#").startswith("#") or attributes["href"] == "data:,"
        assert attributes.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    assert page.html.count("<style") == page.html.count("</style") == 1
    # and it is there to be read
    for hostile in (build.SCRIPT, build.IMG, "</bdi></p></style>{{7*7}}"):
        assert hostile in page.text
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f\x00-\x09\x0b-\x1f\x7f]", page.html)
    assert "secret" not in page.html
    assert "token" not in page.html


def test_the_page_forbids_itself_to_load_anything(page: Page) -> None:
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"https?://|url\(|@import", page.html.replace("https://host/x ", ""))


def test_kept_pictures_are_clear_and_all_others_gone(built: Built, page: Page) -> None:
    """A picture of fine lines: shown it keeps its detail, blurred there is none left in the bytes."""
    clear, blurred = page.images("Picture"), page.images("Blurred picture")
    assert len(clear) > 3
    assert len(blurred) > 3
    assert min(_detail(image) for image in clear) > 10 * max(_detail(image) for image in blurred)
    decisions = [chip.split()[-1] for chip in re.findall(r'"value">[^<]*</span><span class="(chip \w+)">', page.html)]
    assert len(clear) == decisions.count("keep")
    assert page.html.count("<img") == len(decisions)


def _detail(image: np.ndarray) -> float:
    """Mean absolute difference of neighbouring pixels."""
    return float(np.abs(np.diff(image, axis=0)).mean() + np.abs(np.diff(image, axis=1)).mean())


def test_blur_cannot_be_undone() -> None:
    """Two pictures that differ only in detail become the same picture: what is gone is not in the file."""
    dots = np.indices((240, 320)).sum(axis=0) % 2 * 255
    one = np.repeat(dots[:, :, None], 3, axis=2).astype(np.uint8)
    other = 255 - one
    decoded = [np.asarray(Image.open(io.BytesIO(thumbnail(image, blurred=True)))).astype(int) for image in (one, other)]
    assert np.abs(decoded[0] - decoded[1]).max() <= 2
    assert decoded[0].std() < 2
    text = np.full((240, 320, 3), 255, np.uint8)
    text[100:140:8, 40:280] = 0
    assert _detail(np.asarray(Image.open(io.BytesIO(thumbnail(text, blurred=True)))).astype(float)) < 3


@pytest.mark.parametrize(("height", "width"), [(240, 320), (3000, 20), (1, 1), (20, 3000), (1200, 1600)])
def test_thumbnails_are_small(height: int, width: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3)).astype(np.uint8)
    for blurred in (False, True):
        data = thumbnail(noise, blurred=blurred)
        assert len(data) <= MAX_BYTES
        assert max(Image.open(io.BytesIO(data)).size) <= SIDE


def test_show_and_none(built: Built) -> None:
    shown = read(built, "show")
    assert shown.images("Picture")
    assert not shown.images("Blurred picture")
    none = read(built, "none")
    assert "<img" not in none.html
    assert "They are without pictures" in none.text
    with pytest.raises(RefusedError, match="none, blur or show"):
        write_report(built.url, thumbnails="all")


def test_none_does_not_touch_the_source(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    from clipfilter.sources import Source

    monkeypatch.setattr(Source, "from_plan", lambda plan: pytest.fail("the source was opened"))
    read(built, "none")


def test_examples_are_few_and_none_twice(built: Built) -> None:
    data = gather(Run.open(built.url))
    found = report_examples.choose_examples(data)
    rows = [(example.path, example.commit, example.row) for example in found.all()]
    assert len(rows) == len(set(rows)) <= report_examples.TOTAL
    assert len(data.chosen) <= 6
    near = found.by_bucket["weapons", "reject_near"][0].score
    assert near == min(r["cf_score.weapons"] for r in built.rows if r["cf_score.weapons"] > np.float32(0.8))


def test_a_source_that_is_gone_costs_only_the_pictures(tmp_path: Path) -> None:
    built = build_run(tmp_path)
    shutil.rmtree(built.source)
    page = read(built)
    assert "<img" not in page.html
    assert "so there are no thumbnails" in page.text
    assert "are kept" in page.text


def test_a_changed_image_is_not_shown_as_the_one_that_was_decided(tmp_path: Path) -> None:
    built = build_run(tmp_path)
    stranger = Image.fromarray(build.photograph(99))
    for file in built.source.glob("*.jpg"):
        stranger.save(file, quality=91)
    page = read(built)
    assert "<img" not in page.html
    assert "so there are no thumbnails" in page.text


@pytest.mark.parametrize("job", ["embed", "score"])
def test_a_run_without_policy(tmp_path: Path, job: str) -> None:
    built = build_run(tmp_path, job=job)
    page = read(built)
    captions = sum(row["cf_similarity"] is not None for row in built.rows)
    assert f"{captions} images with a caption" in page.text
    assert "Nothing has been decided yet" in page.text
    assert 'id="policy"' not in page.html
    assert page.images("Blurred picture")  # nobody has decided about them
    assert not page.images("Picture")


def test_a_run_without_rows(tmp_path: Path) -> None:
    page = read(build_run(tmp_path, count=0, failed_shards=1))
    assert "This run has no images" in page.text
    assert "1 shard could not be read at all" in page.text
    assert not re.search(r"\bnan\b", page.text.lower())


def test_numbers_that_disagree_are_said(tmp_path: Path) -> None:
    built = build_run(tmp_path)
    version = Path(built.url, "versions", "000001.json")
    decisions = Counter(row["cf_decision"] for row in built.rows)
    edited = version.read_text().replace(f'"keep": {decisions["keep"]}', '"keep": 4711')
    assert edited != version.read_text()
    version.write_text(edited)
    assert f"the version counts 4,711 keep, the rows say {decisions['keep']}" in read(built).text


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="is not a run directory"):
        write_report(str(tmp_path / "nothing"))
    assert not (tmp_path / "nothing").exists()


def test_writing_leaves_no_temporary_files(built: Built) -> None:
    read(built, "none")
    assert not list(Path(built.url).glob(".tmp*"))


def test_a_run_on_a_remote_store(built: Built) -> None:
    """The page of a run on an object store is the page of the same run on a disk, but for where and when."""
    import fsspec

    fs = fsspec.filesystem("memory")
    for file in Path(built.url).rglob("*"):
        if file.is_file() and file.name != "report.html":
            fs.pipe_file(f"/report-bucket/run/{file.relative_to(built.url).as_posix()}", file.read_bytes())
    assert write_report("memory://report-bucket/run") == "memory://report-bucket/run/report.html"
    remote = Page(fs.cat_file("/report-bucket/run/report.html").decode())
    local = read(built)
    assert remote.rows == local.rows
    assert len(remote.images("Picture")) == len(local.images("Picture")) > 0


@pytest.mark.integration
def test_the_report_of_a_real_run(tmp_path: Path) -> None:
    """The sample photographs through the real engine and the bundled model."""
    from clipfilter.engine.job import JobRequest, run_job

    root = Path(__file__).parents[2]
    samples, policy = root / "samples" / "photos", root / "policies" / "demo.yaml"
    if not samples.is_dir() or not policy.is_file():
        pytest.skip("the sample photographs or the demo policy are not in this checkout")
    result = run_job(JobRequest("run", str(samples), str(tmp_path / "out"), policy=str(policy), engine="local"))
    page = Page(Path(write_report(result.out)).read_text(encoding="utf-8"))
    assert len(page.html) < 3_000_000
    assert "do not agree" not in page.text
    for rule, bands in result.totals["rules"].items():
        cells = page.table_row(rule, 7)
        assert [int(cell.replace(",", "")) for cell in cells[1:4]] == [
            bands.get(b, 0) for b in ("reject", "review", "missing")
        ]
    assert page.images("Picture")
    assert page.images("Blurred picture")


def test_importing_the_report_is_light() -> None:
    code = "import sys, clipfilter.report; print([m for m in ('torch', 'pyarrow', 'numpy', 'PIL') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
