"""What the columns of a Parquet file are: image, captions, uid; found by name and content, or named by the user."""

from __future__ import annotations

import re
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clipfilter import storage
from clipfilter.errors import RefusedError, one_line
from clipfilter.sources.contents import HEAD_BYTES, told_by_content
from clipfilter.sources.discover import ARROW_SUFFIXES, Found, Location, is_image_name
from clipfilter.sources.records import CAPTION_NAMES, UID_PATTERN
from clipfilter.sources.schema import is_binary, is_list, is_text
from clipfilter.sources.seen import Seen
from clipfilter.sources.table_files import ArrowTable, ParquetTable, TableFile
from clipfilter.sources.unjudged import from_base64, from_data_url, is_base64_picture, without_pictures

# fmt: off
# Names under which images, paths and URLs are looked for when nobody says, best first.
_BYTES_NAMES = (
    "image", "jpg", "jpeg", "png", "webp", "img", "gif", "avif", "bytes", "image_bytes", "img_bytes", "content",
    "image_data", "data", "picture", "photo", "images",
)
_PATH_NAMES = (
    "image_path", "img_path", "image_file", "file_name", "filename", "filepath", "file_path", "path", "file", "image",
    "img", "photo", "images", "image_paths", "file_names",
)
_URL_NAMES = ("url", "image_url", "img_url", "photo_image_url", "image_link", "link", "uri", "src", "urls", "image_urls")
# fmt: on


def empty_rows(rows: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_struct_array(pa.array([{}] * rows, pa.struct([])))


def is_textual(kind: pa.DataType) -> bool:
    return is_text(kind) or (pa.types.is_dictionary(kind) and is_text(kind.value_type))


def is_caption(kind: pa.DataType) -> bool:
    return is_textual(kind) or pa.types.is_null(kind) or (is_list(kind) and is_textual(kind.value_type))


def _leaf(kind: pa.DataType) -> pa.DataType:
    """The type of what a column holds, inside of lists, and as it is when no dictionary encodes it."""
    while pa.types.is_dictionary(kind) or is_list(kind):
        kind = kind.value_type
    return kind


def is_exploded(schema: pa.Schema, image: str) -> bool:
    """Whether the image column has lists, of which each element is a row."""
    place = schema.get_field_index(image)
    kind = schema.field(place).type if place >= 0 else pa.null()
    return is_list(kind.value_type if pa.types.is_dictionary(kind) else kind)


def _is_image_struct(kind: pa.DataType) -> bool:
    """Hugging Face's struct<bytes, path>, or one of a path alone."""
    if not pa.types.is_struct(kind):
        return False
    bytes_, path = kind.get_field_index("bytes"), kind.get_field_index("path")
    return (bytes_ >= 0 and is_binary(kind.field(bytes_).type)) or (path >= 0 and is_textual(kind.field(path).type))


def _holds_bytes(kind: pa.DataType) -> bool:
    return is_binary(kind) or _is_image_struct(kind)


def may_name(schema: pa.Schema, image: str) -> bool:
    """Whether the image column has lists, or structs of a path alone: what holds bytes has them nearly always."""
    place = schema.get_field_index(image)
    kind = _leaf(schema.field(place).type) if place >= 0 else pa.null()
    return is_exploded(schema, image) or (pa.types.is_struct(kind) and kind.get_field_index("bytes") < 0)


def flat_schema(schema: pa.Schema, image: str) -> pa.Schema:
    """The schema with one picture per row: the image column without lists and dictionary."""
    return pa.schema(
        [item.with_type(_leaf(item.type)) if item.name == image else item for item in schema], metadata=schema.metadata
    )


class Exploded(NamedTuple):
    """A batch with one picture per row: the row of the batch that each comes from, and its place in that one's list (-1: the
    list is empty or null)."""

    batch: pa.RecordBatch
    parents: np.ndarray
    positions: np.ndarray


def explode(batch: pa.RecordBatch, image: str) -> Exploded:
    """One row per element of the lists in the image column, the other columns repeated. A row without any stays one."""
    place = batch.schema.get_field_index(image)
    parents = np.arange(batch.num_rows)
    positions = np.zeros(len(parents), np.int64)
    if place < 0:
        return Exploded(batch, parents, positions)
    column = batch.column(place)
    changed = False
    while True:
        if pa.types.is_dictionary(column.type):
            column, changed = column.dictionary_decode(), True
        if not is_list(column.type):
            break
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
        counts = np.maximum(lengths, 1)
        rows = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
        empty = lengths[rows] == 0
        places = pa.array(np.where(empty, 0, (np.cumsum(lengths) - lengths)[rows] + within), pa.int64(), mask=empty)
        column, changed = pc.list_flatten(column).take(places), True
        parents = parents[rows]
        positions = np.arange(len(parents)) - np.searchsorted(parents, parents)
        if len(parents):
            alone = np.bincount(parents)[parents] == 1
            positions[alone & empty] = -1
    if not changed:
        return Exploded(batch, parents, positions)
    if len(parents) != batch.num_rows or (parents[1:] == parents[:-1]).any():
        batch = batch.take(pa.array(parents))
    fields = flat_schema(batch.schema, image)
    arrays = [column if number == place else array for number, array in enumerate(batch.columns)]
    return Exploded(pa.RecordBatch.from_arrays(arrays, schema=fields), parents, positions)


def copied_schema(schema: pa.Schema, image: str) -> pa.Schema:
    """The schema of a copy: the file's own, where a picture in another column may have become null."""
    fields = []
    for item in schema:
        if item.name == image:
            fields.append(item.with_type(copied_type(item.type)))
        else:
            fields.append(item.with_nullable(True) if _holds_bytes(_leaf(item.type)) else item)
    return pa.schema(fields, metadata=schema.metadata)


def copied(batch: pa.RecordBatch, image: str, schema: pa.Schema) -> pa.RecordBatch:
    """An exploded batch as it is written to a copy: pictures in other columns are null."""
    arrays = []
    for item, column in zip(schema, batch.columns, strict=True):
        if item.name == image:
            arrays.append(wrapped(column, item.type))
            continue
        column = without_pictures(column)[0]
        arrays.append(column if column.type == item.type else pc.cast(column, item.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def wrapped(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """A column of pictures as a file's column of this type has them: in lists of one element, in a dictionary."""
    if pa.types.is_dictionary(kind):
        return pc.cast(wrapped(column, kind.value_type), kind)
    if not is_list(kind):
        return column if column.type == kind else pc.cast(column, kind)
    inner = wrapped(column, kind.value_type)
    return pa.LargeListArray.from_arrays(pa.array(np.arange(len(inner) + 1)), inner).cast(kind)


def copied_type(kind: pa.DataType) -> pa.DataType:
    """The type of an image column in a copy: a list of a fixed size has any size there."""
    if not pa.types.is_fixed_size_list(kind):
        return kind
    return pa.list_(kind.value_field.with_type(copied_type(kind.value_type)))


def rest_schema(schema: pa.Schema, image: str, how: str) -> pa.Schema:
    """The schema without image bytes: a bytes column goes, of struct<bytes, path> the path stays as `<column>.path`."""
    fields = []
    for item in flat_schema(schema, image):
        if item.name != image or not (how == "base64" or _holds_bytes(item.type)):
            fields.append(item)
        elif _is_image_struct(item.type) and (place := item.type.get_field_index("path")) >= 0:
            fields.append(pa.field(f"{image}.path", item.type.field(place).type))
    return pa.schema(fields)


def columns_without(schema: pa.Schema, image: str, how: str) -> list[str]:
    """What to read when the images are not wanted. Lists are read all the same: how long they are says what is a row."""
    if is_exploded(schema, image):
        return list(schema.names)
    names = [item.name for item in schema if item.name != image or not (how == "base64" or _holds_bytes(item.type))]
    place = schema.get_field_index(image)
    if (
        place >= 0
        and _is_image_struct(schema.field(place).type)
        and schema.field(place).type.get_field_index("path") >= 0
    ):
        names.append(f"{image}.path")
    return names


def split_batch(
    batch: pa.RecordBatch, image: str, how: str, seen: Seen | None = None
) -> tuple[pa.Array | None, list[Any] | None, pa.RecordBatch]:
    """(bytes at hand, what to fetch, the other columns) of an exploded batch.

    Pictures in other columns become null, and are counted in `seen`.
    """
    place = batch.schema.get_field_index(image)
    arrays, fields = [], []
    for item, array in zip(batch.schema, batch.columns, strict=True):
        if item.name != image or (how == "names" and is_textual(item.type)):
            left, count = (array, 0) if item.name == image else without_pictures(array)
            if seen is not None and count:
                seen.pass_over("other_picture", f"column {item.name}", count)
            arrays.append(left)
            fields.append(item.with_type(left.type))
    column = batch.column(place) if place >= 0 else pa.nulls(batch.num_rows, pa.large_binary())
    held, names, kind = pa.nulls(batch.num_rows, pa.large_binary()), None, column.type
    if is_textual(kind):
        held, names = None, [_named(value, how) for value in column.to_pylist()]
    elif is_binary(kind):
        held = pc.cast(column, pa.large_binary())
    elif pa.types.is_struct(kind):
        flat = dict(zip([kind.field(number).name for number in range(kind.num_fields)], column.flatten(), strict=True))
        paths = flat.get("path")
        if paths is not None:
            arrays.append(paths)
            fields.append(pa.field(f"{image}.path", paths.type))
        if "bytes" in flat and is_binary(flat["bytes"].type):
            held = pc.cast(flat["bytes"], pa.large_binary())
        if paths is not None and held.null_count and is_textual(paths.type):
            elsewhere = pc.and_(pc.is_null(held), pc.is_valid(paths))
            if pc.any(elsewhere).as_py():
                both = zip(held.to_pylist(), paths.to_pylist(), strict=True)
                held, names = None, [_named(data or path, "names") for data, path in both]
    rest = pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields)) if arrays else empty_rows(batch.num_rows)
    return held, names, rest


def _named(value: Any, how: str) -> Any:
    """What a text says of a picture: its bytes, where it is one in base64 or a data: URL, else the path or URL itself."""
    if not isinstance(value, str):
        return value
    if value[:5].lower() == "data:":
        return from_data_url(value)
    named = how != "base64" or not value.strip() or "://" in value[:20]
    return value if named else from_base64(value)


def is_arrow(path: str) -> bool:
    return path.lower().endswith(ARROW_SUFFIXES)


def first_readable(location: Location, found: Found, stack: ExitStack) -> tuple[TableFile, str]:
    problem: Exception | None = None
    files = found.arrows if found.kind == "arrow" else found.parquets
    for path, _ in files:
        fs, inside = storage.filesystem(location.url(path))
        try:
            handle = stack.enter_context(fs.open(inside, "rb"))
            file: TableFile = ArrowTable(handle) if is_arrow(path) else ParquetTable(handle)
        except (pa.ArrowException, ValueError) as error:
            problem = error
            continue
        except FileNotFoundError:
            if len(files) == 1:
                raise
            continue
        return file, path
    where = location.url(files[0][0])
    if problem is None:
        raise FileNotFoundError(where)
    raise RefusedError(
        f"{where} is not a readable {'Arrow' if is_arrow(where) else 'Parquet'} file ({one_line(problem)}); "
        "it is probably incomplete: copy or write it again."
    )


def first_rows(file: TableFile) -> pa.RecordBatch | None:
    """The first rows, where they can be read."""
    try:
        return file.first_rows(32)
    except (OSError, pa.ArrowException):
        return None


def refuse_what_parquet_lacks(schema: pa.Schema, where: str) -> None:
    """Raise RefusedError for a column whose type no Parquet file can hold: results and copies are Parquet."""
    for item in schema:
        try:
            pq.write_table(pa.schema([item]).empty_table(), pa.BufferOutputStream())
        except pa.ArrowException as error:
            raise RefusedError(
                f"column {item.name} of {where} has type {item.type}, which Parquet cannot hold; leave the column out."
            ) from error


def _listing(schema: pa.Schema) -> str:
    return ", ".join(f"{item.name} ({item.type})" for item in schema)[:1000]


def _kind_of(schema: pa.Schema, named: str, option: str, where: str) -> pa.DataType:
    """The type of the column that an option names; RefusedError where there is none."""
    place = schema.get_field_index(named)
    if place < 0:
        raise RefusedError(f"{option} {named} is not a column of {where}; its columns are: {_listing(schema)}.")
    return schema.field(place).type


def find_image(schema: pa.Schema, sample: pa.RecordBatch | None, named: str | None, where: str) -> tuple[str, str]:
    """(column, "bytes", "base64" or "names"); raises RefusedError that lists the columns when the choice is not clear."""
    leaves = {item.name: _leaf(item.type) for item in schema}
    if named is not None:
        kind = _kind_of(schema, named, "--image-column", where)
        if _holds_bytes(leaves[named]):
            return named, "bytes"
        if is_textual(leaves[named]):
            return named, "base64" if sample is not None and _looks_like_images(sample, named) else "names"
        raise RefusedError(
            f"--image-column {named} has type {kind}; it must hold image bytes, struct<bytes, path>, base64, paths or URLs, "
            "or lists of them."
        )
    holding = [name for name, kind in leaves.items() if _holds_bytes(kind)]
    textual = [name for name, kind in leaves.items() if is_textual(kind)]
    images = [name for name in (*holding, *textual) if sample is not None and _looks_like_images(sample, name)]
    if len(images) == 1:
        return images[0], "base64" if images[0] in textual else "bytes"
    if not images:
        for name in _BYTES_NAMES:
            if name in holding:
                return name, "bytes"
        paths = [
            name for name in _PATH_NAMES if name in textual and (sample is None or _looks_like_paths(sample, name))
        ]
        if paths and (sample is None or _same_files(sample, paths)):
            return paths[0], "names"
        lowered = {name.lower(): name for name in reversed(textual)}
        for name in _URL_NAMES if not paths else ():
            if name in lowered:
                return lowered[name], "names"
        images = paths or [name for name in textual if sample is not None and _are_paths(sample, name)]
        if not paths and len(images) == 1:
            return images[0], "names"
    several = f" (several hold images: {', '.join(images)})" if images else ""
    raise RefusedError(
        f"{where} has no column that is clearly the image{several}; say which with --image-column. "
        f"Its columns are: {_listing(schema)}."
    )


def _values(sample: pa.RecordBatch, name: str) -> list[Any]:
    """What a column holds, lists and structs opened, without nulls."""
    held, names, _ = split_batch(explode(sample, name).batch, name, "names")
    return [value for value in (names if held is None else held.to_pylist()) or () if value]


def _looks_like_images(sample: pa.RecordBatch, name: str) -> bool:
    found = [
        is_base64_picture(value) if isinstance(value, str) else bool(told_by_content(value[:HEAD_BYTES]))
        for value in _values(sample, name)
    ]
    return bool(found) and sum(found) * 2 > len(found)


def _looks_like_paths(sample: pa.RecordBatch, name: str) -> bool:
    values = [value for value in _values(sample, name) if isinstance(value, str)]
    return not values or any(_is_path(value) for value in values)


def _are_paths(sample: pa.RecordBatch, name: str) -> bool:
    values = _values(sample, name)
    return bool(values) and all(isinstance(value, str) and _is_path(value) for value in values)


def _is_path(value: str) -> bool:
    return is_image_name(_basename(value)) or "://" in value


def _basename(value: str) -> str:
    return value.replace("\\", "/").rpartition("/")[2].split("?")[0]


def _same_files(sample: pa.RecordBatch, names: list[str]) -> bool:
    """Whether columns of paths name the same pictures, as far as their own names tell."""
    found = [
        [_basename(value) for value in _values(sample, name) if isinstance(value, str) and _is_path(value)]
        for name in names
    ]
    return all(other == found[0] for other in found if other)


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
