"""The mask as a DICOM SEG (PS3.3 A.51), encoded by highdicom, with the new series as its source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...core.manifest import Label
from ...core.version import VERSION
from ..writers.base import OutputRecord
from .attributes import FIXED_DATE, FIXED_TIME, STUDY, Identity, describe, text
from .canonical_grid import CanonicalGrid
from .segmentation_bytes import labels_per_slice, stand_in, write_binary

if TYPE_CHECKING:
    from pydicom import Dataset

NAME = "seg.dcm"
_CONTENT = {
    False: "The mask that this synthetic CT was generated from",
    True: "The mask that was deformed with this CT",
}
_FIXED = {
    "InstanceCreationDate": FIXED_DATE,
    "InstanceCreationTime": FIXED_TIME,
    "ContentDate": FIXED_DATE,
    "ContentTime": FIXED_TIME,
    "SeriesDate": FIXED_DATE,
    "SeriesTime": FIXED_TIME,
}


def write_seg(
    folder: Path,
    record: OutputRecord,
    identity: Identity,
    grid: CanonicalGrid,
    images: Sequence[Dataset],
    kind: str,
) -> None:
    """Write seg.dcm; segment n is the model's label n.

    Args:
        folder: the folder for the file.
        record: the result.
        identity: its identity.
        grid: the canonical grid.
        images: the CT objects in order, without pixels; this function changes them.
        kind: "binary" or "labelmap".

    Raises:
        OutputError: a binary SEG would be too large.
    """
    labels = grid.view(record.mask.labels)
    if kind == "binary":
        slice_labels = labels_per_slice(labels, len(record.manifest.labels.labels) - 1)
        for image in images:
            image.Rows = image.Columns = 1  # the size of the single-pixel stand-in
        seg = seg_dataset(record, identity, images, kind, stand_in(slice_labels))
        write_binary(folder / NAME, seg, labels, slice_labels)
    else:
        seg = seg_dataset(record, identity, images, kind, labels)
        seg.save_as(folder / NAME, enforce_file_format=True)


def seg_dataset(
    record: OutputRecord,
    identity: Identity,
    images: Sequence[Dataset],
    kind: str,
    labels: NDArray[np.uint8],
) -> Dataset:
    """Make the SEG with highdicom, pixels included.

    Args:
        record: the result.
        identity: its identity.
        images: the CT objects in order, without pixels; the first one is changed.
        kind: "binary" or "labelmap".
        labels: uint8 (slices, rows, columns) on the canonical grid, in model indices.

    Returns:
        The dataset.
    """
    from highdicom.seg import Segmentation

    first = images[0]
    # highdicom refuses or prints odd values, such as an impossible date; `describe` sets all of
    # them again
    for keyword in STUDY:
        setattr(first, keyword, "")
    seg: Any = Segmentation(
        images,
        labels,
        kind.upper(),
        [_segment(n, x, record) for n, x in enumerate(record.manifest.labels.labels) if n],
        series_instance_uid=identity.uid("seg series", kind, first.SOPClassUID),
        series_number=int(first.SeriesNumber) + 1,
        sop_instance_uid=identity.uid("seg", kind, first.SOPClassUID),
        instance_number=1,
        manufacturer=first.Manufacturer,
        manufacturer_model_name=first.ManufacturerModelName,
        software_versions=VERSION,
        device_serial_number="0",
        omit_empty_frames=bool(labels.any()),
        content_label="MASK",
        content_description=_CONTENT[record.manifest.derived],
    )
    describe(seg, record, identity, of="MASK OF A ")
    dimensions = identity.uid("seg dimensions", kind)
    for item in (*seg.DimensionOrganizationSequence, *seg.DimensionIndexSequence):
        item.DimensionOrganizationUID = dimensions
    for keyword, value in _FIXED.items():
        if keyword in seg:
            setattr(seg, keyword, value)
    return seg


def _segment(number: int, label: Label, record: OutputRecord) -> Any:
    """The description of one segment (PS3.3 C.8.20.4)."""
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    name = text(label.name, f"label {label.value}")
    kind = (
        Code(label.snomed, "SCT", name)
        if label.snomed
        else Code(f"LABEL{label.value}", "99MASK2CT", name)
    )
    family = (
        codes.cid7162.DeformableModels
        if record.manifest.derived
        else codes.cid7162.ArtificialIntelligence
    )
    algorithm = AlgorithmIdentificationSequence("mask2ct", family, VERSION)
    return SegmentDescription(
        number, name, codes.cid7150.AnatomicalStructure, kind, "AUTOMATIC", algorithm
    )
