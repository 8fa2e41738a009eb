"""Runs from embeddings made elsewhere, repacked exports, and rows that are forgotten without a trace."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.curation.dedup import DedupOptions, find_duplicates
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.errors import RefusedError
from clipfilter.models import load_encoder
from clipfilter.operations import forget as forgetting
from clipfilter.operations.compare import compare_policies
from clipfilter.operations.export import export_run
from clipfilter.operations.forget import forget_rows
from clipfilter.operations.import_run import ImportOptions, import_embeddings
from clipfilter.operations.verify import verify_run
from clipfilter.policies import parse_policy
from clipfilter.runs import Run, ledger
from tests.support.engine import FRACTION_POLICY, PHOTOS, POLICY, policy_file, samples
from tests.support.policies import embeddings
from tests.support.s3 import s3_server
from tests.support.sources import write_parquet, write_webdataset

pytestmark = pytest.mark.integration

SIMPLE = (
    "{policy: p, version: 1, rules: [{id: sim, alignment: {}},"
    " {id: top, fraction: {of: sim}, reject: {outside_top: 0.5}}]}"
)


@pytest.fixture(scope="module")
def dim() -> int:
    return load_encoder("nano", device="cpu").dim


def rows_of(run: Path) -> pa.Table:
    files = [commit.files.annotated for commit in Run.open(str(run)).commits()]
    return pa.concat_tables([pq.read_table(run / file.name) for file in files if file])


def clip_retrieval(folder: Path, dim: int) -> list[str]:
    """Two numbered parts as clip-retrieval writes them, one with vectors that are no good."""
    keys = []
    for number, rows in ((0, 25), (1, 18)):
        image, text = embeddings(rows, dim, number), embeddings(rows, dim, 10 + number)
        if number:
            image[3] = 0
            image[4] = np.nan
            image[5] = image[5] * np.float16(3)  # not unit norm
            text[6] = 0
        for name, values in (("img", image), ("text", text)):
            (folder / f"{name}_emb").mkdir(parents=True, exist_ok=True)
            np.save(folder / f"{name}_emb" / f"{name}_emb_{number:02d}.npy", values)
        part = [f"photos/{number}-{row}.jpg" for row in range(rows)]
        captions = [None if row == 2 else f"caption {row}" for row in range(rows)]
        table = pa.table({"image_path": part, "caption": captions, "width": pa.array([640] * rows, pa.int32())})
        (folder / "metadata").mkdir(exist_ok=True)
        pq.write_table(table, folder / "metadata" / f"metadata_{number:02d}.parquet", row_group_size=7)
        keys += part
    return keys


def test_clip_retrieval_becomes_a_run_that_everything_reads(tmp_path: Path, dim: int) -> None:
    keys = clip_retrieval(tmp_path / "in", dim)
    options = ImportOptions("nano", rows_per_shard=10)
    summary = import_embeddings(str(tmp_path / "in"), str(tmp_path / "run"), options)
    assert (summary["totals"]["rows"], summary["totals"]["embedded"], summary["totals"]["failed"]) == (43, 41, 2)
    assert summary["totals"]["shards"] == 5
    assert verify_run(str(tmp_path / "run")).problems == []
    found = rows_of(tmp_path / "run")
    assert found["cf_key"].to_pylist() == keys[:28] + keys[30:]
    assert len(set(found["cf_uid"].to_pylist())) == 41
    missing = [i for i, s in enumerate(found["cf_similarity"].to_pylist()) if s is None]
    assert missing == [2, 27, 29]  # no caption twice, and the zero text vector
    image = np.load(tmp_path / "in/img_emb/img_emb_00.npy").astype(np.float32)
    text = np.load(tmp_path / "in/text_emb/text_emb_00.npy").astype(np.float32)
    assert found["cf_similarity"][7].as_py() == pytest.approx(float(image[7] @ text[7]), abs=1e-6)

    before = {p.name for p in (tmp_path / "run").rglob("*.arrow")}
    (tmp_path / "run/versions/000001.json").unlink()
    next((tmp_path / "run/commits").iterdir()).unlink()
    assert import_embeddings(str(tmp_path / "in"), str(tmp_path / "run"), options) == summary
    assert {p.name for p in (tmp_path / "run").rglob("*.arrow")} == before

    policy = policy_file(tmp_path, SIMPLE)
    result = run_job(JobRequest("filter", str(tmp_path / "run"), str(tmp_path / "f"), policy=policy, engine="local"))
    assert result.totals["keep"] == 20
    assert compare_policies(parse_policy(SIMPLE), parse_policy(SIMPLE), str(tmp_path / "run")).flipped == 0
    with pytest.raises(RefusedError, match="no images"):
        export_run(str(tmp_path / "f"), str(tmp_path / "no"))
    export = export_run(str(tmp_path / "f"), str(tmp_path / "out"), form="clip-retrieval", rows_per_shard=9)
    assert [len(np.load(p)) for p in sorted((tmp_path / "out/img_emb").iterdir())] == [9, 9, 2]
    assert export["rows"] == 20
    again = import_embeddings(str(tmp_path / "out"), str(tmp_path / "round"), ImportOptions("nano"))
    assert again["totals"]["embedded"] == 20
    names = ["cf_uid", "cf_caption", "cf_width"]
    first, second = rows_of(tmp_path / "f"), rows_of(tmp_path / "round")
    assert second.select(names).equals(first.filter(pa.compute.equal(first["cf_decision"], "keep")).select(names))
    assert find_duplicates(str(tmp_path / "run"), str(tmp_path / "d"), DedupOptions(semantic=0.99)).rows == 41


def test_datacomp_npz_becomes_a_run(tmp_path: Path, dim: int) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    uids = [f"{n:032x}" for n in range(30)]
    table = pa.table({"uid": uids, "text": ["a dog"] * 30, "original_width": [300] * 30, "original_height": [200] * 30})
    pq.write_table(table, folder / "ab.parquet")
    arrays = {"l14_img": embeddings(30, dim, 0), "l14_txt": embeddings(30, dim, 1), "b32_img": embeddings(30, 7, 2)}
    np.savez(folder / "ab.npz", **arrays)
    import_embeddings(str(folder), str(tmp_path / "run"), ImportOptions("nano"))
    found = rows_of(tmp_path / "run")
    assert found["cf_uid"].to_pylist() == uids
    assert found["cf_width"].to_pylist() == [300] * 30
    assert found["cf_similarity"].null_count == 0
    assert verify_run(str(tmp_path / "run")).problems == []


def test_duplicates_do_not_depend_on_order_or_cut_of_shards(tmp_path: Path, dim: int) -> None:
    """3 000 embeddings with copies and chains, imported twice: in order, and shuffled into other files and shards."""
    rng = np.random.default_rng(5)
    rows = 3000
    centres = rng.standard_normal((400, dim))
    values = centres[rng.integers(0, 400, rows)] + 0.22 * rng.standard_normal((rows, dim))
    image = (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float16)
    sha256 = [f"{n:032x}" * 2 for n in rng.integers(0, 2**40, rows)]
    for copy in range(0, 200, 2):
        image[copy + 1], sha256[copy + 1] = image[copy], sha256[copy]
    uids = np.array([f"{n:032x}" for n in rng.permutation(rows)])
    score = rng.integers(0, 5, rows).astype(np.float64)  # ties are settled by uid
    found = []
    for name, order, cuts, size in (("a", np.arange(rows), 1, 1000), ("b", rng.permutation(rows), 3, 700)):
        for number, part in enumerate(np.array_split(order, cuts)):
            (tmp_path / name).mkdir(exist_ok=True)
            np.savez(tmp_path / name / f"{number}.npz", l14_img=image[part])
            columns = {"uid": uids[part].tolist(), "sha256": [sha256[i] for i in part], "score": score[part]}
            pq.write_table(pa.table(columns), tmp_path / name / f"{number}.parquet")
        import_embeddings(
            str(tmp_path / name), str(tmp_path / f"{name}-run"), ImportOptions("nano", rows_per_shard=size)
        )
        options = DedupOptions(semantic=0.955, prefer="score", clusters=7)
        result = find_duplicates(str(tmp_path / f"{name}-run"), str(tmp_path / f"{name}-out"), options)
        assert 0 < result.duplicates["exact"] <= 100  # the others followed their keeper to a semantic one
        assert 200 < result.duplicates["semantic"] < 2800
        columns_found = ["cf_uid", "cf_duplicate_of", "cf_duplicate_kind", "cf_duplicate_cosine"]
        found.append(
            sorted(map(tuple, rows_of(tmp_path / f"{name}-out").select(columns_found).to_pandas().fillna("").values))
        )
    assert found[0] == found[1]
    kept = {uid for uid, keeper, _, _ in found[0] if not keeper}
    assert {keeper for _, keeper, _, _ in found[0] if keeper} <= kept
    place = {uid: row for row, uid in enumerate(uids.tolist())}
    for uid, keeper, kind, cosine in found[0][:300]:
        if kind == "semantic":
            exact = float(image[place[uid]].astype(np.float64) @ image[place[keeper]].astype(np.float64))
            assert cosine == pytest.approx(exact, abs=1e-6)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path, dim: int) -> None:
    def refused(folder: Path, words: str, **options: Any) -> None:
        with pytest.raises(RefusedError, match=words):
            import_embeddings(str(folder), str(tmp_path / "run"), ImportOptions("nano", **options))
        assert not (tmp_path / "run").exists()

    clip_retrieval(tmp_path / "a", dim)
    refused(tmp_path / "a", "no column 'nope'", caption_column="nope")
    np.save(tmp_path / "a/img_emb/img_emb_01.npy", embeddings(17, dim))
    refused(tmp_path / "a", "aligned")
    np.save(tmp_path / "a/img_emb/img_emb_01.npy", embeddings(18, dim + 1))
    refused(tmp_path / "a", f"{dim + 1} numbers per row")
    np.save(tmp_path / "a/img_emb/img_emb_01.npy", np.array([{}] * 18, dtype=object), allow_pickle=True)
    refused(tmp_path / "a", "not one row of floats")
    (tmp_path / "a/img_emb/img_emb_01.npy").unlink()
    refused(tmp_path / "a", "lacks files")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither img_emb")
    pq.write_table(pa.table({"uid": ["a"]}), tmp_path / "empty/x.parquet")
    np.savez(tmp_path / "empty/x.npz", l14_img=embeddings(1, 9), b32_img=embeddings(1, 8))
    refused(tmp_path / "empty", "--arrays")


def tar_members(folder: Path) -> list[tuple[str, bytes]]:
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    return found


# --- forgetting ------------------------------------------------------------------------------------------------------

SECRET = "unmistakable-caption-of-row-seven"


def secret_samples(count: int, bad: int | None = None) -> list[dict[str, Any]]:
    made = samples(count)
    for number, sample in enumerate(made):
        sample["json"]["uid"] = f"{number + 0xABCDEF00:032x}"
        sample["__key__"] = f"secretkey{number:03d}x"
    made[7]["txt"] = SECRET
    if bad is not None:
        made[bad]["jpg"] = b"no image at all"
    return made


def remaining(folder: Path, *needles: str) -> list[str]:
    """Files below the folder whose bytes, decompressed where they are Parquet, hold one of the texts."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += "\n".join(str(row) for row in pq.read_table(path).to_pylist()).encode()
        if any(needle.encode() in data for needle in needles):
            found.append(str(path.relative_to(folder)))
    return found


NEEDLES = (f"{7 + 0xABCDEF00:032x}", "secretkey007x", SECRET, f"{2 + 0xABCDEF00:032x}", "secretkey002x")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in two stages with kept and review copies, a row that failed, and a filter of it."""
    folder = tmp_path_factory.mktemp("forget")
    made = secret_samples(24, bad=2)
    for shard in range(3):
        write_webdataset(folder / "source" / f"{shard:05d}.tar", made[shard * 8 : shard * 8 + 8])
    policy = policy_file(folder, FRACTION_POLICY)
    run_job(
        JobRequest("run", str(folder / "source"), str(folder / "run"), policy=policy, engine="local", max_failures=1)
    )
    (folder / "run/report.html").write_text(SECRET)
    (folder / "run/index/segments").mkdir(parents=True)
    (folder / "run/index/segments/a").write_text(NEEDLES[0])
    run_job(JobRequest("filter", str(folder / "run"), str(folder / "filter"), policy=policy, engine="local"))
    (folder / "uids.txt").write_text(f"{NEEDLES[0]}\n{NEEDLES[3]}\nunknown\n")
    return folder


def test_forgotten_rows_leave_no_byte_behind(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "all")
    run = tmp_path / "all/run"
    assert remaining(run, *NEEDLES)
    before = rows_of(run)
    done = forget_rows(str(run), str(runs / "uids.txt"))
    assert (done.rows, done.unknown, done.shards) == (2, 1, 2)  # both stages of the one shard that held both
    assert remaining(run, *NEEDLES) == []
    proof = verify_run(str(run))
    assert proof.problems == []
    assert proof.notes == []
    after = rows_of(run)
    assert after.num_rows == before.num_rows - 1
    others = before.filter(pa.compute.not_equal(before["cf_uid"], NEEDLES[0]))
    assert after.drop_columns(["cf_row"]).to_pylist() == others.drop_columns(["cf_row"]).to_pylist()
    kept = [name for name, _ in tar_members(run / "kept")]
    assert len({name.split(".")[0] for name in kept}) == after["cf_decision"].to_pylist().count("keep")
    assert any("index" in note for note in done.notes)
    assert forget_rows(str(run), str(runs / "uids.txt")).rows == 0  # nothing left to do
    again = JobRequest(
        "run", str(runs / "source"), str(run), policy=str(runs / "policy.yaml"), engine="local", max_failures=1
    )
    assert run_job(again).rows_processed == 0
    assert rows_of(run).num_rows == after.num_rows

    filtered = tmp_path / "all/filter"
    forget_rows(str(filtered), str(runs / "uids.txt"))
    assert remaining(filtered, *NEEDLES) == []
    assert verify_run(str(filtered)).problems == []


class Crashed(Exception):
    pass


def test_a_crash_anywhere_is_resumed(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails at every deletion and every commit in turn, then runs to the end."""
    reference = tmp_path / "reference"
    shutil.copytree(runs / "run", reference)
    forget_rows(str(reference), str(runs / "uids.txt"))
    steps: list[str] = []
    fail_at = -1

    def counted(original: Any) -> Any:
        def call(*given: Any) -> Any:
            steps.append(original.__name__)
            if len(steps) == fail_at:
                raise Crashed
            return original(*given)

        return call

    monkeypatch.setattr(forgetting, "_remove", counted(forgetting._remove))
    monkeypatch.setattr(ledger, "write_commit", counted(ledger.write_commit))
    monkeypatch.setattr(forgetting, "_new_version", counted(forgetting._new_version))
    total = 1
    while True:
        fail_at, steps = total, []
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(runs / "run", run)
        try:
            forget_rows(str(run), str(runs / "uids.txt"))
            break
        except Crashed:
            pass
        fail_at, steps = -1, []
        forget_rows(str(run), str(runs / "uids.txt"))
        assert remaining(run, *NEEDLES) == [], f"after a crash at step {total}"
        assert verify_run(str(run)).problems == []
        files = {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file() and "versions" not in p.parts}
        wanted = {p.relative_to(reference).as_posix() for p in reference.rglob("*") if p.is_file()}
        assert files == {name for name in wanted if not name.startswith("versions")}
        total += 1
    assert total > 10


def parquet_is_repacked_with_its_own_schema(run: Path, out: Path, kept: list[dict[str, Any]]) -> None:
    export_run(str(run), str(out), rows_per_shard=4)
    files = sorted(out.glob("*.parquet"))
    assert [pq.read_metadata(path).num_rows for path in files] == [
        min(4, len(kept) - at) for at in range(0, len(kept), 4)
    ]
    assert [uid for path in files for uid in pq.read_table(path)["uid"].to_pylist()] == [row["cf_uid"] for row in kept]
    assert pq.read_schema(files[0]).equals(pq.read_schema(run.parent / "parquet/a.parquet"))


def test_folders_and_parquet_copies_are_forgotten_too(tmp_path: Path) -> None:
    policy = policy_file(tmp_path, POLICY.replace("below: 0.05", "below: -0.9"))
    write_parquet(tmp_path / "parquet/a.parquet", secret_samples(9), image_column="image")
    for source in (tmp_path / "parquet", PHOTOS):
        run = tmp_path / f"run-{source.name}"
        run_job(JobRequest("run", str(source), str(run), policy=policy, engine="local", max_failures=1, limit=30))
        rows = rows_of(run)
        kept = rows.filter(pa.compute.equal(rows["cf_decision"], "keep")).to_pylist()
        captions = rows["cf_caption"].to_pylist()
        chosen = next(row for row in kept if captions.count(row["cf_caption"]) == 1)
        if source != PHOTOS:
            parquet_is_repacked_with_its_own_schema(run, tmp_path / "repacked", kept)
        (tmp_path / "uids.txt").write_text(chosen["cf_uid"])
        done = forget_rows(str(run), str(tmp_path / "uids.txt"))
        assert done.rows == 1
        assert remaining(run, chosen["cf_uid"], chosen["cf_caption"]) == []
        if source == PHOTOS:
            assert remaining(run, chosen["cf_key"]) == []
            assert not list(run.rglob(chosen["cf_key"]))
        assert verify_run(str(run)).problems == []


# --- repacking -------------------------------------------------------------------------------------------------------


def test_exports_are_cut_to_rows_per_shard(runs: Path, tmp_path: Path) -> None:
    plain = export_run(str(runs / "filter"), str(tmp_path / "plain"))
    summary = export_run(str(runs / "filter"), str(tmp_path / "tars"), rows_per_shard=5)
    assert summary["rows"] == plain["rows"] > 10
    sizes = json.loads((tmp_path / "tars/sizes.json").read_text())
    assert list(sizes.values())[:-1] == [5] * (len(sizes) - 1)
    assert sum(sizes.values()) == plain["rows"]

    assert tar_members(tmp_path / "tars") == tar_members(tmp_path / "plain")
    for number, size in enumerate(sizes.values()):
        assert pq.read_metadata(tmp_path / f"tars/{number:08d}.parquet").num_rows == size
        assert json.loads((tmp_path / f"tars/{number:08d}_stats.json").read_text())["successes"] == size
    with pytest.raises(RefusedError, match="another export"):
        export_run(str(runs / "filter"), str(tmp_path / "tars"), rows_per_shard=6)


# --- on an object store ----------------------------------------------------------------------------------------------


def test_columns_and_forgetting_on_s3(runs: Path) -> None:
    with s3_server():
        fs = fsspec.filesystem("s3", use_listings_cache=False, skip_instance_cache=True)
        fs.mkdir("forget")
        fs.put(str(runs / "run"), "forget/run", recursive=True)
        found = find_duplicates("s3://forget/run", "s3://forget/unique", DedupOptions(semantic=0.9))
        assert found.rows == 23
        assert verify_run("s3://forget/unique").problems == []
        for name in ("run", "unique"):
            assert forget_rows(f"s3://forget/{name}", str(runs / "uids.txt")).rows == 2
            assert verify_run(f"s3://forget/{name}").problems == []
            fs.get(f"forget/{name}", str(runs / f"fetched-{name}"), recursive=True)
            assert remaining(runs / f"fetched-{name}", *NEEDLES) == []
