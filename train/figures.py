"""Pictures for a person: condition | generated | original, three held-out slices, one HU window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.files import atomic_path

WINDOW_HU = (-700, 700)  # lungs dark but not black, bone bright, contrast in the chambers told from muscle
ROWS = 3


def comparison(path: Path, labels: NDArray[np.uint8], generated: NDArray[np.int16], original: NDArray[np.int16], *,
               classes: int, window: tuple[float, float] = WINDOW_HU, title: str = "") -> None:  # fmt: skip
    """Write a PNG of up to `ROWS` slices, each array (n, H, W). Raises `OutputError`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = min(ROWS, len(labels))
    figure = Figure(figsize=(9, 3 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 3, squeeze=False)
    grey: dict[str, Any] = {"cmap": "gray", "vmin": window[0], "vmax": window[1], "interpolation": "nearest"}
    for row, (mask, painted, true) in zip(axes, zip(labels, generated, original, strict=True), strict=False):
        row[0].imshow(mask, cmap="nipy_spectral", vmin=0, vmax=classes - 1, interpolation="nearest")
        row[1].imshow(painted, **grey)
        row[2].imshow(true, **grey)
        for axis in row:
            axis.set_axis_off()
    for axis, name in zip(axes[0], ("condition", "generated", "original"), strict=True):
        axis.set_title(name)
    figure.suptitle(f"{title}  window {window[0]:g}..{window[1]:g}".strip(), fontsize=9)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=110)
