"""The node between a sender and a PACS that others wrote: Orthanc, by C-STORE and by STOW-RS,
also when it is away in the middle.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import pytest
from nodes import SECRETS, Serving, associate, free_port, push, read_all, until, write_study
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.uid import SegmentationStorage
from samples import synth

PROGRAM = Path("/usr/sbin/Orthanc")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Orthanc:
    """Debian's, with a folder and ports that stay its own when it is stopped and started again."""

    def __init__(self, folder: Path):
        plugins = sorted(str(p) for p in Path("/usr/lib/orthanc").glob("libOrthancDicomWeb.so*"))
        if not (PROGRAM.exists() and plugins) and not os.environ.get("MASK2CT_REQUIRE_TOOLS"):
            pytest.skip("orthanc or orthanc-dicomweb is not installed")
        folder.mkdir()
        self.folder, self.http, self.dicom = folder, free_port(), free_port()
        settings = {
            "StorageDirectory": str(folder),
            "IndexDirectory": str(folder),
            "HttpPort": self.http,
            "DicomPort": self.dicom,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "Plugins": plugins[:1],
            "DicomAet": "ORTHANC",
            "OverwriteInstances": False,
            "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
        }
        (folder / "orthanc.json").write_text(json.dumps(settings))

    @contextmanager
    def running(self) -> Iterator[None]:
        process = subprocess.Popen(
            [PROGRAM, self.folder / "orthanc.json"],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            cwd=self.folder,
        )
        try:
            assert process.stderr is not None
            assert any("Orthanc has started" in line for line in process.stderr), (
                "Orthanc did not start"
            )
            yield
        finally:
            process.terminate()
            process.communicate(timeout=30)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=30) as reply:
            return reply.read()

    def count(self) -> int:
        return int(json.loads(self.get("/statistics"))["CountInstances"])

    def changes(self) -> list[str]:
        """Every instance that it took as new, in its own words."""
        found = json.loads(self.get("/changes?limit=10000"))["Changes"]
        return [change["ID"] for change in found if change["ChangeType"] == "NewInstance"]

    def instances(self) -> dict[str, Dataset]:
        found = [
            dcmread(BytesIO(self.get(f"/instances/{name}/file")))
            for name in json.loads(self.get("/instances"))
        ]
        return {str(ds.SOPInstanceUID): ds for ds in found}

    def options(self, way: str) -> list[str]:
        stow = ["--stow", f"http://127.0.0.1:{self.http}/dicom-web"]
        return stow if way == "STOW-RS" else ["--send-to", f"ORTHANC@127.0.0.1:{self.dicom}"]


@pytest.fixture
def orthanc(tmp_path: Path) -> Orthanc:
    return Orthanc(tmp_path / "orthanc")


@pytest.mark.parametrize("attach", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
def test_orthanc_series_equals_local_run(
    way: str, attach: bool, model: Path, orthanc: Orthanc, tmp_path: Path
) -> None:
    """A mask that is pushed comes back as the series that a local run writes.

    A trained network in ONNX Runtime or OpenVINO; pixels and tags, and nothing of the source's
    patient unless it is asked for.
    """
    mask, choice = write_study(tmp_path / "in", shape=(6, 24, 24)), ["--attach"] if attach else []
    assert synth(model, tmp_path / "local", mask, "--format", "dicom", *choice, backend="onnx") == 0
    local = read_all(tmp_path / "local")
    with (
        orthanc.running(),
        Serving(model, tmp_path / "spool", *choice, *orthanc.options(way), backend="onnx") as node,
    ):
        assert push(node.port, mask) == [0]
        until(lambda: node.said("settled"), "all is sent")
        there = orthanc.instances()
        assert len(local) == 7 and {ds.Modality for ds in local.values()} == {"CT", "SEG"}
        assert there == local and all(there[uid].PixelData == local[uid].PixelData for uid in local)
        source = dcmread(mask)
        assert {ds.StudyInstanceUID == source.StudyInstanceUID for ds in there.values()} == {attach}
        assert (
            any(secret in str(ds.PatientName) for ds in there.values() for secret in SECRETS)
            == attach
        )
        assert push(node.port, mask) == [0]  # once more: the same objects
        until(lambda: node.count("settled") == 2, "all is sent again")
        assert orthanc.count() == 7


@pytest.mark.parametrize("way", ["C-STORE", "STOW-RS"])
def test_orthanc_restart_receives_all_once(
    way: str, fake_model: Path, orthanc: Orthanc, tmp_path: Path
) -> None:
    """Orthanc is stopped in the middle, and has everything once when it is back."""
    masks = [write_study(tmp_path / "in" / str(n), n, (60, 16, 16)) for n in range(4)]
    assert synth(fake_model, tmp_path / "local", *masks, "--format", "dicom") == 0
    local = read_all(tmp_path / "local")
    with Serving(fake_model, tmp_path / "spool", *orthanc.options(way)) as node:
        with orthanc.running():
            assert push(node.port, masks[0]) == [0]
            until(lambda: orthanc.count() > 0, "the first objects are there")
            assert push(node.port, *masks[1:]) == [0] * 3
        until(
            lambda: node.said("unreachable") and node.count("processed") == 4,
            "Orthanc is missed, and synthesis goes on",
        )
        assert node.count("settled") < 4
        assert node.stop()[0] == 0
    with Serving(fake_model, tmp_path / "spool", *orthanc.options(way)) as node:
        until(
            lambda: node.said("unreachable"), "it is tried again by the node that was started again"
        )
        with orthanc.running():
            until(lambda: not [*(tmp_path / "spool" / "outbox").iterdir()], "all is sent")
            there, new = orthanc.instances(), orthanc.changes()
        assert there == local and len(new) == len(set(new)) == 4 * 61
    assert not list((tmp_path / "spool").rglob("*.dcm"))


def test_orthanc_pushes_to_node(fake_model: Path, orthanc: Orthanc, tmp_path: Path) -> None:
    """A peer that the node does not know cannot push."""
    mask = write_study(tmp_path / "in")
    with (
        orthanc.running(),
        Serving(
            fake_model, tmp_path / "spool", *orthanc.options("C-STORE"), allow="ORTHANC"
        ) as node,
    ):
        assert associate(node.port, [SegmentationStorage], calling="STRANGER").is_rejected
        loaded = json.loads(post(orthanc, "/instances", mask.read_bytes()))["ID"]
        peer = {"AET": "MASK2CT", "Host": "127.0.0.1", "Port": node.port}
        urllib.request.urlopen(
            put(orthanc, "/modalities/node", json.dumps(peer).encode()), timeout=30
        ).close()
        json.loads(post(orthanc, "/modalities/node/echo", b"{}"))
        post(orthanc, "/modalities/node/store", loaded.encode())
        until(lambda: node.said("settled"), "the series came back")
        assert orthanc.count() == 7 and node.said("rejected", "calling=STRANGER")


def put(orthanc: Orthanc, path: str, body: bytes) -> urllib.request.Request:
    return urllib.request.Request(f"http://127.0.0.1:{orthanc.http}{path}", data=body, method="PUT")


def post(orthanc: Orthanc, path: str, body: bytes) -> bytes:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{orthanc.http}{path}", data=body, timeout=60
    ) as reply:
        return reply.read()
