"""Stop trainings that do not learn any more.

A loss is not a number, the discriminator has won, or the generator synthesizes one grey for every
mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.errors import Mask2CTError

# The sum of both discriminator losses. Where neither network wins, least squares give 0.25 and
# hinge gives 1.
DEAD_LOSS = 2e-3
# The share of the true slices' standard deviation. Even the blurred image of an untrained network
# has more.
LEAST_CONTRAST = 0.02


class Diverged(Mask2CTError):
    """A loss or a weight is not a number."""


class Collapsed(Mask2CTError):
    """The two networks teach each other nothing any more."""


class TrainingMonitor:
    """Check what a training reports.

    Args:
        folder: The run folder, for errors.
        patience: Steps for which the discriminator's losses may be about 0; 0: any number.
    """

    def __init__(self, folder: Path, patience: int):
        self._folder, self._patience = folder, patience
        self._dead_since: int | None = None

    @property
    def suspicious(self) -> bool:
        """Whether the discriminator's losses are about 0, so that older checkpoints must stay."""
        return self._dead_since is not None

    def losses(self, before: int, step: int, losses: Mapping[str, float]) -> None:
        """Check the losses of some steps.

        Args:
            before: The number of steps done before them.
            step: The number of steps done after them.
            losses: The mean losses over these steps, by name.

        Raises:
            Diverged: A loss is not a number.
            Collapsed: The discriminator's losses were about 0 for `patience` steps.
        """
        if not all(map(math.isfinite, losses.values())):
            raise Diverged(
                f"the training diverged before step {step}: {note(losses)}",
                expected="finite losses",
                remedy=(
                    "lower optimizer.lr_g and optimizer.lr_d, or resume from an earlier checkpoint"
                ),
                file=self._folder,
            )
        if losses["d_real"] + losses["d_fake"] >= DEAD_LOSS:
            self._dead_since = None
            return
        self._dead_since = before if self._dead_since is None else self._dead_since
        if self._patience and step - self._dead_since >= self._patience:
            raise Collapsed(
                f"the discriminator has classified every patch since step {self._dead_since}"
                f" ({note(losses)}): the generator learns nothing from it",
                expected=(
                    f"d_real + d_fake of {DEAD_LOSS:g} and more at least once in {self._patience}"
                    " steps"
                ),
                remedy=(
                    "lower optimizer.lr_d or discriminator.filters in a new run; the checkpoints"
                    f" up to step {self._dead_since} are kept"
                ),
                file=self._folder,
            )

    def check_images(
        self, step: int, generated: Sequence[NDArray[Any]], true: Sequence[NDArray[Any]]
    ) -> None:
        """Check that the synthetic slices are not all one grey.

        Args:
            step: The number of steps done.
            generated: Synthetic held-out slices, one (n, H, W) per patient.
            true: The true slices, likewise.

        Raises:
            Collapsed: The synthetic slices have nearly no contrast.
        """
        spread, true_spread = (
            float(np.std(np.concatenate([case.ravel() for case in cases])))
            for cases in (generated, true)
        )
        if spread < LEAST_CONTRAST * true_spread:
            raise Collapsed(
                f"at step {step} the generator synthesizes one grey everywhere: a standard"
                f" deviation of {spread:.2g}",
                expected=f"something like the {true_spread:.0f} of the true slices",
                remedy="lower optimizer.lr_g, or raise loss.reconstruction, in a new run",
                file=self._folder,
            )

    def state(self, step: int, tensors: Mapping[str, Any]) -> None:
        """Check the tensors of a checkpoint before it is written.

        Args:
            step: The number of steps done.
            tensors: The tensors by name.

        Raises:
            Diverged: A tensor holds NaN or infinity.
        """
        wrong = next((name for name, t in tensors.items() if not t.isfinite().all()), None)
        if wrong is not None:
            raise Diverged(
                f"the training diverged at step {step}: {wrong} holds values that are not numbers",
                expected="finite weights",
                remedy=(
                    "lower optimizer.lr_g and optimizer.lr_d, or resume from an earlier checkpoint"
                ),
                file=self._folder,
            )


def note(losses: Mapping[str, float]) -> str:
    """Write the losses on one line.

    Args:
        losses: The losses by name.

    Returns:
        The line.
    """
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
