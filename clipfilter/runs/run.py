"""A run on disk: how it is recognised and opened."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from clipfilter.errors import RefusedError
from clipfilter.runs import ledger
from clipfilter.runs.columns import is_decision_column
from clipfilter.runs.plan import PLAN_FILE, Plan, of_run, read_plan
from clipfilter.storage import Directory


def is_run(url: str) -> bool:
    """Whether a run directory is at this path or URL, finished or not."""
    # Whatever is wrong with a source that cannot even be asked, opening it says in a better sentence.
    with contextlib.suppress(Exception):
        return Directory(url).exists(PLAN_FILE)
    return False


def open_run(url: str) -> tuple[Directory, str, dict[str, Any], Plan]:
    """A finished run: directory, newest version's name and content, plan. A filtered run leads to the run it decided.

    Raises RefusedError when there is none.
    """
    directory = Directory(url)
    plan = read_plan(directory)
    if plan is None:
        raise RefusedError(
            f"{url} is not a run directory (it has no plan.json); give the --out of an earlier run or embed."
        )
    if of_run(plan.source):
        return open_run(plan.source["run"])
    newest = ledger.latest_version(directory)
    if newest is None:
        raise RefusedError(f"the run in {url} has not finished; repeat its command to resume it, then try again.")
    return directory, newest[0], newest[1], plan


def machine() -> dict[str, Any]:
    """Where the work was done; recorded, never compared."""
    return {"host": socket.gethostname(), "cpu": platform.machine(), "cores": len(os.sched_getaffinity(0))}


def read_stored(rows_file: Path, embeddings_file: Path) -> tuple[pa.Table, pa.Table]:
    """A shard's annotated rows without their decision, and the same rows' embeddings, memory-mapped."""
    rows = pq.read_table(rows_file)
    rows = rows.select([name for name in rows.column_names if not is_decision_column(name)])
    return rows, pa.ipc.open_file(pa.memory_map(str(embeddings_file))).read_all()


@contextlib.contextmanager
def local_files(origin: Directory, files: dict[str, Any], scratch: Path) -> Any:
    """Local paths of a commit's data files; remote ones are fetched for the duration."""
    paths: dict[str, Path] = {}
    fetched: list[Path] = []
    try:
        for kind in ("annotated", "scored", "embeddings", "failed"):
            if kind not in files:
                continue
            if origin.local:
                paths[kind] = Path(origin.path(files[kind]["name"]))
            else:
                paths[kind] = scratch / f"{threading.get_ident()}-{files[kind]['name'].rsplit('/', 1)[-1]}-{kind}"
                fetched.append(paths[kind])
                origin.fs.get_file(origin.path(files[kind]["name"]), str(paths[kind]))
        yield paths
    finally:
        for path in fetched:
            path.unlink(missing_ok=True)
