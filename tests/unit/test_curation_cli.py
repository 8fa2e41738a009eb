"""`clipfilter curate`, `import` and `forget` as commands: what they print, as text and JSON, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from clipfilter.cli.main import add_commands
from clipfilter.cli.pipeline_config import load_config
from clipfilter.errors import RefusedError
from clipfilter.policies import load_policy
from tests.support.engine import REPO
from tests.support.sources import write_webdataset


def run(*arguments: str) -> str:
    """What `clipfilter ARGUMENTS` prints; exceptions come through."""
    app = typer.Typer()
    add_commands(app)
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_metadata_to_subset_to_tars(tmp_path: Path) -> None:
    uids = [f"{n:032x}" for n in range(8)]
    scores = np.linspace(0.1, 0.38, 8, dtype=np.float32)
    (tmp_path / "metadata").mkdir()
    table = pa.table({"uid": uids, "clip_l14_similarity_score": scores})
    pq.write_table(table, tmp_path / "metadata/0.parquet")
    rows = [{"__key__": str(n), "jpg": b"image", "json": {"uid": uid}} for n, uid in enumerate(uids)]
    write_webdataset(tmp_path / "tars/00000000.tar", rows)
    subset, out = str(tmp_path / "subset.npy"), str(tmp_path / "out")
    metadata = str(tmp_path / "metadata")
    assert run("curate", "datacomp", metadata, "--baseline", "clip-score", "--out", subset).startswith("3 of 8 uids")
    found = json.loads(
        run("curate", "datacomp", metadata, "--baseline", "clip-score", "--fraction", "0.5", "-o", subset, "--json")
    )
    assert found == {"out": subset, "rows": 8, "kept": 5}  # int(8 * 0.5) + 1
    shown = run("curate", "reshard", str(tmp_path / "tars"), "--subset", subset, "--out", out, "--rows-per-shard", "3")
    assert shown.startswith("5 of 8 rows in 2 tars")
    again = ("curate", "reshard", str(tmp_path / "tars"), "--subset", subset, "--out", out, "--rows-per-shard", "3")
    assert json.loads(run(*again, "--json")) == {"read": 8, "written": 5, "tars": 2, "problems": []}
    with pytest.raises(RefusedError, match="must end with"):
        run("curate", "datacomp", metadata, "--baseline", "clip-score", "--out", str(tmp_path / "subset.txt"))


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    nothing = str(tmp_path / "nothing")
    (tmp_path / "uids.txt").write_text("abc")
    (tmp_path / "entries.txt").write_text("dog")
    for arguments in (
        ("curate", "dedup", nothing, "--out", str(tmp_path / "a")),
        ("curate", "score", nothing, "--negclip", "--out", str(tmp_path / "a")),
        ("curate", "balance", nothing, "--entries", str(tmp_path / "entries.txt"), "--out", str(tmp_path / "a")),
        ("forget", nothing, "--uids", str(tmp_path / "uids.txt")),
    ):
        with pytest.raises(RefusedError, match="run"):
            run(*arguments)
    assert not (tmp_path / "a").exists()


def test_the_config_of_the_pipeline_loads_with_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("curate_pipeline", REPO / "pipelines" / "curate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(REPO)
    # The names of the annotations are looked up in the module when it is not imported by name.
    module.CurateConfig.model_rebuild(_types_namespace=vars(module))
    config = load_config("pipelines/curate.yaml", module.CurateConfig)
    assert load_policy(config.policy).rules[0].id == "duplicate"
    assert (config.dedup.near, config.dedup.semantic, config.export.form) == (4, None, "source")
