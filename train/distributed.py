"""The processes that train one network together: `torchrun --nproc-per-node 2 train/run.py ...`.

The training is data parallel: every rank has both networks and a part of each batch, and torch's
`DistributedDataParallel` averages the gradients during each backward pass
(docs/decisions/0043-gradients-are-averaged-by-ddp.md). A process that torchrun did not start is the
only rank, and this module then costs nothing: it does not even import torch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from runtime.core.errors import UsageError

from .config import RunConfig
from .typed import wrong

if TYPE_CHECKING:
    from torch import Tensor, nn

# The other ranks wait while rank 0 simulates a phantom, fills the cache or validates.
PATIENCE = timedelta(hours=12)


@dataclass(frozen=True)
class DistributedContext:
    """This process among the ranks that train together.

    Attributes:
        rank: Its number among all ranks.
        world: The number of all ranks.
        local: Its number on this machine, which is the number of its GPU.
        neighbours: The number of ranks on this machine.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    neighbours: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run folder and prints."""
        return self.rank == 0

    @contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """Run a block on rank 0 first, then on the others.

        Yields:
            Nothing.

        Raises:
            SystemExit: On the other ranks, where rank 0 failed, with its exit code.
        """
        if self.first:
            code = 1
            try:
                yield
                code = 0
            except BaseException as exc:
                code = getattr(exc, "exit_code", 130 if isinstance(exc, KeyboardInterrupt) else 1)
                # argparse ends by SystemExit.
                if isinstance(exc, SystemExit):
                    code = exc.code if isinstance(exc.code, int) else 0 if exc.code is None else 1
                raise
            finally:
                self._agree(code)
        else:
            # Rank 0 prints the reason.
            if code := self._agree(0):
                raise SystemExit(code)
            yield

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Let a network average its gradients over the ranks in each backward pass.

        All ranks call this, in the same order. Every parameter must take part in the loss: DDP
        waits for all of them.

        Args:
            network: The network, on its device; it has the same weights on every rank.

        Returns:
            A network with the same arguments and results; `network` itself for a single rank.
        """
        if self.world == 1:
            return network
        from torch.nn.parallel import DistributedDataParallel

        with warnings.catch_warnings():
            # torch 2.13 gives this option another name, which 2.11 does not know.
            warnings.simplefilter("ignore", FutureWarning)
            # Batch norms keep the statistics of their own rank's part of the batch.
            return DistributedDataParallel(network, broadcast_buffers=False)

    def average(self, tensor: Tensor) -> None:
        """Replace a tensor by its mean over the ranks. All ranks call this with the same shape.

        Args:
            tensor: Floats, changed in place.
        """
        if self.world == 1:
            return
        from torch import distributed

        distributed.all_reduce(tensor)
        tensor /= self.world

    def any(self, value: bool) -> bool:
        """Say whether `value` holds on any rank. All ranks call this.

        Args:
            value: This rank's value.

        Returns:
            True if it is true on at least one rank.
        """
        return self._agree(int(value)) > 0

    def _agree(self, value: int) -> int:
        """The highest of the ranks' values."""
        if self.world == 1:
            return value
        import torch
        from torch import distributed

        highest = torch.tensor(value)
        distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        return int(highest)


SINGLE_PROCESS = DistributedContext()


def check(config: RunConfig, ranks: DistributedContext) -> None:
    """Check that a batch can be divided evenly among the ranks.

    Args:
        config: The config of the run.
        ranks: This process among its peers.

    Raises:
        ConfigError: A rank's part of the batch would be uneven, or too small to normalise.
        UsageError: This machine has GPUs, but fewer than ranks.
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
    # The constructor checks the batch size that each rank would have.
    replace(config, training=replace(t, batch_size=t.batch_size // ranks.world))


@contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """Join the other ranks, if torchrun started this process.

    Yields:
        This process among its peers, or `SINGLE_PROCESS`.
    """
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
        # The ranks leave together: gloo may end a rank whose peer has already left.
        ranks.any(False)
    finally:
        distributed.destroy_process_group()
