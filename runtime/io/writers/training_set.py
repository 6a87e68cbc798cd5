"""Training sets that grow: nnU-Net raw (nnU-Net v2) and the Medical Segmentation Decathlon,
`dataset.json` included.

The output folder is the data set: new, or one that exists, also one of real cases, provided that
its labels are these. Labels are consecutive, 0..K as the model counts them, which nnU-Net requires.
A case is complete once its image is there: the label map is written first; `dataset.json`, which
counts what lies in the folder, at the end of a run. One run at a time writes into a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...core.atomic_files import read_text, write_json
from ...core.errors import UsageError
from ...core.manifest import Manifest
from ...core.volume import CTSlab, LabelVolume
from ..volume_files import is_synthetic, notice
from .base import FormatOptions, OutputRecord, refuse_dicom_options, result_name
from .volume import isal_threaded, write_ct, write_labels

DATASET = "dataset.json"
MAX_DATASET = 256 << 20  # bytes of it: a million cases
IMAGES, LABELS = "imagesTr", "labelsTr"
ENDING = ".nii.gz"


@dataclass(frozen=True)
class DatasetFormat:
    """imagesTr/CASE_0000.nii.gz (nnU-Net) or imagesTr/CASE.nii.gz (MSD) with labelsTr/CASE.nii.gz;
    CASE_v0 … for variants.

    `channel`: what stands between a case's name and its file's suffix, "_0000" for nnU-Net.
    """

    channel: str
    options: FormatOptions

    def check(self, manifest: Manifest, output: Path) -> None:
        refuse_dicom_options(self.options)
        isal_threaded()
        _refuse_another(output, _read(output), self._ours(manifest))

    def check_mask(self, mask: LabelVolume) -> None:
        pass

    def files(self, output: Path, case: str, variant: int | None) -> tuple[Path, ...]:
        name = result_name(case, variant)
        return (
            output / IMAGES / f"{name}{self.channel}{ENDING}",
            output / LABELS / f"{name}{ENDING}",
        )

    def is_ours(self, path: Path) -> bool:
        return is_synthetic(path)

    def write(
        self, output: Path, record: OutputRecord, slabs: Iterable[CTSlab]
    ) -> Mapping[Path, str]:
        image, label = self.files(output, record.case, record.variant)
        values = np.arange(len(record.manifest.labels), dtype=np.uint8)
        text = notice(derived=record.manifest.derived)
        mask = write_labels(label, record.mask, values, description="mask of a " + text)
        return {image: write_ct(image, slabs, record.mask, description=text), label: mask}

    def finish(self, output: Path, manifest: Manifest) -> None:
        """Bring `dataset.json` to what lies in the folder; what others wrote into it stays.

        Without a case there is none.
        """
        found = sorted(
            path.name[: -len(ENDING)] for path in (output / LABELS).glob(f"[!.]*{ENDING}")
        )
        complete = [
            case for case in found if (output / IMAGES / f"{case}{self.channel}{ENDING}").exists()
        ]
        if not complete:
            return
        known, ours = _read(output), self._ours(manifest)
        _refuse_another(output, known, ours)
        data = dict(known) if known is not None else self._new(output, manifest, ours)
        if self.channel:
            data["numTraining"] = len(complete)
        else:
            listed = [row for row in data.get("training", []) if isinstance(row, dict)]
            names = {os.path.basename(str(row.get("label"))) for row in listed}
            listed += [
                {"image": f"./{IMAGES}/{c}{ENDING}", "label": f"./{LABELS}/{c}{ENDING}"}
                for c in complete
                if f"{c}{ENDING}" not in names
            ]
            data["training"], data["numTraining"] = listed, len(listed)
        if data != known:
            write_json(output / DATASET, data)

    def _ours(self, manifest: Manifest) -> dict[str, Any]:
        """What a data set of this model's cases must state."""
        names = [
            "background",
            *(label.name for label in manifest.labels.labels[1:]),
        ]  # nnU-Net knows the first by this name
        modality = {
            "0": "CT" if manifest.intensity.unit == "HU" else "synthetic"
        }  # nnU-Net normalises by this name
        if self.channel:
            return {
                "channel_names": modality,
                "labels": {name: n for n, name in enumerate(names)},
                "file_ending": ENDING,
            }
        return {"modality": modality, "labels": {str(n): name for n, name in enumerate(names)}}

    def _new(self, output: Path, manifest: Manifest, ours: dict[str, Any]) -> dict[str, Any]:
        common = {
            "name": output.absolute().name,
            "description": notice(derived=manifest.derived),
            "licence": manifest.license or "not stated",
        }
        if self.channel:
            return {**ours, "numTraining": 0, **common}
        return {
            **common,
            "reference": "mask2ct",
            "release": "0.0",
            "tensorImageSize": "3D",
            **ours,
            "numTraining": 0,
            "numTest": 0,
            "training": [],
            "test": [],
        }


def _read(output: Path) -> dict[str, Any] | None:
    path = output / DATASET
    try:
        text = read_text(path, most=MAX_DATASET)
        if not text:
            return None  # it was cut to nothing: it is made again of what lies in the folder
        data = json.loads(text)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise UsageError(
            f"{DATASET} cannot be read: {exc}",
            expected="a data set that can be appended to, or none",
            remedy="choose another --output",
            file=path,
        ) from exc
    if not isinstance(data, dict):
        raise UsageError(
            f"{DATASET} is no JSON object",
            expected="a data set that can be appended to",
            remedy="choose another --output",
            file=path,
        )
    return data


def _refuse_another(output: Path, known: dict[str, Any] | None, ours: dict[str, Any]) -> None:
    """Cases are only appended to a data set of the same labels, channel and kind of file."""
    for key in ("labels", "channel_names", "modality", "file_ending"):
        if known is not None and key in ours and _plain(known.get(key)) != _plain(ours[key]):
            raise UsageError(
                f"the data set in the output folder has the {key} {known.get(key)}",
                expected=f"{ours[key]}, as this model's cases have",
                remedy="choose another --output",
                file=output / DATASET,
            )

    if (
        known is not None and "dataset" in known
    ):  # nnU-Net's way of listing cases that lie elsewhere
        raise UsageError(
            "the data set in the output folder lists its cases one by one",
            expected="one whose cases are what lies in imagesTr",
            remedy="choose another --output",
            file=output / DATASET,
        )


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True).casefold()
