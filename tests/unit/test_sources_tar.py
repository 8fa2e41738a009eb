"""The tar index: any order of members, damage anywhere, hostile names; compared with the webdataset library."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clipfilter.sources.tar import BLOCK, TarFile, TarIndex, Wanted, index_tar, is_image, split_name
from tests.support import sources as make

KINDS = ("jpg", "txt", "json")


def build(listed: list[tuple[str, bytes]], format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for name, data in listed:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def index(data: bytes, wanted: Wanted = Wanted()) -> TarIndex:
    return index_tar(lambda size, offset: data[offset : offset + size], len(data), wanted)


def rows(data: bytes) -> list[tuple[str, dict[str, bytes]]]:
    found = index(data)
    return [
        (found.keys[row], {m.extension: data[m.offset : m.offset + m.size] for m in found.members(row)})
        for row in range(len(found))
    ]


def payload(key: int, kind: str) -> bytes:
    return f"{kind} of {key} ".encode() * (40 * (key % 3) + (kind == "jpg") * 50 + 1)


@given(st.integers(1, 6), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_members_in_any_order_make_the_same_rows(count: int, random: object) -> None:
    listed = [(f"d/{key}.{kind}", payload(key, kind)) for key in range(count) for kind in KINDS]
    random.shuffle(listed)  # type: ignore[attr-defined]
    found = rows(build(listed))
    order = list(dict.fromkeys(name.partition(".")[0] for name, _ in listed))
    assert [key for key, _ in found] == order
    for key, held in found:
        assert held == {kind: payload(int(key[2:]), kind) for kind in KINDS}
    whole = index(build(listed))
    assert not whole.damaged
    assert (whole.bytes_unread, whole.duplicate_keys, whole.clashes) == (0, 0, 0)
    assert whole.seen.to_json()["passed"] == {}
    assert (whole.seen.rows, whole.seen.parts) == (count, 2 * count)


ADJACENT = [(f"{key:04d}.{kind}", payload(key, kind)) for key in range(6) for kind in KINDS]
WHOLE = build(ADJACENT)


@given(st.integers(0, len(WHOLE)))
@example(0)
@example(1)
@example(511)
@example(512)
@example(len(WHOLE) - 1)
@settings(max_examples=250, deadline=None)
def test_a_tar_cut_at_any_byte_gives_exactly_the_complete_rows(size: int) -> None:
    ends = {}
    offset = 0
    for name, data in ADJACENT:
        offset += BLOCK + len(data)
        ends[name] = offset
        offset += -len(data) % BLOCK
    complete = [key for key in range(6) if all(ends[f"{key:04d}.{kind}"] <= size for kind in KINDS)]
    started = [key for key in range(6) if ends[f"{key:04d}.jpg"] <= size]
    found = rows(WHOLE[:size])
    if not complete and started:  # nothing tells yet what a whole row has
        assert len(found) <= 1
        return
    assert [int(key) for key, _ in found] == complete
    for key, held in found:
        assert held == {kind: payload(int(key), kind) for kind in KINDS}
    cut = index(WHOLE[:size])
    assert cut.damaged == (size < offset + BLOCK)  # whole once the first closing block is there
    assert 0 <= cut.bytes_unread <= size


@given(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=40))
@settings(max_examples=120, deadline=None)
def test_garbage_anywhere_never_raises_and_never_invents_rows(place: int, garbage: bytes) -> None:
    spoiled = WHOLE[:place] + garbage + WHOLE[place + len(garbage) :]
    found = index(spoiled)
    assert len(found) <= 7
    for row in range(len(found)):
        for member in found.members(row):
            assert 0 <= member.start < member.offset <= member.offset + member.size <= len(spoiled)


@given(st.binary(max_size=4096))
@settings(max_examples=100, deadline=None)
def test_random_bytes_are_damage(data: bytes) -> None:
    found = index(data)
    assert len(found) == 0
    assert found.bytes_unread <= len(data)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b.c", "dir.x/a", "./a", "dir/sub/k", "UPPER", "sp ace", "é"]),
            st.sampled_from(["jpg", "JPG", "txt", "seg.png", "json", "cls"]),
        ),
        unique=True,
        max_size=12,
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT]),
)
@settings(max_examples=100, deadline=None)
def test_keys_and_extensions_are_webdatasets(names: list[tuple[str, str]], format: int) -> None:
    webdataset = pytest.importorskip("webdataset.tariterators")
    for stem, extension in names:
        name = f"{stem}.{extension}"
        theirs = webdataset.base_plus_ext(name)
        ours = split_name(name.encode())
        assert ours == (theirs[0].removeprefix("./"), theirs[1].lower())
    data = build([(f"{stem}.{extension}", b"x") for stem, extension in names], format)
    found = index(data)
    keys = {found.several.get(row, (key, ""))[0] for row, key in enumerate(found.keys)}
    assert keys <= {stem.removeprefix("./").partition(".")[0] for stem, _ in names} | {"dir.x/a"}


def test_rows_are_those_of_the_webdataset_library(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    path = make.write_webdataset(tmp_path / "a.tar", make.samples(20))
    theirs = [
        (sample["__key__"], sample["jpg"], sample["txt"], sample["json"])
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    ours = [(key, held["jpg"], held["txt"], held["json"]) for key, held in rows(path.read_bytes())]
    assert ours == theirs


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_strange_names(format: int, tmp_path: Path) -> None:
    names = ["x" * 120 + ".jpg", "d" * 90 + "/" + "e" * 90 + ".jpg", "ünïcode-" + "é" * 99 + ".jpg", "a\nb.jpg"]
    data = build([(name, name.encode()) for name in names], format)
    (tmp_path / "a.tar").write_bytes(data)
    tar = TarFile(os.open(tmp_path / "a.tar", os.O_RDONLY), len(data))
    found = tar.index
    assert found.keys == [name[:-4] for name in names]
    for row, name in enumerate(names):
        image = found.image(row)
        assert image is not None
        assert data[image.offset : image.offset + image.size] == name.encode()
        assert tar.name(image) == name.encode()


def test_a_long_name_in_ustars_prefix_field() -> None:
    name = "folder/" * 12 + "a" * 60 + ".jpg"
    assert index(build([(name, b"x")], tarfile.USTAR_FORMAT)).keys == [name[:-4]]


def test_a_key_that_occurs_again_is_another_row_and_nothing_is_overwritten() -> None:
    data = build(
        [("k.jpg", b"1"), ("k.txt", b"one"), ("o.jpg", b"o"), ("k.jpg", b"2"), ("k.txt", b"two"), ("k.txt", b"3")]
    )
    assert rows(data) == [
        ("k", {"jpg": b"1", "txt": b"one"}),
        ("o", {"jpg": b"o"}),
        ("k", {"jpg": b"2", "txt": b"two"}),
    ]
    found = index(data)
    assert list(found.occurrences) == [1, 1, 2]
    assert found.duplicate_keys == 1
    assert found.clashes == 1  # the third text belongs to no image


#: Members of one key (or of names with further dots), the rows they make, and what those have beside their picture.
SEVERAL: dict[str, tuple[str, dict[str, str]]] = {
    "two formats": ("k.png k.jpg k.txt", {"k.png": "txt", "k.jpg": "txt"}),
    "upper case": ("k.PNG k.Jpg k.TXT", {"k.png": "txt", "k.jpg": "txt"}),
    "dots in names": (
        "i_1.5x_0.jpg i_1.5x_0.txt i_1.5x_1.jpg i_1.5x_1.txt i_1.5x_2.jpg i_1.5x_3.txt",
        {"i_1.5x_0.jpg": "txt", "i_1.5x_1.jpg": "txt", "i_1.5x_2.jpg": ""},
    ),
    "dots, captions first": ("i_1.b.txt i_1.a.txt i_1.a.jpg i_1.b.jpg", {"i_1.a.jpg": "txt", "i_1.b.jpg": "txt"}),
    "a depth map behind": ("k.jpg k.txt k.depth.png", {"k": "txt", "k.depth.png": "txt"}),
    "a depth map before": ("k.depth.png k.json k.jpg", {"k.depth.png": "json", "k": "json"}),
    "masks alone": ("k.mask.png k.seg.png k.cls", {"k.mask.png": "cls", "k.seg.png": "cls"}),
    "only a depth map": ("k.depth.png k.txt", {"k": "txt"}),
    "one text of another name": (
        "k.left.jpg k.right.jpg k.about.json",
        {"k.left.jpg": "about.json", "k.right.jpg": "about.json"},
    ),
    "nearer texts": ("k.jpg k.txt k.seg.png k.seg.txt k.json", {"k": "txt json", "k.seg.png": "txt json"}),
    "texts of whole names": ("k.a.jpg k.a.jpg.json k.b.jpg k.b.jpg.json", {"k.a.jpg": "json", "k.b.jpg": "json"}),
    "a folder with dots": ("./v1.0/k.jpg ./v1.0/k.png", {"v1.0/k.jpg": "", "v1.0/k.png": ""}),
    "numbers of several": ("k.0.npy k.0.jpg k.1.npy k.1.jpg", {"k.0.jpg": "npy", "k.1.jpg": "npy"}),
    "no extension": ("k k.txt", {"k": "txt"}),
    "no extension and one": ("k k.png", {"k": "", "k.png": ""}),
    "unknown extensions": ("k.img k.txt k.bin", {"k.img": "txt", "k.bin": "txt"}),
    "the same twice": ("k.jpg k.png k.jpg k.txt", {"k.jpg": "", "k.png": "", "k": "txt"}),
}
PICTURES = ("jpg", "png", "img", "bin", "k")


def listed_bytes(names: str) -> list[tuple[str, bytes]]:
    """Members whose content is told by their name; what is a picture begins as one."""
    begin = b"\xff\xd8\xff"
    return [
        (name, (begin if name.lower().endswith(PICTURES) else b"") + f"{place} {name}".encode())
        for place, name in enumerate(names.split())
    ]


@pytest.mark.parametrize("case", SEVERAL)
def test_of_several_pictures_under_one_key_each_is_a_row_with_what_belongs_to_it(case: str) -> None:
    names, expected = SEVERAL[case]
    listed = listed_bytes(names)
    data = build(listed)
    found = index(data)
    assert (
        dict(
            zip(
                found.keys,
                [
                    " ".join(m.extension for m in found.members(row) if m != beside(found, row))
                    for row in range(len(found))
                ],
                strict=True,
            )
        )
        == expected
    )
    pictures = {data[m.offset : m.offset + m.size] for row in range(len(found)) if (m := found.image(row))}
    assert pictures == {content for _, content in listed if content[:1] == b"\xff"}
    assert found.seen.things == len(listed)


def beside(found: TarIndex, row: int) -> object:
    image = found.image(row)
    return next((m for m in found.members(row) if image is not None and m.start == image.start), None)


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ("k.depth.png k.jpg k.txt", "1 k.jpg"),
        ("k.png k.jpg", "0 k.png"),
        ("k.a.jpg k.a.txt k.b.jpg k.b.txt", "0 k.a.jpg"),
    ],
)
def test_the_first_picture_is_the_plain_one_and_the_others_are_passed_over(names: str, taken: str) -> None:
    data = build(listed_bytes(names))
    found = index(data, Wanted(pictures="first"))
    assert found.keys == ["k"]
    image = found.image(0)
    assert image is not None
    assert data[image.offset : image.offset + image.size].endswith(taken.encode())
    assert sum(is_image(member.extension) for member in found.members(0)) == 1
    assert found.clashes == found.seen.passed["other_picture"] == 1
    assert found.seen.things == len(names.split())


def test_a_named_extension_is_the_picture_and_no_other_goes_with_it() -> None:
    found = index(build(listed_bytes("k.jpg k.mask.png k.txt k.raw")), Wanted("mask.png"))
    assert found.keys == ["k"]
    assert [member.extension for member in found.members(0)] == ["mask.png", "txt", "raw"]
    assert found.seen.examples == {"other_picture": ["k.jpg"]}


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "d.x/a", "./a"]),
            st.sampled_from(
                [
                    "",
                    ".jpg",
                    ".JPG",
                    ".png",
                    ".x.jpg",
                    ".x.txt",
                    ".y.png",
                    ".txt",
                    ".json",
                    ".x.json",
                    ".npy",
                    ".pkl",
                    ".svg",
                    ".bin",
                ]
            ),
        ),
        max_size=14,
    ),
    st.sampled_from([Wanted(), Wanted(pictures="first"), Wanted("png"), Wanted("x.jpg")]),
    st.integers(0, 20_000),
)
@settings(max_examples=300, deadline=None)
def test_every_member_is_accounted_for_and_no_picture_is_in_two_rows(
    names: list[tuple[str, str]], wanted: Wanted, keep: int
) -> None:
    listed = listed_bytes(" ".join(stem + extension for stem, extension in names))
    data = build(listed)
    found = index(data, wanted)
    assert found.seen.things == len(listed)
    assert found.seen.rows == len(found)
    pictures = [m.start for row in range(len(found)) if (m := found.image(row))]
    assert len(set(pictures)) == len(pictures)
    for row in range(len(found)):  # beside its own picture a row has no other
        others = [m for m in found.members(row) if m != beside(found, row)]
        assert not any(data[m.offset : m.offset + 3] == b"\xff\xd8\xff" for m in others)
    assert len(set(zip(found.keys, found.occurrences, strict=True))) == len(found)
    if wanted == Wanted():
        assert len(pictures) == sum(content[:1] == b"\xff" for _, content in listed)
    cut = index(data[:keep], wanted)
    assert cut.seen.rows == len(cut) <= len(found)


def test_a_key_without_image_is_a_row_whose_image_is_missing() -> None:
    found = index(build([("a.jpg", b"x"), ("b.txt", b"caption"), ("c.npy", b"numbers"), ("noextension", b"x")]))
    assert found.keys == ["a", "b"]
    assert found.image(1) is None
    assert (found.seen.rows, found.seen.parts) == (2, 0)  # the row without a picture is its caption
    assert found.seen.examples == {"unknown_type": ["c.npy", "noextension"]}


def test_links_devices_hidden_files_and_pickles_are_passed_over_and_counted() -> None:
    def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        return info

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(special("folder", tarfile.DIRTYPE))
        tar.addfile(special("evil.jpg", tarfile.SYMTYPE, "/etc/passwd"))
        tar.addfile(special("hard.jpg", tarfile.LNKTYPE, "a.jpg"))
        tar.addfile(special("null.jpg", tarfile.CHRTYPE))
        tar.addfile(special("pipe.jpg", tarfile.FIFOTYPE))
        for name in ("._a.jpg", "__MACOSX/b.jpg", "p.pkl", "../../up.jpg", "/abs.jpg", "a.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    found = index(buffer.getvalue())
    assert found.keys == ["../../up", "abs", "a"]
    assert found.seen.passed == {"not_a_file": 4, "hidden": 2, "pickle": 1}
    assert not found.damaged


def test_sparse_members_are_skipped_in_step() -> None:
    # Old GNU sparse: type S, with one extension block of the hole map before the data.
    header = bytearray(tarfile.TarInfo("s.jpg").tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[124:136] = b"%011o\0" % 600
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data = bytes(header) + bytes(512) + b"d" * 600 + bytes(424) + build([("a.jpg", b"x")])
    found = index(data)
    assert found.keys == ["a"]
    assert found.seen.passed == {"not_a_file": 1}


def test_archives_put_end_to_end_are_read_through() -> None:
    data = build([("a.jpg", b"1")]) + build([("b.jpg", b"2")])
    found = index(data)
    assert found.keys == ["a", "b"]
    assert not found.damaged


def test_a_tar_without_end_marker_is_reported() -> None:
    data = build([("a.jpg", b"1")])[: 2 * BLOCK]
    found = index(data)
    assert found.keys == ["a"]
    assert (found.damaged, found.bytes_unread) == (True, 0)


def test_base256_and_negative_sizes() -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    for size, damaged in ((b"\x80" + bytes(10) + b"\x03", False), (b"\xff" * 12, True), (b"\x80" + b"\xff" * 11, True)):
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        found = index(bytes(header) + b"abc" + bytes(509 + 1024))
        assert found.damaged is damaged
        assert len(found) == (0 if damaged else 1)


def test_interleaved_members_cut_in_the_middle_leave_only_whole_rows() -> None:
    listed = [(f"{key}.jpg", b"x" * 700) for key in range(4)] + [(f"{key}.txt", b"t") for key in range(4)]
    data = build(listed)
    after_second_text = 4 * (BLOCK + 1024) + 2 * 2 * BLOCK
    assert [key for key, _ in rows(data[:after_second_text])] == ["0", "1"]


def test_the_index_of_many_members_stays_small() -> None:
    import tracemalloc

    count = 8000
    block = tarfile.TarInfo("000000000.jpg").tobuf(tarfile.GNU_FORMAT)
    headers = bytearray()
    for number in range(count):
        info = tarfile.TarInfo(f"{number // 2:09d}.{'jpg' if number % 2 else f'{number}.txt'}")
        headers += info.tobuf(tarfile.GNU_FORMAT) if number < 800 else block
        if number >= 800:
            headers[-512:-499] = f"{number:09d}.jpg".encode()
            headers[-364:-356] = b" " * 8
            headers[-364:-356] = b"%06o\0 " % sum(headers[-512:])
    data = bytes(headers) + bytes(1024)
    tracemalloc.start()
    found = index(data)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 7600
    assert held < 200 * count
    assert peak < 600 * count
