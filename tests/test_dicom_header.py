"""What the header of a DICOM file decides costs neither its pixels nor an object for each item."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_masks import segmentation, slices, structure_set
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, RLELossless

from runtime.core.errors import InputError
from runtime.io.case_finding import find_cases
from runtime.io.cases import read_mask
from runtime.io.dicom.files import scan

LARGE = 300 << 20
# Bytes that a refusal may take: a hundredth of the file would be much.
FEW = 24 << 20
LEFT_VENTRICLE = [("left ventricle", "87878005")]


def refused(path: Path) -> tuple[str, int]:
    """The reason, and the most bytes that Python held until then."""
    tracemalloc.start()
    try:
        (case,) = find_cases([path])
        with pytest.raises(InputError) as caught:
            read_mask(case)
        return caught.value.fact, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def written(ds: Dataset) -> bytes:
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def with_large_pixels(path: Path, ds: Dataset) -> Path:
    """Write `ds` with pixels of `LARGE` bytes or as many as it states, a hole in the file."""
    del ds.PixelData
    frames = int(ds.get("NumberOfFrames") or 1) if "Rows" in ds else 0
    size = max(LARGE, frames and frames * ds.Rows * ds.Columns * ds.BitsAllocated // 8)
    with open(path, "wb") as file:
        file.write(written(ds) + b"\xe0\x7f\x10\0OB\0\0" + struct.pack("<L", size))
        file.truncate(file.tell() + size)
    return path


def seg(folder: Path) -> Dataset:
    mask = np.zeros((3, 8, 8), np.uint8)
    mask[:, 2:5, 2:5] = 1
    images = slices(mask.astype(np.int16), Modality="CT")
    return dcmread(segmentation(folder / "made" / "s.dcm", images, mask, LEFT_VENTRICLE))


def _of_unknown_type(ds: Dataset) -> None:
    ds.SegmentationType = "PLANTED"


def _of_a_slide(ds: Dataset) -> None:
    ds.TotalPixelMatrixColumns = 8


def _without_spacing(ds: Dataset) -> None:
    del ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence


def _of_undescribed_segments(ds: Dataset) -> None:
    ds.Rows = ds.Columns = 8192
    ds.BitsAllocated = 32
    ds.SegmentSequence[0].SegmentNumber = 7


def _of_too_many_bytes(ds: Dataset) -> None:
    ds.Rows = ds.Columns = 16


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        (_of_unknown_type, "another type"),
        (_of_a_slide, "of a slide"),
        (_without_spacing, "without a PixelMeasuresSequence"),
        (_of_undescribed_segments, "which it does not describe"),
        (_of_too_many_bytes, "more than its frames can have"),
    ],
)
def test_refused_seg_costs_no_pixels(
    change: Callable[[Dataset], None], fact: str, tmp_path: Path
) -> None:
    ds = seg(tmp_path)
    change(ds)
    reason, memory = refused(with_large_pixels(tmp_path / "s.dcm", ds))
    assert fact in reason
    assert memory < FEW


def test_refused_member_costs_no_memory(tmp_path: Path) -> None:
    ds = seg(tmp_path)
    _of_a_slide(ds)
    path = with_large_pixels(tmp_path / "s.dcm", ds)
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_STORED) as pack:
        pack.write(path, "s.dcm")
    reason, memory = refused(tmp_path / "s.zip")
    assert "of a slide" in reason
    assert memory < FEW


@pytest.mark.parametrize(
    ("attributes", "fact"),
    [({"RescaleSlope": "2"}, "rescaled"), ({}, "more than its frames can have")],
    ids=["rescaled", "too many bytes"],
)
def test_refused_series_costs_no_pixels(
    attributes: dict[str, str], fact: str, tmp_path: Path
) -> None:
    (ds,) = slices(np.zeros((1, 8, 8), np.uint8), Modality="OT", **attributes)
    reason, memory = refused(with_large_pixels(tmp_path / "i.dcm", ds))
    assert fact in reason
    assert memory < FEW


def test_unread_elements_cost_nothing(tmp_path: Path) -> None:
    """A private element of 300 MB, and a structure set's pixels, are passed over."""
    content = written(seg(tmp_path))
    at = content.index(b"\x10\x00\x10\x00PN")
    with open(tmp_path / "s.dcm", "wb") as file:
        file.write(content[:at] + b"\x09\0\x10\x10OB\0\0" + struct.pack("<L", LARGE))
        file.seek(LARGE, 1)
        file.write(content[at:])
    tracemalloc.start()
    (case,) = find_cases([tmp_path / "s.dcm"])
    count = sum(int(piece.sum()) for _, _, piece in read_mask(case).pieces())  # type: ignore[union-attr]
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 27
    assert memory < FEW


ITEM = b"\xfe\xff\0\xe0\0\0\0\0"
SEQUENCE_END = b"\xfe\xff\xdd\xe0\0\0\0\0"
OPEN = b"SQ\0\0\xff\xff\xff\xff"


def test_unread_items_become_no_objects(tmp_path: Path) -> None:
    """Items of 8 bytes, each of which pydicom makes an object of more than 1,000."""
    content = written(seg(tmp_path))
    at = content.index(b"\x10\x00\x10\x00PN")
    items = b"\x08\0\x40\x11" + OPEN + ITEM * 50_000 + SEQUENCE_END
    (tmp_path / "s.dcm").write_bytes(content[:at] + items + content[at:])
    tracemalloc.start()
    (instance,) = scan([tmp_path / "s.dcm"])
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (instance.kind, instance.damage) == ("seg", "")
    assert memory < 4 << 20


def test_item_without_bound_is_refused(tmp_path: Path) -> None:
    """One group of a SEG holds a sequence of 150,000 items within it."""
    ds = seg(tmp_path)
    del ds.SharedFunctionalGroupsSequence
    content = written(ds)
    at = content.index(b"\x00\x52\x30\x92")
    inner = b"\x28\0\x10\x91" + OPEN + ITEM * 150_000 + SEQUENCE_END
    group = b"\xfe\xff\0\xe0\xff\xff\xff\xff" + inner + b"\xfe\xff\x0d\xe0\0\0\0\0"
    shared = b"\x00\x52\x29\x92" + OPEN + group + SEQUENCE_END
    (tmp_path / "s.dcm").write_bytes(content[:at] + shared + content[at:])
    reason, memory = refused(tmp_path / "s.dcm")
    assert "too many elements" in reason
    assert memory < FEW


def test_copies_are_not_decoded_unseen(tmp_path: Path) -> None:
    """Two files of one UID in one place claim 30,000 x 30,000 pixels in RLE."""
    (ds,) = slices(np.zeros((1, 8, 8), np.uint8), Modality="OT")
    ds.Rows = ds.Columns = 30_000
    ds.file_meta.TransferSyntaxUID = RLELossless
    run = bytes([129, 0]) * (30_000 * 30_000 // 128)
    for number in (1, 2):
        ds.InstanceNumber = number
        ds.PixelData = encapsulate([struct.pack("<16L", 1, 64, *[0] * 14) + run])
        ds["PixelData"].VR = "OB"
        ds["PixelData"].is_undefined_length = True
        ds.save_as(tmp_path / f"{number}.dcm", enforce_file_format=True)
    reason, memory = refused(tmp_path)
    assert "slices of 30000 x 30000 pixels" in reason
    assert memory < FEW


def test_codestream_of_other_size_is_refused(tmp_path: Path) -> None:
    """590 bytes of JPEG 2000 hold 12,000 x 12,000 pixels, and the header states 8 x 8."""
    (ds,) = slices(np.zeros((1, 8, 8), np.uint8), Modality="OT")
    buffer = io.BytesIO()
    Image.new("L", (12_000, 12_000)).save(buffer, "JPEG2000", irreversible=False, no_jp2=True)
    ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
    ds.PixelData = encapsulate([buffer.getvalue()])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.save_as(tmp_path / "i.dcm", enforce_file_format=True)
    reason, _ = refused(tmp_path / "i.dcm")
    assert "another size than its header states" in reason


@pytest.mark.parametrize("group", [b"\2\0", b"\0\0"], ids=["meta", "command"])
def test_large_meta_information_is_damage(group: bytes, tmp_path: Path) -> None:
    content = written(seg(tmp_path))
    at = content.index(b"\x08\x00\x05\x00CS") if b"\x08\x00\x05\x00CS" in content else None
    at = at or content.index(b"\x08\x00\x08\x00CS")
    head = group + b"\xf0\0" + (b"OB\0\0" if group == b"\2\0" else b"")
    with open(tmp_path / "s.dcm", "wb") as file:
        file.write(content[:at] + head + struct.pack("<L", LARGE))
        file.seek(LARGE, 1)
        file.write(content[at:])
    tracemalloc.start()
    (instance,) = scan([tmp_path / "s.dcm"])
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert instance.kind == "damaged"
    assert memory < FEW


def test_structure_set_passes_over_pixels(tmp_path: Path) -> None:
    images = slices(np.zeros((3, 8, 8), np.int16), Modality="CT", origin=(0, 0, 0))
    for number, image in enumerate(images):
        image.save_as(tmp_path / f"i{number}.dcm", enforce_file_format=True)
    height = float(images[1].ImagePositionPatient[2])
    box = np.array([[1, 1, height], [6, 1, height], [6, 6, height], [1, 6, height]])
    structure_set(tmp_path / "made.dcm", images, {"left ventricle": [box]})
    ds = dcmread(tmp_path / "made.dcm")
    (tmp_path / "made.dcm").unlink()
    ds.PixelData = b""
    with_large_pixels(tmp_path / "rt.dcm", ds)
    tracemalloc.start()
    (case,) = find_cases([tmp_path])
    assert any(piece.any() for _, _, piece in read_mask(case).pieces())  # type: ignore[union-attr]
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert memory < FEW
