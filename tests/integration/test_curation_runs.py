"""Curation on real runs: planted duplicates, scores and balancing as columns that policies use."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipfilter.curation.curate import add_balance, add_scores
from clipfilter.curation.dedup import DedupOptions, find_duplicates
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.errors import RefusedError
from clipfilter.operations.compare import compare_policies
from clipfilter.operations.verify import verify_run
from clipfilter.policies import parse_policy
from clipfilter.runs import Run
from clipfilter.storage import Directory
from tests.support.commands import command
from tests.support.engine import REPO, photos, policy_file
from tests.support.sources import write_webdataset

pytestmark = pytest.mark.integration

POLICY = """
policy: no-duplicates
version: 1
rules:
  - {id: duplicate, metadata: cf_duplicate, reject: {above: 0.5}}
"""


def recompressed(data: bytes, quality: int, scale: float) -> bytes:
    image = Image.open(io.BytesIO(data))
    buffer = io.BytesIO()
    size = (round(image.width * scale), round(image.height * scale))
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def planted() -> list[dict[str, Any]]:
    """40 photographs, 10 exact copies, 10 recompressed and 10 resized ones; `of` names the original."""
    # Two of the photographs are altered versions of others.
    some = [photo for photo in photos() if photo[0] not in ("coffee_small", "dark")][:40]
    rows = [{"name": name, "jpg": data, "txt": text, "of": None} for name, data, text in some]
    for number in range(10):
        name, data, text = some[number]
        rows.append({"name": f"{name}-copy", "jpg": data, "txt": text, "of": name})
        name, data, text = some[number + 10]
        rows.append({"name": f"{name}-q", "jpg": recompressed(data, 40, 1.0), "txt": text, "of": name})
        name, data, text = some[number + 20]
        rows.append({"name": f"{name}-s", "jpg": recompressed(data, 80, 0.6), "txt": text, "of": name})
    return rows


def write(folder: Path, rows: list[dict[str, Any]], shards: int) -> Path:
    """Rows in tars; the uid is in the json, so it does not depend on where a row lies."""
    samples = [
        {
            "__key__": f"{n:05d}",
            "jpg": row["jpg"],
            "txt": row["txt"],
            "json": {"uid": f"{int.from_bytes(row['name'].encode()[-16:], 'big'):032x}", "name": row["name"]},
        }
        for n, row in enumerate(rows)
    ]
    for number, part in enumerate(np.array_split(np.arange(len(samples)), shards)):
        write_webdataset(folder / f"{number:05d}.tar", [samples[i] for i in part])
    return folder


def table(run: str | Path) -> pa.Table:
    directory = Directory(str(run))
    files = [commit.files.annotated for commit in Run.open(str(run)).commits()]
    return pa.concat_tables([pq.read_table(directory.path(file.name)) for file in files if file])


def duplicates(run: str | Path) -> dict[str, tuple[str | None, str | None]]:
    found = table(run)
    names = dict(zip(found["cf_uid"].to_pylist(), found["name"].to_pylist(), strict=True))
    rows = found.select(["name", "cf_duplicate_kind", "cf_duplicate_of"]).to_pylist()
    return {r["name"]: (r["cf_duplicate_kind"], names.get(r["cf_duplicate_of"])) for r in rows}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("curation")
    source = write(folder / "source", planted(), 3)
    run_job(JobRequest("embed", str(source), str(folder / "run"), engine="local"))
    return str(folder / "run")


@pytest.mark.parametrize(
    ("options", "precision", "recall"),
    [
        (DedupOptions(near=None), 1.0, 1 / 3),
        (DedupOptions(exact=False, near=4), 0.95, 0.95),
        (DedupOptions(exact=False, near=None, semantic=0.95, clusters=2), 0.95, 0.5),
        (DedupOptions(near=6, semantic=0.97, clusters=2), 0.95, 0.95),
    ],
    ids=["exact", "near", "semantic", "all"],
)
def test_planted_copies_are_found_and_little_else(
    run: str, tmp_path: Path, options: DedupOptions, precision: float, recall: float
) -> None:
    found = find_duplicates(run, str(tmp_path / "out"), options)
    assert verify_run(str(tmp_path / "out")).problems == []
    rows = duplicates(tmp_path / "out")
    truth = {row["name"]: row["of"] for row in planted()}
    groups = {name: of or name for name, of in truth.items()}
    flagged = {name for name, (kind, _) in rows.items() if kind}
    right = {name for name in flagged if groups[name] == groups[str(rows[name][1])]}
    print(f"precision {len(right) / len(flagged):.3f}, recall {len(right) / 30:.3f}, {found.duplicates}")
    assert len(right) >= precision * len(flagged)
    assert len(right) >= recall * 30
    if options.exact:
        assert found.duplicates["exact"] == 10
    for name, (kind, keeper) in rows.items():
        assert kind is None or rows[str(keeper)][0] is None, f"{name} names {keeper}, which is not kept"
        if name.endswith("-s") and name in right:
            assert keeper == truth[name], "the one with more pixels stays"


def test_results_do_not_depend_on_the_order_of_shards(run: str, tmp_path: Path) -> None:
    """Other cuts of the same rows are in test_import_forget.py."""
    shutil.copytree(run, tmp_path / "run")
    version = tmp_path / "run/versions/000001.json"
    content = json.loads(version.read_text())
    version.write_text(json.dumps(content | {"commits": content["commits"][::-1]}))
    options = DedupOptions(near=6, semantic=0.97, clusters=3)
    find_duplicates(run, str(tmp_path / "a"), options)
    find_duplicates(str(tmp_path / "run"), str(tmp_path / "b"), options)
    assert table(tmp_path / "a")["name"] != table(tmp_path / "b")["name"]
    assert duplicates(tmp_path / "a") == duplicates(tmp_path / "b")


def test_a_repeated_or_interrupted_command_ends_with_the_same_run(run: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = find_duplicates(run, str(out), DedupOptions())
    before = {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.parquet"))}
    (out / "versions/000001.json").unlink()
    next((out / "commits").iterdir()).unlink()
    again = find_duplicates(run, str(out), DedupOptions())
    assert again == first
    assert {p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*.parquet"))} == before
    with pytest.raises(RefusedError, match="another plan"):
        find_duplicates(run, str(out), DedupOptions(near=2))
    with pytest.raises(RefusedError, match="already has the column"):
        find_duplicates(str(out), str(tmp_path / "twice"), DedupOptions())
    with pytest.raises(RefusedError, match="cosine"):
        find_duplicates(run, str(tmp_path / "no"), DedupOptions(semantic=1.5))
    with pytest.raises(RefusedError, match="wdth"):
        find_duplicates(run, str(tmp_path / "no"), DedupOptions(prefer="wdth"))
    assert not (tmp_path / "no").exists()


def test_scores_and_balance_are_columns_that_rules_can_rank(run: str, tmp_path: Path) -> None:
    dim = Run.open(str(run)).dim
    target = np.random.default_rng(0).standard_normal((20, dim)).astype(np.float32)
    np.save(tmp_path / "target.npy", target)
    add_scores(run, str(tmp_path / "scored"), negclip=True, target=str(tmp_path / "target.npy"), bank_size=20)
    (tmp_path / "entries.txt").write_text("a\nthe\nof\n")
    add_balance(str(tmp_path / "scored"), str(tmp_path / "balanced"), str(tmp_path / "entries.txt"), t=5)
    found = table(tmp_path / "balanced")
    assert found["cf_negclip"].null_count == found["cf_normsim"].null_count == 0
    assert 0 < sum(found["cf_balanced"].to_pylist()) < found.num_rows
    policy = parse_policy(
        "{policy: p, version: 1, rules: [{id: n, metadata: cf_negclip}, {id: b, metadata: cf_balanced, reject: {below: 0.5}},"
        " {id: best, fraction: {of: n}, reject: {outside_top: 0.3}}]}"
    )
    decided = compare_policies(policy, policy, str(tmp_path / "balanced")).before.decisions
    assert 0 < decided["keep"] <= 22
    np.save(tmp_path / "other.npy", target[:, :7])
    with pytest.raises(RefusedError, match="7 numbers"):
        add_scores(run, str(tmp_path / "no"), target=str(tmp_path / "other.npy"))


def test_the_pipeline_goes_from_images_to_shards_and_repeats_nothing(tmp_path: Path) -> None:
    write(tmp_path / "source", planted(), 2)
    policy = policy_file(tmp_path, POLICY)
    config = tmp_path / "curate.yaml"
    config.write_text(
        f"source: {{url: {tmp_path}/source}}\nout: {tmp_path}/out\npolicy: {policy}\n"
        f"export: {{to: {tmp_path}/dataset, rows_per_shard: 20}}\nengine: {{name: local}}\n"
        "cost: {images_per_second: 100, hour: 2}\n"
    )

    def pipeline(*options: str) -> str:
        return command(str(REPO / "pipelines/curate.py"), str(config), *options).stdout

    assert "nothing was done" in pipeline("--dry-run")
    assert not (tmp_path / "out").exists()
    first = json.loads(pipeline("--json"))
    assert first["duplicates"]["exact"] == 10
    assert first["decisions"]["keep"] == first["exported"]["rows"] == 70 - sum(first["duplicates"].values())
    assert verify_run(str(tmp_path / "out/000001/decided")).problems == []
    sizes = json.loads((tmp_path / "dataset/000001/sizes.json").read_text())
    assert sum(sizes.values()) == first["decisions"]["keep"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("commits/*")}
    assert json.loads(pipeline("--json")) == first
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("commits/*")} == before
