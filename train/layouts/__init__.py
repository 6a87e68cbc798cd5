"""Learned layouts: fit `runtime.core.layout_model.LayoutModel` to the patients of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ..config import RunConfig


def add_layouts(config: RunConfig, folder: Path) -> bool:
    """Fit layouts to the training patients of a finished run, and put them into its folder.

    Args:
        config: The config of the run, with the path of its data.
        folder: The run folder.

    Returns:
        Whether there are layouts: not for a model without a context, pixels without a size in mm,
        or too few patients.

    Raises:
        ModelError: The run is not finished or damaged.
        InputError: A file of the data cannot be read.
    """
    from .. import checkpoint
    from ..data.dataset import assign
    from ..data.layouts import find
    from ..loop import dataset_path
    from .cohort import fit_pairs

    run = checkpoint.load_run(folder)
    if run.context is None or config.data.split_by == "slices":
        return False
    pairs = find(dataset_path(config, folder), config.data).pairs
    train = [pairs[n] for n in assign(pairs, config.data)["train"]]
    model = fit_pairs(train, run.labels, run.grid, run.intensity, run.context)
    if model is None:
        return False
    checkpoint.write_layouts(folder, model.to_bytes())
    return True
