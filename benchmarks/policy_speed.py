"""Re-deciding stored embeddings: a policy of 50 concepts, 3 heads and alignment against the bare matrix product.

    python benchmarks/policy_speed.py                  # 1 000 000 rows of 512 numbers
    python benchmarks/policy_speed.py --rows 200000

Both read the same memory-mapped Arrow file of float16 embeddings (image and text), one thread each. The heads are LAION's
aesthetic v1 and NSFW and the violence head for ViT-B-32 where CLIPFILTER_HEADS (or ../shared/heads) has them, else random
ones of the same shapes.

bare   : every block of 1 024 rows to float32, then one float32 matrix product with all columns of the policy (phrases and
         heads) and the row-wise product with the text embeddings; the result is thrown away.
policy : `CompiledPolicy.score` and `decide`, shard by shard: scores, float64 rechecks, decisions and reasons of every row.

The model is a stand-in that turns words into random unit vectors: the speed does not depend on what they mean. Images are
mixtures of those vectors and noise, so that bands fire for some rows and not for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from threadpoolctl import threadpool_limits

from clipfilter.models.heads.file import HeadFile
from clipfilter.policies import CompiledPolicy, compile_policy, parse_policy
from clipfilter.runs.columns import as_matrix, embeddings_schema, vector_column

SHARED = Path(os.environ.get("CLIPFILTER_SHARED", Path(__file__).parents[2] / "shared"))
DIM = 512
SHARD = 10_000
BLOCK = 1024


class WordEncoder:
    """A text encoder whose vectors are random, the same for the same words."""

    name = "words"
    dim = DIM
    logit_scale = 20.0
    logit_bias = None
    score_kind: Literal["softmax"] = "softmax"
    fingerprint: dict[str, Any] = {  # noqa: RUF012
        "model": "ViT-B-32/openai",
        "weights_sha256": "0" * 64,
        "preprocess": {},
        "dim": DIM,
    }

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, DIM], unit norm."""
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
        rows = np.stack([np.random.default_rng(seed).standard_normal(DIM, dtype=np.float32) for seed in seeds])
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def count_truncated(self, texts: Sequence[str]) -> int:
        """None are."""
        return 0


def heads(folder: Path, draw: np.random.Generator) -> list[str]:
    """Names of two linear heads and one of three layers."""
    published = Path(os.environ.setdefault("CLIPFILTER_HEADS", str(SHARED / "heads")))
    if published.is_dir():
        return ["laion-aesthetic-v1", "violence", "laion-nsfw"]
    paths = []
    for number, widths in enumerate([(1,), (1,), (32, 32, 1)]):
        tensors, before = {}, DIM
        for layer, width in enumerate(widths):
            tensors[f"layers.{layer}.weight"] = draw.standard_normal((width, before)).astype(np.float32) / before**0.5
            tensors[f"layers.{layer}.bias"] = np.zeros(width, np.float32)
            before = width
        curved = len(widths) > 1
        metadata = {
            "clipfilter_head": "1", "kind": "layers", "model": "ViT-B-32/openai", "dim": str(DIM),
            "layers": ",".join(map(str, widths)),
            "activation": "relu" if curved else "none", "final": "sigmoid" if curved else "none",
        }  # fmt: skip
        paths.append(folder / f"head-{number}.safetensors")
        HeadFile(tensors, metadata).write(paths[-1])
    return [f"file:{path}" for path in paths]


def make_policy(heads: list[str]) -> str:
    """50 concepts of 5 positives and 4 near misses, 3 heads and alignment."""
    rules: list[dict[str, Any]] = [
        {
            "id": f"concept-{i}",
            "concept": {
                "any_of": [f"thing {i} {j}" for j in range(5)],
                "but_not": [f"near miss {i} {j}" for j in range(4)],
            },
            "review": {"above": 0.8},
            "reject": {"above": 0.95},
        }
        for i in range(50)
    ]
    rules += [
        {"id": f"head-{i}", "head": name, "reject": {"above": 6.0 if i == 0 else 0.9}} for i, name in enumerate(heads)
    ]
    rules.append({"id": "off-caption", "alignment": {}, "reject": {"below": 0.3}})
    return json.dumps({"policy": "speed", "version": 1, "templates": ["{}"], "rules": rules})


def write_embeddings(path: Path, rows: int, phrases: np.ndarray, draw: np.random.Generator) -> None:
    """A file as a run stores it; of every hundred images one resembles a phrase."""
    schema = pa.schema([field for field in embeddings_schema(DIM, True) if field.name in ("image_emb", "text_emb")])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, rows, SHARD):
            n = min(SHARD, rows - start)
            image = draw.standard_normal((n, DIM), dtype=np.float32) / DIM**0.5
            like = draw.random(n) < 0.01
            image[like] += 0.35 * phrases[draw.integers(0, len(phrases), int(like.sum()))]
            text = image + 2 * draw.standard_normal((n, DIM), dtype=np.float32) / DIM**0.5
            columns = [
                vector_column((part / np.linalg.norm(part, axis=1, keepdims=True)).astype(np.float16))
                for part in (image, text)
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def shards(path: Path) -> Any:
    """(image, text) of every shard, float16 [n, DIM], memory-mapped."""
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            yield as_matrix(batch["image_emb"], DIM), as_matrix(batch["text_emb"], DIM)


def bare(path: Path, matrix: np.ndarray) -> float:
    """Seconds of upcasting and multiplying alone."""
    import torch

    image_block, text_block = np.zeros((BLOCK, DIM), np.float32), np.zeros((BLOCK, DIM), np.float32)
    product = np.empty((len(matrix), BLOCK), np.float32)
    started = time.perf_counter()
    with threadpool_limits(1):
        for image, text in shards(path):
            for start in range(0, len(image), BLOCK):
                for half, block in ((image, image_block), (text, text_block)):
                    part = np.require(half[start : start + BLOCK], requirements=["C", "W"])
                    torch.from_numpy(block)[: len(part)].copy_(torch.from_numpy(part))
                np.matmul(matrix, image_block.T, out=product)
                np.vecdot(image_block, text_block)
    return time.perf_counter() - started


def decided(path: Path, compiled: CompiledPolicy) -> tuple[float, dict[str, int]]:
    """Seconds of scoring and deciding, and how many rows of each decision."""
    totals = {"keep": 0, "review": 0, "reject": 0}
    started = time.perf_counter()
    for image, text in shards(path):
        columns = pa.table({"cf_width": pa.nulls(len(image), pa.int32())})
        found = compiled.decide(compiled.score(image, text, None, columns), {})
        for name, count in found.totals().items():
            totals[name] += count
    return time.perf_counter() - started, totals


def memory() -> float:
    """Resident memory of this process in MiB that no file backs."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


def main() -> None:
    """Measure bare, policy, bare; print the ratio of speeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    draw = np.random.default_rng(0)
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="clipfilter-benchmark-") as name:
        folder = Path(name)
        compiled = compile_policy(parse_policy(make_policy(heads(folder, draw))), WordEncoder())
        matrix = np.ascontiguousarray(compiled.matrix.T)
        path = folder / "embeddings.arrow"
        write_embeddings(path, options.rows, matrix[: len(compiled.scorer.plans[0][0].labels)], draw)
        small = folder / "small.arrow"
        write_embeddings(small, 5 * SHARD, matrix[: len(compiled.scorer.plans[0][0].labels)], draw)
        decided(small, compiled)
        bare(small, matrix)
        small_peak = memory()
        print(f"{options.rows:,} rows of {DIM}, {len(matrix)} columns, {path.stat().st_size / 2**20:,.0f} MiB")
        before = bare(path, matrix)
        seconds, totals = decided(path, compiled)
        all_peak = memory()
        after = bare(path, matrix)
        mean = (before + after) / 2
        print(f"bare product   {before:6.2f} s and {after:6.2f} s   {options.rows / mean:,.0f} rows/s")
        print(f"policy         {seconds:6.2f} s              {options.rows / seconds:,.0f} rows/s   {totals}")
        print(f"ratio of speeds {mean / seconds:.2f} (goal 0.70)")
        print(
            f"memory {small_peak:,.0f} MiB after {5 * SHARD:,} rows, {all_peak:,.0f} MiB after all (the mapped file apart)"
        )


if __name__ == "__main__":
    main()
