"""Deflated DICOM files: read like others, and a small one that becomes a large one is refused
before it has.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from dicom_masks import segmentation, slices
from pydicom import dcmread, dcmwrite
from pydicom.uid import DeflatedExplicitVRLittleEndian
from samples import blobs

from runtime.core.errors import UnreadableVolume
from runtime.core.labels import MM_WHS
from runtime.io.case_finding import find_cases
from runtime.io.cases import read_case
from runtime.io.dicom.inflate import Inflated

MIB = 1 << 20
SYNTAX = struct.pack("<HH2sH", 2, 0x10, b"UI", 22) + DeflatedExplicitVRLittleEndian.encode()

LABELS = """
import sys
from runtime.__main__ import main
from runtime.core.console import run
code = run(main, ["labels", sys.argv[1]])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
sys.exit(code)
"""


def deflated(path: Path) -> Path:
    """A copy of a DICOM file with the Deflated transfer syntax, as pydicom writes it."""
    ds, copy = dcmread(path), path.with_name(f"deflated-{path.name}")
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dcmwrite(copy, ds, implicit_vr=False, little_endian=True, enforce_file_format=True)
    return copy


def seg(folder: Path) -> Path:
    values = blobs((5, 16, 16), (0, 500))
    return segmentation(
        folder / "a.dcm",
        slices(values, Modality="CT"),
        (values > 0).astype(np.uint8),
        [("left ventricle", "87878005")],
    )


def bomb(
    folder: Path,
    tag: tuple[int, int],
    mib: int,
    *,
    before: bytes = b"",
    meta: bytes = b"",
    length: int | None = None,
) -> Path:
    """A small SEG with `mib` MiB of zeros in the element `tag`, deflated to a
    thousandth of that.

    `before`: deflated ahead of it all; `meta`: ahead of the transfer syntax; `length`: what the
    meta information says that it takes.
    """
    made = dcmread(seg(folder))
    del made.PixelData
    plain = folder / "plain"
    made.save_as(plain, enforce_file_format=True)
    raw = plain.read_bytes()
    plain.unlink()
    behind = 144 + int.from_bytes(raw[140:144], "little")
    head = raw[144 : raw.index(b"\x02\x00\x10\x00UI")] + meta + SYNTAX
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    own = struct.pack("<HH2sHI", *tag, b"OB", 0, mib * MIB)
    parts = [
        packer.compress(before),
        *([packer.compress(raw[behind:])] if tag[0] > 0x0070 else []),
        packer.compress(own),
    ]
    parts += [packer.compress(bytes(MIB)) for _ in range(mib)]
    path = folder / "Doe_John_Planted.dcm"
    said = len(head) if length is None else length
    path.write_bytes(
        raw[:132]
        + struct.pack("<HH2sHI", 2, 0, b"UL", 4, said)
        + head
        + b"".join([*parts, packer.flush()])
    )
    assert path.stat().st_size < mib * MIB / 500
    return path


def test_deflated_seg_is_read(tmp_path: Path) -> None:
    path = seg(tmp_path)
    copy, zipped = deflated(path), tmp_path / "m.zip"
    with zipfile.ZipFile(zipped, "w") as made:
        made.write(copy, "a/b.dcm")
    plain, *others = (read_case(find_cases([given])[0], MM_WHS) for given in (path, copy, zipped))
    assert plain.labels.any() and b"1.2.840.10008.1.2.1.99" in copy.read_bytes()[:600]
    for other in others:
        assert np.array_equal(other.labels, plain.labels) and other.geometry == plain.geometry


def test_truncated_deflated_file_is_refused(tmp_path: Path) -> None:
    copy = deflated(seg(tmp_path))
    copy.write_bytes(copy.read_bytes()[:-40])
    with pytest.raises(UnreadableVolume):
        read_case(find_cases([copy])[0], MM_WHS)


def test_inflaters_last_bytes_are_read() -> None:
    """What the inflater still holds after the end of the file is read.

    The last byte of a file that ends in zeros may stand for hundreds, and what is inflated at
    once may end within these.
    """
    for size in range(MIB, MIB + 260, 3):
        data = b"\x08\x00" + bytes(size - 2)
        packer = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS)
        whole = Inflated(io.BytesIO(packer.compress(data) + packer.flush())).read()
        assert whole.endswith(data) and len(whole) < len(data) + 200, size


@pytest.mark.parametrize(
    "how",
    [
        {"tag": (0x7FE0, 0x0010)},
        {
            "tag": (0x7FE0, 0x0010),
            "length": 1 << 30,
        },  # so that the compressed part seems to lie elsewhere
        {
            "tag": (0x7FE0, 0x0010),
            "meta": struct.pack("<HH2sHI", 2, 1, b"OB", 0, 8192) + bytes(8192),
        },  # so that the syntax comes late
        {
            "tag": (0x7FE0, 0x0010),
            "before": SYNTAX,
        },  # so that what was inflated would be inflated again
        {"tag": (0x0009, 0x1010)},  # before anything else, and no pixels
    ],
    ids=["pixels", "a wrong length", "a late syntax", "twice", "a header"],
)
def test_deflate_bomb_takes_little_memory(how: dict, tmp_path: Path, command) -> None:
    """A small file that becomes a large one is refused in little memory."""
    path = bomb(tmp_path, **{"mib": 600, **how})
    done = command("-c", LABELS, path)
    said, peak = (
        done.stderr,
        int(done.stdout.split()[-1]),
    )  # KiB; Python with numpy and pydicom is some 60 MiB
    assert done.returncode == 1 and "Traceback" not in said and "Doe" not in said, said
    if how["tag"] == (0x7FE0, 0x0010) and "before" not in how:
        assert "629145600 bytes of pixels, more than its frames can have" in said
        assert peak < 150 << 10
    else:
        assert "cannot be read as DICOM (1 with a damaged header)" in said and peak < 450 << 10
