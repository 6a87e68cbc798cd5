"""The attributes that the classic and the enhanced CT object share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...core.labels import MM_WHS
from ...core.volume import DicomSource
from ..writers.base import OutputRecord
from .attributes import RTSTRUCT, Identity, code, describe
from .canonical_grid import CanonicalGrid

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

SERIES_NUMBER = 9000  # of the first series; a result and its SEG take two numbers
WINDOW = (40, 400)  # center and width in HU


def image_dataset(
    sop_class: UID, record: OutputRecord, identity: Identity, grid: CanonicalGrid
) -> Dataset:
    """Make a CT object without pixels: patient, study, equipment and the format of the pixels.

    Args:
        sop_class: the SOP class of the object.
        record: the result.
        identity: its identity.
        grid: the canonical grid.

    Returns:
        The dataset, with file meta information for Explicit VR Little Endian.
    """
    from pydicom import Dataset
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = sop_class
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    describe(ds, record, identity)
    ds.Modality = "CT"
    ds.SeriesNumber = SERIES_NUMBER + 2 * (record.variant or 0)
    ds.PatientPosition = "HFS"
    if shows_hearts(record):
        ds.BodyPartExamined = "HEART"
    else:
        ds.Laterality = ""  # type 2C: the model does not state which part of the body it shows
    if not record.manifest.derived:  # unknown for the pixels of a real CT
        ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    _, ds.Rows, ds.Columns = grid.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    return ds


def shows_hearts(record: OutputRecord) -> bool:
    """Return whether all labels are structures of MM-WHS, so that the CT shows a heart."""
    return {label.snomed for label in record.manifest.labels.labels[1:]} <= {
        label.snomed for label in MM_WHS.labels[1:]
    }


def decimals(values: Iterable[float]) -> list[Any]:
    """Convert numbers to VR DS (PS3.5 6.2), with as many digits as 16 characters hold."""
    from pydicom.valuerep import DSfloat

    return [DSfloat(value + 0.0, auto_format=True) for value in values]


def set_sources(ds: Dataset, source: DicomSource, instances: Sequence[str]) -> None:
    """Reference the source of a result (PS3.3 C.12.4, C.36).

    An image goes to the Source Image Sequence. An RT Structure Set is not an image and goes to the
    Source Instance Sequence.

    Args:
        ds: the object, which is changed.
        source: the DICOM mask.
        instances: the SOP Instance UIDs to reference.
    """
    from pydicom import Dataset

    image = source.sop_class_uid != RTSTRUCT
    items = []
    for instance in instances:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = source.sop_class_uid, instance
        if image:
            item.PurposeOfReferenceCodeSequence = [
                code("121322", "DCM", "Source image for image processing operation")
            ]
        items.append(item)
    if image:
        ds.SourceImageSequence = items
    else:
        ds.SourceInstanceSequence = items
