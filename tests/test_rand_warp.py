"""RandWarp as training loops call it: kinds of input, draws of workers, and what a pair must
keep.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from runtime import DeformationParams, InputError, IntensityJitter, RandWarp, UsageError

SPACING = (2.0, 2.0, 3.0)
AFFINE = np.diag([2.0, 2.0, 3.0, 1.0])


def pair() -> tuple[NDArray[np.int16], NDArray[np.uint16]]:
    """(i, j, k): an image that is a function of its label; air around a body."""
    i, j, k = np.ogrid[:40, :36, :12]
    radius = np.sqrt((2 * (i - 20.0)) ** 2 + (2 * (j - 18.0)) ** 2 + (3 * (k - 5.5)) ** 2)
    label = np.where(radius < 10, 500, np.where(radius < 17, 205, 0)).astype(np.uint16)
    image = (
        np.where(radius < 32, 40, -1000)
        + np.where(label == 500, 260, 0)
        + np.where(label == 205, 80, 0)
    )
    return image.astype(np.int16), label


class Pairs(Dataset[Any]):
    def __init__(self, warp: RandWarp, variant: int | None = None):
        self.warp, self.variant = warp, variant

    def __len__(self) -> int:
        return 4

    def __getitem__(self, n: int) -> Any:
        return self.warp(*pair(), spacing=SPACING, variant=self.variant)[0].sum().item()


def test_rand_warp_pair_stays_pair() -> None:
    image, label = pair()
    moved, deformed = RandWarp(seed=1, jitter=None)(image, label, spacing=SPACING)
    assert (
        moved.dtype == image.dtype and deformed.dtype == label.dtype and moved.shape == image.shape
    )
    assert set(np.unique(deformed)) == {0, 205, 500} and not np.array_equal(deformed, label)
    core = deformed == 500
    for axis in range(3):
        core = core & np.roll(core, 1, axis) & np.roll(core, -1, axis)
    assert core.sum() > 20 and np.array_equal(moved[core], np.full(core.sum(), 300))


def test_rand_warp_calls_differ_seeds_repeat() -> None:
    image, label = pair()
    first, second = ([RandWarp(seed=3)(image, label, spacing=SPACING)[0]] for _ in range(2))
    assert np.array_equal(first[0], second[0])
    warp = RandWarp(seed=3)
    calls = [warp(image, label, spacing=SPACING)[0] for _ in range(3)]
    assert (
        np.array_equal(calls[0], first[0])
        and not np.array_equal(calls[0], calls[1])
        and not np.array_equal(calls[1], calls[2])
    )
    kept = RandWarp(prob=0)(image, label, spacing=SPACING)
    assert kept[0] is image and kept[1] is label
    half = [
        RandWarp(prob=0.5, seed=n)(image, label, spacing=SPACING)[0] is image for n in range(40)
    ]
    assert 8 < sum(half) < 32


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_warp_variant_is_same_across_workers(workers: int) -> None:
    sums = list(
        DataLoader(Pairs(RandWarp(seed=5), variant=2), batch_size=None, num_workers=workers)
    )
    assert (
        len(set(sums)) == 1
        and sums[0] == RandWarp(seed=5)(*pair(), spacing=SPACING, variant=2)[0].sum()
    )


def test_rand_warp_workers_epochs_draw_anew() -> None:
    torch.manual_seed(0)
    loader = DataLoader(Pairs(RandWarp(seed=5)), batch_size=None, num_workers=2)
    epochs = [tuple(loader) for _ in range(2)]
    assert len({*epochs[0], *epochs[1]}) == 8
    torch.manual_seed(0)
    assert [tuple(loader) for _ in range(2)] == epochs


def test_rand_warp_forks_draw_anew() -> None:
    """Forked workers draw anew without torch, too."""
    code = (
        "import os, sys, numpy as np; from runtime import RandWarp; warp = RandWarp(seed=1)\nlabel"
        " = np.zeros((20, 20, 8), np.uint8); label[6:14, 6:14, 2:6] = 1; image ="
        " label.astype(np.int16) * 300 - 100\nfor n in range(2):\n    if os.fork() == 0:\n       "
        " print(int(warp(image, label, spacing=(2, 2, 3))[0].sum()), flush=True); os._exit(0)\n   "
        " os.wait()\nassert not any(name.startswith(('torch', 'SimpleITK')) for name in"
        " sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(set(done.stdout.split())) == 2


def test_rand_warp_keeps_dicts_of_tensors() -> None:
    image, label = pair()
    data = {
        "image": MetaTensor(
            torch.from_numpy(image.astype(np.float32))[None], affine=torch.from_numpy(AFFINE)
        ),
        "label": MetaTensor(
            torch.from_numpy(label.astype(np.float32))[None], affine=torch.from_numpy(AFFINE)
        ),
        "name": "p1",
    }
    moved = RandWarp(seed=2)(data)
    assert moved["name"] == "p1" and data["image"].max() == 300
    for key in ("image", "label"):
        assert isinstance(moved[key], MetaTensor) and moved[key].shape == data[key].shape
        assert torch.equal(moved[key].affine, data[key].affine) and not torch.equal(
            moved[key], data[key]
        )
    arrays = RandWarp(seed=2)(image, label, affine=AFFINE)
    assert np.array_equal(arrays[1], moved["label"][0].numpy())
    assert np.abs(arrays[0] - moved["image"][0].numpy()).max() <= 0.5


def test_warp_other_units_and_odd_labels() -> None:
    image, label = pair()
    small = (image.astype(np.float32) + 1000) / 400
    moved, deformed = RandWarp(seed=1, unit="a.u.")(
        small, np.where(label > 0, label, 7), spacing=SPACING
    )
    assert moved.dtype == np.float32 and 0.5 < np.median(moved[moved > 1]) < 5
    assert {205, 500} < set(np.unique(deformed))
    still = RandWarp(
        seed=1,
        ranges=DeformationParams(0, 0, 0),
        jitter=IntensityJitter(shift=0, stable_shift=0, gain=0, common=0),
    )
    assert np.array_equal(still(image, label, spacing=SPACING)[0], image)


def test_rand_warp_refuses_bad_input() -> None:
    image, label = pair()
    with pytest.raises(UsageError, match="the voxel spacing is unknown"):
        RandWarp()(image, label)
    with pytest.raises(InputError, match="shape"):
        RandWarp()(image[0], label[0], spacing=SPACING)
    with pytest.raises(InputError, match="values"):
        RandWarp()(image, image + 0.5, spacing=SPACING)
    with pytest.raises(InputError, match="positions differ"):
        RandWarp()(image, label[:-1], spacing=SPACING)
