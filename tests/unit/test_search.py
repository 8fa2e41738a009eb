"""Search over small runs of given vectors: positions, exact order, the index's life, damage, and what a query is."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from clipfilter.errors import RefusedError
from clipfilter.images.preprocess import PreprocessConfig
from clipfilter.search import RunVectors, Searcher, build_index, parse_where, query_vector, top_k
from clipfilter.search import approximate as approximate_module
from clipfilter.search.approximate import ApproximateIndex
from clipfilter.search.index import IndexUnusableError, Segment, latest_manifest
from clipfilter.storage import Directory, file_sha256
from tests.support.search import MODEL, unit, write_run

ROWS = {0: 2500, 1: 40, 2: 1200}


@pytest.fixture(scope="module")
def store() -> dict[int, np.ndarray]:
    return {number: unit(rows, seed=number) for number, rows in ROWS.items()}


@pytest.fixture(scope="module")
def run(store: dict[int, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of several record batches and row groups; tests must not change it."""
    columns = {"width": list(range(2500))}
    return write_run(tmp_path_factory.mktemp("search") / "run", store, columns=columns)


def nearest(store: dict[int, np.ndarray], query: np.ndarray, k: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Brute force in float64, ties by position."""
    cosines = np.concatenate([store[number] for number in sorted(store)]).astype(np.float64) @ query.astype(np.float64)
    if mask is not None:
        cosines[~mask] = -np.inf
    order = np.lexsort((np.arange(len(cosines)), -cosines))[:k]
    return order[cosines[order] > -np.inf]


def queries(count: int, dim: int = 32) -> np.ndarray:
    return unit(count, dim, seed=99).astype(np.float32)


def recall(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(found, wanted, strict=True)]))


class TestVectors:
    def test_blocks_are_the_stored_vectors_in_order_and_mapped(self, run: Path, store: dict[int, np.ndarray]) -> None:
        with RunVectors.open(str(run)) as vectors:
            blocks = list(vectors.blocks())
            assert vectors.rows == sum(ROWS.values())
            assert vectors.dim == 32
            assert [start for start, _ in blocks] == [0, 1000, 2000, 2500, 2540, 3540]
            np.testing.assert_array_equal(
                np.concatenate([block for _, block in blocks]), np.concatenate(list(store.values()))
            )
            assert not any(block.flags.writeable for _, block in blocks), "a copy, not the mapped file"

    def test_rows_come_in_the_order_asked_with_their_own_columns(self, run: Path) -> None:
        positions = [3739, 0, 2500, 699, 700, 2539, 0, 2540]
        with RunVectors.open(str(run)) as vectors:
            number, row = vectors.locate(positions)
            assert list(zip(number.tolist(), row.tolist(), strict=True)) == [
                (2, 1199), (0, 0), (1, 0), (0, 699), (0, 700), (1, 39), (0, 0), (2, 0),
            ]  # fmt: skip
            rows = vectors.rows_at(positions, ["width", "cf_key"])
            keys = [f"{n}-{r}" for n, r in zip(number.tolist(), row.tolist(), strict=True)]
            assert rows.column_names == ["width", "cf_key"]
            assert rows["cf_key"].to_pylist() == keys
            assert rows["width"].to_pylist() == row.tolist()
            assert vectors.rows_at([], ["cf_key"]).num_rows == 0
            all_vectors = np.concatenate([block for _, block in vectors.blocks()])
            np.testing.assert_array_equal(vectors.vectors_at(positions), all_vectors[positions])
            with pytest.raises(IndexError):
                vectors.locate([vectors.rows])
            with pytest.raises(RefusedError, match="did you mean 'cf_key'"):
                vectors.rows_at([0], ["cf_kye"])

    def test_a_uid_leads_to_its_position(self, run: Path) -> None:
        with RunVectors.open(str(run)) as vectors:
            assert vectors.uid_position("uid-2-7") == 2547
            assert vectors.uid_position("uid-9-9") is None

    def test_a_mask_holds_for_the_rows_of_the_condition(self, run: Path) -> None:
        with RunVectors.open(str(run)) as vectors:
            mask = vectors.mask(parse_where("width >= 30 and cf_key like '1-%'", vectors.schema))
        assert np.flatnonzero(mask).tolist() == list(range(2530, 2540))

    def test_many_shards_do_not_keep_their_files_open(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("clipfilter.runs.vectors._OPEN_FILES", 3)
        shards = {number: unit(5, seed=number) for number in range(12)}
        with RunVectors.open(str(write_run(tmp_path / "run", shards))) as vectors:
            for _ in range(2):
                found = np.concatenate([block for _, block in vectors.blocks()])
                assert len(vectors._open) == 3
        np.testing.assert_array_equal(found, np.concatenate(list(shards.values())))

    def test_an_older_version_can_be_opened(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", {0: unit(10), 1: unit(10, seed=1)})
        write_run(run, {1: unit(4, seed=2)}, generation=2)
        with RunVectors.open(str(run)) as new, RunVectors.open(str(run), version=1) as old:
            assert (old.rows, new.rows) == (20, 14)
            assert (old.version, new.version) == ("000001", "000002")
        for version, sentence in ((7, "has no version 7; it has 1, 2"), ("x", "versions are numbers")):
            with pytest.raises(RefusedError, match=sentence):
                RunVectors.open(str(run), version=version)

    def test_what_is_no_run_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(RefusedError, match=r"no plan\.json"):
            RunVectors.open(str(tmp_path))
        with pytest.raises(RefusedError, match="nothing to search"):
            RunVectors.open(str(write_run(tmp_path / "empty", {})))


class TestExact:
    @pytest.mark.parametrize("k", [1, 10, 4000])
    def test_the_order_is_that_of_float64(self, run: Path, store: dict[int, np.ndarray], k: int) -> None:
        with RunVectors.open(str(run)) as vectors:
            for query in queries(8):
                positions, cosines = top_k(vectors, query, k)
                np.testing.assert_array_equal(positions, nearest(store, query, k))
                assert positions.dtype == np.int64
                assert cosines.dtype == np.float32
                stored = vectors.vectors_at(positions).astype(np.float64) @ query.astype(np.float64)
                np.testing.assert_allclose(cosines, stored, atol=1e-6)

    def test_equal_rows_come_by_position_with_any_number_of_threads(self, tmp_path: Path) -> None:
        copies = np.repeat(unit(7), 300, axis=0)
        with RunVectors.open(str(write_run(tmp_path / "run", {0: copies, 1: copies[::-1].copy()}))) as vectors:
            query = copies[310].astype(np.float32)
            same = np.flatnonzero((np.concatenate([b for _, b in vectors.blocks()]) == copies[310]).all(axis=1))
            before = torch.get_num_threads()
            try:
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    np.testing.assert_array_equal(top_k(vectors, query, 450)[0], same[:450])
            finally:
                torch.set_num_threads(before)

    @pytest.mark.parametrize("share", [0.0, 0.003, 0.2, 0.6, 1.0])
    def test_only_rows_of_the_mask_are_found(self, run: Path, store: dict[int, np.ndarray], share: float) -> None:
        mask = np.random.default_rng(1).random(sum(ROWS.values())) < share
        with RunVectors.open(str(run)) as vectors:
            for query in queries(4):
                np.testing.assert_array_equal(top_k(vectors, query, 12, mask)[0], nearest(store, query, 12, mask))


class TestIndex:
    @pytest.fixture
    def indexed(self, store: dict[int, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A run with its index, where no mask is so narrow that it is searched exactly."""
        monkeypatch.setattr(approximate_module, "_FEW_ROWS", 10)
        run = write_run(tmp_path / "run", store)
        build_index(str(run))
        return run

    def test_it_finds_nearly_what_exact_search_finds_with_the_same_cosines(self, indexed: Path) -> None:
        with RunVectors.open(str(indexed)) as vectors:
            index = ApproximateIndex.open(vectors, str(indexed / "index"))
            assert index is not None
            assert index.rows == vectors.rows
            pairs = [(index.top_k(query, 10), top_k(vectors, query, 10)) for query in queries(60)]
            mask = np.random.default_rng(2).random(vectors.rows) < 0.5
            masked = [(index.top_k(query, 10, mask), top_k(vectors, query, 10, mask)) for query in queries(60)]
        for found in (pairs, masked):
            assert recall([a[0] for a, _ in found], [b[0] for _, b in found]) >= 0.95
            for (positions, cosines), (exact, their) in found:
                known = dict(zip(exact.tolist(), their.tolist(), strict=True))
                assert all(known.get(p, c) == c for p, c in zip(positions.tolist(), cosines.tolist(), strict=True))
        assert all(mask[a[0]].all() for a, _ in masked)

    def test_it_skips_most_rows(self, indexed: Path) -> None:
        """With one list probed, rows of other lists are not found: the lists are used at all."""
        with RunVectors.open(str(indexed)) as vectors:
            index = ApproximateIndex.open(vectors, str(indexed / "index"))
            assert index is not None
            found = [index.top_k(query, 300, probes=1)[0] for query in queries(20)]
        assert max(map(len, found)) < 300

    def test_a_new_shard_adds_one_segment_and_touches_no_other(self, indexed: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in (indexed / "index").rglob("*.arrow")}
        assert build_index(str(indexed)).manifest == 1, "nothing is new, so there is no new manifest"
        write_run(indexed, {3: unit(500, seed=3)})
        made = build_index(str(indexed))
        assert (made.manifest, made.rows, made.segments, made.segments_new, made.retrained) == (2, 4240, 4, 1, False)
        after = {path: path.stat().st_mtime_ns for path in (indexed / "index").rglob("*.arrow")}
        assert {path: after[path] for path in before} == before
        assert len(after) == len(before) + 1
        with Searcher(str(indexed)) as searcher:
            query = unit(500, seed=3)[123].astype(np.float32)
            assert searcher.notes == []
            assert searcher._index is not None
            assert searcher._index.top_k(query, 1)[0].tolist() == [3740 + 123]

    def test_superseded_rows_disappear(self, indexed: Path) -> None:
        gone, come = unit(1200, seed=2)[7], unit(900, seed=55)
        write_run(indexed, {2: come}, generation=2)
        for update in (False, True):
            if update:
                made = build_index(str(indexed))
                assert (made.segments_new, made.segments_dropped, made.rows) == (1, 1, 3440)
            with Searcher(str(indexed)) as searcher:
                vectors, index = searcher.vectors, searcher._index
                assert index is not None
                assert [("newer than the index" in note) for note in searcher.notes] == [True] * (not update)
                for query in (gone.astype(np.float32), come[4].astype(np.float32)):
                    positions, cosines = index.top_k(query, 5)
                    np.testing.assert_array_equal(positions[:1], top_k(vectors, query, 1)[0])
                    stored = np.vecdot(vectors.vectors_at(positions).astype(np.float64), query.astype(np.float64))
                    np.testing.assert_allclose(cosines, stored, atol=1e-6)

    def test_the_index_of_a_grown_run_is_trained_anew(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", {0: unit(200)})
        assert build_index(str(run)).lists == 32
        write_run(run, {1: unit(6000, seed=1)})
        made = build_index(str(run))
        assert (made.lists, made.segments_new, made.retrained) == (128, 2, True)

    @pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "manifest", "quantizer"])
    def test_a_damaged_index_is_noticed_and_left_out(self, indexed: Path, damage: str) -> None:
        folder = indexed / "index"
        victim = next((folder / "segments").glob("*.arrow"))
        if damage == "quantizer":
            victim = next(folder.glob("quantizer-*"))
        if damage == "manifest":
            victim = folder / "manifests" / "000001.json"
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 255
        if damage == "gone":
            victim.unlink()
        else:
            victim.write_bytes(data[: len(data) // 2] if damage in ("cut", "manifest") else data)
        with Searcher(str(indexed)) as searcher:
            assert searcher._index is None
            (note,) = searcher.notes
            assert note.startswith("searched without the index: ")
            assert "clipfilter index --rebuild" in note
        build_index(str(indexed), rebuild=True)
        with Searcher(str(indexed)) as searcher:
            assert searcher.notes == []
            assert searcher._index is not None

    @pytest.mark.parametrize("lie", ["list", "row", "unsorted", "columns", "rows"])
    def test_a_segment_that_lies_never_reaches_faiss(self, indexed: Path, lie: str) -> None:
        """Its hash fits its manifest, but it names what does not exist: out of bounds in faiss without the check."""
        number, manifest = latest_manifest(Directory(str(indexed / "index"))) or pytest.fail("no manifest")
        victim = manifest.segments[0]
        path = indexed / "index" / victim.name
        table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all()
        lists, rows = table["list"].to_numpy().copy(), table["row"].to_numpy().copy()
        if lie == "list":
            lists[-1] = 10**6
        elif lie == "unsorted":
            lists[:2] = [5, 0]
        elif lie == "row":
            rows[0] = rows[1]
        table = table.set_column(0, "list", pa.array(lists)).set_column(1, "row", pa.array(rows))
        if lie == "rows":
            table = table.slice(0, table.num_rows - 1).combine_chunks()
        if lie == "columns":
            table = table.drop_columns(["row"])
        with pa.OSFile(str(path), "wb") as handle, pa.ipc.new_file(handle, table.schema) as writer:
            writer.write_table(table)
        value = json.loads((indexed / "index/manifests/000001.json").read_text())
        value["segments"][0] |= {"sha256": file_sha256(path), "bytes": path.stat().st_size, "rows": table.num_rows}
        (indexed / "index/manifests/000002.json").write_text(json.dumps(value))
        assert number == 1
        with RunVectors.open(str(indexed)) as vectors, pytest.raises(IndexUnusableError, match="--rebuild"):
            ApproximateIndex.open(vectors, str(indexed / "index"))

    def test_a_manifest_leads_to_no_file_outside_of_the_index(self, indexed: Path, tmp_path: Path) -> None:
        value = json.loads((indexed / "index/manifests/000001.json").read_text())
        value["segments"][0]["name"] = "../../secret.arrow"
        (indexed / "index/manifests/000002.json").write_text(json.dumps(value))
        with pytest.raises(IndexUnusableError, match="damaged manifest"):
            latest_manifest(Directory(str(indexed / "index")))

    def test_another_model_is_refused(self, indexed: Path, tmp_path: Path) -> None:
        other = write_run(tmp_path / "other", {0: unit(100)}, model=MODEL | {"weights_sha256": "b" * 64})
        with pytest.raises(RefusedError, match=r"weights aaaaaaaaaaaa.*weights bbbbbbbbbbbb"):
            build_index(str(other), str(indexed / "index"))
        with Searcher(str(other), index=str(indexed / "index")) as searcher:
            assert searcher._index is None
            assert "not of this run's" in searcher.notes[0]

    def test_a_folder_that_is_no_index_is_left_alone(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "letter.txt").write_text("dear")
        with pytest.raises(RefusedError, match=r"other files \(letter\.txt\)"):
            build_index(str(run), str(tmp_path))
        with pytest.raises(RefusedError, match="there is no index in"):
            Searcher(str(run), index=str(tmp_path / "nothing"))

    def test_a_second_writer_of_a_manifest_does_not_overwrite_the_first(
        self, indexed: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_run(indexed, {3: unit(50, seed=3)})
        create = Directory.create
        first = (indexed / "index/manifests/000001.json").read_bytes()

        def beaten(directory: Directory, name: str, data: bytes) -> bool:
            if name == "manifests/000002.json":
                create(directory, name, first)
            return create(directory, name, data)

        monkeypatch.setattr(Directory, "create", beaten)
        assert build_index(str(indexed)).manifest == 3
        assert (indexed / "index/manifests/000002.json").read_bytes() == first


class _Encoder:
    """Texts and their vectors by hand; what the real ones do is tested with a real run (tests/integration)."""

    def __init__(self, **vectors: list[float]) -> None:
        self.vectors = vectors

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.array([self.vectors[text] for text in texts], np.float32)


class TestQuery:
    encoder: Any = _Encoder(right=[1.0, 0.0], up=[0.0, 1.0], diagonal=[0.8, 0.6])

    def test_texts_are_added_and_the_unwanted_taken_away(self) -> None:
        half = np.sqrt(0.5)
        np.testing.assert_allclose(query_vector(self.encoder, ["right", "up"]), [half, half], atol=1e-6)
        taken = query_vector(self.encoder, ["diagonal"], minus=["up"])
        np.testing.assert_allclose(taken, np.array([0.8, 0.1]) / np.hypot(0.8, 0.1), atol=1e-6)
        more = query_vector(self.encoder, ["diagonal"], minus=["up"], minus_weight=1.0)
        np.testing.assert_allclose(more, np.array([0.8, -0.4]) / np.hypot(0.8, 0.4), atol=1e-6)
        row = query_vector(None, vectors=np.array([[3.0, 4.0]], np.float16))
        np.testing.assert_allclose(row, [0.6, 0.8], atol=1e-6)
        assert row.dtype == np.float32

    @pytest.mark.parametrize(
        ("given", "sentence"),
        [
            ({}, "nothing to search for"),
            ({"minus": ["up"]}, "nothing to search for"),
            ({"text": [" "]}, "is empty"),
            ({"text": ["up"], "minus": ["up"], "minus_weight": 1.0}, "cancel out"),
            ({"image": [b"GIF89a broken"]}, "the image cannot be searched for"),
            ({"image": ["/nowhere/x.jpg"]}, "/nowhere/x.jpg cannot be searched for: there is no file"),
        ],
    )
    def test_what_is_no_query_is_refused(self, given: dict[str, Any], sentence: str) -> None:
        encoder: Any = _Encoder(up=[0.0, 1.0])
        encoder.preprocess = PreprocessConfig(32, (0.5,) * 3, (0.5,) * 3)
        with pytest.raises(RefusedError, match=sentence):
            query_vector(encoder, **given)


def test_a_row_is_not_its_own_neighbour(run: Path, store: dict[int, np.ndarray]) -> None:
    with Searcher(str(run)) as searcher:
        found = searcher.search(uid=["uid-0-17", "uid-2-3"], k=5, where="width < 1000", columns=["cf_key", "width"])
    assert found.method == "exact"
    assert found.matching == 1000 + 40 + 1000
    assert found.hits.column_names == ["rank", "cosine", "cf_key", "width"]
    assert not {"0-17", "2-3"} & set(found.hits["cf_key"].to_pylist())
    query = query_vector(None, vectors=np.stack([store[0][17], store[2][3]]))
    mask = np.concatenate([np.arange(rows) < 1000 for rows in ROWS.values()])
    expected = [p for p in nearest(store, query, 7, mask) if p not in (17, 2543)][:5]
    assert found.positions.tolist() == expected
    assert [hit["rank"] for hit in found.to_json()["hits"]] == [1, 2, 3, 4, 5]
    with Searcher(str(run)) as searcher, pytest.raises(RefusedError, match="no row whose cf_uid"):
        searcher.search(uid=["nobody"])


def test_segments_say_what_they_are(run: Path, tmp_path: Path) -> None:
    """The manifest names the commit of each segment, and every file in it has the sha256 that it says."""
    build_index(str(run), str(tmp_path / "index"))
    _, manifest = latest_manifest(Directory(str(tmp_path / "index"))) or pytest.fail("no manifest")
    with RunVectors.open(str(run)) as vectors:
        assert [segment.commit for segment in manifest.segments] == [shard.name for shard in vectors.shards]
    for file in (manifest.quantizer, *(asdict(segment) for segment in manifest.segments)):
        path = tmp_path / "index" / file["name"]
        assert file_sha256(path) == file["sha256"]
        assert file["sha256"][:16] in path.name
    assert isinstance(manifest.segments[0], Segment)
