"""A result as one multi-frame object: Enhanced CT Image Storage (PS3.3 A.38), its frames written in
place as the slabs come.

Derived and not acquired: what the standard asks of ORIGINAL and MIXED images (exposure,
reconstruction, times) is absent. Derivation Description and the sources stand where the classic
object has them, as a standard extension: the group for them needs codes and series that there are
not.
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
    """Write ct.dcm and return its dataset without pixels, alone in a list.

    Raises `OutputError` past `MOST_BYTES`.
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
    """The object without its pixels: the modules and functional groups of PS3.3 tables A.38-1
    and A.38-2.
    """
    from pydicom.uid import UID, EnhancedCTImageStorage

    ds = image_dataset(EnhancedCTImageStorage, record, identity, grid)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = UID(identity.uid("enhanced ct"))
    ds.SeriesInstanceUID = identity.uid("enhanced ct series")
    ds.InstanceNumber, ds.NumberOfFrames = 1, grid.shape[0]
    ds.BurnedInAnnotation, ds.LossyImageCompression = (
        "NO",
        "00",
    )  # asked for here; `label_series.read_ct` refuses CTs of other kinds
    ds.DeviceSerialNumber, ds.SoftwareVersions = "0", VERSION
    ds.ContentDate, ds.ContentTime = FIXED_DATE, FIXED_TIME
    ds.ImageType, ds.ContentQualification, ds.PresentationLUTShape = (
        _FRAME_TYPE,
        "RESEARCH",
        "IDENTITY",
    )
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
    event = _item(
        IrradiationEventUID=identity.uid("synthesis")
    )  # the group is asked for; nobody was irradiated
    ds.PerFrameFunctionalGroupsSequence = [_frame(grid, k, event) for k in range(grid.shape[0])]
    if identity.attached and record.mask.dicom is not None:
        set_sources(ds, record.mask.dicom, record.mask.dicom.sop_instance_uids)
    return ds


def _shared(record: OutputRecord, grid: CanonicalGrid) -> Any:
    across, down, between = grid.geometry.spacing
    region = (
        code("80891009", "SCT", "Heart")
        if shows_hearts(record)
        else code("38266002", "SCT", "Entire body")
    )
    frame_type = _item(FrameType=_FRAME_TYPE)
    _describe_pixels(frame_type)
    (step,) = decimals([between])
    return _item(
        PixelMeasuresSequence=[
            _item(
                PixelSpacing=decimals([down, across]),
                SliceThickness=step,
                SpacingBetweenSlices=step,
            )
        ],
        PlaneOrientationSequence=[_item(ImageOrientationPatient=decimals(grid.orientation))],
        FrameAnatomySequence=[_item(FrameLaterality="U", AnatomicRegionSequence=[region])],
        CTImageFrameTypeSequence=[frame_type],
        PixelValueTransformationSequence=[
            _item(RescaleIntercept=0, RescaleSlope=1, RescaleType="HU")
        ],
        FrameVOILUTSequence=[_item(WindowCenter=WINDOW[0], WindowWidth=WINDOW[1])],
    )


def _frame(grid: CanonicalGrid, k: int, event: Any) -> Any:
    return _item(
        IrradiationEventIdentificationSequence=[event],
        FrameContentSequence=[
            _item(StackID="1", InStackPositionNumber=k + 1, DimensionIndexValues=[1, k + 1])
        ],
        PlanePositionSequence=[_item(ImagePositionPatient=decimals(grid.position(k)))],
    )


def _describe_pixels(ds: Any) -> None:
    """The Common CT/MR Image Description macro (PS3.3 C.8.16.2) and what table C.8-124 adds."""
    ds.PixelPresentation, ds.VolumetricProperties, ds.VolumeBasedCalculationTechnique = (
        "MONOCHROME",
        "VOLUME",
        "NONE",
    )


def _item(**attributes: Any) -> Any:
    from pydicom import Dataset

    item = Dataset()
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item
