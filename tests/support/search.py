"""Small runs made of given vectors, written through the ledger as a job writes them; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter.runs import ledger
from clipfilter.runs.plan import Plan
from clipfilter.runs.writer import HASH_LENGTH
from clipfilter.sources import Shard
from clipfilter.storage import Directory, file_sha256
from tests.support.runs import commit_of, version_of

MODEL = {"model": "test", "architecture": "none", "weights_sha256": "a" * 64, "preprocess": {}}


def unit(rows: int, dim: int = 32, seed: int = 0, groups: int = 40) -> np.ndarray:
    """float16 [rows, dim], unit norm, in loose groups, as embeddings are."""
    centres = np.random.default_rng(12345).standard_normal((groups, dim))
    rng = np.random.default_rng(seed)
    found = centres[rng.integers(0, groups, rows)] + 0.6 * rng.standard_normal((rows, dim))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float16)


def write_run(
    out: Path,
    shards: dict[int, np.ndarray],
    *,
    generation: int = 1,
    model: dict[str, Any] = MODEL,
    columns: dict[str, list[Any]] | None = None,
) -> Path:
    """A run whose newest version is its previous one with these shards added or, by number, replaced.

    columns: further annotated columns, of the whole of each shard's length. A shard's rows have the keys `NUMBER-ROW`.
    """
    directory = Directory(str(out))
    plan = Plan("embed", {"url": "nowhere", "kind": "folder"}, None, None, model, {"decode": "fast"}, False)
    directory.create("plan.json", plan.to_bytes())
    newest = ledger.newest_version(directory)
    commits = {name[8:24]: name for name in newest.commits} if newest else {}
    for number, vectors in shards.items():
        shard, rows = f"{number:016x}", len(vectors)
        keys = [f"{number}-{row}" for row in range(rows)]
        identity = {
            "cf_shard": pa.array([shard] * rows, pa.string()),
            "cf_row": pa.array(range(rows), pa.int64()),
            "cf_uid": pa.array([f"uid-{key}" for key in keys], pa.string()),
        }
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float16())
        embeddings = pa.table({**identity, "image_emb": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])})
        annotated = pa.table(
            {
                **identity,
                "cf_key": keys,
                "cf_caption": [f"caption {key}" for key in keys],
                "cf_decision": pa.nulls(rows, pa.string()),
                **{name: values[:rows] for name, values in (columns or {}).items()},
            }
        )
        path = directory.scratch() / "new"
        with pa.OSFile(str(path), "wb") as handle, pa.ipc.new_file(handle, embeddings.schema) as writer:
            writer.write_table(embeddings, max_chunksize=1000)
        files = {"embeddings": _publish(directory, path, f"embeddings/{shard}", ".arrow", rows)}
        pq.write_table(annotated, path, row_group_size=700)
        files["annotated"] = _publish(directory, path, f"annotated/{shard}", ".parquet", rows)
        counts = {"rows": rows, "failed": 0, "embedded": rows}
        commit = commit_of(Shard(shard, f"{number}.tar", "tar"), generation=generation, counts=counts, files=files)
        ledger.write_commit(directory, commit)
        commits[shard] = commit.name
    names = [commits[shard] for shard in sorted(commits)]
    ledger.write_version(directory, version_of(list(ledger.commits(directory, names))))
    directory.clean_scratch(stale_only=False)
    return out


def _publish(directory: Directory, path: Path, stem: str, extension: str, rows: int) -> dict[str, Any]:
    sha256 = file_sha256(path)
    name = f"{stem}-{sha256[:HASH_LENGTH]}{extension}"
    size = path.stat().st_size
    directory.publish(path, name)
    return {"name": name, "rows": rows, "bytes": size, "sha256": sha256}
