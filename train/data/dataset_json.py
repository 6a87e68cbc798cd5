"""nnU-Net's raw layout and the Medical Segmentation Decathlon's, which state their labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from runtime.core.errors import UsageError, reading

from ..config import DataConfig
from .pairs import LAYOUT, Layout, Pair, lacks

# Names of channels of MR, as nnU-Net and MSD write them, without digits and signs.
MR_CHANNELS = {
    "mr",
    "mri",
    "t",
    "t1",
    "t2",
    "t1w",
    "t2w",
    "t1c",
    "t1ce",
    "t1gd",
    "flair",
    "adc",
    "dwi",
    "dce",
    "pd",
    "pdw",
    "swi",
    "lge",
    "bold",
    "cine",
    "syntheticmr",
}


def dataset_json(folder: Path, data: DataConfig) -> Layout:
    """Read imagesTr and labelsTr: images CASE_0000 (nnU-Net) or CASE (MSD).

    Args:
        folder: The folder with dataset.json.
        data: The section of the config.

    Returns:
        The layout.

    Raises:
        UsageError: dataset.json cannot be used, or a file is missing.
    """
    path = folder / "dataset.json"
    expected = 'nnU-Net\'s {"channel_names": {"0": "CT"}, "labels": {"background": 0, ...}, ...}'
    with reading(path, expected, UsageError):
        stated = json.loads(path.read_text(encoding="utf-8-sig"))
    try:
        channels = stated.get("channel_names") or stated.get("modality") or {"0": ""}
        names = _stated_labels(stated["labels"], path)
    except (AttributeError, KeyError, TypeError, ValueError) as exc:
        raise UsageError(
            f"{path.name} states no usable labels: {exc}",
            expected=expected,
            remedy="correct the file",
            file=path,
        ) from exc
    if len(channels) != 1:
        raise UsageError(
            f"{path.name} states {len(channels)} channels:"
            f" {', '.join(map(str, channels.values()))}",
            expected="one image a case",
            remedy="make a table of pairs (CSV) that names one image a case",
            file=path,
        )
    ending = str(stated.get("file_ending", ".nii.gz"))
    pairs = _pairs(folder, "_0000", ending)
    layout_name = "nnU-Net's raw layout"
    if not pairs:
        pairs, layout_name = _pairs(folder, "", ending), "MSD's layout"
    if not pairs:
        raise UsageError(
            f"imagesTr holds no CASE_0000{ending}",
            expected=LAYOUT,
            remedy="check --dataset-path",
            file=folder,
        )
    channel = str(next(iter(channels.values())))
    # "ignore" marks voxels that nobody labelled: it is not a tissue.
    ignored = [value for value, name in names.items() if name.casefold() == "ignore"]
    labels = [
        {"name": names[value], "value": value} for value in sorted(names) if value not in ignored
    ]
    says = f"{len(pairs)} patients in {layout_name}, {len(labels) - 1} labels, channel {channel}"
    says += "".join(
        f"; ignore ({value}) is not a label: a label map that holds it is refused"
        for value in ignored
    )
    return Layout(pairs, says, labels, modality_of(channel), str(stated.get("name") or ""))


def modality_of(channel: str) -> Literal["", "CT", "MR"]:
    """Tell the modality from the name of a channel.

    Args:
        channel: Such as "CT", "MRI", "T2" or "FLAIR".

    Returns:
        "CT" or "MR"; empty for another name, which decides nothing.
    """
    name = "".join(character for character in channel.casefold() if character.isalnum())
    if name in ("ct", "syntheticct", "cbct"):
        return "CT"
    return "MR" if name in MR_CHANNELS else ""


def _pairs(folder: Path, channel: str, ending: str) -> list[Pair]:
    """The pairs whose images have `channel` between the case's name and the file's ending."""
    pairs = []
    for image in sorted((folder / "imagesTr").glob(f"[!.]*{channel}{ending}")):
        name = image.name.removesuffix(f"{channel}{ending}")
        label = folder / "labelsTr" / f"{name}{ending}"
        if not label.is_file():
            raise lacks(name, f"labelsTr/{label.name}", image)
        pairs.append(Pair(name, image, label))
    return pairs


def _stated_labels(stated: dict[str, Any], path: Path) -> dict[int, str]:
    """Read nnU-Net's labels as value → name, with a background.

    Version 2 has {name: value}, also as text or as a list of one, version 1 {"value": name}.

    Raises:
        UsageError: There are regions.
        ValueError: The labels have neither form.
    """
    flat = {}
    for key, value in stated.items():
        if isinstance(value, list) and len(value) != 1:
            regions = [f"{k} {v}" for k, v in stated.items() if isinstance(v, list) and len(v) != 1]
            raise UsageError(
                f"{path.name} states no usable labels but regions, several labels together:"
                f" {', '.join(regions)[:300]}",
                expected="labels that exclude each other, one value each",
                file=path,
                remedy=(
                    "list the values themselves as labels, each with its name, and leave the"
                    " regions out"
                ),
            )
        flat[key] = value[0] if isinstance(value, list) else value
    version_1 = all(
        str(key).strip().isdecimal() and isinstance(value, str) for key, value in flat.items()
    )
    names: dict[int, str] = {}
    for key, value in flat.items():
        number, name = (key, value) if version_1 else (value, key)
        if isinstance(number, (bool, float)) or int(number) in names:
            raise ValueError(f"{name} is {number!r}, which is not a number of one label")
        names[int(number)] = str(name)
    return {0: "background", **names}
