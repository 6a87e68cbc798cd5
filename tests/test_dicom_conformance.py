"""What others say of the DICOM that is written: dicom3tools, DCMTK, dcm2niix and a PACS (Orthanc).

The tools are Debian packages (CONTRIBUTING.md). Where one is absent its test is skipped, unless
$MASK2CT_REQUIRE_TOOLS is set, as in CI.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.message import Message
from io import BytesIO
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import RTStructureSetStorage
from samples import directions, elsewhere, rotation
from series import SOURCE, TILT, Series, assert_in_place, write_series

from runtime.core.manifest import Label, LabelTable
from runtime.core.volume import DicomSource
from runtime.engines.fake import fake_manifest

# what dciodvfy of 2022 says of Synthetic Data (0008,001C), which the standard has had since 2023
UNKNOWN_TO_IT = (
    (
        "Error - </(0008,001c)> - Attribute with an even group number is not a recognized standard"
        " attribute"
    ),
    "Warning - </(0008,001c)> - Attribute is not present in standard DICOM IOD",
    "Warning - </(0008,001c)> - Unrecognized tag - assuming explicit value representation OK [CS]",
)
ARCHITECTURES = {
    "detached": lambda out: write_series(out, segmentation="binary"),
    "oblique and left-handed": lambda out: write_series(
        out, TILT @ np.diag([1.0, -1.0, 1.0]), segmentation="binary"
    ),
    "sagittal mask, variant": lambda out: write_series(
        out, np.eye(3)[:, [1, 2, 0]], segmentation="binary", variant=3
    ),
    "single slice": lambda out: write_series(out, shape=(1, 8, 9), segmentation="binary"),
    "attached to a SEG": lambda out: write_series(
        out, segmentation="binary", source=SOURCE, attach=True
    ),
    "attached to an RTSTRUCT": lambda out: write_series(
        out,
        segmentation="binary",
        source=replace(SOURCE, sop_class_uid=RTStructureSetStorage),
        attach=True,
    ),
}


def tool(name: str) -> str:
    """Where a program is, or a skipped test."""
    found = elsewhere(name)
    if found is None and not os.environ.get("MASK2CT_REQUIRE_TOOLS"):
        pytest.skip(f"{name} is not installed")
    assert found, f"{name} is not installed, and MASK2CT_REQUIRE_TOOLS is set"
    return found


def output_of(*command: object) -> str:
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, timeout=120
    )
    return done.stdout + done.stderr


def problems(file: Path) -> list[str]:
    """Errors and warnings of dciodvfy other than that it does not know Synthetic Data, which
    must be there.
    """
    lines = output_of(tool("dciodvfy"), "-new", file).splitlines()
    assert any(line in ("CTImage", "EnhancedCTImage", "Segmentation") for line in lines), (
        lines
    )  # it did look
    assert UNKNOWN_TO_IT[0] in lines  # the mark is there
    return [
        line
        for line in lines
        if line.startswith(("Error", "Warning")) and line not in UNKNOWN_TO_IT
    ]


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_dicom3tools_and_dcmtk_report_no_errors(kind: str, tmp_path: Path) -> None:
    dcentvfy, dcmftest = tool("dcentvfy"), tool("dcmftest")
    series = ARCHITECTURES[kind](tmp_path)
    files = sorted(series.folder.iterdir())
    assert files[-1].name == "seg.dcm"
    for file in files:
        assert problems(file) == []
        assert output_of(dcmftest, file).startswith("yes")
    assert "Error" not in output_of(dcentvfy, *files)


def test_private_label_codes_are_valid_dicom(tmp_path: Path) -> None:
    """Labels without a standard code are valid too.

    Structures without a SNOMED code get one of our own scheme, which the validator mentions;
    nothing is wrong.
    """
    names = ("background", "étiquette", "a\\b", "tab\there", " ", "心室", "x" * 100, "plain")
    manifest = replace(
        fake_manifest(LabelTable(tuple(Label(name, 10 * n) for n, name in enumerate(names)))),
        name="models\\été" + "y" * 80,
    )
    for file in write_series(tmp_path, segmentation="binary", manifest=manifest).folder.iterdir():
        assert [line for line in problems(file) if line.startswith("Error")] == []


@pytest.mark.parametrize(
    "source",
    [None, SOURCE, replace(SOURCE, sop_class_uid=RTStructureSetStorage)],
    ids=["detached", "SEG", "RTSTRUCT"],
)
def test_an_enhanced_ct_is_valid_too(source: DicomSource | None, tmp_path: Path) -> None:
    """The warnings are that Derivation Description and the sources are an extension of this
    object.
    """
    series = write_series(
        tmp_path,
        TILT,
        segmentation="binary",
        enhanced=True,
        source=source,
        attach=source is not None,
    )
    for file in sorted(series.folder.iterdir()):
        assert [line for line in problems(file) if line.startswith("Error")] == []
        assert output_of(tool("dcmftest"), file).startswith("yes")
    assert "Error" not in output_of(tool("dcentvfy"), *series.folder.iterdir())


@pytest.mark.parametrize("enhanced", [False, True], ids=["classic", "enhanced"])
@pytest.mark.parametrize(
    "direction", [TILT @ d for d in directions()[::6]] + [rotation((0, 40, 0))], ids=str
)
def test_dcm2niix_places_every_voxel(direction: np.ndarray, enhanced: bool, tmp_path: Path) -> None:
    dcm2niix = tool("dcm2niix")
    series = write_series(tmp_path / "made", direction, shape=(5, 8, 6), enhanced=enhanced)
    (tmp_path / "converted").mkdir()
    said = output_of(
        dcm2niix, "-z", "n", "-b", "n", "-f", "ct", "-o", tmp_path / "converted", series.folder
    )
    (path,) = (tmp_path / "converted").glob("*.nii")
    read = nibabel.load(path)
    assert_in_place(
        series.points.reshape(-1, 3),
        series.hu.ravel(),
        np.asarray(read.dataobj),
        np.diag([-1.0, -1, 1, 1]) @ read.affine,
    )
    assert "Error" not in said


@pytest.fixture
def orthanc(tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A PACS of one's own on the loopback interface: its HTTP address and its DICOM port.

    It ends with the test.
    """
    program = tool("Orthanc")
    plugins = sorted(str(p) for p in Path("/usr/lib/orthanc").glob("libOrthancDicomWeb.so*"))
    if not plugins and not os.environ.get("MASK2CT_REQUIRE_TOOLS"):
        pytest.skip("orthanc-dicomweb is not installed")
    with socket.socket() as a, socket.socket() as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        http, dicom = a.getsockname()[1], b.getsockname()[1]
    settings = {
        "StorageDirectory": str(tmp_path / "pacs"),
        "IndexDirectory": str(tmp_path / "pacs"),
        "HttpPort": http,
        "DicomPort": dicom,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "HttpDescribeErrors": True,
        "Plugins": plugins[:1],
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    (tmp_path / "orthanc.json").write_text(json.dumps(settings))
    process = subprocess.Popen(
        [program, str(tmp_path / "orthanc.json")],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tmp_path,
    )
    try:
        assert process.stderr is not None
        assert any("Orthanc has started" in line for line in process.stderr), (
            "Orthanc did not start"
        )
        yield f"http://127.0.0.1:{http}", dicom
    finally:
        process.terminate()
        process.communicate(timeout=30)


def fetch(address: str, body: bytes | None = None, **headers: str) -> tuple[bytes, Message]:
    request = urllib.request.Request(
        address, data=body, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read(), reply.headers


def by_cstore(series: Series, address: str, port: int) -> None:
    said = output_of(
        tool("storescu"),
        "-R",
        "-aec",
        "ORTHANC",
        "127.0.0.1",
        port,
        *sorted(series.folder.iterdir()),
    )
    assert not [line for line in said.splitlines() if line.startswith(("E:", "F:"))], said


def by_stow(series: Series, address: str, port: int) -> None:
    parts = [
        b"--x\r\nContent-Type: application/dicom\r\n\r\n" + p.read_bytes() + b"\r\n"
        for p in sorted(series.folder.iterdir())
    ]
    body, _ = fetch(
        f"{address}/dicom-web/studies",
        b"".join(parts) + b"--x--\r\n",
        Accept="application/dicom+json",
        Content_Type='multipart/related; type="application/dicom"; boundary=x',
    )
    reply = json.loads(body)
    assert len(reply["00081199"]["Value"]) == len(parts) and not reply.get("00081198", {}).get(
        "Value"
    )  # all referenced, none failed


@pytest.mark.slow
@pytest.mark.parametrize("enhanced", [False, True], ids=["classic", "enhanced"])
@pytest.mark.parametrize("send", [by_cstore, by_stow], ids=["C-STORE", "DICOMweb"])
def test_pacs_returns_series_and_seg(
    send: Callable[[Series, str, int], None],
    enhanced: bool,
    orthanc: tuple[str, int],
    tmp_path: Path,
) -> None:
    """A PACS takes the series and the SEG and gives them back."""
    address, port = orthanc
    series = write_series(tmp_path / "made", TILT, segmentation="binary", enhanced=enhanced)
    for _ in range(2):  # a second time: the same objects, not more of them
        send(series, address, port)
        assert json.loads(fetch(f"{address}/statistics")[0])["CountInstances"] == (
            2 if enhanced else 6
        )
    for file in series.folder.iterdir():
        sent = pydicom.dcmread(file)
        base = f"{address}/dicom-web/studies/{sent.StudyInstanceUID}/series/{sent.SeriesInstanceUID}/instances/{sent.SOPInstanceUID}"
        body, headers = fetch(
            base, Accept='multipart/related; type="application/dicom"; transfer-syntax=*'
        )
        boundary = str(headers.get_param("boundary")).encode()
        part = body[body.index(b"\r\n\r\n") + 4 : body.rindex(b"\r\n--" + boundary)]
        returned = pydicom.dcmread(BytesIO(part))
        assert (
            returned == sent
            and returned.PixelData == sent.PixelData
            and returned[0x0008001C].value == "YES"
        )
