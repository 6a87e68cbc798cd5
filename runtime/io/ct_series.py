"""A result as a DICOM series: CT Image Storage (PS3.3 A.3), one file a slice, written as the slabs come."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..contract import Manifest
from ..errors import UsageError
from ..files import atomic_folder
from ..labels import MM_WHS
from ..volume import CTSlab, DicomSource, LabelVolume
from .headers import is_synthetic
from .painting import FormatOptions, Painting, result_name
from .paired_seg import write_seg
from .profile import RTSTRUCT, Identity, check_attachable, code, describe, require_libraries
from .upright import UprightGrid

if TYPE_CHECKING:
    from pydicom import Dataset

SERIES_NUMBER = 9000  # of the first series; a result with its SEG takes two
SEG_NAME = "seg.dcm"
WINDOW = (40, 400)  # centre and width in HU


@dataclass(frozen=True)
class DicomFormat:
    """The folder CASE, or CASE_v0 …, with 0001.dcm … from the feet to the head, and seg.dcm, the mask as a SEG of this very series."""

    options: FormatOptions

    def check(self, manifest: Manifest, output: Path) -> None:
        require_libraries("pydicom", *(["highdicom"] if self.options.segmentation != "none" else []))
        if manifest.intensity.unit != "HU":
            raise UsageError(f"the model paints {manifest.intensity.unit}, not HU", expected="Hounsfield units for a CT series",
                             remedy="write a volume format, such as --format nifti")  # fmt: skip

    def check_mask(self, mask: LabelVolume) -> None:
        UprightGrid.of(mask.geometry, mask.labels.shape)
        if self.options.attach:
            check_attachable(mask)

    def files(self, output: Path, case: str, variant: int | None) -> tuple[Path, ...]:
        return (output / result_name(case, variant),)

    def is_ours(self, path: Path) -> bool:
        return path.is_dir() and all(p.suffix == ".dcm" and p.is_file() and is_synthetic(p) for p in path.iterdir())

    def write(self, output: Path, painting: Painting, slabs: Iterable[CTSlab]) -> tuple[Path, ...]:
        (path,) = self.files(output, painting.case, painting.variant)
        identity = Identity.of(painting, self.options.attach)
        grid = UprightGrid.of(painting.mask.geometry, painting.mask.labels.shape)
        with atomic_folder(path) as folder:
            slices = _write_slices(folder, painting, identity, grid, slabs)
            if self.options.segmentation != "none":
                write_seg(folder / SEG_NAME, painting, identity, grid, slices, self.options.segmentation)
        return (path,)


def _write_slices(folder: Path, painting: Painting, identity: Identity, grid: UprightGrid, slabs: Iterable[CTSlab]) -> list[Dataset]:
    """Write the series and return its datasets without pixels, in order."""
    from pydicom import Dataset, dcmwrite
    from pydicom.uid import UID

    common = series_dataset(painting, identity, grid)
    headers: list[Any] = [None] * grid.shape[0]
    digits = max(4, len(str(len(headers))))
    for slab in slabs:
        for k, plane in zip(grid.numbers(slab), grid.view(slab.hu), strict=True):
            headers[k] = ds = Dataset()
            ds.update(common)
            ds.SOPInstanceUID = UID(identity.uid("ct", k))
            ds.InstanceNumber = k + 1
            ds.ImagePositionPatient = decimals(grid.position(k))
            ds.file_meta = common.file_meta
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            ds.PixelData = np.ascontiguousarray(plane, "<i2").tobytes()
            dcmwrite(folder / f"{k + 1:0{digits}d}.dcm", ds, enforce_file_format=True)
            del ds.PixelData
    return headers


def series_dataset(painting: Painting, identity: Identity, grid: UprightGrid) -> Dataset:
    """All that the slices of a series share: the modules of the CT Image IOD (PS3.3 table A.3-1)."""
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    describe(ds, painting, identity)
    ds.Modality = "CT"
    ds.SeriesInstanceUID = identity.uid("ct series")
    ds.SeriesNumber = SERIES_NUMBER + 2 * (painting.variant or 0)
    ds.PatientPosition = "HFS"
    if {label.snomed for label in painting.manifest.labels.labels[1:]} <= {label.snomed for label in MM_WHS.labels[1:]}:
        ds.BodyPartExamined = "HEART"
    else:
        ds.Laterality = ""  # type 2C: the model does not say which part of the body it paints
    ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    ds.AcquisitionNumber, ds.KVP = None, None
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    _, ds.Rows, ds.Columns = grid.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "HU"
    ds.WindowCenter, ds.WindowWidth = WINDOW
    across, down, between = grid.geometry.spacing
    ds.PixelSpacing = decimals([down, across])
    ds.ImageOrientationPatient = decimals(grid.orientation)
    ds.SliceThickness = ds.SpacingBetweenSlices = decimals([between])[0]
    if identity.attached and painting.mask.dicom is not None:
        _name_sources(ds, painting.mask.dicom)
    return ds


def decimals(values: Iterable[float]) -> list[Any]:
    """DS (PS3.5 6.2): as many digits as its 16 characters hold."""
    from pydicom.valuerep import DSfloat

    return [DSfloat(value + 0.0, auto_format=True) for value in values]


def _name_sources(ds: Dataset, source: DicomSource) -> None:
    """An image in the Source Image Sequence; an RT Structure Set, which is none, in the Source Instance Sequence."""
    from pydicom import Dataset

    items = []
    for instance in source.sop_instance_uids:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.sop_class_uid, instance
        item.PurposeOfReferenceCodeSequence = [code("121322", "DCM", "Source image for image processing operation")]
        items.append(item)
    if source.sop_class_uid == RTSTRUCT:
        for item in items:
            del item.PurposeOfReferenceCodeSequence
        ds.SourceInstanceSequence = items
    else:
        ds.SourceImageSequence = items
