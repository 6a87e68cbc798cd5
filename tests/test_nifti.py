"""NIfTI masks are read straight into their place; what comes out is what SimpleITK reads, for every type and byte order."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from samples import blobs

from runtime import Geometry, LabelVolume
from runtime.io.nifti import read_volume

TYPES = ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", TYPES)
def test_values_and_geometry_are_those_simpleitk_reads(dtype: str, order: str, suffix: str, tmp_path: Path) -> None:
    values = (blobs((5, 6, 7)) % 120).astype(np.dtype(dtype).newbyteorder(order))
    affine = np.array([[-0.8, 0.1, 0.0, 3.0], [0.1, 0.8, 0.0, -4.0], [0.0, 0.0, 2.5, 9.0], [0, 0, 0, 1]])
    header = nibabel.Nifti1Header(endianness=order)
    header.set_data_dtype(values.dtype)
    path = tmp_path / f"m{suffix}"
    nibabel.save(nibabel.Nifti1Image(values.T, affine, header), path)
    read, expected = read_volume(path), sitk.ReadImage(str(path))
    assert read.values.dtype == dtype and np.array_equal(read.values, sitk.GetArrayFromImage(expected))
    assert read.geometry.origin == pytest.approx(expected.GetOrigin()) and read.geometry.spacing == pytest.approx(expected.GetSpacing())
    assert read.geometry.direction.ravel() == pytest.approx(expected.GetDirection(), abs=1e-9)


@pytest.mark.parametrize("slope", [(2.0, 0.0), (1.0, 5.0), (0.0, 7.0)])
def test_scaled_values_are_scaled(slope: tuple[float, float], tmp_path: Path) -> None:
    made = nibabel.Nifti1Image(blobs((5, 6, 7)).astype(np.int16).T, np.eye(4))
    path = tmp_path / "m.nii"
    nibabel.save(made, path)
    data = bytearray(path.read_bytes())
    data[112:120] = np.array(slope, "<f4").tobytes()
    path.write_bytes(data)
    assert np.array_equal(read_volume(path).values, sitk.GetArrayFromImage(sitk.ReadImage(str(path))))


def test_equal_grids_have_one_digest_whatever_the_sign_of_their_zeros() -> None:
    labels = np.ones((2, 3, 4), np.uint8)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    assert LabelVolume(labels, Geometry(affine)).digest == LabelVolume(labels, Geometry(affine * np.where(affine == 0, -1.0, 1.0))).digest
