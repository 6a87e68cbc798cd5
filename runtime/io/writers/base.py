"""The interface of the output formats, and the record of one result for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.errors import UsageError
from ...core.manifest import LabelTable, Manifest
from ...core.volume import CTSlab, LabelVolume


@dataclass(frozen=True)
class OutputRecord:
    """One result without its voxels: the mask, the model, the engine and the seed behind it.

    Attributes:
        case: the name of the case.
        variant: the number of the variant; None without variants.
        mask: the mask, deformed in a variant.
        manifest: the manifest of the model.
        backend: the name of the engine.
        file: the model file that the engine runs, a key of `manifest.files`; empty for the fake
            engine.
        seed: the seed of the run.
        image_sha256: the digest of the real CT that was deformed, or that gave a synthetic CT its
            layout; empty without one.
        mask_sha256: the digest of the files of the mask, which all of its variants share.
    """

    case: str
    variant: int | None
    mask: LabelVolume
    manifest: Manifest
    backend: str
    file: str
    seed: int
    image_sha256: str = ""
    mask_sha256: str = ""

    @property
    def name(self) -> str:
        """The name of the result: CASE, or CASE_v0, CASE_v1 … for variants."""
        return result_name(self.case, self.variant)


@dataclass(frozen=True)
class FormatOptions:
    """The options of the formats, all of them for DICOM.

    Attributes:
        attach: whether the series joins the patient, study and frame of reference of the mask.
        enhanced: whether to write one multi-frame Enhanced CT instead of one file per slice.
        segmentation: the kind of SEG beside the CT: "binary", "labelmap" or "none".
        one_patient: whether the variants of a mask are series of one synthetic patient and study,
            not a patient each.
    """

    attach: bool = False
    enhanced: bool = False
    segmentation: str = "binary"
    one_patient: bool = False

    def __repr__(self) -> str:
        """Name the options for the resume key: `one_patient`, a later one, where it is set."""
        later = ", one_patient=True" if self.one_patient else ""
        return (
            f"FormatOptions(attach={self.attach!r}, enhanced={self.enhanced!r},"
            f" segmentation={self.segmentation!r}{later})"
        )


DEFAULT_OPTIONS = FormatOptions()


class Format(Protocol):
    """Writes results as files.

    A run makes one format from its `FormatOptions`. A format is plain data, so that it can cross to
    another process, and several processes may write different results at once.
    """

    def check(self, manifest: Manifest, output: Path) -> None:
        """Check before any work that this format can write results of a model into a folder.

        Args:
            manifest: the manifest of the model.
            output: the output folder, which need not exist.

        Raises:
            MissingComponent: a library is missing.
            UsageError: the options, the model or the folder do not fit the format.
        """

    def check_mask(self, mask: LabelVolume) -> None:
        """Check that this format can write the result of a mask.

        Args:
            mask: the mask.

        Raises:
            InputError: it cannot.
        """

    def files(
        self, output: Path, case: str, variant: int | None, modality: str = ""
    ) -> tuple[Path, ...]:
        """Return the paths that `write` leaves for one result.

        Args:
            output: the output folder.
            case: the name of the case.
            variant: the number of the variant, or None.
            modality: of the model, `Manifest.modality`.

        Returns:
            Files, or one folder that is replaced as a whole.

        Raises:
            UsageError: the name of the case cannot name a file.
        """

    def written_by_mask2ct(self, path: Path) -> bool:
        """Return whether mask2ct wrote the file or folder, which a new result may then replace."""

    def write(
        self, output: Path, record: OutputRecord, slabs: Iterable[CTSlab]
    ) -> Mapping[Path, str]:
        """Write one result.

        Args:
            output: the output folder.
            record: the result without its voxels.
            slabs: the CT, int16 HU, slab by slab as it is synthesized.

        Returns:
            The complete paths with their digests (`runtime.core.atomic_files.digest_of`).

        Raises:
            OutputError: the result cannot be written.
        """

    def finish(self, output: Path, manifest: Manifest) -> None:
        """Complete the folder at the end of a run, in the process that holds its lock.

        Args:
            output: the output folder.
            manifest: the manifest of the model.

        Raises:
            OutputError: the folder cannot be completed.
        """


def result_name(case: str, variant: int | None) -> str:
    """Name a result.

    Args:
        case: the name of the case.
        variant: the number of the variant, or None.

    Returns:
        CASE, or CASE_v0, CASE_v1 … for variants.

    Raises:
        UsageError: the name would lead out of the output folder or be hidden in it.
    """
    if not case or case.startswith(".") or any(c in case for c in "/\\\0"):
        raise UsageError(
            f"the case name {case!r} cannot name a file",
            expected="a plain name: not empty, no path, no leading dot",
            remedy="rename the mask",
        )
    return case if variant is None else f"{case}_v{variant}"


def refuse_dicom_options(options: FormatOptions) -> None:
    """Refuse options of DICOM in another format, which would ignore them.

    Args:
        options: the options of the run.

    Raises:
        UsageError: an option differs from its default.
    """
    for name in ("attach", "enhanced", "segmentation"):
        if getattr(options, name) != getattr(DEFAULT_OPTIONS, name):
            raise UsageError(
                f"--{name} is for DICOM",
                expected="--format dicom with it",
                remedy=f"add --format dicom, or leave --{name} out",
            )


def table_values(table: LabelTable) -> NDArray[Any]:
    """Return the label value of each model index.

    Args:
        table: the label table, with K labels and the background.

    Returns:
        An array (K + 1,) in the first of uint8, uint16, int16 and int32 that holds all values.
    """
    values = np.array([label.value for label in table.labels])
    low, high = values.min(), values.max()
    dtypes = (np.uint8, np.uint16, np.int16, np.int32)
    return values.astype(
        next(d for d in dtypes if np.iinfo(d).min <= low and high <= np.iinfo(d).max)
    )
