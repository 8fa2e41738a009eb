"""A picture as we decode it, in a child with a deadline, against the same picture as Chromium draws it."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import select
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.browser.devtools import Tab, tab

#: Seconds we may take for one picture.
DEADLINE = 60.0
#: Cells of the grid, each way, whose mean colours are compared, and by how many levels these may differ.
CELLS = 32
MOST, MEAN = 12.0, 2.0
_BATCH = 20

# Drawn on white at its own size; the mean of every cell. What has more pixels than a canvas of this machine is drawn smaller.
_PAGE = """<!doctype html><meta charset=utf-8><script>
async function look(address, cells) {
  const image = new Image();
  image.src = address;
  try { await image.decode(); } catch { return null; }
  const width = image.naturalWidth, height = image.naturalHeight;
  if (!width || !height || width * height > 4e7) return {size: [width, height], cells: null};
  const canvas = new OffscreenCanvas(width, height), context = canvas.getContext('2d', {willReadFrequently: true});
  context.fillStyle = '#fff';
  context.fillRect(0, 0, width, height);
  context.drawImage(image, 0, 0);
  const data = context.getImageData(0, 0, width, height).data, found = [];
  const across = Math.min(cells, width), down = Math.min(cells, height);
  for (let j = 0; j < down; j++) for (let i = 0; i < across; i++) {
    const left = Math.floor(i * width / across), right = Math.floor((i + 1) * width / across);
    const top = Math.floor(j * height / down), bottom = Math.floor((j + 1) * height / down);
    const sum = [0, 0, 0];
    for (let y = top; y < bottom; y++) for (let x = left; x < right; x++)
      for (let c = 0; c < 3; c++) sum[c] += data[4 * (y * width + x) + c];
    found.push(...sum.map(value => Math.round(value / ((right - left) * (bottom - top)) * 100) / 100));
  }
  return {size: [width, height], cells: found};
}
async function all(addresses, cells) {
  const found = [];
  for (const one of addresses) found.push(await look(one, cells));
  return found;
}
</script>"""


class Shown(NamedTuple):
    """error: class and sentence where there is no picture. cells: means of the grid, None where they were not taken."""

    size: tuple[int, int] | None = None
    cells: list[float] | None = None
    error: tuple[str, str] | None = None


def grid(rgb: np.ndarray, cells: int = CELLS) -> list[float]:
    """The mean colours of `rgb` ([h, w, 3]) on a grid of at most `cells` x `cells`, row by row."""
    height, width = rgb.shape[:2]
    down, across = min(cells, height), min(cells, width)
    rows, columns = np.arange(down + 1) * height // down, np.arange(across + 1) * width // across
    sums = np.add.reduceat(np.add.reduceat(rgb.astype(np.float64), rows[:-1], 0), columns[:-1], 1)
    means: np.ndarray = sums / (np.diff(rows)[:, None, None] * np.diff(columns)[None, :, None])
    return [float(value) for value in means.round(2).ravel()]


def ours(paths: Sequence[Path]) -> list[Shown]:
    """Each file decoded in a child; one that kills it, or takes longer than the deadline, is told as such."""
    found: list[Shown] = []
    child: subprocess.Popen[str] | None = None
    for path in paths:
        if child is None:
            child = subprocess.Popen(
                [sys.executable, "-m", "tests.support.picture_compare"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            assert child.stdout is not None
            child.stdout.readline()  # ready
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{path}\n")
        child.stdin.flush()
        ready = select.select([child.stdout], [], [], DEADLINE)[0]
        line = child.stdout.readline() if ready else ""
        if line:
            size, cells, error = json.loads(line)
            found.append(Shown(size and tuple(size), cells, error and tuple(error)))
            continue
        found.append(Shown(error=("decoder_crash", "ended its process" if ready else "took too long")))
        child.kill()
        child.wait()
        child = None
    if child is not None:
        child.communicate()
    return found


def theirs(binary: str, paths: Sequence[Path]) -> list[Shown]:
    """Each file as Chromium draws it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            index = self.path.strip("/")
            body = paths[int(index)].read_bytes() if index.isdigit() else _PAGE.encode()
            with contextlib.suppress(ConnectionError):  # a browser may stop reading what it cannot show
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                if not index.isdigit():
                    self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        return asyncio.run(_look(binary, address, len(paths)))
    finally:
        server.shutdown()
        server.server_close()


async def _look(binary: str, address: str, count: int) -> list[Shown]:
    found: list[Shown] = []
    start = 0
    while start < count:  # a browser that went away is begun anew behind the picture that took it along
        try:
            async with tab(binary) as page:
                await page.open(f"{address}/")
                while start < count:
                    batch = range(start, min(start + (_BATCH if len(found) == start else 1), count))
                    found += [_shown(one) for one in await _ask(page, list(batch))]
                    start = batch.stop
        except (RuntimeError, TimeoutError, TypeError):
            found.append(Shown(error=("browser", "Chromium went away")))
            start += 1
    return found


async def _ask(page: Tab, batch: list[int]) -> list[dict[str, Any] | None]:
    names = json.dumps([f"/{index}" for index in batch])
    answer = await page.call(
        "Runtime.evaluate", expression=f"all({names}, {CELLS})", returnByValue=True, awaitPromise=True
    )
    value = answer["result"].get("value")
    if not isinstance(value, list):
        raise RuntimeError(str(answer)[:300])
    return value


def _shown(answer: dict[str, Any] | None) -> Shown:
    if answer is None:
        return Shown(error=("refused", "Chromium does not show it"))
    return Shown(tuple(answer["size"]), answer["cells"])  # type: ignore[arg-type]


def outcome(mine: Shown, other: Shown) -> str:
    """same, or in which way they differ."""
    if mine.error and other.error:
        return "same"
    if mine.error:
        return mine.error[0]
    if other.error:
        return "shown by us alone"
    if mine.size != other.size:
        return "size"
    if mine.cells is None or other.cells is None:
        return "same"
    difference = np.abs(np.subtract(mine.cells, other.cells))
    return "colours" if difference.max() > MOST or difference.mean() > MEAN else "same"


def main() -> None:
    """The child: paths in, a line of JSON out for each."""
    from clipfilter.errors import RowError
    from clipfilter.images import decode
    from clipfilter.images.color import to_srgb

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            decoded = decode(Path(line.rstrip("\n")).read_bytes(), mode="exact")
        except RowError as error:
            print(json.dumps([None, None, (error.error_class, error.message)]), flush=True)
            continue
        rgb = decoded.rgb
        if decoded.profile:
            managed = to_srgb(rgb.transpose(2, 0, 1), decoded.profile)
            rgb = rgb if managed is None else managed.transpose(1, 2, 0)
        print(json.dumps([(decoded.width, decoded.height), grid(rgb), None]), flush=True)


if __name__ == "__main__":
    main()
