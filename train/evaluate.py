"""How near synthetic CTs come to true ones, by the command line: volumes on disk, or a run's
held-out patients, through `train.metrics.scores`.

    python -m train.evaluate --synthetic DIR --truth DIR --masks DIR [--reference DIR] [--labels mm-whs | --run RUN] [--json FILE]
    python -m train.evaluate --run RUN [--split valid|test] [--dataset-path DIR] [--json FILE]

The first reads CASE.nii.gz from the masks and the truth, CASE_ct.nii.gz from the synthetic folder,
or CASE_v0_ct.nii.gz, CASE_v1_ct.nii.gz ..., whose diversity is measured too (the first is the one
that is compared). The reference, other real patients as training reads them, tells what the
distances are between real and real. The second synthesizes a run's own held-out patients.

Images are in HU, unless the run (or a model folder) says that they are in arbitrary units: all
figures are then in these.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from runtime.core.atomic_files import write_json
from runtime.core.errors import InputError, UsageError
from runtime.core.labels import PRESETS
from runtime.core.manifest import MANIFEST, Intensity, LabelTable, Manifest

from .data.checks import AIR_HU
from .metrics import volume_metrics
from .metrics.scores import HU, diversity, evaluate, organ_names, real_baseline, table

Arrays = list[NDArray[Any]]


def read_cases(
    synthetic: Path, truth: Path, masks: Path, labels: LabelTable
) -> tuple[Arrays, Arrays, Arrays]:
    """(synthesized, true, masks) of all cases in `masks`, as axial slices, in HU.

    Raises `UsageError` or `InputError`, naming the file.
    """
    variants, true, found = read_variants(synthetic, truth, masks, labels)
    return [volumes[0] for volumes in variants], true, found


def read_variants(
    synthetic: Path, truth: Path, masks: Path, labels: LabelTable, unit: str = "HU"
) -> tuple[list[Arrays], Arrays, Arrays]:
    """As `read_cases`, with all variants CASE_v0_ct.nii.gz, CASE_v1_ct.nii.gz ... of each case
    where there are any.

    True images without air are refused where the unit is HU.
    """
    from runtime.io.readers.volume import read_labels, read_volume

    cases = (
        sorted(p for p in masks.glob("*.nii.gz") if not p.name.startswith("."))
        if masks.is_dir()
        else []
    )
    if not cases:
        raise UsageError(
            "there are no masks",
            expected="a folder of CASE.nii.gz",
            remedy="check --masks",
            file=masks,
        )
    variants, true, found = [], [], []

    def read(file: Path, shape: tuple[int, ...]) -> NDArray[Any]:
        values = read_volume(file).values
        if values.shape != shape:
            raise InputError(
                f"{file.name} has {values.shape} voxels, its mask {shape}",
                expected="the mask's grid",
                remedy="compare volumes of the same case",
                file=file,
            )
        return values

    for path in cases:
        mask, case = read_labels(path, labels).labels, path.name.removesuffix(".nii.gz")
        files = sorted(synthetic.glob(f"{glob.escape(case)}_v[0-9]*_ct.nii.gz")) or [
            synthetic / f"{case}_ct.nii.gz"
        ]
        variants.append([read(file, mask.shape) for file in files])
        true.append(read(truth / path.name, mask.shape))
        if unit == HU.unit and (low := true[-1].min()) > AIR_HU:
            raise InputError(
                f"{path.name} holds values from {low:g} to {true[-1].max():g}, which are no HU",
                expected=(
                    f"air below {AIR_HU} HU: organs' medians, the body and all distances are"
                    " measured in HU"
                ),
                remedy="name the run (or model folder) whose units these are: --run RUN",
                file=truth / path.name,
            )
        found.append(mask)
    return variants, true, found


def read_reference(folder: Path, labels: LabelTable) -> tuple[Arrays, Arrays]:
    """(images, masks) of the real patients in a folder that training could read.

    Raises `UsageError` or `InputError`.
    """
    from runtime.io.readers.volume import read_labels, read_volume

    from .data.dataset import find_pairs

    pairs = find_pairs(folder)
    return [read_volume(pair.image).values for pair in pairs], [
        read_labels(pair.label, labels).labels for pair in pairs
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line in the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate", description="compare synthetic images with true ones"
    )
    folders = ("synthetic", "truth", "masks")
    for name in folders:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help="other real patients: also measure real against real",
    )
    parser.add_argument(
        "--labels", choices=sorted(PRESETS), help="label table of the masks (default: mm-whs)"
    )
    parser.add_argument(
        "--run",
        type=Path,
        help=(
            "a run (or model) folder that states labels and intensities; alone: measure its network"
        ),
    )
    parser.add_argument(
        "--split",
        choices=("valid", "test"),
        default="valid",
        help="the run's patients to synthesize (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset-path", "--dataset_path", metavar="DIR", help="where the run's data lie now"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics here")
    args = parser.parse_args(argv)
    given = [name for name in folders if getattr(args, name)]
    if given != [*folders] and (given or not args.run):
        raise UsageError(
            f"--{', --'.join(n for n in folders if n not in given)} is not given",
            expected="the three folders, or --run alone",
            remedy="python -m train.evaluate --help",
        )
    if args.run and args.labels:
        raise UsageError(
            "--run and --labels are given together",
            expected="one of them: a run states its labels",
            remedy="drop --labels",
        )
    if given:
        result, unit = _folders(args)
    else:
        from .restore import held_out

        result, unit = held_out(args.run, args.split, args.dataset_path)
    print(table(result, unit))
    if args.json:
        write_json(args.json, result)
    print(json.dumps(result))
    return 0


def _folders(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """(metrics, unit) of synthesized, true and label volumes on disk."""
    labels, intensity = described(args.run) if args.run else (PRESETS[args.labels or "mm-whs"], HU)
    names = organ_names(labels)
    variants, truth, masks = read_variants(
        args.synthetic, args.truth, args.masks, labels, intensity.unit
    )
    result = evaluate(
        [volumes[0] for volumes in variants], truth, masks, names, intensity=intensity
    )
    if min(map(len, variants)) > 1:
        real = [
            volume_metrics.medians(image, mask, len(names) + 1)
            for image, mask in zip(truth, masks, strict=True)
        ]
        result["diversity"] = diversity(variants, masks, real, names, intensity)
    if args.reference:
        result["ceiling"] = real_baseline(
            truth, masks, *read_reference(args.reference, labels), names, intensity=intensity
        )
    return result, intensity.unit


def described(folder: Path) -> tuple[LabelTable, Intensity]:
    """(labels, intensities) that a run folder or a model folder states. Raises `ModelError`."""
    from .checkpoint import load_run

    stated = Manifest.load(folder) if (folder / MANIFEST).is_file() else load_run(folder)
    return stated.labels, stated.intensity


if __name__ == "__main__":
    from runtime.core import console

    sys.exit(console.run(main))
