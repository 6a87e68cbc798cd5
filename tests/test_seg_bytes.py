"""The binary SEG that is encoded once a slice, against what highdicom and pydicom write of the
whole mask.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import highdicom
import numpy as np
import pytest
from numpy.typing import NDArray
from samples import directions, rotation
from series import SOURCE, TILT, assert_in_place

from runtime import OutputError
from runtime.core.manifest import Label, LabelTable, Manifest
from runtime.core.resampling import axial_axes
from runtime.core.volume import CTSlab, Geometry, LabelVolume
from runtime.engines.fake import fake_manifest
from runtime.io.dicom.attributes import Identity
from runtime.io.dicom.canonical_grid import CanonicalGrid
from runtime.io.dicom.ct_series import write_series
from runtime.io.dicom.enhanced_ct import write_enhanced
from runtime.io.dicom.segmentation import NAME, seg_dataset, write_seg
from runtime.io.dicom.segmentation_bytes import stand_in, write_binary
from runtime.io.writers.base import OutputRecord


def model_of(count: int) -> Manifest:
    return fake_manifest(LabelTable(tuple(Label(f"structure {n}", n) for n in range(count + 1))))


def random_labels(shape: tuple[int, int, int], count: int, shown: float = 0.5) -> NDArray[np.uint8]:
    rng = np.random.default_rng(5)
    return (rng.integers(1, count + 1, shape) * (rng.random(shape) < shown)).astype(np.uint8)


def gaps(shape: tuple[int, int, int] = (9, 8, 10)) -> NDArray[np.uint8]:
    """Two slices of each axis without labels, one of them inside, label 5 in a single voxel,
    label 6 nowhere.
    """
    labels = random_labels(shape, 4)
    for axis in range(3):
        np.moveaxis(labels, axis, 0)[[0, 4]] = 0
    labels[2, 2, 3], labels[3, 3, 1] = 5, 7
    return labels


MASKS = {
    "gaps": (gaps(), fake_manifest()),
    "frames that end within a byte": (gaps((6, 5, 7)), fake_manifest()),
    "many labels": (random_labels((5, 9, 11), 40), model_of(40)),
    "one label of a model of one": (random_labels((5, 3, 6), 1, 0.1), model_of(1)),
    "nothing": (np.zeros((3, 3, 5), np.uint8), fake_manifest()),
    "one voxel": (
        np.pad(np.full((1, 1, 1), 3, np.uint8), ((2, 1), (3, 3), (1, 2))),
        fake_manifest(),
    ),
}


class Writing:
    """The images of a series, and all that its SEG is written of."""

    def __init__(
        self,
        folder: Path,
        labels: NDArray[np.uint8],
        manifest: Manifest,
        direction: NDArray[np.float64],
        *,
        enhanced: bool = False,
        attach: bool = False,
    ):
        geometry = Geometry.from_parts((12.5, -90, 300.25), (0.7, 0.9, 3.1), direction.ravel())
        mask = LabelVolume(labels, geometry, dicom=SOURCE if attach else None)
        self.folder, self.record = (
            folder,
            OutputRecord("case", None, mask, manifest, "fake (given)", "", 0),
        )
        self.identity, self.grid = (
            Identity.of(self.record, attach),
            CanonicalGrid.of(geometry, labels.shape),
        )
        self.labels = self.grid.view(labels)
        slab = CTSlab(np.zeros(labels.shape, np.int16), axial_axes(geometry)[0], 0)
        self.images = (write_enhanced if enhanced else write_series)(
            folder, self.record, self.identity, self.grid, [slab]
        )

    def of_the_whole(self) -> bytes:
        seg_dataset(self.record, self.identity, self.images, "binary", self.labels).save_as(
            self.folder / "whole", enforce_file_format=True
        )
        return (self.folder / "whole").read_bytes()

    def write(self) -> Path:
        write_seg(self.folder, self.record, self.identity, self.grid, self.images, "binary")
        return self.folder / NAME


@pytest.mark.parametrize("attach", [False, True], ids=["detached", "attached"])
@pytest.mark.parametrize("enhanced", [False, True], ids=["classic", "enhanced"])
@pytest.mark.parametrize("mask", MASKS)
def test_seg_bytes_equal_highdicom_and_pydicom(
    mask: str, enhanced: bool, attach: bool, tmp_path: Path
) -> None:
    """The file equals, byte for byte, what highdicom and pydicom write."""
    for n, direction in enumerate(
        [np.eye(3), TILT, *(rotation((3, 0, 9)) @ d for d in directions()[10::19])]
    ):
        (tmp_path / str(n)).mkdir()
        writing = Writing(
            tmp_path / str(n), *MASKS[mask], direction, enhanced=enhanced, attach=attach
        )
        whole = writing.of_the_whole()
        assert writing.write().read_bytes() == whole


def test_seg_slices_below_eight_voxels_read(tmp_path: Path) -> None:
    """highdicom 0.28 begins a new byte with each of their frames, and reads them back elsewhere
    (PS3.5 8.1.1: there are no gaps).
    """
    writing = Writing(tmp_path, random_labels((6, 2, 3), 7), fake_manifest(), TILT)
    read = highdicom.seg.segread(writing.write()).get_volume(combine_segments=True)
    k, j, i = np.nonzero(writing.labels)
    points = (
        np.stack([i, j, k], -1) @ writing.grid.geometry.affine[:3, :3].T
        + writing.grid.geometry.affine[:3, 3]
    )
    assert_in_place(points, writing.labels[k, j, i], read.array, read.affine)
    assert np.count_nonzero(read.array) == len(k) > 10


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["axial", "sagittal"])
def test_seg_writing_streams_mask_and_frames(order: tuple[int, int, int], tmp_path: Path) -> None:
    """Neither the mask nor its frames are held in memory."""
    labels = random_labels((48, 384, 384), 7).transpose(order)
    writing = Writing(
        tmp_path, labels, fake_manifest(), np.eye(3)[:, [2 - axis for axis in order[::-1]]]
    )
    assert writing.labels.shape == (48, 384, 384)
    file = writing.write()  # loads highdicom's tables
    tracemalloc.start()
    try:
        writing.write()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20 < file.stat().st_size < labels.nbytes


def test_seg_beyond_element_length_is_refused(tmp_path: Path) -> None:
    """A SEG whose size exceeds what an element's length can state is refused."""
    writing = Writing(tmp_path, np.ones((2, 3, 3), np.uint8), fake_manifest(), np.eye(3))
    for image in writing.images:
        image.Rows = image.Columns = 1
    shown = [[1], [1]]
    seg = seg_dataset(writing.record, writing.identity, writing.images, "binary", stand_in(shown))
    with pytest.raises(OutputError, match="4294967296 bytes"):
        write_binary(
            tmp_path / NAME, seg, np.broadcast_to(np.uint8(1), (2, 1 << 17, 1 << 17)), shown
        )
    assert not (tmp_path / NAME).exists()
