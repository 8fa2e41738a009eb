"""Precision and recall of the kinds of duplicates on planted copies: exact, recompressed, resized, cropped.

    python benchmarks/duplicates.py SOURCE [--limit 2000] [--model nano] [--work FOLDER] [--json]

SOURCE is anything `run` reads. A third of its images get one altered copy each: a fifth of these are byte copies, then
JPEG at quality 40, half size, a crop to 90 %, and brighter by a quarter. Originals that are near-duplicates of each
other in the source itself count against precision; look at them with --json.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageEnhance

from clipfilter.curation.dedup import DedupOptions, find_duplicates
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.sources import open_source

ALTERATIONS = ("exact", "quality 40", "half size", "crop 90 %", "brighter")


def altered(data: bytes, how: str) -> bytes:
    if how == "exact":
        return data
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    quality = 90
    if how == "quality 40":
        quality = 40
    elif how == "half size":
        image = image.resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.LANCZOS)
    elif how == "crop 90 %":
        image = image.crop((width // 20, height // 20, width - width // 20, height - height // 20))
    else:
        image = ImageEnhance.Brightness(image).enhance(1.25)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def images(url: str, limit: int) -> Iterator[bytes]:
    source = open_source(url)
    left = limit
    for shard in source.iter_shards():
        for batch in source.read(shard):
            for data in batch.column("cf_image").to_pylist():
                if data and left:
                    left -= 1
                    yield data
            if not left:
                return


def plant(url: str, limit: int, target: Path) -> dict[str, tuple[str, str]]:
    """Write the images and their copies to Parquet; uid of each copy -> (uid of its original, how)."""
    truth: dict[str, tuple[str, str]] = {}
    uids: list[str] = []
    pictures: list[bytes] = []
    for number, data in enumerate(images(url, limit)):
        uid = f"{2 * number:032x}"
        uids.append(uid)
        pictures.append(data)
        if number % 3:
            continue
        how = ALTERATIONS[number // 3 % len(ALTERATIONS)]
        try:
            copy = altered(data, how)
        except OSError:
            continue
        truth[f"{2 * number + 1:032x}"] = (uid, how)
        uids.append(f"{2 * number + 1:032x}")
        pictures.append(copy)
    target.mkdir(parents=True)
    pq.write_table(pa.table({"uid": uids, "image": pa.array(pictures, pa.binary())}), target / "planted.parquet")
    return truth


def measure(run: str, out: Path, truth: dict[str, tuple[str, str]], options: DedupOptions) -> dict[str, Any]:
    began = time.perf_counter()
    found = find_duplicates(run, str(out), options)
    seconds = time.perf_counter() - began
    group = {copy: original for copy, (original, _) in truth.items()}
    table = pa.concat_tables([pq.read_table(path) for path in out.glob("annotated/*.parquet")])
    right: set[str] = set()
    wrong = []
    for row in table.select(["cf_uid", "cf_duplicate_of", "cf_duplicate_kind"]).to_pylist():
        uid, keeper = row["cf_uid"], row["cf_duplicate_of"]
        if keeper is None:
            continue
        if group.get(uid, uid) == group.get(keeper, keeper):
            right.add(uid if uid in truth else keeper)
        else:
            wrong.append(row)
    planted = Counter(how for _, how in truth.values())
    hit = Counter(truth[uid][1] for uid in right)
    return {
        "options": {"exact": options.exact, "near": options.near, "semantic": options.semantic},
        "flagged": len(right) + len(wrong),
        "precision": len(right) / max(1, len(right) + len(wrong)),
        "recall": len(right) / max(1, len(truth)),
        "recall_by_alteration": {how: hit[how] / planted[how] for how in planted},
        "duplicates": found.duplicates,
        "seconds": round(seconds, 2),
        "wrong": wrong,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source")
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--work")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    work = Path(given.work or tempfile.mkdtemp(prefix="clipfilter-duplicates-"))
    truth = plant(given.source, given.limit, work / "source")
    run_job(JobRequest("embed", str(work / "source"), str(work / "run"), model=given.model, engine="local"))
    cases = [DedupOptions(near=None, prefer=None)]
    cases += [DedupOptions(exact=False, near=bits, prefer=None) for bits in (2, 4, 8)]
    cases += [DedupOptions(exact=False, near=None, semantic=cosine, prefer=None) for cosine in (0.99, 0.97, 0.95, 0.9)]
    cases += [DedupOptions(near=4, semantic=0.97, prefer=None)]
    results = [measure(str(work / "run"), work / f"case-{n}", truth, case) for n, case in enumerate(cases)]
    if given.json:
        print(json.dumps(results, indent=1))
        return
    print(f"{len(truth):,} planted copies\n")
    print(f"{'exact':<6}{'near':>5}{'cosine':>8}{'precision':>11}{'recall':>8}  " + "  ".join(ALTERATIONS))
    for result in results:
        options = result["options"]
        shares = "  ".join(f"{result['recall_by_alteration'].get(how, 0):>{len(how)}.2f}" for how in ALTERATIONS)
        near = "-" if options["near"] is None else options["near"]
        cosine = "-" if options["semantic"] is None else options["semantic"]
        line = f"{'yes' if options['exact'] else 'no':<6}{near!s:>5}{cosine!s:>8}{result['precision']:>11.3f}"
        print(line + f"{result['recall']:>8.3f}  {shares}")


if __name__ == "__main__":
    main()
