"""The classic CT series: CT Image Storage (PS3.3 A.3), one file per slice."""

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
    """Write the slices 0001.dcm … from the feet to the head, as the slabs come.

    Args:
        folder: the folder for the files.
        record: the result.
        identity: its identity.
        grid: the canonical grid.
        slabs: the CT, int16 HU, on the grid of the mask.

    Returns:
        The datasets of the slices without pixels, in order.
    """
    from pydicom import Dataset

    common = series_dataset(record, identity, grid)
    writer = SliceWriter(common)
    headers: list[Any] = [None] * grid.shape[0]
    digits = max(4, len(str(len(headers))))
    for slab in slabs:
        for k, plane in zip(grid.numbers(slab), grid.view(slab.hu), strict=True):
            specific = Dataset()
            specific.SOPInstanceUID = identity.uid("ct", k)
            specific.InstanceNumber = k + 1
            specific.ImagePositionPatient = decimals(grid.position(k))
            source = record.mask.dicom
            if identity.attached and source is not None:
                set_sources(specific, source, _instances_at(source.sop_instance_uids, grid, k))
            writer.write(folder / f"{k + 1:0{digits}d}.dcm", specific, plane)
            headers[k] = ds = Dataset()
            ds.update(common)
            ds.update(specific)
            ds.file_meta = common.file_meta
    return headers


def series_dataset(record: OutputRecord, identity: Identity, grid: CanonicalGrid) -> Dataset:
    """Make the part of the CT Image IOD (PS3.3 table A.3-1) that all slices of a series share.

    Args:
        record: the result.
        identity: its identity.
        grid: the canonical grid.

    Returns:
        The dataset, without the position and the pixels of a slice.
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
    """The instances behind canonical slice k: one where the mask has one per slice, else all."""
    if grid.order[0] != 0 or len(instances) != grid.shape[0]:
        return instances
    return (instances[len(instances) - 1 - k if grid.flips[0] else k],)
