"""Caption tables as people have them: dialects, encodings, spellings of names, COCO, LLaVA; what is not clear is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clipfilter.sources import SourceOptions, open_source
from clipfilter.sources.model import ReadStats
from clipfilter.sources.names import PathIndex, meant, spelled
from clipfilter.sources.tables import Table
from tests.support import sources as make
from tests.support.sources import read_rows, read_shard

Captions = dict[str, list[str] | None]


def write(root: Path, files: dict[str, Any]) -> Path:
    """Pictures under their names (a list under ""), and tables: text, or bytes in an encoding of their own."""
    for number, name in enumerate(files.pop("")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(make.jpeg(number, (16, 12)))
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, (str, bytes)) else json.dumps(content)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def read(root: Path, options: SourceOptions | None = None) -> tuple[Captions, ReadStats]:
    source = open_source(str(root), options)
    (shard,) = source.iter_shards()
    rows, stats = read_shard(source, shard)
    assert source.has_captions == any(row["cf_captions"] for row in rows)
    return {row["cf_key"]: row["cf_captions"] for row in rows}, stats


COCO = {
    "info": {"year": 2017},
    "licenses": [{"id": 4, "name": "x"}],
    "images": [{"id": k, "file_name": f"{k:06d}.jpg", "height": 12, "width": 16} for k in range(2)],
    "annotations": [
        {"image_id": k, "id": 9 - k * 3 - j, "caption": f"view {k}-{j}"} for j in range(2) for k in range(2)
    ],
}
TALK = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "a boat"},
    {"from": "human", "value": "Where?"},
    {"from": "gpt", "value": "at sea"},
]
CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "a boat"}]},
]

CASES: dict[str, tuple[dict[str, Any], Captions]] = {
    "excel": (
        {
            "": ["Img/0.JPG", "Img/1.JPG"],
            "metadata.csv": "\ufefffile_name;text\r\nImg\\0.JPG;eins, zwei\r\n./img/1.jpg;zwei\r\n",
        },
        {"Img/0.JPG": ["eins, zwei"], "Img/1.JPG": ["zwei"]},
    ),
    "excel says which": (
        {"": ["0.jpg"], "a.csv": "sep=;\r\nimage;text\r\n0.jpg;one, two\r\n"},
        {"0.jpg": ["one, two"]},
    ),
    "unicode text of excel": (
        {"": ["0.jpg"], "a.csv": "file\ttext\r\n0.jpg\t\u00e9t\u00e9\r\n".encode("utf-16")},
        {"0.jpg": ["\u00e9t\u00e9"]},
    ),
    "utf-16 without a mark": (
        {"": ["0.jpg"], "a.tsv": "file\ttext\n0.jpg\t\u00e9t\u00e9\n".encode("utf-16-be")},
        {"0.jpg": ["\u00e9t\u00e9"]},
    ),
    "windows": (
        {"": ["0.jpg", "1.jpg"], "a.csv": "file,text\n0.jpg,caf\u00e9 \u201cx\u201d\n1.jpg,b\n".encode("cp1252")},
        {"0.jpg": ["caf\u00e9 \u201cx\u201d"], "1.jpg": ["b"]},
    ),
    "windows in json lines": (
        {"": ["0.jpg"], "a.jsonl": '{"image": "0.jpg", "text": "caf\u00e9"}\n'.encode("latin-1")},
        {"0.jpg": ["caf\u00e9"]},
    ),
    "tabs in a csv": (
        {"": ["i/0.jpg", "i/1.jpg"], "a.csv": 'filepath\ttitle\ni/0.jpg\ta "view", 0\ni/1.jpg\t"1\n'},
        {"i/0.jpg": ['a "view", 0'], "i/1.jpg": ['"1']},
    ),
    "a quote that is only a letter": (
        {"": ["0.jpg", "1.jpg"], "a.tsv": 'path\ttext\n0.jpg\t"Hello" he said\n1.jpg\tb\n'},
        {"0.jpg": ['"Hello" he said'], "1.jpg": ["b"]},
    ),
    "a quote that is never closed": (
        {"": ["0.jpg", "1.jpg", "2.jpg"], "a.csv": 'path,text\n0.jpg,"one\n1.jpg,two\n2.jpg,three\n'},
        {"0.jpg": ['"one'], "1.jpg": ["two"], "2.jpg": ["three"]},
    ),
    "lines and commas in quotes": (
        {"": ["0.jpg"], "a.csv": 'path,text\n0.jpg,"one, ""two""\nthree, four"\n'},
        {"0.jpg": ['one, "two"\nthree, four']},
    ),
    "commas that nobody quoted": (
        {"": ["0.jpg"], "a.csv": "path,text\n0.jpg,one, two, three\n"},
        {"0.jpg": ["one, two, three"]},
    ),
    "no header": (
        {"": ["0.jpg", "1.jpg"], "list.csv": "0.jpg,a view\n1.jpg,another\n"},
        {"0.jpg": ["a view"], "1.jpg": ["another"]},
    ),
    "header as people write it": (
        {"": ["0.jpg"], "a.csv": "No;Image File;Caption Text;TEXT\n1;0.jpg;;a view\n"},
        {"0.jpg": ["a view"]},
    ),
    "flickr8k": (
        {
            "": ["Images/1.jpg", "Images/2.jpg"],
            "text/Flickr8k.token.txt": '1.jpg#0\ta b .\n1.jpg#1\tc "d\n2.jpg#0\te\n',
            "text/readme.txt": "x",
        },
        {"Images/1.jpg": ["a b .", 'c "d'], "Images/2.jpg": ["e"]},
    ),
    "flickr30k": (
        {
            "": ["im/1.jpg"],
            "results.csv": "image_name| comment_number| comment\n1.jpg| 0| Two men , one | x .\n1.jpg| 1| Men .\n",
        },
        {"im/1.jpg": ["Two men , one | x .", "Men ."]},
    ),
    "kaggle": (
        {"": ["Images/1.jpg"], "captions.txt": "image,caption\n1.jpg,a dog , a cat .\n1.jpg,two\n"},
        {"Images/1.jpg": ["a dog , a cat .", "two"]},
    ),
    "coco": (
        {"": ["val/000000.jpg", "val/000001.jpg"], "annotations/captions_val.json": COCO},
        {"val/000000.jpg": ["view 0-0", "view 0-1"], "val/000001.jpg": ["view 1-0", "view 1-1"]},
    ),
    "coco's boxes beside": (
        {
            "": ["val/000000.jpg"],
            "annotations/captions_val.json": COCO,
            "annotations/boxes.json": {
                "images": COCO["images"],
                "annotations": [{"image_id": 0, "bbox": [1, 2, 3, 4]}],
            },
        },
        {"val/000000.jpg": ["view 0-0", "view 0-1"]},
    ),
    "coco's results": (
        {"": ["val/000139.jpg"], "captions.json": [{"image_id": 139, "caption": "a"}]},
        {"val/000139.jpg": ["a"]},
    ),
    "karpathy": (
        {
            "": ["val/1.jpg"],
            "dataset.json": {
                "dataset": "x",
                "images": [{"filename": "1.jpg", "sentences": [{"raw": "a"}, {"raw": "b"}]}],
            },
        },
        {"val/1.jpg": ["a", "b"]},
    ),
    "llava": (
        {
            "": ["i/1.jpg", "i/2.jpg"],
            "llava.json": [{"id": "1", "image": "i/1.jpg", "conversations": TALK}, {"id": "2", "conversations": TALK}],
        },
        {"i/1.jpg": ["a boat", "at sea"], "i/2.jpg": None},
    ),
    "chat": (
        {"": ["i/1.jpg"], "chat.jsonl": {"images": [{"path": "i/1.jpg"}], "messages": CHAT}},
        {"i/1.jpg": ["a boat"]},
    ),
    "lists of images": (
        {"": ["i/1.jpg", "i/2.jpg"], "d.jsonl": {"text": "both", "images": ["i/1.jpg", "i/2.jpg"]}},
        {"i/1.jpg": ["both"], "i/2.jpg": ["both"]},
    ),
    "a map": (
        {"": ["i/1.jpg", "i/2.jpg"], "captions.json": {"i/1.jpg": "ant", "i/2.jpg": ["bee", "cow"]}},
        {"i/1.jpg": ["ant"], "i/2.jpg": ["bee", "cow"]},
    ),
    "json lines called json": (
        {
            "": ["1.jpg", "2.jpg"],
            "d.json": '{"file_name": "1.jpg", "text": "ant"}\n{"file_name": "2.jpg", "text": "bee"}\n',
        },
        {"1.jpg": ["ant"], "2.jpg": ["bee"]},
    ),
    "a list called json lines": (
        {"": ["1.jpg"], "d.jsonl": '[\n {"file_name": "1.jpg", "text": "a"}\n]'},
        {"1.jpg": ["a"]},
    ),
    "paths of another machine": (
        {
            "": ["i/1.jpg", "i/2.jpg", "i/3.jpg"],
            "d.csv": "path,text\n/home/me/i/1.jpg,ant\nC:\\data\\i\\2.jpg,bee\nhttps://x.org/d/i/3.jpg?w=5,cow\n",
        },
        {"i/1.jpg": ["ant"], "i/2.jpg": ["bee"], "i/3.jpg": ["cow"]},
    ),
    "accents in two spellings": (
        {"": ["caf\u0065\u0301.jpg"], "d.csv": "file,text\ncaf\u00e9.jpg,a\n"},
        {"caf\u0065\u0301.jpg": ["a"]},
    ),
    "zeros that a spreadsheet dropped": (
        {"": ["0001.jpg", "0010.jpg"], "d.csv": "id,text\n1,ant\n10,bee\n"},
        {"0001.jpg": ["ant"], "0010.jpg": ["bee"]},
    ),
    "the nearest table first": (
        {
            "": ["t/1.jpg"],
            "t/metadata.csv": "file_name,text\n1.jpg,near\n",
            "metadata.csv": "file_name,text,n\nt/1.jpg,far,1\n",
        },
        {"t/1.jpg": ["near"]},
    ),
    "labels here, captions there": (
        {"": ["1.jpg"], "labels.csv": "file_name,class\n1.jpg,cat\n", "z.csv": "file,text\n1.jpg,a\n"},
        {"1.jpg": ["a"]},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_captions_arrive(tmp_path: Path, name: str) -> None:
    files, wanted = CASES[name]
    captions, stats = read(write(tmp_path, dict(files)))
    assert captions == wanted
    assert sum(stats.seen.captions.values()) == sum(1 for texts in wanted.values() if texts)
    assert not stats.seen.not_read


def test_what_could_mean_several_pictures_is_said_and_never_guessed(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "": ["a/1.jpg", "b/1.jpg", "a/2.jpg", "a/x.jpg", "b/x.png", "3.jpg", "c/3.jpg"],
            "metadata.csv": "file_name,text\n1.jpg,which?\n2,sure\nx,which?\n3.jpg,the one here\nb/4.jpg,gone\n/p/7.jpg,\n",
        },
    )
    captions, stats = read(tmp_path)
    assert {key: value for key, value in captions.items() if value} == {"a/2.jpg": ["sure"], "3.jpg": ["the one here"]}
    assert stats.seen.captions == {"metadata.csv": 2}
    assert stats.seen.not_read == {"metadata.csv": "its name 1.jpg fits a/1.jpg and b/1.jpg"}


def test_names_behind_different_prefixes_do_not_share_a_picture(tmp_path: Path) -> None:
    write(tmp_path, {"": ["1.jpg", "2.jpg"], "d.csv": "path,text\n/train/1.jpg,a\n/test/1.jpg,b\n/test/2.jpg,c\n"})
    captions, stats = read(tmp_path)
    assert captions == {"1.jpg": None, "2.jpg": ["c"]}
    assert stats.seen.not_read == {"d.csv": "its names train/1.jpg and test/1.jpg both fit 1.jpg"}


def test_tables_that_are_not_read_say_why(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "": ["1.jpg"],
            "metadata.csv": "file_name,text\n1.jpg,a\n",
            "notes.csv": "date,remark\n2020,x\n",
            "broken.json": '[{"image": "1.jpg", "caption"',
            "empty.jsonl": "",
            "config.json": {"a": [1, 2], "b": {"c": 1}},
            "half.jsonl": '{"image": "1.jpg", "text": "b"}\n{"image": \n',
            "other.csv": "id,text\n77,x\n",
        },
    )
    captions, stats = read(tmp_path)
    assert captions == {"1.jpg": ["a"]}
    assert stats.seen.captions == {"metadata.csv": 1, "half.jsonl": 0, "other.csv": 0}
    reasons = stats.seen.not_read
    assert reasons.pop("broken.json").startswith("it cannot be parsed as JSON: ")
    assert reasons == {
        "notes.csv": "no column names a picture",
        "empty.jsonl": "it is empty",
        "config.json": "no field names a picture",
        "half.jsonl": "1 of its lines cannot be parsed",
    }


def test_a_table_beside_changes_the_shards_etag(tmp_path: Path) -> None:
    write(tmp_path, {"": ["val/000000.jpg"], "annotations/captions_val.json": COCO})
    source = open_source(str(tmp_path))
    (before,) = source.iter_shards()
    write(tmp_path, {"": [], "annotations/captions_val.json": {**COCO, "annotations": []}})
    (after,) = source.iter_shards()
    assert (before.id, before.etag == after.etag) == (after.id, False)


@pytest.mark.parametrize("name", CASES)
def test_copies_are_tables_of_the_same_kind_with_the_lines_of_what_was_copied(tmp_path: Path, name: str) -> None:
    files, wanted = CASES[name]
    source = open_source(str(write(tmp_path / "in", dict(files))))
    (shard,) = source.iter_shards()
    last = list(wanted)[-1]
    source.copy_rows(shard, [len(wanted) - 1], tmp_path / "out")
    (row,) = read_rows(open_source(str(tmp_path / "out")))
    assert (row["cf_key"], row["cf_captions"]) == (last, wanted[last])
    others = [
        text for key, texts in wanted.items() if key != last for text in texts or [] if text not in (wanted[last] or [])
    ]
    copied = [
        Table(str(tmp_path / "out"), str(path.relative_to(tmp_path / "out")))
        for path in (tmp_path / "out").rglob("*")
        if path.suffix in (".csv", ".tsv", ".txt", ".json", ".jsonl")
    ]
    said = json.dumps([table.sample(len(table)) for table in copied])
    assert not [text for text in others if json.dumps(text)[1:-1] in said]


def test_lines_are_copied_as_they_are(tmp_path: Path) -> None:
    text = '\ufefffile_name;text\r\nImg\\0.JPG;"eins; zwei"\r\nImg/1.JPG;b\r\n'
    write(tmp_path / "in", {"": ["Img/0.JPG", "Img/1.JPG"], "metadata.csv": text})
    source = open_source(str(tmp_path / "in"))
    source.copy_rows(next(source.iter_shards()), [0], tmp_path / "out")
    assert (tmp_path / "out" / "metadata.csv").read_bytes().decode() == text[: text.index("Img/1")]
    coco = {**COCO, "images": COCO["images"][:1], "annotations": [a for a in COCO["annotations"] if not a["image_id"]]}  # type: ignore[index]
    write(tmp_path / "coco", {"": ["val/000000.jpg", "val/000001.jpg"], "annotations/captions_val.json": COCO})
    source = open_source(str(tmp_path / "coco"))
    source.copy_rows(next(source.iter_shards()), [0], tmp_path / "less")
    assert json.loads((tmp_path / "less" / "annotations" / "captions_val.json").read_text()) == coco


@pytest.mark.parametrize("name", [name for name in CASES if len(CASES[name][1]) > 1])
def test_nothing_of_a_picture_is_in_the_copy_of_the_others(tmp_path: Path, name: str) -> None:
    files, wanted = CASES[name]
    source = open_source(str(write(tmp_path / "in", dict(files))))
    first, *others = wanted
    source.copy_rows(next(source.iter_shards()), range(1, len(wanted)), tmp_path / "out")
    left = b"".join(
        path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.suffix.lower() != ".jpg" and path.is_file()
    )
    shared = [text for key in others for text in wanted[key] or []]
    for text in [first.rpartition("/")[2], *(wanted[first] or [])]:
        assert text in shared or text.encode() not in left
    copied = read_rows(open_source(str(tmp_path / "out")))
    assert {row["cf_key"]: row["cf_captions"] for row in copied} == {key: wanted[key] for key in others}
    for column in ("images", "image", "file_name"):
        assert not any(first in (row.get(column) or "") for row in copied)


def test_a_name_means_the_picture_it_fits_best() -> None:
    pictures = PathIndex(["a/1.jpg", "A/1.JPG", "b/a/1.jpg", "b/2.png", "b/2.jpg", "3.jpg", "c/03.jpg", "d/image.jpg"])
    for name, wanted in {
        "a/1.jpg": ["a/1.jpg"],
        "A/1.JPG": ["A/1.JPG"],
        "b/a/1.jpg": ["b/a/1.jpg"],
        "1.jpg": ["a/1.jpg", "b/a/1.jpg"],
        "/x/y/a/1.jpg": ["a/1.jpg"],
        "x/b/a/1.jpg": ["b/a/1.jpg"],
        "2": ["b/2.png", "b/2.jpg"],
        "2.png": ["b/2.png"],
        "2.gif": [],
        "e/3.jpg": ["3.jpg"],
        "c/3": ["c/03.jpg"],
        "IMAGE": ["d/image.jpg"],
        "e/image.jpg": [],
    }.items():
        assert meant(spelled(name), pictures) == wanted, name


def test_many_pictures_of_one_name_cost_no_more() -> None:
    """A million questions of a thousand paths each would take minutes."""
    pictures = PathIndex(f"{number:06d}/image.jpg" for number in range(100_000))
    assert meant("099999/image.jpg", pictures) == ["099999/image.jpg"]
    assert all(len(pictures.alike(f"/data/{number:06d}/IMAGE.JPG")) == 1 for number in range(0, 100_000, 100))
    assert len(pictures.alike("image.jpg")) == 100
