"""`mask2ct serve`: what is acknowledged is never lost, what is synthesized is what `synth`
synthesizes, strangers and damage are refused by name.
"""

from __future__ import annotations

import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import suppress
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_masks import save, slices, structure_set
from nodes import (
    QUIETLY,
    SECRETS,
    Serving,
    archive,
    associate,
    push,
    read_all,
    resident,
    serve,
    settled,
    spooled,
    until,
    write_study,
)
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import SecondaryCaptureImageStorage, SegmentationStorage, generate_uid
from samples import elsewhere, synth

from runtime import OutputError
from runtime.core.log import events_on_standard_error
from runtime.service.events import Events, plain
from runtime.service.study_spool import Spool

VERIFICATION = "1.2.840.10008.1.1"
pytestmark = QUIETLY


def test_seg_becomes_archived_series(fake_model: Path, tmp_path: Path) -> None:
    """A segmentation becomes a series in the archive.

    The same objects as a local run makes, each sent once, and nothing of the mask stays behind.
    """
    mask = write_study(tmp_path / "in")
    assert synth(fake_model, tmp_path / "local", mask, "--format", "dicom") == 0
    with (
        archive(tmp_path / "pacs") as (port, seen),
        Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node,
    ):
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
        assert (
            f'mask2ct_node_events_total{{event="sent",peer="PACS@127.0.0.1:{port}"}} 1.0' in metrics
        )
        assert (
            'mask2ct_node_events_total{event="stored",peer="SENDER"} 1.0' in metrics
            and 'mask2ct_node_studies{room="failed"} 0.0' in metrics
        )
        code, seconds = node.stop()
    assert code == 0 and seconds < 5


def test_rtstruct_waits_for_images(fake_model: Path, tmp_path: Path) -> None:
    """Contours wait for the images that they lie on, and images wait for contours.

    The same bytes as a local run; what comes within the quiet period belongs together, images alone
    are no mask.
    """
    images = slices(np.zeros((4, 16, 16), np.int16), Modality="CT", StudyInstanceUID=generate_uid())
    structures = contours(tmp_path / "local", images)
    save(tmp_path / "local", images)
    assert synth(fake_model, tmp_path / "out", tmp_path / "local", "--format", "dicom") == 0
    with Serving(fake_model, tmp_path / "spool", "--keep", quiet=0.5) as node:
        assert push(node.port, *images) == [0] * 4
        other = write_study(tmp_path / "in")
        assert push(node.port, other) == [0]
        settled(node)  # the other study: by now the images have been quiet as well
        assert len([*(tmp_path / "spool" / "incoming").glob("*/image-*.dcm")]) == 4
        assert push(node.port, structures) == [0]
        settled(node, 2)
        done = read_all(tmp_path / "spool" / "done")
    local = read_all(tmp_path / "out")
    assert len(local) == 5 and {uid: done[uid] for uid in local} == local


def contours(folder: Path, images: list[Dataset]) -> Path:
    """An RTSTRUCT of one box on each of the images."""
    z = [float(ds.ImagePositionPatient[2]) for ds in images]
    rois = {
        "left ventricle": [np.array([[-8.0, 6, h], [0, 6, h], [0, 14, h], [-8, 14, h]]) for h in z]
    }
    return structure_set(folder / "Doe_John_Planted_rt.dcm", images, rois)


@pytest.mark.parametrize("early", [0, 2], ids=["no image", "half of them"])
def test_late_images_reopen_study(early: int, fake_model: Path, tmp_path: Path) -> None:
    """Contours fail without their images, whose rest comes in two associations; then they give
    what a local run gives.
    """
    images = slices(np.zeros((6, 16, 16), np.int16), Modality="CT", StudyInstanceUID=generate_uid())
    structures = contours(tmp_path / "local", images)
    save(tmp_path / "local", images)
    assert synth(fake_model, tmp_path / "out", tmp_path / "local", "--format", "dicom") == 0
    failed = tmp_path / "spool" / "failed"
    with Serving(fake_model, tmp_path / "spool", "--keep", quiet=0.2) as node:
        for n, late in enumerate((images[:early], images[early:5], images[5:])):
            assert push(node.port, *([structures] if n == 0 else []), *late) == [0] * (
                len(late) + (n == 0)
            )
            until(lambda n=n: node.count("processed") == n + 1, "it is tried")
            assert len([*failed.glob("*/reason.txt")]) == (n < 2)
        settled(node)
        done = read_all(tmp_path / "spool" / "done")
        assert not [*failed.iterdir()] and not [*(tmp_path / "spool" / "incoming").iterdir()]
    local = read_all(tmp_path / "out")
    assert len(local) == 7 and {uid: done[uid] for uid in local} == local


def test_interrupted_retry_loses_no_object(tmp_path: Path) -> None:
    """The process ends while what failed is laid beside what arrived: whichever files have
    moved, the next one takes the rest.
    """
    for moved in range(4):
        spool = tmp_path / str(moved)
        Spool(spool).close()
        names = ["image-1.dcm", "mask-1.dcm", "mask-2.dcm"]
        for room, group in (
            ("failed/study-a-1/objects", names[moved:]),
            ("incoming/study-a", [*names[:moved], "image-2.dcm"]),
        ):
            (spool / room).mkdir(parents=True)
            for name in group:
                (spool / room / name).write_text("x")
        opened = Spool(spool)
        study = opened.next(0)
        assert study is not None and {path.name for path in (study / "objects").iterdir()} == {
            *names,
            "image-2.dcm",
        }
        assert not [*(spool / "failed").iterdir()]
        opened.close()


def test_unknown_peers_and_objects_are_refused(fake_model: Path, tmp_path: Path) -> None:
    """With the standard's own statuses, a line each, and without a word of the patient; the
    association goes on.
    """
    mask = dcmread(write_study(tmp_path / "in"))
    with Serving(
        fake_model,
        tmp_path / "spool",
        "--keep",
        "--max-object",
        "256KiB",
        "--max-associations",
        "2",
        quiet=60,
    ) as node:
        stranger = associate(node.port, [SegmentationStorage], calling="STRANGER")
        assert (
            stranger.is_rejected and stranger.acceptor.primitive.diagnostic == 3
        )  # calling AE title not recognized (PS3.8 9.3.4)
        wrong = associate(node.port, [SegmentationStorage], display_name="ANOTHER")
        assert wrong.is_rejected and wrong.acceptor.primitive.diagnostic == 7
        assert (
            associate(node.port, [SecondaryCaptureImageStorage])
            .rejected_contexts[0]
            .abstract_syntax
            == SecondaryCaptureImageStorage
        )
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
        assert (
            both.send_c_store(mask).Status == 0
        )  # the association was not ended, the limit is an object's and not a sum's
        second = associate(node.port, [VERIFICATION])
        third = associate(node.port, [VERIFICATION])
        assert (
            second.is_established and third.is_rejected and third.acceptor.primitive.diagnostic == 2
        )  # local limit exceeded
        second.release()
        both.release()

        held = [
            socket.create_connection(("127.0.0.1", node.port)) for _ in range(5)
        ]  # who says nothing takes nobody's place
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


def test_objects_within_one_pdu_are_measured(fake_model: Path, tmp_path: Path) -> None:
    """The limit counts bytes, however few PDUs bring them."""
    mask = dcmread(write_study(tmp_path / "in"))
    mask.PixelData = bytes(40 << 10)
    options = ["--keep", "--max-object", "16KiB"]
    with Serving(fake_model, tmp_path / "spool", *options, quiet=60) as node:
        association = associate(node.port, [SegmentationStorage])
        assert send_as(association, mask, mask.SOPInstanceUID) == 0xA700
        association.release()
        assert not spooled(tmp_path / "spool")


def as_bytes(ds: Dataset) -> bytes:
    buffer = BytesIO()
    ds.save_as(buffer)
    return buffer.getvalue()


def send_as(association: Any, data: bytes | Dataset, uid: str) -> int:
    """The status of a C-STORE whose data set is whatever it is: pynetdicom itself would send
    none but what it understands.
    """
    from pynetdicom.dimse_primitives import C_STORE
    from pynetdicom.dsutils import encode

    (context,) = association.accepted_contexts
    if isinstance(data, Dataset):
        data = (
            encode(
                data,
                context.transfer_syntax[0].is_implicit_VR,
                context.transfer_syntax[0].is_little_endian,
            )
            or b""
        )
    request = C_STORE()
    request.MessageID, request.Priority = 1, 2
    request.AffectedSOPClassUID, request.AffectedSOPInstanceUID, request.DataSet = (
        SegmentationStorage,
        uid,
        BytesIO(data),
    )
    association._reactor_checkpoint.clear()  # as its own send_c_store does: the answer is ours
    until(lambda: association._is_paused, "the association's thread waits")
    association.dimse.send_msg(request, context.context_id)
    status = int(association.dimse.get_msg(block=True)[1].Status)
    association._reactor_checkpoint.set()
    return status


def test_bad_dataset_gives_dicom_status(fake_model: Path, tmp_path: Path) -> None:
    """A data set of arbitrary bytes is refused by a DICOM status."""
    with Serving(fake_model, tmp_path / "spool", "--keep") as node:
        association = associate(node.port, [SegmentationStorage])
        for damage in (b"\xff" * 4000, b"\x08\x00\x16\x00UI\xff\xffDoe^John", b"DoeDoeDoe" * 99):
            assert send_as(association, damage, "1.2.3") in (0xC000, 0xA900)
        association.release()
        until(lambda: node.count("refused") == 3, "each is named")
        assert not spooled(tmp_path / "spool") and not [
            *(tmp_path / "spool" / "incoming").iterdir()
        ]


def test_bad_mask_is_put_aside(fake_model: Path, tmp_path: Path) -> None:
    """A mask that cannot be synthesized is put aside with its reason."""
    good, bad = write_study(tmp_path / "good"), dcmread(write_study(tmp_path / "bad", 1))
    for segment, name in zip(bad.SegmentSequence, ("Doe spleen", "Doe liver"), strict=True):
        segment.SegmentLabel = name
        segment.SegmentedPropertyTypeCodeSequence[0].CodeValue = "0815"
    bad.StudyInstanceUID, bad.SOPInstanceUID = generate_uid(), generate_uid()
    bad.file_meta.MediaStorageSOPInstanceUID = bad.SOPInstanceUID
    with (
        archive(tmp_path / "pacs") as (port, seen),
        Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node,
    ):
        assert push(node.port, bad) == [0]
        until(lambda: node.said("failed"), "the failure is told")
        assert push(node.port, good) == [0]
        settled(node, 2)
        assert len(seen) == 6
        (aside,) = (tmp_path / "spool" / "failed").iterdir()
        assert "seg-" in (aside / "reason.txt").read_text() and [
            ds.SOPInstanceUID for ds in read_all(aside).values()
        ] == [bad.SOPInstanceUID]


def test_returned_results_are_not_resent(fake_model: Path, tmp_path: Path) -> None:
    """Results of the node that come back to it go no further.

    An archive that routes every SEG to the node makes no circle.
    """
    assert (
        synth(fake_model, tmp_path / "out", write_study(tmp_path / "in"), "--format", "dicom") == 0
    )
    with (
        archive(tmp_path / "pacs") as (port, seen),
        Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node,
    ):
        assert push(node.port, *sorted((tmp_path / "out").rglob("*.dcm"))) == [0] * 6
        settled(node)
        assert node.said("ignored") and not seen and not spooled(tmp_path / "spool")


def test_acknowledged_object_survives_kill(fake_model: Path, tmp_path: Path) -> None:
    """An acknowledged object survives a kill and is synthesized afterwards."""
    masks = [write_study(tmp_path / "in" / str(n), n) for n in range(3)]
    with Serving(fake_model, tmp_path / "spool", "--keep", quiet=3600) as node:
        assert push(node.port, *masks) == [0] * 3
        node.stop(signal.SIGKILL)
    (tmp_path / "spool" / "incoming" / ".mask2ct-part-elsewhere-1-0a1b2c-object.dcm").write_bytes(
        b"half"
    )
    with Serving(fake_model, tmp_path / "spool", "--keep") as node:
        settled(node, 3)
    assert len([*(tmp_path / "spool" / "done").glob("*/results/*/seg.dcm")]) == 3
    assert not [*(tmp_path / "spool" / "incoming").iterdir()]


def test_sigterm_with_silent_peer(fake_model: Path, tmp_path: Path) -> None:
    """SIGTERM ends the node within five seconds, even with a peer that sends nothing."""
    with socket.create_server(("127.0.0.1", 0)) as dead:
        to = (
            "--send-to",
            f"PACS@127.0.0.1:{dead.getsockname()[1]}",
            "--stow",
            f"http://127.0.0.1:{dead.getsockname()[1]}/dicom-web",
        )
        with Serving(fake_model, tmp_path / "spool", *to) as node:
            open_still = associate(node.port, [SegmentationStorage])
            assert push(node.port, write_study(tmp_path / "in")) == [0]
            until(lambda: node.said("processed"), "it is synthesized")
            dead.accept()
            code, seconds = node.stop()
            assert code == 0 and seconds < 5 and node.said("stopped")
            assert not open_still.is_released
            open_still.abort()
    with (
        archive(tmp_path / "pacs") as (port, seen),
        Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node,
    ):
        settled(node)
        assert len(seen) == 6


def certificates(folder: Path) -> dict[str, Path]:
    """An authority and a certificate for localhost that it signed, by openssl."""
    made = {name: folder / f"{name}.pem" for name in ("ca", "ca-key", "cert", "key")}
    folder.mkdir()
    new = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    subprocess.run(
        [*new, "-subj", "/CN=test authority", "-keyout", made["ca-key"], "-out", made["ca"]],
        check=True,
        capture_output=True,
    )
    signed = [
        "-CA",
        made["ca"],
        "-CAkey",
        made["ca-key"],
        "-subj",
        "/CN=localhost",
        "-addext",
        "subjectAltName=DNS:localhost,IP:127.0.0.1",
    ]
    subprocess.run(
        [*new, *signed, "-keyout", made["key"], "-out", made["cert"]],
        check=True,
        capture_output=True,
    )
    return made


def test_tls_requires_client_certificate(fake_model: Path, tmp_path: Path) -> None:
    """Mutual, and outwards as well: one node sends to another."""
    pem = certificates(tmp_path / "tls")
    options = ("--tls-cert", pem["cert"], "--tls-key", pem["key"], "--tls-ca", pem["ca"])
    client = ssl.create_default_context(cafile=pem["ca"])
    stranger = ssl.create_default_context(cafile=pem["ca"])
    client.load_cert_chain(pem["cert"], pem["key"])
    mask = write_study(tmp_path / "in")
    with Serving(
        fake_model, tmp_path / "b", "--keep", *options, allow="MASK2CT", quiet=3600
    ) as end:
        with Serving(
            fake_model, tmp_path / "a", "--send-to", f"tls://MASK2CT@127.0.0.1:{end.port}", *options
        ) as node:
            assert not associate(
                node.port, [VERIFICATION], tls=(stranger, "127.0.0.1")
            ).is_established
            with socket.create_connection(
                ("127.0.0.1", node.port)
            ):  # one who never greets holds nobody up
                assert not associate(node.port, [VERIFICATION]).is_established
                assert push(node.port, mask, tls=(client, "127.0.0.1")) == [0]
            settled(node)
            assert node.said("rejected", "reason=TLS")
        assert end.count("stored") == 6


def test_metrics_models_and_stage_times(fake_model: Path, tmp_path: Path) -> None:
    """After two studies: one more of each count than after the first, and sums that a clock
    beside it agrees with.
    """
    from prometheus_client.parser import text_string_to_metric_families

    def samples() -> dict[tuple[str, str], float]:
        families = text_string_to_metric_families(node.get("/metrics"))
        return {
            (sample.name, sample.labels.get("stage", "")): sample.value
            for family in families
            for sample in family.samples
        }

    started = time.monotonic()
    with (
        archive(tmp_path / "pacs") as (port, _),
        Serving(fake_model, tmp_path / "spool", "--send-to", f"PACS@127.0.0.1:{port}") as node,
    ):
        (info,) = [
            line
            for line in node.get("/metrics").splitlines()
            if line.startswith("mask2ct_model_info{")
        ]
        digest = sha256((fake_model / "manifest.json").read_bytes()).hexdigest()
        assert (
            f'model="{fake_model.name}"' in info
            and 'engine="fake' in info
            and f'manifest_sha256="{digest}"' in info
        )
        for n in (1, 2):
            assert push(node.port, write_study(tmp_path / str(n), n)) == [0]
            settled(node, n)
            now = samples()
            assert [
                now["mask2ct_node_stage_seconds_count", stage]
                for stage in ("read", "synthesize", "write", "send")
            ] == [n] * 4
            assert now["mask2ct_node_study_seconds_count", ""] == n
        stages = sum(
            now["mask2ct_node_stage_seconds_sum", stage]
            for stage in ("read", "synthesize", "write", "send")
        )
        assert (
            stages > 0
            and 2 * 0.2 <= now["mask2ct_node_study_seconds_sum", ""] < time.monotonic() - started
        )


def test_full_disk_refuses_objects(tmp_path: Path) -> None:
    """A full disk takes nothing, and nothing is left half-written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", disk], check=False, capture_output=True
    ).returncode:
        pytest.skip("this system lets nobody mount a tmpfs")
    try:
        spool = Spool(disk)
        for claimed_size in (
            1 << 20,
            80 << 20,
        ):  # it does not fit though it was said to; it does not fit
            with pytest.raises(OutputError):
                spool.receive(
                    lambda handle: handle.write(bytes(90 << 20)),
                    ("1.2", "1.2.3"),
                    claimed_size,
                    threading.current_thread(),
                )
        assert not [
            path
            for path in disk.rglob("*")
            if path.is_file() and not path.name.endswith(".journal")
        ]
        spool.close()
    finally:
        subprocess.run(["umount", disk], check=True)


def test_unwritable_log_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that cannot be written does not end the node."""
    with (
        open("/dev/full", "w") as full,
        monkeypatch.context() as patched,
        events_on_standard_error(),
    ):
        patched.setattr(sys, "stderr", full)
        Events()("stored")
        patched.undo()
        with suppress(OSError):  # what is left in its buffer
            full.close()


def test_log_value_stays_on_line() -> None:
    assert plain("A\nB\x1b[2J") == "A?B?[2J" and plain('two "words"') == "\"two 'words'\""


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--keep"], "no calling AE title is allowed"),
        (["--allow-any"], "no destination"),
        (["--allow", "A" * 17, "--keep"], "is not an AE title"),
        (["--allow", "A", "--allow-any", "--keep"], "exclude each other"),
        (["--allow", "A", "--send-to", "PACS@host"], "is not a destination"),
        (["--allow", "A", "--send-to", "tls://PACS@host:104"], "needs certificates"),
        (["--allow", "A", "--stow", "ftp://host/"], "not a DICOMweb address"),
        (["--allow", "A", "--keep", "--tls-cert", "x.pem"], "TLS is mutual"),
        (["--allow", "A", "--keep", "--host", "203.0.113.1"], "cannot be had"),
        (["--allow", "A", "--send-to", "P@h:1", "--send-to", "P@h:1"], "given twice"),
    ],
)
def test_wrong_serve_command_starts_nothing(
    options: list[str],
    fact: str,
    fake_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert serve(fake_model, tmp_path / "spool", *options) == 2
    said = capsys.readouterr().err
    assert fact in said and "remedy" in said and "listening" not in said


@pytest.mark.parametrize("package", ["pynetdicom", "prometheus_client"])
def test_missing_package_is_named(
    package: str,
    fake_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A missing package is named with the command that installs it."""
    monkeypatch.setitem(sys.modules, package, None)
    assert (
        serve(fake_model, tmp_path / "spool", "--allow-any", "--keep") == 3
        and 'pip install "mask2ct[node]"' in capsys.readouterr().err
    )
    assert not (tmp_path / "spool").exists()


def test_two_nodes_share_no_spool(
    fake_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Serving(fake_model, tmp_path / "spool", "--keep"):
        assert (
            serve(fake_model, tmp_path / "spool", "--allow-any", "--keep") == 2
            and "folder" in capsys.readouterr().err
        )


@pytest.mark.slow
def test_node_killed_again_loses_nothing(fake_model: Path, tmp_path: Path) -> None:
    """Killed again and again, the node loses nothing and sends acknowledged objects only once.

    Killed as soon as it has stored, synthesized, sent a part, sent all: what was in flight may come
    twice, as the same object.
    """
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
                    lambda: node.said("processed"),
                    lambda before=before: len(seen) > before + 7,
                    lambda: node.said("settled"),
                ][n % 4]
                until(reached, "the moment to kill it")
                node.stop(signal.SIGKILL)
        with Serving(fake_model, tmp_path / "spool", *to, quiet=0.1) as node:
            until(lambda: set(seen) >= set(local), "all has arrived")
            until(
                lambda: (
                    not any(
                        [*(tmp_path / "spool" / room).iterdir()]
                        for room in ("incoming", "studies", "outbox")
                    )
                ),
                "nothing waits",
            )
            assert node.stop()[0] == 0
        assert read_all(tmp_path / "pacs") == local and len(local) == kills * 31
        assert len(seen) <= len(local) + kills  # at most the one in flight at each kill
    assert not [*(tmp_path / "spool" / "failed").iterdir()]


@pytest.mark.slow
def test_thousand_objects_from_eight_senders(fake_model: Path, tmp_path: Path) -> None:
    """All of a thousand objects from eight senders at once arrive, and memory stays flat.

    By DCMTK's storescu; synthesized meanwhile and afterwards; a stranger is refused in the midst of
    it.
    """
    senders, each, expected = 8, 125, set[str]()
    for sender in range(senders):
        folder = tmp_path / "in" / str(sender)
        first = write_study(folder, sender, (2, 16, 16))
        made = dcmread(first)
        for n in range(each):
            made.SOPInstanceUID = made.file_meta.MediaStorageSOPInstanceUID = generate_uid()
            made.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [
                1 + n / 1000,
                1.5 + sender / 10,
            ]  # no two alike
            made.save_as(folder / f"{n}.dcm")
            expected.add(str(made.SOPInstanceUID))
        first.unlink()
    command = [
        str(elsewhere("storescu")),
        "-R",
        "-aet",
        "SENDER",
        "-aec",
        "MASK2CT",
        "+sd",
        "127.0.0.1",
    ]
    with archive(tmp_path / "pacs") as (port, seen):
        to = (
            "--keep",
            "--segmentation",
            "none",
            "--max-associations",
            senders + 1,
            "--send-to",
            f"PACS@127.0.0.1:{port}",
        )
        with Serving(fake_model, tmp_path / "spool", *to, quiet=0.5) as node:
            warm = write_study(
                tmp_path / "warm", 99, (2, 16, 16)
            )  # what synthesis and sending need is loaded once
            assert push(node.port, warm) == [0]
            settled(node)
            memory = [resident(node.process.pid)]
            running = [
                subprocess.Popen(
                    [*command, str(node.port), tmp_path / "in" / str(n)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                for n in range(senders)
            ]
            assert associate(node.port, [VERIFICATION], calling="STRANGER").is_rejected
            assert [
                (process.communicate(timeout=300)[0].count(b"E:"), process.returncode)
                for process in running
            ] == [(0, 0)] * senders
            until(lambda: node.count("stored") == 1001, "all are told")
            memory.append(resident(node.process.pid))
            settled(node, senders + 1, 300)
            memory.append(resident(node.process.pid))
            kept = {
                str(dcmread(path, stop_before_pixels=True).SOPInstanceUID)
                for path in (tmp_path / "spool" / "done").glob("*/objects/*.dcm")
            }
            assert kept == expected | {str(dcmread(warm).SOPInstanceUID)}
            assert len([*(tmp_path / "spool" / "done").glob("*/results/*/0002.dcm")]) == 1001
            assert node.count("failed") == 0 and len(seen) == len(set(seen)) == 2 * 1001
            assert max(memory) - memory[0] < 24 << 20, memory
            code, seconds = node.stop()
    assert code == 0 and seconds < 5
