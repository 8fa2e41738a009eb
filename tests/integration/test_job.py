"""The main job on real photographs with the bundled model: decisions, equality, refusals, resuming, broken rows."""

from __future__ import annotations

import json
import shutil
import tarfile
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from clipfilter.engine.driver import Progress
from clipfilter.engine.executors.inline import InlineExecutor
from clipfilter.engine.job import JobRequest, JobResult, run_job
from clipfilter.engine.overview import plan_overview
from clipfilter.errors import RefusedError
from clipfilter.models import nano
from clipfilter.operations.export import export_run
from clipfilter.operations.verify import verify_run
from clipfilter.sources import SourceOptions, holds, open_source
from tests.support.engine import FRACTION_POLICY, commits, data_files, policy_file, samples, stray_files
from tests.support.images import broken_images
from tests.support.sources import cut, write_image_folder, write_img2dataset, write_parquet, write_webdataset

pytestmark = pytest.mark.integration


def run(source: Path | str, out: Path, policy: str, **more: Any) -> JobResult:
    return run_job(JobRequest("run", str(source), str(out), policy=policy, engine="local", **more))


def rows(out: Path | str, folder: str = "annotated") -> list[dict[str, Any]]:
    found = [row for path in sorted(Path(out, folder).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    return sorted(found, key=lambda row: (row["cf_shard"], row["cf_row"]))


def test_every_row_is_decided_explained_and_copied(finished: JobResult, dataset: Path) -> None:
    totals = finished.totals
    assert totals["rows"] == totals["decided"] == 120
    assert totals["keep"] + totals["review"] + totals["reject"] == 120
    assert min(totals["keep"], totals["review"] + totals["reject"]) > 10, "the policy must tell these photos apart"
    proof = verify_run(finished.out)
    assert proof.problems == []
    for row in rows(finished.out):
        fired = {reason["band"] for reason in row["cf_reasons"]}
        assert row["cf_decision"] == ("reject" if "reject" in fired else "review" if fired else "keep")
        for reason in row["cf_reasons"]:
            assert reason["score"] == pytest.approx(row[f"cf_score.{reason['rule']}"])
            if reason["rule"] == "animals":
                assert reason["nearest"] in ("a cat", "a dog", "a bird")
                assert reason["contrast"]
                assert reason["score"] > reason["threshold"]
    assert stray_files(Path(finished.out)) == []


def test_kept_tars_hold_the_sources_own_bytes(finished: JobResult, dataset: Path) -> None:
    originals: dict[str, bytes] = {}
    for path in dataset.glob("*.tar"):
        with tarfile.open(path) as tar:
            originals |= {f"{path.stem}/{m.name}": tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    kept = {(row["cf_shard"], row["cf_key"]) for row in rows(finished.out) if row["cf_decision"] == "keep"}
    found = set()
    for path in Path(finished.out, "kept").glob("*.tar"):
        stem, shard, _ = path.name.split("-")
        with tarfile.open(path) as tar:
            for member in tar:
                assert tar.extractfile(member).read() == originals[f"{stem}/{member.name}"]  # type: ignore[union-attr]
                found.add((shard, member.name.split(".")[0]))
    assert found == kept


def test_embed_then_filter_gives_the_very_files_of_run(
    finished: JobResult, embedded: JobResult, policy: str, tmp_path: Path
) -> None:
    assert embedded.totals["embedded"] == 120
    assert {row["cf_decision"] for row in rows(embedded.out)} == {None}
    filtered = run_job(JobRequest("filter", embedded.out, str(tmp_path / "out"), policy=policy, engine="local"))
    assert filtered.totals["keep"] == finished.totals["keep"]
    want = {k: v for k, v in data_files(Path(finished.out)).items() if k.startswith("annotated/")}
    assert {k: v for k, v in data_files(Path(filtered.out)).items() if k.startswith("annotated/")} == want
    assert verify_run(filtered.out).problems == []


def test_filter_reads_no_image_and_export_writes_the_dataset(dataset: Path, policy: str, tmp_path: Path) -> None:
    source = tmp_path / "tars"
    shutil.copytree(dataset, source)
    run_job(JobRequest("embed", str(source), str(tmp_path / "run"), engine="local"))
    source.rename(tmp_path / "away")
    filtered = run_job(
        JobRequest("filter", str(tmp_path / "run"), str(tmp_path / "out"), policy=policy, engine="local")
    )
    assert filtered.totals["decided"] == 120
    (tmp_path / "away").rename(source)
    summary = export_run(filtered.out, str(tmp_path / "dst"))
    assert summary["rows"] == filtered.totals["keep"]
    sizes = json.loads((tmp_path / "dst" / "sizes.json").read_text())
    assert sum(sizes.values()) == summary["rows"]
    for name, count in sizes.items():
        with tarfile.open(tmp_path / "dst" / name) as tar:
            assert len({member.name.split(".")[0] for member in tar}) == count > 0
        stats = json.loads((tmp_path / "dst" / f"{name[:8]}_stats.json").read_text())
        assert stats["successes"] == count == pq.read_metadata(tmp_path / "dst" / f"{name[:8]}.parquet").num_rows
    assert export_run(filtered.out, str(tmp_path / "dst")) == summary, "an export can be repeated"
    with pytest.raises(RefusedError, match="another export"):
        export_run(filtered.out, str(tmp_path / "dst"), what="review")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "precious.txt").write_text("mine")
    with pytest.raises(RefusedError, match="not empty"):
        export_run(filtered.out, str(tmp_path / "other"))


def test_export_in_clip_retrievals_and_datacomps_forms(finished: JobResult, tmp_path: Path) -> None:
    kept = [row for row in rows(finished.out) if row["cf_decision"] == "keep"]
    export_run(finished.out, str(tmp_path / "cr"), form="clip-retrieval")
    names = sorted(path.name for path in (tmp_path / "cr" / "img_emb").iterdir())
    vectors = np.concatenate([np.load(tmp_path / "cr" / "img_emb" / name) for name in names])
    tables = [pq.read_table(path) for path in sorted((tmp_path / "cr" / "metadata").iterdir())]
    assert vectors.shape[0] == len(kept) == sum(table.num_rows for table in tables)
    assert vectors.dtype == np.float16
    assert {"image_path", "caption"} <= set(tables[0].column_names)
    texts = np.concatenate([np.load(path) for path in sorted((tmp_path / "cr" / "text_emb").iterdir())])
    similarity = np.concatenate([np.asarray(table["cf_similarity"]) for table in tables])
    cosine = (vectors.astype(np.float32) * texts.astype(np.float32)).sum(axis=1)
    assert np.abs(cosine - similarity).max() < 1e-5, "rows of the three files must belong together"
    export_run(finished.out, str(tmp_path / "dc"), form="datacomp")
    subset = np.load(tmp_path / "dc" / "subset.npy")
    assert subset.dtype == np.dtype("u8,u8")
    assert [f"{a:016x}{b:016x}" for a, b in subset.tolist()] == sorted(row["cf_uid"] for row in kept)


def test_dataset_level_rules_run_in_two_stages_equal_to_filter(
    embedded: JobResult, dataset: Path, tmp_path: Path
) -> None:
    policy = policy_file(tmp_path, FRACTION_POLICY)
    result = run(dataset, tmp_path / "out", policy)
    similarity = np.sort(np.array([row["cf_similarity"] for row in rows(result.out)], np.float32))[::-1]
    threshold = similarity[int(len(similarity) * 0.6)]
    rejected = {row["cf_uid"] for row in rows(result.out) if row["cf_decision"] == "reject"}
    assert rejected == {row["cf_uid"] for row in rows(result.out) if row["cf_similarity"] < threshold}
    fixed = json.loads((tmp_path / "out" / "thresholds" / "000001.json").read_text())
    assert fixed["thresholds"] == {"best.reject": pytest.approx(float(threshold))}
    assert len(list((tmp_path / "out" / "commits").glob("*.scored.001.json"))) == 3
    filtered = run_job(JobRequest("filter", embedded.out, str(tmp_path / "f"), policy=policy, engine="local"))
    annotated = [{k: v for k, v in data_files(Path(r.out)).items() if "annotated/" in k} for r in (result, filtered)]
    assert annotated[0] == annotated[1]
    assert verify_run(result.out).problems == verify_run(filtered.out).problems == []


def test_a_finished_run_is_not_computed_again(finished: JobResult, dataset: Path, policy: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    before = data_files(out), commits(out), sorted(p.name for p in (out / "versions").iterdir())
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    again = run(dataset, out, policy)
    assert again.rows_processed == 0
    assert (data_files(out), commits(out), sorted(p.name for p in (out / "versions").iterdir())) == before
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == stamps


def test_another_policy_model_or_source_into_the_same_out_is_refused(
    finished: JobResult, dataset: Path, policy: str, tmp_path: Path
) -> None:
    other = policy_file(tmp_path, FRACTION_POLICY)
    before = data_files(Path(finished.out))
    for request in (
        JobRequest("run", str(dataset), finished.out, policy=other),
        JobRequest("run", str(dataset), finished.out, policy=policy, batch_size=32),
        JobRequest("run", str(dataset), finished.out, policy=policy, decode="exact"),
        JobRequest("run", str(dataset), finished.out, policy=policy, model="ViT-B-32/openai"),
        JobRequest("run", str(dataset / "00000.tar"), finished.out, policy=policy),
        JobRequest("embed", str(dataset), finished.out),
    ):
        with pytest.raises(RefusedError, match="another plan"):
            run_job(request)
    assert data_files(Path(finished.out)) == before


def test_what_cannot_be_done_is_refused_before_anything_is_written(
    finished: JobResult, dataset: Path, policy: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    for request, sentence in (
        (JobRequest("run", str(tmp_path / "nowhere"), out, policy=policy), "nowhere"),
        (JobRequest("run", str(dataset), out, policy="no-such-pack"), "no-such-pack"),
        (JobRequest("run", str(dataset), out, policy=policy, model="ViT-Z-99/none"), "ViT-Z-99"),
        (JobRequest("run", str(dataset), str(dataset), policy=policy), "source itself"),
        (JobRequest("run", str(dataset), out, policy=policy, sample=1.5), "--sample"),
        (JobRequest("run", finished.out, out, policy=policy), "is a run directory"),
        (JobRequest("filter", str(dataset), out, policy=policy), "not a run directory"),
        (JobRequest("run", str(dataset), out, policy=policy, device="cuda"), "GPU"),
    ):
        with pytest.raises(RefusedError, match=sentence):
            run_job(request)
    assert not (tmp_path / "out" / "plan.json").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(RefusedError, match=r"thesis\.txt"):
        run(dataset, tmp_path / "precious", policy)
    (tmp_path / "file").write_text("a file")
    with pytest.raises(RefusedError, match="cannot be written"):
        run(dataset, tmp_path / "file" / "out", policy)


def test_another_spelling_of_the_source_is_the_same_plan(
    finished: JobResult, dataset: Path, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a run that is decided again, of an older plan that kept a relative path, and from another folder."""
    out, link = tmp_path / "out", tmp_path / "link"
    shutil.copytree(finished.out, out)
    link.symlink_to(dataset)
    monkeypatch.chdir(dataset.parent)
    spellings = (dataset.name, f"./{dataset.name}/", f"x/../{dataset.name}", f"file://{dataset}", f"file:{dataset}")
    assert {open_source(spelling).to_plan()["url"] for spelling in spellings} == {str(dataset)}
    for spelling in (*spellings, str(link), f"{link}/"):
        assert run_job(JobRequest("run", spelling, str(out), policy=policy, engine="local")).rows_processed == 0

    old = replace(finished.plan, source=finished.plan.source | {"url": "a/folder/that/was/left"})
    (tmp_path / "old").mkdir()
    (tmp_path / "old/plan.json").write_bytes(old.to_bytes())
    resumed = run(link, tmp_path / "old", policy)
    assert (resumed.plan, resumed.totals) == (old, finished.totals)

    (tmp_path / "runs").symlink_to(tmp_path)
    for spelling in (str(out), str(tmp_path / "runs/out")):
        run_job(JobRequest("filter", spelling, str(tmp_path / "filter"), policy=policy, engine="local"))
    assert len(list((tmp_path / "filter/versions").iterdir())) == 1
    link.unlink()
    shutil.copytree(dataset, link)
    with pytest.raises(RefusedError, match=r"another plan \(source.root was"):
        run(link, out, policy)


def test_out_inside_the_source_is_refused_however_it_is_reached(
    finished: JobResult, dataset: Path, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(dataset, source / "tars")
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "deep").symlink_to(source / "tars", target_is_directory=True)
    monkeypatch.chdir(source / "tars")
    for given, out in (
        (source, source / "out"),
        (source, tmp_path / "link/new/out"),
        (tmp_path / "link", tmp_path / "deep/out"),
        ("..", "out"),
        (f"file://{source}", f"{tmp_path}/x/../deep/out"),
        (f"{source}/**/*.tar", source / "out"),
        (f"{tmp_path}/s*/*/*.tar", tmp_path / "link/out"),
        (f"{source}/{{tars,other}}/0000{{0..2}}.tar", tmp_path / "link/out"),
    ):
        with pytest.raises(RefusedError, match="lies inside the source"):
            run_job(JobRequest("run", str(given), str(out), policy=policy))
    for given, out in ((source, tmp_path / "link"), ("..", f"file:{source}")):
        with pytest.raises(RefusedError, match="is the source itself"):
            run_job(JobRequest("run", str(given), str(out), policy=policy))
    (source / "tars").rename(source / "policy")  # a name that a run's own folder may have
    with pytest.raises(RefusedError, match="lies inside --out"):
        run_job(JobRequest("run", str(source / "policy"), str(tmp_path / "link"), policy=policy))
    (tmp_path / "run").symlink_to(finished.out)
    with pytest.raises(RefusedError, match="is the run itself"):
        run_job(JobRequest("filter", finished.out, str(tmp_path / "run"), policy=policy))
    assert sorted(path.name for path in source.rglob("*")) == ["00000.tar", "00001.tar", "00002.tar", "policy"]
    with pytest.raises(RefusedError, match="lies inside the source"):
        export_run(finished.out, str(dataset / "export"))
    # Beside what a pattern finds is not inside the source.
    assert not holds(f"{source}/*.tar", str(source / "out"))
    assert not holds(str(source), f"{source}-out")


def test_dry_run_writes_nothing(dataset: Path, policy: str, tmp_path: Path) -> None:
    overview = plan_overview(JobRequest("run", str(dataset), str(tmp_path / "out"), policy=policy))
    assert (overview["shards"], overview["kind"], overview["model"]) == (3, "webdataset", "nano")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RefusedError, match="unknown model"):
        plan_overview(JobRequest("run", str(dataset), str(tmp_path / "out"), policy=policy, model="nanno"))
    elsewhere = tmp_path / "column.yaml"
    elsewhere.write_text(
        "policy: p\nversion: 1\nrules:\n  - {id: r, metadata: no_such_column, reject: {below: 1}}\n", encoding="utf-8"
    )
    with pytest.raises(RefusedError, match="no_such_column"):
        plan_overview(JobRequest("run", str(dataset), str(tmp_path / "out"), policy=str(elsewhere)))


def test_a_local_model_may_move_but_its_weights_may_not_change(
    dataset: Path, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    mine = Path(shutil.copy(nano.WEIGHTS, tmp_path / "old" / "mine.safetensors"))
    first = run(dataset, tmp_path / "out", policy, model=f"nano={mine}")
    assert first.plan.model["model"] == "nano=mine.safetensors"
    moved = mine.rename(tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    again = run(dataset, tmp_path / "out", policy, model="nano=mine.safetensors")
    assert again.rows_processed == 0
    request = JobRequest("filter", str(tmp_path / "out"), str(tmp_path / "again"), policy=policy)
    with pytest.raises(RefusedError, match="say where it is with --model"):
        run_job(request)
    assert run_job(replace(request, model=f"nano={moved}")).totals == first.totals
    with pytest.raises(RefusedError, match="weights_sha256"):
        run_job(replace(request, out=str(tmp_path / "other"), model=f"nano={altered(moved)}"))


def altered(weights: Path) -> Path:
    """A copy of these weights with one number changed, under the same name."""
    state = load_file(weights)
    name = next(name for name in state if state[name].is_floating_point())
    state[name].view(-1)[0] += 1
    (weights.parent / "altered").mkdir()
    save_file(state, weights.parent / "altered" / weights.name)
    return weights.parent / "altered" / weights.name


def test_limit_and_sample_choose_rows_reproducibly(dataset: Path, policy: str, tmp_path: Path) -> None:
    limited = run(dataset, tmp_path / "limit", policy, limit=50)
    assert limited.totals["rows"] == 50
    assert verify_run(limited.out).problems == []
    sampled = run(dataset, tmp_path / "sample", policy, sample=0.3)
    assert 20 <= sampled.totals["rows"] <= 55
    again = run(dataset, tmp_path / "again", policy, sample=0.3)
    assert data_files(tmp_path / "again") == data_files(tmp_path / "sample")
    assert again.totals == sampled.totals


def test_a_changed_shard_is_processed_again_and_the_others_are_not(policy: str, tmp_path: Path) -> None:
    source = tmp_path / "tars"
    for shard in range(2):
        write_webdataset(source / f"{shard}.tar", samples(12, shard * 12))
    first = run(source, tmp_path / "out", policy)
    write_webdataset(source / "1.tar", samples(20, 12))
    write_webdataset(source / "2.tar", samples(4, 80))
    second = run(source, tmp_path / "out", policy)
    assert (first.totals["rows"], second.totals["rows"], second.rows_processed) == (24, 36, 24)
    assert (first.version, second.version) == ("000001", "000002")
    assert len(list((tmp_path / "out" / "commits").iterdir())) == 4
    assert verify_run(second.out).problems == []


def test_broken_images_cost_their_own_rows_and_change_no_other(policy: str, tmp_path: Path) -> None:
    """Every kind of broken image, one in ten, among real photographs."""
    kinds = broken_images()
    assert len(kinds) >= 10
    good = samples(10 * len(kinds))
    mixed, expected = [], {}
    for number, sample in enumerate(good):
        if number % 10 == 7:
            name, (data, error_class) = list(kinds.items())[number // 10]
            sample = {**sample, "jpg": data}
            expected[sample["__key__"]] = (error_class, name)
        mixed.append(sample)
    write_webdataset(tmp_path / "clean" / "0.tar", good)
    write_webdataset(tmp_path / "mixed" / "0.tar", mixed)
    clean = run(tmp_path / "clean", tmp_path / "out-clean", policy)
    broken = run(tmp_path / "mixed", tmp_path / "out-mixed", policy)
    failed = {row["cf_key"]: row["cf_error_class"] for row in rows(broken.out, "failed")}
    assert failed == {key: error_class for key, (error_class, _) in expected.items()}
    assert all(row["cf_error"] for row in rows(broken.out, "failed"))
    others = [row for row in rows(clean.out) if row["cf_key"] not in failed]
    emb = {r["cf_uid"]: r for r in rows(clean.out, "embeddings")}
    assert all(r == emb[r["cf_uid"]] for r in rows(broken.out, "embeddings"))
    for row, other in zip(rows(broken.out), others, strict=True):
        # A block of scores without the failed rows has other neighbours: the last bit of a product may differ.
        scores = [name for name, value in other.items() if isinstance(value, float)]
        assert {name: row[name] for name in scores} == pytest.approx({name: other[name] for name in scores}, abs=1e-6)
        assert [(r["rule"], r["band"]) for r in row["cf_reasons"]] == [
            (r["rule"], r["band"]) for r in other["cf_reasons"]
        ]
        assert all(row[name] == other[name] for name in other if name not in (*scores, "cf_reasons"))
    assert broken.exit_code == 3
    assert "10.0%" in " ".join(broken.messages) or "rows failed" in " ".join(broken.messages)
    assert clean.exit_code == 0
    assert verify_run(broken.out).problems == []


def test_a_damaged_tar_keeps_the_rows_before_the_damage(policy: str, tmp_path: Path) -> None:
    path = write_webdataset(tmp_path / "tars" / "0.tar", samples(20))
    cut(path, 0.5)
    result = run(tmp_path / "tars", tmp_path / "out", policy)
    assert 5 <= result.totals["rows"] < 20
    assert result.totals["damaged_shards"] == 1
    assert result.totals["bytes_unread"] > 0
    assert result.exit_code == 3
    assert "damaged" in " ".join(result.messages)
    write_webdataset(path, samples(20))
    mended = run(tmp_path / "tars", tmp_path / "out", policy)
    assert (mended.totals["rows"], mended.totals["damaged_shards"], mended.exit_code) == (20, 0, 0)


def test_a_parquet_without_footer_fails_as_a_shard_and_the_run_goes_on(policy: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "p" / "a.parquet", samples(12))
    broken = write_parquet(tmp_path / "p" / "b.parquet", samples(12, 12))
    cut(broken, 0.7)
    result = run(tmp_path / "p", tmp_path / "out", policy)
    assert (result.totals["rows"], result.totals["failed_shards"], result.exit_code) == (12, 1, 3)
    assert "b.parquet" in " ".join(result.messages)
    write_parquet(broken, samples(12, 12))
    assert run(tmp_path / "p", tmp_path / "out", policy).totals["rows"] == 24


def test_verify_finds_every_kind_of_tampering(finished: JobResult, tmp_path: Path) -> None:
    def tampered(name: str, change: Any) -> list[str]:
        out = tmp_path / name
        shutil.copytree(finished.out, out)
        change(out)
        return verify_run(str(out)).problems

    def first(out: Path, pattern: str) -> Path:
        return sorted(out.glob(pattern))[0]

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def edit(path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    for name in ("annotated", "embeddings", "kept"):
        assert any("changed" in p for p in tampered(f"flip-{name}", lambda out, n=name: flip(first(out, f"{n}/*"))))
    assert any("missing" in p for p in tampered("gone", lambda out: first(out, "annotated/*").unlink()))
    assert any("not there" in p for p in tampered("commit", lambda out: first(out, "commits/*").unlink()))
    assert any(
        "sums" in p for p in tampered("total", lambda out: edit(first(out, "versions/*"), '"rows": 120', '"rows": 121'))
    )
    assert any(
        "rows" in p for p in tampered("count", lambda out: edit(first(out, "commits/*"), '"rows": 40', '"rows": 41'))
    )
    assert any("edited" in p for p in tampered("plan", lambda out: edit(out / "plan.json", '"fast"', '"exact"')))


def test_files_of_a_late_attempt_are_noted_and_change_nothing(finished: JobResult, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    (out / "annotated" / f"{'0' * 16}-{'f' * 16}.parquet").write_bytes(b"late")
    proof = verify_run(str(out))
    assert proof.problems == []
    assert "belong to no commit" in proof.notes[0]


@pytest.mark.parametrize(
    "form", ["parquet", "folder", "img2dataset-webdataset", "img2dataset-parquet", "img2dataset-files"]
)
def test_every_form_of_source_runs_verifies_and_exports_in_its_own_form(form: str, policy: str, tmp_path: Path) -> None:
    made = samples(24)
    source = tmp_path / "source"
    if form == "parquet":
        write_parquet(source / "a.parquet", made, row_group_size=8)
    elif form == "folder":
        write_image_folder(source, made)
    else:
        write_img2dataset(source, made, 3, form.removeprefix("img2dataset-"))  # type: ignore[arg-type]
    result = run(source, tmp_path / "out", policy)
    assert result.plan.source["kind"] == form
    assert result.totals["rows"] == result.totals["decided"] == 24
    assert result.totals["not_downloaded"] == (3 if form.startswith("img2dataset") else 0)
    assert verify_run(result.out).problems == []
    assert {row["cf_caption"] for row in rows(result.out)} == {sample["txt"] for sample in made}
    summary = export_run(result.out, str(tmp_path / "dst"))
    assert summary["rows"] == result.totals["keep"] > 0
    from clipfilter.sources import open_source

    kept = {row["cf_sha256"] for row in rows(result.out) if row["cf_decision"] == "keep"}
    again = open_source(str(tmp_path / "dst"), SourceOptions())
    import hashlib

    exported = [
        hashlib.sha256(image.as_py()).hexdigest()
        for shard in again.iter_shards()
        for batch in again.read(shard)
        for image in batch.column("cf_image")
    ]
    assert set(exported) == kept
    assert len(exported) == summary["rows"]


@pytest.mark.processes
def test_a_worker_in_this_process_gives_the_very_files_of_worker_processes(
    dataset: Path, policy: str, tmp_path: Path
) -> None:
    request = JobRequest(
        "run", str(dataset), str(tmp_path / "processes"), policy=policy, engine="local", workers=2, threads=1
    )
    processes = run_job(request)
    inline = run_job(replace(request, out=str(tmp_path / "inline")), executor=InlineExecutor(threads=1))
    assert data_files(Path(inline.out)) == data_files(Path(processes.out))
    assert commits(Path(inline.out)) == commits(Path(processes.out))
    assert (inline.engine, inline.totals) == ("inline", processes.totals)
    assert stray_files(Path(inline.out)) == []


def test_a_run_can_be_the_input_of_another(finished: JobResult, policy: str, tmp_path: Path) -> None:
    """Annotated columns of an earlier run in the source become cf_prev_*."""
    table = pq.read_table(sorted(Path(finished.out, "annotated").glob("*"))[0])
    images = {sample["__key__"]: sample["jpg"] for sample in samples(120)}
    table = table.append_column("image", [[images[key] for key in table["cf_key"].to_pylist()]])
    (tmp_path / "p").mkdir()
    pq.write_table(table, tmp_path / "p" / "a.parquet")
    result = run(tmp_path / "p", tmp_path / "out", policy)
    found = rows(result.out)[0]
    assert found["cf_prev_decision"] in ("keep", "review", "reject")
    assert found["cf_decision"]


def test_progress_counts_everything_once(dataset: Path, policy: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Display:
        def update(self, progress: Progress) -> None:
            seen.append((progress.rows, progress.shards_done))

    run_job(JobRequest("run", str(dataset), str(tmp_path / "out"), policy=policy, engine="local"), Display())
    assert seen[-1] == (120, 3)
    assert seen == sorted(seen)


def test_a_late_duplicate_attempt_of_a_shard_changes_nothing(
    finished: JobResult, dataset: Path, policy: str, tmp_path: Path
) -> None:
    """A worker that was taken for dead finishes its shard after another has: with the same bytes, and with others."""
    from clipfilter.engine.worker import JobSpec, Task, Worker
    from clipfilter.policies import load_policy
    from clipfilter.runs import Run

    out = tmp_path / "out"
    shutil.copytree(finished.out, out)
    before = data_files(out), commits(out)
    plan = finished.plan
    shard = next(Run.open(str(out)).commits()).shard
    for decode in ("fast", "exact"):
        spec = JobSpec(
            job="run", out=str(out), source=plan.source, policy=load_policy(policy).canonical(), model="nano",
            device="cpu", dtype="fp32", compile_model=False, threads=1 if decode == "exact" else 2,
            options={**plan.options, "decode": decode}, text=True,
        )  # fmt: skip
        worker = Worker(spec)
        answer = worker.process(Task("embed", shard, 1, plan.sha256))
        worker.close()
        assert answer.created is False
        assert commits(out) == before[1]
        assert {k: v for k, v in data_files(out).items() if k in before[0]} == before[0]
        assert verify_run(str(out)).problems == []
    again = run(dataset, out, policy)
    assert again.version == finished.version
    assert again.rows_processed == 0


def test_images_behind_urls_and_transient_failures_tried_again(policy: str, tmp_path: Path) -> None:
    """A Parquet of URLs: not found costs its row for good, trouble of the server is tried again on request."""
    made = samples(12)
    pages = {f"/{sample['__key__']}.jpg": sample["jpg"] for sample in made}
    troubled = {"/000003.jpg"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            code = 503 if self.path in troubled else 200 if self.path in pages else 404
            body = pages[self.path] if code == 200 else b"<html>sorry</html>"
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        urls = [f"http://127.0.0.1:{server.server_port}{path}" for path in [*pages, "/gone.jpg"]]
        texts = [*(sample["txt"] for sample in made), "a caption"]
        here = SourceOptions(private=True)  # the server is on loopback
        (tmp_path / "p").mkdir()
        pq.write_table(pa.table({"url": urls, "text": texts}), tmp_path / "p" / "list.parquet")
        first = run(tmp_path / "p", tmp_path / "out", policy, max_failures=0.5, source_options=here)
        assert first.totals["failed_by_class"] == {"missing_image": 1, "read_error": 1}
        assert run(tmp_path / "p", tmp_path / "out", policy, source_options=here).rows_processed == 0
        troubled.clear()
        second = run(tmp_path / "p", tmp_path / "out", policy, retry_failed=True, max_failures=0.5, source_options=here)
        assert second.totals["failed_by_class"] == {"missing_image": 1}
        assert (second.version, second.totals["decided"]) == ("000002", 12)
        assert verify_run(second.out).problems == []
    finally:
        server.shutdown()
        server.server_close()
