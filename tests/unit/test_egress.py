"""What may be fetched: addresses judged without connecting, and servers on this machine that give too much or never end."""

from __future__ import annotations

import contextlib
import datetime
import gzip
import io
import ipaddress
import os
import socket
import ssl
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from clipfilter import egress
from clipfilter.egress import FetchError, Limits, RefusedAddressError, TooLargeError, is_public
from clipfilter.errors import RefusedError, RowError, ShardError, hide
from clipfilter.ingest.fetching import OPT_OUTS, Fetch
from clipfilter.sources import SourceOptions, fetch, open_source, read_url, spool
from clipfilter.sources.fetch import Fetcher
from tests.support import sources as make
from tests.support.sources import read_rows

# --- addresses, as predicates ------------------------------------------------------------------------------------------

#: Blocks of IANA's registries, whose first and last addresses are tried; nothing is connected to.
BLOCKS = (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/4", "240.0.0.0/4", "::/96", "::ffff:0:0:0/96", "64:ff9b:1::/48", "100::/64", "100:0:0:1::/64",
    "2001::/32", "2001:2::/48", "2001:10::/28", "2001:20::/28", "2001:30::/28", "2001:db8::/32", "3fff::/20",
    "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
)  # fmt: skip
PRIVATE_V4 = ("127.0.0.1", "10.1.2.3", "169.254.169.254", "192.0.0.8", "100.100.100.200", "0.0.0.0", "255.255.255.255")


@pytest.mark.parametrize("block", BLOCKS)
def test_no_address_of_a_special_block_is_public(block: str) -> None:
    network = ipaddress.ip_network(block)
    middle = network[network.num_addresses // 2]
    assert [str(address) for address in (network[0], middle, network[-1]) if is_public(str(address))] == []


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.216.34", "100.128.0.1", "172.32.0.1", "192.0.1.1", "198.20.0.1", "223.255.255.254",
                "2606:4700::1111", "2001:4860:4860::8888", "2a00:1450::1", "2000::1"],
)  # fmt: skip
def test_addresses_between_the_blocks_are_public(address: str) -> None:
    assert is_public(address)


def embedded(inner: str) -> list[str]:
    number = int(ipaddress.IPv4Address(inner))
    return [
        str(ipaddress.IPv6Address(value))
        for value in (
            0xFFFF << 32 | number,  # mapped
            0x64FF9B << 96 | number,  # NAT64
            0x2002 << 112 | number << 80 | 1,  # 6to4
        )
    ]


@pytest.mark.parametrize("inner", PRIVATE_V4)
def test_what_stands_for_an_ipv4_address_is_judged_as_that(inner: str) -> None:
    assert [address for address in embedded(inner) if is_public(address)] == []
    assert all(is_public(address) for address in embedded("93.184.216.34"))
    # Compatible, translated and locally translated addresses are never public, whatever they stand for.
    for form in ("::93.184.216.34", "::ffff:0:93.184.216.34", "64:ff9b:1::93.184.216.34", "fe80::1%eth0"):
        assert not is_public(form)


# --- servers that misbehave ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def server(answer: Callable[[socket.socket], None], address: str = "127.0.0.1") -> Iterator[int]:
    """A TCP server whose every connection is given to `answer`; yields its port."""
    listener = socket.create_server((address, 0), backlog=64)
    done = threading.Event()

    def talk(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.settimeout(20)
            answer(connection)

    def serve() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                threading.Thread(target=talk, args=(connection,), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listener.getsockname()[1]
    finally:
        done.set()
        listener.close()


def drip(connection: socket.socket, data: bytes, piece: bytes) -> None:
    """`data`, then `piece` for ever, often enough that no single wait is long."""
    connection.recv(65536)
    connection.sendall(data)
    while True:
        connection.sendall(piece)
        time.sleep(0.02)


OK = b"HTTP/1.1 200 OK\r\n"
NEVER_WHOLE: dict[str, tuple[str, Callable[[socket.socket], None]]] = {
    "slow status line": ("http", lambda c: drip(c, b"HTTP/1.1 200 ", b"O")),
    "slow headers": ("http", lambda c: drip(c, OK, b"X-A: b\r\n")),
    "one slow header": ("http", lambda c: drip(c, OK + b"X-A: ", b"b")),
    "endless 100 Continue": ("http", lambda c: drip(c, b"", b"HTTP/1.1 100 Continue\r\n\r\n")),
    "endless early hints": ("http", lambda c: drip(c, b"", b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n")),
    "slow body": ("http", lambda c: drip(c, OK + b"Content-Length: 999999\r\n\r\n", b"x")),
    "slow chunks": ("http", lambda c: drip(c, OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n")),
    "slow chunk size": ("http", lambda c: drip(c, OK + b"Transfer-Encoding: chunked\r\n\r\n", b"0")),
    "slow chunk extension": ("http", lambda c: drip(c, OK + b"Transfer-Encoding: chunked\r\n\r\n1;", b"a")),
    "slow trailers": ("http", lambda c: drip(c, OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"X-A: b\r\n")),
    "silence": ("http", lambda c: time.sleep(20)),
    "slow TLS": ("https", lambda c: drip(c, b"\x16\x03\x03\x40\x00", b"\x02")),
    "silent TLS": ("https", lambda c: time.sleep(20)),
    "redirects, each in time": ("http", lambda c: redirect_slowly(c)),
}


def redirect_slowly(connection: socket.socket) -> None:
    connection.recv(65536)
    time.sleep(0.3)
    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /again\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def test_one_deadline_bounds_name_connection_headers_and_body() -> None:
    """All at once: each is given up at the deadline, though no single wait was long."""
    limits = Limits(timeout=10.0, deadline=1.5, private=True)

    def ask(name: str) -> tuple[str, float, Exception | bytes]:
        scheme, answer = NEVER_WHOLE[name]
        with server(answer) as port:
            began = time.monotonic()
            try:
                result: Exception | bytes = egress.get(f"{scheme}://127.0.0.1:{port}/1.jpg", limits)
            except FetchError as error:
                result = error
            return name, time.monotonic() - began, result

    with ThreadPoolExecutor(len(NEVER_WHOLE)) as pool:
        found = list(pool.map(ask, NEVER_WHOLE))
    for name, seconds, result in found:
        assert isinstance(result, FetchError), name
        assert seconds < 10, name
        if "not whole after 1.5 s" not in str(result):
            # What is no HTTP any more is given up before.
            assert "is no HTTP" in str(result), (name, result)
    assert sum("not whole after" in str(result) for _, _, result in found) >= len(NEVER_WHOLE) - 2


def test_a_slow_lookup_of_a_name_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()

    def getaddrinfo(*given: Any, **named: Any) -> list[Any]:
        free.wait(20)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    began = time.monotonic()
    with pytest.raises(FetchError, match=r"not whole after 0\.5 s"):
        egress.get("http://slow.example/1.jpg", Limits(deadline=0.5))
    free.set()
    assert time.monotonic() - began < 10


def test_one_long_wait_is_given_up_before_the_deadline() -> None:
    with server(lambda connection: time.sleep(20)) as port, pytest.raises(FetchError, match=r"no answer for 0\.3 s"):
        egress.get(f"http://127.0.0.1:{port}/", Limits(timeout=0.3, deadline=30, private=True))


def flood(connection: socket.socket, head: bytes, piece: bytes) -> None:
    connection.recv(65536)
    connection.sendall(head)
    for _ in range(4096):
        connection.sendall(piece)


@pytest.mark.parametrize(
    ("head", "piece", "sentence"),
    [
        (OK + b"\r\n", bytes(1 << 16), "larger than 1 MiB"),
        (OK + b"Content-Length: 99999999999\r\n\r\n", bytes(1 << 16), "larger than 1 MiB"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + bytes(1 << 16) + b"\r\n", "larger than 1 MiB"),
        (OK, b"X-A: " + b"b" * 1000 + b"\r\n", "is no HTTP"),
        (OK + b"X-A: ", b"b" * 65536, "is no HTTP"),
    ],
    ids=["until the end", "announced", "chunks", "headers", "one header"],
)
def test_no_answer_is_read_beyond_its_limit(head: bytes, piece: bytes, sentence: str) -> None:
    with server(lambda connection: flood(connection, head, piece)) as port, pytest.raises(FetchError, match=sentence):
        egress.get(f"http://127.0.0.1:{port}/", Limits(deadline=60, private=True, largest=1 << 20))


def test_packed_answers_are_not_unpacked() -> None:
    bomb = gzip.compress(bytes(50 << 20))
    head = OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    asked: list[bytes] = []

    def answer(connection: socket.socket) -> None:
        asked.append(connection.recv(65536))
        connection.sendall(head + bomb)

    with server(answer) as port, pytest.raises(FetchError, match=r"packed \(gzip\)"):
        egress.get(f"http://127.0.0.1:{port}/", Limits(private=True))
    assert b"accept-encoding: identity" in asked[0].lower()


# --- the address that is connected to is the one that was judged ---------------------------------------------------------


class Listening:
    """Two servers, 127.0.0.1 taken for public and 127.0.0.2 for private; who was connected to."""

    def __init__(self) -> None:
        self.answer: Callable[[str], bytes] = lambda path: OK + b"Content-Length: 4\r\n\r\ngood"
        self.connected: list[str] = []
        self.ports: dict[str, int] = {}

    def talk(self, address: str) -> Callable[[socket.socket], None]:
        def one(connection: socket.socket) -> None:
            self.connected.append(address)
            path = connection.recv(65536).split(b" ")[1].decode()
            connection.sendall(self.answer(path))

        return one


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listening]:
    state = Listening()
    monkeypatch.setattr(egress, "is_public", lambda address: address == "127.0.0.1")
    egress._at_home.cache_clear()
    with server(state.talk("public")) as public, server(state.talk("private"), "127.0.0.2") as private:
        state.ports = {"public": public, "private": private}
        yield state
    egress._at_home.cache_clear()


def redirect(to: str) -> Callable[[str], bytes]:
    return lambda path: f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


def test_a_redirect_is_judged_again(two: Listening) -> None:
    two.answer = redirect(f"http://127.0.0.2:{two.ports['private']}/secret")
    with pytest.raises(RefusedAddressError, match=r"127\.0\.0\.2 is not a public address"):
        egress.get(f"http://127.0.0.1:{two.ports['public']}/", Limits())
    assert two.connected == ["public"]
    for to in ("file:///etc/hostname", "ftp://127.0.0.1/x", "gopher://127.0.0.1:9/", "http://"):
        two.answer = redirect(to)
        with pytest.raises(FetchError, match=r"no http URL|not a public|valid"):
            egress.get(f"http://127.0.0.1:{two.ports['public']}/", Limits())
    assert "private" not in two.connected


def test_a_name_that_means_another_machine_the_next_time_is_judged_by_what_is_connected(
    two: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[str] = []

    def getaddrinfo(host: str, port: int, *given: Any, **named: Any) -> list[Any]:
        times.append(host)
        address = "127.0.0.1" if len(times) % 2 else "127.0.0.2"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    for number in range(4):
        for port in two.ports.values():
            with contextlib.suppress(FetchError):
                egress.get(f"http://rebind{number}.example:{port}/", Limits())
    assert len(times) >= 8
    assert "private" not in two.connected


def test_of_several_addresses_only_public_ones_are_tried(two: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(host: str, port: int, *given: Any, **named: Any) -> list[Any]:
        places = ["127.0.0.2", "127.0.0.1"]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (place, two.ports["public"])) for place in places]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert egress.get("http://both.example/", Limits()) == b"good"
    assert two.connected == ["public"]


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "127.1", "0177.0.0.1",
             "0", "[::]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::1]"],
)  # fmt: skip
def test_this_machine_is_refused_however_it_is_written(host: str) -> None:
    with pytest.raises(RefusedAddressError):
        egress.get(f"http://{host}:9/1.jpg", Limits(timeout=2, deadline=5))


def test_many_threads_share_one_thread_of_the_web_and_a_forked_child_has_its_own(two: Listening) -> None:
    url = f"http://127.0.0.1:{two.ports['public']}/"
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: egress.get(url, Limits()), range(64))) == {b"good"}
    assert sum(thread.name == "clipfilter-web" for thread in threading.enumerate()) == 1
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if egress.get(url, Limits(deadline=20)) == b"good" else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_certificate_that_nobody_vouches_for_is_none(tmp_path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(
        name, name, key.public_key(), x509.random_serial_number(), now, now.replace(year=now.year + 1)
    )
    pem = made.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    pem += key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "server.pem").write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as safe:
            safe.recv(65536)
            safe.sendall(OK + b"Content-Length: 4\r\n\r\ngood")

    with server(answer) as port, pytest.raises(FetchError, match=r"no connection to 127.*self-signed certificate"):
        egress.get(f"https://127.0.0.1:{port}/", Limits(private=True))


# --- images that a source names --------------------------------------------------------------------------------------------


def named(tmp_path: Path, names: list[str], **options: Any) -> list[dict[str, Any]]:
    pq.write_table(pa.table({"url": names}), tmp_path / "a.parquet")
    return read_rows(open_source(str(tmp_path / "a.parquet"), SourceOptions(image_column="url", **options)))


def test_a_source_may_not_name_private_addresses_unless_told(two: Listening, tmp_path: Path) -> None:
    names = [f"http://127.0.0.{n}:{port}/{n}.jpg" for n, port in enumerate(two.ports.values(), 1)]
    names.append(f"http://127.0.0.1:{two.ports['public']}/redirect.jpg")
    two.answer = lambda path: redirect(names[1])(path) if "redirect" in path else OK + b"Content-Length: 4\r\n\r\ngood"
    rows = named(tmp_path, names)
    assert [row["cf_image"] for row in rows] == [b"good", None, None]
    assert [row["cf_error_class"] for row in rows] == [None, "missing_image", "missing_image"]
    assert "127.0.0.2 is not a public address" in rows[1]["cf_error"]
    assert "private" not in two.connected
    assert [row["cf_image"] for row in named(tmp_path, names, private=True)] == [b"good"] * 3


def test_names_below_a_source_lead_where_the_source_lies_and_no_further(two: Listening) -> None:
    home = f"http://127.0.0.2:{two.ports['private']}"
    assert Fetcher([home])("1.jpg").data == b"good"
    assert Fetcher([f"http://127.0.0.1:{two.ports['public']}"])("1.jpg").data == b"good"
    two.answer = redirect(f"{home}/secret")
    two.connected.clear()
    assert "not a public" in str(Fetcher([f"http://127.0.0.1:{two.ports['public']}"])("1.jpg").error)
    assert "not a public" in str(Fetcher([])(f"{home}/1.jpg").error)
    assert "private" not in two.connected
    assert "not fetched over s3" in str(Fetcher(["s3://bucket/folder"])(f"a::{home}/x").error)


@pytest.mark.parametrize(
    "name",
    ["ftp://127.0.0.1/x.jpg", "sftp://host/x.jpg", "webhdfs://host/x.jpg", "github://o:r@main/x.jpg", "smb://h/x.jpg",
     "filecache::http://127.0.0.1:9/x", "zip://a.jpg::http://127.0.0.1:9/x.zip", "zip://a::zip://b::/tmp/c.zip",
     "simplecache::s3://b/x", "tar://a.jpg::/tmp/a.tar", "zip://a::ftp://127.0.0.1/b.zip", "reference://x::/tmp/y"],
)  # fmt: skip
def test_other_schemes_and_chains_are_not_followed(name: str) -> None:
    found = Fetcher(["."])(name)
    assert (found.data, found.error_class) == (None, "missing_image")
    assert "not fetched over" in str(found.error) or "only zip is looked into" in str(found.error)


def test_devices_and_pipes_are_no_images_whatever_way_they_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("/dev/zero")
    names = [
        "pipe.jpg", "link.jpg", "/dev/zero", "file:///dev/zero", "/dev/stdin", f"zip://a.jpg::{tmp_path}/pipe.jpg",
        "zip://a.jpg::/dev/zero", "zip://a.jpg::file:///dev/zero",
    ]  # fmt: skip
    rows = named(tmp_path, names)
    assert [row["cf_error_class"] for row in rows] == ["missing_image"] * len(names)
    assert {row["cf_error"].rpartition(": ")[2] for row in rows} == {"it is a device or a pipe, no file"}
    with pytest.raises(RowError, match="a device or a pipe"):
        read_url("/dev/zero")


def test_no_file_is_read_beyond_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "LARGEST_IMAGE", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(64 << 20))
        archive.writestr("b.jpg", make.jpeg(1))
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(1 << 40)
    (tmp_path / "fits.jpg").write_bytes(make.jpeg(2))
    names = [f"zip://a.jpg::{tmp_path}/bomb.zip", "sparse.jpg", f"zip://b.jpg::{tmp_path}/bomb.zip", "fits.jpg"]
    rows = named(tmp_path, names)
    assert [row["cf_error_class"] for row in rows] == ["image_too_large", "image_too_large", None, None]
    assert [row["cf_image"] for row in rows[2:]] == [make.jpeg(1), make.jpeg(2)]


class Endless(io.RawIOBase):
    """A file that says it is small and never ends."""

    given = 0

    def read(self, size: int = -1) -> bytes:
        assert size > 0, "asked for everything"
        self.given += size
        return bytes(size)


def test_a_stream_that_never_ends_is_left_after_its_limit() -> None:
    endless = Endless()
    with pytest.raises(TooLargeError, match="larger than 3 MiB"):
        egress.read_stream(endless, 3 << 20)
    assert endless.given == (3 << 20) + 1


def test_a_gzip_bomb_does_not_fill_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress, "UNZIPPED_FREE", 16 << 20)
    monkeypatch.setattr(spool, "_WAITS", (60.0,))  # it is not tried again
    good = tmp_path / "good" / "00000.tar"
    make.write_webdataset(good, make.samples(3))
    (tmp_path / "bombs").mkdir()
    flat = good.read_bytes()[:-1024]
    with gzip.open(tmp_path / "bombs" / "00000.tar.gz", "wb", 9) as file:
        file.write(flat)
        file.writelines([bytes(1 << 20)] * 64)
    source = open_source(str(tmp_path / "bombs"))
    with pytest.raises(ShardError, match=r"unzips to more than .* MiB, over 100 times its size.*unzip it first"):
        read_rows(source)
    # What packs well is read, where it is not much, and so is much that packs as images do.
    (tmp_path / "fine").mkdir()
    with gzip.open(tmp_path / "fine" / "00000.tar.gz", "wb", 9) as file:
        file.write(flat)
        file.writelines([bytes(1 << 20)] * 4)
    assert len(read_rows(open_source(str(tmp_path / "fine")))) == 3
    egress.judge_unzipped(1 << 30, 50 << 30)
    with pytest.raises(FetchError):
        egress.judge_unzipped(1 << 30, 101 << 30)


# --- what is said ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host/a.jpg is gone", "https://host/a.jpg is gone"),
        ("zip://a::https://me:p%40w@host/b.zip", "zip://a::https://host/b.zip"),
        (
            "s3://b/x?X-Amz-Signature=abc&w=1&X-Amz-Credential=k",
            "s3://b/x?X-Amz-Signature=...&w=1&X-Amz-Credential=...",
        ),
        ("http://h/x?sig=abc 'http://h/y?SharedKey=1'", "http://h/x?sig=... 'http://h/y?SharedKey=...'"),
        ("http://h/photos/123@N00/x.jpg", "http://h/photos/123@N00/x.jpg"),
        ("mail me@host?key=1", "mail me@host?key=1"),
    ],
)
def test_credentials_in_urls_are_not_told(text: str, shown: str) -> None:
    assert hide(text) == shown
    assert str(RefusedError(text)) == shown
    assert RowError("read_error", text).message == shown


def test_errors_of_rows_and_downloads_tell_no_credentials(tmp_path: Path) -> None:
    secret = "hunter2"
    names = [
        f"{scheme}://me:{secret}@127.0.0.1:9/a.jpg?token={secret}" for scheme in ("http", "https", "ftp", "nosuch")
    ] + [f"http://me:{secret}@exa mple:x/", f"http://me:{secret}@[::zz]/"]  # fmt: skip
    for private in (False, True):
        rows = named(tmp_path, names, private=private)
        assert all(row["cf_error"] for row in rows)
        assert not [row["cf_error"] for row in rows if secret in row["cf_error"]]
        download = Fetch(Limits(timeout=2, deadline=5, private=private))
        told = [download((0, name), 2, None, OPT_OUTS)[2] for name in names]
        assert all(told)
        assert not [said for said in told if secret in str(said)]
