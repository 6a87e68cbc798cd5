"""The enhanced CT: one multi-frame object, Enhanced CT Image Storage (PS3.3 A.38).

The image is DERIVED, so the attributes that the standard requires of ORIGINAL and MIXED images
(exposure, reconstruction, times) are absent. Derivation Description and the sources stand where the
classic object has them, as a Standard Extended SOP Class. The functional group for them would need
codes and series that do not exist here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...core.errors import OutputError
from ...core.version import VERSION
from ...core.volume import CTSlab
from ..writers.base import OutputRecord
from .attributes import FIXED_DATE, FIXED_TIME, Identity, code
from .canonical_grid import CanonicalGrid
from .ct_image import WINDOW, decimals, image_dataset, set_sources, shows_hearts
from .encoding import MOST_BYTES, head

if TYPE_CHECKING:
    from pydicom import Dataset

NAME = "ct.dcm"
_FRAME_TYPE = ["DERIVED", "PRIMARY", "VOLUME", "NONE"]


def write_enhanced(
    folder: Path,
    record: OutputRecord,
    identity: Identity,
    grid: CanonicalGrid,
    slabs: Iterable[CTSlab],
) -> list[Dataset]:
    """Write ct.dcm, each frame at its place as the slabs come.

    Args:
        folder: the folder for the file.
        record: the result.
        identity: its identity.
        grid: the canonical grid.
        slabs: the CT, int16 HU, on the grid of the mask.

    Returns:
        A list with the dataset, without pixels.

    Raises:
        OutputError: the pixels take more than `MOST_BYTES`.
    """
    from pydicom import dcmwrite

    count, rows, columns = grid.shape
    size, frame = 2 * count * rows * columns, 2 * rows * columns
    if size > MOST_BYTES:
        raise OutputError(
            f"an Enhanced CT cannot hold {size} bytes of pixels",
            expected=f"at most {MOST_BYTES}",
            remedy="leave --enhanced out",
        )
    ds = enhanced_dataset(record, identity, grid)
    with open(folder / NAME, "wb") as file:
        dcmwrite(file, ds, enforce_file_format=True)
        file.write(head(0x7FE00010, b"OW", size))
        start = file.tell()
        for slab in slabs:
            for k, plane in zip(grid.numbers(slab), grid.view(slab.hu), strict=True):
                file.seek(start + k * frame)
                file.write(np.ascontiguousarray(plane, "<i2").data.cast("B"))
    return [ds]


def enhanced_dataset(record: OutputRecord, identity: Identity, grid: CanonicalGrid) -> Dataset:
    """Make the object without pixels: modules and functional groups (PS3.3 tables A.38-1, A.38-2).

    Args:
        record: the result.
        identity: its identity.
        grid: the canonical grid.

    Returns:
        The dataset.
    """
    from pydicom.uid import UID, EnhancedCTImageStorage

    ds = image_dataset(EnhancedCTImageStorage, record, identity, grid)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(identity.uid("enhanced ct"))
    ds.SeriesInstanceUID = identity.uid("enhanced ct series")
    ds.InstanceNumber, ds.NumberOfFrames = 1, grid.shape[0]
    # required here, also of a deformed CT: `dicom_series.read_ct` refuses a lossy or annotated one
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    ds.DeviceSerialNumber, ds.SoftwareVersions = "0", VERSION
    ds.ContentDate, ds.ContentTime = FIXED_DATE, FIXED_TIME
    ds.ImageType = _FRAME_TYPE
    ds.ContentQualification, ds.PresentationLUTShape = "RESEARCH", "IDENTITY"
    _describe_pixels(ds)
    ds.AcquisitionContextSequence = []
    organization = identity.uid("enhanced ct dimensions")
    ds.DimensionOrganizationSequence = [_item(DimensionOrganizationUID=organization)]
    pointers = ((0x00209056, "Stack ID"), (0x00209057, "In-Stack Position Number"))
    ds.DimensionIndexSequence = [
        _item(
            DimensionOrganizationUID=organization,
            DimensionIndexPointer=tag,
            FunctionalGroupPointer=0x00209111,
            DimensionDescriptionLabel=label,
        )
        for tag, label in pointers
    ]
    ds.SharedFunctionalGroupsSequence = [_shared(record, grid)]
    # the group is required, although nobody was irradiated
    event = _item(IrradiationEventUID=identity.uid("synthesis"))
    ds.PerFrameFunctionalGroupsSequence = [_frame(grid, k, event) for k in range(grid.shape[0])]
    if identity.attached and record.mask.dicom is not None:
        set_sources(ds, record.mask.dicom, record.mask.dicom.sop_instance_uids)
    return ds


def _shared(record: OutputRecord, grid: CanonicalGrid) -> Any:
    """The shared functional groups."""
    across, down, between = grid.geometry.spacing
    region = (
        code("80891009", "SCT", "Heart")
        if shows_hearts(record)
        else code("38266002", "SCT", "Entire body")
    )
    frame_type = _item(FrameType=_FRAME_TYPE)
    _describe_pixels(frame_type)
    (step,) = decimals([between])
    pixel_spacing = decimals([down, across])
    measures = _item(PixelSpacing=pixel_spacing, SliceThickness=step, SpacingBetweenSlices=step)
    return _item(
        PixelMeasuresSequence=[measures],
        PlaneOrientationSequence=[_item(ImageOrientationPatient=decimals(grid.orientation))],
        FrameAnatomySequence=[_item(FrameLaterality="U", AnatomicRegionSequence=[region])],
        CTImageFrameTypeSequence=[frame_type],
        PixelValueTransformationSequence=[
            _item(RescaleIntercept=0, RescaleSlope=1, RescaleType="HU")
        ],
        FrameVOILUTSequence=[_item(WindowCenter=WINDOW[0], WindowWidth=WINDOW[1])],
    )


def _frame(grid: CanonicalGrid, k: int, event: Any) -> Any:
    """The functional groups of frame k, counted from 0."""
    return _item(
        IrradiationEventIdentificationSequence=[event],
        FrameContentSequence=[
            _item(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1])
        ],
        PlanePositionSequence=[_item(ImagePositionPatient=decimals(grid.position(k)))],
    )


def _describe_pixels(ds: Any) -> None:
    """Set the Common CT/MR Image Description macro (PS3.3 C.8.16.2) and table C.8-124."""
    ds.PixelPresentation, ds.VolumetricProperties = "MONOCHROME", "VOLUME"
    ds.VolumeBasedCalculationTechnique = "NONE"


def _item(**attributes: Any) -> Any:
    """A sequence item with these attributes."""
    from pydicom import Dataset

    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item
