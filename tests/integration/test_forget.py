"""Forgetting is proven: every byte is searched, in every kind of source, and a receipt holds until something changes."""

from __future__ import annotations

import base64
import gzip
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clipfilter.curation.dedup import DedupOptions, find_duplicates
from clipfilter.engine.job import JobRequest, run_job
from clipfilter.errors import RefusedError
from clipfilter.operations.export import export_run
from clipfilter.operations.forget import Forgotten, forget_rows
from clipfilter.operations.receipt import check_receipt, read_receipt
from clipfilter.operations.traces import Search, Traces
from clipfilter.operations.verify import verify_run
from clipfilter.report import jpeg_of, write_report
from clipfilter.runs import Run
from tests.support.engine import cli, policy_file, samples
from tests.support.sources import write_image_folder, write_parquet, write_webdataset

pytestmark = pytest.mark.integration

KEEP = "{policy: p, version: 1, rules: [{id: sim, alignment: {}, reject: {below: -0.9}}]}"
ROWS = 6


def pictures() -> list[dict[str, Any]]:
    """Rows whose key, caption and uid nothing else holds."""
    made = samples(ROWS)
    for number, sample in enumerate(made):
        sample["__key__"] = f"portrait-{number:04d}"
        sample["txt"] = f'the "{number * 7919}th" visitor <of> the house'
        sample["json"] = {"uid": f"{number + 0xABCDEF00:032x}", "note": f"met on the {number}th of May, naïve & glad"}
    return made


def grep(folder: Path, *needles: str) -> list[str]:
    """Files whose name or bytes hold one of the texts, unpacked as far as it goes: what a person would search by hand."""
    found = []
    for path in sorted(item for item in folder.rglob("*") if item.is_file()):
        data = path.read_bytes() + path.relative_to(folder).as_posix().encode()
        if path.suffix == ".parquet":
            for name in pq.read_schema(path).names:
                for chunk in pq.read_table(path, columns=[name])[name].chunks:
                    words = chunk.dictionary if pa.types.is_dictionary(chunk.type) else chunk
                    data += b"\n".join(
                        each if isinstance(each, bytes) else str(each).encode() for each in words.to_pylist()
                    )
        if any(needle.encode() in data for needle in needles):
            found.append(path.relative_to(folder).as_posix())
    return found


def forget(run: Path, row: dict[str, Any], **options: Any) -> Forgotten:
    uids = run.parent / "uids.txt"
    uids.write_text(row["cf_uid"])
    return forget_rows(str(run), str(uids), **options)


def rows_of(run: Path) -> list[dict[str, Any]]:
    opened = Run.open(str(run))
    return [row for _, batch in opened.batches() for row in batch.to_pylist()]


def loose_folder(folder: Path) -> None:
    """Pictures that a table names without folder or ending; one line says of a picture what it says of another, too."""
    made = pictures()
    for sample in made:
        place = folder / f"people/{sample['__key__']}.jpg"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(sample["jpg"])
    names = ("{0}", "{0}.jpg", "people/{0}.jpg", "./people/{0}.jpg", "people/{0}", "{0}")
    lines = [
        name.format(made[n]["__key__"]) + f',"{made[n]["txt"].replace(chr(34), chr(34) * 2)}"'
        for n, name in enumerate(names)
    ]
    (folder / "metadata.csv").write_text("file_name,text\n" + "\n".join(lines) + "\n")


def make(kind: str, folder: Path) -> None:
    if kind == "tar":
        write_webdataset(folder / "a.tar", pictures())
    elif kind == "parquet":
        write_parquet(folder / "a.parquet", pictures(), image_column="image")
    elif kind == "dictionary":
        rows = pictures()
        table = {
            "image": [row["jpg"] for row in rows],
            "uid": pa.array([row["json"]["uid"] for row in rows]).dictionary_encode(),
            "caption": pa.array([row["txt"] for row in rows]).dictionary_encode(),
        }
        folder.mkdir()
        pq.write_table(pa.table(table), folder / "a.parquet")
    elif kind == "folder":
        write_image_folder(folder, pictures())
    elif kind == "jsonl":
        write_image_folder(folder, pictures(), captions="txt")
        lines = [{"images": [f"{row['__key__']}.jpg"], "text": row["txt"], **row["json"]} for row in pictures()]
        (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        loose_folder(folder)


@pytest.mark.parametrize("kind", ["tar", "parquet", "dictionary", "folder", "loose", "jsonl"])
def test_nothing_of_a_row_is_left_in_any_byte(kind: str, tmp_path: Path) -> None:
    make(kind, tmp_path / "source")
    run = tmp_path / "run"
    source = tmp_path / "source" / ("a.jsonl" if kind == "jsonl" else "")
    run_job(JobRequest("run", str(source), str(run), policy=policy_file(tmp_path, KEEP), engine="local"))
    write_report(str(run))
    before = rows_of(run)
    assert len(before) == ROWS
    assert all(row["cf_decision"] == "keep" and row["cf_caption"] for row in before)
    for row in (before[0], before[4]):
        words = [row["cf_uid"], row["cf_caption"], row["cf_sha256"]]
        words += [Path(row["cf_key"]).stem] if kind in ("tar", "folder", "loose") else []
        words += [row["images"]] if kind == "jsonl" else []
        assert grep(run, *words)
        done = forget(run, row)
        assert done.left == []
        assert done.files > 5
        assert grep(run, *words) == []
        assert verify_run(str(run)).problems == []
        receipt = read_receipt(done.receipt)
        assert not any(word in json.dumps(receipt, ensure_ascii=False) for word in words)
        assert check_receipt(Run.open(str(run)), receipt, "the receipt") == []
    assert [row["cf_uid"] for row in rows_of(run)] == [before[n]["cf_uid"] for n in (1, 2, 3, 5)]
    copies = export_run(str(run), str(tmp_path / "export"))
    assert copies["rows"] == ROWS - 2
    assert len(list((run / "receipts").iterdir())) == 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make("tar", folder / "source")
    run_job(
        JobRequest("run", str(folder / "source"), str(folder / "run"), policy=policy_file(folder, KEEP), engine="local")
    )
    return folder


@pytest.fixture
def fresh(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "all")
    return tmp_path / "all/run"


def test_a_receipt_shows_every_later_change(fresh: Path) -> None:
    row = rows_of(fresh)[2]
    gone = {path: path.read_bytes() for path in fresh.rglob("*") if path.is_file()}
    done = forget(fresh, row, receipt=str(fresh.parent / "receipt.json"))
    assert done.receipt == str(fresh.parent / "receipt.json")
    receipt = read_receipt(done.receipt)

    def problems() -> str:
        return "\n".join(check_receipt(Run.open(str(fresh)), read_receipt(done.receipt), "the receipt"))

    assert problems() == ""
    for change in ({"time": "2001"}, {"rows": []}, {"removed": {}}, {"files": {}}, {"left": [1]}, {"sha256": "0" * 64}):
        Path(done.receipt).write_text(json.dumps(receipt | change))
        assert "was changed" in problems()
    Path(done.receipt).write_text(json.dumps({"format": 1}))
    with pytest.raises(RefusedError, match="lacks the key"):
        problems()
    Path(done.receipt).write_text(json.dumps(receipt))

    copy = next(iter((fresh / "kept").iterdir()))
    for name in ("plan.json", next(iter(fresh.glob("commits/*"))).relative_to(fresh), copy.relative_to(fresh)):
        data = (fresh / name).read_bytes()
        (fresh / name).write_bytes(data + b"\n")
        assert f"{name} is not what it was" in problems()
        (fresh / name).write_bytes(data)
    copy.rename(fresh.parent / copy.name)
    assert f"{copy.relative_to(fresh)} is gone" in problems()
    (fresh.parent / copy.name).rename(copy)
    assert problems() == ""
    for path in [
        path for path in gone if not path.exists() and path.parent.name in ("annotated", "kept", "commits", "versions")
    ]:
        path.write_bytes(gone[path])
        assert f"{path.relative_to(fresh)} is back" in problems()
        assert any("is back" in problem for problem in verify_run(str(fresh)).problems)
        path.unlink()
    assert verify_run(str(fresh)).problems == []
    # The source still has the row: a run of it that is put in this one's place is seen.
    old = next(path for path in gone if path.parent.name == "annotated")
    new = next((fresh / "annotated").iterdir())
    new.write_bytes(gone[old])
    assert "holds 1 rows that were forgotten" in problems()


def test_what_lies_in_the_run_and_elsewhere_is_searched_and_named(fresh: Path) -> None:
    """Packed, escaped, as a picture made of the picture, in names of files; what other rows have too is left to them."""
    row, picture = rows_of(fresh)[3], pictures()[3]["jpg"]
    thumbnail = jpeg_of(picture, blurred=True)
    assert thumbnail is not None
    caption, key = row["cf_caption"], row["cf_key"]
    elsewhere = fresh.parent / "elsewhere"
    elsewhere.mkdir()
    hidden = {
        "page.html": b'<img src="data:image/jpeg;base64,' + base64.b64encode(thumbnail) + b'">',
        "copy.bin": picture,
        "notes.json": json.dumps({"said": caption}).encode(),
        "caption.html": b"<p>the &#34;23757th&#34; visitor &lt;of&gt; the house</p>",
        "log.gz": gzip.compress(b"x" * 100 + f" {key} ".encode()),
        "deep.zip": zipped({"inner.tar.gz": gzip.compress(tarred({"a.txt": caption.encode()}))}),
        "name.zip": zipped({f"{key}.jpg": b"another picture"}),
        f"{key}.txt": b"nothing inside",
        "subset.npy": bytes.fromhex(row["cf_uid"])[7::-1] + bytes.fromhex(row["cf_uid"])[:7:-1],
    }
    for name, data in hidden.items():
        (elsewhere / name).write_bytes(data)
    (elsewhere / "harmless.txt").write_text(f"a{key} {key}0 {row['cf_uid'][:-1]} the visitor")
    (elsewhere / "broken.gz").write_bytes(gzip.compress(b"cut off" * 1000)[:-9])
    (fresh / "sheet.html").write_text(caption)
    (fresh / "kept/left-behind").write_text(caption)
    (fresh / ".tmp-stranger").mkdir()
    (fresh / ".tmp-stranger/part").write_text(row["cf_uid"])

    def thumbnails(data: bytes) -> list[bytes]:
        made = jpeg_of(data, blurred=True)
        return [] if made is None else [made]

    done = forget(fresh, row, also=[str(elsewhere)], thumbnails=thumbnails)
    named = {Path(place.split(" ")[0]).name for place in done.left}
    assert named == {*hidden, "broken.gz", "sheet.html", "part"}
    assert not (fresh / "kept/left-behind").exists()
    receipt = read_receipt(done.receipt)
    assert len(receipt["left"]) == len(named)
    assert not any(word in json.dumps(receipt, ensure_ascii=False) for word in (key, caption, row["cf_uid"]))
    assert any("something was left" in problem for problem in verify_run(str(fresh)).problems)
    with pytest.raises(RefusedError, match="nothing is there"):
        forget(fresh, row, also=[str(elsewhere / "nowhere")])


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def test_runs_and_exports_made_from_it_are_named(fresh: Path, tmp_path: Path) -> None:
    """Beside the run or far from it, and the run that it was made from; those without the row are not."""
    row = rows_of(fresh)[1]
    policy = str(fresh.parent / "policy.yaml")
    far, unique, export = tmp_path / "far/away/filter", fresh.parent / "unique", tmp_path / "other/export"
    run_job(JobRequest("filter", str(fresh), str(far), policy=policy, engine="local"))
    find_duplicates(str(fresh), str(unique), DedupOptions(semantic=0.9))
    export.parent.mkdir()
    export_run(str(far), str(export))
    notes = "\n".join(forget(fresh, row).notes)
    assert f"{far} was made from this run" in notes
    assert f"{unique} was made from this run" in notes
    assert str(export) not in notes  # made from the filter, which is named
    notes = "\n".join(forget(far, row).notes)
    assert f"{export} was made from this run" in notes
    assert "a run that this one was made from" not in notes  # there it is forgotten already
    forget(unique, row)
    assert "was made from" not in "\n".join(forget(fresh, row).notes)


def test_duplicates_of_a_forgotten_row_do_not_name_it(tmp_path: Path) -> None:
    made = pictures()
    made[5]["jpg"] = made[0]["jpg"]
    write_webdataset(tmp_path / "source/a.tar", made)
    run_job(JobRequest("embed", str(tmp_path / "source"), str(tmp_path / "run"), engine="local"))
    find_duplicates(str(tmp_path / "run"), str(tmp_path / "unique"), DedupOptions())
    before = {row["cf_uid"]: row for row in rows_of(tmp_path / "unique")}
    copy = next(row for row in before.values() if row["cf_duplicate_of"])
    keeper = before[copy["cf_duplicate_of"]]
    assert {copy["cf_key"], keeper["cf_key"]} == {"portrait-0000", "portrait-0005"}
    done = forget(tmp_path / "unique", keeper)
    assert (done.rows, done.left) == (1, [])
    assert grep(tmp_path / "unique", keeper["cf_uid"], keeper["cf_caption"]) == []
    after = {row["cf_uid"]: row for row in rows_of(tmp_path / "unique")}
    assert after[copy["cf_uid"]] == copy | {"cf_duplicate_of": None}


def test_a_row_that_moved_in_the_listing_is_the_one_that_goes(tmp_path: Path) -> None:
    """A picture added in front gives the others new numbers: the numbers of an older generation say nothing of the newer."""
    made = pictures()
    write_image_folder(tmp_path / "source", made[1:])
    run, policy = tmp_path / "run", policy_file(tmp_path, KEEP)
    arguments = ("run", str(tmp_path / "source"), "--policy", policy, "--out", str(run), "-q")
    assert cli(*arguments).returncode == 0
    older = rows_of(run)
    Path(tmp_path / "source/a-new-one.jpg").write_bytes(made[0]["jpg"])
    assert cli(*arguments).returncode == 0
    assert len(rows_of(run)) == ROWS
    assert forget(run, older[2]).rows == 1
    left = [row["cf_uid"] for row in rows_of(run)]
    assert len(left) == ROWS - 1
    assert {row["cf_uid"] for row in older} - set(left) == {older[2]["cf_uid"]}


def test_the_command_forgets_proves_and_says_what_is_left(fresh: Path) -> None:
    row = rows_of(fresh)[0]
    uids = fresh.parent / "uids.txt"
    uids.write_text(row["cf_uid"])
    labels = fresh.parent / "labels.csv"
    labels.write_text(f"cf_uid,label\n{row['cf_uid']},1\n")
    done = cli("forget", str(fresh), "--uids", str(uids), "--also", str(labels), check=False)
    assert done.returncode == 3
    assert "1 rows forgotten" in done.stdout
    assert f"left: {labels} still holds a uid of a forgotten row" in done.stderr
    labels.unlink()
    again = cli(
        "forget", str(fresh), "--uids", str(uids), "--receipt", str(fresh.parent / "r.json"), "--json", check=False
    )
    assert again.returncode == 0
    assert json.loads(again.stdout)["rows"] == 0
    proof = cli("forget", str(fresh), "--check", str(fresh.parent / "r.json"), check=False)
    assert (proof.returncode, proof.stdout[:3]) == (0, "ok ")
    (fresh / "plan.json").write_bytes((fresh / "plan.json").read_bytes() + b" ")
    proof = cli("forget", str(fresh), "--check", str(fresh.parent / "r.json"), check=False)
    assert proof.returncode == 1
    assert "plan.json is not what it was" in proof.stdout
    both = cli("forget", str(fresh), "--uids", str(uids), "--check", str(fresh.parent / "r.json"), check=False)
    assert both.returncode == 2
    assert "one of them" in both.stderr


def test_what_is_shared_or_too_short_is_not_taken_for_a_trace() -> None:
    traces = Traces()
    traces.add(pa.table({"cf_uid": ["7"], "cf_key": ["b/0001"], "cf_caption": ["a cat"], "cf_sha256": [None]}))
    assert traces.too_short() == 2  # the uid, and the key without its folder
    search = Search(traces)
    assert search.file(io.BytesIO(b"0001 7 a catalogue")).found == set()
    assert search.file(io.BytesIO(b"x" * (8 << 20) + b" a cat")).found == {"caption"}
    assert search.file(io.BytesIO(b"x" * ((8 << 20) - 3) + b" a cat " + b"x" * 99)).found == {"caption"}
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    assert search.file(image).found == set()
