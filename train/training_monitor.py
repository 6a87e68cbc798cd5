"""Trainings that no longer learn are stopped: a loss that is no number, a discriminator that has
died, one grey for every mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.core.errors import Mask2CTError

# of both halves of the discriminator's loss together; where neither network wins, least squares
# give 0.25, hinge 1
DEAD_LOSS = 2e-3
# of the true slices' standard deviation; the blurred synthetic image of an untrained network has
# more
LEAST_CONTRAST = 0.02


class Diverged(Mask2CTError):
    """A loss is no longer a number."""


class Collapsed(Mask2CTError):
    """The two networks no longer teach each other anything."""


class TrainingMonitor:
    """Looks at what a training reports.

    `patience`: steps for which the discriminator may be dead, 0: for ever.

    `suspicious`: the discriminator looks dead right now, so that the checkpoints from before are
    worth keeping.
    """

    def __init__(self, folder: Path, patience: int):
        self._folder, self._patience = folder, patience
        self._dead_since: int | None = None

    @property
    def suspicious(self) -> bool:
        return self._dead_since is not None

    def losses(self, before: int, step: int, losses: Mapping[str, float]) -> None:
        """Mean losses of the steps from `before` to `step`. Raises `Diverged` or `Collapsed`."""
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
                f"the discriminator has told every patch apart since step {self._dead_since}"
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
        """Held-out slices as synthesized and as they are.

        Raises `Collapsed` where all that was synthesized is one grey.
        """
        spread, wanted = (
            float(np.std(np.concatenate([case.ravel() for case in cases])))
            for cases in (generated, true)
        )
        if spread < LEAST_CONTRAST * wanted:
            raise Collapsed(
                f"at step {step} the generator synthesizes one grey everywhere: a standard"
                f" deviation of {spread:.2g}",
                expected=f"something like the {wanted:.0f} of the true slices",
                remedy="lower optimizer.lr_g, or raise loss.reconstruction, in a new run",
                file=self._folder,
            )

    def state(self, step: int, tensors: Mapping[str, Any]) -> None:
        """What is about to become a checkpoint.

        Raises `Diverged` where a tensor holds NaN or infinity.
        """
        wrong = next((name for name, t in tensors.items() if not t.isfinite().all()), None)
        if wrong is not None:
            raise Diverged(
                f"the training diverged at step {step}: {wrong} holds values that are no numbers",
                expected="finite weights",
                remedy=(
                    "lower optimizer.lr_g and optimizer.lr_d, or resume from an earlier checkpoint"
                ),
                file=self._folder,
            )


def note(losses: Mapping[str, float]) -> str:
    """The losses on one line."""
    return "  ".join(f"{name} {value:.4f}" for name, value in losses.items())
