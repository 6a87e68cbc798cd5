"""Pairs of image and label map, and what a layout on disk states about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from runtime.core.errors import UsageError

SUFFIXES = (".nii.gz", ".nii")
SPLITS = ("train", "valid", "test")
# One to train on, one to validate with, one to test on.
LEAST_PATIENTS = 3
LAYOUT = (
    "CASE_image.nii.gz + CASE_label.nii.gz (MM-WHS), training/PATIENT/PATIENT_NAME.dcm, nnU-Net's"
    " or MSD's imagesTr + labelsTr + dataset.json, images + labels of PNG or TIFF files,"
    " PATIENT/ct.nii.gz + PATIENT/segmentations (TotalSegmentator), or a CSV table"
    " image,label[,patient[,split]]"
)


@dataclass(frozen=True)
class Pair:
    """Image and label map of one patient, or of a part of one.

    Attributes:
        name: Its name in messages.
        image: The image file.
        label: The label map, or a folder with one binary file per class.
        patient: What parts of one patient share, so that they are in one split; "": the name.
        split: "train", "valid" or "test" where the layout states it.
        synthetic: Whether mask2ct wrote the image: it trains with its patient, and is never
            validated or tested on.
        normalize: Whether the image's intensities are mapped to the intensity range by its own
            percentiles (`data.normalize`).
    """

    name: str
    image: Path
    label: Path
    patient: str = ""
    split: str | None = None
    synthetic: bool = False
    normalize: bool = False

    @property
    def who(self) -> str:
        """The patient's name, or the pair's."""
        return self.patient or self.name


@dataclass(frozen=True)
class Layout:
    """A recognised dataset.

    Attributes:
        pairs: The pairs by name.
        says: One line about them for a person.
        labels: The labels that the layout states, as `data.labels` has them, or None.
        modality: "CT" or "MR" where the layout states it; else empty.
        name: The name that the data set states; else empty.
    """

    pairs: list[Pair]
    says: str
    labels: Any = None
    modality: Literal["", "CT", "MR"] = ""
    name: str = ""


def lacks(name: str, file: str, partner: Path) -> UsageError:
    """Make the error for a patient with only one of the two files.

    Args:
        name: The patient's name.
        file: The file that is missing.
        partner: The file that is there.

    Returns:
        The error.
    """
    return UsageError(
        f"patient {name} has no {file}",
        expected="an image and a label map for every patient",
        remedy="add the file, or take the patient out",
        file=partner,
    )
