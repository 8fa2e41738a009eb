"""Images and texts per second of torch float32, ONNX float32 and ONNX int8 in one run, with their cosines.

    python benchmarks/onnx_speed.py                    # ViT-B-32 (random weights) and nano, every core; about two minutes
    python benchmarks/onnx_speed.py --models nano --json results.json

The kinds take turns, so that a machine that slows down slows all of them; the fastest turn of each counts. Speed does not
depend on weights, what int8 loses does: only nano's cosines are those of a trained model. int8 scales are chosen on some
of the images, cosines measured on others.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

REPO = Path(__file__).parents[1]
IMAGES = 32
TEXTS = 64
TURNS = 5


def samples(preprocess: Any) -> tuple[np.ndarray, list[str]]:
    """Photographs of the repo, uint8 [2 * IMAGES, 3, S, S], and as many texts as are timed and calibrated on."""
    from clipfilter.images.load import load_image

    folder = REPO / "samples" / "photos"
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["file_name"].endswith(".jpg") and row["caption"]]
    pixels = []
    for row in rows:
        data = (folder / row["file_name"]).read_bytes()
        if data[:2] == b"\xff\xd8" and len(data) > 15_000 and len(pixels) < 2 * IMAGES:
            pixels.append(load_image(data, preprocess).pixels)
    captions = [row["caption"] for row in rows]
    return np.stack(pixels), [captions[number % len(captions)] for number in range(2 * TEXTS)]


def load(model: str, folder: Path, threads: int) -> Any:
    from clipfilter.models import load_encoder

    if model != "nano":
        from clipfilter.models._torch import torch_with_torchvision

        torch_with_torchvision()
        import open_clip
        from safetensors.torch import save_file

        made = open_clip.create_model(model, pretrained_text=False)
        path = folder / f"{model}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in made.state_dict().items()}, path)
        model = f"{model}={path}"
    return load_encoder(model, threads=threads)


def fastest(kinds: dict[str, Callable[[], np.ndarray]]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Seconds of each kind's fastest turn, and its result."""
    seconds = dict.fromkeys(kinds, float("inf"))
    results = {kind: work() for kind, work in kinds.items()}  # warms up
    for _ in range(TURNS):
        for kind, work in kinds.items():
            started = time.perf_counter()
            work()
            seconds[kind] = min(seconds[kind], time.perf_counter() - started)
    return seconds, results


def measure(model: str, threads: int) -> list[dict[str, Any]]:
    from clipfilter.models.onnx import load_onnx
    from clipfilter.models.onnx_export import Calibration, export_onnx

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = load(model, folder, threads)
        pixels, texts = samples(encoder.preprocess)
        none = {"images": {"n": 0, "mean": 1.0, "min": 1.0}, "texts": None, "policy": None}
        calibration = Calibration(pixels[IMAGES:], texts[TEXTS:])
        export_onnx(encoder, folder / "fp32")
        report = export_onnx(encoder, folder / "int8", int8=True, calibration=calibration, judge=lambda a, b: none)
        encoders = {"torch fp32": encoder}
        for kind in ("fp32", "int8"):
            encoders[f"onnx {kind}"] = load_onnx(f"onnx:{folder / kind}", device="cpu", dtype="fp32", threads=threads)
        rows = []
        for what, items in (("image", pixels[:IMAGES]), ("text", texts[:TEXTS])):
            kinds: dict[str, Callable[[], np.ndarray]] = {
                kind: lambda one=one, what=what, items=items: getattr(one, f"encode_{what}s")(items)
                for kind, one in encoders.items()
            }
            seconds, results = fastest(kinds)
            for kind in kinds:
                cosines = (results[kind].astype(np.float64) * results["torch fp32"]).sum(1)
                rows.append({
                    "model": model, "tower": what, "kind": kind, "per_second": round(len(items) / seconds[kind], 1),
                    "times_torch": round(seconds["torch fp32"] / seconds[kind], 2),
                    "cosine_mean": round(float(cosines.mean()), 5), "cosine_min": round(float(cosines.min()), 5),
                    "int8_tower": report.config["quantisation"]["towers"][what],
                })  # fmt: skip
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ViT-B-32,nano")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    vnni = "with" if "vnni" in flags else "without"
    print(f"{given.threads} threads, a CPU {vnni} VNNI\n")
    print(
        "| model | tower | kind | per second | times torch | cosine mean | min |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    rows = []
    for model in given.models.split(","):
        for row in measure(model, given.threads):
            stays = " (tower stays fp32)" if row["kind"] == "onnx int8" and row["int8_tower"] != "int8" else ""
            print(
                f"| {row['model']} | {row['tower']} | {row['kind']}{stays} | {row['per_second']} | {row['times_torch']} "
                f"| {row['cosine_mean']} | {row['cosine_min']} |",
                flush=True,
            )
            rows.append(row)
    if given.json:
        given.json.write_text(json.dumps({"threads": given.threads, "vnni": vnni == "with", "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
