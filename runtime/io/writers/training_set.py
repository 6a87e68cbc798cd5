"""Training sets for nnU-Net v2 (raw) and the Medical Segmentation Decathlon, with `dataset.json`.

The output folder is the data set. It may be new or exist, also with real cases, provided that it
has the same labels. Labels are consecutive (0 … K, the model's indices), which nnU-Net requires. A
case is complete once its image exists, because the label map is written first. `dataset.json`
counts the cases in the folder and is written at the end of a run; for nnU-Net, `synthetic.csv` and
`splits_final.json` are too (training_splits.py). One run at a time writes into a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.atomic_files import read_text, write_json
from ...core.errors import UsageError
from ...core.manifest import Manifest
from ...core.volume import CTSlab, LabelVolume
from ..marks import MASK_OF, notice, written_by_mask2ct
from .base import FormatOptions, OutputRecord, refuse_dicom_options, result_name
from .training_splits import check_files, read_sources, source_of, write_sources, write_splits
from .volume import isal_threaded, write_ct, write_labels

DATASET = "dataset.json"
MAX_DATASET = 256 << 20  # bytes of `dataset.json`, which is enough for a million cases
IMAGES, LABELS = "imagesTr", "labelsTr"
ENDING = ".nii.gz"


@dataclass(frozen=True)
class DatasetFormat:
    """Writes imagesTr/CASE_0000.nii.gz (nnU-Net) or imagesTr/CASE.nii.gz (MSD); see `Format`.

    The label map is labelsTr/CASE.nii.gz. Variants are the cases CASE_v0, CASE_v1 …

    Attributes:
        channel: the text between the name of a case and the suffix of its image, "_0000" for
            nnU-Net, empty for MSD.
        options: the options of the run.
    """

    channel: str
    options: FormatOptions

    def check(self, manifest: Manifest, output: Path) -> None:
        """Check the options, the compression library and a data set in the output folder."""
        refuse_dicom_options(self.options)
        isal_threaded()
        _refuse_other_labels(output, _read(output), self._required(manifest))
        if self.channel:
            check_files(output)

    def check_mask(self, mask: LabelVolume) -> None:
        """Do nothing: the format holds every grid."""

    def files(
        self, output: Path, case: str, variant: int | None, modality: str = ""
    ) -> tuple[Path, ...]:
        """Return the image and the label map of a case."""
        name = result_name(case, variant)
        return (
            output / IMAGES / f"{name}{self.channel}{ENDING}",
            output / LABELS / f"{name}{ENDING}",
        )

    def written_by_mask2ct(self, path: Path) -> bool:
        """Return whether the file has mask2ct's mark."""
        return written_by_mask2ct(path)

    def write(
        self, output: Path, record: OutputRecord, slabs: Iterable[CTSlab]
    ) -> Mapping[Path, str]:
        """Write the label map, then the CT as its slabs come."""
        image, label = self.files(output, record.case, record.variant)
        values = np.arange(len(record.manifest.labels), dtype=np.uint8)
        text = notice(derived=record.manifest.derived, modality=record.manifest.modality)
        mask = write_labels(label, record.mask, values, description=MASK_OF + text)
        return {image: write_ct(image, slabs, record.mask, description=text), label: mask}

    def finish(self, output: Path, manifest: Manifest) -> None:
        """Bring `dataset.json` up to date with the cases in the folder.

        Entries that other programs wrote stay. A folder without cases gets no `dataset.json`.
        """
        labeled = sorted(
            path.name[: -len(ENDING)] for path in (output / LABELS).glob(f"[!.]*{ENDING}")
        )
        complete = [
            case for case in labeled if (output / IMAGES / f"{case}{self.channel}{ENDING}").exists()
        ]
        if not complete:
            return
        stored, required = _read(output), self._required(manifest)
        _refuse_other_labels(output, stored, required)
        data = dict(stored) if stored is not None else self._new(output, manifest, required)
        if self.channel:
            data["numTraining"] = len(complete)
        else:
            listed = [row for row in data.get("training", []) if isinstance(row, dict)]
            names = {os.path.basename(str(row.get("label"))) for row in listed}
            listed += [
                {"image": f"./{IMAGES}/{case}{ENDING}", "label": f"./{LABELS}/{case}{ENDING}"}
                for case in complete
                if f"{case}{ENDING}" not in names
            ]
            data["training"], data["numTraining"] = listed, len(listed)
        if data != stored:
            write_json(output / DATASET, data)
        if self.channel:
            self._write_splits(output, complete)

    def _write_splits(self, output: Path, cases: Sequence[str]) -> None:
        """Write which cases are synthetic, and nnU-Net's folds, which keep patients apart."""
        known = read_sources(output)
        sources = {
            case: known[case] if case in known else source_of(case)
            for case in cases
            if case in known
            or written_by_mask2ct(output / IMAGES / f"{case}{self.channel}{ENDING}")
        }
        write_sources(output, sources)
        write_splits(output, cases, sources)

    def _required(self, manifest: Manifest) -> dict[str, Any]:
        """The entries that a data set of this model's cases must have."""
        # nnU-Net requires the name "background", and normalizes by the name of the modality
        names = ["background", *(label.name for label in manifest.labels.labels[1:])]
        modality = {"0": _channel_name(manifest)}
        if self.channel:
            return {
                "channel_names": modality,
                "labels": {name: n for n, name in enumerate(names)},
                "file_ending": ENDING,
            }
        return {"modality": modality, "labels": {str(n): name for n, name in enumerate(names)}}

    def _new(self, output: Path, manifest: Manifest, required: dict[str, Any]) -> dict[str, Any]:
        """The content of a new `dataset.json`."""
        common = {
            "name": output.absolute().name,
            "description": notice(derived=manifest.derived, modality=manifest.modality),
            "licence": manifest.license or "not stated",
        }
        if self.channel:
            return {**required, "numTraining": 0, **common}
        return {
            **common,
            "reference": "mask2ct",
            "release": "0.0",
            "tensorImageSize": "3D",
            **required,
            "numTraining": 0,
            "numTest": 0,
            "training": [],
            "test": [],
        }


def label_names(folder: Path) -> dict[int, str]:
    """The names that a training set gives to label values.

    Args:
        folder: The data set, or any other folder.

    Returns:
        Names by value, empty where the folder is no training set or names none.

    Raises:
        UsageError: `dataset.json` cannot be read.
    """
    labels = (_read(folder) or {}).get("labels")
    rows = labels.items() if isinstance(labels, dict) else ()
    # nnU-Net writes NAME: VALUE, the Decathlon VALUE: NAME.
    pairs = [(value, name) if isinstance(value, int) else (name, value) for name, value in rows]
    return {
        int(value): str(name)
        for value, name in pairs
        if isinstance(name, str) and str(value).isdecimal()
    }


def _channel_name(manifest: Manifest) -> str:
    """The name of the image's channel: nnU-Net normalizes "CT" by the HU of the whole data set."""
    if manifest.intensity.unit == "HU":
        return "CT"
    names = {"MR": "synthetic MR", "other": "synthetic image"}
    # of a model that states no modality, as in data sets that older versions began
    return names.get(manifest.modality, "synthetic")


def _read(output: Path) -> dict[str, Any] | None:
    """The content of `dataset.json`; None where there is none."""
    path = output / DATASET
    try:
        text = read_text(path, most=MAX_DATASET)
        # an interrupted copy may be empty; the cases in the folder give its content again
        if not text:
            return None
        data = json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"{DATASET} cannot be read: {exc}",
            expected="a data set to append to, or none",
            remedy="choose another --output",
            file=path,
        ) from exc
    if not isinstance(data, dict):
        raise UsageError(
            f"{DATASET} is not a JSON object",
            expected="a data set to append to",
            remedy="choose another --output",
            file=path,
        )
    return data


def _refuse_other_labels(
    output: Path, stored: dict[str, Any] | None, required: dict[str, Any]
) -> None:
    """Refuse to append to a data set with other labels, channels or file suffixes."""
    if stored is None:
        return
    for key in ("labels", "channel_names", "modality", "file_ending"):
        if key in required and _plain(stored.get(key)) != _plain(required[key]):
            raise UsageError(
                f"the data set in the output folder has the {key} {stored.get(key)}",
                expected=f"{required[key]}, as this model's cases have",
                remedy="choose another --output",
                file=output / DATASET,
            )

    # nnU-Net lists cases that lie in other folders under this key
    if "dataset" in stored:
        raise UsageError(
            "the data set in the output folder lists its cases one by one",
            expected="a data set whose cases are the files in imagesTr",
            remedy="choose another --output",
            file=output / DATASET,
        )


def _plain(value: Any) -> str:
    """A form for comparison, without the order of keys and the case of letters."""
    return json.dumps(value, sort_keys=True).casefold()
