"""The generator of a comparison: trained on the training patients alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from runtime.core.atomic_files import write_text
from runtime.core.contrast import draw_contrast
from runtime.core.resampling import SliceGrid
from runtime.core.rng import CaseRandom
from runtime.core.tissue_classes import classes_of_volume
from runtime.core.volume import LabelVolume

from .. import checkpoint
from ..config import RunConfig
from ..loop import Training, choose_device, open_cohort
from ..validation import generate
from .arms import Generate, Tissues
from .cohort import Case, Patient

PATIENTS = "patients.csv"


def train_generator(
    config: RunConfig,
    patients: Sequence[Patient],
    folder: Path,
    *,
    quiet: bool,
) -> None:
    """Train on all `patients` but the last, which chooses the checkpoint; nothing else is read.

    A training that was killed goes on.

    Args:
        config: with nothing left open; its data set is replaced by the patients.
        patients: at least three, as for every training.
        folder: the run folder, finished, begun or new.
        quiet: no progress.
    """
    if (folder / checkpoint.RUN).is_file():
        return
    table = folder.parent / f"{folder.name}-{PATIENTS}"
    write_text(table, _csv(patients))
    data = replace(config.data, path=str(table), phantom=None, split_by="patients")
    config = replace(config, data=data)
    begun = (folder / checkpoint.CONFIG).is_file()
    resume_from = checkpoint.starting_point(folder, config, begun, quiet=quiet)
    cohort = open_cohort(config, folder, quiet=True)
    training = Training(config, folder, cohort, resume_from, quiet=quiet)
    checkpoint.claim(folder, config)
    training.run()


def _csv(patients: Sequence[Patient]) -> str:
    """The table that training reads: every pair with its patient's number and split."""
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["image", "label", "patient", "split"])
    for number, patient in enumerate(patients):
        split = "valid" if number == len(patients) - 1 else "train"
        for pair in patient.pairs:
            writer.writerow([pair.image.resolve(), pair.label.resolve(), number, split])
    return out.getvalue()


def open_generator(folder: Path) -> tuple[Generate, Tissues | None]:
    """Open the generator of a run folder.

    Noise and style are drawn as the runtime draws them: keyed by seed, mask and variant.

    Args:
        folder: the run folder.

    Returns:
        A function of (mask on the canvas, seed, variant), and for a model with a context the
        function that gives its layout; the mask is then a dense map.
    """
    run = checkpoint.load_run(folder)
    device, _ = choose_device(run.config)
    network = checkpoint.load_generator(folder).to(device)
    context, noise_along_z = run.context, run.config.generator.noise_along_z

    def image_of(mask: LabelVolume, seed: int, variant: int) -> NDArray[np.int16]:
        random = CaseRandom(seed, mask.digest, variant, noise_along_z)
        grid = SliceGrid(run.grid, mask.geometry, mask.labels.shape)
        labels = np.stack([grid.labels(mask.labels, k) for k in range(grid.count)])
        noise = np.stack([random.noise(k, labels.shape[2:]) for k in range(grid.count)])
        style = random.style(network.style) if network.style else None
        if context is not None and style is not None:
            span = np.float32(run.intensity.high - run.intensity.low)
            style = draw_contrast(context, random) / span
        with torch.no_grad():
            return generate(network, labels, noise, run.classes, run.intensity, device, style=style)

    if context is None:
        return image_of, None

    def tissues_of(case: Case) -> NDArray[np.uint8]:
        return classes_of_volume(case.image, case.geometry, context, len(run.labels), run.grid)

    return image_of, tissues_of
