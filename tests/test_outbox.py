"""What is synthesized goes to each archive until it is acknowledged, and never after: C-STORE,
STOW-RS, and the spool in between.
"""

from __future__ import annotations

import errno
import json
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from nodes import (
    DEADLINE,
    QUIETLY,
    Serving,
    archive,
    free_port,
    push,
    read_all,
    serve,
    settled,
    spooled,
    until,
    write_study,
)
from pydicom import dcmread
from pydicom.uid import generate_uid
from samples import synth

from runtime import OutputError, UsageError
from runtime.service import send_queue as outbox_module
from runtime.service.dicomweb import DicomWeb
from runtime.service.events import Events
from runtime.service.send_queue import DeliveryLog, DeliveryResult, SendQueue, Unreachable
from runtime.service.store_scu import StoreSCU
from runtime.service.study_spool import Spool

pytestmark = QUIETLY


def test_duplicate_object_counts_as_sent(fake_model: Path, tmp_path: Path) -> None:
    """Objects that the archive has already are not sent again."""
    mask = write_study(tmp_path / "in")
    with (
        archive(tmp_path / "pacs", status=lambda uid: 0x0111) as (
            port,
            _,
        ),  # Duplicate SOP Instance
        Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node,
    ):
        assert push(node.port, mask) == [0]
        until(lambda: node.said("settled"), "the study is settled")


def test_unacknowledged_objects_are_resent(fake_model: Path, tmp_path: Path) -> None:
    """Objects without an acknowledgement are sent again, and no others.

    The archive is away, then it refuses some objects, meanwhile the node is killed: all arrive, and
    what was acknowledged only once.
    """
    port, mask, refused = free_port(), write_study(tmp_path / "in"), set[str]()

    def status(uid: str) -> int:
        if len(refused) < 2 and uid not in refused:
            refused.add(uid)
            return 0xA700
        return 0

    to = ("--send-to", f"PACS@127.0.0.1:{port}")
    with Serving(fake_model, tmp_path / "spool", *to) as node:
        assert push(node.port, mask) == [0]
        until(lambda: node.said("unreachable"), "the archive is away")
        assert node.stop(signal.SIGKILL)[0] == -signal.SIGKILL
    with (
        archive(tmp_path / "pacs", port, status=status) as (_, seen),
        Serving(fake_model, tmp_path / "spool", *to) as node,
    ):
        settled(node)
        assert len(refused) == 2 and node.said("not-taken")
        assert sorted(seen) == sorted([*read_all(tmp_path / "pacs"), *refused]) and len(seen) == 8
        assert not node.said("processed")  # it was synthesized before the kill, and proven so
    assert not spooled(tmp_path / "spool")


def test_stalled_archive_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the association and then no more of an object than fits into the network's
    buffers.
    """
    monkeypatch.setattr("runtime.service.store_scu.ANSWER", 0.5)
    large = dcmread(write_study(tmp_path / "in"))
    large.PixelData = bytes(24 << 20)
    large.save_as(tmp_path / "large.dcm")
    ended = threading.Event()
    with archive(tmp_path / "pacs") as (port, _), socket.create_server(("127.0.0.1", 0)) as between:

        def pass_on() -> None:
            with between.accept()[0] as one, socket.create_connection(("127.0.0.1", port)) as other:
                other.sendall(one.recv(1 << 16))  # the association, both ways, and that is all
                one.sendall(other.recv(1 << 16))
                ended.wait(DEADLINE)

        passing = threading.Thread(target=pass_on)
        passing.start()
        to, said = StoreSCU(f"PACS@127.0.0.1:{between.getsockname()[1]}", "MASK2CT", None), []

        def send() -> None:
            with pytest.raises(Unreachable) as failure:
                list(to.send([tmp_path / "large.dcm"]))
            said.append(str(failure.value))

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        sending.join(10)
        ended.set()
        passing.join(DEADLINE)
    assert said == ["the association broke"]


class Picky:
    """A destination that breaks down on some files. `taken`: those it has stored."""

    name = "PICKY"

    def __init__(self, poison: str):
        self._poison = poison
        self.taken: list[str] = []

    def send(self, files: Sequence[Path]) -> Iterator[DeliveryResult]:
        for file in files:
            if self._poison in file.read_text():
                raise Unreachable("the association broke")
            self.taken.append(file.read_text())
            yield DeliveryResult(file, "")

    def stop(self) -> None: ...


def results_in(spool: Path, study: str, text: str) -> Path:
    file = spool / "outbox" / study / "results" / "seg" / "0001.dcm"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return file.parents[2]


def test_failing_study_delays_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study on which an archive breaks down keeps no other study waiting."""
    monkeypatch.setattr("runtime.service.send_queue.FIRST_PAUSE", 0.02)
    spool, to = Spool(tmp_path), Picky("poison")
    for n, text in enumerate(("poison a", "poison b", "good c", "good d")):
        results_in(tmp_path, f"study-{n}-1", text)
    send_queue = SendQueue(spool, [to], Events())
    send_queue.start()
    try:
        until(lambda: len(spool.names("outbox")) == 2, "the good ones are sent", 5)
    finally:
        send_queue.close(5)
        spool.close()
    assert to.taken == ["good c", "good d"]


def test_repeated_study_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study that comes again while its first one is settled is not taken for the first.

    It has the same name again: it comes to the outbox after a sender has looked there for the first
    one's files and found none.
    """
    spool, look = Spool(tmp_path), outbox_module.sendable
    come: list[str] = []

    def looks_too_early(package: Path) -> list[str]:
        found = look(package)
        if not package.exists():
            results_in(tmp_path, package.name, "new")
            come.append(package.name)
        return found

    monkeypatch.setattr(outbox_module, "sendable", looks_too_early)
    SendQueue(spool, [Picky("poison")], Events()).finish(tmp_path / "outbox" / "study-1")
    assert spool.names("outbox") == come
    spool.close()


@pytest.fixture
def web() -> Iterator[tuple[str, list[Any], list[Any]]]:
    """A DICOMweb service that answers as it is told: (URL, answers to come, requests seen)."""
    answers: list[Any] = []
    seen: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, dict(self.headers), body))
            code, reply = answers.pop(0)
            self.send_response(code)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,)).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/dicom-web/", answers, seen
    server.shutdown()
    server.server_close()


def answer(stored: list[str], failed: list[str], reason: int = 0xA700) -> bytes:
    def item(uid: str) -> dict[str, Any]:
        return {
            "00081155": {"vr": "UI", "Value": [uid]},
            "00081197": {"vr": "US", "Value": [reason]},
        }

    return json.dumps(
        {
            "00081199": {"Value": [item(u) for u in stored]},
            "00081198": {"Value": [item(u) for u in failed]},
        }
    ).encode()


def test_stow_status_of_each_object(
    fake_model: Path, tmp_path: Path, web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """STOW-RS takes the answer of the service for each object."""
    url, answers, seen = web
    assert (
        synth(fake_model, tmp_path / "out", write_study(tmp_path / "in"), "--format", "dicom") == 0
    )
    files = sorted((tmp_path / "out").rglob("*.dcm"))
    uids = [str(dcmread(file).SOPInstanceUID) for file in files]
    monkeypatch.setenv("MASK2CT_STOW_TOKEN", "secret-4711")
    to = DicomWeb(url, None)
    answers += [(409, answer(uids[:4], uids[4:5])), (503, b""), (200, b"not JSON")]
    assert [outcome.refused for outcome in to.send(files)] == [""] * 4 + [
        "HTTP 409, failure reason 0xA700",
        "HTTP 409, failure reason 0x0000",
    ]
    path, headers, body = seen[0]
    assert path == "/dicom-web/studies" and headers["Authorization"] == "Bearer secret-4711"
    assert headers["Content-Type"].startswith(
        'multipart/related; type="application/dicom"; boundary='
    )
    assert (
        all(file.read_bytes() in body for file in files)
        and body.count(b"Content-Type: application/dicom\r\n\r\n") == 6
    )
    with pytest.raises(Unreachable, match="HTTP 503"):
        list(to.send(files))
    assert all(
        outcome.refused for outcome in to.send(files)
    )  # success without a word of the object is none
    with pytest.raises(UsageError, match="sent unencrypted"):
        DicomWeb("http://pacs.example/dicom-web", None)
    for wrong in (
        "user:secret@pacs.example/dicom-web",
        "pacs.example:99999/",
        "pacs.example:x/",
        "[pacs/",
        "pacs.example/#a",
        "pacs.example/a b",
    ):
        with pytest.raises(UsageError, match="not a DICOMweb address"):
            DicomWeb(f"https://{wrong}", None)


def test_stow_duplicates_and_size_limits(tmp_path: Path, web: Any) -> None:
    """An object that the service has counts as stored; one by one goes what is too much at once.

    Some services refuse an object that they have: it was sent before a kill, or its study came
    twice. Others limit a request's size.
    """
    url, answers, seen = web
    files = [write_study(tmp_path / str(n), n) for n in range(3)]
    uids = [str(dcmread(file).SOPInstanceUID) for file in files]
    answers += [
        (413, b""),
        *((200, answer([uid], [])) for uid in uids[:2]),
        (409, answer([], uids[2:], 0xB00E)),
    ]
    assert [outcome.refused for outcome in DicomWeb(url, None).send(files)] == [""] * 3
    assert [sum(file.read_bytes() in body for file in files) for _, _, body in seen] == [3, 1, 1, 1]
    answers += [(413, b"")]
    assert [outcome.refused for outcome in DicomWeb(url, None).send(files[:1])] == [
        "HTTP 413, failure reason 0x0000"
    ]


def kept(spool: Spool, mask: Path) -> str:
    """What the spool calls the study of a file that it takes, from a sender that is gone
    already.
    """
    ds, gone = dcmread(mask), threading.Thread()
    return spool.receive(
        lambda handle: handle.write(mask.read_bytes()),
        (ds.SOPClassUID, ds.SOPInstanceUID),
        1 << 20,
        gone,
    )


def test_unstored_mask_delays_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder could not be made, as on a disk without inodes: nothing was acknowledged,
    nothing is there to synthesize.
    """
    spool, made = Spool(tmp_path / "spool"), Path.mkdir

    def full(path: Path, *arguments: Any, **options: Any) -> None:
        if path.parent.name == "incoming":
            raise OSError(errno.ENOSPC, "no space")
        made(path, *arguments, **options)

    other = dcmread(write_study(tmp_path / "in"))
    other.StudyInstanceUID = generate_uid()
    other.save_as(tmp_path / "other.dcm")
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OutputError):
        kept(spool, tmp_path / "other.dcm")
    monkeypatch.setattr(Path, "mkdir", made)
    study = kept(spool, write_study(tmp_path / "in"))
    taken = spool.next(0)
    assert taken is not None and taken.name == f"{study}-1"
    spool.close()


def test_late_success_clears_failure_reason(
    tmp_path: Path,
) -> None:
    """A study that failed and is synthesized afterwards has no reason of failure.

    The node was killed after the reason was written; the next time the mask could be synthesized.
    """
    spool = Spool(tmp_path / "spool")
    kept(spool, write_study(tmp_path / "in"))
    study = spool.next(0)
    assert study is not None
    (study / "reason.txt").write_text("out of memory")
    spool.move_to_send_queue(study, [])
    spool.finish(tmp_path / "spool" / "outbox" / study.name)
    assert not spool.names("failed") and not spooled(tmp_path / "spool")
    spool.close()


def test_spool_is_private(tmp_path: Path) -> None:
    """Other users of the machine cannot read the spool."""
    Spool(tmp_path / "spool").close()
    assert (tmp_path / "spool").stat().st_mode & 0o077 == 0


def test_torn_acknowledgement_line_is_ignored(tmp_path: Path) -> None:
    sent = DeliveryLog(tmp_path, "PACS@host:104")
    sent.add("seg-1/0001.dcm")
    sent.add("seg-1/0002.dcm")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    again = DeliveryLog(tmp_path, "PACS@host:104")
    assert again.files == {"seg-1/0001.dcm"}
    again.add("seg-1/0003.dcm")
    assert DeliveryLog(tmp_path, "PACS@host:104").files == {"seg-1/0001.dcm", "seg-1/0003.dcm"}
    assert DeliveryLog(tmp_path, "OTHER@host:104").files == set()


def test_token_goes_to_one_service(
    fake_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MASK2CT_STOW_TOKEN", "secret-4711")
    services = (
        "--stow",
        "https://one.example/dicom-web",
        "--stow",
        "https://two.example/dicom-web",
    )
    assert serve(fake_model, tmp_path / "spool", "--allow", "A", *services) == 2
    said = capsys.readouterr().err
    assert "several" in said and ".netrc" in said and "secret" not in said
