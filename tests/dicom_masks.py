"""DICOM masks made in the test: series, segmentations, structure sets, with a patient in them
that must not come out again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid

PATIENT = {
    "PatientName": "Doe^John^Planted",
    "PatientID": "PLANTED-ID-4711",
    "PatientBirthDate": "19440102",
    "PatientSex": "O",
    "StudyDate": "20190817",
    "StudyTime": "101112",
    "StudyID": "77",
    "AccessionNumber": "PLANTED-ACC",
    "ReferringPhysicianName": "Roe^Jane^Planted",
}


def dataset(sop_class: str, **attributes: Any) -> FileDataset:
    uid = generate_uid()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = (
        sop_class,
        uid,
        ExplicitVRLittleEndian,
    )
    made = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    made.SOPClassUID, made.SOPInstanceUID = sop_class, uid
    for key, value in {**PATIENT, **attributes}.items():
        setattr(made, key, value)
    return made


def slices(
    values: NDArray[Any],
    *,
    spacing: Sequence[float] = (1.5, 1.25, 2.5),
    origin: Sequence[float] = (-12.5, 3.0, 40.0),
    direction: Any = None,
    **attributes: Any,
) -> list[FileDataset]:
    """One dataset a slice of `values` (D, H, W); spacing and direction as SimpleITK has them.

    A left-handed grid just runs the other way.
    """
    axes = np.eye(3) if direction is None else np.asarray(direction, float)
    common = {
        "StudyInstanceUID": generate_uid(),
        "SeriesInstanceUID": generate_uid(),
        "FrameOfReferenceUID": generate_uid(),
        "Modality": "OT",
        "SeriesNumber": 3,
        "Manufacturer": "",
        **attributes,
    }
    made = []
    for k, plane in enumerate(values):
        ds = dataset(CTImageStorage, **common)
        ds.Rows, ds.Columns, ds.InstanceNumber = *plane.shape, k + 1
        ds.PixelSpacing, ds.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        ds.ImageOrientationPatient = [round(float(x), 12) for x in (*axes[:, 0], *axes[:, 1])]
        ds.ImagePositionPatient = [
            round(float(x), 9) for x in np.asarray(origin) + axes[:, 2] * spacing[2] * k
        ]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated = ds.BitsStored = 8 * plane.dtype.itemsize
        ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(plane.dtype.kind == "i")
        ds.PixelData = np.ascontiguousarray(plane).tobytes()
        for key in [key for key, value in attributes.items() if value is None]:
            delattr(ds, key)
        made.append(ds)
    return made


def save(folder: Path, datasets: Sequence[Dataset], name: str = "Doe_John_Planted") -> Path:
    """Write them under names that name a patient, in another order than along the body."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, ds in enumerate(datasets):
        ds.save_as(folder / f"{name}_{(n * 7) % 1000:03d}_{n:03d}.dcm", enforce_file_format=True)
    return folder


def segmentation(
    path: Path,
    sources: Sequence[Dataset],
    masks: NDArray[Any],
    segments: Sequence[tuple[str, str]],
    kind: str = "BINARY",
    **options: Any,
) -> Path:
    """`masks`: (D, H, W) of segment numbers, or (D, H, W, K), which may overlap; `segments`:
    label and SNOMED code of each.
    """
    import highdicom as hd
    from pydicom.sr.coding import Code

    described = [
        hd.seg.SegmentDescription(
            n + 1,
            label,
            Code("123037004", "SCT", "Body structure"),
            Code(code, "SCT", label),
            "MANUAL",
        )
        for n, (label, code) in enumerate(segments)
    ]
    made = hd.seg.Segmentation(
        sources,
        masks,
        kind,
        described,
        generate_uid(),
        9,
        generate_uid(),
        1,
        "maker",
        "model",
        "1",
        "serial",
        series_description="Planted series",
        **options,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path)
    return path


def structure_set(
    path: Path,
    sources: Sequence[Dataset],
    rois: Mapping[str, Sequence[NDArray[Any]]],
    kind: str = "CLOSED_PLANAR",
    codes: Mapping[str, str] | None = None,
) -> Path:
    """`rois`: name → contours, each (n, 3) in mm; every one refers to the source in whose plane
    its first corner lies.
    """
    ds = dataset(
        RTStructureSetStorage,
        Modality="RTSTRUCT",
        StudyInstanceUID=sources[0].StudyInstanceUID,
        SeriesInstanceUID=generate_uid(),
        SeriesNumber=8,
        StructureSetLabel="planted",
    )
    series = Dataset()
    series.SeriesInstanceUID = sources[0].SeriesInstanceUID
    series.ContourImageSequence = [_reference(source) for source in sources]
    study, frame = Dataset(), Dataset()
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = (
        sources[0].FrameOfReferenceUID,
        [study],
    )
    ds.ReferencedFrameOfReferenceSequence = [frame]
    ds.StructureSetROISequence, ds.ROIContourSequence, ds.RTROIObservationsSequence = [], [], []
    normal = np.cross(*np.reshape([float(x) for x in sources[0].ImageOrientationPatient], (2, 3)))
    heights = [
        float(np.dot(normal, [float(x) for x in source.ImagePositionPatient])) for source in sources
    ]
    for number, (name, contours) in enumerate(rois.items(), 1):
        roi, item, seen = Dataset(), Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, item.ReferencedROINumber, seen.ReferencedROINumber = (
            number,
            name,
            number,
            number,
        )
        item.ContourSequence = []
        for corners in contours:
            contour = Dataset()
            nearest = sources[
                int(np.argmin(np.abs(np.array(heights) - float(normal @ corners[0]))))
            ]
            contour.ContourImageSequence = [_reference(nearest)]
            contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(corners)
            contour.ContourData = [f"{x:.10g}" for x in np.asarray(corners).ravel()]
            item.ContourSequence.append(contour)
        if codes and name in codes:
            code = Dataset()
            code.CodeValue, code.CodingSchemeDesignator, code.CodeMeaning = codes[name], "SCT", name
            seen.RTROIIdentificationCodeSequence = [code]
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(item)
        ds.RTROIObservationsSequence.append(seen)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path


def _reference(source: Dataset) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = (
        source.SOPClassUID,
        source.SOPInstanceUID,
    )
    return item
