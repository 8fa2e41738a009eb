"""DataComp's baselines against a row-by-row reading of their source, on metadata with ties and awkward captions."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clipfilter.curation import datacomp
from clipfilter.curation.wordnet import WordNet
from clipfilter.errors import RefusedError
from clipfilter.operations.reshard import reshard
from tests.support.sources import write_webdataset

ROWS = 200_000
WORDS = np.array(["a", "photo", "of", "dogs", "cats", "running", "geese", "ran", "the", "sky", "women", "Tabby", "x"])
CAPTIONS = 4000


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Three files of DataComp's metadata, 200 000 rows in all, float16 scores stored as float32, and npz beside."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("metadata")
    texts = [" ".join(rng.choice(WORDS, rng.integers(0, 6))) for _ in range(CAPTIONS)]
    texts += ["one\ntwo three", "a\tb\tc d", "line\n", "ab cd", "abcde", "abcdef", "\u00a0dog\u00a0x y", "  ", "é è ê"]
    columns: dict[str, Any] = {
        "uid": [f"{a:016x}{b:016x}" for a, b in rng.integers(0, 2**63, (ROWS, 2), dtype=np.uint64)],
        "text": [texts[i] for i in rng.integers(0, len(texts), ROWS)],
        "original_width": rng.integers(150, 900, ROWS).astype(np.int32),
        "original_height": rng.choice([199, 200, 201, 250, 600], ROWS).astype(np.int32),
        "language": rng.choice(["en", "de", "fr"], ROWS, p=[0.7, 0.2, 0.1]),
        "clip_b32_similarity_score": rng.normal(0.24, 0.05, ROWS).astype(np.float16).astype(np.float32),
        "clip_l14_similarity_score": rng.normal(0.2, 0.05, ROWS).astype(np.float16).astype(np.float32),
    }
    columns["uid"][5] = columns["uid"][4]  # duplicates are legal
    emb = rng.standard_normal((ROWS, 16)).astype(np.float16)
    for number, (start, stop) in enumerate([(0, 70_000), (70_000, 70_001), (70_001, ROWS)]):
        part = {name: values[start:stop] for name, values in columns.items()}
        pq.write_table(pa.table(part), folder / f"{number:04d}.parquet", row_group_size=9_999)
        np.savez(folder / f"{number:04d}.npz", l14_img=emb[start:stop], b32_img=emb[start:stop, :4])
    np.save(folder / "centroids.npy", rng.standard_normal((50, 16)).astype(np.float32))
    np.save(folder / "target.npy", rng.standard_normal((30, 16)).astype(np.float16))
    _write_wordnet(folder / "dict")
    (folder / "ids.txt").write_text("n00000010\nn00000030\nn00000077\n")
    return folder, columns | {"emb": emb}


def _write_wordnet(folder: Path) -> None:
    """A tiny database in WordNet's own format: dog 10 20, run (verb) 30, goose 40, woman 77, tabby 50 (adj)."""
    folder.mkdir()
    licence = "  1 This software and database is being provided to you\n"
    index = {
        "noun": ["dog n 2 1 @ 2 1 00000010 00000020", "goose n 1 0 1 0 00000040", "woman n 1 0 1 1 00000077"],
        "verb": ["run v 1 0 1 1 00000030", "dog v 1 0 1 0 00000099"],
        "adj": ["tabby a 1 0 1 0 00000050"],
        "adv": [],
    }
    for part, lines in index.items():
        (folder / f"index.{part}").write_text(licence + "".join(line + "  \n" for line in lines))
        exceptions = {"noun": "geese goose\n", "verb": "ran run\nrunning run\n"}.get(part, "")
        (folder / f"{part}.exc").write_text(exceptions)


def fasttext_tokens(text: str) -> int:
    """Dictionary::readWord of fastText, character by character: a line break ends a word and is a token itself."""
    count, inside = 0, False
    for character in text:
        if character in " \n\r\t\v\f\0":
            count += inside
            inside = False
            count += character == "\n"
        else:
            inside = True
    return count + inside


SYNSETS = {"dog": 10, "dogs": 10, "running": 30, "geese": 40, "ran": 30, "women": 77, "tabby": 50}


def straightforward(name: str, columns: dict[str, Any], folder: Path, **options: Any) -> list[tuple[int, int]]:
    """The kept uids, row by row as baselines/apply_filter.py reads, from all columns in memory."""
    centroids, target = np.load(folder / "centroids.npy"), np.load(folder / "target.npy")
    wanted = {int(np.argmax(row.astype(np.float64) @ centroids.T)) for row in target}
    nearest = np.argmax(columns["emb"].astype(np.float64) @ centroids.T.astype(np.float64), axis=1)
    score = columns["clip_l14_similarity_score"]
    threshold = options.get("threshold", 0.3)
    if "fraction" in options:
        threshold = -np.sort(-score)[int(len(score) * options["fraction"])]
    kept = []
    for row in range(ROWS):
        text, english = columns["text"][row], columns["language"][row] == "en"
        width, height = int(columns["original_width"][row]), int(columns["original_height"][row])
        shorter, longer = min(width, height), max(width, height)
        if name == "basic":
            keep = english and len(text.split()) > 2 and len(text) > 5 and shorter >= 200 and longer / shorter <= 3.0
        elif name == "clip-score":
            keep = score[row] >= threshold
        elif name == "laion2b":
            keep = english and columns["clip_b32_similarity_score"][row] >= 0.28
        elif name == "image-based":
            keep = english and fasttext_tokens(text) > 1 and len(text) > 5 and int(nearest[row]) in wanted
        else:
            keep = english and any(SYNSETS.get(w.lower()) in (10, 30, 77) for w in text.split())
        if keep:
            kept.append((int(columns["uid"][row][:16], 16), int(columns["uid"][row][16:], 16)))
    return sorted(kept)


CASES: list[tuple[list[str], dict[str, Any]]] = [
    (["basic"], {}),
    (["clip-score"], {"threshold": 0.25}),
    (["clip-score"], {"fraction": 0.3}),
    (["laion2b"], {}),
    (["image-based"], {}),
    (["text-based"], {}),
    (["image-based", "clip-score"], {"fraction": 0.3}),
]


@pytest.mark.parametrize(("names", "options"), CASES, ids=lambda value: str(value))
def test_kept_uids_equal_a_straightforward_reading(
    metadata: tuple[Path, dict[str, Any]], names: list[str], options: dict[str, Any]
) -> None:
    folder, columns = metadata
    files = {name: str(folder / f"{name}.npy") for name in ("centroids", "target")}
    baselines = datacomp.make_baselines(
        names, str(folder), **files, wordnet=str(folder / "dict"), entities=str(folder / "ids.txt"), **options
    )
    found = datacomp.select(str(folder), baselines)
    parts = [straightforward(name, columns, folder, **options) for name in names]
    expected = parts[0] if len(parts) == 1 else sorted(set(parts[0]) & set(parts[1]))
    assert found.rows == ROWS
    assert found.uids.dtype == np.dtype("u8,u8")
    assert 0 < len(expected) < ROWS
    assert found.uids.tolist() == expected


def test_without_baselines_every_uid_stays_and_repeated_ones_too(metadata: tuple[Path, dict[str, Any]]) -> None:
    folder, columns = metadata
    found = datacomp.select(str(folder), [])
    assert len(found.uids) == ROWS
    assert found.uids.tolist() == sorted((int(u[:16], 16), int(u[16:], 16)) for u in columns["uid"])


def test_a_missing_language_column_is_filled_from_the_text(tmp_path: Path) -> None:
    texts = ["a dog runs over the green lawn", "ein Hund läuft über die grüne Wiese", None, "the sky is\nblue today"]
    size = pa.array([300] * 4, pa.int32())
    table = pa.table({"uid": [f"{n:032x}" for n in range(4)], "text": texts, "original_width": size})
    pq.write_table(table.append_column("original_height", size), tmp_path / "0.parquet")
    found = datacomp.select(str(tmp_path), datacomp.make_baselines(["basic"], str(tmp_path)))
    assert found.uids.tolist() == [(0, 0), (0, 3)]


def test_wordnet_is_read_as_nltk_does(metadata: tuple[Path, dict[str, Any]]) -> None:
    wordnet = WordNet(str(metadata[0] / "dict"))
    assert {w: wordnet.first_synset(w) for w in ("dogs", "Dog", "geese", "running", "women", "tabby", "sky")} == {
        "dogs": 10, "Dog": 10, "geese": 40, "running": 30, "women": 77, "tabby": 50, "sky": None,
    }  # fmt: skip


def test_bad_input_is_refused_in_a_sentence(metadata: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = str(metadata[0])
    for names, options, words in (
        (["image-based"], {}, "--centroids"),
        (["text-based"], {}, "--wordnet"),
        (["clip-score"], {"threshold": 0.3, "fraction": 0.3}, "not both"),
        (["clip-score"], {"fraction": 0.0}, "fraction"),
    ):
        with pytest.raises(RefusedError, match=words):
            datacomp.make_baselines(names, folder, **options)
    with pytest.raises(RefusedError, match="holds no"):
        datacomp.select(str(tmp_path), [])
    pq.write_table(pa.table({"uid": ["not hex"]}), tmp_path / "0.parquet")
    with pytest.raises(RefusedError, match="32 hex"):
        datacomp.select(str(tmp_path), [])
    with pytest.raises(RefusedError, match="no column"):
        datacomp.select(str(tmp_path), datacomp.make_baselines(["basic"], str(tmp_path)))
    pickled = tmp_path / "evil.npy"
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(RefusedError, match="read safely"):
        datacomp.make_baselines(["image-based"], folder, centroids=str(pickled), target=str(pickled))


def test_reshard_writes_the_subset_as_datacomp_does(tmp_path: Path) -> None:
    uids = [f"{n * 7919:032x}" for n in range(25)]
    for shard in range(2):
        rows = [
            {
                "__key__": f"{shard:04d}{n:04d}",
                "jpg": f"image {shard} {n}".encode(),
                "json": {"uid": uids[shard * 12 + n]},
            }
            for n in range(12)
        ]
        rows.append({"__key__": f"none{shard}", "jpg": b"x", "json": {"caption": "no uid"}})
        write_webdataset(tmp_path / "in" / f"{shard:08d}.tar", rows)
        (tmp_path / "in" / f"{shard:08d}_stats.json").write_text(json.dumps({"successes": 13 + shard}))
    chosen = [1, 3, 3, 5, 13, 14, 20, 24]  # 3 twice; 24 is in no tar
    subset = np.array([(int(uids[n][:16], 16), int(uids[n][16:], 16)) for n in chosen], np.dtype("u8,u8"))
    np.save(tmp_path / "subset.npy", np.sort(subset))
    for _ in range(2):  # a second call finds the same
        result = reshard(str(tmp_path / "in"), str(tmp_path / "subset.npy"), str(tmp_path / "out"), rows_per_shard=3)
    assert (result.read, result.written, result.tars) == (26, 7, 3)
    assert sum("no json with a uid" in p for p in result.problems) == 2
    assert any("should have 14 rows, 13 were found" in p for p in result.problems)
    found = []
    for number, size in enumerate([3, 3, 1]):
        with tarfile.open(tmp_path / "out" / f"{number:08d}.tar") as tar:
            found += [(m.name, tar.extractfile(m).read()) for m in tar if m.name.endswith(".jpg")]  # type: ignore[union-attr]
        stats = json.loads((tmp_path / "out" / f"{number:08d}_stats.json").read_text())
        assert stats["successes"] == size
    expected = [(1, 0), (3, 0), (3, 1), (5, 0), (13, 0), (14, 0), (20, 0)]
    assert found == [(f"{uids[n]}-{j}.jpg", f"image {n // 12} {n % 12}".encode()) for n, j in expected]
    assert json.loads((tmp_path / "out" / "sizes.json").read_text()) == {
        "00000000.tar": 3, "00000001.tar": 3, "00000002.tar": 1,
    }  # fmt: skip
    np.save(tmp_path / "unsorted.npy", subset[::-1])
    with pytest.raises(RefusedError, match="not sorted"):
        reshard(str(tmp_path / "in"), str(tmp_path / "unsorted.npy"), str(tmp_path / "out2"))
    with pytest.raises(RefusedError, match="another command"):
        reshard(str(tmp_path / "in"), str(tmp_path / "subset.npy"), str(tmp_path / "out"), rows_per_shard=4)
