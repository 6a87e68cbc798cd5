"""`--format dicom`: a folder per result with the CT, classic or enhanced, and the mask as a SEG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...core.atomic_files import atomic_folder, digest_of
from ...core.errors import UsageError
from ...core.manifest import Manifest
from ...core.volume import CTSlab, LabelVolume
from ..dicom.attributes import Identity, check_attachable, require_libraries
from ..dicom.canonical_grid import CanonicalGrid
from ..dicom.ct_series import write_series
from ..dicom.enhanced_ct import write_enhanced
from ..dicom.segmentation import write_seg
from ..marks import written_by_mask2ct
from .base import FormatOptions, OutputRecord, result_name


@dataclass(frozen=True)
class DicomFormat:
    """Writes a result as a folder of DICOM files; see `Format`.

    The folder CASE, or CASE_v0 …, holds the slices 0001.dcm … from the feet to the head, or ct.dcm
    for an Enhanced CT. Beside them stands seg.dcm, the mask as a SEG that refers to this series.
    """

    options: FormatOptions

    def check(self, manifest: Manifest, output: Path) -> None:
        """Check the libraries, the unit of the model (HU) and `--attach`."""
        seg_libraries = ["highdicom"] if self.options.segmentation != "none" else []
        require_libraries("pydicom", *seg_libraries)
        if manifest.intensity.unit != "HU":
            raise UsageError(
                f"the model synthesizes {manifest.intensity.unit}, not HU",
                expected="Hounsfield units for a CT series",
                remedy="write a volume format, such as --format nifti",
            )

        if self.options.one_patient and self.options.attach:
            raise UsageError(
                "--one-patient and --attach name two patients for a result",
                expected="one of them",
                remedy="leave one out",
            )
        if manifest.derived and self.options.attach:
            raise UsageError(
                "a deformed CT does not lie in its patient's frame of reference, and is not an"
                " image of that patient",
                expected="a patient of its own",
                remedy="leave --attach out",
            )

    def check_mask(self, mask: LabelVolume) -> None:
        """Check that orthogonal slices can hold the grid, and `--attach`."""
        CanonicalGrid.of(mask.geometry, mask.labels.shape)
        if self.options.attach:
            check_attachable(mask)

    def files(
        self, output: Path, case: str, variant: int | None, modality: str = ""
    ) -> tuple[Path, ...]:
        """Return the folder of a result."""
        return (output / result_name(case, variant),)

    def written_by_mask2ct(self, path: Path) -> bool:
        """Return whether mask2ct wrote every file of the folder."""
        return path.is_dir() and all(
            p.suffix == ".dcm" and p.is_file() and written_by_mask2ct(p) for p in path.iterdir()
        )

    def write(
        self, output: Path, record: OutputRecord, slabs: Iterable[CTSlab]
    ) -> Mapping[Path, str]:
        """Write the CT as its slabs come, then the SEG, and put the folder in place."""
        (path,) = self.files(output, record.case, record.variant)
        identity = Identity.of(record, self.options.attach, one_patient=self.options.one_patient)
        grid = CanonicalGrid.of(record.mask.geometry, record.mask.labels.shape)
        with atomic_folder(path) as folder:
            write_ct = write_enhanced if self.options.enhanced else write_series
            images = write_ct(folder, record, identity, grid, slabs)
            if self.options.segmentation != "none":
                write_seg(folder, record, identity, grid, images, self.options.segmentation)
        return {path: digest_of(path)}

    def finish(self, output: Path, manifest: Manifest) -> None:
        """Do nothing: each folder is complete by itself."""
