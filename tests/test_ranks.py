"""Several processes training one network: the same as one process that does the work of all,
BatchNorm on each one's part.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from test_training import TINY, arguments, wait_for
from torch import Tensor, distributed, nn

from runtime.core.errors import ConfigError
from runtime.core.manifest import Intensity
from train import checkpoint
from train.config import resolve
from train.data.dataset import Batches, Slices
from train.distributed import SINGLE_PROCESS, DistributedContext, check
from train.loop import Training, open_cohort
from train.step import Batch

WORLD = 2
Task = Callable[[DistributedContext], object]


def join(file: str, numbers: multiprocessing.SimpleQueue[int]) -> None:
    """Make this process a rank. The file, and not a port, is where the ranks meet."""
    global rank
    rank = DistributedContext(numbers.get(), WORLD)
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank.rank, world_size=WORLD
    )


def at_rank(task: Task) -> tuple[int, object]:
    """Run a task here. The ranks part when all have done theirs, so that each does one."""
    try:
        result = task(rank)
    except (ConfigError, SystemExit) as exc:
        result = exc
    distributed.barrier()
    return rank.rank, result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Task], list]]:
    """Run one task at each of two ranks, which are processes; the results in their order."""
    context = multiprocessing.get_context("spawn")
    numbers = context.SimpleQueue()
    for number in range(WORLD):
        numbers.put(number)
    file = tmp_path_factory.mktemp("ranks") / "meeting"
    with ProcessPoolExecutor(WORLD, context, join, (str(file), numbers)) as pool:

        def run(task: Task) -> list:
            futures = [pool.submit(at_rank, task) for _ in range(WORLD)]
            return [result for _, result in sorted(future.result(300) for future in futures)]

        yield run


def test_rank_batches_make_up_whole_batch() -> None:
    """The parts of a batch that the ranks take, put together, are the batch."""
    rng = np.random.default_rng(0)
    patients = [
        Slices(
            rng.integers(0, 8, (9, 1, 4, 4), np.uint8),
            rng.integers(-1000, 1000, (9, 4, 4)).astype(np.int16),
        )
    ]
    arguments = (patients, 6, 3, Intensity("HU", -1024, 1024))
    for step in (0, 4):
        parts = [Batches(*arguments, rank, 3)[step] for rank in range(3)]
        for whole, *pieces in zip(Batches(*arguments)[step], *parts, strict=True):
            assert {len(piece) for piece in pieces} == {2} and np.array_equal(
                whole, np.concatenate(pieces)
            )


def gradients_of_a_batch(ranks: DistributedContext) -> list[Tensor]:
    """The gradients after one backward pass over this rank's part of a batch of four."""
    torch.manual_seed(0)
    network, images = small_network(), torch.rand(4, 2, 6, 6)
    part = images.chunk(ranks.world)[ranks.rank]
    # It averages as long as it lives.
    wrapped = ranks.data_parallel(network)
    wrapped(part).square().mean().backward()
    return [parameter.grad for parameter in network.parameters()]


def small_network() -> nn.Module:
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.PReLU())
    return network.to(memory_format=torch.channels_last)


def test_ranks_average_gradients_in_any_layout(ranks) -> None:
    """All ranks have the gradients of the whole batch, in the layout of the parameters."""
    expected = gradients_of_a_batch(SINGLE_PROCESS)
    for gradients in ranks(gradients_of_a_batch):
        assert all(torch.allclose(a, b) for a, b in zip(gradients, expected, strict=True))
        assert gradients[0].is_contiguous(memory_format=torch.channels_last)


def mean_of_ranks(ranks: DistributedContext) -> list[float]:
    values = torch.tensor([1.0, 3.0 * ranks.rank])
    ranks.average(values)
    return values.tolist()


def test_ranks_average_their_losses(ranks) -> None:
    assert ranks(mean_of_ranks) == [[1.0, 1.5], [1.0, 1.5]]
    assert mean_of_ranks(SINGLE_PROCESS) == [1.0, 0.0]


def decisions(ranks: DistributedContext) -> tuple[bool, bool]:
    return ranks.any(ranks.rank == 1), ranks.any(False)


def test_one_rank_decides_for_all(ranks) -> None:
    assert ranks(decisions) == [(True, False), (True, False)]
    assert SINGLE_PROCESS.any(True) and not SINGLE_PROCESS.any(False)


class Work:
    """A task that rank 0 does first; each rank notes that it did it, and rank 0 may fail."""

    def __init__(self, done: Path, *, fail: bool):
        self.done, self.fail = done, fail

    def __call__(self, ranks: DistributedContext) -> None:
        with ranks.rank_zero_first():
            with self.done.open("a") as file:
                file.write(f"{ranks.rank}")
            if self.fail:
                raise ConfigError("no")


def test_ranks_wait_for_rank_zero_exit(ranks, tmp_path: Path) -> None:
    """Other ranks wait for rank 0 and end with its exit code."""
    assert ranks(Work(tmp_path / "both", fail=False)) == [None, None]
    assert (tmp_path / "both").read_text() == "01"
    first, other = ranks(Work(tmp_path / "first", fail=True))
    assert isinstance(first, ConfigError)
    assert isinstance(other, SystemExit) and other.code == 2
    assert (tmp_path / "first").read_text() == "0"


def test_indivisible_batch_for_ranks_is_refused() -> None:
    """A batch that the ranks cannot share evenly is refused."""
    with pytest.raises(ConfigError, match=r"training\.batch_size is 4"):
        check(resolve({}, TINY), DistributedContext(0, 3))
    one_pixel = [*TINY, "data.canvas=[32,32]", "generator.depth=5"]
    with pytest.raises(ConfigError, match=r"training\.batch_size is 1"):
        check(resolve({}, one_pixel), DistributedContext(0, 4))
    check(resolve({}, one_pixel), DistributedContext(0, 2))


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def torchrun(*more: object, port: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(port),
        *map(str, more),
    ]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"name": "tiny"}))
    return path


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


AUGMENTED = ("augment.rotation=5", "augment.zoom=0.05", "training.threads=1")


def in_halves(network: nn.Module) -> Callable[..., Sequence]:
    """Call a network once for each rank's half of a batch, and join what it returns.

    Its batch norms see one half at a time. As on rank 0, only the first half moves their
    running statistics.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    momentum = [layer.momentum for layer in norms]

    def call(*arguments: Tensor | None) -> Sequence:
        halves = zip(*([t, t] if t is None else t.chunk(WORLD) for t in arguments), strict=True)
        results = []
        for number, half in enumerate(halves):
            for layer, value in zip(norms, momentum, strict=True):
                layer.momentum = 0.0 if number else value
            results.append(network(*half))
        for layer, value in zip(norms, momentum, strict=True):
            layer.momentum = value
        return joined(results)

    return call


def joined(parts: list) -> Sequence | Tensor:
    """Tensors, or nested sequences of them, joined along the batch."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return [joined(list(items)) for items in zip(*parts, strict=True)]


class BothRanks(Training):
    """A training in one process that does the work of two ranks."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        step = self.step
        step._generate = in_halves(step.generator)
        step._discriminate = step._discriminate_frozen = in_halves(step.discriminator)

    def network(self):
        """As on rank 0, whose part of the batches measures the batch statistics."""
        count = self.config.training.recalibrate
        batches = (self.batch(n) for n in range(count))
        return self.step.recalibrated(
            Batch(*(None if t is None else t.chunk(WORLD)[0] for t in batch)) for batch in batches
        )


@pytest.mark.slow
def test_two_ranks_equal_one_process(
    config: Path, cohort: Path, root: Path, tmp_path: Path, port: int
) -> None:
    """Two ranks learn the same as one process that does the work of both."""
    two, one = tmp_path / "two", tmp_path / "one"
    command = torchrun(*arguments(config, cohort, two, 10, *AUGMENTED), port=port)
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("are written") == 1

    resolved = resolve(
        {"name": "tiny"}, [*TINY, *AUGMENTED, "training.steps=10"], dataset_path=str(cohort)
    )
    opened = open_cohort(resolved, one)
    BothRanks(resolved, one, opened, quiet=True).run()
    theirs, ours = metrics(two), metrics(one)
    assert (
        [row["step"] for row in theirs] == [row["step"] for row in ours] == [2, 4, 5, 6, 8, 10]
    )  # 5: a checkpoint
    for a, b in zip(theirs, ours, strict=True):
        # The two sum in another order, and every step of Adam makes more of the last bit.
        rel = 1e-3 if a["step"] <= 8 else 1e-2
        assert a["losses"] == pytest.approx(b["losses"], rel=rel, abs=1e-5)
    assert theirs[-1]["metrics"]["body"] == pytest.approx(ours[-1]["metrics"]["body"], rel=1e-2)
    a, b = (checkpoint.load(run / "checkpoints" / "step-00000010")[1] for run in (two, one))
    assert a.keys() == b.keys()
    weights = [name for name in a if name.startswith("generator/") and name.endswith("weight")]
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in weights)

    alone = tmp_path / "alone"
    Training(resolved, alone, opened, quiet=True).run()
    assert metrics(alone)[0]["losses"] != pytest.approx(
        ours[0]["losses"], rel=1e-3, abs=1e-5
    )  # BatchNorm saw four slices, not two


@pytest.mark.slow
def test_two_ranks_stop_and_resume_identically(
    config: Path, cohort: Path, root: Path, tmp_path: Path, port: int
) -> None:
    """Two ranks stop together; the resumed run ends with the same bits."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = subprocess.run(
        torchrun(*arguments(config, cohort, whole, 10), port=port),
        cwd=root,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    longer = torchrun(*arguments(config, cohort, parts, 10_000), port=port)
    process = subprocess.Popen(
        longer, cwd=root, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    wait_for(lambda: (parts / "checkpoints").exists() and checkpoint.newest(parts), process)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert "stopped after step" in errors and process.returncode != 0
    stopped = checkpoint.newest(parts)
    assert stopped is not None
    for path in (parts / "checkpoints").iterdir():  # go back to step 5
        if path.name != "step-00000005":
            (path / "state.json").unlink()
    done = subprocess.run(
        torchrun(
            *arguments(config, cohort, parts, 10, "training.keep_checkpoints=2"),
            "--resume",
            port=port,
        ),
        cwd=root,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    a, b = (checkpoint.load(run / "checkpoints" / "step-00000010")[1] for run in (whole, parts))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.slow
def test_two_ranks_report_errors_once(
    config: Path, cohort: Path, root: Path, trained: Path, tmp_path: Path, port: int
) -> None:
    """Two ranks report an error once, and one of them runs the test split."""

    def said(*more: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            torchrun(*more, port=port), cwd=root, capture_output=True, text=True, timeout=300
        )

    line = arguments(config, cohort, tmp_path / "run", 10)
    for wrong, says in (
        ([*line, "training.stepz=3"], "there is no key 'training.stepz'"),
        ([*line, "training.batch_size=5"], "training.batch_size is 5"),
        ([*line, "generator.style=99"], "generator.style is 99"),
        (["train/run.py", "--config", "absent.json"], "absent.json does not exist"),
        (["train/run.py", "--confog", "x"], "unrecognized arguments: --confog"),
        (["train/run.py", "--test", "--output", trained], "the test split is empty"),
    ):
        done = said(*wrong)
        assert done.returncode != 0 and done.stderr.count(says) == 1, done.stderr
        assert 'train/run.py", line' not in done.stderr and not (tmp_path / "run").exists()
    done = said(
        *line, "data.train_ratio=0.5", "data.valid_ratio=0.25", "generator.style=1", "--dry-run"
    )
    assert done.returncode == 0 and done.stdout.count("MACs per slice") == 1, done.stderr
    assert (
        said(*line, "data.train_ratio=0.5", "data.valid_ratio=0.25", "generator.style=1").returncode
        == 0
    )
    done = said("train/run.py", "--test", "--output", tmp_path / "run")
    assert done.returncode == 0 and done.stdout.count("test.json is written") == 1, done.stderr
    assert json.loads((tmp_path / "run" / "test.json").read_text())["patients"] == 1
