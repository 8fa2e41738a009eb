"""Exact and approximate search beside the bare matrix product and faiss's flat index, in one run.

    python benchmarks/search.py                              # a million rows; about six minutes, 5 GB of disk, 6 GB of memory
    python benchmarks/search.py --rows 200000 --work /tmp/w  # smaller; keeps what it makes, and uses it the next time

The rows are the real embeddings (nano) of Flickr8k and Caltech101 below CLIPFILTER_SHARED (or ../shared), each repeated with
seeded Gaussian noise and renormalised, so that two copies of a photo are as near to each other as a photo of Flickr8k's
training split is to its nearest other photo. Queries are captions of Flickr8k and noisy photos. What takes turns is timed in
the same minute. Nothing of the index was chosen on Caltech101 or on Flickr8k's dev split.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

REPO = Path(__file__).parents[1]
SHARED = Path(os.environ.get("CLIPFILTER_SHARED", REPO.parent / "shared")) / "data"
SHARD = 10_000
TEXTS, IMAGES = 300, 100
TURNS = 15
SMALL = 100_000
K = 10


def embedded(work: Path) -> list[Path]:
    """The two datasets as runs, embedded unless they are there."""
    runs = []
    for name, source in (
        ("flickr8k", SHARED / "flickr8k"),
        ("caltech101", SHARED / "caltech101" / "caltech101.parquet"),
    ):
        run = work / name
        if not (run / "versions").is_dir():
            subprocess.run(
                [sys.executable, "-m", "clipfilter", "embed", str(source), "--out", str(run), "-q"],
                check=True,
                cwd=REPO,
            )
        runs.append(run)
    return runs


def real(runs: list[Path]) -> tuple[np.ndarray, np.ndarray, float]:
    """float32 image vectors [n, d], caption vectors of Flickr8k [m, d], and the noise's norm."""
    from clipfilter.runs import as_matrix
    from clipfilter.search import RunVectors

    images = []
    for run in runs:
        with RunVectors.open(str(run)) as vectors:
            images.append(np.concatenate([block for _, block in vectors.blocks()]).astype(np.float32))
            if run.name == "flickr8k":
                files = [Path(run, shard.embeddings.name) for shard in vectors.shards]
                texts = [as_matrix(pa.ipc.open_file(f).read_all()["text_emb"], vectors.dim) for f in files]
    train = images[0][:6000]
    cosines = train @ train.T
    np.fill_diagonal(cosines, -1)
    nearest = float(np.median(cosines.max(axis=1)))
    return np.concatenate(images), np.concatenate(texts).astype(np.float32), float(np.sqrt(1 / nearest - 1))


def noisy(base: np.ndarray, noise: float, rows: int, seed: int) -> Iterator[np.ndarray]:
    """float16 [SHARD, d] at a time, unit norm."""
    rng = np.random.default_rng(seed)
    for start in range(0, rows, SHARD):
        picked = base[np.arange(start, min(start + SHARD, rows)) % len(base)]
        moved = picked + rng.standard_normal(picked.shape, dtype=np.float32) * (noise / np.sqrt(picked.shape[1]))
        yield (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float16)


def write_run(template: Path, out: Path, shards: Iterator[np.ndarray], first: int = 0) -> None:
    """A run directory (or its next version) whose shards hold these vectors."""
    from clipfilter.runs import Account, Counts, ShardWriter, Version, ledger
    from clipfilter.sources import Shard
    from clipfilter.storage import Directory

    out.mkdir(parents=True, exist_ok=True)
    (out / "plan.json").write_bytes((template / "plan.json").read_bytes())
    with Directory(str(out)) as directory:
        newest = ledger.newest_version(directory)
        names = list(newest.commits) if newest else []
        for number, vectors in enumerate(shards, first):
            shard, n, d = f"{number:016x}", *vectors.shape
            keys = pa.array([f"{number:05d}{row:05d}" for row in range(n)])
            ids = {"cf_shard": pa.array([shard] * n), "cf_row": pa.array(np.arange(n), pa.int64()), "cf_uid": keys}
            flat = pa.Array.from_buffers(pa.float16(), n * d, [None, pa.py_buffer(vectors)])
            with ShardWriter(directory, Shard(shard, f"{number}.tar", "tar"), None) as writer:
                writer.embeddings(pa.table({**ids, "image_emb": pa.FixedSizeListArray.from_arrays(flat, d)}))
                undecided = {"cf_key": keys, "cf_caption": keys, "cf_decision": pa.nulls(n, pa.string())}
                writer.annotated(pa.table({**ids, **undecided}), final=True)
                commit, _ = writer.commit(Account(Counts(rows=n, failed=0, embedded=n), {}), stage="embedded", plan="")
            names.append(commit.name)
        ledger.write_version(directory, Version.of("", "embedded", ledger.commits(directory, names), []))


def timed(work: dict[str, Callable[[], Any]], turns: int = TURNS) -> dict[str, tuple[float, float]]:
    """(median, fastest) milliseconds of each, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(turns + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            if turn:  # the first one warms up
                taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: (float(np.median(times)), min(times)) for name, times in taken.items()}


def measure_exact(run: Path) -> dict[str, Any]:
    """Exact search of SMALL rows beside the bare product of the same rows in memory."""
    import faiss
    import torch

    from clipfilter.search import RunVectors, top_k

    with RunVectors.open(str(run)) as vectors:
        store = np.concatenate([block for _, block in vectors.blocks()]).astype(np.float32)
        query = store[12_345].copy()
        flat = faiss.IndexFlatIP(vectors.dim)
        flat.add(store)
        tensor, query_tensor = torch.from_numpy(store), torch.from_numpy(query)
        work: dict[str, Callable[[], Any]] = {
            "bare product, numpy": lambda: store @ query,
            "bare product, torch": lambda: tensor @ query_tensor,
            "exact search": lambda: top_k(vectors, query, K),
            "faiss flat": lambda: flat.search(query[None], K),
        }
        times = timed(work)
        same = np.array_equal(np.sort(work["exact search"]()[0]), np.sort(work["faiss flat"]()[1][0]))
    bare = min(times[name][0] for name in ("bare product, numpy", "bare product, torch"))
    fastest = min(times[name][1] for name in ("bare product, numpy", "bare product, torch"))
    return {
        "rows": vectors.rows, "dim": vectors.dim, "milliseconds": times, "agrees_with_faiss": bool(same),
        "ratio_of_medians": times["exact search"][0] / bare, "ratio_of_fastest": times["exact search"][1] / fastest,
    }  # fmt: skip


def truth(vectors: Any, queries: np.ndarray) -> np.ndarray:
    """int64 [q, K]: the exact nearest rows of many queries at once."""
    best = np.full((len(queries), K), -2.0, np.float32)
    found = np.zeros((len(queries), K), np.int64)
    for start, block in vectors.blocks():
        scores = queries @ block.astype(np.float32).T
        top = np.argpartition(-scores, K, axis=1)[:, :K]
        best = np.concatenate([best, np.take_along_axis(scores, top, 1)], axis=1)
        found = np.concatenate([found, top + start], axis=1)
        order = np.argsort(-best, axis=1)[:, :K]
        best, found = np.take_along_axis(best, order, 1), np.take_along_axis(found, order, 1)
    return found


def anonymous_mib() -> float:
    """Memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def measure_approximate(template: Path, run: Path, queries: dict[str, np.ndarray], more: np.ndarray) -> dict[str, Any]:
    """Build, load, query and extend the index of a large run."""
    from clipfilter.search import RunVectors, build_index, top_k
    from clipfilter.search.approximate import ApproximateIndex

    start = time.perf_counter()
    made = build_index(str(run))
    result: dict[str, Any] = {
        "rows": made.rows, "lists": made.lists, "index_bytes": made.bytes,
        "build_seconds": time.perf_counter() - start if made.segments_new == made.segments else None,
    }  # fmt: skip
    with RunVectors.open(str(run)) as vectors:
        exact = {kind: truth(vectors, some) for kind, some in queries.items()}
        before, start = anonymous_mib(), time.perf_counter()
        index = ApproximateIndex.open(vectors, str(run / "index"))
        assert index is not None
        result |= {"load_seconds": time.perf_counter() - start, "memory_mib": anonymous_mib() - before}
        for probes in (index.manifest.lists // 64, index.manifest.lists // 32, None, index.manifest.lists // 8):
            name = "default" if probes is None else str(probes)
            result[f"probes {name}"] = entry = {}
            for kind, some in queries.items():
                taken, hits = [], 0
                for query, nearest in zip(some, exact[kind], strict=True):
                    began = time.perf_counter()
                    positions = index.top_k(query, K, probes=probes)[0]
                    taken.append((time.perf_counter() - began) * 1e3)
                    hits += len(np.intersect1d(positions, nearest))
                entry[kind] = {
                    "recall": hits / (K * len(some)),
                    "median_ms": float(np.median(taken)), "p95_ms": float(np.percentile(taken, 95)),
                }  # fmt: skip
        del index
        query = queries["caption"][0]
        result["exact_ms"] = timed({"exact": lambda: top_k(vectors, query, K)}, 5)["exact"][0]
    write_run(template, run, iter([more]), first=len(vectors.shards))
    start = time.perf_counter()
    again = build_index(str(run))
    result |= {"update_seconds": time.perf_counter() - start, "update_shards": again.segments_new}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--work", type=Path, help="folder for runs; what is in it is used again")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="search-") as temporary:
        work = given.work or Path(temporary)
        results = measure(work, given.rows)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


def measure(work: Path, rows: int) -> dict[str, Any]:
    runs = embedded(work)
    base, captions, noise = real(runs)
    for name, count in (("small", SMALL), ("large", rows)):
        if not (work / name / "versions").is_dir():
            write_run(runs[0], work / name, noisy(base, noise, count, seed=1))
    texts = captions[np.linspace(0, len(captions) - 1, TEXTS).astype(int)]
    images = next(noisy(base, noise, SHARD, seed=2))[:: SHARD // IMAGES].astype(np.float32)
    more = next(noisy(base, noise, SHARD, seed=3))
    cores = len(os.sched_getaffinity(0))
    return {
        "cores": cores, "threads": os.environ.get("OMP_NUM_THREADS", str(cores)), "load": os.getloadavg()[0],
        "photos": len(base), "noise": noise, "exact": measure_exact(work / "small"),
        "approximate": measure_approximate(runs[0], work / "large", {"caption": texts, "photo": images}, more),
    }  # fmt: skip


def show(results: dict[str, Any]) -> None:
    exact, large = results["exact"], results["approximate"]
    print(
        f"{results['photos']:,} photos, noise of norm {results['noise']:.2f}, "
        f"{results['threads']} threads, load {results['load']:.1f}"
    )
    print(f"\n{exact['rows']:,} rows of {exact['dim']} numbers      median      fastest")
    for name, (median, fastest) in exact["milliseconds"].items():
        print(f"  {name:<28} {median:8.1f} ms {fastest:8.1f} ms")
    print(f"  exact search / bare product  {exact['ratio_of_medians']:8.2f}    {exact['ratio_of_fastest']:8.2f}")
    print(f"\n{large['rows']:,} rows, {large['lists']:,} lists, {large['index_bytes'] / 1e6:,.0f} MB of files")
    built = "made before" if large["build_seconds"] is None else f"{large['build_seconds']:.0f} s"
    print(f"  build {built}, load {large['load_seconds']:.1f} s, memory {large['memory_mib']:,.0f} MiB")
    print(
        f"  {large['update_shards']} more shard: {large['update_seconds']:.1f} s; exact search {large['exact_ms']:.0f} ms"
    )
    for name, entry in large.items():
        if name.startswith("probes"):
            cells = [
                f"{kind} recall@{K} {one['recall']:.4f}, median {one['median_ms']:.1f} ms, p95 {one['p95_ms']:.1f} ms"
                for kind, one in entry.items()
            ]
            print(f"  {name:<14} " + "; ".join(cells))


if __name__ == "__main__":
    main()
