"""A run without a model that can be searched and served, and a server of it in a thread or a process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter.runs.columns import FACTS, embeddings_schema, vector_column
from clipfilter.storage import file_sha256
from tests.support.commands import fork_server
from tests.support.engine import REPO
from tests.support.report import Built, build_run

DIM = 8


def embedded_run(folder: Path, *, job: str = "run") -> Built:
    """`build_run` with embeddings beside its rows: unit vectors, the same every time."""
    built = build_run(folder, job=job)
    out = Path(built.url)
    (out / "embeddings").mkdir()
    for path in sorted((out / "commits").glob("*.json")):
        commit = json.loads(path.read_text())
        rows = pq.read_table(out / commit["files"]["annotated"]["name"], columns=["cf_shard", "cf_row", "cf_uid"])
        rng = np.random.default_rng(int(commit["shard"]["id"][:8], 16))
        vectors = rng.normal(size=(rows.num_rows, DIM))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        columns = {name: rows[name] for name in rows.column_names} | {"image_emb": vector_column(vectors)}
        columns |= {field.name: pa.nulls(rows.num_rows, field.type) for field in FACTS}
        table = pa.table(columns, schema=embeddings_schema(DIM, text=False))
        name = f"embeddings/{commit['shard']['id']}-0000.arrow"
        with pa.OSFile(str(out / name), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        commit["files"]["embeddings"] = {"name": name, "rows": rows.num_rows, "bytes": (out / name).stat().st_size}
        commit["files"]["embeddings"]["sha256"] = file_sha256(out / name)
        path.write_text(json.dumps(commit))
    return built


@dataclass
class Served:
    """A running `clipfilter serve`: address with the token, the same without, and where labels are written."""

    address: str
    base: str
    token: str
    labels: Path
    process: subprocess.Popen[str]

    def stop(self, signum: int = signal.SIGINT) -> tuple[int, str]:
        """(exit code, all that it printed besides the first lines)."""
        self.process.send_signal(signum)
        rest, _ = self.process.communicate(timeout=30)
        return self.process.returncode, rest


@contextlib.contextmanager
def served(run: str, labels: Path, *arguments: str) -> Iterator[Served]:
    """`clipfilter serve` in a process of its own, on a free port."""
    process = subprocess.Popen(
        [fork_server().python, "-m", "clipfilter", "serve", run, "--port", "0", "--labels", str(labels), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO), "PYTHONUNBUFFERED": "1", "BROWSER": "true"},
    )
    assert process.stdout is not None
    try:
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        said = "".join(lines)
        match = re.search(r"^page     ((http://[^/]+)/\?token=(\S+))$", said, re.MULTILINE)
        assert match, f"it did not start: {said}"
        yield Served(match[1], match[2], match[3], labels, process)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
