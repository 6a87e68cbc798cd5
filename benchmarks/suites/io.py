"""Suite `io`: reading a mask and writing a CT in each format.

Beside them: the libraries' own ways, and a copy of the same bytes in memory. Rates are bytes of the
array a second: 1 a voxel for the mask as it leaves the reader, 2 for the CT.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from runtime.core.labels import MM_WHS
from runtime.core.manifest import Intensity, Manifest
from runtime.core.volume import CTSlab, LabelVolume
from runtime.engines.fake import fake_manifest
from runtime.io.case_finding import find_cases
from runtime.io.cases import read_case
from runtime.io.writers.registry import DEFAULT_OPTIONS, FORMATS, OutputRecord

from ..harness.paired import Contender, Ready
from ..harness.volumes import SIZES, mask, values

SLAB = 16  # slices
# These formats hold the array's bytes as they are, so that the disk is a limit too.
RAW = ("nii", "dicom")


def groups(size: str) -> dict[str, list[Contender]]:
    """The contenders.

    Args:
        size: A key of `SIZES`.

    Returns:
        The groups "io read" and "io write".
    """
    options = {"size": size}
    readers = [
        Contender(
            f"read .nii.gz, {by}",
            "benchmarks.suites.io:read",
            {**options, "by": by},
            cost={"memcpy": 1},
        )
        for by in ("mask2ct", "SimpleITK", "nibabel")
    ]
    writers = [
        *(
            Contender(
                f"write {name}, mask2ct",
                "benchmarks.suites.io:write",
                {**options, "name": name},
                cost={"memcpy": 1, "disk": 1} if name in RAW else {"memcpy": 1},
            )
            for name in FORMATS
        ),
        Contender(
            "write .nii.gz, SimpleITK",
            "benchmarks.suites.io:write_simpleitk",
            options,
            cost={"memcpy": 1},
        ),
        Contender(
            "write .nii.gz, nibabel",
            "benchmarks.suites.io:write_nibabel",
            options,
            cost={"memcpy": 1},
        ),
    ]
    return {"io read": readers, "io write": writers}


def some_ct(volume: LabelVolume) -> np.ndarray:
    """A CT with steps between labels and scanner noise everywhere, which is hard to compress.

    Args:
        volume: A mask of model indices.

    Returns:
        int16 HU (D, H, W).
    """
    rng = np.random.default_rng(0)
    plane = rng.normal(0, 15, volume.labels.shape[1:]).astype(np.int16)
    return (volume.labels.astype(np.int16) * 60 - 900) + np.stack(
        [np.roll(plane, 37 * k, 1) for k in range(len(volume.labels))]
    )


def slabs_of(ct: np.ndarray) -> Iterator[CTSlab]:
    """Yield a CT in slabs of `SLAB` slices.

    Args:
        ct: int16 HU (D, H, W).

    Yields:
        Slabs in order.
    """
    for start in range(0, len(ct), SLAB):
        yield CTSlab(ct[start : start + SLAB], 0, start)


def write(size: str, name: str) -> Ready:
    """Write a CT with our writer.

    Args:
        size: A key of `SIZES`.
        name: A key of `FORMATS`.

    Returns:
        The contender; its unit is bytes.
    """
    base = fake_manifest()
    manifest = Manifest(**{**vars(base), "intensity": Intensity("HU", -1024, 1976)})
    volume = mask(SIZES[size], len(MM_WHS))
    ct, writer = some_ct(volume), FORMATS[name](DEFAULT_OPTIONS)
    folder = tempfile.TemporaryDirectory()
    writer.check(manifest, Path(folder.name))
    facts: dict[str, Any] = {}

    def run() -> float:
        files = writer.write(
            Path(folder.name),
            OutputRecord("case", None, volume, manifest, "none", "", 0),
            slabs_of(ct),
        )
        facts["file_bytes"] = sum(
            f.stat().st_size
            for file in files
            for f in ([file] if file.is_file() else file.iterdir())
        )
        return float(ct.nbytes)

    return Ready(run, facts=facts)


def read(size: str, by: str) -> Ready:
    """Read a .nii.gz mask.

    Args:
        size: A key of `SIZES`.
        by: "mask2ct", "SimpleITK" or "nibabel".

    Returns:
        The contender; its unit is bytes.
    """
    import SimpleITK as sitk

    volume = mask(SIZES[size], len(MM_WHS))
    folder = tempfile.TemporaryDirectory()
    sitk.WriteImage(sitk.GetImageFromArray(values(volume, MM_WHS)), f"{folder.name}/mask.nii.gz")
    readers = {"mask2ct": _read_ours, "SimpleITK": _read_simpleitk, "nibabel": _read_nibabel}

    def run() -> float:
        return float(readers[by](Path(folder.name) / "mask.nii.gz").size)

    return Ready(run)


def _read_ours(path: Path) -> np.ndarray:
    return read_case(find_cases([path])[0], MM_WHS).labels


def _read_simpleitk(path: Path) -> np.ndarray:
    import SimpleITK as sitk

    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def _read_nibabel(path: Path) -> np.ndarray:
    import nibabel

    return np.asarray(nibabel.load(str(path)).dataobj)  # type: ignore[attr-defined]


def write_simpleitk(size: str) -> Ready:
    """Write a CT as .nii.gz with SimpleITK.

    Args:
        size: A key of `SIZES`.

    Returns:
        The contender; its unit is bytes.
    """
    import SimpleITK as sitk

    ct = some_ct(mask(SIZES[size], len(MM_WHS)))
    folder = tempfile.TemporaryDirectory()

    def run() -> float:
        sitk.WriteImage(sitk.GetImageFromArray(ct), f"{folder.name}/ct.nii.gz", useCompression=True)
        return float(ct.nbytes)

    return Ready(run)


def write_nibabel(size: str) -> Ready:
    """Write a CT as .nii.gz with nibabel.

    Args:
        size: A key of `SIZES`.

    Returns:
        The contender; its unit is bytes.
    """
    import nibabel

    ct = some_ct(mask(SIZES[size], len(MM_WHS)))
    folder = tempfile.TemporaryDirectory()

    def run() -> float:
        nibabel.save(nibabel.Nifti1Image(ct.T, np.eye(4)), f"{folder.name}/ct.nii.gz")  # type: ignore[attr-defined]
        return float(ct.nbytes)

    return Ready(run)
