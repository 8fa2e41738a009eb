"""End-to-end speed against the bare forward pass and a peer, and memory against the number of shards, in one run.

    python benchmarks/throughput.py                         # nano and ViT-B-32, small and 2-megapixel JPEGs, memory
    python benchmarks/throughput.py --models nano --images 2000 --json results.json

bare     : the model's two towers on ready tensors, same threads and batch size, nothing else (measured before and after
           the run; the mean counts, since machines drift).
run      : `clipfilter run` on webdataset tars with captions, local engine, one worker; its steady state, start-up apart.
peer     : webdataset -> Pillow -> open_clip's own transform -> open_clip's model, as clip-retrieval does it, with the
           same towers and full-length texts; one loader process per core.
ViT-B-32 has random weights: they serve for speed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).parents[1]
SHARED = Path(os.environ.get("CLIPFILTER_SHARED", REPO.parent / "shared"))
BATCH = 64
POLICY = """
policy: benchmark
version: 1
rules:
  - id: dogs
    concept: {any_of: ["a dog"], but_not: ["a cat", "a horse"]}
    review: {above: 0.6}
    reject: {above: 0.9}
  - id: off-caption
    alignment: {}
    reject: {below: 0.0}
  - id: small
    metadata: min_side
    reject: {below: 100}
"""


def photographs() -> Iterator[tuple[bytes, str]]:
    """JPEGs with captions: Flickr8k where it is at hand, else the repo's samples, over and over."""
    tars = sorted((SHARED / "data" / "flickr8k").glob("*.tar"))
    while True:
        if tars:
            for path in tars:
                with tarfile.open(path) as tar:
                    files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
                for name in sorted(files):
                    if name.endswith(".jpg"):
                        yield files[name], files[name[:-3] + "txt"].decode()
        else:
            folder = REPO / "samples" / "photos"
            for line in (folder / "captions.jsonl").read_text().splitlines():
                row = json.loads(line)
                data = (folder / row["file_name"]).read_bytes()
                if data[:2] == b"\xff\xd8" and len(data) > 15_000:
                    yield data, row["caption"]


def large(photos: Iterator[tuple[bytes, str]], count: int) -> Iterator[tuple[bytes, str]]:
    """2-megapixel JPEGs (1733 x 1155, quality 90): each a mosaic of 40 photographs, so that the detail is real."""
    from PIL import Image

    tiles = [next(photos) for _ in range(240)]
    opened = [Image.open(io.BytesIO(data)).convert("RGB").resize((222, 222)) for data, _ in tiles]
    draw = np.random.default_rng(0)
    for _ in range(min(count, 200)):
        canvas = Image.new("RGB", (1733, 1155))
        for x in range(0, 1733, 222):
            for y in range(0, 1155, 222):
                canvas.paste(opened[draw.integers(len(opened))], (x, y))
        buffer = io.BytesIO()
        canvas.save(buffer, "JPEG", quality=90)
        yield buffer.getvalue(), tiles[draw.integers(len(tiles))][1]


def write_tars(folder: Path, samples: list[tuple[bytes, str]], images: int, shards: int) -> None:
    """`images` samples in `shards` tars, the given ones used again as often as needed."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard * images // shards, (shard + 1) * images // shards):
                data, caption = samples[number % len(samples)]
                for extension, payload in (("jpg", data), ("txt", caption.encode())):
                    info = tarfile.TarInfo(f"{number:08d}.{extension}")
                    info.size = len(payload)
                    tar.addfile(info, io.BytesIO(payload))


def bare_forward(model: str, folder: Path, threads: int, seconds: float) -> float:
    """Images with captions per second through both towers, tensors ready; in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--bare", model, str(folder), str(threads), str(seconds)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def _bare(model: str, folder: str, threads: int, seconds: float) -> None:
    from clipfilter.images.load import load_image
    from clipfilter.models import load_encoder

    encoder = load_encoder(model, device="cpu", dtype="fp32", threads=threads)
    data, captions = _first(Path(folder), BATCH * 2)
    pixels = np.stack([load_image(item, encoder.preprocess).pixels for item in data])
    batches = [(pixels[i : i + BATCH], captions[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
    for batch, texts in batches:
        encoder.encode_images(batch)
        encoder.encode_texts(texts)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        batch, texts = batches[count // BATCH % len(batches)]
        encoder.encode_images(batch)
        encoder.encode_texts(texts)
        count += len(batch)
    print(count / (time.perf_counter() - started))


def _first(folder: Path, count: int) -> tuple[list[bytes], list[str]]:
    with tarfile.open(sorted(folder.glob("*.tar"))[0]) as tar:
        files = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    return [d for n, d in files if n.endswith("jpg")][:count], [d.decode() for n, d in files if n.endswith("txt")][
        :count
    ]


def peer(folder: Path, threads: int, images: int) -> float:
    """Pairs per second of webdataset + open_clip (ViT-B-32, random weights), as clip-retrieval reads and embeds."""
    done = subprocess.run(
        [sys.executable, __file__, "--peer", str(folder), str(threads), str(images)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return float(done.stdout.split()[-1])


def _peer(folder: str, threads: int, images: int) -> None:
    from clipfilter.models._torch import torch_with_torchvision

    torch_with_torchvision()
    import open_clip
    import torch
    import webdataset as wds

    torch.set_num_threads(threads)
    model, _, transform = open_clip.create_model_and_transforms("ViT-B-32")
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    model.eval()
    dataset = (
        wds.WebDataset([str(p) for p in sorted(Path(folder).glob("*.tar"))], shardshuffle=False)
        .decode("pil")
        .to_tuple("jpg", "txt")
        .map_tuple(transform, lambda text: tokenizer(text)[0])
        .batched(BATCH)
    )
    loader = torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=threads)
    count, started = 0, None
    with torch.inference_mode():
        for pixels, texts in loader:
            if started is None:
                started = time.perf_counter()  # the first batch pays for the start-up
            else:
                count += len(pixels)
            model.encode_image(pixels)
            model.encode_text(texts)
            if count >= images:
                break
    assert started is not None
    print(count / (time.perf_counter() - started))


def run(model: str, folder: Path, work: Path, threads: int) -> dict[str, Any]:
    """`clipfilter run` in a process of its own: its result as JSON, and the peak PSS of its process tree in bytes."""
    policy = work / "policy.yaml"
    policy.write_text(POLICY)
    out = Path(tempfile.mkdtemp(dir=work)) / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "clipfilter", "run", str(folder), "--policy", str(policy), "--out", str(out), "--model", model,
         "--engine", "local", "--workers", "1", "--threads", str(threads), "--batch-size", str(BATCH), "--thumbnails", "none",
         "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process.pid, peak))
    watcher.start()
    stdout, stderr = process.communicate()
    watcher.join()
    if process.returncode != 0:
        raise RuntimeError(stderr)
    result = json.loads(stdout)
    seconds: dict[str, float] = {}
    for path in (out / "commits").iterdir():
        for name, value in json.loads(path.read_text())["work"]["seconds"].items():
            seconds[name] = round(seconds.get(name, 0) + value, 2)
    return {
        "images_per_s": result["rows_processed"] / (result["seconds"] - result["startup_seconds"]),
        "startup_s": result["startup_seconds"],
        "rows": result["rows_processed"],
        "peak_pss": peak[0],
        "seconds": seconds,
    }


def _watch(pid: int, peak: list[int]) -> None:
    import psutil

    while True:
        try:
            root = psutil.Process(pid)
            tree = [root, *root.children(recursive=True)]
            if root.status() == psutil.STATUS_ZOMBIE:
                return
        except psutil.Error:
            return
        total = 0
        for process in tree:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        peak[0] = max(peak[0], total)
        time.sleep(0.2)


def random_vit(work: Path) -> str:
    """A ViT-B-32 checkpoint with random weights, as a model name."""
    from clipfilter.models._torch import torch_with_torchvision

    torch_with_torchvision()
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    path = work / "vit-b-32-random.safetensors"
    if not path.exists():
        save_file({k: v.contiguous() for k, v in open_clip.create_model("ViT-B-32").state_dict().items()}, str(path))
    return f"ViT-B-32={path}"


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"threads": arguments.threads, "speed": [], "memory": []}
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        photos = photographs()
        sets = {"224 px": [next(photos) for _ in range(min(arguments.images, 2000))]}
        if not arguments.skip_large:
            sets["2 MP"] = list(large(photos, arguments.images))
        for label, samples in sets.items():
            write_tars(work / label, samples, arguments.images, 2)
        for name in filter(None, arguments.models.split(",")):
            model = random_vit(work) if name == "ViT-B-32" else name
            for label in sets:
                folder = work / label
                before = bare_forward(model, folder, arguments.threads, arguments.seconds)
                ours = run(model, folder, work, arguments.threads)
                after = bare_forward(model, folder, arguments.threads, arguments.seconds)
                bare = (before + after) / 2
                row = {"model": name, "images": label, "bare": bare, "run": ours, "ratio": ours["images_per_s"] / bare}
                if name == "ViT-B-32" and not arguments.skip_peer:
                    row["peer"] = peer(folder, arguments.threads, min(arguments.images, 600))
                results["speed"].append(row)
                print(_line(row), flush=True)
        if not arguments.skip_memory:
            for shards in (2, 7):
                folder = work / f"memory-{shards}"
                write_tars(folder, sets["224 px"], 1000 * shards, shards)
                ours = run("nano", folder, work, arguments.threads)
                results["memory"].append({"shards": shards, "peak_pss": ours["peak_pss"]})
                print(f"nano, {shards} shards of 1000: peak PSS {ours['peak_pss'] / 2**20:.0f} MiB", flush=True)
            small, big = (item["peak_pss"] for item in results["memory"])
            results["memory_ratio"] = big / small
            print(f"memory of 7 shards against 2: {big / small:.3f}")
    return results


def _line(row: dict[str, Any]) -> str:
    text = (
        f"{row['model']:<9} {row['images']:<7} bare {row['bare']:6.1f}/s   run {row['run']['images_per_s']:6.1f}/s "
        f"({row['run']['rows']} images, start-up {row['run']['startup_s']:.1f} s)   ratio {row['ratio']:.3f}"
    )
    return text + (f"   peer {row['peer']:.1f}/s" if "peer" in row else "")


def main() -> None:
    if sys.argv[1:2] == ["--bare"]:
        _bare(sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]))
        return
    if sys.argv[1:2] == ["--peer"]:
        _peer(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="nano,ViT-B-32", help="which to time; '' measures memory alone")
    parser.add_argument("--images", type=int, default=1200, help="images per measured run")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=15.0, help="of each bare measurement")
    parser.add_argument("--work", default=None, help="folder for the temporary data")
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--skip-peer", action="store_true")
    parser.add_argument("--json", default=None, help="write the results here")
    arguments = parser.parse_args()
    results = measure(arguments)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
