"""A synthetic series to look at: random HU, so that every voxel can be told from every other,
and a few blocks of labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom import Dataset
from pydicom.uid import SegmentationStorage
from samples import rotation

from runtime.core.manifest import Manifest
from runtime.core.resampling import axial_axes
from runtime.core.volume import CTSlab, DicomSource, Geometry, LabelVolume
from runtime.engines.fake import fake_manifest
from runtime.io.writers.dicom import DicomFormat
from runtime.io.writers.registry import FormatOptions, OutputRecord

TILT = rotation((12, -8, 25))
SOURCE = DicomSource(
    SegmentationStorage,
    ("1.2.3.4.5",),
    "1.2.3.99",
    {
        "PatientName": "DOE^JANE",
        "PatientID": "MRN123",
        "PatientBirthDate": "19700101",
        "PatientSex": "F",
        "StudyInstanceUID": "1.2.3.77",
        "StudyDate": "20240229",
        "StudyTime": "101112",
        "StudyID": "S1",
        "AccessionNumber": "A1",
        "ReferringPhysicianName": "WHO^DR",
    },
)


@dataclass(frozen=True)
class Series:
    folder: Path
    hu: NDArray[np.int16]
    mask: LabelVolume

    @property
    def slices(self) -> list[Dataset]:
        return [pydicom.dcmread(p) for p in sorted(self.folder.glob("[0-9]*.dcm"))]

    @property
    def points(self) -> NDArray[np.float64]:
        """Where every voxel lies in mm, (D, H, W, 3)."""
        k, j, i = np.meshgrid(*map(np.arange, self.hu.shape), indexing="ij")
        return (
            np.stack([i, j, k], -1) @ self.mask.geometry.affine[:3, :3].T
            + self.mask.geometry.affine[:3, 3]
        )


def write_series(
    output: Path,
    direction: NDArray[np.float64] | None = None,
    *,
    shape: tuple[int, int, int] = (5, 7, 6),
    segmentation: str = "none",
    source: DicomSource | None = None,
    attach: bool = False,
    enhanced: bool = False,
    seed: int = 0,
    variant: int | None = None,
    manifest: Manifest | None = None,
) -> Series:
    direction = np.eye(3) if direction is None else direction
    rng = np.random.default_rng(3)
    hu = rng.integers(-32768, 32768, shape).astype(np.int16)  # all that int16 holds
    labels = np.zeros(shape, np.uint8)
    for n in range(1, 8):
        corner = rng.integers(0, [max(1, s // 2) for s in shape])
        labels[tuple(slice(c, c + max(1, s // 3)) for c, s in zip(corner, shape, strict=True))] = n
    mask = LabelVolume(
        labels,
        Geometry.from_parts((12.5, -90, 300.25), (0.7, 0.9, 3.1), direction.ravel()),
        dicom=source,
    )
    axis = axial_axes(mask.geometry)[0]
    slabs = (
        CTSlab(np.take(hu, range(k, min(k + 2, shape[axis])), axis), axis, k)
        for k in range(0, shape[axis], 2)
    )
    record = OutputRecord(
        "case", variant, mask, manifest or fake_manifest(), "fake (given)", "", seed
    )
    writer = DicomFormat(FormatOptions(attach=attach, enhanced=enhanced, segmentation=segmentation))
    writer.check(record.manifest, output)
    writer.check_mask(mask)
    (folder,) = writer.write(output, record, slabs)
    return Series(folder, hu, mask)


def assert_in_place(
    points: NDArray[np.float64],
    expected: NDArray[Any],
    values: NDArray[Any],
    affine: NDArray[np.float64],
) -> None:
    """`values` and `affine` (LPS) are a reader's: what is `expected` at `points` (N, 3) in mm is
    there, within 1e-3 mm of a voxel's centre.
    """
    index = (np.linalg.inv(affine) @ np.c_[points, np.ones(len(points))].T).T[:, :3]
    nearest = np.rint(index).astype(int)
    assert np.abs((index - nearest) * np.linalg.norm(affine[:3, :3], axis=0)).max() < 1e-3
    assert np.array_equal(values[tuple(nearest.T)], expected)
