"""Sources on an S3 endpoint over real HTTP: the same rows and copies as from a local disk."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clipfilter import storage
from clipfilter.errors import RefusedError, ShardError
from clipfilter.sources import Source, SourceOptions, open_source
from tests.support import sources as make
from tests.support.sources import read_rows, read_shard

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    pytest.importorskip("s3fs")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir("bucket-of-images")
        yield "s3://bucket-of-images"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def upload(folder: Path, url: str) -> str:
    import s3fs

    store = s3fs.S3FileSystem()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            store.put_file(str(path), f"{url}/{path.relative_to(folder).as_posix()}")
    return url


def write(kind: str, folder: Path) -> None:
    made = make.samples(30)
    if kind == "tar":
        make.write_webdataset(folder / "x" / "a.tar", made[:20])
        make.write_webdataset(folder / "b.tar.gz", made[20:])
    elif kind == "img2dataset":
        make.write_img2dataset(folder, made, failures=4)
    elif kind == "parquet":
        make.write_parquet(folder / "a.parquet", made, row_group_size=10)
    elif kind == "paths":
        make.write_parquet(folder / "a.parquet", made, style="path", row_group_size=10)
    elif kind == "folder":
        make.write_image_folder(folder, made, captions="txt", folders=("", "a", "a/b"))
    else:
        make.write_image_folder(folder, made, captions="jsonl", folders=("", "a"))


@pytest.mark.parametrize("kind", ["tar", "img2dataset", "parquet", "paths", "folder", "table"])
def test_s3_is_like_a_local_disk(tmp_path: Path, bucket: str, kind: str) -> None:
    write(kind, tmp_path / "in")
    url = upload(tmp_path / "in", f"{bucket}/{kind}")
    options = SourceOptions(rows_per_shard=20)
    local, remote = open_source(str(tmp_path / "in"), options), open_source(url, options)
    assert remote.kind == local.kind
    assert remote.schema.equals(local.schema)
    shards = list(remote.iter_shards())
    assert [(shard.id, shard.path) for shard in shards] == [(shard.id, shard.path) for shard in local.iter_shards()]
    assert all(shard.etag for shard in shards)
    assert read_rows(remote) == read_rows(local)
    again = Source.from_plan(remote.to_plan())
    assert read_shard(again, shards[0])[1] == read_shard(local, next(local.iter_shards()))[1]
    remote.copy_rows(shards[0], [1, 5], tmp_path / "remote")
    local.copy_rows(next(local.iter_shards()), [1, 5], tmp_path / "local")
    if kind != "paths":  # their metadata say where the images are
        assert files(tmp_path / "remote") == files(tmp_path / "local")


def files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(item.relative_to(path)): item.read_bytes() for item in sorted(path.rglob("*")) if item.is_file()}


def test_patterns_and_single_objects(tmp_path: Path, bucket: str) -> None:
    for number in range(3):
        make.write_webdataset(tmp_path / f"{number:05d}.tar", make.samples(1, start=number))
    url = upload(tmp_path, f"{bucket}/patterns")

    def keys(pattern: str) -> list[int]:
        return [int(row["cf_key"]) for row in read_rows(open_source(f"{url}/{pattern}"))]

    assert keys("{00000..00001}.tar") == [0, 1]
    assert keys("0000[12].tar") == [1, 2]
    assert keys("00002.tar") == [2]
    assert keys("") == [0, 1, 2]


def test_an_object_that_changed_is_a_failed_shard(tmp_path: Path, bucket: str) -> None:
    make.write_webdataset(tmp_path / "a.tar", make.samples(2))
    url = upload(tmp_path, f"{bucket}/changed")
    source = open_source(url)
    (shard,) = source.iter_shards()
    make.write_webdataset(tmp_path / "a.tar", make.samples(3))
    upload(tmp_path, url)
    with pytest.raises(ShardError, match="has changed since it was listed"):
        read_shard(source, shard)


def test_a_tar_is_fetched_once_for_reading_and_copying(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make.write_webdataset(tmp_path / "a.tar", make.samples(20))
    source = open_source(upload(tmp_path, f"{bucket}/once"))
    (shard,) = source.iter_shards()
    read_shard(source, shard)

    def fail(*_: Any) -> Any:
        raise AssertionError("fetched again")

    monkeypatch.setattr("clipfilter.sources.spool.TarCache._copy", fail)
    assert source.copy_rows(shard, [3], tmp_path / "copy.tar") == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("bucket-of-images/nothing/here", "does not exist"),
        ("no-such-bucket/x", "does not exist|cannot be read|may not"),
    ],
)
def test_what_is_not_there_is_refused(bucket: str, path: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        open_source(f"s3://{path}")


def test_missing_credentials_are_refused_in_one_sentence(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RefusedError, match=r"credentials") as refusal:
        open_source(f"{bucket}/tar")
    assert "\n" not in str(refusal.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_server_that_accepts_and_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    s3fs = pytest.importorskip("s3fs")
    monkeypatch.setitem(storage._S3_REQUESTS, "read_timeout", 0.5)
    monkeypatch.setitem(storage._S3_REQUESTS, "retries", {"total_max_attempts": 1})
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    held.append(server.accept()[0])

        threading.Thread(target=accept, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(RefusedError, match="timeout"):
            open_source("s3://a-bucket/of-images")
        s3fs.S3FileSystem.clear_instance_cache()
    assert held
    for connection in held:
        connection.close()
