"""What a result is written as. Each format says which files it will write, and writes them whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..contract import LabelTable, Manifest
from ..volume import CTSlab, LabelVolume
from .headers import NOTICE, is_synthetic
from .nifti import isal_threaded, write_nifti, write_values


@dataclass(frozen=True)
class Painting:
    """One result to write, all but its voxels: the mask that is painted, and what painted it.

    `variant` is None when no variants were asked for. `file`: the model file that the engine runs, a key of
    `manifest.files` (empty for the fake engine).
    """

    case: str
    variant: int | None
    mask: LabelVolume
    manifest: Manifest
    backend: str
    file: str
    seed: int

    @property
    def name(self) -> str:
        """CASE, or CASE_v0, CASE_v1 … for variants."""
        return result_name(self.case, self.variant)


def result_name(case: str, variant: int | None) -> str:
    return case if variant is None else f"{case}_v{variant}"


class Format(Protocol):
    """How results become files.

    `files` names what `write` will leave in `output` for one result; `is_ours` tells whether such a file was written by mask2ct
    and may be replaced; `check` raises `MissingComponent` or `UsageError` before any work when this cannot write results of
    that model here. `write` takes the slabs as they are painted and returns the files, each complete. Raises `OutputError`.
    """

    def check(self, manifest: Manifest) -> None: ...

    def files(self, output: Path, case: str, variant: int | None) -> tuple[Path, ...]: ...

    def is_ours(self, path: Path) -> bool: ...

    def write(self, output: Path, painting: Painting, slabs: Iterable[CTSlab]) -> tuple[Path, ...]: ...


class NiftiFormat:
    """CASE_ct.nii.gz; with variants CASE_v0_ct.nii.gz and CASE_v0_mask.nii.gz, the mask in the model's own values."""

    def check(self, manifest: Manifest) -> None:
        isal_threaded()

    def files(self, output: Path, case: str, variant: int | None) -> tuple[Path, ...]:
        name = result_name(case, variant)
        return tuple(output / f"{name}_{what}.nii.gz" for what in (("ct",) if variant is None else ("ct", "mask")))

    def is_ours(self, path: Path) -> bool:
        return is_synthetic(path)

    def write(self, output: Path, painting: Painting, slabs: Iterable[CTSlab]) -> tuple[Path, ...]:
        files = self.files(output, painting.case, painting.variant)
        mask = painting.mask
        depth, height, width = mask.labels.shape
        write_nifti(files[0], slabs, (depth, height, width), mask.geometry, nifti_header=mask.nifti_header, description=NOTICE)
        for file in files[1:]:
            values = file_values(mask, painting.manifest.labels)
            write_values(file, values, mask.geometry, nifti_header=mask.nifti_header, description="mask of a " + NOTICE)
        return files


FORMATS: dict[str, type[NiftiFormat]] = {"nifti": NiftiFormat}


def file_values(volume: LabelVolume, table: LabelTable) -> NDArray[Any]:
    """Model indices back to the table's own values (D, H, W), in the smallest of uint8, uint16, int16 and int32 that holds them."""
    values = np.array([label.value for label in table.labels])
    dtype = next(
        d for d in (np.uint8, np.uint16, np.int16, np.int32) if np.iinfo(d).min <= values.min() and values.max() <= np.iinfo(d).max
    )
    return values.astype(dtype)[volume.labels]
