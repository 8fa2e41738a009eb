"""What the columns of a Parquet file are: image, captions, uid; found by name and content, or named by the user."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter import storage
from clipfilter.errors import RefusedError, one_line
from clipfilter.sources.discover import Found, Location, is_image_name
from clipfilter.sources.records import CAPTION_NAMES, UID_PATTERN
from clipfilter.sources.schema import is_binary, is_list, is_text

BUFFER = 1 << 20  # bytes read ahead per column where a row group is read page by page
# fmt: off
# Names under which images, paths and URLs are looked for when nobody says, best first.
_BYTES_NAMES = (
    "image", "jpg", "jpeg", "png", "webp", "img", "gif", "avif", "bytes", "image_bytes", "img_bytes", "content",
    "image_data", "data", "picture", "photo",
)
_PATH_NAMES = (
    "image_path", "img_path", "image_file", "file_name", "filename", "filepath", "file_path", "path", "file", "image",
    "img", "photo",
)
_URL_NAMES = ("url", "image_url", "img_url", "photo_image_url", "image_link", "link", "uri", "src")
# fmt: on


def empty_rows(rows: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_struct_array(pa.array([{}] * rows, pa.struct([])))


def is_textual(kind: pa.DataType) -> bool:
    return is_text(kind) or (pa.types.is_dictionary(kind) and is_text(kind.value_type))


def is_caption(kind: pa.DataType) -> bool:
    return is_textual(kind) or pa.types.is_null(kind) or (is_list(kind) and is_textual(kind.value_type))


def _is_image_struct(kind: pa.DataType) -> bool:
    """Hugging Face's struct<bytes, path>."""
    place = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    return place >= 0 and is_binary(kind.field(place).type)


def _holds_bytes(kind: pa.DataType) -> bool:
    return is_binary(kind) or _is_image_struct(kind)


def rest_schema(schema: pa.Schema, image: str) -> pa.Schema:
    """The schema without image bytes: a bytes column goes, of struct<bytes, path> the path stays as `<column>.path`."""
    fields = []
    for item in schema:
        if item.name != image or not _holds_bytes(item.type):
            fields.append(item)
        elif _is_image_struct(item.type) and (place := item.type.get_field_index("path")) >= 0:
            fields.append(pa.field(f"{image}.path", item.type.field(place).type))
    return pa.schema(fields)


def columns_without(schema: pa.Schema, image: str) -> list[str]:
    """What to read when the images are not wanted."""
    names = [item.name for item in schema if item.name != image or not _holds_bytes(item.type)]
    place = schema.get_field_index(image)
    if (
        place >= 0
        and _is_image_struct(schema.field(place).type)
        and schema.field(place).type.get_field_index("path") >= 0
    ):
        names.append(f"{image}.path")
    return names


def split_batch(batch: pa.RecordBatch, image: str) -> tuple[pa.Array | None, list[Any] | None, pa.RecordBatch]:
    """(bytes at hand, what to fetch, the other columns) of a batch as it is in the file."""
    place = batch.schema.get_field_index(image)
    if place < 0:
        return pa.nulls(batch.num_rows, pa.large_binary()), None, batch
    column = batch.column(place)
    kind = column.type
    if is_textual(kind):
        return None, column.to_pylist(), batch
    arrays = [array for name, array in zip(batch.schema.names, batch.columns, strict=True) if name != image]
    fields = [item for item in batch.schema if item.name != image]
    if is_binary(kind):
        rest = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)) if arrays else empty_rows(batch.num_rows)
        return pc.cast(column, pa.large_binary()), None, rest
    if not pa.types.is_struct(kind):
        return pa.nulls(batch.num_rows, pa.large_binary()), None, batch
    flat = dict(zip([kind.field(number).name for number in range(kind.num_fields)], column.flatten(), strict=True))
    paths = flat.get("path")
    if paths is not None:
        arrays.append(paths)
        fields.append(pa.field(f"{image}.path", paths.type))
    rest = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)) if arrays else empty_rows(batch.num_rows)
    if "bytes" not in flat or not is_binary(flat["bytes"].type):
        return pa.nulls(batch.num_rows, pa.large_binary()), None, rest
    held = pc.cast(flat["bytes"], pa.large_binary())
    if paths is not None and held.null_count and is_textual(paths.type):
        elsewhere = pc.and_(pc.is_null(held), pc.is_valid(paths))
        if pc.any(elsewhere).as_py():
            return None, [data or path for data, path in zip(held.to_pylist(), paths.to_pylist(), strict=True)], rest
    return held, None, rest


def first_readable(location: Location, found: Found, stack: ExitStack) -> tuple[pq.ParquetFile, str]:
    problem: Exception | None = None
    for path, _ in found.parquets:
        url = location.url(path)
        fs, inside = storage.filesystem(url)
        try:
            file = pq.ParquetFile(stack.enter_context(fs.open(inside, "rb")), pre_buffer=False, buffer_size=BUFFER)
        except (pa.ArrowException, ValueError) as error:
            problem = error
            continue
        except FileNotFoundError:
            if len(found.parquets) == 1:
                raise
            continue
        return file, path
    where = location.url(found.parquets[0][0])
    if problem is None:
        raise FileNotFoundError(where)
    raise RefusedError(
        f"{where} is not a readable Parquet file ({one_line(problem)}); "
        "it is probably incomplete: copy or write it again."
    )


def first_rows(file: pq.ParquetFile) -> pa.RecordBatch | None:
    """The first rows, where they can be read."""
    try:
        return next(file.iter_batches(batch_size=32, row_groups=[0]), None) if file.metadata.num_rows else None
    except (OSError, pa.ArrowException):
        return None


def _listing(schema: pa.Schema) -> str:
    return ", ".join(f"{item.name} ({item.type})" for item in schema)[:1000]


def _kind_of(schema: pa.Schema, named: str, option: str, where: str) -> pa.DataType:
    """The type of the column that an option names; RefusedError where there is none."""
    place = schema.get_field_index(named)
    if place < 0:
        raise RefusedError(f"{option} {named} is not a column of {where}; its columns are: {_listing(schema)}.")
    return schema.field(place).type


def find_image(schema: pa.Schema, sample: pa.RecordBatch | None, named: str | None, where: str) -> tuple[str, str]:
    """(column, "bytes" or "names"); raises RefusedError that lists the columns when the choice is not clear."""
    if named is not None:
        kind = _kind_of(schema, named, "--image-column", where)
        if _holds_bytes(kind):
            return named, "bytes"
        if is_textual(kind):
            return named, "names"
        raise RefusedError(
            f"--image-column {named} has type {kind}; it must hold image bytes, struct<bytes, path>, or paths or URLs."
        )
    holding = [item.name for item in schema if _holds_bytes(item.type)]
    images = [name for name in holding if sample is not None and _looks_like_images(sample, name)]
    for name in _BYTES_NAMES:
        if name in (images or holding):
            return name, "bytes"
    if len(images) == 1:
        return images[0], "bytes"
    textual = [item.name for item in schema if is_textual(item.type)]
    if not images:
        for name in _PATH_NAMES:
            if name in textual and (sample is None or _looks_like_paths(sample, name)):
                return name, "names"
        lowered = {name.lower(): name for name in reversed(textual)}
        for name in _URL_NAMES:
            if name in lowered:
                return lowered[name], "names"
    several = f" (several hold images: {', '.join(images)})" if images else ""
    raise RefusedError(
        f"{where} has no column that is clearly the image{several}; say which with --image-column. "
        f"Its columns are: {_listing(schema)}."
    )


_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|GIF8|BM|II\*\0|MM\0\*|....ftyp(avif|avis|heic|mif1)", re.DOTALL
)


def _looks_like_images(sample: pa.RecordBatch, name: str) -> bool:
    column = sample.column(sample.schema.get_field_index(name))
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    values = [value for value in column.to_pylist() if value]
    return bool(values) and sum(1 for value in values if _MAGIC.match(value)) * 2 > len(values)


def _looks_like_paths(sample: pa.RecordBatch, name: str) -> bool:
    values = [value for value in sample.column(sample.schema.get_field_index(name)).to_pylist() if value]
    return not values or any(
        is_image_name(value.rpartition("/")[2].split("?")[0]) or "://" in value for value in values
    )


def find_caption(schema: pa.Schema, named: str | None, image: str | None, where: str) -> str | None:
    if named is not None:
        kind = _kind_of(schema, named, "--caption-column", where)
        if not is_caption(kind):
            raise RefusedError(f"--caption-column {named} has type {kind}; it must be text or a list of texts.")
        return named
    fitting = [item.name for item in schema if item.name != image and is_caption(item.type)]
    return next((name for name in CAPTION_NAMES if name in fitting), None)


def find_uid(schema: pa.Schema, named: str | None, sample: pa.RecordBatch | None, where: str) -> str | None:
    if named is not None:
        kind = _kind_of(schema, named, "--uid-column", where)
        if not (is_textual(kind) or pa.types.is_integer(kind)):
            raise RefusedError(f"--uid-column {named} has type {kind}; it must be text or whole numbers.")
        return named
    if "uid" not in schema.names or not is_textual(schema.field("uid").type):
        return None
    values = sample.column(schema.get_field_index("uid")).drop_null().to_pylist() if sample is not None else []
    return "uid" if all(re.match(UID_PATTERN, value) for value in values) else None
