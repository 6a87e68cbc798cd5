"""The classic CT series: CT Image Storage (PS3.3 A.3), one file a slice, written as the slabs
come.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...core.volume import CTSlab
from ..writers.base import OutputRecord
from .attributes import Identity
from .canonical_grid import CanonicalGrid
from .ct_image import WINDOW, decimals, image_dataset, set_sources
from .encoding import SliceWriter

if TYPE_CHECKING:
    from pydicom import Dataset


def write_series(
    folder: Path,
    record: OutputRecord,
    identity: Identity,
    grid: CanonicalGrid,
    slabs: Iterable[CTSlab],
) -> list[Dataset]:
    """Write 0001.dcm … from the feet to the head, and return their datasets without pixels, in
    order.
    """
    from pydicom import Dataset

    common = series_dataset(record, identity, grid)
    writer = SliceWriter(common)
    headers: list[Any] = [None] * grid.shape[0]
    digits = max(4, len(str(len(headers))))
    for slab in slabs:
        for k, plane in zip(grid.numbers(slab), grid.view(slab.hu), strict=True):
            own = Dataset()
            own.SOPInstanceUID = identity.uid("ct", k)
            own.InstanceNumber = k + 1
            own.ImagePositionPatient = decimals(grid.position(k))
            if identity.attached and record.mask.dicom is not None:
                set_sources(
                    own,
                    record.mask.dicom,
                    _instances_at(record.mask.dicom.sop_instance_uids, grid, k),
                )
            writer.write(folder / f"{k + 1:0{digits}d}.dcm", own, plane)
            headers[k] = ds = Dataset()
            ds.update(common)
            ds.update(own)
            ds.file_meta = common.file_meta
    return headers


def series_dataset(record: OutputRecord, identity: Identity, grid: CanonicalGrid) -> Dataset:
    """All that the slices of a series share: the modules of the CT Image IOD (PS3.3 table
    A.3-1).
    """
    from pydicom.uid import CTImageStorage

    ds = image_dataset(CTImageStorage, record, identity, grid)
    ds.SeriesInstanceUID = identity.uid("ct series")
    ds.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    ds.AcquisitionNumber, ds.KVP = None, None
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "HU"
    ds.WindowCenter, ds.WindowWidth = WINDOW
    across, down, between = grid.geometry.spacing
    ds.PixelSpacing = decimals([down, across])
    ds.ImageOrientationPatient = decimals(grid.orientation)
    ds.SliceThickness = ds.SpacingBetweenSlices = decimals([between])[0]
    return ds


def _instances_at(instances: tuple[str, ...], grid: CanonicalGrid, k: int) -> tuple[str, ...]:
    """Of a label series with an instance for each slice the one that lies where upright slice k
    does; else all.
    """
    if grid.order[0] != 0 or len(instances) != grid.shape[0]:
        return instances
    return (instances[len(instances) - 1 - k if grid.flips[0] else k],)
