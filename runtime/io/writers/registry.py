"""The table of output formats, by their names for `--format`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from .base import DEFAULT_OPTIONS, Format, FormatOptions, OutputRecord, result_name
from .dicom import DicomFormat
from .training_set import DatasetFormat
from .volume import VolumeFormat

__all__ = ["DEFAULT_OPTIONS", "FORMATS", "Format", "FormatOptions", "OutputRecord", "result_name"]

FORMATS: dict[str, Callable[[FormatOptions], Format]] = {
    "nifti": partial(VolumeFormat, ".nii.gz"),
    "nii": partial(VolumeFormat, ".nii"),
    "nrrd": partial(VolumeFormat, ".nrrd"),
    "mha": partial(VolumeFormat, ".mha"),
    "dicom": DicomFormat,
    "nnunet": partial(DatasetFormat, "_0000"),
    "msd": partial(DatasetFormat, ""),
}
