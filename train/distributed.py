"""The processes that train one network together, as torchrun starts them: `torchrun
--nproc-per-node 2 train/run.py ...`

Data parallel: every rank has the whole networks and a part of each batch, and gradients are
averaged before every step of an optimiser. Started without torchrun there is one rank, and
everything here is free (docs/decisions/0008-ranks-average-gradients-themselves.md): even torch is
not imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from runtime.core.errors import UsageError

from .config import RunConfig
from .typed import wrong

if TYPE_CHECKING:
    from torch import Tensor

PATIENCE = timedelta(
    hours=12
)  # the others wait while the first makes a phantom, fills the cache or validates


@dataclass(frozen=True)
class DistributedContext:
    """This process' number `rank` of `world`; on its own machine it is number `local`, which is
    its GPU's, of `neighbours`.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    neighbours: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder and talks."""
        return self.rank == 0

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """The first rank runs the block, then the others do; when it fails there, they end
        quietly with its exit code.
        """
        if self.first:
            code = 1
            try:
                yield
                code = 0
            except BaseException as exc:
                code = getattr(exc, "exit_code", 130 if isinstance(exc, KeyboardInterrupt) else 1)
                if isinstance(exc, SystemExit):  # argparse
                    code = exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
                raise
            finally:
                self._agree(code)
        else:
            if code := self._agree(0):
                raise SystemExit(code)  # the first rank says why
            yield

    def average(self, tensors: Iterable[Tensor | None]) -> None:
        """Replace each tensor (None: left out) by its mean over the ranks.

        All ranks call this with the same shapes.
        """
        there = [t for t in tensors if t is not None]
        if self.world == 1 or not there:
            return
        import torch

        flat = torch.cat([t.reshape(-1) for t in there])  # one message, not hundreds
        self._reduce(flat, "sum")
        flat /= self.world
        for t, mean in zip(there, flat.split([t.numel() for t in there]), strict=True):
            t.copy_(mean.view_as(t))

    def any(self, value: bool) -> bool:
        """Whether `value` holds on any rank. All ranks call this."""
        return self._agree(int(value)) > 0

    def _agree(self, value: int) -> int:
        """The highest of the ranks' values."""
        if self.world == 1:
            return value
        import torch

        highest = torch.tensor(value)
        self._reduce(highest, "highest")
        return int(highest)

    def _reduce(self, tensor: Tensor, what: Literal["sum", "highest"]) -> None:
        """Replace `tensor` on every rank by the sum or the highest of all."""
        from torch import distributed

        distributed.all_reduce(
            tensor, distributed.ReduceOp.SUM if what == "sum" else distributed.ReduceOp.MAX
        )


SINGLE_PROCESS = DistributedContext()


def check(config: RunConfig, ranks: DistributedContext) -> None:
    """Raise `ConfigError` when a batch cannot be dealt out evenly, or a rank's part of it would be
    no batch.

    `UsageError` when a machine has GPUs, but fewer than ranks.
    """
    if ranks.world == 1:
        return
    import torch

    t = config.training
    if t.device != "cpu" and 0 < torch.cuda.device_count() < ranks.neighbours:
        raise UsageError(
            f"{ranks.neighbours} ranks are started on this machine, which has"
            f" {torch.cuda.device_count()} GPU(s)",
            expected="one GPU for each rank",
            remedy="lower --nproc-per-node, or set training.device=cpu",
        )
    if t.batch_size % ranks.world:
        raise wrong("training.batch_size", t.batch_size, f"a multiple of the {ranks.world} ranks")
    replace(config, training=replace(t, batch_size=t.batch_size // ranks.world))  # checks itself


@contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """Meet the other ranks, if torchrun started this process; a lone process otherwise."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield SINGLE_PROCESS
        return
    import torch
    from torch import distributed

    ranks = DistributedContext(
        *(
            int(os.environ[name])
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
    )
    if ranks.local < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE
    )
    try:
        yield ranks
        ranks.any(
            False
        )  # leave together: a rank whose peer is gone may be ended by gloo on its way out
    finally:
        distributed.destroy_process_group()
