"""Figures of held-out slices: condition | generated | original, in one intensity window.

    python -m train.figures RUN -o FIGURE.png

draws the progress of a run as the paper does: the same slices as synthesized at 0, 10, 25, 50, 75
and 100 % of its steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.atomic_files import atomic_path
from runtime.core.errors import UsageError
from runtime.core.manifest import Intensity

from . import checkpoint
from . import config as configs

# Lungs are dark but not black, bone is bright, and contrasted blood differs from muscle.
WINDOW_HU = (-700, 700)
ROWS = 3
# Shares of a run's steps, as in the paper's figure.
MOMENTS = (0, 0.1, 0.25, 0.5, 0.75, 1)
PROGRESS = "progress"


def window(intensity: Intensity) -> tuple[float, float]:
    """Choose the range of the grey values.

    Args:
        intensity: The intensity range of the model.

    Returns:
        (lowest, highest): a fixed window in HU, else the range of the model.
    """
    return WINDOW_HU if intensity.unit == "HU" else (intensity.low, intensity.high)


def comparison(
    path: Path,
    labels: NDArray[np.uint8],
    generated: NDArray[np.int16],
    original: NDArray[np.int16],
    *,
    classes: int,
    window: tuple[float, float] = WINDOW_HU,
    title: str = "",
) -> None:
    """Write a PNG of up to `ROWS` slices: condition, synthetic image, true image.

    Args:
        path: The file.
        labels: uint8 (n, H, W) model indices.
        generated: Synthetic slices int16 (n, H, W).
        original: True slices int16 (n, H, W).
        classes: The number of labels, with the background.
        window: The lowest and the highest grey value.
        title: The figure's title.

    Raises:
        OutputError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = min(ROWS, len(labels))
    figure = Figure(figsize=(9, 3 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3, squeeze=False)
    grey: dict[str, Any] = {
        "cmap": "gray",
        "vmin": window[0],
        "vmax": window[1],
        "interpolation": "nearest",
    }
    for row, (mask, image, true) in zip(
        axes, zip(labels, generated, original, strict=True), strict=False
    ):
        row[0].imshow(mask, cmap="nipy_spectral", vmin=0, vmax=classes - 1, interpolation="nearest")
        row[1].imshow(image, **grey)
        row[2].imshow(true, **grey)
        for axis in row:
            axis.set_axis_off()
    for axis, name in zip(axes[0], ("condition", "generated", "original"), strict=True):
        axis.set_title(name)
    figure.suptitle(f"{title}  window {window[0]:g}..{window[1]:g}".strip(), fontsize=9)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=110)


def write_snapshot(
    run: Path,
    step: int,
    labels: NDArray[np.uint8],
    generated: NDArray[np.int16],
    original: NDArray[np.int16],
) -> None:
    """Write RUN/progress/step-00000020.safetensors, from which `progress` draws.

    Args:
        run: The run folder.
        step: The number of steps done.
        labels: uint8 (n, H, W) model indices.
        generated: Synthetic slices int16 (n, H, W).
        original: True slices int16 (n, H, W).

    Raises:
        OutputError: The file cannot be written.
    """
    import torch

    arrays = {"labels": labels, "generated": generated, "original": original}
    with atomic_path(run / PROGRESS / f"step-{step:08d}.safetensors") as part:
        checkpoint.write_tensors(
            {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()},
            part,
        )


def progress(run: Path, path: Path) -> list[int]:
    """Draw condition | generated at each of `MOMENTS` | original as a PNG.

    A moment without a snapshot, because the run got longer or goes on, takes the nearest one.

    Args:
        run: The run folder.
        path: The file.

    Returns:
        The steps in the figure.

    Raises:
        ConfigError: `run` is not a run folder.
        UsageError: It holds no snapshots, or a damaged one.
        OutputError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    config = checkpoint.stored_config(run)
    files = {
        int(file.stem.removeprefix("step-")): file
        for file in sorted((run / PROGRESS).glob("step-*.safetensors"))
    }
    if not files:
        raise UsageError(
            f"{run} holds no synthetic slices",
            expected=f"{PROGRESS}/step-*.safetensors, as training leaves them",
            remedy="train the run (again) with this version",
            file=run,
        )
    steps = sorted(
        {
            min(files, key=lambda step: abs(step - round(share * config.training.steps)))
            for share in MOMENTS
        }
    )
    snapshots = []
    for step in steps:
        try:
            snapshots.append(load_file(files[step]))
        except (OSError, SafetensorError) as exc:
            raise UsageError(
                f"{files[step].name} cannot be read: {exc}",
                expected="slices as training writes them",
                remedy="remove the file",
                file=files[step],
            ) from exc
    rows, columns = min(ROWS, len(snapshots[-1]["labels"])), len(steps) + 2
    figure = Figure(figsize=(1.8 * columns, 1.8 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    low, high = window(configs.intensity(config))
    classes = len(configs.label_table(config.data))
    for n, row in enumerate(axes):
        row[0].imshow(
            snapshots[-1]["labels"][n],
            cmap="nipy_spectral",
            vmin=0,
            vmax=classes - 1,
            interpolation="nearest",
        )
        images = [*(s["generated"][n] for s in snapshots), snapshots[-1]["original"][n]]
        for axis, image in zip(row[1:], images, strict=True):
            axis.imshow(image, cmap="gray", vmin=low, vmax=high, interpolation="nearest")
        for axis in row:
            axis.set_axis_off()
    for axis, name in zip(axes[0], ("condition", *map(str, steps), "original"), strict=True):
        axis.set_title(name, fontsize=9)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=110)
    return steps


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line in the module's docstring.

    Args:
        argv: The arguments; None: those of the process.

    Returns:
        The exit code, 0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m train.figures",
        description="draw a run's progress: condition, generated, original",
    )
    parser.add_argument("run", type=Path, help="a run folder, finished or not")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FIGURE.png")
    args = parser.parse_args(argv)
    steps = progress(args.run, args.output)
    print(f"{args.output}: steps {', '.join(map(str, steps))}")
    return 0


if __name__ == "__main__":
    from runtime.core import console

    sys.exit(console.run(main))
