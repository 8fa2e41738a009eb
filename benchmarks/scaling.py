"""What a large dataset costs in hours, storage and requests: arithmetic from measured numbers (docs/guide/scaling.md).

python benchmarks/scaling.py              prints the tables of that page
python benchmarks/scaling.py --requests   counts the requests of a real run against an S3 server on this machine
python benchmarks/scaling.py --sizes RUN  bytes per row of the files of a run
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROWS_PER_SHARD = 10_000

# Measured here; benchmarks/README.md says on what.
CPU_PAIRS_PER_SECOND = {"nano": 53.1, "ViT-B-32": 13.3}  # two cores, 224-pixel JPEGs, `clipfilter run`
DECODE_PER_CORE = {"470x390": 763, "2 megapixels": 122}  # `load_image`, with facts and sha256
FACTS_BYTES = 98  # of an embeddings row without its vectors: 3 170 bytes per row at twice 768 float16
ANNOTATED_BYTES = 318  # zstd Parquet, captioned Flickr8k
COMMIT_BYTES = 1_400
COMMIT_MEMORY = 7_200  # of a parsed commit in the driver
READS_PER_SHARD, WRITES_PER_SHARD = 16, 5  # GET and HEAD; PUT. Of a run that keeps images, with small shards
UPLOAD_PART = 50_000_000  # bytes; a larger kept shard is uploaded in parts, one PUT each and two requests more
DECIDED_PER_CORE = 33_000  # rows of one CPU second, four rules; the slowest of four passes
DIMENSIONS = {"ViT-B-32": 512, "ViT-L-14": 768}

# Published by others for other software, on hardware we have not had: clip-retrieval on an A100.
PEER_GPU_IMAGES_PER_SECOND = {"ViT-B-32": 2_500, "ViT-L-14": 312}


@dataclass(frozen=True)
class Cost:
    """What one pass over a dataset takes. Bytes are without the kept copies; requests are those of an object store."""

    images: int
    shards: int
    gpu_hours: float
    decode_cores_per_gpu: float
    embedding_bytes: int
    annotated_bytes: int
    commit_bytes: int
    driver_memory: int
    reads: int
    writes: int
    decide_core_hours: float


def cost(images: int, model: str, pixels: str = "470x390", captions: bool = True, kept_bytes: int = 18_000) -> Cost:
    """The cost of `clipfilter run` with one GPU's published rate for the model; linear in the images.

    kept_bytes: bytes of kept images, per image of the source (60 kB, three in ten kept).
    """
    shards = -(-images // ROWS_PER_SHARD)
    rate = PEER_GPU_IMAGES_PER_SECOND[model]
    parts = -(-ROWS_PER_SHARD * kept_bytes // UPLOAD_PART)
    vectors = 2 * DIMENSIONS[model] * (2 if captions else 1)
    return Cost(
        images=images,
        shards=shards,
        gpu_hours=images / rate / 3600,
        decode_cores_per_gpu=rate / DECODE_PER_CORE[pixels],
        embedding_bytes=images * (vectors + FACTS_BYTES),
        annotated_bytes=images * ANNOTATED_BYTES,
        commit_bytes=shards * COMMIT_BYTES,
        driver_memory=shards * COMMIT_MEMORY,
        reads=shards * READS_PER_SHARD,
        writes=shards * (WRITES_PER_SHARD + (parts + 1 if parts > 1 else 0)),
        decide_core_hours=images / DECIDED_PER_CORE / 3600,
    )


def tables() -> str:
    """The tables of docs/guide/scaling.md, in Markdown."""
    lines = [
        "| images | model | GPU hours | on 64 GPUs | embeddings | annotated rows | shards | requests (read + write) |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for images, name in ((100_000_000, "100 million"), (5_000_000_000, "5 billion")):
        for model in DIMENSIONS:
            c = cost(images, model)
            lines.append(
                f"| {name} | {model} | {c.gpu_hours:,.0f} | {_hours(c.gpu_hours / 64)} | {_bytes(c.embedding_bytes)} | "
                f"{_bytes(c.annotated_bytes)} | {c.shards:,} | {c.reads / 1000:,.0f} k + {c.writes / 1000:,.0f} k |"
            )
    lines += [
        "",
        "| model on one GPU | images/s (theirs) | cores to decode 470x390 | cores to decode 2 megapixels | reads |",
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for model, rate in PEER_GPU_IMAGES_PER_SECOND.items():
        small, large = (cost(1, model, pixels).decode_cores_per_gpu for pixels in DECODE_PER_CORE)
        lines.append(
            f"| {model} | {rate:,} | {small:.1f} | {large:.1f} | {rate * 60_000 / 1e6:,.0f} MB/s at 60 kB an image |"
        )
    lines += ["", "| images | two CPU cores, nano | two CPU cores, ViT-B-32 |", "| --- | --- | --- |"]
    for images, name in ((1_000_000, "1 million"), (100_000_000, "100 million")):
        hours = [_hours(images / rate / 3600) for rate in CPU_PAIRS_PER_SECOND.values()]
        lines.append(f"| {name} | {hours[0]} | {hours[1]} |")
    lines += [
        "",
        "| images | commits on disk | commits in the driver | ranked scores, per rule |",
        "| --- | --- | --- | --- |",
    ]
    for images, name in ((100_000_000, "100 million"), (5_000_000_000, "5 billion")):
        c = cost(images, "ViT-L-14")
        lines.append(
            f"| {name} | {c.decide_core_hours:.1f} | {_bytes(c.commit_bytes)} | {_bytes(c.driver_memory)} | "
            f"{_bytes(4 * images)} |"
        )
    return "\n".join(lines)


def _hours(hours: float) -> str:
    return f"{hours:,.0f} h" if hours >= 10 else f"{hours:.1f} h"


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def sizes(run: Path) -> dict[str, float]:
    """Bytes per row of each kind of file in a run, and of its commits."""
    total: Counter[str] = Counter()
    rows: Counter[str] = Counter()
    commits = sorted((run / "commits").glob("*.json"))
    for path in commits:
        for kind, entry in json.loads(path.read_text())["files"].items():
            total[kind] += entry["bytes"]
            rows[kind] += entry["rows"]
    found = {kind: total[kind] / rows[kind] for kind in total}
    return found | {"commit": sum(path.stat().st_size for path in commits) / len(commits)}


def requests() -> dict[str, Counter[str]]:
    """Requests by method of two real runs, 2 and 6 shards of 12 small images, and their difference per shard."""
    import s3fs
    from PIL import Image
    from webdataset import TarWriter

    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = open(Path(folder, "requests.log"), "w+")  # noqa: SIM115
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=subprocess.STDOUT
        )
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            _wait(environment["AWS_ENDPOINT_URL"])
            store = s3fs.S3FileSystem(key="x", secret="x", endpoint_url=environment["AWS_ENDPOINT_URL"])
            counted = {}
            for shards in (2, 6):
                for bucket in (f"data-{shards}", f"data-{shards}-out"):
                    store.mkdir(bucket)
                for number in range(shards):
                    path = Path(folder, f"{number:05d}.tar")
                    with TarWriter(str(path)) as tar:
                        for row in range(12):
                            picture = io.BytesIO()
                            Image.new("RGB", (64, 64), (number * 20, row * 20, 90)).save(picture, "JPEG")
                            tar.write(
                                {"__key__": f"{number:02d}{row:03d}", "jpg": picture.getvalue(), "txt": "a colour"}
                            )
                    store.put_file(str(path), f"data-{shards}/{path.name}")
                log.flush()
                before = Path(log.name).stat().st_size
                subprocess.run(
                    [sys.executable, "-m", "clipfilter", "run", f"s3://data-{shards}", "--policy", "caption-match", "--out",
                     f"s3://data-{shards}-out/run", "-q", "--engine", "local"],
                    env=os.environ | environment, check=True,
                )  # fmt: skip
                text = Path(log.name).read_text()[before:]
                counted[f"{shards} shards"] = Counter(re.findall(r'"(GET|PUT|HEAD|POST|DELETE) /', text))
        finally:
            server.terminate()
            server.wait()
            log.close()
    small, large = counted.values()
    counted["per shard"] = Counter({name: (large[name] - small[name]) / 4 for name in large})  # type: ignore[dict-item]
    return counted


def decide(run: str, policy: str) -> float:
    """Rows per CPU second of one core: stored rows read, decided and written as Parquet to a temporary file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clipfilter.engine.job import stored_model
    from clipfilter.engine.worker import compile_for
    from clipfilter.models import load_encoder
    from clipfilter.policies import load_policy
    from clipfilter.runs import Run, annotate
    from clipfilter.sources import Source

    pa.set_cpu_count(1)
    origin = Run(run).origin()
    plan = origin.plan
    encoder = load_encoder(stored_model(plan), threads=1)
    compiled = compile_for(Source.from_plan(plan.source), load_policy(policy), encoder, plan.options["decode"])
    rows, began = 0, time.process_time()
    with origin.directory:
        for shard in origin.shards():
            decided = annotate(shard.rows, shard.embeddings, encoder, compiled, {})
            with tempfile.NamedTemporaryFile() as file:
                pq.write_table(decided, file.name, compression="zstd")
            rows += decided.num_rows
        seconds = time.process_time() - began
    return rows / seconds


def _wait(url: str) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise RuntimeError("the S3 server did not start")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", action="store_true")
    parser.add_argument("--sizes", type=Path)
    parser.add_argument("--decide", nargs=2, metavar=("RUN", "POLICY"))
    given = parser.parse_args()
    if given.requests:
        for name, counts in requests().items():
            print(f"{name:<12} " + ", ".join(f"{method} {count:g}" for method, count in sorted(counts.items())))
    elif given.sizes:
        for kind, size in sizes(given.sizes).items():
            print(f"{kind:<12} {size:,.0f} bytes")
    elif given.decide:
        print(f"{decide(*given.decide):,.0f} rows per CPU second")
    else:
        print(tables())
