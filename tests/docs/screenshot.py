"""Takes docs/images/report.png from the demo's report: `make demo && python -m tests.docs.screenshot demo-out`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from tests.docs.pages import REPO

TARGET = REPO / "docs" / "images" / "report.png"
#: Parts of the page at this width, side by side: (top, bottom) in pixels.
WIDTH, MARGIN, PARTS = 1160, 70, ((30, 1175), (1240, 2180))
SCALE, COLOURS = 0.6, 256


def main(run: Path) -> None:
    """Photograph the page in headless Chromium, cut out the parts, and keep the file small."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    assert browser, "Chromium is not installed"
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "page.png")
        subprocess.run(
            [
                browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                f"--window-size={WIDTH},{PARTS[-1][1] + 100}", f"--screenshot={whole}", (run / "report.html").resolve().as_uri(),
            ],
            check=True, stderr=subprocess.DEVNULL, timeout=120,
        )  # fmt: skip
        page = Image.open(whole).convert("RGB")
    width, height = WIDTH - 2 * MARGIN, PARTS[0][1] - PARTS[0][0]
    sheet = Image.new("RGB", (width * len(PARTS) + 60 * (len(PARTS) + 1), height + 60), page.getpixel((5, 5)))
    for number, (top, bottom) in enumerate(PARTS):
        sheet.paste(page.crop((MARGIN, top, WIDTH - MARGIN, bottom)), (60 + number * (width + 60), 30))
    small = sheet.resize((round(sheet.width * SCALE), round(sheet.height * SCALE)), Image.Resampling.LANCZOS)
    TARGET.parent.mkdir(exist_ok=True)
    small.quantize(COLOURS, kmeans=3, dither=Image.Dither.NONE).save(TARGET, optimize=True)
    print(f"{TARGET.relative_to(REPO)}: {small.width} x {small.height}, {TARGET.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
