"""Compare synthetic CTs with true ones: volumes on disk, or the held-out patients of a run.

    python -m train.evaluate --synthetic DIR --truth DIR --masks DIR [--reference DIR]
                             [--labels mm-whs | --run RUN] [--json FILE]
    python -m train.evaluate --run RUN [--split valid|test] [--dataset-path DIR] [--json FILE]

The first form reads CASE.nii.gz from the masks and the truth, and CASE_ct.nii.gz (or _mr, _image,
as the modality has it) from the synthetic folder. Where that folder holds CASE_v0_ct.nii.gz,
CASE_v1_ct.nii.gz ..., it compares the first variant and measures the diversity of all. The
reference holds other real patients, as training reads them: it gives the distances between real and
real. The second form synthesizes the held-out patients of a run.

Images are in HU, unless the run (or a model folder) states arbitrary units; all metrics then have
that unit; true images are normalised where the run was trained on such. train/metrics/scores.py
computes the metrics.
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

from runtime.core import console
from runtime.core.atomic_files import write_json
from runtime.core.errors import InputError, UsageError
from runtime.core.labels import PRESETS
from runtime.core.manifest import MANIFEST, Intensity, LabelTable, Manifest
from runtime.engines.description import aligned
from runtime.io.writers.volume import CONTENTS

from .data.checks import AIR_HU
from .data.intensities import normalized
from .metrics import volume_metrics
from .metrics.distribution import Sample, distribution, prdc
from .metrics.quality import quality
from .metrics.quality_table import COLUMNS, LEGEND, SENTENCES, rows
from .metrics.scores import HU, diversity, evaluate, organ_names, real_baseline, table

Arrays = list[NDArray[Any]]


def read_cases(
    synthetic: Path, truth: Path, masks: Path, labels: LabelTable
) -> tuple[Arrays, Arrays, Arrays]:
    """Read all cases in `masks`, with the first variant of each.

    Args:
        synthetic: The folder of synthetic CTs.
        truth: The folder of true CTs.
        masks: The folder of label maps.
        labels: The labels in the masks.

    Returns:
        Synthetic CTs, true CTs and masks, one (D, H, W) volume of axial slices per case, in HU.

    Raises:
        UsageError: There are no masks.
        InputError: A file is missing, cannot be read or has another grid.
    """
    variants, true, label_maps = read_variants(synthetic, truth, masks, labels)
    return [volumes[0] for volumes in variants], true, label_maps


def read_variants(
    synthetic: Path, truth: Path, masks: Path, labels: LabelTable, unit: str = "HU"
) -> tuple[list[Arrays], Arrays, Arrays]:
    """Read all cases in `masks`, with all variants CASE_v0_ct.nii.gz, CASE_v1_ct.nii.gz ...

    Args:
        synthetic: The folder of synthetic CTs.
        truth: The folder of true CTs.
        masks: The folder of label maps.
        labels: The labels in the masks.
        unit: The images' unit; in HU, true images must contain air.

    Returns:
        The variants of each case, true CTs and masks: volumes (D, H, W) of axial slices.

    Raises:
        UsageError: There are no masks.
        InputError: A file is missing, cannot be read or has another grid, or is not in HU.
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
    variants, true, label_maps = [], [], []

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
        files = _results(synthetic, case)
        variants.append([read(file, mask.shape) for file in files])
        true.append(read(truth / path.name, mask.shape))
        if unit == HU.unit and (low := true[-1].min()) > AIR_HU:
            raise InputError(
                f"{path.name} holds values from {low:g} to {true[-1].max():g}, which are not HU",
                expected=(
                    f"air below {AIR_HU} HU: organs' medians, the body and all distances are"
                    " measured in HU"
                ),
                remedy="name the run (or model folder) that states these units: --run RUN",
                file=truth / path.name,
            )
        label_maps.append(mask)
    return variants, true, label_maps


def _results(folder: Path, case: str) -> list[Path]:
    """The synthetic images of a case, all variants; their names end as `CONTENTS` states."""
    for content in CONTENTS.values():
        variants = sorted(folder.glob(f"{glob.escape(case)}_v[0-9]*_{content}.nii.gz"))
        single = folder / f"{case}_{content}.nii.gz"
        if variants or single.is_file():
            return variants or [single]
    return [folder / f"{case}_ct.nii.gz"]


def read_reference(folder: Path, labels: LabelTable) -> tuple[Arrays, Arrays]:
    """Read the real patients of a folder that training could read.

    Args:
        folder: The dataset.
        labels: The labels in its label maps.

    Returns:
        Images and masks, volumes (D, H, W).

    Raises:
        UsageError: The folder has no known layout.
        InputError: A file cannot be read.
    """
    from runtime.io.readers.volume import read_labels, read_volume

    from .data.dataset import find_pairs

    pairs = find_pairs(folder)
    return [read_volume(pair.image).values for pair in pairs], [
        read_labels(pair.label, labels).labels for pair in pairs
    ]


PROGRAM = "python -m train.evaluate"
FOLDERS = ("synthetic", "truth", "masks")


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    """Describe the command line.

    Args:
        program: What the user typed in front of the options.
    """
    p = console.Parser(
        prog=program,
        description="compare synthetic images with true ones",
        epilog=console.epilog(
            f"{program} --run RUN --split test --json metrics.json",
            f"{program} --synthetic OUT --truth CT --masks MASKS --reference DATA",
        ),
    )
    for name in FOLDERS:
        p.add_argument(f"--{name}", type=Path, metavar="DIR")
    p.add_argument(
        "--reference",
        type=Path,
        metavar="DIR",
        help=(
            "other real patients, such as the training ones: also measure real against real, the"
            " class table and copies"
        ),
    )
    p.add_argument(
        "--prdc",
        action="store_true",
        help="also precision, recall, density and coverage (the extra `metrics`)",
    )
    p.add_argument(
        "--labels", choices=sorted(PRESETS), help="label table of the masks (default: mm-whs)"
    )
    p.add_argument(
        "--run",
        type=Path,
        help=(
            "a run (or model) folder that states labels and intensities; without the folders:"
            " measure its network"
        ),
    )
    p.add_argument(
        "--split",
        choices=("valid", "test"),
        default="valid",
        help="the run's patients to synthesize (default: %(default)s)",
    )
    p.add_argument(
        "--dataset-path", "--dataset_path", metavar="DIR", help="where the run's data lie now"
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the metrics here")
    return p


def main(argv: Sequence[str] | None = None, program: str = PROGRAM) -> int:
    """Run the command line in the module's docstring.

    Args:
        argv: The arguments; None: those of the process.
        program: What the user typed in front of them.

    Returns:
        The exit code, 0.

    Raises:
        UsageError: Options are missing or exclude each other.
    """
    args = parser(program).parse_args(argv)
    named_folders = [name for name in FOLDERS if getattr(args, name)]
    missing = [name for name in FOLDERS if name not in named_folders]
    if missing and (named_folders or not args.run):
        raise UsageError(
            f"--{', --'.join(missing)} is not given",
            expected="the three folders, or --run alone",
            remedy="python -m train.evaluate --help",
        )
    if args.run and args.labels:
        raise UsageError(
            "--run and --labels are given together",
            expected="one of them: a run states its labels",
            remedy="drop --labels",
        )
    if named_folders:
        result, unit = _folders(args)
    else:
        from .restore import held_out

        result, unit = held_out(args.run, args.split, args.dataset_path)
    print(table(result, unit))
    if "quality" in result:
        head = ("", *(title for key, title in COLUMNS.items() if key in result["quality"]))
        print(f"\n{aligned(head, rows(result['quality'], unit))}\n{LEGEND}")
        print("\n".join(SENTENCES.values()))
    if args.json:
        write_json(args.json, result)
    print(json.dumps(result))
    return 0


def _folders(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The metrics of volumes on disk, and their unit."""
    labels, intensity = described(args.run) if args.run else (PRESETS[args.labels or "mm-whs"], HU)
    names = organ_names(labels)
    variants, truth, masks = read_variants(
        args.synthetic, args.truth, args.masks, labels, intensity.unit
    )
    if normalizes := args.run is not None and trained_on_normalized(args.run):
        truth = [normalized(volume, intensity) for volume in truth]
    result = evaluate(
        [volumes[0] for volumes in variants], truth, masks, names, intensity=intensity
    )
    if min(map(len, variants)) > 1:
        real = [
            volume_metrics.medians(image, mask, len(names) + 1)
            for image, mask in zip(truth, masks, strict=True)
        ]
        result["diversity"] = diversity(variants, masks, real, names, intensity)
    firsts = [volumes[0] for volumes in variants]
    samples, true_samples = (
        [Sample(image, mask) for image, mask in zip(images, masks, strict=True)]
        for images in (firsts, truth)
    )
    if args.reference:
        images, label_maps = read_reference(args.reference, labels)
        if normalizes:
            images = [normalized(image, intensity) for image in images]
        result["ceiling"] = real_baseline(
            truth, masks, images, label_maps, names, intensity=intensity
        )
        train = [Sample(*case) for case in zip(images, label_maps, strict=True)]
        result["quality"] = quality(samples, true_samples, train, names, intensity=intensity)
    else:
        measured = distribution(samples, true_samples, names, intensity=intensity)
        result["quality"] = {"synthetic": measured}
    if args.prdc:
        result["quality"]["prdc"] = prdc(samples, true_samples, intensity)
    return result, intensity.unit


def described(folder: Path) -> tuple[LabelTable, Intensity]:
    """Load the labels and the intensity range that a run folder or a model folder states.

    Args:
        folder: The folder.

    Returns:
        The label table and the intensity range.

    Raises:
        ModelError: The folder is neither.
    """
    from .checkpoint import load_run

    stated = Manifest.load(folder) if (folder / MANIFEST).is_file() else load_run(folder)
    return stated.labels, stated.intensity


def trained_on_normalized(folder: Path) -> bool:
    """Say whether a run or a model was trained on images normalised each by itself.

    Args:
        folder: The run folder or the model folder.

    Raises:
        ModelError: The folder is neither.
    """
    from .checkpoint import load_run

    if (folder / MANIFEST).is_file():
        return Manifest.load(folder).training.get("normalize") == "volume"
    return load_run(folder).config.data.normalize == "volume"


if __name__ == "__main__":
    sys.exit(console.run(main))
