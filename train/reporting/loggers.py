"""Numbers of a run to TensorBoard and Weights & Biases, each only when the config asks for it and
imported only then.

Numbers alone: the figures hold patients' slices and stay in the run folder, and so does the
dataset's path.
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
    """Import what the config asks for, before anything is started.

    Raises `MissingComponent`, and `UsageError` where Weights & Biases will not take the run.
    """
    for name, wanted in (("tensorboard", logging.tensorboard), ("wandb", logging.wandb)):
        if wanted:
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
    """Map its errors to `UsageError`."""
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
    """What `config.logging` asks for: nothing, TensorBoard files in RUN/tensorboard, a Weights &
    Biases run, or both.

    Weights & Biases follows its own variables: WANDB_MODE=offline keeps everything in RUN/wandb.
    """

    def __init__(self, config: RunConfig, folder: Path, *, quiet: bool = False):
        wanted = config.logging
        require(wanted)
        self._board: Any = None
        self._wandb: Any = None
        if wanted.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"))
        if wanted.wandb:
            import wandb

            data = configs.to_json(config)
            data["data"]["path"] = None
            # neither the command line, which names the dataset, nor what is printed leaves with the
            # numbers
            settings = wandb.Settings(
                silent=quiet, console="off", save_code=False, disable_git=True, x_disable_meta=True
            )
            with _weights_and_biases():
                self._wandb = wandb.init(
                    project=PROJECT,
                    name=config.name,
                    id=wanted.wandb_id,
                    resume="allow" if wanted.wandb_id else None,
                    dir=str(folder),
                    config=data,
                    settings=settings,
                )

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Log `numbers` by name at `step`."""
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def close(self) -> None:
        """Flush what is pending."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
