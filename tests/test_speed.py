"""What makes steps faster must not change what is learnt: bf16, torch.compile, memory layout, a
host that never waits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_networks import batch, small
from test_training import (
    TINY,
    arguments,
    assert_same_bits,
    losses,
    tensors,
)
from torch.overrides import TorchFunctionMode

from train.config import resolve
from train.loop import Training, open_cohort


def test_bf16_steps_near_float32_state_float32() -> None:
    """BF16 steps are near the float32 ones, and all that is kept is float32."""
    exact, coarse = small("loss.features=1"), small("loss.features=1", "training.precision=bf16")
    for n in range(3):
        a, b = exact(n, batch(n)), coarse(n, batch(n))
    assert all(value.dtype == torch.float32 for value in b.values())
    assert {name: value.item() for name, value in b.items()} == pytest.approx(
        {name: value.item() for name, value in a.items()}, rel=0.05
    )
    assert a["adversarial"] != b["adversarial"]  # it was in fact computed otherwise
    assert {t.dtype for t in coarse.state().values() if t.is_floating_point()} == {torch.float32}


def test_bf16_state_roundtrip_keeps_next_step() -> None:
    """The BF16 state survives saving and loading: the next step has the same bits."""
    one, other = (small("training.precision=bf16") for _ in range(2))
    for n in range(3):
        one(n, batch(n))
    other.load_state(one.state())
    one(3, batch(3))
    other(3, batch(3))
    assert_same_bits(one.state(), other.state())


class Asked(TorchFunctionMode):
    """Notes how tensors' values are asked for: on a GPU, the host would wait for all that was
    queued.
    """

    def __init__(self) -> None:
        super().__init__()
        self.how: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in (
            "item",
            "tolist",
            "cpu",
            "numpy",
            "nonzero",
            "__bool__",
            "__float__",
            "__int__",
        ):
            self.how.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["loss.weighting=weighted", "loss.gan=hinge", "loss.features=1", "training.precision=bf16"],
    ],
)
def test_training_step_never_waits_for_device(
    cohort: Path, tmp_path: Path, more: list[str]
) -> None:
    settings = [*TINY, "augment.rotation=5", "augment.same=false", *more]
    opened = resolve({}, settings, dataset_path=str(cohort))
    training = Training(opened, tmp_path, open_cohort(opened, tmp_path, quiet=True), quiet=True)
    with Asked() as asked:
        for _ in range(2):
            training._advance()
        assert asked.how == []
        training._report(validate=False)
        assert asked.how == ["tolist"]  # all losses at once


def test_training_feature_maps_are_channels_last() -> None:
    step, seen = small(), []
    for stage in (*step.generator.encoder, *step.discriminator.stages):
        stage.register_forward_hook(
            lambda _, __, out: seen.append(out.is_contiguous(memory_format=torch.channels_last))
        )
    step(0, batch())
    assert seen and all(seen)


def test_missing_compiler_is_exit_3(config: Path, cohort: Path, tmp_path: Path, command) -> None:
    environment = {"CXX": "nonesuch", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    done = command(
        *arguments(config, cohort, tmp_path / "run", 4, "training.compile=true"), env=environment
    )
    assert (
        done.returncode == 3
        and "torch.compile cannot be used here" in done.stderr
        and "training.compile=false" in done.stderr
    )
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_compiled_run_learns_and_resumes_identically(
    config: Path, cohort: Path, tmp_path: Path, command
) -> None:
    """A compiled run learns the same as a plain one and resumes bit for bit."""
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    assert command(*arguments(config, cohort, plain, 10)).returncode == 0
    for run, steps, more in ((whole, 10, ()), (parts, 5, ()), (parts, 10, ("--resume",))):
        done = command(
            *arguments(config, cohort, run, steps, "training.compile=true"), *more, env=environment
        )
        assert done.returncode == 0, done.stderr
    assert losses(plain)[0][1] == pytest.approx(
        losses(whole)[0][1], rel=1e-2
    )  # the first two steps: later ones drift apart
    assert_same_bits(tensors(whole, 10), tensors(parts, 10))
    assert [row[:2] for row in losses(whole)] == [
        row[:2] for row in losses(parts)
    ]  # a run that ends measures itself, and goes on
