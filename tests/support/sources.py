"""Small datasets in every format clipfilter reads, written as the tools of the field write them."""

from __future__ import annotations

import bz2
import csv
import functools
import gzip
import hashlib
import io
import json
import lzma
import random
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from clipfilter.sources import ReadStats, Shard, Source

Sample = dict[str, Any]  # "__key__", then one entry per member: "jpg": bytes, "txt": str, "json": dict, ...

WORDS = ("a", "photo", "of", "red", "green", "small", "large", "dog", "cat", "car", "boat", "tree", "house", "river")


@functools.lru_cache(maxsize=4096)
def jpeg(seed: int = 0, size: tuple[int, int] = (96, 72), quality: int = 85, format: str = "JPEG") -> bytes:
    """A small photographic-looking image (smooth colour fields, edges, some grain); `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    width, height = size
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    y, x = np.mgrid[:height, :width]
    disc = ((x - rng.integers(0, width)) ** 2 + (y - rng.integers(0, height)) ** 2) < (min(size) / 4) ** 2
    smooth = np.where(disc[..., None], rng.integers(0, 256, 3), smooth)
    grain = rng.integers(-6, 7, (height, width, 1))
    picture = Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, format, **({"quality": quality} if format in ("JPEG", "WEBP") else {}))
    return buffer.getvalue()


def caption(seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=7))


def uid(seed: int) -> str:
    return hashlib.md5(str(seed).encode()).hexdigest()


def samples(
    count: int, *, start: int = 0, captions: bool = True, fields: bool = True, size: tuple[int, int] = (96, 72)
) -> list[Sample]:
    """`count` distinct samples: `__key__`, `jpg`, and unless switched off `txt` and `json` (caption, url, uid, ...)."""
    made = []
    for number in range(start, start + count):
        sample: Sample = {"__key__": f"{number:09d}", "jpg": jpeg(number, size)}
        if captions:
            sample["txt"] = caption(number)
        if fields:
            sample["json"] = {
                "caption": caption(number) if captions else None,
                "url": f"https://example.org/{number}.jpg",
                "uid": uid(number),
                "original_width": size[0],
                "original_height": size[1],
                "score": number / 7,
            }
        made.append(sample)
    return made


def encode(value: Any) -> bytes:
    """A member's bytes: text as UTF-8, anything but text and bytes as JSON."""
    if isinstance(value, bytes):
        return value
    return (value if isinstance(value, str) else json.dumps(value, indent=4)).encode()


def members(made: Iterable[Sample]) -> list[tuple[str, bytes]]:
    """(name, bytes) of every member, sample by sample, in the order of each sample's entries."""
    return [
        (f"{sample['__key__']}.{extension}", encode(value))
        for sample in made
        for extension, value in sample.items()
        if extension != "__key__"
    ]


def write_members(
    path: Path, listed: Iterable[tuple[str, bytes] | tarfile.TarInfo], format: int = tarfile.GNU_FORMAT
) -> Path:
    """A tar with these members in this order (names may repeat); a TarInfo stands for a link, device or folder.

    A name ending in .gz, .tgz, .bz2, .xz or .zst gives a zipped tar.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for item in listed:
            if isinstance(item, tarfile.TarInfo):
                tar.addfile(item)
                continue
            info = tarfile.TarInfo(item[0])
            info.size = len(item[1])
            info.mode = 0o444
            tar.addfile(info, io.BytesIO(item[1]))
    data = buffer.getvalue()
    zipped = {".gz": gzip.compress, ".tgz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}
    path.write_bytes(zipped.get(path.suffix, bytes)(data))
    return path


def _zstd(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)  # type: ignore[no-any-return]


def write_webdataset(path: Path, made: Iterable[Sample], format: int = tarfile.GNU_FORMAT) -> Path:
    """A webdataset tar, members of a sample adjacent."""
    return write_members(path, members(made), format)


def write_parquet(
    path: Path,
    made: Sequence[Sample],
    *,
    image_column: str = "image",
    style: Literal["bytes", "struct", "path", "url"] = "bytes",
    row_group_size: int = 100,
    extra: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
    compression: str = "snappy",
) -> Path:
    """A Parquet file: the image as bytes, as Hugging Face's struct<bytes, path>, or by name (`path`: files in `images/`
    beside it are written too; `url`: the sample's `url` entry), plus `caption`, the fields of `json`, and `extra`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, Any] = {}
    if style == "bytes":
        columns[image_column] = pa.array([sample["jpg"] for sample in made], pa.binary())
    elif style == "struct":
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        columns[image_column] = pa.array(
            [{"bytes": sample["jpg"], "path": f"{sample['__key__']}.jpg"} for sample in made], kind
        )
    elif style == "path":
        (path.parent / "images").mkdir(exist_ok=True)
        for sample in made:
            (path.parent / "images" / f"{sample['__key__']}.jpg").write_bytes(sample["jpg"])
        columns[image_column] = [f"images/{sample['__key__']}.jpg" for sample in made]
    else:
        columns[image_column] = [sample["url"] for sample in made]
    if any("txt" in sample for sample in made):
        columns["caption"] = [sample.get("txt") for sample in made]
    for name in dict.fromkeys(field for sample in made for field in sample.get("json", {})):
        columns.setdefault(name, [sample.get("json", {}).get(name) for sample in made])
    columns.update(extra or {})
    table = pa.table(columns)
    if metadata:
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=row_group_size, compression=compression)
    return path


def write_image_folder(
    root: Path,
    made: Sequence[Sample],
    *,
    captions: Literal["txt", "json", "csv", "tsv", "jsonl"] | None = "txt",
    folders: Sequence[str] = ("",),
    table: str = "metadata",
) -> Path:
    """Image files, spread over `folders` in turn, with captions in files beside them or in one table in the root."""
    root = Path(root)
    rows = []
    for number, sample in enumerate(made):
        folder = folders[number % len(folders)]
        name = f"{folder}/{sample['__key__']}.jpg".lstrip("/")
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(sample["jpg"])
        if captions == "txt" and "txt" in sample:
            target.with_suffix(".txt").write_text(sample["txt"])
        if captions == "json":
            target.with_suffix(".json").write_text(json.dumps(sample["json"]))
        rows.append({"file_name": name, "text": sample.get("txt"), "rating": number})
    if captions == "jsonl":
        (root / f"{table}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif captions in ("csv", "tsv"):
        with open(root / f"{table}.{captions}", "w", newline="") as handle:
            writer = csv.DictWriter(handle, rows[0], delimiter="," if captions == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    return root


def write_img2dataset(
    root: Path,
    made: Sequence[Sample],
    failures: int = 0,
    format: Literal["webdataset", "parquet", "files"] = "webdataset",
    *,
    shard: int = 0,
    unfinished: bool = False,
    sidecar: bool = True,
    encode_format: str = "jpg",
) -> Path:
    """One shard of img2dataset's output, with `failures` rows that could not be downloaded among the others.

    As the tool does it: rows in completion order (shuffled), the sidecar in row groups of 100, `_stats.json` last
    (left out when `unfinished`), keys of the shard number and the row number.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    name = f"{shard:05d}"
    rows: list[tuple[dict[str, Any], bytes | None]] = []
    for number, sample in enumerate([*made, *[None] * failures]):
        fields = {
            "caption": sample.get("txt") if sample else caption(10_000 + number),
            "url": f"https://example.org/{number}.jpg",
            "uid": uid(shard * 100_000 + number),
            "key": f"{shard:05d}{number:04d}",
            "status": "success" if sample else "failed_to_download",
            "error_message": None if sample else "HTTP Error 404: Not Found",
            "width": 96 if sample else None,
            "height": 72 if sample else None,
            "original_width": 640 if sample else None,
            "original_height": 480 if sample else None,
            "exif": "{}" if sample else None,
            "sha256": hashlib.sha256(sample["jpg"]).hexdigest() if sample else None,
        }
        rows.append((fields, sample["jpg"] if sample else None))
    random.Random(shard).shuffle(rows)
    schema = pa.schema(
        [pa.field(field, pa.int32() if "width" in field or "height" in field else pa.string()) for field in rows[0][0]]
    )
    table = pa.Table.from_pylist([fields for fields, _ in rows], schema)
    done = [(fields, data) for fields, data in rows if data is not None]
    if format == "parquet":
        texts = [fields["caption"] if data is not None else None for fields, data in rows]
        table = table.append_column("txt", pa.array(texts, pa.string()))
        table = table.append_column(encode_format, pa.array([data for _, data in rows], pa.binary()))
    elif format == "webdataset":
        listed = [
            {"__key__": fields["key"], encode_format: data, "json": fields, "txt": fields["caption"] or ""}
            for fields, data in done
        ]
        write_webdataset(root / f"{name}.tar", listed)
    else:
        (root / name).mkdir()
        for fields, data in done:
            (root / name / f"{fields['key']}.{encode_format}").write_bytes(data)
            (root / name / f"{fields['key']}.txt").write_text(fields["caption"] or "")
            (root / name / f"{fields['key']}.json").write_text(json.dumps(fields, indent=4))
    if sidecar or format == "parquet":
        pq.write_table(table, root / f"{name}.parquet", row_group_size=100)
    if not unfinished:
        stats = {"count": len(rows), "successes": len(done), "failed_to_download": failures}
        (root / f"{name}_stats.json").write_text(json.dumps(stats, indent=4))
    return root


def cut(path: Path, keep: int | float) -> Path:
    """Truncate a file to `keep` bytes (an int) or to that share of it (a float)."""
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    return path


def read_shard(
    source: Source, shard: Shard, rows: Sequence[int] | None = None, images: bool = True
) -> tuple[list[dict[str, Any]], ReadStats]:
    """All rows of one shard as dicts, and the counts."""
    reader = source.read(shard, rows, images)
    found = [row for batch in reader for row in batch.to_pylist()]
    return found, reader.stats


def read_rows(source: Source) -> list[dict[str, Any]]:
    """All rows of a source, shard after shard."""
    return [row for shard in source.iter_shards() for row in read_shard(source, shard)[0]]
