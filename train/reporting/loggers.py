"""Log the numbers of a run to TensorBoard and Weights & Biases, where the config asks for it.

Each library is imported only then. Figures, which show patients' slices, and the dataset's path
stay in the run folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.core.errors import UsageError, importing

from .. import config as configs
from ..config import LoggingConfig, RunConfig

PROJECT = "mask2ct"


def require(logging: LoggingConfig) -> None:
    """Import what the config asks for, before anything starts.

    Args:
        logging: The section of the config.

    Raises:
        MissingComponent: A library is not installed.
        UsageError: Weights & Biases does not accept the run.
    """
    for name, enabled in (("tensorboard", logging.tensorboard), ("wandb", logging.wandb)):
        if enabled:
            with importing(
                name,
                f"{name}, since logging.{name} is on",
                f"pip install {name}, or drop the option",
            ):
                __import__(name)
    if logging.wandb:
        import wandb

        with _weights_and_biases():
            if logging.wandb_id is not None:
                wandb.Settings(run_id=logging.wandb_id)
            if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
                raise UsageError(
                    "Weights & Biases has no API key here",
                    expected="a login, or WANDB_MODE=offline",
                    remedy="run `wandb login`, or set WANDB_MODE=offline and `wandb sync` later",
                )


@contextmanager
def _weights_and_biases() -> Iterator[None]:
    """Convert the library's errors to `UsageError`."""
    import wandb

    try:
        yield
    except wandb.errors.Error as exc:
        raise UsageError(
            f"Weights & Biases does not take the run: {str(exc).splitlines()[0][:200]}",
            expected="a login and a plain run id",
            remedy="correct --wandb-resume-id, run `wandb login`, or set WANDB_MODE=offline",
        ) from exc


class Loggers:
    """The loggers of `config.logging`: none, TensorBoard, Weights & Biases, or both.

    TensorBoard writes to RUN/tensorboard. Weights & Biases follows its own variables:
    WANDB_MODE=offline keeps everything in RUN/wandb.

    Args:
        config: The config of the run.
        folder: The run folder.
        quiet: Whether to print nothing.
    """

    def __init__(self, config: RunConfig, folder: Path, *, quiet: bool = False):
        logging = config.logging
        require(logging)
        self._board: Any = None
        self._wandb: Any = None
        if logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if logging.wandb:
            import wandb

            data = configs.to_json(config)
            data["data"]["path"] = None
            # The command line, which names the dataset, and the printed lines stay on this machine.
            settings = wandb.Settings(
                silent=quiet, console="off", save_code=False, disable_git=True, x_disable_meta=True
            )
            with _weights_and_biases():
                self._wandb = wandb.init(
                    project=PROJECT,
                    name=config.name,
                    id=logging.wandb_id,
                    resume="allow" if logging.wandb_id else None,
                    dir=str(folder),
                    config=data,
                    settings=settings,
                )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log numbers.

        Args:
            step: The number of steps done.
            numbers: The numbers by name.
        """
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def close(self) -> None:
        """Write pending numbers."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
