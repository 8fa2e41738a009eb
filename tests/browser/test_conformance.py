"""Pictures of many test suites, decoded by us in a child with a deadline and drawn by Chromium: all differences have reasons.

The table of docs/reference/images.md is what the long test found: `python -m tests.browser.test_conformance` writes it anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.browser.devtools import chromium
from tests.support.engine import PHOTOS, REPO
from tests.support.images import broken_images, encode, quadrants, scene, tricky_images
from tests.support.picture_compare import Shown, grid, ours, outcome, theirs
from tests.support.picture_differences import Difference, reason, rows
from tests.support.picture_suites import SUITES, Unavailable, pictures

_BINARY = chromium()
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(_BINARY is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]
PAGE = REPO / "docs" / "reference" / "images.md"
_BEGIN, _END = "| suite | pictures | of them | how they compare | which |\n| --- | --- | --- | --- | --- |\n", "\n\n"


def compared(suite: str, items: list[tuple[str, bytes]], folder: Path) -> list[Difference]:
    """What differs, of (name, bytes)."""
    paths = []
    for index, (_, data) in enumerate(items):
        paths.append(folder / str(index))
        paths[-1].write_bytes(data)
    assert _BINARY is not None
    found = []
    for (name, data), mine, other in zip(items, ours(paths), theirs(_BINARY, paths), strict=True):
        how = outcome(mine, other)
        if how != "same":
            found.append(Difference(suite, name, how, reason(name, data, how, mine, other)))
    return found


def test_the_grid_and_the_outcome() -> None:
    rgb = np.asarray(scene(100, 70))
    assert len(grid(rgb)) == 32 * 32 * 3
    assert grid(np.full((5, 7, 3), 9, np.uint8), 2) == [9.0] * 12
    shown, refused = Shown((100, 70), grid(rgb)), Shown(error=("decode_error", "no"))
    assert outcome(shown, shown) == outcome(refused, refused) == "same"
    assert outcome(refused, shown) == "decode_error"
    assert outcome(shown, refused) == "shown by us alone"
    assert outcome(shown, shown._replace(size=(70, 100))) == "size"
    assert outcome(shown, shown._replace(cells=grid(rgb[:, ::-1]))) == "colours"
    assert reason("x.png", b"\x89PNG", "colours", shown, shown) is None


def test_our_own_pictures_look_as_in_chromium(tmp_path: Path) -> None:
    """The tricky and the broken ones of the other tests, and the samples: a minute's share of what follows."""
    items = [(name, tricky.data) for name, tricky in tricky_images().items() if name != "text_bomb.png"]
    items += [(name, data) for name, (data, _) in broken_images().items() if len(data) < 1 << 16]
    items += [
        (path.name, path.read_bytes()) for path in sorted(PHOTOS.iterdir())[::4] if path.suffix in (".jpg", ".png")
    ]
    items.append(("other.png", encode(quadrants(), "PNG")))
    found = compared("own", items, tmp_path)
    assert len(items) > 150
    assert [one for one in found if one.reason is None] == []
    told = {one.path: one.reason for one in found}
    assert told.pop("exif6.webp") == "turned"
    assert told.pop("lossless.jp2") == "theirs"
    assert "other.png" not in told
    assert set(told.values()) <= {"theirs", "turned", "damaged", "ours", "large", "alpha", "chroma"}


@pytest.mark.soak("test_our_own_pictures_look_as_in_chromium")
@pytest.mark.parametrize("suite", SUITES)
def test_pictures_of_other_suites(suite: str, tmp_path: Path) -> None:
    found = table(suite, tmp_path)
    assert [line for line in found if "not explained" in line] == []
    said = [line for line in written() if line.startswith(f"| {suite} |")]
    assert said == found, f"renew the table of {PAGE.name}: python -m tests.browser.test_conformance"


def table(suite: str, folder: Path) -> list[str]:
    try:
        items = list(pictures(suite))
    except Unavailable as error:
        pytest.skip(str(error))
    return rows(suite, len(items), compared(suite, items, folder))


def written() -> list[str]:
    """The lines of the page's table."""
    return PAGE.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0].splitlines()


def told() -> list[str]:
    """What the page says of all suites: the lines of its table, and their sums."""
    lines = [[cell.strip() for cell in line.split("|")] for line in written()]
    count, same = (sum(int(cells[at]) for cells in lines if cells[2]) for at in (2, 3))
    return [f"Of {count:,} pictures {same:,} agree.".replace(",", " "), *written()]


def test_the_page_says_what_its_table_adds_up_to() -> None:
    text = " ".join(PAGE.read_text(encoding="utf-8").split())
    assert told()[0] in text
    assert {line.split("|")[1].strip() for line in written()} == set(SUITES)
    assert "not explained" not in text


def main() -> None:
    """Write the table anew; suites that cannot be had keep their lines."""
    import tempfile

    lines = []
    for suite in SUITES:
        with tempfile.TemporaryDirectory() as folder:
            try:
                lines += table(suite, Path(folder))
            except pytest.skip.Exception as error:
                print(error, file=sys.stderr)
                lines += [line for line in written() if line.startswith(f"| {suite} |")]
    old = told()[0]
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(_BEGIN)
    PAGE.write_text(before + begin + "\n".join(lines) + _END + rest.partition(_END)[2], encoding="utf-8")
    print("write instead of", old, ":", told()[0])


if __name__ == "__main__":
    main()
