"""`mask2ct serve`: what is acknowledged is never lost, what is painted is what `synth` paints, strangers and damage are refused by name."""

from __future__ import annotations

import errno
import gc
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_masks import save, slices, structure_set
from nodes import DEADLINE, SECRETS, Serving, archive, associate, free_port, push, read_all, resident, until, write_study
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage, SegmentationStorage, generate_uid
from samples import synth

from runtime import OutputError, UsageError
from runtime.__main__ import main
from runtime.console import run
from runtime.node import outbox as outbox_module
from runtime.node.events import Events, plain
from runtime.node.outbox import Acknowledged, Outbox, Outcome, Unreachable
from runtime.node.send import Pacs
from runtime.node.spool import Spool
from runtime.node.stow import DicomWeb

VERIFICATION = "1.2.840.10008.1.1"
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    """pynetdicom leaves the sockets of rejected associations to the collector, which says so."""
    yield
    gc.collect()


def settled(node: Serving, studies: int = 1, seconds: float = DEADLINE) -> None:
    until(lambda: node.count("settled") >= studies, "all is sent", seconds)


def spooled(spool: Path) -> list[Path]:
    return list(spool.rglob("*.dcm"))


def test_a_segmentation_becomes_a_series_in_the_archive(fake_model: Path, tmp_path: Path) -> None:
    """The same objects as a local run makes, each sent once, and nothing of the mask stays behind."""
    mask = write_study(tmp_path / "in")
    assert synth(fake_model, tmp_path / "local", mask, "--format", "dicom") == 0
    with archive(tmp_path / "pacs") as (port, seen), Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node:
        echo = associate(node.port, [VERIFICATION])
        assert echo.send_c_echo().Status == 0
        echo.release()
        assert push(node.port, mask) == [0]
        settled(node)
        sent, local = read_all(tmp_path / "pacs"), read_all(tmp_path / "local")
        assert len(local) == 6 and sorted(seen) == sorted(local) and sent == local
        assert all(sent[uid].PixelData == local[uid].PixelData for uid in local)
        assert not any(secret in str(ds) for ds in sent.values() for secret in SECRETS[:-2])
        assert not spooled(tmp_path / "spool")
        assert node.get("/health") == node.get("/ready") == "ok\n"
        metrics = node.get("/metrics")
        assert f'mask2ct_node_events_total{{event="sent",peer="PACS@127.0.0.1:{port}"}} 1.0' in metrics
        assert (
            'mask2ct_node_events_total{event="stored",peer="SENDER"} 1.0' in metrics
            and 'mask2ct_node_studies{room="failed"} 0.0' in metrics
        )
        code, seconds = node.stop()
    assert code == 0 and seconds < 5


def test_contours_wait_for_the_images_they_lie_on_and_images_for_contours(fake_model: Path, tmp_path: Path) -> None:
    """The same bytes as a local run; what comes within the quiet period belongs together, images alone are no mask."""
    images = slices(np.zeros((4, 16, 16), np.int16), Modality="CT", StudyInstanceUID=generate_uid())
    z = [float(ds.ImagePositionPatient[2]) for ds in images]
    rois = {"left ventricle": [np.array([[-8.0, 6, h], [0, 6, h], [0, 14, h], [-8, 14, h]]) for h in z]}
    contours = structure_set(tmp_path / "local" / "Doe_John_Planted_rt.dcm", images, rois)
    save(tmp_path / "local", images)
    assert synth(fake_model, tmp_path / "out", tmp_path / "local", "--format", "dicom") == 0
    with Serving(fake_model, tmp_path / "spool", "--keep", quiet=0.5) as node:
        assert push(node.port, *images) == [0] * 4
        other = write_study(tmp_path / "in")
        assert push(node.port, other) == [0]
        settled(node)  # the other study: by now the images have been quiet as well
        assert len([*(tmp_path / "spool" / "incoming").glob("*/image-*.dcm")]) == 4
        assert push(node.port, contours) == [0]
        settled(node, 2)
        done = read_all(tmp_path / "spool" / "done")
    local = read_all(tmp_path / "out")
    assert len(local) == 5 and {uid: done[uid] for uid in local} == local


def test_strangers_and_what_is_not_understood_are_refused(fake_model: Path, tmp_path: Path) -> None:
    """With the standard's own statuses, a line each, and without a word of the patient; the association goes on."""
    mask = dcmread(write_study(tmp_path / "in"))
    with Serving(fake_model, tmp_path / "spool", "--keep", "--max-object", "16KiB", "--max-associations", "2", quiet=60) as node:
        stranger = associate(node.port, [SegmentationStorage], calling="STRANGER")
        assert stranger.is_rejected and stranger.acceptor.primitive.diagnostic == 3  # calling AE title not recognized (PS3.8 9.3.4)
        wrong = associate(node.port, [SegmentationStorage], called="ANOTHER")
        assert wrong.is_rejected and wrong.acceptor.primitive.diagnostic == 7
        assert associate(node.port, [SecondaryCaptureImageStorage]).rejected_contexts[0].abstract_syntax == SecondaryCaptureImageStorage
        until(lambda: node.said("not-supported"), "the class is named")

        lying, nameless, large = (dcmread(BytesIO(as_bytes(mask))) for _ in range(3))
        lying.SOPInstanceUID = generate_uid()
        del nameless.StudyInstanceUID
        large.PixelData = bytes(1 << 20)
        both = associate(node.port, [SegmentationStorage])
        both.send_c_store(lying)
        assert send_as(both, lying, mask.SOPInstanceUID) == 0xA900
        assert send_as(both, nameless, mask.SOPInstanceUID) == 0xC000
        assert send_as(both, large, mask.SOPInstanceUID) == 0xA700
        assert both.send_c_store(mask).Status == 0  # the association was not ended, the limit is an object's and not a sum's
        second = associate(node.port, [VERIFICATION])
        third = associate(node.port, [VERIFICATION])
        assert second.is_established and third.is_rejected and third.acceptor.primitive.diagnostic == 2  # local limit exceeded
        second.release()
        both.release()

        held = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(5)]  # who says nothing takes nobody's place
        for said in (b"GET / HTTP/1.1\r\n\r\n", b"\x01\x00\xff\xff\xff\xff" + bytes(4096), b""):
            with socket.create_connection(("127.0.0.1", node.port)) as raw:
                raw.sendall(said)
                raw.shutdown(socket.SHUT_WR)
                raw.settimeout(20)
                while raw.recv(4096):  # an A-ABORT, or the end
                    pass
        assert push(node.port, mask) == [0]
        for raw in held:
            raw.close()
        assert len(spooled(tmp_path / "spool")) == 2  # `lying` was true to itself at first
        for status in ("status=0xA900", "status=0xC000", "status=0xA700"):
            assert node.said("refused", "peer=SENDER", status), node.log
        assert node.said("rejected", "calling=STRANGER"), node.log
        assert node.count("rejected") == 3 and 'reason="too many associations"' in node.log


def as_bytes(ds: Dataset) -> bytes:
    buffer = BytesIO()
    ds.save_as(buffer)
    return buffer.getvalue()


def send_as(association: Any, data: bytes | Dataset, uid: str) -> int:
    """The status of a C-STORE whose data set is whatever it is: pynetdicom itself would send none but what it understands."""
    from pynetdicom.dimse_primitives import C_STORE
    from pynetdicom.dsutils import encode

    (context,) = association.accepted_contexts
    if isinstance(data, Dataset):
        data = encode(data, context.transfer_syntax[0].is_implicit_VR, context.transfer_syntax[0].is_little_endian) or b""
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID, request.DataSet = SegmentationStorage, uid, BytesIO(data)
    association._reactor_checkpoint.clear()  # as its own send_c_store does: the answer is ours
    until(lambda: association._is_paused, "the association's thread waits")
    association.dimse.send_msg(request, context.context_id)
    status = int(association.dimse.get_msg(block=True)[1].Status)
    association._reactor_checkpoint.set()
    return status


def test_what_the_archive_has_already_is_sent_no_more(fake_model: Path, tmp_path: Path) -> None:
    mask = write_study(tmp_path / "in")
    with (
        archive(tmp_path / "pacs", status=lambda uid: 0x0111) as (port, _),  # Duplicate SOP Instance
        Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node,
    ):
        assert push(node.port, mask) == [0]
        until(lambda: node.said("settled"), "the study is settled")


def test_garbage_as_a_data_set_is_refused_by_status(fake_model: Path, tmp_path: Path) -> None:
    with Serving(fake_model, tmp_path / "spool", "--keep") as node:
        association = associate(node.port, [SegmentationStorage])
        for damage in (b"\xff" * 4000, b"\x08\x00\x16\x00UI\xff\xffDoe^John", b"DoeDoeDoe" * 99):
            assert send_as(association, damage, "1.2.3") in (0xC000, 0xA900)
        association.release()
        until(lambda: node.count("refused") == 3, "each is named")
        assert not spooled(tmp_path / "spool") and not [*(tmp_path / "spool" / "incoming").iterdir()]


def test_a_mask_that_cannot_be_painted_is_put_aside_with_its_reason(fake_model: Path, tmp_path: Path) -> None:
    good, bad = write_study(tmp_path / "good"), dcmread(write_study(tmp_path / "bad", 1))
    for segment, name in zip(bad.SegmentSequence, ("Doe spleen", "Doe liver"), strict=True):
        segment.SegmentLabel = name
        segment.SegmentedPropertyTypeCodeSequence[0].CodeValue = "0815"
    bad.StudyInstanceUID, bad.SOPInstanceUID = generate_uid(), generate_uid()
    bad.file_meta.MediaStorageSOPInstanceUID = bad.SOPInstanceUID
    with archive(tmp_path / "pacs") as (port, seen), Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node:
        assert push(node.port, bad) == [0]
        until(lambda: node.said("failed"), "the failure is told")
        assert push(node.port, good) == [0]
        settled(node, 2)
        assert len(seen) == 6
        (aside,) = (tmp_path / "spool" / "failed").iterdir()
        assert "seg-" in (aside / "reason.txt").read_text() and [ds.SOPInstanceUID for ds in read_all(aside).values()] == [
            bad.SOPInstanceUID
        ]


def test_what_it_painted_itself_comes_back_and_goes_no_further(fake_model: Path, tmp_path: Path) -> None:
    """An archive that routes every SEG to the node makes no circle."""
    assert synth(fake_model, tmp_path / "out", write_study(tmp_path / "in"), "--format", "dicom") == 0
    with archive(tmp_path / "pacs") as (port, seen), Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node:
        assert push(node.port, *sorted((tmp_path / "out").rglob("*.dcm"))) == [0] * 6
        settled(node)
        assert node.said("ignored") and not seen and not spooled(tmp_path / "spool")


def test_what_is_not_acknowledged_is_sent_again_and_nothing_else(fake_model: Path, tmp_path: Path) -> None:
    """The archive is away, then it refuses some objects, meanwhile the node is killed: all arrive, and what was acknowledged only once."""
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
    with archive(tmp_path / "pacs", port, status=status) as (_, seen), Serving(fake_model, tmp_path / "spool", *to) as node:
        settled(node)
        assert len(refused) == 2 and node.said("not-taken")
        assert sorted(seen) == sorted([*read_all(tmp_path / "pacs"), *refused]) and len(seen) == 8
        assert not node.said("painted")  # it was painted before the kill, and proven so
    assert not spooled(tmp_path / "spool")


def test_what_was_acknowledged_survives_kill_and_is_painted_afterwards(fake_model: Path, tmp_path: Path) -> None:
    masks = [write_study(tmp_path / "in" / str(n), n) for n in range(3)]
    with Serving(fake_model, tmp_path / "spool", "--keep", quiet=3600) as node:
        assert push(node.port, *masks) == [0] * 3
        node.stop(signal.SIGKILL)
    (tmp_path / "spool" / "incoming" / ".part-elsewhere-1-ff-object.dcm").write_bytes(b"half")
    with Serving(fake_model, tmp_path / "spool", "--keep") as node:
        settled(node, 3)
    assert len([*(tmp_path / "spool" / "done").glob("*/results/*/seg.dcm")]) == 3
    assert not [*(tmp_path / "spool" / "incoming").iterdir()]


def test_sigterm_ends_it_within_five_seconds_with_a_peer_that_says_nothing(fake_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as dead:
        to = ("--send-to", f"PACS@127.0.0.1:{dead.getsockname()[1]}", "--stow", f"http://127.0.0.1:{dead.getsockname()[1]}/dicom-web")
        with Serving(fake_model, tmp_path / "spool", *to) as node:
            open_still = associate(node.port, [SegmentationStorage])
            assert push(node.port, write_study(tmp_path / "in")) == [0]
            until(lambda: node.said("painted"), "it is painted")
            dead.accept()
            code, seconds = node.stop()
            assert code == 0 and seconds < 5 and node.said("stopped")
            assert not open_still.is_released
            open_still.abort()
    with archive(tmp_path / "pacs") as (port, seen), Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node:
        settled(node)
        assert len(seen) == 6


def test_an_archive_that_stops_reading_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the association and then no more of an object than fits into the network's buffers."""
    monkeypatch.setattr("runtime.node.send.ANSWER", 0.5)
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
        to, said = Pacs(f"PACS@127.0.0.1:{between.getsockname()[1]}", "MASK2CT", None), []

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

    def send(self, files: Sequence[Path]) -> Iterator[Outcome]:
        for file in files:
            if self._poison in file.read_text():
                raise Unreachable("the association broke")
            self.taken.append(file.read_text())
            yield Outcome(file, "")

    def stop(self) -> None: ...


def results_in(spool: Path, study: str, text: str) -> Path:
    file = spool / "outbox" / study / "results" / "seg" / "0001.dcm"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    return file.parents[2]


def test_a_study_on_which_an_archive_breaks_down_keeps_no_other_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.node.outbox.FIRST_PAUSE", 0.02)
    spool, to = Spool(tmp_path), Picky("poison")
    for n, text in enumerate(("poison a", "poison b", "good c", "good d")):
        results_in(tmp_path, f"study-{n}-1", text)
    outbox = Outbox(spool, [to], Events())
    outbox.start()
    try:
        until(lambda: len(spool.names("outbox")) == 2, "the good ones are sent", 5)
    finally:
        outbox.close(5)
        spool.close()
    assert to.taken == ["good c", "good d"]


def test_a_study_that_comes_again_while_its_first_is_settled_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the same name again: it comes to the outbox after a sender has looked there for the first one's files and found none."""
    spool, look = Spool(tmp_path), outbox_module.sendable
    come: list[str] = []

    def looks_too_early(package: Path) -> list[str]:
        found = look(package)
        if not package.exists():
            results_in(tmp_path, package.name, "new")
            come.append(package.name)
        return found

    monkeypatch.setattr(outbox_module, "sendable", looks_too_early)
    Outbox(spool, [Picky("poison")], Events()).settle(tmp_path / "outbox" / "study-1")
    assert spool.names("outbox") == come
    spool.close()


def certificates(folder: Path) -> dict[str, Path]:
    """An authority and a certificate for localhost that it signed, by openssl."""
    made = {name: folder / f"{name}.pem" for name in ("ca", "ca-key", "cert", "key")}
    folder.mkdir()
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    subprocess.run([*new, "-subj", "/CN=test authority", "-keyout", made["ca-key"], "-out", made["ca"]], check=True, capture_output=True)
    signed = ["-CA", made["ca"], "-CAkey", made["ca-key"], "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*new, *signed, "-keyout", made["key"], "-out", made["cert"]], check=True, capture_output=True)
    return made


def test_tls_lets_in_who_has_a_certificate_and_nobody_else(fake_model: Path, tmp_path: Path) -> None:
    """Mutual, and outwards as well: one node sends to another."""
    pem = certificates(tmp_path / "tls")
    options = ("--tls-cert", pem["cert"], "--tls-key", pem["key"], "--tls-ca", pem["ca"])
    client = ssl.create_default_context(cafile=pem["ca"])
    stranger = ssl.create_default_context(cafile=pem["ca"])
    client.load_cert_chain(pem["cert"], pem["key"])
    mask = write_study(tmp_path / "in")
    with Serving(fake_model, tmp_path / "b", "--keep", *options, allow="MASK2CT", quiet=3600) as end:
        with Serving(fake_model, tmp_path / "a", "--send-to", f"tls://MASK2CT@127.0.0.1:{end.port}", *options) as node:
            assert not associate(node.port, [VERIFICATION], tls=(stranger, "127.0.0.1")).is_established
            with socket.create_connection(("127.0.0.1", node.port)):  # one who never greets holds nobody up
                assert not associate(node.port, [VERIFICATION]).is_established
                assert push(node.port, mask, tls=(client, "127.0.0.1")) == [0]
            settled(node)
            assert node.said("rejected", "reason=TLS")
        assert end.count("stored") == 6


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
        return {"00081155": {"vr": "UI", "Value": [uid]}, "00081197": {"vr": "US", "Value": [reason]}}

    return json.dumps({"00081199": {"Value": [item(u) for u in stored]}, "00081198": {"Value": [item(u) for u in failed]}}).encode()


def test_stow_takes_each_object_at_the_services_word(fake_model: Path, tmp_path: Path, web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    url, answers, seen = web
    assert synth(fake_model, tmp_path / "out", write_study(tmp_path / "in"), "--format", "dicom") == 0
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
    assert headers["Content-Type"].startswith('multipart/related; type="application/dicom"; boundary=')
    assert all(file.read_bytes() in body for file in files) and body.count(b"Content-Type: application/dicom\r\n\r\n") == 6
    with pytest.raises(Unreachable, match="HTTP 503"):
        list(to.send(files))
    assert all(outcome.refused for outcome in to.send(files))  # success without a word of the object is none
    with pytest.raises(UsageError, match="in the clear"):
        DicomWeb("http://pacs.example/dicom-web", None)
    for wrong in (
        "user:secret@pacs.example/dicom-web",
        "pacs.example:99999/",
        "pacs.example:x/",
        "[pacs/",
        "pacs.example/#a",
        "pacs.example/a b",
    ):
        with pytest.raises(UsageError, match="no DICOMweb address"):
            DicomWeb(f"https://{wrong}", None)


def test_stow_takes_what_is_there_already_as_stored_and_sends_one_by_one_what_is_too_much_at_once(tmp_path: Path, web: Any) -> None:
    """Some services refuse an object that they have: it was sent before a kill, or its study came twice. Others limit a request's size."""
    url, answers, seen = web
    files = [write_study(tmp_path / str(n), n) for n in range(3)]
    uids = [str(dcmread(file).SOPInstanceUID) for file in files]
    answers += [(413, b""), *((200, answer([uid], [])) for uid in uids[:2]), (409, answer([], uids[2:], 0xB00E))]
    assert [outcome.refused for outcome in DicomWeb(url, None).send(files)] == [""] * 3
    assert [sum(file.read_bytes() in body for file in files) for _, _, body in seen] == [3, 1, 1, 1]
    answers += [(413, b"")]
    assert [outcome.refused for outcome in DicomWeb(url, None).send(files[:1])] == ["HTTP 413, failure reason 0x0000"]


def test_a_full_disk_takes_nothing_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", disk], check=False, capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a tmpfs")
    try:
        spool = Spool(disk)
        for claimed_size in (1 << 20, 80 << 20):  # it does not fit though it was said to; it does not fit
            with pytest.raises(OutputError):
                spool.receive(lambda handle: handle.write(bytes(90 << 20)), ("1.2", "1.2.3"), claimed_size, threading.current_thread())
        assert not [path for path in disk.rglob("*") if path.is_file() and not path.name.endswith(".journal")]
        spool.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def kept(spool: Spool, mask: Path) -> str:
    """What the spool calls the study of a file that it takes, from a sender that is gone already."""
    ds, gone = dcmread(mask), threading.Thread()
    return spool.receive(lambda handle: handle.write(mask.read_bytes()), (ds.SOPClassUID, ds.SOPInstanceUID), 1 << 20, gone)


def test_a_mask_that_could_not_be_kept_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder could not be made, as on a disk without inodes: nothing was acknowledged, nothing is there to paint."""
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


def test_a_study_that_failed_and_then_is_painted_after_all_has_no_reason(tmp_path: Path) -> None:
    """The node was killed after the reason was written; the next time the mask could be painted."""
    spool = Spool(tmp_path / "spool")
    kept(spool, write_study(tmp_path / "in"))
    study = spool.next(0)
    assert study is not None
    (study / "reason.txt").write_text("out of memory")
    spool.painted(study, [])
    spool.finish(tmp_path / "spool" / "outbox" / study.name)
    assert not spool.names("failed") and not spooled(tmp_path / "spool")
    spool.close()


def test_nobody_else_on_the_machine_can_look_into_the_spool(tmp_path: Path) -> None:
    Spool(tmp_path / "spool").close()
    assert (tmp_path / "spool").stat().st_mode & 0o077 == 0


def test_a_log_that_cannot_be_written_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", full)
        Events()("stored")
        patched.undo()
        with suppress(OSError):  # what is left in its buffer
            full.close()


def test_a_torn_line_of_acknowledgement_is_none(tmp_path: Path) -> None:
    sent = Acknowledged(tmp_path, "PACS@host:104")
    sent.add("seg-1/0001.dcm")
    sent.add("seg-1/0002.dcm")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    again = Acknowledged(tmp_path, "PACS@host:104")
    assert again.files == {"seg-1/0001.dcm"}
    again.add("seg-1/0003.dcm")
    assert Acknowledged(tmp_path, "PACS@host:104").files == {"seg-1/0001.dcm", "seg-1/0003.dcm"}
    assert Acknowledged(tmp_path, "OTHER@host:104").files == set()


def test_a_value_stays_on_its_line() -> None:
    assert plain("A\nB\x1b[2J") == "A?B?[2J" and plain('two "words"') == "\"two 'words'\""


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--keep"], "nobody may send"),
        (["--allow-any"], "goes nowhere"),
        (["--allow", "A" * 17, "--keep"], "is no AE title"),
        (["--allow", "A", "--allow-any", "--keep"], "exclude each other"),
        (["--allow", "A", "--send-to", "PACS@host"], "is no destination"),
        (["--allow", "A", "--send-to", "tls://PACS@host:104"], "needs certificates"),
        (["--allow", "A", "--stow", "ftp://host/"], "no DICOMweb address"),
        (["--allow", "A", "--keep", "--tls-cert", "x.pem"], "TLS is mutual"),
        (["--allow", "A", "--keep", "--host", "203.0.113.1"], "cannot be had"),
        (["--allow", "A", "--send-to", "P@h:1", "--send-to", "P@h:1"], "given twice"),
    ],
)
def test_a_wrong_command_starts_nothing(
    options: list[str], fact: str, fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["serve", "--model", str(fake_model), "--backend", "fake", "--spool", str(tmp_path / "spool"), "--port", "0", *options]
    assert run(main, line) == 2
    said = capsys.readouterr().err
    assert fact in said and "remedy" in said and "listening" not in said


def test_a_services_token_goes_to_one_service_alone(
    fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASK2CT_STOW_TOKEN", "secret-4711")
    line = ["serve", "--model", str(fake_model), "--backend", "fake", "--spool", str(tmp_path / "spool"), "--allow", "A"]
    assert run(main, [*line, "--stow", "https://one.example/dicom-web", "--stow", "https://two.example/dicom-web"]) == 2
    said = capsys.readouterr().err
    assert "several" in said and ".netrc" in said and "secret" not in said


@pytest.mark.parametrize("package", ["pynetdicom", "prometheus_client"])
def test_a_missing_package_is_named_with_what_installs_it(
    package: str, fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    line = [
        "serve",
        "--model",
        str(fake_model),
        "--backend",
        "fake",
        "--spool",
        str(tmp_path / "spool"),
        "--port",
        "0",
        "--allow-any",
        "--keep",
    ]
    assert run(main, line) == 3 and 'pip install "mask2ct[node]"' in capsys.readouterr().err
    assert not (tmp_path / "spool").exists()


def test_two_nodes_never_share_a_spool(fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Serving(fake_model, tmp_path / "spool", "--keep"):
        line = [
            "serve",
            "--model",
            str(fake_model),
            "--backend",
            "fake",
            "--spool",
            str(tmp_path / "spool"),
            "--port",
            "0",
            "--allow-any",
            "--keep",
        ]
        assert run(main, line) == 2 and "folder" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_again_and_again_it_loses_nothing_and_sends_what_was_acknowledged_once(fake_model: Path, tmp_path: Path) -> None:
    """Killed as soon as it has stored, painted, sent a part, sent all: what was in flight may come twice, as the same object."""
    kills = 12
    masks = [write_study(tmp_path / "in" / str(n), n, (30, 16, 16)) for n in range(kills)]
    assert synth(fake_model, tmp_path / "local", *masks, "--format", "dicom") == 0
    local = read_all(tmp_path / "local")
    with archive(tmp_path / "pacs") as (port, seen):
        to = ("--send-to", f"PACS@127.0.0.1:{port}")
        for n, mask in enumerate(masks):
            with Serving(fake_model, tmp_path / "spool", *to, quiet=0.1) as node:
                before = len(seen)
                assert push(node.port, mask) == [0]
                reached = [
                    lambda: True,
                    lambda: node.said("painted"),
                    lambda before=before: len(seen) > before + 7,
                    lambda: node.said("settled"),
                ][n % 4]
                until(reached, "the moment to kill it")
                node.stop(signal.SIGKILL)
        with Serving(fake_model, tmp_path / "spool", *to, quiet=0.1) as node:
            until(lambda: set(seen) >= set(local), "all has arrived")
            until(lambda: not any([*(tmp_path / "spool" / room).iterdir()] for room in ("incoming", "studies", "outbox")), "nothing waits")
            assert node.stop()[0] == 0
        assert read_all(tmp_path / "pacs") == local and len(local) == kills * 31
        assert len(seen) <= len(local) + kills  # at most the one in flight at each kill
    assert not [*(tmp_path / "spool" / "failed").iterdir()]


@pytest.mark.slow
def test_a_thousand_objects_from_eight_senders_at_once_are_all_there_and_memory_stays_flat(fake_model: Path, tmp_path: Path) -> None:
    """By DCMTK's storescu; painted meanwhile and afterwards; a stranger is refused in the midst of it."""
    senders, each, expected = 8, 125, set[str]()
    for sender in range(senders):
        folder = tmp_path / "in" / str(sender)
        first = write_study(folder, sender, (2, 16, 16))
        made = dcmread(first)
        for n in range(each):
            made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [1 + n / 1000, 1.5 + sender / 10]  # no two alike
            made.save_as(folder / f"{n}.dcm")
            expected.add(str(made.SOPInstanceUID))
        first.unlink()
    command = ["storescu", "-R", "-aet", "SENDER", "-aec", "MASK2CT", "+sd", "127.0.0.1"]
    with archive(tmp_path / "pacs") as (port, seen):
        to = ("--keep", "--segmentation", "none", "--max-associations", senders + 1, "--send-to", f"PACS@127.0.0.1:{port}")
        with Serving(fake_model, tmp_path / "spool", *to, quiet=0.5) as node:
            warm = write_study(tmp_path / "warm", 99, (2, 16, 16))  # what painting and sending need is loaded once
            assert push(node.port, warm) == [0]
            settled(node)
            memory = [resident(node.process.pid)]
            running = [
                subprocess.Popen([*command, str(node.port), tmp_path / "in" / str(n)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
                for n in range(senders)
            ]
            assert associate(node.port, [VERIFICATION], calling="STRANGER").is_rejected
            assert [(process.communicate(timeout=300)[0].count(b"E:"), process.returncode) for process in running] == [(0, 0)] * senders
            until(lambda: node.count("stored") == 1001, "all are told")
            memory.append(resident(node.process.pid))
            settled(node, senders + 1, 300)
            memory.append(resident(node.process.pid))
            kept = {
                str(dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in (tmp_path / "spool" / "done").glob("*/objects/*.dcm")
            }
            assert kept == expected | {str(dcmread(warm).SOPInstanceUID)}
            assert len([*(tmp_path / "spool" / "done").glob("*/results/*/0002.dcm")]) == 1001
            assert node.count("failed") == 0 and len(seen) == len(set(seen)) == 2 * 1001
            assert max(memory) - memory[0] < 24 << 20, memory
            code, seconds = node.stop()
    assert code == 0 and seconds < 5
