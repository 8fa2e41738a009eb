"""The pages of a run and of a comparison built by hand, element for element as they were when last looked at.

After a change that is meant, write them anew and look at them: `python -m tests.unit.test_report_golden`.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from clipfilter.operations import Comparison, Flip, Side
from clipfilter.report import diff_page, write_report
from clipfilter.runs import read_plan
from clipfilter.storage import Directory
from clipfilter.version import __version__
from tests.support.report import IMG, RTL, SCRIPT, build_run

GOLDEN = Path(__file__).parents[1] / "golden"


def report(folder: Path) -> str:
    """The page of the run with trouble of all kinds, without pictures; what differs from place to place is named."""
    built = build_run(folder, failed_shards=2, damaged=True)
    page = Path(write_report(built.url, thumbnails="none")).read_text(encoding="utf-8")
    plan = read_plan(Directory(built.url))
    assert plan is not None
    return everywhere(page).replace(str(folder), "FOLDER").replace(plan.sha256, "PLAN")


def diff() -> str:
    """The page of a comparison with hostile names; its pictures cannot be had."""
    reason = {
        "rule": "weapons",
        "band": "reject",
        "score": 0.91,
        "threshold": 0.85,
        "nearest": SCRIPT,
        "contrast": None,
    }
    missing = {"rule": "fit", "band": "missing", "score": None, "threshold": None, "nearest": None, "contrast": None}
    person = {**missing, "rule": "override", "band": "keep"}
    before = Side("old", 1, "ab" * 32, Counter(keep=6, review=1, reject=3), {"weapons": Counter(reject=3, review=1)})
    after = Side("new", 2, "cd" * 32, Counter(keep=8, reject=2), {"weapons": Counter(reject=2), "fit": Counter(keep=1)})
    flips = [
        Flip("c1", f"part{IMG}.tar", 3, "u3", RTL, IMG, "", "reject", "keep", [reason], []),
        Flip("c1", ".", 4, "u4", "plain", None, "", "reject", "keep", [reason, missing], [person]),
        Flip("c1", ".", 5, "u5", "", "a caption", "", "review", "keep", [missing], [{**reason, "band": "tighten"}]),
    ]
    changes = {("reject", "keep"): 1, ("review", "keep"): 1}
    place = "s3://user:secret@bucket/run"
    found = Comparison(place, "000002", {}, f"nano@3 {SCRIPT}", 10, before, after, changes, flips, {})
    return everywhere(diff_page(found, "none"))


def everywhere(page: str) -> str:
    """A page without what every edition and moment has of its own, and without the style, which is a file."""
    page = re.sub(r"<style>.*</style>", "<style>STYLE</style>", page, flags=re.S)
    page = re.sub(r"'sha256-[^']+'", "'sha256-DIGEST'", page)
    return re.sub(r" on \d+ \w+ \d{4}, \d\d:\d\d UTC from ", " on DAY from ", page).replace(__version__, "VERSION")


@pytest.mark.parametrize("name", ["report.html", "diff.html"])
def test_the_pages_are_as_they_were(name: str, tmp_path: Path) -> None:
    made = report(tmp_path) if name == "report.html" else diff()
    assert made == (GOLDEN / name).read_text(encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        (GOLDEN / "report.html").write_text(report(Path(temporary)), encoding="utf-8")
    (GOLDEN / "diff.html").write_text(diff(), encoding="utf-8")
