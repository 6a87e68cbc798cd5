"""Series of DICOM images, one slice per file: label values, a CT, or a grid for contours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import GeometryError, UnreadableVolume
from ...core.intensity_check import Census
from ...core.volume import DicomSource, Geometry, Volume
from ..dicom.files import IDENTITY, dicom_source, map_dicom_errors
from ..dicom.header import PIXEL_DESCRIPTION, DicomFile, opened, read_header
from ..dicom.pixel_size import check_pixel_bytes, codestream_size
from ..dicom.stacking import ORIENTATION_TOLERANCE, finite_numbers, stack

# More distinct values in one slice are grey values.
MAX_LABELS = 256
# Pixels of one slice: a few compressed bytes may claim any number.
MAX_PIXELS = 1 << 26
# Modalities of acquired images; the header of a mask is often a copy of its image's.
_ACQUIRED = ("CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF")
# JPEG baseline and extended, JPEG-LS near-lossless.
_LOSSY = ("1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51", "1.2.840.10008.1.2.4.81")
_GRID = [
    "SOPInstanceUID",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "PixelSpacing",
    "NominalScannedPixelSpacing",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "SliceThickness",
    "SpacingBetweenSlices",
    "FrameOfReferenceUID",
]
_RESCALE = ("RescaleSlope", "RescaleIntercept")
_SLICE = (
    *IDENTITY,
    *PIXEL_DESCRIPTION,
    *_RESCALE,
    "SOPClassUID",
    "SOPInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "BurnedInAnnotation",
)


def read_series(paths: Sequence[Path], name: str, *, force: bool = False) -> Volume:
    """Read a series whose pixels are labels.

    Args:
        paths: Its files, one slice each, in any order.
        name: What messages call it.
        force: Whether grey values are read as labels, if they are not rescaled.

    Returns:
        Values (D, H, W) as they are stored, with notes for the user.

    Raises:
        InputError: It cannot be read, or is an image and not a mask.
        GeometryError: Its slices are not one grid.
    """
    with map_dicom_errors(name):
        headers = [read_header(path, _GRID) for path in paths]
        _check_sizes(headers, name)
        paths, headers = _without_copies(paths, headers, name)
        geometry, shape, order, notes = _grid(headers, name)
        values: NDArray[Any] | None = None
        uids = [""] * len(paths)
        for path, k in zip(paths, order, strict=True):
            ds, plane = _read_slice(path, shape[1:], name, partial(_check_mask, name=name))
            if not force and (plane.min() < 0 or np.unique(plane).size > MAX_LABELS):
                raise _not_a_mask(ds, name, "it holds grey values")
            values = np.empty(shape, plane.dtype) if values is None else values
            if plane.dtype != values.dtype:
                values = values.astype(np.result_type(values, plane))
            values[k] = plane
            uids[k] = str(ds.get("SOPInstanceUID", ""))
        assert values is not None
        is_acquired = str(ds.get("Modality", "")) in _ACQUIRED
        if not force and is_acquired and Census.of(values).is_image(most_labels=0):
            raise _not_a_mask(ds, name, "its pixels change like grey values")
        return Volume(values, geometry, dicom=dicom_source(ds, uids), notes=notes)


def read_ct(paths: Sequence[Path], name: str) -> Volume:
    """Read a CT series.

    Args:
        paths: Its files, one slice each, in any order.
        name: What messages call it.

    Returns:
        HU (D, H, W), float32.

    Raises:
        InputError: It cannot be read, or is not a CT.
        GeometryError: Its slices are not one grid.
    """
    with map_dicom_errors(name):
        headers = [read_header(path, _GRID) for path in paths]
        _check_sizes(headers, name)
        paths, headers = _without_copies(paths, headers, name)
        geometry, shape, order, notes = _grid(headers, name)
        values = np.empty(shape, np.float32)
        for path, k in zip(paths, order, strict=True):
            ds, plane = _read_slice(path, shape[1:], name, partial(_check_ct, name=name))
            slope, intercept = _rescale(ds)
            values[k] = plane * slope + intercept
        return Volume(values, geometry, notes=notes)


def series_grid(
    paths: Sequence[Path], name: str
) -> tuple[tuple[Geometry, tuple[int, int, int], DicomSource], tuple[str, ...]]:
    """The grid of an image series, from its headers.

    Args:
        paths: Its files, one slice each, in any order.
        name: What messages call it.

    Returns:
        Geometry, shape (D, H, W) and instances, in this order; and notes for the user.

    Raises:
        InputError: It cannot be read.
        GeometryError: Its slices are not one grid.
    """
    with map_dicom_errors(name):
        headers = [read_header(path, _GRID) for path in paths]
        _check_sizes(headers, name)
        paths, headers = _without_copies(paths, headers, name)
        geometry, shape, order, notes = _grid(headers, name)
        uids = [str(headers[n].get("SOPInstanceUID", "")) for n in np.argsort(order)]
        frame = str(headers[0].get("FrameOfReferenceUID", ""))
        return (geometry, shape, DicomSource("", tuple(uids), frame, {})), notes


def _check_sizes(headers: Sequence[Any], name: str) -> None:
    """Refuse files that are not slices of one size, before any of them is decoded."""
    file = Path(name)
    sizes = {(int(ds.get("Rows") or 0), int(ds.get("Columns") or 0)) for ds in headers}
    if len(sizes) > 1 or not 0 < np.prod(next(iter(sizes))) <= MAX_PIXELS:
        raise UnreadableVolume(
            f"{name} has slices of {', '.join(f'{c} x {r}' for r, c in sorted(sizes))} pixels",
            expected="one size",
            remedy="give one series",
            file=file,
        )
    if any(int(ds.get("NumberOfFrames") or 1) != 1 for ds in headers):
        raise UnreadableVolume(
            f"{name} is a multi-frame image",
            expected="one slice per file, or a DICOM SEG",
            remedy="convert it to a SEG or to NIfTI",
            file=file,
        )


def _without_copies(
    paths: Sequence[Path], headers: Sequence[Any], name: str
) -> tuple[list[Path], list[Any]]:
    """Leave out files with the SOP Instance UID, the place and the pixels of an earlier file.

    Some exporters give one UID to all slices of a series: such slices lie in different places.

    Raises:
        UnreadableVolume: Two files of one UID lie in one place and differ.
    """
    by_place: dict[tuple[str, str], int] = {}
    distinct = []
    for n, header in enumerate(headers):
        uid = str(header.get("SOPInstanceUID", ""))
        place = str([header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")])
        first = by_place.setdefault((uid, place), n) if uid else n
        if first == n:
            distinct.append(n)
        elif not _same_pixels(paths[first], paths[n], name):
            raise UnreadableVolume(
                f"{name} has two files of one SOP Instance UID in one place, and they differ",
                expected="one file of each slice",
                remedy="remove the wrong one",
                file=Path(name),
            )
    return [paths[n] for n in distinct], [headers[n] for n in distinct]


def _rescale(ds: Any) -> tuple[float, float]:
    """Slope and intercept of an image's values; 1 and 0 where they are not stated."""
    slope, intercept = ds.get("RescaleSlope"), ds.get("RescaleIntercept")
    return float(1 if slope is None else slope), float(0 if intercept is None else intercept)


def _same_pixels(first_path: Path, second_path: Path, name: str) -> bool:
    """Whether two files hold the same pixels, however they are compressed.

    Pixels that no installed decoder reads are compared as they are stored.
    """
    images = []
    for path in (first_path, second_path):
        with opened(path, _SLICE) as source:
            _read_pixels(source, name)
            images.append(source.header)
    first, second = images
    if any(first.get(key) != second.get(key) for key in _RESCALE):
        return False
    try:
        return np.array_equal(_decode(first), _decode(second))
    except (RuntimeError, NotImplementedError):
        # No decoder is installed: equal compressed bytes are equal pixels.
        return bool(first.get("PixelData") == second.get("PixelData"))


def _grid(
    headers: Sequence[Any], name: str
) -> tuple[Geometry, tuple[int, int, int], NDArray[np.intp], tuple[str, ...]]:
    """Geometry, shape (D, H, W), the slice of each file, and notes for the user."""
    file, first = Path(name), headers[0]
    notes: list[str] = []
    is_single = len(headers) == 1
    spacings = [
        ds.get("PixelSpacing") or (ds.get("NominalScannedPixelSpacing") if is_single else None)
        for ds in headers
    ]
    spacing = np.array([finite_numbers(s, 2, name, "PixelSpacing") for s in spacings])
    thickness, step = (
        abs(float(first.get(key) or 0)) or None
        for key in ("SliceThickness", "SpacingBetweenSlices")
    )
    states_place = "ImagePositionPatient" in first or "ImageOrientationPatient" in first
    if is_single and not states_place:
        # The original system wrote such slices.
        notes.append(f"{name} states no position: it is taken for an axial slice at 0, 0, 0")
        position, orientation = np.zeros((1, 3)), np.array([[1.0, 0, 0, 0, 1, 0]])
    else:
        position = _stacked(headers, "ImagePositionPatient", 3, name)
        orientation = _stacked(headers, "ImageOrientationPatient", 6, name)
    if is_single and not (thickness or step):
        notes.append(f"{name} states no slice thickness: it is taken to be 1 mm")
    is_turned = np.abs(orientation - orientation[0]).max() > ORIENTATION_TOLERANCE
    spacing_tolerance = ORIENTATION_TOLERANCE * spacing[0].max()
    if is_turned or np.abs(spacing - spacing[0]).max() > spacing_tolerance:
        raise GeometryError(
            f"{name} has slices in mixed orientations or spacings",
            expected="parallel slices of one spacing",
            remedy="give one series, without its localizer",
            file=file,
        )
    geometry, order, depth = stack(
        position, orientation[0], spacing[0], name, step=step, thickness=thickness, notes=notes
    )
    rows, columns = int(first.Rows), int(first.Columns)
    return geometry, (depth, rows, columns), order, tuple(notes)


def _stacked(headers: Sequence[Any], key: str, count: int, name: str) -> NDArray[np.float64]:
    """An attribute of `count` numbers of every header: (N, count)."""
    return np.array([finite_numbers(ds.get(key), count, name, key) for ds in headers])


def _check_mask(ds: Any, name: str) -> None:
    """Refuse an image whose values cannot be labels."""
    if int(ds.get("SamplesPerPixel", 1)) != 1:
        raise UnreadableVolume(
            f"{name} is a colour image",
            expected="one label per pixel",
            remedy="export the mask as a SEG",
            file=Path(name),
        )
    if _rescale(ds) != (1, 0) or _is_lossy(ds):
        raise _not_a_mask(ds, name, "its values are rescaled or compressed with loss")


def _check_ct(ds: Any, name: str) -> None:
    """Refuse an image that is not a CT as it was reconstructed."""
    if str(ds.get("Modality", "")) != "CT" or int(ds.get("SamplesPerPixel", 1)) != 1:
        raise UnreadableVolume(
            f"{name} is not a CT",
            expected="a CT series in Hounsfield units",
            remedy="give the CT that the mask was drawn on",
        )
    if _is_lossy(ds) or ds.get("BurnedInAnnotation") == "YES":
        raise UnreadableVolume(
            f"{name} is compressed with loss, or has text burned into its pixels",
            expected="a CT as it was reconstructed",
            remedy="give the original series",
        )


def _is_lossy(ds: Any) -> bool:
    return ds.file_meta.TransferSyntaxUID in _LOSSY or ds.get("LossyImageCompression") == "01"


def _read_slice(
    path: Path, shape: tuple[int, int], name: str, check: Callable[[Any], None]
) -> tuple[Any, NDArray[Any]]:
    """One slice of a series: the header, which `check` refuses or not, and then the pixels.

    Returns:
        The data set, and its values (H, W) as they are stored.
    """
    with opened(path, _SLICE) as source:
        ds = source.header
        check(ds)
        _read_pixels(source, name)
    try:
        plane = _decode(ds)
    except (RuntimeError, NotImplementedError) as exc:
        raise UnreadableVolume(
            f"{name} is compressed as {ds.file_meta.TransferSyntaxUID.name}, and no decoder for it"
            " is installed",
            expected="pixels without compression",
            remedy='decompress it (gdcmconv --raw), or pip install "pylibjpeg[all]"',
            file=Path(name),
        ) from exc
    if plane.shape != shape:
        raise UnreadableVolume(
            f"{name} has a slice of {plane.shape} pixels",
            expected=str(shape),
            remedy="export it again",
            file=Path(name),
        )
    return ds, plane


def _read_pixels(source: DicomFile, name: str) -> None:
    """Add the pixels to the header of a slice, if they have the size that it states."""
    from pydicom.encaps import generate_frames
    from pydicom.uid import RLELossless

    ds = source.header
    compressed = ds.file_meta.TransferSyntaxUID.is_compressed
    check_pixel_bytes(ds, source.pixel_bytes, 1, name, compressed=compressed)
    source.read_pixels()
    if compressed and ds.file_meta.TransferSyntaxUID != RLELossless:
        for frame in generate_frames(ds.PixelData, number_of_frames=1):
            if codestream_size(frame) not in (None, (ds.Rows, ds.Columns)):
                raise UnreadableVolume(
                    f"{name} has a compressed slice of another size than its header states",
                    expected="complete DICOM files",
                    remedy="export it again, without compression",
                    file=Path(name),
                )


def _decode(ds: Any) -> NDArray[Any]:
    """The values of an image as they are stored."""
    from pydicom.pixels.utils import pixel_array

    return np.asarray(pixel_array(ds, raw=True))


def _not_a_mask(ds: Any, name: str, why: str) -> UnreadableVolume:
    """The error for a series that is an image."""
    modality = str(ds.get("Modality", ""))
    what = (
        f"a{'n' if modality[:1] in 'MNXR' else ''} {modality} image"
        if modality in _ACQUIRED
        else "an image"
    )
    return UnreadableVolume(
        f"{name} is {what}, not a mask: {why}",
        expected="a DICOM SEG, an RTSTRUCT, or a series whose pixels are labels",
        remedy="give the mask that was drawn on it",
        file=Path(name),
    )
