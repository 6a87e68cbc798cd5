"""Who connects to the node and never says what he wants: he takes nobody's place, and what he
takes comes back.
"""

from __future__ import annotations

import os
import resource
import socket
import ssl
import struct
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from nodes import QUIETLY, Serving, associate, until
from pydicom.uid import SegmentationStorage
from test_node import VERIFICATION, certificates

from runtime.core.log import events_on_standard_error
from runtime.service.connections import PendingConnections
from runtime.service.dicom_receiver import StoreSCP
from runtime.service.dicom_server import Limits
from runtime.service.events import Events
from runtime.service.health_server import HealthServer
from runtime.service.study_spool import Spool

IMPLICIT = b"1.2.840.10008.1.2"
HALF_REQUEST = b"\x01\x00" + struct.pack(">I", 60000)
ABORTED, REJECTED, ACCEPTED = 7, 3, 2  # the first byte of what answers a request
pytestmark = QUIETLY


@contextmanager
def acceptor(
    folder: Path, *, tls: ssl.SSLContext | None = None, **limits: Any
) -> Iterator[StoreSCP]:
    """The node's listening part in this process, for SENDER alone."""
    with ExitStack() as stack:
        spool = Spool(folder / "spool")
        stack.callback(spool.close)
        opened = StoreSCP(
            spool, Events(), "MASK2CT", ("127.0.0.1", 0), ("SENDER",), Limits(**limits), tls
        )
        stack.callback(opened.close)
        yield opened


def request(
    calling: bytes = b"SENDER",
    display_name: bytes = b"MASK2CT",
    syntax: bytes = IMPLICIT,
    abstract: bytes = VERIFICATION.encode(),
    version: int = 1,
) -> bytes:
    """An A-ASSOCIATE-RQ (PS3.8 9.3.2) of one presentation context; without a transfer syntax
    where `syntax` is empty.
    """

    def item(kind: int, content: bytes) -> bytes:
        return struct.pack(">BBH", kind, 0, len(content)) + content

    context = bytes([1, 0, 0, 0]) + item(0x30, abstract) + (item(0x40, syntax) if syntax else b"")
    user = item(0x51, struct.pack(">I", 16384)) + item(0x52, b"1.2.3.4")
    items = item(0x10, b"1.2.840.10008.3.1.1.1") + item(0x20, context) + item(0x50, user)
    body = (
        struct.pack(">HH", version, 0)
        + display_name.ljust(16)
        + calling.ljust(16)
        + bytes(32)
        + items
    )
    return b"\x01\x00" + struct.pack(">I", len(body)) + body


def connect(port: int, first: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(first)
    return connection


def answer(connection: socket.socket) -> bytes:
    """All that comes until the other side ends the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(4096):
            received += part
    return received


def trickle(connection: socket.socket, every: float = 0.05) -> float:
    """Send a byte now and then until the other side ends the connection.

    Returns how many seconds that took.
    """
    started = time.monotonic()
    connection.settimeout(every)
    while time.monotonic() - started < 20:
        try:
            if not connection.recv(1):
                break
        except TimeoutError:
            with suppress(OSError):
                connection.send(b"\0")
        except OSError:
            break
    return time.monotonic() - started


def echo(port: int, tls: Any = None) -> int:
    association = associate(port, [VERIFICATION], tls=tls)
    assert association.is_established
    status = int(association.send_c_echo().Status)
    association.release()
    return status


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_trickled_request_ends_in_time(tmp_path: Path) -> None:
    with (
        acceptor(tmp_path, request_seconds=0.5) as node,
        connect(node.port, HALF_REQUEST) as stranger,
    ):
        assert 0.4 < trickle(stranger) < 3


@pytest.mark.parametrize(
    "first", [b"", HALF_REQUEST[:1], HALF_REQUEST], ids=["nothing", "a byte", "half"]
)
def test_silent_stranger_is_ended(first: bytes, tmp_path: Path) -> None:
    with acceptor(tmp_path, request_seconds=0.5) as node, connect(node.port, first) as stranger:
        assert answer(stranger) == b""


def test_strangers_never_block_known_peers(tmp_path: Path) -> None:
    """Thirty hold their connection open, for ever if they may; each echo of a known peer is
    answered at once.
    """
    with acceptor(tmp_path, pending=8, request_seconds=60) as node, ExitStack() as stack:
        before = threading.active_count()
        for _ in range(30):
            stack.enter_context(connect(node.port, HALF_REQUEST))
            assert threading.active_count() < before + 8 + 12
        started = time.monotonic()
        assert [echo(node.port) for _ in range(3)] == [0] * 3 and time.monotonic() - started < 5
        assert not node.wrong()


def test_closed_connections_leave_nothing_behind(tmp_path: Path) -> None:
    with acceptor(tmp_path, associations=3, request_seconds=60) as node:
        assert echo(node.port) == 0
        threads, files = threading.active_count(), descriptors()
        for first in [
            b"",
            HALF_REQUEST,
            request(),
            request(syntax=b""),
            request(calling=b"STRANGER"),
        ] * 10:
            connect(node.port, first).close()
        until(
            lambda: threading.active_count() <= threads and descriptors() <= files,
            "all is given back",
            10,
        )
        assert echo(node.port) == 0


@pytest.mark.parametrize(
    ("asked", "kind", "reason"),
    [
        (request(syntax=b""), ABORTED, b"\x02\x06"),
        (request(abstract=b""), ABORTED, b"\x02\x06"),
        (request()[:-20] + b"\xff" * 20, ABORTED, b"\x02\x06"),
        (b"\x01\x00" + struct.pack(">I", 1 << 20), ABORTED, b"\x02\x06"),
        (b"\x05\x00" + struct.pack(">I", 4) + bytes(4), ABORTED, b"\x02\x02"),
        (b"GET / HTTP/1.1\r\n\r\n", ABORTED, b"\x02\x02"),
        (request(version=2), REJECTED, b"\x01\x02\x02"),
        (request(calling=b"STRANGER"), REJECTED, b"\x01\x01\x03"),
        (request(display_name=b"ANOTHER"), REJECTED, b"\x01\x01\x07"),
    ],
    ids=[
        "no transfer syntax",
        "no abstract syntax",
        "damaged",
        "too long",
        "a release",
        "http",
        "version",
        "calling",
        "called",
    ],
)
def test_bad_requests_are_answered_and_ended(
    asked: bytes, kind: int, reason: bytes, tmp_path: Path
) -> None:
    """With the standard's own PDU, and the descriptor is free though the peer stays."""
    with acceptor(tmp_path) as node:
        threads, files = threading.active_count(), descriptors()
        with connect(node.port, asked) as stranger:
            said = answer(stranger)
            assert said[0] == kind and said.endswith(reason) and len(said) == 10
            until(
                lambda: threading.active_count() == threads and descriptors() == files + 1,
                "all is given back",
                10,
            )


@pytest.mark.slow
def test_damaged_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """Three hundred, with bytes changed or missing, of peers who hang up or wait: no thread,
    descriptor or place is lost.
    """
    random, whole = Random(1), request()
    with acceptor(tmp_path, associations=2) as node:
        assert echo(node.port) == 0
        threads, files = threading.active_count(), descriptors()
        for n in range(300):
            damaged = bytearray(whole)
            for _ in range(random.randint(1, 4)):
                damaged[random.randrange(len(damaged))] = random.randrange(256)
            with connect(node.port) as peer, suppress(OSError):
                peer.sendall(damaged[: random.randint(1, len(damaged))] if n % 3 == 0 else damaged)
                if n % 3 == 1:
                    peer.shutdown(socket.SHUT_WR)
                    answer(peer)
        until(
            lambda: threading.active_count() <= threads and descriptors() <= files,
            "all is given back",
            20,
        )
        assert not node.wrong() and [echo(node.port) for _ in range(2)] == [0, 0]


def test_silent_association_gives_back_its_place(tmp_path: Path) -> None:
    with (
        acceptor(tmp_path, associations=1, idle_seconds=0.5) as node,
        connect(node.port, request()) as silent,
    ):
        said = answer(silent)
        assert said[0] == ACCEPTED and said[-10:-9] == bytes([ABORTED])
        assert echo(node.port) == 0


@pytest.mark.parametrize(
    "how",
    [{"pdu_seconds": 0.5}, {"idle_seconds": 0.5, "slowest": 1 << 20}],
    ids=["one PDU", "many"],
)
def test_trickled_object_ends_its_association(how: dict[str, float], tmp_path: Path) -> None:
    """A PDU that never becomes whole; and an object of many small ones that comes more slowly
    than it must.
    """
    with acceptor(tmp_path, associations=1, **how) as node:
        association = associate(node.port, [SegmentationStorage])
        raw = association.dul.socket.socket
        command = segmentation_request()
        raw.sendall(p_data(3, command))
        started = time.monotonic()
        with suppress(OSError):
            if "slowest" not in how:
                raw.sendall(b"\x04\x00" + struct.pack(">I", 10000))
            while time.monotonic() - started < 20 and association.is_established:
                raw.sendall(p_data(0, b"12345678") if "slowest" in how else b"\0")
                threading.Event().wait(0.02)
        assert time.monotonic() - started < 5
        until(lambda: not node.wrong(), "its place is free", 10)
        assert echo(node.port) == 0


def test_endless_object_ends_its_association(tmp_path: Path) -> None:
    """However fast it comes: what is too large is received to be answered, but not for ever."""
    with acceptor(tmp_path, associations=1, size=1 << 16) as node:
        association = associate(node.port, [SegmentationStorage])
        raw = association.dul.socket.socket
        raw.sendall(p_data(3, segmentation_request()))
        sent = 0
        with suppress(OSError):
            while sent < 64 << 20 and association.is_established:
                raw.sendall(p_data(0, bytes(16000)))
                sent += 16000
        assert sent < 64 << 20
        until(lambda: not node.wrong(), "its place is free", 10)
        assert echo(node.port) == 0


@pytest.mark.slow
def test_unread_answers_end_the_association(tmp_path: Path) -> None:
    """Requests that come faster than they are answered would fill the memory."""
    with acceptor(tmp_path, associations=1) as node, connect(node.port, request()) as flood:
        assert flood.recv(1)[0] == ACCEPTED
        asked = p_data(3, echo_request()) * 1000
        flood.settimeout(0.2)
        sent, started = 0, time.monotonic()
        while time.monotonic() - started < 20:
            try:
                sent += flood.send(asked)
            except TimeoutError:  # nothing is taken at the moment
                continue
            except OSError:
                break
        assert time.monotonic() - started < 15, f"{sent} bytes of requests were taken"
        until(lambda: not node.wrong(), "its place is free", 10)
        assert echo(node.port) == 0


def p_data(control: int, content: bytes) -> bytes:
    """A P-DATA-TF PDU with one fragment in context 1 (PS3.8 9.3.5).

    `control`: bit 0 a command, bit 1 the last fragment.
    """
    value = struct.pack(">IBB", len(content) + 2, 1, control) + content
    return b"\x04\x00" + struct.pack(">I", len(value)) + value


def command_set(elements: dict[int, bytes]) -> bytes:
    """A DIMSE command set (PS3.7 6.3) of the elements (0000,number), behind its length."""

    def element(number: int, value: bytes) -> bytes:
        value += b"\0" * (len(value) % 2)
        return struct.pack("<HHI", 0, number, len(value)) + value

    parts = b"".join(element(number, value) for number, value in elements.items())
    return element(0x0000, struct.pack("<I", len(parts))) + parts


def segmentation_request() -> bytes:
    """A C-STORE-RQ (PS3.7 9.3.1.1)."""
    return command_set(
        {
            0x0002: SegmentationStorage.encode(),
            0x0100: b"\x01\x00",
            0x0110: b"\x01\x00",
            0x0700: b"\x02\x00",
            0x0800: b"\x01\x00",
            0x1000: b"1.2.3",
        }
    )


def echo_request() -> bytes:
    """A C-ECHO-RQ (PS3.7 9.3.5.1)."""
    return command_set(
        {
            0x0002: VERIFICATION.encode(),
            0x0100: b"\x30\x00",
            0x0110: b"\x01\x00",
            0x0800: b"\x01\x01",
        }
    )


def test_no_more_associations_than_allowed(tmp_path: Path) -> None:
    """Twelve ask in the same moment for three places."""
    with acceptor(tmp_path, associations=3) as node, ExitStack() as stack:
        asked = [stack.enter_context(connect(node.port)) for _ in range(12)]
        for connection in asked:
            connection.sendall(request())
        kinds = sorted(connection.recv(1)[0] for connection in asked)
        assert kinds == [ACCEPTED] * 3 + [REJECTED] * 9


def test_tls_handshakes_are_bounded(tmp_path: Path) -> None:
    pem = certificates(tmp_path / "tls")
    server, client = (
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        ssl.create_default_context(cafile=pem["ca"]),
    )
    for context in (server, client):
        context.load_cert_chain(pem["cert"], pem["key"])
    server.load_verify_locations(pem["ca"])
    server.verify_mode = ssl.CERT_REQUIRED
    with acceptor(tmp_path, tls=server, pending=8, request_seconds=1) as node, ExitStack() as stack:
        before = threading.active_count()
        strangers = [stack.enter_context(connect(node.port)) for _ in range(30)]
        assert threading.active_count() < before + 8 + 12
        assert echo(node.port, (client, "127.0.0.1")) == 0
        strangers[-1].sendall(b"\x16\x03\x01\x02\x00\x01")  # a ClientHello that never comes whole
        assert trickle(strangers[-1]) < 4
        with client.wrap_socket(connect(node.port), server_hostname="127.0.0.1") as encrypted:
            encrypted.sendall(HALF_REQUEST)
            assert trickle(encrypted) < 4


def get(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as exc:
        return exc.code, exc.read().decode()


def test_half_http_requests_block_nobody(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    watch = HealthServer(("127.0.0.1", 0), Events(), spool, str, str, PendingConnections(4, 1.0))
    try:
        with ExitStack() as stack:
            before = threading.active_count()
            strangers = [
                stack.enter_context(connect(watch.port, b"GET /health HTTP/1.1\r\nX: "))
                for _ in range(30)
            ]
            assert threading.active_count() < before + 4 + 12
            assert get(watch.port, "/health") == (200, "ok\n")
            assert trickle(strangers[-1]) < 4
    finally:
        watch.close()
        spool.close()


def test_health_reports_full_or_ended_node(tmp_path: Path) -> None:
    with acceptor(tmp_path, associations=1) as node:
        watch = HealthServer(("127.0.0.1", 0), Events(), node._spool, node.wrong, node.wrong)
        try:
            assert get(watch.port, "/health") == (200, "ok\n")
            with connect(node.port, request()) as only:
                assert only.recv(1)[0] == ACCEPTED
                assert get(watch.port, "/health") == (503, "all 1 associations are taken\n")
            until(lambda: get(watch.port, "/health")[0] == 200, "the place is free", 10)
            node._server._BaseServer__shutdown_request = True  # what an error in its loop comes to
            node._thread.join(10)
            assert get(watch.port, "/ready") == (
                503,
                "the thread that takes connections has ended\n",
            )
        finally:
            watch.close()


def test_node_survives_descriptor_shortage(fake_model: Path, tmp_path: Path) -> None:
    with Serving(fake_model, tmp_path / "spool", "--keep") as node, ExitStack() as stack:
        assert echo(node.port) == 0
        used = len(os.listdir(f"/proc/{node.process.pid}/fd"))
        resource.prlimit(node.process.pid, resource.RLIMIT_NOFILE, (used + 6, used + 6))
        strangers = [stack.enter_context(connect(node.port, HALF_REQUEST)) for _ in range(30)]
        assert echo(node.port) == 0
        for stranger in strangers:
            stranger.close()
        assert node.get("/health") == "ok\n" and echo(node.port) == 0


def test_strangers_words_are_printed_harmlessly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with events_on_standard_error(), acceptor(tmp_path) as node:
        for title in (b"EV\x1b[31m\nIL", b"\xe2\x80\xae\x9b31m", b"A\r\x07\x08B"):
            with connect(node.port, request(calling=title)) as stranger:
                assert answer(stranger)[0] in (ABORTED, REJECTED)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(line.isprintable() for line in lines)


def usage(process: int) -> dict[str, int]:
    """What a process holds: resident MiB, threads, descriptors."""
    status = dict(
        line.split(":\t", 1)
        for line in Path(f"/proc/{process}/status").read_text().splitlines()
        if ":\t" in line
    )
    files = len(os.listdir(f"/proc/{process}/fd"))
    return {
        "MiB": int(status["VmRSS"].split()[0]) >> 10,
        "threads": int(status["Threads"]),
        "files": files,
    }


@pytest.mark.slow
def test_load_that_is_held(fake_model: Path, tmp_path: Path) -> None:
    """The figures of docs/how-to/dicom-node.md: 400 strangers of each kind, who stay; meanwhile a known
    peer's echo takes below a second.
    """
    pem = certificates(tmp_path / "tls")
    options = ("--tls-cert", pem["cert"], "--tls-key", pem["key"], "--tls-ca", pem["ca"])
    client = ssl.create_default_context(cafile=pem["ca"])
    client.load_cert_chain(pem["cert"], pem["key"])
    kinds = {
        "silent": ((), False, b""),
        "half a request": ((), False, HALF_REQUEST),
        "no transfer syntax": ((), False, request(syntax=b"")),
        "no TLS handshake": (options, False, b""),
        "half an HTTP request": ((), True, b"GET /health HTTP/1.1\r\nX: "),
    }
    for kind, (more, is_http, first) in kinds.items():
        with Serving(fake_model, tmp_path / kind, "--keep", *more) as node, ExitStack() as stack:
            tls = (client, "127.0.0.1") if more else None
            assert echo(node.port, tls) == 0
            before = usage(node.process.pid)
            for _ in range(400):
                stranger = socket.create_connection(
                    ("127.0.0.1", node.http if is_http else node.port), timeout=20
                )
                stack.callback(stranger.close)
                with suppress(OSError):  # it is ended already
                    stranger.sendall(first)
            started = time.monotonic()
            assert echo(node.port, tls) == 0 and node.get("/health") == "ok\n"
            seconds, during = time.monotonic() - started, usage(node.process.pid)
            print(f"400 x {kind}: {before} -> {during}, echo and health {seconds:.2f} s")
            assert (
                seconds < 3
                and during["threads"] < 130
                and during["files"] < 130
                and during["MiB"] < before["MiB"] + 48
            )
            stack.close()
            until(
                lambda node=node, before=before: (
                    usage(node.process.pid)["threads"] <= before["threads"] + 1
                ),
                "the threads end",
                20,
            )
