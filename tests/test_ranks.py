"""Several processes training one network: the same as one process that does the work of all,
BatchNorm on each one's part.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
import torch
from test_training import TINY, arguments, wait_for

from runtime.core.errors import ConfigError
from runtime.core.manifest import Intensity
from train import checkpoint
from train.config import resolve
from train.data.dataset import Batches, Slices
from train.distributed import SINGLE_PROCESS, DistributedContext, check
from train.loop import Training, open_cohort


class Emulated(DistributedContext):
    """A rank that is a thread of this process: what gloo does between processes is done here
    with a list.
    """

    meeting: Barrier
    slots: list[torch.Tensor]

    def _reduce(self, tensor: torch.Tensor, what: str) -> None:
        self.slots[self.rank] = tensor.clone()
        self.meeting.wait()
        every = torch.stack(self.slots)
        tensor.copy_(every.sum(0) if what == "sum" else every.max(0).values)
        self.meeting.wait()


def emulated(world: int) -> list[Emulated]:
    kind = type(
        "Emulated",
        (Emulated,),
        {"meeting": Barrier(world, timeout=60), "slots": [torch.zeros(0)] * world},
    )
    return [kind(rank, world) for rank in range(world)]


def together(tasks) -> list:
    """Each task in a thread of its own."""
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(task) for task in tasks]]


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


def test_ranks_average_gradients_in_any_layout() -> None:
    """Gradients are averaged in place, whatever their memory layout is."""
    shapes = [(3,), (2, 3, 4, 4), ()]
    values = [[torch.rand(shape) for shape in shapes] for _ in range(2)]
    expected = [(a + b) / 2 for a, b in zip(*values, strict=True)]
    for tensors in values:
        tensors[1] = tensors[1].contiguous(memory_format=torch.channels_last)
    tasks = [
        lambda r=r, t=t: r.average([t[0], None, *t[1:]])
        for r, t in zip(emulated(2), values, strict=True)
    ]
    together(tasks)
    for tensors in values:
        assert all(torch.allclose(a, b) for a, b in zip(tensors, expected, strict=True))
        assert tensors[1].is_contiguous(memory_format=torch.channels_last)
    alone = torch.ones(2)
    SINGLE_PROCESS.average([alone, None])
    assert alone.tolist() == [1, 1] and not SINGLE_PROCESS.any(False) and SINGLE_PROCESS.any(True)


def test_one_rank_decides_for_all() -> None:
    assert together([lambda r=r: r.any(r.rank == 1) for r in emulated(2)]) == [True, True]
    assert together([lambda r=r: r.any(False) for r in emulated(2)]) == [False, False]


def test_ranks_wait_for_rank_zero_exit() -> None:
    """Other ranks wait for rank 0 and end with its exit code."""
    done: list[int] = []

    def work(ranks: DistributedContext, fail: bool) -> object:
        try:
            with ranks.rank_zero_first():
                done.append(ranks.rank)
                if fail:
                    raise ConfigError("no")
        except (ConfigError, SystemExit) as exc:
            return exc
        return None

    assert together([lambda r=r: work(r, False) for r in emulated(2)]) == [None, None] and done == [
        0,
        1,
    ]
    first, other = together([lambda r=r: work(r, True) for r in emulated(2)])
    assert (
        isinstance(first, ConfigError)
        and isinstance(other, SystemExit)
        and other.code == 2
        and done == [0, 1, 0]
    )


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
    together(
        [Training(resolved, one, opened, quiet=True, ranks=ranks).run for ranks in emulated(2)]
    )
    theirs, ours = metrics(two), metrics(one)
    assert (
        [row["step"] for row in theirs] == [row["step"] for row in ours] == [2, 4, 5, 6, 8, 10]
    )  # 5: a checkpoint
    for a, b in zip(theirs, ours, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-3, abs=1e-5)
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
