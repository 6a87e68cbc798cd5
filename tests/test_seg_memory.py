"""The frames of a SEG are read one at a time: neither a good nor a refused one is held whole."""

from __future__ import annotations

import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from dicom_masks import segmentation, slices
from numpy.typing import NDArray
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, RLELossless
from samples import MEASURED_COMMAND

from runtime.core.errors import UnreadableVolume
from runtime.core.labels import MM_WHS
from runtime.core.volume import Layers
from runtime.io.case_finding import find_cases
from runtime.io.cases import read_case, read_mask

HEART = [("left ventricle", "87878005"), ("left atrium", "82471001")]
SHAPE = (96, 181, 251)
CHILD = MEASURED_COMMAND.replace("IMPORTS", "numpy, SimpleITK, pydicom.pixels")


def values(shape: tuple[int, int, int] = SHAPE) -> NDArray[np.uint8]:
    """Labels 0 to 2 in each slice, without a period of whole bytes."""
    return (np.arange(np.prod(shape)).reshape(shape) // 7 % 3).astype(np.uint8)


def as_deflated(ds: Dataset) -> None:
    ds.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian


def as_fragments(ds: Dataset) -> None:
    ds.compress(RLELossless)


def unchanged(ds: Dataset) -> None:
    pass


def peak_while(action: Callable[[], object]) -> int:
    """The most bytes that Python held during an action beyond those before it."""
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("BINARY", unchanged),
        ("LABELMAP", unchanged),
        ("BINARY", as_deflated),
        ("LABELMAP", as_deflated),
        ("LABELMAP", as_fragments),
        ("FRACTIONAL", unchanged),
    ],
)
def test_seg_is_never_held_whole(
    kind: str, change: Callable[[Dataset], None], tmp_path: Path
) -> None:
    """Its values are pydicom's, and a few frames, or what is inflated at once, are in memory."""
    truth = values()

    def written(name: str, frames: NDArray[np.uint8]) -> tuple[Path, NDArray[np.uint8]]:
        path = segmentation(tmp_path / name, slices(frames), frames, HEART, kind)
        ds = dcmread(path)
        pixels = ds.pixel_array
        change(ds)
        dcmwrite(path, ds, implicit_vr=False, little_endian=True)
        return path, pixels

    # A small one first: what is imported at the first reading is not the file's.
    small, _ = written("small.dcm", truth[40:48])
    read_case(find_cases([small])[0], MM_WHS)
    path, pixels = written("a.dcm", truth)
    sums: dict[int, int] = {}

    def read() -> None:
        (case,) = find_cases([path])
        mask = read_mask(case)
        assert isinstance(mask, Layers)
        for number, _, piece in mask.pieces():
            sums[number] = sums.get(number, 0) + int(piece.sum())

    held = peak_while(read)
    assert sum(sums.values()) == np.count_nonzero(pixels)
    inflated_at_once = 5 << 19 if change is as_deflated else 0
    assert held < 20 * truth[0].size + inflated_at_once < truth.nbytes
    labels = read_case(find_cases([path])[0], MM_WHS).labels
    assert np.array_equal(labels, np.array([0, 3, 2], np.uint8)[truth])


def test_big_endian_words_keep_bits(tmp_path: Path) -> None:
    """Bits in words of the other byte order (retired), in frames that end within a byte."""
    truth = values((6, 9, 13))
    path = segmentation(tmp_path / "a.dcm", slices(truth), truth, HEART)
    expected = read_case(find_cases([path])[0], MM_WHS).labels
    ds = dcmread(path)
    swapped = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
    ds.PixelData = swapped
    ds["PixelData"].VR = "OW"
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    dcmwrite(path, ds, implicit_vr=False, little_endian=False, enforce_file_format=True)
    assert np.array_equal(read_case(find_cases([path])[0], MM_WHS).labels, expected)


def test_changed_seg_is_no_mixture(tmp_path: Path) -> None:
    """A file that is replaced between its header and its pixels is refused."""
    truth = values((4, 16, 16))
    path = segmentation(tmp_path / "a.dcm", slices(truth), truth, HEART)
    mask = read_mask(find_cases([path])[0])
    assert isinstance(mask, Layers)
    segmentation(path, slices(truth), truth, [("a name " * 9, "87878005"), HEART[1]])
    with pytest.raises(UnreadableVolume, match="has changed"):
        [*mask.pieces()]


def test_offset_table_is_bounded(tmp_path: Path) -> None:
    """pydicom would make a number of each four bytes of a table of offsets."""
    truth = values((4, 256, 256))
    path = segmentation(tmp_path / "a.dcm", slices(truth), truth, HEART, "LABELMAP")
    ds = dcmread(path)
    ds.file_meta.TransferSyntaxUID = RLELossless
    table = struct.pack("<HHL", 0xFFFE, 0xE000, 1 << 19) + bytes(1 << 19)
    ds.PixelData = table + encapsulate([b"\0\0"] * 4, has_bot=False)[8:]
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    ds.save_as(path)

    def read() -> None:
        with pytest.raises(UnreadableVolume, match="damaged"):
            read_case(find_cases([path])[0], MM_WHS)

    assert peak_while(read) < 1 << 20


def undescribed_at_end(folder: Path, frames: int) -> Path:
    """A LABELMAP of 512 x 512 pixels whose last pixel is a number that it does not describe."""
    thin = np.zeros((frames, 1, 1), np.uint8)
    thin[:, 0, 0] = 1
    ds = dcmread(segmentation(folder / "a.dcm", slices(thin), thin, HEART[:1], "LABELMAP"))
    ds.Rows = ds.Columns = 512
    plane = np.zeros((512, 512), np.uint8)
    plane[100:300, 100:300] = 1
    ds.PixelData = plane.tobytes() * (frames - 1) + plane.tobytes()[:-1] + b"\x09"
    ds.save_as(folder / "s.dcm", enforce_file_format=True)
    return folder / "s.dcm"


def test_seg_refused_by_pixels_is_small(tmp_path: Path) -> None:
    path = undescribed_at_end(tmp_path, 64)

    def read() -> None:
        mask = read_mask(find_cases([path])[0])
        assert isinstance(mask, Layers)
        with pytest.raises(UnreadableVolume, match="segment 9"):
            [piece.any() for _, _, piece in mask.pieces()]

    assert peak_while(read) < 4 << 20 < path.stat().st_size


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peaks as Linux states them")
def test_large_refused_seg_takes_little(tmp_path: Path) -> None:
    """192 MiB of labels, of which the last one is refused; a resident set below 24 MiB more."""
    path = undescribed_at_end(tmp_path, 768)
    assert path.stat().st_size > 192 << 20
    done = subprocess.run(
        [sys.executable, "-c", CHILD, "labels", str(path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "segment 9, which it does not describe" in done.stderr
    before, most = (int(word) for word in done.stdout.split()[-2:])
    assert most - before < 24 << 10
