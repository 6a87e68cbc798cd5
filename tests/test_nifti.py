"""NIfTI masks are read straight into their place; what comes out is what SimpleITK reads, for
every type and byte order.
"""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from samples import blobs

from runtime import Geometry, LabelVolume
from runtime.core.errors import UnreadableVolume
from runtime.core.labels import MM_WHS, to_indices
from runtime.io.readers.volume import read_labels, read_volume

TYPES = (
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float32",
    "float64",
)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", TYPES)
def test_nifti_agrees_with_simpleitk(dtype: str, order: str, suffix: str, tmp_path: Path) -> None:
    """Values and geometry are those that SimpleITK reads."""
    values = (blobs((5, 6, 7)) % 120).astype(np.dtype(dtype).newbyteorder(order))
    affine = np.array(
        [[-0.8, 0.1, 0.0, 3.0], [0.1, 0.8, 0.0, -4.0], [0.0, 0.0, 2.5, 9.0], [0, 0, 0, 1]]
    )
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(values.dtype)
    path = tmp_path / f"m{suffix}"
    nibabel.save(nibabel.Nifti1Image(values.T, affine, header), path)
    read, expected = read_volume(path), sitk.ReadImage(str(path))
    assert read.values.dtype == dtype and np.array_equal(
        read.values, sitk.GetArrayFromImage(expected)
    )
    assert read.geometry.origin == pytest.approx(
        expected.GetOrigin()
    ) and read.geometry.spacing == pytest.approx(expected.GetSpacing())
    assert read.geometry.direction.ravel() == pytest.approx(expected.GetDirection(), abs=1e-9)


@pytest.mark.parametrize("slope", [(2.0, 0.0), (1.0, 5.0), (0.0, 7.0)])
def test_nifti_scaling_is_applied(slope: tuple[float, float], tmp_path: Path) -> None:
    made = nibabel.Nifti1Image(blobs((5, 6, 7)).astype(np.int16).T, np.eye(4))
    path = tmp_path / "m.nii"
    nibabel.save(made, path)
    data = bytearray(path.read_bytes())
    data[112:120] = np.array(slope, "<f4").tobytes()
    path.write_bytes(data)
    assert np.array_equal(
        read_volume(path).values, np.asarray(nibabel.load(path).dataobj).T
    )  # ITK adds 7 where the slope is 0, against nifti1.h


def test_digest_ignores_negative_zero() -> None:
    """Equal grids have one digest, whatever the sign of their zeros."""
    labels = np.ones((2, 3, 4), np.uint8)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    assert (
        LabelVolume(labels, Geometry(affine)).digest
        == LabelVolume(labels, Geometry(affine * np.where(affine == 0, -1.0, 1.0))).digest
    )


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_plane_wise_reading_equals_mask(suffix: str, tmp_path: Path) -> None:
    """A mask that is read plane by plane is the same mask.

    Several blocks of planes: labels, and the digest that keys every random number of the result,
    are those of the whole array.
    """
    path, values = tmp_path / f"m{suffix}", np.zeros((70, 160, 150), np.int32)
    values[3:60] = blobs((57, 160, 150))
    sitk.WriteImage(sitk.GetImageFromArray(values), str(path))
    tracemalloc.start()
    try:
        read = read_labels(path, MM_WHS)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    whole = LabelVolume(to_indices(values, MM_WHS), read_volume(path).geometry)
    assert (
        np.array_equal(read.labels, whole.labels)
        and read.digest == whole.digest
        and read.geometry == whole.geometry
    )
    assert peak < values.size + (12 << 20), "more is held than the indices and some planes"


@pytest.mark.parametrize("lost", [1, 4000])
def test_truncated_nifti_is_refused(lost: int, tmp_path: Path) -> None:
    """A mask that is cut off in its last planes is refused."""
    path = tmp_path / "m.nii"
    sitk.WriteImage(sitk.GetImageFromArray(blobs((70, 160, 150)).astype(np.int32)), str(path))
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    (tmp_path / "m.nii.gz").write_bytes(gzip.compress(whole)[:-lost])
    (tmp_path / "crc.nii.gz").write_bytes(
        (packed := gzip.compress(whole))[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:]
    )
    for file in (path, tmp_path / "m.nii.gz", tmp_path / "crc.nii.gz"):
        with pytest.raises(UnreadableVolume, match=r"truncated|damaged") as refused:
            read_labels(file, MM_WHS)
        assert refused.value.file == file
